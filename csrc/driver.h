// The CUDA driver, found when it is first wanted: a wheel neither links it nor fails where there is none. Its types are
// written out, so that builds without the CUDA toolkit have this too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dit4dit {

class Kernel;

// CUlaunchAttribute and CUlaunchConfig; a test holds them to cuda.h.
struct LaunchAttribute {
    int id;
    int unused;
    union {
        char bytes[64];
        int programmatic;  // programmaticStreamSerializationAllowed
    } value;
};
struct LaunchConfig {
    unsigned grid[3], block[3], shared;
    void* stream;
    LaunchAttribute* attributes;
    unsigned attribute_count;
};

// Of one kernel, null pointers behind them included: 32 KiB of 8 bytes, the most that any GPU takes.
constexpr unsigned kMostParameters = 4096;

class Driver : public std::enable_shared_from_this<Driver> {
public:
    // library: "libcuda.so.1", or a path. std::runtime_error: it cannot be loaded, or lacks a function.
    explicit Driver(const std::string& library);
    Driver(const Driver&) = delete;
    Driver& operator=(const Driver&) = delete;

    // 13000 for CUDA 13.0: the newest that this driver runs.
    int version() const { return version_; }

    // Whether it has cuLaunchKernelEx (since 11.8), without which every launch is a plain one.
    bool programmatic() const { return launch_ex_ != nullptr; }

    // A kernel out of machine code (ELF, whole), on one device, whose primary context (PyTorch's) it lives in. shared: bytes.
    // arguments: name and kind ("*bf16:16", "i32", "fp32") of each; scratch: null pointers to pass behind them.
    std::shared_ptr<Kernel> load(std::string_view image, const std::string& entry, int device, unsigned threads,
                                 int shared, const std::vector<std::pair<std::string, std::string>>& arguments,
                                 unsigned scratch);

private:
    friend class Kernel;
    using Handle = void*;  // of a context, module, function or stream

    // Makes a device's context current for as long as it lives.
    class Current {
    public:
        Current(const Driver& driver, Handle context, const std::string& where);
        ~Current();
        Current(const Current&) = delete;
        Current& operator=(const Current&) = delete;

    private:
        const Driver& driver_;
        bool pushed_ = false;
    };

    void check(int code, const std::string& where) const;
    Handle context(int device);

    int (*init_)(unsigned) = nullptr;
    int (*driver_version_)(int*) = nullptr;
    int (*error_name_)(int, const char**) = nullptr;
    int (*error_string_)(int, const char**) = nullptr;
    int (*device_)(int*, int) = nullptr;
    int (*device_attribute_)(int*, int, int) = nullptr;
    int (*retain_)(Handle*, int) = nullptr;
    int (*get_current_)(Handle*) = nullptr;
    int (*push_current_)(Handle) = nullptr;
    int (*pop_current_)(Handle*) = nullptr;
    int (*load_data_)(Handle*, const void*) = nullptr;
    int (*get_function_)(Handle*, Handle, const char*) = nullptr;
    int (*function_attribute_)(int*, int, Handle) = nullptr;
    int (*set_attribute_)(Handle, int, int) = nullptr;
    int (*set_cache_)(Handle, int) = nullptr;
    int (*launch_)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**,
                   void**) = nullptr;
    int (*launch_ex_)(const LaunchConfig*, Handle, void**, void**) = nullptr;
    int version_ = 0;
    std::mutex mutex_;
    std::map<int, Handle> contexts_;  // retained once and for good, as PyTorch does
};

// An argument of a launch: an address, a whole number or a real one.
struct Value {
    enum class Type { integer, real } type;
    std::int64_t integer = 0;
    double real = 0;
};

class Kernel {
public:
    const std::string& entry() const { return entry_; }

    // Enqueue on `stream` of the kernel's device, without waiting. std::invalid_argument or DtypeError: an argument is not
    // what the kernel was compiled for. CudaError: the driver refuses, or reports what an earlier kernel did.
    // programmatic: it may be started while the kernel before it in the stream runs, and must itself wait for that one's
    // results (dit4dit/ops/programmatic.py); a plain launch where the driver has none such.
    void launch(const std::vector<std::int64_t>& grid, std::uintptr_t stream, const std::vector<Value>& arguments,
                bool programmatic) const;

private:
    friend class Driver;
    struct Parameter {
        std::string name, kind;  // as given, for messages
        char type;               // 'p' address, 'i' 32 bits, 'l' 64 bits, 'f' float
        bool aligned;            // multiple of 16
    };

    std::uint64_t packed(const Parameter& parameter, const Value& value) const;

    std::shared_ptr<Driver> driver_;
    Driver::Handle context_ = nullptr, function_ = nullptr;
    std::string entry_;
    unsigned threads_ = 0, shared_ = 0, scratch_ = 0;
    std::vector<Parameter> parameters_;
};

}  // namespace dit4dit
