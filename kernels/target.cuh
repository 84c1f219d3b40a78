// Every instruction of the GPU that action_ode and self_attention use, and nothing else: the kernels themselves are plain C++
// over these functions. Of preprocess it is wait_for_inputs alone.
// tests/cuda_emulation has a second set for the host, with which the very same kernel runs on a CPU.
#pragma once

#ifndef __CUDACC__
#include "emulated_target.h"  // tests/cuda_emulation
#else

#include <cuda_runtime.h>

#include <cstdint>

#define DEVICE __device__ __forceinline__

// Bulk copies, transactions and clusters of blocks from sm_90 on; warpgroup products on sm_90a alone.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define DIT4DIT_BULK_COPIES 1
#else
#define DIT4DIT_BULK_COPIES 0
#endif
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DIT4DIT_WARPGROUPS 1
#else
#define DIT4DIT_WARPGROUPS 0
#endif

namespace dit4dit::target {

struct alignas(16) Quad {
    std::uint32_t v[4];
};
struct alignas(8) Float2 {
    float v[2];
};
struct alignas(16) Float4 {
    float v[4];
};

DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
// The same number, of which the compiler knows nothing: what follows from it is worked out again instead of kept in registers.
DEVICE int renewed(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
// Whether it is so for one lane of the warp, or for all. All lanes call it.
DEVICE bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }
DEVICE bool all_lanes(bool x) { return __all_sync(0xffffffffu, x); }
// A number that all lanes of a warp have, so that the compiler knows it. All lanes call it.
DEVICE int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
DEVICE void sync_block() { __syncthreads(); }
// Of the first 256 threads of a block; the others go on.
DEVICE void sync_computing() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE std::uint8_t* shared_memory() {
    extern __shared__ __align__(128) std::uint8_t memory[];
    return memory;
}
DEVICE std::uint32_t shared_address(const void* p) { return static_cast<std::uint32_t>(__cvta_generic_to_shared(p)); }

// The first call of every kernel that may be launched programmatically (dit4dit/ops/programmatic.py): lets the next one be
// started, and waits until all before it have ended and what they wrote is seen. Before sm_90 it is nothing.
DEVICE void wait_for_inputs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// -- global memory: what other blocks write is read from L2, never from this SM's own cache ----------------------------------

DEVICE int load_int(const int* p) { return __ldg(p); }  // of the schedule, which nobody writes
// Of what nobody writes while the kernel runs: the SM's own cache may keep it. It is issued where it is written.
DEVICE Float4 load_constant_float4(const float* p) {
    Float4 f;
    asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
        : "=f"(f.v[0]), "=f"(f.v[1]), "=f"(f.v[2]), "=f"(f.v[3]) : "l"(p));
    return f;
}

DEVICE float load_constant_float(const float* p) {
    float f;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(f) : "l"(p));
    return f;
}

// -- between blocks ----------------------------------------------------------------------------------------------------------

// Words that other blocks write while the kernel runs; p is a multiple of 16 bytes. Each word is read whole, old or new.
DEVICE Quad load_words(const std::uint32_t* p) {
    Quad q;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q.v[0]), "=r"(q.v[1]), "=r"(q.v[2]), "=r"(q.v[3]) : "l"(p) : "memory");
    return q;
}
DEVICE void store_word(std::uint32_t* p, std::uint32_t x) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
// What this thread stored before it, and what it has seen, is seen by whoever sees what it stores after it.
DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
DEVICE int load_acquire(const int* p) {
    int x;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}
DEVICE int fetch_add(int* p) {
    __threadfence();
    const int before = atomicAdd(p, 1);
    __threadfence();
    return before;
}
DEVICE int compare_and_swap(int* p, int expected, int wanted) { return atomicCAS(p, expected, wanted); }
DEVICE std::int64_t nanoseconds() {
    std::int64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}

// -- numbers -----------------------------------------------------------------------------------------------------------------

