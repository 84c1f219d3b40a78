// action_ode on CUDA: the whole ODE of the action head in one launch of teams of blocks, one block per SM. Blocks wait for each
// other, so all must be resident: the launch is cooperative, which the driver refuses where they are not, and begins when all SMs
// that it needs are free. A team of several blocks is a cluster. On a CPU the kernel runs by tests/cuda_emulation.
#include <algorithm>
#include <climits>
#include <map>
#include <mutex>
#include <set>

#include "action_ode_worker.cuh"
#include "cuda_check.h"
#include "launchers.h"

namespace dit4dit {
namespace {

constexpr int kClusters = 90;  // the compute capability from which there are clusters

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

    const NamedViews& tensors() const { return tensors_; }

private:
    const NamedViews& tensors_;
    const NamedNumbers& numbers_;
};

std::int64_t shared_bytes_of(const ode::Launch& l) {
    return ode::kFixedBytes + std::int64_t{l.slots} * ode::kSlotBytes + l.staging + std::int64_t{2} * l.inbox;
}

std::string text(std::int64_t x) { return std::to_string(x); }

// What the schedule says of the launch and of memory.
void set_schedule(ode::Launch& l, const Arguments& given) {
    l.teams = given.number("teams", 1);
    l.ranks = given.number("ranks", 1);
    l.set_words = given.number("set_words", 4);
    l.private_floats = given.number("private_floats", 4);
    l.padded_tokens = given.number("padded_tokens", 16);
    l.part = given.number("part", ode::kStepColumns);
    l.slots = given.number("slots", 3);
    l.staging = given.number("staging", 16);
    l.inbox = given.number("inbox", 0);
    static const std::set<int> ranks{1, 2, 4, 8}, padded{16, 24, 40, 56, 72};  // the kernel has code of its own for each
    if (!ranks.count(l.ranks)) refuse("ranks", "1, 2, 4 or 8", text(l.ranks));
    if (std::int64_t{l.teams} * l.ranks > INT_MAX) refuse("teams", "fewer than 2^31 blocks in all", text(l.teams));
    if (l.set_words % 4 || std::int64_t{ode::kSets} * l.set_words > INT_MAX)
        refuse("set_words", "a multiple of 4, 16 bytes, fewer than 2^31 words in all sets", text(l.set_words));
    if (!padded.count(l.padded_tokens)) refuse("padded_tokens", "16, 24, 40, 56 or 72", text(l.padded_tokens));
    if (l.part % ode::kStepColumns || std::int64_t{l.part} / 8 * (16 * l.padded_tokens + 16) > l.staging)
        refuse("part", "a multiple of 32 that the staging holds", text(l.part));
    if (l.slots > ode::kMostSlots) refuse("slots", "at most 16", text(l.slots));
    if (l.staging % 16) refuse("staging", "a multiple of 16", text(l.staging));
    if (l.inbox % 16 || (l.ranks == 1 && l.inbox != 0)) refuse("inbox", "a multiple of 16, 0 with one rank", text(l.inbox));
    if (shared_bytes_of(l) > INT_MAX)
        refuse("staging", "fewer than 2 GiB of shared memory in all", text(shared_bytes_of(l)));
}

// What the head and the request say.
void set_sizes(ode::Launch& l, const Arguments& given) {
    l.rows = given.number("rows", 1);
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
    if (l.context_columns % 8) refuse("context_columns", "a multiple of 8, 16 bytes", text(l.context_columns));
    if (l.width % 16 || l.width > ode::kMaxWidth) refuse("width", "a multiple of 16 up to 2048", text(l.width));
    if (l.head_dim % 16 || l.head_dim > ode::kMaxHeadDim || std::int64_t{l.head_dim} * l.heads != l.width)
        refuse("head_dim", "a multiple of 16 up to 64, width / heads", text(l.head_dim));
    if (l.padded_actions % 16 || l.padded_actions < l.actions)
        refuse("padded_actions", "a multiple of 16, not below actions", text(l.padded_actions));
    if (l.rows % l.batch) refuse("rows", "as many for each sample", text(l.rows));
    const std::int64_t prefix = std::int64_t{l.rows} / l.batch - l.horizon;
    if (prefix != 0 && prefix != 1) refuse("rows", "the horizon's, and perhaps a state token's, for each sample", text(l.rows));
}

void set_tensors(ode::Launch& l, const Arguments& given) {
    const std::string device = expect_cuda(given.view("out"));
    l.tiles = given.address<int>("tiles", "int32", {-1, ode::kRecord}, device);
    l.first_tile = given.address<int>("first_tile", "int32", {std::int64_t{l.teams} + 1}, device);
    l.weights = given.address<std::uint8_t>("weights", "uint8", {-1}, device);
    l.constants = given.address<float>("constants", "float32", {-1}, device);
    const std::vector<std::int64_t> actions{l.batch, l.horizon, l.actions};
    const std::int64_t floats = given.view("constants").shape[0];
    if (std::int64_t{l.times} + l.steps > floats)
        refuse("times", "a place for all steps in " + text(floats) + " constants", text(l.times));
    l.noise = given.address<float>("noise", "float32", actions, device);
    l.context = given.address<std::uint16_t>("context", "bfloat16", {l.batch, l.context_tokens, l.context_columns}, device);
    l.prefix = given.optional<float>("prefix", "float32", {l.batch, l.width}, device);
    l.previous = given.optional<float>("previous", "float32", actions, device);
    l.guidance = given.optional<float>("guidance", "float32", {l.horizon}, device);
    l.out = given.address<float>("out", "float32", actions, device);
    l.words = given.address<std::uint32_t>("words", "int32", {ode::kSets, l.set_words}, device);
    l.private_memory = given.address<float>("private_memory", "float32", {l.private_floats}, device);
    l.progress = given.address<int>("progress", "int32", {2}, device);
    l.status = given.address<int>("status", "int32", {4}, device);
    if ((l.previous == nullptr) != (l.guidance == nullptr)) refuse("guidance", "previous and guidance, or neither", "one");
    if ((l.prefix != nullptr) != (l.rows == l.batch * (std::int64_t{l.horizon} + 1)))
        refuse("prefix", "a tensor if and only if the schedule has state tokens", l.prefix ? "one" : "none");
    for (const std::string written : {"out", "words", "private_memory", "progress", "status"})
        for (const auto& [name, tensor] : given.tensors())
            if (name != written) expect_apart(given.view(written), tensor);
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

int attribute_of(int device, cudaDeviceAttr name) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, name, device), "action_ode: device attribute");
    return value;
}

