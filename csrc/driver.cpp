#include "driver.h"

#include <dlfcn.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "errors.h"
#include "tensor_view.h"

namespace dit4dit {
namespace {

// of CUfunction_attribute, CUdevice_attribute, CUfunc_cache and CUlaunchAttributeID; a test holds them to cuda.h
constexpr int kSharedSize = 1, kMaxDynamicShared = 8, kSharedOptIn = 97, kPreferShared = 1, kProgrammatic = 6;
constexpr std::int64_t kSharedWithoutAsking = 48 << 10;
constexpr std::int64_t kGrid[] = {(std::int64_t{1} << 31) - 1, 65535, 65535};

// The driver is given no length: it reads as far as the headers of the image say. Checked are the two tables of an ELF file of
// 64 bits, and the sections that hold bytes (of the kinds that every ELF file has; a GPU has more of its own).
void expect_elf(std::string_view image) {
    const auto number = [&](std::uint64_t offset, int bytes) {  // little-endian, as is the machine
        std::uint64_t value = 0;
        std::memcpy(&value, image.data() + offset, static_cast<std::size_t>(bytes));
        return value;
    };
    const auto within = [&](std::uint64_t offset, std::uint64_t size, const char* what) {
        if (offset > image.size() || size > image.size() - offset)
            refuse("image", std::string("machine code (ELF) that is whole: ") + what + " ends at " + std::to_string(offset) +
                                " + " + std::to_string(size), std::to_string(image.size()) + " bytes");
    };
    if (image.substr(0, 4) != "\x7f" "ELF") refuse("image", "machine code (ELF)", "other bytes");
    within(0, 64, "its header");
    if (image[4] != 2 || image[5] != 1) refuse("image", "machine code (ELF) of 64 bits, little-endian", "another kind");
    const std::uint64_t segments = number(32, 8), sections = number(40, 8), segment_bytes = number(54, 2),
                        segment_count = number(56, 2), section_bytes = number(58, 2), section_count = number(60, 2);
    if (section_count == 0 || section_bytes != 64 || (segment_count != 0 && segment_bytes != 56))
        refuse("image", "machine code (ELF) with sections of 64 bytes", "none, or others");
    if (number(62, 2) >= section_count) refuse("image", "a section of names", "none of its sections");
    within(sections, section_count * section_bytes, "its table of sections");
    within(segments, segment_count * segment_bytes, "its table of segments");
    for (std::uint64_t i = 0; i < section_count; ++i) {
        const std::uint64_t at = sections + i * section_bytes, kind = number(at + 4, 4);
        const bool bytes = kind == 1 || kind == 2 || kind == 3 || kind == 4 || kind == 9;  // program, symbols, names, relocations
        if (bytes) within(number(at + 24, 8), number(at + 32, 8), "a section");
    }
}

}  // namespace

Driver::Driver(const std::string& library) {
    // never closed: kernels of this process may run for as long as it does
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    const char* reason = handle ? nullptr : dlerror();
    if (!handle) throw std::runtime_error("no CUDA driver: " + (reason ? std::string(reason) : library));
    const auto find = [&](auto& function, const char* name) {
        void* symbol = dlsym(handle, name);
        if (!symbol) throw std::runtime_error(library + ": this CUDA driver has no " + name + "; update it");
        std::memcpy(&function, &symbol, sizeof symbol);
    };
    find(init_, "cuInit");
    find(driver_version_, "cuDriverGetVersion");
    find(error_name_, "cuGetErrorName");
    find(error_string_, "cuGetErrorString");
    find(device_, "cuDeviceGet");
    find(device_attribute_, "cuDeviceGetAttribute");
    find(retain_, "cuDevicePrimaryCtxRetain");
    find(get_current_, "cuCtxGetCurrent");
    find(push_current_, "cuCtxPushCurrent_v2");
    find(pop_current_, "cuCtxPopCurrent_v2");
    find(load_data_, "cuModuleLoadData");
    find(get_function_, "cuModuleGetFunction");
    find(function_attribute_, "cuFuncGetAttribute");
    find(set_attribute_, "cuFuncSetAttribute");
    find(set_cache_, "cuFuncSetCacheConfig");
    find(launch_, "cuLaunchKernel");
    if (void* symbol = dlsym(handle, "cuLaunchKernelEx")) std::memcpy(&launch_ex_, &symbol, sizeof symbol);
    check(driver_version_(&version_), "cuDriverGetVersion");
}

void Driver::check(int code, const std::string& where) const {
    if (code == 0) return;
    const char *name = nullptr, *meaning = nullptr;
    const bool known = error_name_(code, &name) == 0 && error_string_(code, &meaning) == 0 && name && meaning;
    throw CudaError(where, code, known ? name : "error " + std::to_string(code), known ? meaning : "unknown to this driver");
}

Driver::Handle Driver::context(int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = contexts_.find(device);
    if (found != contexts_.end()) return found->second;
    int ordinal = 0;
    Handle context = nullptr;
    check(init_(0), "cuInit");
    check(device_(&ordinal, device), "cuDeviceGet: device " + std::to_string(device));
    check(retain_(&context, ordinal), "cuDevicePrimaryCtxRetain");
    contexts_.emplace(device, context);
    return context;
}

Driver::Current::Current(const Driver& driver, Handle context, const std::string& where) : driver_(driver) {
    Handle before = nullptr;
    driver.check(driver.get_current_(&before), where + ": cuCtxGetCurrent");
    if (before == context) return;
    driver.check(driver.push_current_(context), where + ": cuCtxPushCurrent");
    pushed_ = true;
}

Driver::Current::~Current() {
    Handle popped = nullptr;
    // fails only where the context is gone, which the call inside has reported
    if (pushed_) driver_.pop_current_(&popped);
}

std::shared_ptr<Kernel> Driver::load(std::string_view image, const std::string& entry, int device, unsigned threads,
                                     int shared, const std::vector<std::pair<std::string, std::string>>& arguments,
                                     unsigned scratch) {
    expect_elf(image);
    if (threads == 0 || threads > 1024 || threads % 32)
        refuse("threads", "a multiple of 32, at most 1024", std::to_string(threads));
    auto kernel = std::make_shared<Kernel>();
    for (const auto& [name, kind] : arguments) {
        const bool aligned = kind.size() > 3 && kind.compare(kind.size() - 3, 3, ":16") == 0;
        const std::string base = aligned ? kind.substr(0, kind.size() - 3) : kind;
        const char type = base.size() > 1 && base[0] == '*' ? 'p' : base == "i32" ? 'i' : base == "i64" ? 'l'
                                                            : base == "fp32" ? 'f' : 0;
        if (!type || (type == 'f' && aligned)) refuse(name, "a kind such as *bf16:16, i32 or fp32", kind);
        kernel->parameters_.push_back({name, kind, type, aligned});
    }
    kernel->driver_ = shared_from_this();
    kernel->context_ = context(device);
    kernel->entry_ = entry;
    kernel->threads_ = threads;
    kernel->shared_ = static_cast<unsigned>(shared);
    kernel->scratch_ = scratch;

    const Current current(*this, kernel->context_, entry);
    Handle module = nullptr;  // stays loaded for as long as the process lives
    check(load_data_(&module, image.data()), entry + ": cuModuleLoadData");
    check(get_function_(&kernel->function_, module, entry.c_str()), entry + ": cuModuleGetFunction");
    int taken = 0;  // by what the kernel declares itself, out of the same total
    check(function_attribute_(&taken, kSharedSize, kernel->function_), entry + ": cuFuncGetAttribute");
    const std::int64_t needed = std::int64_t{shared} + taken;
    if (needed > kSharedWithoutAsking) {
        int most = 0, ordinal = 0;
        check(device_(&ordinal, device), entry + ": cuDeviceGet");
        check(device_attribute_(&most, kSharedOptIn, ordinal), entry + ": cuDeviceGetAttribute");
        if (needed > most)
            throw std::runtime_error(entry + ": needs " + std::to_string(needed) +
                                     " bytes of shared memory, this device has " + std::to_string(most));
        check(set_cache_(kernel->function_, kPreferShared), entry + ": cuFuncSetCacheConfig");
        check(set_attribute_(kernel->function_, kMaxDynamicShared, shared), entry + ": cuFuncSetAttribute");
    }
    return kernel;
}

// The bits of one argument; the machine is little-endian, so that its first 4 or 8 bytes are what the kernel reads.
std::uint64_t Kernel::packed(const Parameter& p, const Value& value) const {
    const std::string name = entry_ + ": " + p.name;
    if (p.type == 'f') {
        const double wide = value.type == Value::Type::real ? value.real : static_cast<double>(value.integer);
        if (std::isfinite(wide) && std::fabs(wide) > std::numeric_limits<float>::max())
            refuse(name, "a number that a float holds", std::to_string(wide));
        const auto x = static_cast<float>(wide);
        std::uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        return bits;
    }
    if (value.type == Value::Type::real)
        throw DtypeError(name + ": expected " + (p.type == 'p' ? "an address" : "a whole number") + ", got " +
                         std::to_string(value.real));
    const std::string got = std::to_string(value.integer);
    if (p.type == 'p' && value.integer == 0) refuse(name, "an address", "null");
    if (p.type == 'i' && (value.integer < std::numeric_limits<std::int32_t>::min() ||
                          value.integer > std::numeric_limits<std::int32_t>::max()))
        refuse(name, "a number of 32 bits", got);
    if (p.aligned && value.integer % 16)
        refuse(name, std::string(p.type == 'p' ? "an address" : "a number") + " that is a multiple of 16 (" + p.kind + ")", got);
    std::uint64_t bits;
    std::memcpy(&bits, &value.integer, sizeof bits);
    return p.type == 'i' ? bits & 0xffffffff : bits;
}

void Kernel::launch(const std::vector<std::int64_t>& grid, std::uintptr_t stream, const std::vector<Value>& arguments,
                    bool programmatic) const {
    if (grid.empty() || grid.size() > 3) refuse(entry_ + ": grid", "1 to 3 numbers", to_string(grid));
    unsigned blocks[3] = {1, 1, 1};
    for (std::size_t i = 0; i < grid.size(); ++i) {
        if (grid[i] < 1 || grid[i] > kGrid[i])
            refuse(entry_ + ": grid[" + std::to_string(i) + "]", "1 to " + std::to_string(kGrid[i]), std::to_string(grid[i]));
        blocks[i] = static_cast<unsigned>(grid[i]);
    }
    if (arguments.size() != parameters_.size())
        refuse(entry_ + ": arguments", std::to_string(parameters_.size()) + " values", std::to_string(arguments.size()));
    std::vector<std::uint64_t> bits;
    for (std::size_t i = 0; i < arguments.size(); ++i) bits.push_back(packed(parameters_[i], arguments[i]));
    bits.resize(bits.size() + scratch_, 0);
    std::vector<void*> addresses;
    for (auto& value : bits) addresses.push_back(&value);

    const Driver::Current current(*driver_, context_, entry_);
    if (programmatic && driver_->programmatic()) {
        LaunchAttribute attribute{kProgrammatic, 0, {}};
        attribute.value.programmatic = 1;
        const LaunchConfig config{{blocks[0], blocks[1], blocks[2]}, {threads_, 1, 1}, shared_,
                                  reinterpret_cast<void*>(stream), &attribute, 1};
        driver_->check(driver_->launch_ex_(&config, function_, addresses.data(), nullptr), entry_ + ": cuLaunchKernelEx");
        return;
    }
    driver_->check(driver_->launch_(function_, blocks[0], blocks[1], blocks[2], threads_, 1, 1, shared_,
                                    reinterpret_cast<void*>(stream), addresses.data(), nullptr),
                   entry_ + ": cuLaunchKernel");
}

}  // namespace dit4dit
