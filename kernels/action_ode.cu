// action_ode on CUDA: the whole ODE of the action head in one launch of one block per multiprocessor. Blocks wait for each
// other, so all must be resident: the launch is cooperative, which the driver refuses where they are not.
// On a CPU it runs by tests/cuda_emulation.
#include <climits>
#include <map>
#include <mutex>
#include <set>

#include "action_ode_worker.cuh"
#include "cuda_check.h"
#include "launchers.h"

namespace dit4dit {
namespace {

__global__ void __launch_bounds__(ode::kThreads, 1) action_ode_kernel(const __grid_constant__ ode::Launch launch) {
    ode::worker(launch);
}

class Arguments {
public:
    Arguments(const NamedViews& tensors, const NamedNumbers& numbers) : tensors_(tensors), numbers_(numbers) {}

    int number(const std::string& name, std::int64_t least) const {
        const auto found = numbers_.find(name);
        if (found == numbers_.end()) refuse(name, "a number", "none");
        if (found->second < least || found->second > INT_MAX)
            refuse(name, "a number from " + std::to_string(least), std::to_string(found->second));
        return static_cast<int>(found->second);
    }

    const TensorView* find(const std::string& name) const {
        const auto found = tensors_.find(name);
        return found == tensors_.end() ? nullptr : &found->second;
    }

    const TensorView& view(const std::string& name) const {
        const TensorView* found = find(name);
        if (found == nullptr) refuse(name, "a tensor", "none");
        return *found;
    }

    // Its address: contiguous, of this dtype and shape, on `device`, at a multiple of 16 bytes.
    template <class T>
    T* address(const std::string& name, const std::string& dtype, const std::vector<std::int64_t>& shape,
               const std::string& device) const {
        const TensorView& t = view(name);
        expect_dtype(t, {dtype});
        expect_shape(t, shape);
        expect_device(t, device);
        expect_contiguous(t);
        if (t.address % 16) refuse(name, "an address that is a multiple of 16", std::to_string(t.address));
        return t.data<T>();
    }

