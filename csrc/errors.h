// What a launcher throws. std::invalid_argument becomes Python's ValueError, anything not named here RuntimeError.
#pragma once

#include <stdexcept>
#include <string>

namespace dit4dit {

// Becomes TypeError.
struct DtypeError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// An error of CUDA, with the number that driver and runtime share. A sticky one becomes dit4dit.errors.DeviceError.
struct CudaError : std::runtime_error {
    CudaError(const std::string& where, int code, const std::string& name, const std::string& meaning)
        : std::runtime_error(where + ": " + name + " (" + meaning + ")" + (sticky(code) ? kRestart : "")), code(code) {}

    // After these every later call in the process fails, whoever makes it.
    static bool sticky(int code) {
        switch (code) {
            case 214:  // ECC uncorrectable
            case 220:  // NVLink uncorrectable
            case 226:  // contained ECC
            case 700:  // illegal address
            case 702:  // launch timeout
            case 709:  // context is destroyed
            case 710:  // assert
            case 714:  // hardware stack error
            case 715:  // illegal instruction
            case 716:  // misaligned address
            case 717:  // invalid address space
            case 718:  // invalid program counter
            case 719:  // launch failure
            case 721:  // tensor memory leak
            case 810:  // MPS client terminated
            case 911:  // of an external device
            case 999: return true;  // unknown
            default: return false;
        }
    }

    static constexpr const char* kRestart =
        "; nothing on this device works in this process any more, which must restart. The call that reports it is often "
        "not the one that caused it: CUDA_LAUNCH_BLOCKING=1 or compute-sanitizer finds that one";

    int code;
};

}  // namespace dit4dit
