// self_attention on CUDA: norm, rotation and attention in one launch, out of the qkv matrix.
// On a CPU it runs by tests/cuda_emulation.
#include "self_attention.cuh"

#include <climits>

#include "cuda_check.h"
#include "launchers.h"

namespace dit4dit {
namespace {

using attention::Request;

// Two blocks of 64 queries a multiprocessor, so that one works on its tensor cores while the other norms or waits.
template <int kQueries>
__global__ void __launch_bounds__(kQueries * 2, 128 / kQueries) self_attention_kernel(const __grid_constant__ Request request) {
    target::wait_for_inputs();
    attention::Block<kQueries>(request).run();
}

template <int kQueries>
void launch(const Request& request, std::int64_t blocks, cudaStream_t stream, bool programmatic) {
    check_cuda(cudaFuncSetAttribute(self_attention_kernel<kQueries>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    attention::kSharedBytes),
               "self_attention: " + std::to_string(attention::kSharedBytes) + " bytes of shared memory");
    launch_kernel("self_attention", self_attention_kernel<kQueries>, static_cast<unsigned>(blocks), kQueries * 2,
                  attention::kSharedBytes, stream, programmatic, request);
}

void expect_aligned(const TensorView& t) {
    if (t.address % 16) refuse(t.name, "an address that is a multiple of 16", std::to_string(t.address));
}

// Dense columns, and rows that begin at multiples of 16 bytes: `each` elements.
void expect_rows(const TensorView& t, std::int64_t each) {
    expect_aligned(t);
    bool fits = t.strides.back() == 1;
    for (std::size_t i = 0; i + 1 < t.shape.size(); ++i) fits = fits && (t.shape[i] == 1 || t.strides[i] % each == 0);
    if (!fits)
        refuse(t.name, "strides that are multiples of " + std::to_string(each) + ", the last one 1", to_string(t.strides));
}

const void* norm_of(const std::optional<TensorView>& t, const std::string& dtype, const std::string& device) {
    if (!t) return nullptr;
    expect_dtype(*t, {dtype});
    expect_shape(*t, {attention::kDim});
    expect_device(*t, device);
    expect_contiguous(*t);
    return t->data<void>();
}

Request request_of(const TensorView& qkv, const std::optional<TensorView>& norm_q, const std::optional<TensorView>& norm_k,
                   const std::optional<TensorView>& rotary, const TensorView& out, int heads, float eps) {
    const std::string device = expect_cuda(out);
    if (heads < 1 || heads > INT_MAX / (3 * attention::kDim)) refuse("heads", "at least 1", std::to_string(heads));
    expect_dtype(qkv, {"bfloat16"});
    expect_shape(qkv, {-1, -1, std::int64_t{3} * heads * attention::kDim});
    expect_device(qkv, device);
    expect_rows(qkv, 8);
    if (qkv.shape[1] > INT_MAX - 128) refuse("qkv", "less than 2^31 - 128 tokens", to_string(qkv.shape));
    expect_dtype(out, {"bfloat16"});
    expect_shape(out, {qkv.shape[0], qkv.shape[1], std::int64_t{heads} * attention::kDim});
    expect_rows(out, 8);
    expect_writable(out);
    if (norm_q.has_value() != norm_k.has_value()) refuse("norm_k", "norm_q and norm_k, or neither", "one");
    if (norm_q) expect_dtype(*norm_q, {"float32", "bfloat16"});
    const std::string norm_dtype = norm_q ? norm_q->dtype : "";

    Request r{};
    r.qkv = qkv.data<const std::uint16_t>();
    r.norm_q = norm_of(norm_q, norm_dtype, device);
    r.norm_k = norm_of(norm_k, norm_dtype, device);
    if (rotary) {
        expect_dtype(*rotary, {"float32"});
        expect_shape(*rotary, {2, qkv.shape[1], attention::kDim / 2});
        expect_device(*rotary, device);
        expect_contiguous(*rotary);
        expect_aligned(*rotary);
        r.rotary = rotary->data<const float>();
    }
    r.out = out.data<std::uint16_t>();
    r.qkv_batch = qkv.strides[0], r.qkv_row = qkv.strides[1];
    r.out_batch = out.strides[0], r.out_row = out.strides[1];
    r.heads = heads;
    r.length = static_cast<int>(qkv.shape[1]);
    r.norm_is_float32 = norm_dtype == "float32";
    r.eps = eps;
    return r;
}

}  // namespace

void self_attention_cuda(const TensorView& qkv, const std::optional<TensorView>& norm_q,
                         const std::optional<TensorView>& norm_k, const std::optional<TensorView>& rotary,
                         const TensorView& out, int heads, float eps, int queries, std::uintptr_t stream,
                         bool programmatic) {
    const Request request = request_of(qkv, norm_q, norm_k, rotary, out, heads, eps);
    if (queries != 64 && queries != 128) refuse("queries", "64 or 128", std::to_string(queries));
    const std::int64_t tiles = (std::int64_t{request.length} + queries - 1) / queries, pairs = qkv.shape[0] * heads;
    if (pairs > INT_MAX / tiles) refuse("qkv", "fewer than 2^31 blocks of queries", to_string(qkv.shape));
    for (const auto* read : {&qkv, norm_q ? &*norm_q : &qkv, norm_k ? &*norm_k : &qkv, rotary ? &*rotary : &qkv})
        expect_apart(out, *read);
    const DeviceGuard guard(out);
    const auto on = reinterpret_cast<cudaStream_t>(stream);
    if (queries == 64) return launch<64>(request, pairs * tiles, on, programmatic);
    launch<128>(request, pairs * tiles, on, programmatic);
}

}  // namespace dit4dit
