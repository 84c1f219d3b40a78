// csrc/cuda_check.h on a CUDA runtime that is a few variables: prints what a kernel was allowed, or the error.
#include "cuda_check.h"

#include <cstdio>
#include <cstdlib>

static int optin, declared;

extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidValue"; }
const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? optin : -1;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    attributes->sharedSizeBytes = static_cast<std::size_t>(declared);
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
    return value + declared > optin ? cudaErrorInvalidValue : cudaSuccess;  // as the CUDA runtime does
}
}

int main(int, char** argv) {
    optin = std::atoi(argv[1]), declared = std::atoi(argv[2]);
    try {
        std::printf("%d", dit4dit::allow_dynamic_shared(argv, 0, "here"));
    } catch (const std::exception& error) {
        std::printf("%s", error.what());
    }
}
