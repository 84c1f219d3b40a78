// The functions of kernels/target.cuh on a CPU. EMULATE_BULK_COPIES and EMULATE_WARPGROUPS stand for the GPU.
//
// Stricter than a GPU where that finds faults: copies and pushes destroy their target at once and land as late as allowed,
// arrivals on other blocks' barriers come late, words that are stored are seen by others late and in any order unless a fence lies
// between, warpgroup products read shared memory as late as allowed and their sums are NaN until then, shared memory begins as
// NaN, all threads of an instruction must reach it, no block may touch one that has not begun or has ended, and threads continue
// in a random order. It cannot show a missing fence of loads: each load reads what is there when it is issued.
#pragma once

#include <cmath>
#include <utility>

#include "fibers.h"

#define DEVICE inline

#define DIT4DIT_BULK_COPIES EMULATE_BULK_COPIES
#define DIT4DIT_WARPGROUPS EMULATE_WARPGROUPS

namespace dit4dit::target {

using emulation::machine;

struct alignas(16) Quad {
    std::uint32_t v[4];
};
struct alignas(8) Float2 {
    float v[2];
};
struct alignas(16) Float4 {
    float v[4];
};

DEVICE int thread_index() { return machine->self().thread; }
DEVICE int renewed(int x) { return x; }
DEVICE int uniform(int x) { return x; }
DEVICE int block_index() { return machine->self().block->index; }
DEVICE std::uint8_t* shared_memory() { return machine->self().block->shared; }
DEVICE std::uint32_t shared_address(const void* p) {
    return static_cast<std::uint32_t>(static_cast<const std::uint8_t*>(p) - shared_memory());
}

inline int lane() { return thread_index() % emulation::kWarp; }
inline emulation::Meeting& my_warp() { return machine->self().block->warps[thread_index() / emulation::kWarp]; }

DEVICE void sync_block() {
    int none = 0;
    auto& block = *machine->self().block;
    machine->meet(block.all, "sync_block", thread_index(), &none, [&block](auto&) { machine->met(block); });
}
DEVICE void sync_computing() {
    int none = 0;
    auto& block = *machine->self().block;
    if (thread_index() >= emulation::kComputing || block.threads < emulation::kComputing)
        machine->fail("sync_computing by other than the first 256 threads");
    machine->meet(block.computing, "sync_computing", thread_index(), &none, [&block](auto&) { machine->met(block); });
}
DEVICE void sync_warp() {
    int none = 0;
    machine->meet(my_warp(), "sync_warp", lane(), &none, [](auto&) {});
}
DEVICE int lanes_with(bool x) {
    struct Operand {
        bool x;
        int count;
    } mine{x, 0};
    machine->meet(my_warp(), "vote", lane(), &mine, [](auto& all) {
        int count = 0;
        for (int l = 0; l < emulation::kWarp; ++l) count += static_cast<Operand*>(all[l])->x;
        for (int l = 0; l < emulation::kWarp; ++l) static_cast<Operand*>(all[l])->count = count;
    });
    return mine.count;
}
DEVICE bool any_lane(bool x) { return lanes_with(x) > 0; }
DEVICE bool all_lanes(bool x) { return lanes_with(x) == emulation::kWarp; }
DEVICE float shuffle_xor(float x, int mask) {
    struct Operand {
        float x, got;
    } mine{x, 0};
    machine->meet(my_warp(), "shuffle " + std::to_string(mask), lane(), &mine, [mask](auto& all) {
        for (int l = 0; l < emulation::kWarp; ++l)
            static_cast<Operand*>(all[l])->got = static_cast<Operand*>(all[l ^ mask])->x;
    });
    return mine.got;
}

DEVICE void wait_for_inputs() {}  // the host calls a kernel when what it reads is there

DEVICE Float4 load_constant_float4(const float* p) {
    if (reinterpret_cast<std::uintptr_t>(p) % 16) machine->fail("load_constant_float4 from an address that is no multiple of 16");
    return *reinterpret_cast<const Float4*>(p);
}
DEVICE int load_int(const int* p) { return *p; }
DEVICE float load_constant_float(const float* p) { return *p; }

DEVICE Quad load_words(const std::uint32_t* p) {
    if (reinterpret_cast<std::uintptr_t>(p) % 16) machine->fail("load_words from an address that is no multiple of 16");
    machine->catch_up(p);
    const Quad q = *reinterpret_cast<const Quad*>(p);
    const bool all_there = q.v[0] + 1 && q.v[1] + 1 && q.v[2] + 1 && q.v[3] + 1;
    if (!all_there)
        machine->sleep(p);  // whoever finds a word empty will ask again
    else if (machine->chance(16))
        machine->yield();
    return q;
}
DEVICE void store_word(std::uint32_t* p, std::uint32_t x) {
    if (reinterpret_cast<std::uintptr_t>(p) % 4) machine->fail("store_word to an address that is no multiple of 4");
    machine->store(p, x);
    if (machine->chance(16)) machine->yield();
}
DEVICE void fence() { machine->fence(); }
DEVICE int load_acquire(const int* p) {
    machine->yield();
    return *static_cast<const volatile int*>(p);
}
DEVICE int fetch_add(int* p) {
    machine->fence();
    return (*p)++;
}
DEVICE int compare_and_swap(int* p, int expected, int wanted) {
    const int before = *p;
    if (before == expected) *p = wanted;
    return before;
}
DEVICE std::int64_t nanoseconds() { return static_cast<std::int64_t>(machine->clock()); }

DEVICE float as_float(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
DEVICE std::uint32_t as_bits(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
DEVICE float power_of_two(float x) { return std::exp2(x); }
DEVICE float power_of_two_or_zero(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
DEVICE float quotient(float x, float y) { return x / y; }
DEVICE float inverse_root(float x) { return 1.0f / std::sqrt(x); }
DEVICE float multiply_add(float x, float y, float z) { return std::fma(x, y, z); }
inline std::uint32_t to_bf16(float x) {
    const std::uint32_t bits = as_bits(x);
    if (x != x) return 0x7fffu;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
inline float from_bf16(std::uint32_t bits) { return as_float(bits << 16); }
DEVICE std::uint32_t pack_bf16(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }
DEVICE std::uint32_t spread_bytes(std::uint32_t four, int half) {
    const std::uint32_t two = four >> 16 * half;
    return (two & 0xffu) << 8 | (two >> 8 & 0xffu) << 24;
}
DEVICE std::uint32_t times_two_to_120(std::uint32_t x) {
    const float scale = as_float((120u + 127u) << 23);
    return pack_bf16(from_bf16(x & 0xffffu) * scale, from_bf16(x >> 16) * scale);
}

DEVICE void copy_async(void* to, const void* from) {
    if (reinterpret_cast<std::uintptr_t>(from) % 16) machine->fail("copy_async from an address that is no multiple of 16");
    if (reinterpret_cast<std::uintptr_t>(to) % 16) machine->fail("copy_async to an address that is no multiple of 16");
    std::memset(to, 0xff, 16);
    machine->self().copies.push_back({to, from, 16});
}
DEVICE void copy_async_or_zeros(void* to, const void* from, bool there) {
    static const Quad zeros{};
    copy_async(to, there ? from : &zeros);
}
DEVICE void commit_copies() {
    auto& fiber = machine->self();
    fiber.committed.push_back(std::move(fiber.copies));
    fiber.copies.clear();
}
template <int kPending>
DEVICE void wait_copies() {
    auto& fiber = machine->self();
    for (; fiber.committed.size() > kPending; fiber.committed.pop_front())
        for (const auto& copy : fiber.committed.front()) std::memcpy(copy.to, copy.from, copy.bytes);
}

// -- barriers ------------------------------------------------------------------------------------------------------------------

struct Barrier {
    std::int64_t bytes : 21;  // still to come; negative where they came before they were expected
    std::uint64_t arrivals : 12, left : 12, phase : 1, mark : 18;
};
static_assert(sizeof(Barrier) == 8);
constexpr std::uint64_t kBarrierMark = 0x2b5d1;
constexpr int kMostBytes = (1 << 20) - 1;

inline Barrier& barrier_at(std::uint64_t* p) {
    if (reinterpret_cast<std::uintptr_t>(p) % 8) machine->fail("a barrier at an address that is no multiple of 8");
    Barrier& barrier = *reinterpret_cast<Barrier*>(p);
    if (barrier.mark != kBarrierMark) machine->fail("a barrier that is not initialised");
    return barrier;
}
inline void complete(std::uint64_t* p) {
    Barrier& barrier = barrier_at(p);
    if (barrier.left != 0 || barrier.bytes != 0) return;
    barrier.left = barrier.arrivals;
    barrier.phase = barrier.phase ^ 1;
    machine->wake(p);
}
inline void count_bytes(std::uint64_t* p, int bytes) {
    const int sum = static_cast<int>(barrier_at(p).bytes) + bytes;
    if (sum > kMostBytes || sum < -kMostBytes) machine->fail("more bytes than a barrier can count");
    barrier_at(p).bytes = sum;
}
inline void arrive_now(std::uint64_t* p) {
    Barrier& barrier = barrier_at(p);
    if (barrier.left == 0) machine->fail("more arrivals than the barrier expects");
    barrier.left = barrier.left - 1;
    complete(p);
}

DEVICE void barrier_init(std::uint64_t* p, int arrivals) {
    Barrier& barrier = *reinterpret_cast<Barrier*>(p);
    if (barrier.mark == kBarrierMark) machine->fail("a barrier is initialised twice");
    if (arrivals < 1 || arrivals > 4095) machine->fail("a barrier of " + std::to_string(arrivals) + " arrivals");
    const auto count = static_cast<std::uint64_t>(arrivals);
    barrier = {0, count, count, 0, kBarrierMark};
    machine->arrived = arrive_now;
    machine->arrived_bytes = [](std::uint64_t* at, int bytes) {
        count_bytes(at, -bytes);
        complete(at);
    };
}
DEVICE void fence_barrier_init() {}
DEVICE void barrier_arrive(std::uint64_t* p) { arrive_now(p); }
DEVICE bool barrier_try_wait(std::uint64_t* p, int parity) {
    if (parity != 0 && parity != 1) machine->fail("a parity of " + std::to_string(parity));
    if (static_cast<int>(barrier_at(p).phase) != parity) return true;
    machine->sleep(p);
    return false;
}
DEVICE bool barrier_try_wait_cluster(std::uint64_t* p, int parity) { return barrier_try_wait(p, parity); }

DEVICE void arrive_on_copies(std::uint64_t* barrier) {
    auto& fiber = machine->self();
    if (!fiber.committed.empty()) machine->fail("arrive_on_copies after commit_copies");
    barrier_at(barrier);
    fiber.announced.emplace_back(std::move(fiber.copies), barrier);
    fiber.copies.clear();
    machine->begin({emulation::Event::kCopies, fiber.block, nullptr, nullptr, 0, 0, barrier, machine->index()});
}

#if DIT4DIT_BULK_COPIES
DEVICE void barrier_expect(std::uint64_t* p, int bytes) {
    count_bytes(p, bytes);
    arrive_now(p);
}
DEVICE void barrier_arrive_times(std::uint64_t* p, int times) {
    for (int i = 0; i < times; ++i) arrive_now(p);
}
DEVICE void fence_shared_for_copies() {}
DEVICE void bulk_copy_once(void* to, const void* from, int bytes, std::uint64_t* barrier) {
    if (reinterpret_cast<std::uintptr_t>(from) % 16 || shared_address(to) % 16 || bytes % 16 || bytes < 1)
        machine->fail("bulk_copy_once of something that is no multiple of 16");
    barrier_at(barrier);
    std::memset(to, 0xff, bytes);
    machine->begin({emulation::Event::kCopy, machine->self().block, to, from, 0, bytes, barrier, 0});
}

// -- other blocks of the cluster -----------------------------------------------------------------------------------------------

constexpr int kRankShift = 24;

DEVICE std::uint32_t at_rank(const void* own, int rank) {
    const auto& block = *machine->self().block;
    if (shared_address(own) >= block.shared_bytes) machine->fail("at_rank of what is not in shared memory");
    if (rank < 0 || rank >= static_cast<int>(block.cluster->blocks.size()))
        machine->fail("at_rank of a block that the cluster does not have");
    return static_cast<std::uint32_t>(rank) << kRankShift | shared_address(own);
}
inline std::pair<emulation::Block*, void*> other_block(std::uint32_t at, const std::string& what) {
    const auto& blocks = machine->self().block->cluster->blocks;
    const std::uint32_t rank = at >> kRankShift, offset = at & ((1u << kRankShift) - 1);
    if (rank >= blocks.size()) machine->fail(what + " to a block that the cluster does not have");
    emulation::Block* block = blocks[rank];
    if (!block->begun) machine->fail(what + " to a block that has not begun");
    if (block->ended()) machine->fail(what + " to a block that has ended");
    if (offset % 8 || offset + 8 > block->shared_bytes) machine->fail(what + " to a bad address");
    return {block, block->shared + offset};
}
DEVICE void push(std::uint32_t to, Float2 x, std::uint32_t barrier) {
    const auto [block, place] = other_block(to, "a push");
    auto* counted = static_cast<std::uint64_t*>(other_block(barrier, "a push").second);
    if (to >> kRankShift != barrier >> kRankShift) machine->fail("a push with the barrier of another block");
    barrier_at(counted);
    std::uint64_t value;
    std::memcpy(&value, &x, 8);
    std::memset(place, 0xff, 8);
    machine->begin({emulation::Event::kPush, block, place, nullptr, value, 8, counted, 0});
    if (machine->chance(32)) machine->yield();
}
DEVICE void arrive_at(std::uint32_t barrier) {
    const auto [block, place] = other_block(barrier, "an arrival");
    auto* there = static_cast<std::uint64_t*>(place);
    barrier_at(there);
    machine->begin({emulation::Event::kArrival, block, nullptr, nullptr, 0, 0, there, 0});
}
DEVICE void sync_cluster() {
    int none = 0;
    auto& block = *machine->self().block;
    machine->meet(block.cluster->all, "sync_cluster", block.rank * block.threads + thread_index(), &none,
                  [&block](auto&) { machine->settle(*block.cluster); });
}
#else
DEVICE void copy_async_once(void* to, const void* from) { copy_async(to, from); }
#endif

// -- tensor cores --------------------------------------------------------------------------------------------------------------

struct Matrices {
    const std::uint16_t* row;
    std::uint32_t* r;
};

inline void load_matrices_as(std::uint32_t (&r)[4], const void* row, bool transposed) {
    if (shared_address(row) % 16) machine->fail("load_matrices from an address that is no multiple of 16");
    Matrices mine{static_cast<const std::uint16_t*>(row), r};
    machine->meet(my_warp(), transposed ? "ldmatrix.trans" : "ldmatrix", lane(), &mine, [transposed](auto& all) {
        for (int m = 0; m < 4; ++m)
            for (int l = 0; l < emulation::kWarp; ++l) {
                std::uint32_t pair = 0;
                for (int e = 0; e < 2; ++e) {
                    const int i = transposed ? l % 4 * 2 + e : l / 4, j = transposed ? l / 4 : l % 4 * 2 + e;
                    pair |= static_cast<std::uint32_t>(static_cast<Matrices*>(all[m * 8 + i])->row[j]) << 16 * e;
                }
                static_cast<Matrices*>(all[l])->r[m] = pair;
            }
    });
}
DEVICE void load_matrices(std::uint32_t (&r)[4], const void* row) { load_matrices_as(r, row, false); }
DEVICE void load_matrices_transposed(std::uint32_t (&r)[4], const void* row) { load_matrices_as(r, row, true); }

// Element (i, k) of operand A, 16 x 16, from the fragments of a warp.
template <class Lane>
float element_a(const Lane& fragment_of, int i, int k) {
    const std::uint32_t* a = fragment_of(i % 8 * 4 + k % 8 / 2);
    const std::uint32_t pair = a[i / 8 + k / 8 * 2];
    return from_bf16(k % 2 ? pair >> 16 : pair & 0xffffu);
}

struct Multiplication {
    float* d;
    const std::uint32_t* a;
    std::uint32_t b[2];
};

DEVICE void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    Multiplication mine{d, a, {b0, b1}};
    machine->meet(my_warp(), "mma", lane(), &mine, [](auto& all) {
        const auto of = [&all](int l) { return static_cast<Multiplication*>(all[l]); };
        float x[16][16], y[16][8];
        for (int i = 0; i < 16; ++i)
            for (int k = 0; k < 16; ++k) x[i][k] = element_a([&of](int l) { return of(l)->a; }, i, k);
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 8; ++n) {
                const std::uint32_t pair = of(n * 4 + k % 8 / 2)->b[k / 8];
                y[k][n] = from_bf16(k % 2 ? pair >> 16 : pair & 0xffffu);
            }
        for (int l = 0; l < emulation::kWarp; ++l)
            for (int i = 0; i < 4; ++i)
                for (int k = 0; k < 16; ++k) of(l)->d[i] += x[l / 4 + i / 2 * 8][k] * y[k][l % 4 * 2 + i % 2];
    });
}

struct WarpgroupMultiplication {
    float (*d)[4];
    const std::uint32_t* a;
    std::uint64_t tokens;
};

DEVICE void fence_shared_for_products() {}
DEVICE void products_begin() {}
DEVICE void products_commit() {
    auto& fiber = machine->self();
    fiber.committed_products.push_back(std::move(fiber.products));
    fiber.products.clear();
}
template <int kPending>
DEVICE void products_wait() {
    auto& fiber = machine->self();
    for (; fiber.committed_products.size() > kPending; fiber.committed_products.pop_front())
        for (const auto& product : fiber.committed_products.front()) product();
}

// What a thread's sums are while products run that write them; once only, however many products.
inline void lend(float* sums, int count) {
    auto [lent, is_new] = machine->self().lent.try_emplace(sums);
    ++lent->second.products;
    if (!is_new) return;
    lent->second.values.assign(sums, sums + count);
    std::memset(sums, 0xff, count * sizeof(float));
}
inline void give_back(float* sums) {
    auto& lent = machine->self().lent;
    const auto at = lent.find(sums);
    if (--at->second.products > 0) return;
    for (std::size_t i = 0; i < at->second.values.size(); ++i)
        if (as_bits(sums[i]) != 0xffffffffu) machine->fail("wgmma: sums were written while products ran");
    std::copy(at->second.values.begin(), at->second.values.end(), sums);
    lent.erase(at);
}

template <bool kTransposed, int kBlocks>
void multiply_groups_now(float (*d)[4], const std::uint32_t (&a)[4], std::uint64_t tokens);

// kTransposed: rows of the 8 x 8 blocks are k, else columns.
template <bool kTransposed, int kBlocks>
void multiply_groups(float (*d)[4], const std::uint32_t (&a)[4], std::uint64_t tokens) {
    lend(d[0], kBlocks * 4);
    machine->self().products.push_back([d, tokens, a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3]] {
        const std::uint32_t fragment[4] = {a0, a1, a2, a3};
        auto* sums = reinterpret_cast<float(*)[4]>(machine->self().lent.at(d[0]).values.data());
        multiply_groups_now<kTransposed, kBlocks>(sums, fragment, tokens);
        give_back(d[0]);
    });
}
template <bool kTransposed, int kBlocks>
void multiply_groups_now(float (*d)[4], const std::uint32_t (&a)[4], std::uint64_t tokens) {
    WarpgroupMultiplication mine{d, a, tokens};
    auto& group = machine->self().block->groups[thread_index() / 128];
    const std::string what = (kTransposed ? "wgmma.trans " : "wgmma ") + std::to_string(kBlocks * 8);
    machine->meet(group, what, thread_index() % 128, &mine, [](auto& all) {
        const auto of = [&all](int t) { return static_cast<WarpgroupMultiplication*>(all[t]); };
        const std::uint64_t description = of(0)->tokens;
        for (int t = 0; t < 128; ++t)
            if (of(t)->tokens != description) machine->fail("wgmma: threads describe different tokens");
        const std::uint8_t* base = shared_memory() + ((description & 0x3fff) << 4);
        const std::uint64_t along_k = (description >> 16 & 0x3fff) << 4, along_n = (description >> 32 & 0x3fff) << 4;
        if (description >> 46) machine->fail("wgmma: a description with a swizzle");
        const std::uint64_t last = ((description & 0x3fff) << 4) + along_k + (kBlocks - 1) * along_n + 128;
        if (last > machine->self().block->shared_bytes) machine->fail("wgmma: a description of more than shared memory");
        float b[16][kBlocks * 8];
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < kBlocks * 8; ++n) {
                std::uint16_t bits;  // 8 x 8 blocks: rows of 16 bytes
                const int row = kTransposed ? k % 8 : n % 8, column = kTransposed ? n % 8 : k % 8;
                std::memcpy(&bits, base + k / 8 * along_k + n / 8 * along_n + row * 16 + column * 2, 2);
                b[k][n] = from_bf16(bits);
            }
        for (int warp = 0; warp < 4; ++warp) {
            const auto fragment = [&](int other) { return of(warp * 32 + other)->a; };
            for (int l = 0; l < emulation::kWarp; ++l)
                for (int half = 0; half < 2; ++half)
                    for (int k = 0; k < 16; ++k) {
                        const float x = element_a(fragment, l / 4 + half * 8, k);
                        for (int j = 0; j < kBlocks; ++j)
                            for (int e = 0; e < 2; ++e) of(warp * 32 + l)->d[j][half * 2 + e] += x * b[k][j * 8 + l % 4 * 2 + e];
                    }
        }
    });
}
DEVICE void multiply_warpgroup(float (&d)[8][4], const std::uint32_t (&a)[4], std::uint64_t b) {
    multiply_groups<false, 8>(d, a, b);
}
DEVICE void multiply_warpgroup_transposed(float (&d)[16][4], const std::uint32_t (&a)[4], std::uint64_t b) {
    multiply_groups<true, 16>(d, a, b);
}
template <int kCount>
DEVICE void settle(float (&)[kCount][4]) {}

}  // namespace dit4dit::target
