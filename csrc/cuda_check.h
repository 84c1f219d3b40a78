// What every .cu needs around its launch: no CUDA error swallowed, and the right device current.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <utility>

#include "tensor_view.h"

namespace dit4dit {

inline void check_cuda(cudaError_t error, const std::string& where) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // the runtime keeps it for the next launch otherwise, which would be blamed
    throw CudaError(where, error, cudaGetErrorName(error), cudaGetErrorString(error));
}

// The device of a tensor on CUDA, "cuda:N": N has one to four digits.
inline std::string expect_cuda(const TensorView& t) {
    const std::string number = t.device.rfind("cuda:", 0) == 0 ? t.device.substr(5) : "";
    if (number.empty() || number.size() > 4 || number.find_first_not_of("0123456789") != std::string::npos)
        refuse(t.name, "a cuda device such as cuda:0", t.device);
    return t.device;
}

// Makes a device current for as long as it lives.
class DeviceGuard {
public:
    explicit DeviceGuard(int wanted) : device_(wanted) {
        check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
        changed_ = wanted != before_;
        if (changed_) check_cuda(cudaSetDevice(wanted), "cudaSetDevice");
    }
    explicit DeviceGuard(const TensorView& t) : DeviceGuard(std::stoi(expect_cuda(t).substr(5))) {}
    // the device was current before; where that fails now, it has failed as a whole and the next call says so
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    int device() const { return device_; }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int device_, before_ = 0;
    bool changed_ = false;
};

// Lets a block of `kernel` on `device`, which must be current, have all the dynamic shared memory that there is for it: what the
// device gives a block less what the kernel declares itself. In bytes.
inline int allow_dynamic_shared(const void* kernel, int device, const std::string& where) {
    int most = 0;
    cudaFuncAttributes attributes{};
    check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), where + ": device attribute");
    check_cuda(cudaFuncGetAttributes(&attributes, kernel), where + ": kernel attributes");
    most -= static_cast<int>(attributes.sharedSizeBytes);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
               where + ": " + std::to_string(most) + " bytes of shared memory");
    return most;
}

// Starts a kernel, which begins with target::wait_for_inputs() where `programmatic` (Kernel::launch) may be true.
template <class... Parameters, class... Arguments>
void launch_kernel(const std::string& where, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared,
                   cudaStream_t stream, bool programmatic, Arguments&&... arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = programmatic ? 1 : 0;
    check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), where + ": launch");
}

}  // namespace dit4dit
