// What every .cu needs around its launch: no CUDA error swallowed, and the right device current.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "tensor_view.h"

namespace dit4dit {

// Errors that every later call of this process will give again.
inline bool is_sticky(cudaError_t error) {
    switch (error) {
        case cudaErrorIllegalAddress:
        case cudaErrorIllegalInstruction:
        case cudaErrorMisalignedAddress:
        case cudaErrorInvalidAddressSpace:
        case cudaErrorInvalidPc:
        case cudaErrorHardwareStackError:
        case cudaErrorLaunchFailure:
        case cudaErrorLaunchTimeout:
        case cudaErrorAssert:
        case cudaErrorECCUncorrectable: return true;
        default: return false;
    }
}

inline void check_cuda(cudaError_t error, const std::string& where) {
    if (error == cudaSuccess) return;
    const std::string message = where + ": " + cudaGetErrorString(error);
    if (is_sticky(error)) throw DeviceLost(message);
    cudaGetLastError();  // the runtime keeps it for the next caller otherwise, who would be blamed
    throw std::runtime_error(message);
}

// The device of a tensor on CUDA, "cuda:N".
inline std::string expect_cuda(const TensorView& t) {
    if (t.device.rfind("cuda:", 0) != 0) refuse(t.name, "a cuda device such as cuda:0", t.device);
    return t.device;
}

// Makes a device current for as long as it lives.
class DeviceGuard {
public:
    explicit DeviceGuard(int wanted) {
        check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
        if (wanted != before_) check_cuda(cudaSetDevice(wanted), "cudaSetDevice");
    }
    explicit DeviceGuard(const TensorView& t) : DeviceGuard(std::stoi(expect_cuda(t).substr(5))) {}
    ~DeviceGuard() { cudaSetDevice(before_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int before_ = 0;
};

}  // namespace dit4dit