    template <class T>
    T* optional(const std::string& name, const std::string& dtype, const std::vector<std::int64_t>& shape,
                const std::string& device) const {
        return find(name) == nullptr ? nullptr : address<T>(name, dtype, shape, device);
    }

private:
    const NamedViews& tensors_;
    const NamedNumbers& numbers_;
};

void set_sizes(ode::Launch& l, const Arguments& given) {
    l.rows = given.number("rows", 1);
    l.counter_count = given.number("counter_count", 1);
    l.workers = given.number("workers", 1);
    l.width = given.number("width", 16);
    l.head_dim = given.number("head_dim", 16);
    l.heads = given.number("heads", 1);
    l.horizon = given.number("horizon", 1);
    l.actions = given.number("actions", 1);
    l.padded_actions = given.number("padded_actions", 16);
    l.context_tokens = given.number("context_tokens", 1);
    l.context_columns = given.number("context_columns", 0);
    l.steps = given.number("steps", 1);
    l.batch = given.number("batch", 1);
    l.times = given.number("times", 0);
    l.padded_tokens = given.number("padded_tokens", 8);
    l.part = given.number("part", 256);
    l.slots = given.number("slots", ode::kCopySlots);
    l.staging = given.number("staging", 1);
    const auto text = [](int x) { return std::to_string(x); };
    if (l.context_columns % 8) refuse("context_columns", "a multiple of 8, 16 bytes", text(l.context_columns));
    if (l.width % 16 || l.width > ode::kMaxWidth) refuse("width", "a multiple of 16 up to 2048", text(l.width));
    if (l.head_dim % 16 || l.head_dim > ode::kMaxHeadDim || std::int64_t{l.head_dim} * l.heads != l.width)
        refuse("head_dim", "a multiple of 16 up to 64, width / heads", text(l.head_dim));
    if (l.padded_actions % 16 || l.padded_actions < l.actions)
        refuse("padded_actions", "a multiple of 16, not below actions", text(l.padded_actions));
    static const std::set<int> padded{8, 16, 24, 32, 48, 64};  // products of warpgroups are instances of one of them
    if (!padded.count(l.padded_tokens)) refuse("padded_tokens", "8, 16, 24, 32, 48 or 64", text(l.padded_tokens));
    if (l.rows % l.batch) refuse("rows", "as many for each sample", text(l.rows));
    const std::int64_t prefix = std::int64_t{l.rows} / l.batch - l.horizon;
    if (prefix != 0 && prefix != 1) refuse("rows", "the horizon's, and perhaps a state token's, for each sample", text(l.rows));
    // a norm's scale and shift, and behind them the tokens; last the sums of all warps
    if (l.part % 256 || 8 * l.width + std::int64_t{l.part} / 8 * (16 * l.padded_tokens + 16) > l.staging)
        refuse("part", "a multiple of 256 that the staging holds", text(l.part));
    if (ode::kFixedBytes + std::int64_t{ode::kMostSlots} * ode::kSlotBytes + l.staging > INT_MAX)
        refuse("staging", "fewer than 2 GiB of shared memory in all", text(l.staging));
    if (640 * l.padded_tokens > l.staging) refuse("staging", "at least " + text(640 * l.padded_tokens), text(l.staging));
    if (l.slots > ode::kMostSlots) refuse("slots", "at most 16", text(l.slots));
}

void set_tensors(ode::Launch& l, const Arguments& given) {
    const std::string device = expect_cuda(given.view("out"));
    l.tiles = given.address<int>("tiles", "int32", {-1, ode::kRecord}, device);
    l.first_tile = given.address<int>("first_tile", "int32", {std::int64_t{l.workers} + 1}, device);
    l.segments = given.address<int>("segments", "int32", {-1, 3}, device);
    l.first_segment = given.address<int>("first_segment", "int32", {std::int64_t{l.workers} + 1}, device);
    l.weights = given.address<std::uint8_t>("weights", "uint8", {-1}, device);
    l.constants = given.address<float>("constants", "float32", {-1}, device);
    const std::vector<std::int64_t> actions{l.batch, l.horizon, l.actions};
    const std::int64_t floats = given.view("constants").shape[0];
    if (std::int64_t{l.times} + l.steps > floats)
        refuse("times", "a place for all steps in " + std::to_string(floats) + " constants", std::to_string(l.times));
    l.noise = given.address<float>("noise", "float32", actions, device);
    l.context = given.address<std::uint16_t>("context", "bfloat16", {l.batch, l.context_tokens, l.context_columns}, device);
    l.prefix = given.optional<float>("prefix", "float32", {l.batch, l.width}, device);
    l.previous = given.optional<float>("previous", "float32", actions, device);
    l.guidance = given.optional<float>("guidance", "float32", {l.horizon}, device);
    l.out = given.address<float>("out", "float32", actions, device);
    l.workspace = given.address<std::uint8_t>("workspace", "uint8", {-1}, device);
    l.counters = given.address<int>("counters", "int32", {std::int64_t{l.counter_count} + 1, ode::kCounterStride}, device);
    l.status = given.address<int>("status", "int32", {4}, device);
    if ((l.previous == nullptr) != (l.guidance == nullptr)) refuse("guidance", "previous and guidance, or neither", "one");
    if ((l.prefix != nullptr) != (l.rows == l.batch * (std::int64_t{l.horizon} + 1)))
        refuse("prefix", "a tensor if and only if the schedule has state tokens", l.prefix ? "one" : "none");
}

// Each buffer in the workspace, behind the one before, and wide enough for what the kernel takes for granted.
void set_buffers(ode::Launch& l, const std::vector<BufferPlace>& buffers, std::int64_t workspace_bytes) {
    if (buffers.size() != ode::kSpaces)
        refuse("buffers", std::to_string(ode::kSpaces) + " of (offset, planes, columns)", std::to_string(buffers.size()));
    const std::map<int, int> least{{ode::kActions, l.actions}, {ode::kNoisy, l.padded_actions}, {ode::kEmbedded, l.width},
                                   {ode::kStream, l.width},    {ode::kRounded, l.width},        {ode::kProjected, l.width},
                                   {ode::kAttended, l.width},  {ode::kStats, 2 * l.heads},      {ode::kHidden, 16},
                                   {ode::kDecoded, 16},        {ode::kOut, l.actions}};
    std::int64_t end = 0;
    for (int space = 0; space < ode::kSpaces; ++space) {
        const auto [offset, planes, columns] = buffers[space];
        const std::string name = "buffers[" + std::to_string(space) + "]";
        const bool wide = space == ode::kActions || space == ode::kStream || space == ode::kStats;
        if (planes < 1 || columns < least.at(space))
            refuse(name, "at least 1 plane of " + std::to_string(least.at(space)) + " columns",
                   std::to_string(planes) + " of " + std::to_string(columns));
        l.offset[space] = offset;
        l.columns[space] = columns;
        if (space == ode::kOut) continue;  // a tensor of its own
        if (!wide && columns % 8) refuse(name, "a multiple of 8 columns, 16 bytes", std::to_string(columns));
        if (offset % 16 || offset < end)
            refuse(name, "an offset that is a multiple of 16, from " + std::to_string(end), std::to_string(offset));
        end = plus(name, offset, times(name, times(name, planes, l.rows), std::int64_t{columns} * (wide ? 4 : 2)));
        if (end > workspace_bytes)
            refuse("workspace", "at least " + std::to_string(end) + " bytes for " + name, std::to_string(workspace_bytes));
    }
}

// The bytes of dynamic shared memory that a block may have on a device, which must be current. Said to the driver once: a launch of
// one schedule changes nothing for another's.
int allowed_shared_memory(int device) {
    static std::mutex mutex;
    static std::map<int, int> allowed;
    const std::lock_guard<std::mutex> guard(mutex);
    const auto found = allowed.find(device);
    if (found != allowed.end()) return found->second;
    const auto kernel = reinterpret_cast<const void*>(action_ode_kernel);
    return allowed[device] = allow_dynamic_shared(kernel, device, "action_ode");
}

int shared_bytes_of(const ode::Launch& l) { return ode::kFixedBytes + l.slots * ode::kSlotBytes + l.staging; }

void launch_cooperatively(const ode::Launch& l, cudaStream_t stream) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(l.workers);
    config.blockDim = dim3(ode::kThreads);
    config.dynamicSmemBytes = shared_bytes_of(l);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check_cuda(cudaLaunchKernelEx(&config, action_ode_kernel, l), "action_ode: launch");
}

}  // namespace