// Of the code that runs on a device, which must be current: where the driver has compiled an older architecture's, as it does on one
// that the build does not name, that code has no clusters, whatever the device has.
int capability_of(int device) {
    cudaFuncAttributes code{};
    check_cuda(cudaFuncGetAttributes(&code, action_ode_kernel), "action_ode: kernel attributes");
    const int capability =
        10 * attribute_of(device, cudaDevAttrComputeCapabilityMajor) + attribute_of(device, cudaDevAttrComputeCapabilityMinor);
    return std::min(capability, code.ptxVersion);
}

cudaLaunchAttribute cluster_of(int ranks) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = ranks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    return attribute;
}

void launch_cooperatively(const ode::Launch& l, cudaStream_t stream) {
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
    attributes[1] = cluster_of(l.ranks);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(l.teams * l.ranks);
    config.blockDim = dim3(ode::kThreads);
    config.dynamicSmemBytes = shared_bytes_of(l);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = l.ranks > 1 ? 2 : 1;
    check_cuda(cudaLaunchKernelEx(&config, action_ode_kernel, l), "action_ode: launch");
}

// How many clusters of so many blocks can be resident at once on the current device. 8 blocks are portable: no permission is needed.
int resident_clusters(int ranks, int shared_bytes) {
    cudaLaunchAttribute attribute = cluster_of(ranks);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(ranks);
    config.blockDim = dim3(ode::kThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&clusters, action_ode_kernel, &config), "action_ode: clusters");
    return clusters;
}

}  // namespace

void action_ode_cuda(const NamedViews& tensors, const NamedNumbers& numbers, float max_guidance, std::int64_t limit_ns,
                     std::uintptr_t stream) {
    const Arguments given(tensors, numbers);
    ode::Launch l{};
    set_schedule(l, given);
    set_sizes(l, given);
    set_tensors(l, given);
    if (limit_ns < 1) refuse("limit_ns", "at least 1", text(limit_ns));
    l.max_guidance = max_guidance;
    l.limit_ns = limit_ns;
    const DeviceGuard guard(given.view("out"));
    const int allowed = allowed_shared_memory(guard.device());
    if (shared_bytes_of(l) > allowed)
        refuse("staging", "at most " + text(allowed) + " bytes of shared memory in all", text(shared_bytes_of(l)));
    if (l.ranks > 1 && capability_of(guard.device()) < kClusters)
        refuse("ranks", "1 where the code for the GPU has no clusters, before sm_90", text(l.ranks));
    launch_cooperatively(l, reinterpret_cast<cudaStream_t>(stream));
}

std::map<std::string, int> action_ode_facts(int device, int shared_bytes) {
    const DeviceGuard guard(device);
    std::map<std::string, int> facts{
        {"multiprocessors", attribute_of(device, cudaDevAttrMultiProcessorCount)},
        {"shared_memory", allowed_shared_memory(device)},
        {"capability", capability_of(device)},
    };
    const bool fits = shared_bytes <= facts["shared_memory"] && attribute_of(device, cudaDevAttrCooperativeLaunch);
    int blocks = 0;
    if (fits)
        check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, action_ode_kernel, ode::kThreads, shared_bytes),
                   "action_ode: occupancy");
    facts["blocks_per_multiprocessor"] = blocks;
    for (const int ranks : {2, 4, 8})
        facts["clusters_" + text(ranks)] = fits && facts["capability"] >= kClusters ? resident_clusters(ranks, shared_bytes) : 0;
    return facts;
}

}  // namespace dit4dit