DEVICE float as_float(std::uint32_t bits) { return __uint_as_float(bits); }
DEVICE std::uint32_t as_bits(float x) { return __float_as_uint(x); }
DEVICE float power_of_two(float x) {
    float y;
    asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 0 where that is below 2^-126: one instruction, where the other takes four.
DEVICE float power_of_two_or_zero(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float quotient(float x, float y) { return __fdividef(x, y); }  // within 2 ulp; 0 where y is above 2^126
DEVICE float inverse_root(float x) { return rsqrtf(x); }
DEVICE float multiply_add(float x, float y, float z) { return fmaf(x, y, z); }  // one rounding; the build fuses none by itself
// Bytes 2 * half and 2 * half + 1 as the upper bytes of two 16-bit numbers, whose lower bytes are zeros.
DEVICE std::uint32_t spread_bytes(std::uint32_t four, int half) { return __byte_perm(four, 0, half ? 0x3424 : 0x1404); }
// Two bf16 numbers times 2^120, exact where they do not overflow; subnormal ones too.
DEVICE std::uint32_t times_two_to_120(std::uint32_t x) {
    std::uint32_t y;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(x), "r"(0x7b807b80u), "r"(0x80008000u));
    return y;
}
DEVICE std::uint32_t pack_bf16(float low, float high) {
    std::uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

// -- copies into shared memory -----------------------------------------------------------------------------------------------

// 16 zeros where there is nothing to copy; `from` is not read then.
DEVICE void copy_async_or_zeros(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
DEVICE void copy_async(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// -- barriers in shared memory: a phase is over when all arrivals are there and all bytes that it expects ------------------------

DEVICE void barrier_init(std::uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Barriers initialised before it are seen by the copy engine, and by other blocks after sync_cluster.
DEVICE void fence_barrier_init() {
#if DIT4DIT_BULK_COPIES
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
DEVICE void barrier_arrive(std::uint64_t* barrier) {
    [[maybe_unused]] std::uint64_t state;
    asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];" : "=l"(state) : "r"(shared_address(barrier)) : "memory");
}
// One of the barrier's arrivals, when all copies that this thread has begun are there.
DEVICE void arrive_on_copies(std::uint64_t* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Whether the phase of this parity is over; from sm_90 on it may sleep for a while before it says no.
DEVICE bool barrier_try_wait(std::uint64_t* barrier, int parity) {
    std::uint32_t over;
#if DIT4DIT_BULK_COPIES
    asm volatile("{\n.reg .pred over;\nmbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\nselp.u32 %0, 1, 0, over;\n}"
                 : "=r"(over) : "r"(shared_address(barrier)), "r"(parity) : "memory");
#else
    asm volatile("{\n.reg .pred over;\nmbarrier.test_wait.parity.shared::cta.b64 over, [%1], %2;\nselp.u32 %0, 1, 0, over;\n}"
                 : "=r"(over) : "r"(shared_address(barrier)), "r"(parity) : "memory");
#endif
    return over != 0;
}
// The same for a barrier on which other blocks arrive or push: what they did before is seen.
DEVICE bool barrier_try_wait_cluster(std::uint64_t* barrier, int parity) {
#if DIT4DIT_BULK_COPIES
    std::uint32_t over;
    asm volatile("{\n.reg .pred over;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, over;\n}"
                 : "=r"(over) : "r"(shared_address(barrier)), "r"(parity) : "memory");
    return over != 0;
#else
    return barrier_try_wait(barrier, parity);
#endif
}

// For what is read once: the first to leave L2 when room is needed.
DEVICE std::uint64_t evict_first() {
    std::uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

#if DIT4DIT_BULK_COPIES
DEVICE void barrier_expect(std::uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// So many arrivals of one thread.
DEVICE void barrier_arrive_times(std::uint64_t* barrier, int times) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(times) : "memory");
}
// What threads wrote into shared memory, which this one knows of, comes before what the copy engine writes for it.
DEVICE void fence_shared_for_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void bulk_copy_once(void* to, const void* from, int bytes, std::uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(evict_first())
                 : "memory");
}

// -- other blocks of the cluster ---------------------------------------------------------------------------------------------

// Where the same place lies in the shared memory of the cluster's block `rank`.
DEVICE std::uint32_t at_rank(const void* own, int rank) {
    std::uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(own)), "r"(rank));
    return there;
}
// 8 bytes into another block's shared memory, a multiple of 8; they count for a barrier of the same block.
DEVICE void push(std::uint32_t to, Float2 x, std::uint32_t barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
                 ::"r"(to), "f"(x.v[0]), "f"(x.v[1]), "r"(barrier) : "memory");
}
// Tells another block that what this one has read from its own shared memory may be written over. It releases nothing that was
// stored: a release would wait for all of the thread's stores to global memory.
DEVICE void arrive_at(std::uint32_t barrier) {
    asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// All threads of all blocks of the cluster. A warp arrives as one: in two halves it would count twice.
DEVICE void sync_cluster() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
#else
DEVICE void copy_async_once(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;"
                 ::"r"(shared_address(to)), "l"(from), "l"(evict_first()) : "memory");
}
#endif

// -- tensor cores ------------------------------------------------------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrices(std::uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
DEVICE void load_matrices_transposed(std::uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
// d += a b: a 16 x 16, b 16 x 8 bf16, d 16 x 8 float32, in the fragments of mma.sync m16n8k16.
DEVICE void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#if DIT4DIT_WARPGROUPS
// What this thread stored in shared memory is seen by warpgroup products after the next sync_block.
DEVICE void fence_shared_for_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// The products since the last one are a group that runs on by itself; what it writes must not be touched until it is over.
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
DEVICE void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
#define DIT4DIT_D4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])

// d += a b: a is 64 x 16 from the registers of four warps, each with the fragments of `multiply`; b, 16 x 64, lies in shared
// memory, 8 x 8 blocks whose rows are columns of b. After products_begin; over when products_wait says so.
DEVICE void multiply_warpgroup(float (&d)[8][4], const std::uint32_t (&a)[4], std::uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
        "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, "
        "1, 1, 1, 0;"
        : DIT4DIT_D4(0), DIT4DIT_D4(1), DIT4DIT_D4(2), DIT4DIT_D4(3), DIT4DIT_D4(4), DIT4DIT_D4(5), DIT4DIT_D4(6),
          DIT4DIT_D4(7)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// d += a b as above for 128 columns; b, 16 x 128, lies with its columns next to each other: 8 x 8 blocks whose rows are k.
DEVICE void multiply_warpgroup_transposed(float (&d)[16][4], const std::uint32_t (&a)[4], std::uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
        "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, "
        "%37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
        "%60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
        : DIT4DIT_D4(0), DIT4DIT_D4(1), DIT4DIT_D4(2), DIT4DIT_D4(3), DIT4DIT_D4(4), DIT4DIT_D4(5), DIT4DIT_D4(6),
          DIT4DIT_D4(7), DIT4DIT_D4(8), DIT4DIT_D4(9), DIT4DIT_D4(10), DIT4DIT_D4(11), DIT4DIT_D4(12), DIT4DIT_D4(13),
          DIT4DIT_D4(14), DIT4DIT_D4(15)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// Nothing that writes the sums may be moved to behind products_begin, nothing that reads them to before products_wait.
template <int kCount>
DEVICE void settle(float (&d)[kCount][4]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) asm volatile("" : DIT4DIT_D4(j)::"memory");
}
#undef DIT4DIT_D4
#endif

}  // namespace dit4dit::target
#endif

// What has no instruction of its own, for GPU and emulation alike.
namespace dit4dit::target {

DEVICE float low_half(std::uint32_t pair) { return as_float(pair << 16); }  // of two bf16 numbers
DEVICE float high_half(std::uint32_t pair) { return as_float(pair & 0xffff0000u); }

}  // namespace dit4dit::target
