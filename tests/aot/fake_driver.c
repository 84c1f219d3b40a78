/* A CUDA driver without a GPU: writes each call as a line of JSON to the file that FAKE_CUDA_LOG names. Compiled with the real
 * cuda.h, whose prototypes its functions must match. FAKE_CUDA_FAIL="cuLaunchKernel=700" lets a call fail;
 * BEFORE_11_8, when it is compiled, leaves cuLaunchKernelEx out. FAKE_CUDA_VERSION, FAKE_CUDA_OPTIN (bytes of shared memory) and FAKE_CUDA_PARAMETERS ("8 8 4": bytes of the kernel's
 * parameters, which a real driver reads from the machine code) are the machine. */
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static CUcontext current = NULL;

static void write_line(const char* text) {
    FILE* file = fopen(getenv("FAKE_CUDA_LOG"), "a");
    fprintf(file, "%s\n", text);
    fclose(file);
}

static CUresult done(const char* name, const char* facts) {
    char line[4096];
    const char* fail = getenv("FAKE_CUDA_FAIL");
    size_t length = strlen(name);
    snprintf(line, sizeof line, "{\"call\": \"%s\"%s%s}", name, *facts ? ", " : "", facts);
    write_line(line);
    if (fail && !strncmp(fail, name, length) && fail[length] == '=') return (CUresult)atoi(fail + length + 1);
    return CUDA_SUCCESS;
}

static int number(const char* name, int otherwise) { return getenv(name) ? atoi(getenv(name)) : otherwise; }

CUresult CUDAAPI cuInit(unsigned int flags) { return done("cuInit", ""); }

CUresult CUDAAPI cuDriverGetVersion(int* version) {
    *version = number("FAKE_CUDA_VERSION", 13000);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuGetErrorName(CUresult error, const char** name) {
    *name = error == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : error == 1 ? "CUDA_ERROR_INVALID_VALUE" : NULL;
    return *name ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult CUDAAPI cuGetErrorString(CUresult error, const char** text) {
    *text = error == 700 ? "an illegal memory access was encountered" : "invalid argument";
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGet(CUdevice* device, int ordinal) {
    *device = 100 + ordinal;
    return done("cuDeviceGet", "");
}

CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    char facts[64];
    *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? number("FAKE_CUDA_OPTIN", 232448) : -1;
    snprintf(facts, sizeof facts, "\"device\": %d", device);
    return done("cuDeviceGetAttribute", facts);
}

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    char facts[64];
    *context = (CUcontext)(size_t)(0xC0 + device);
    snprintf(facts, sizeof facts, "\"device\": %d", device);
    return done("cuDevicePrimaryCtxRetain", facts);
}

CUresult CUDAAPI cuCtxGetCurrent(CUcontext* context) {
    *context = current;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxPushCurrent(CUcontext context) {
    CUresult result = done("cuCtxPushCurrent", "");
    if (result == CUDA_SUCCESS) current = context;
    return result;
}

CUresult CUDAAPI cuCtxPopCurrent(CUcontext* context) {
    *context = current;
    current = NULL;
    return done("cuCtxPopCurrent", "");
}

CUresult CUDAAPI cuModuleLoadData(CUmodule* module, const void* image) {
    char facts[64];
    unsigned size_of_header = ((const unsigned char*)image)[52];  /* of a 64-bit ELF file */
    *module = (CUmodule)(size_t)0x1111;
    snprintf(facts, sizeof facts, "\"context\": %zu, \"header\": %u", (size_t)current, size_of_header);
    return done("cuModuleLoadData", facts);
}

CUresult CUDAAPI cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    char facts[256];
    *function = (CUfunction)(size_t)0x2222;
    snprintf(facts, sizeof facts, "\"module\": %zu, \"name\": \"%s\"", (size_t)module, name);
    return done("cuModuleGetFunction", facts);
}

CUresult CUDAAPI cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES ? 1024 : -1;
    return done("cuFuncGetAttribute", "");
}

CUresult CUDAAPI cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    char facts[128];
    snprintf(facts, sizeof facts, "\"dynamic_shared\": %s, \"value\": %d",
             attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ? "true" : "false", value);
    return done("cuFuncSetAttribute", facts);
}

CUresult CUDAAPI cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
    return done("cuFuncSetCacheConfig", config == CU_FUNC_CACHE_PREFER_SHARED ? "\"shared\": true" : "\"shared\": false");
}

static CUresult launched(const char* call, int attributes, int programmatic, CUfunction f, unsigned x, unsigned y, unsigned z,
                         unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared, CUstream stream,
                         void** parameters, void** extra) {
    char facts[3000];
    const char* sizes = getenv("FAKE_CUDA_PARAMETERS");
    int end = snprintf(facts, sizeof facts, "\"attributes\": %d, \"programmatic\": %d, ", attributes, programmatic);
    end += snprintf(facts + end, sizeof facts - end,
                    "\"function\": %zu, \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared\": %u, \"stream\": %zu, "
                    "\"context\": %zu, \"extra\": %s, \"parameters\": [",
                    (size_t)f, x, y, z, block_x, block_y, block_z, shared, (size_t)stream, (size_t)current,
                       extra ? "true" : "false");
    for (int i = 0; sizes && *sizes; ++i) {
        size_t size = strtoul(sizes, (char**)&sizes, 10);
        const unsigned char* bytes = parameters[i];
        end += snprintf(facts + end, sizeof facts - end, "%s\"", i ? ", " : "");
        for (size_t j = 0; j < size; ++j) end += snprintf(facts + end, sizeof facts - end, "%02x", bytes[j]);
        end += snprintf(facts + end, sizeof facts - end, "\"");
    }
    snprintf(facts + end, sizeof facts - end, "]");
    return done(call, facts);
}

CUresult CUDAAPI cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                                unsigned block_z, unsigned shared, CUstream stream, void** parameters, void** extra) {
    return launched("cuLaunchKernel", 0, 0, f, x, y, z, block_x, block_y, block_z, shared, stream, parameters, extra);
}

#ifndef BEFORE_11_8
CUresult CUDAAPI cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction f, void** parameters, void** extra) {
    int programmatic = 0;
    for (unsigned i = 0; i < config->numAttrs; ++i)
        if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
            programmatic = config->attrs[i].value.programmaticStreamSerializationAllowed;
    return launched("cuLaunchKernelEx", (int)config->numAttrs, programmatic, f, config->gridDimX, config->gridDimY,
                    config->gridDimZ, config->blockDimX, config->blockDimY, config->blockDimZ, config->sharedMemBytes,
                    config->hStream, parameters, extra);
}
#endif