void action_ode_cuda(const NamedViews& tensors, const NamedNumbers& numbers,
                     const std::vector<BufferPlace>& buffers, float max_guidance, std::int64_t limit_ns, std::uintptr_t stream) {
    const Arguments given(tensors, numbers);
    ode::Launch l{};
    set_sizes(l, given);
    set_tensors(l, given);
    set_buffers(l, buffers, given.view("workspace").shape[0]);
    if (limit_ns < 1) refuse("limit_ns", "at least 1", std::to_string(limit_ns));
    for (const std::string written : {"out", "workspace", "counters", "status"})
        for (const auto& [name, tensor] : tensors)
            if (name != written) expect_apart(given.view(written), tensor);
    l.max_guidance = max_guidance;
    l.limit_ns = limit_ns;
    const DeviceGuard guard(given.view("out"));
    allowed_shared_memory(guard.device());
    launch_cooperatively(l, reinterpret_cast<cudaStream_t>(stream));
}

std::map<std::string, int> action_ode_facts(int device, int shared_bytes) {
    const DeviceGuard guard(device);
    const auto attribute = [device](cudaDeviceAttr name) {
        int value = 0;
        check_cuda(cudaDeviceGetAttribute(&value, name, device), "action_ode: device attribute");
        return value;
    };
    std::map<std::string, int> facts{
        {"multiprocessors", attribute(cudaDevAttrMultiProcessorCount)},
        {"shared_memory", allowed_shared_memory(device)},
        {"capability",
         10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor)},
    };
    int blocks = 0;
    if (shared_bytes <= facts["shared_memory"] && attribute(cudaDevAttrCooperativeLaunch)) {
        check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, action_ode_kernel, ode::kThreads, shared_bytes),
                   "action_ode: occupancy");
    }
    facts["blocks_per_multiprocessor"] = blocks;
    return facts;
}

}  // namespace dit4dit
