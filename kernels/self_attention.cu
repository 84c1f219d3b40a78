// self_attention on CUDA, of q and k that qk_norm_rope has normed and turned, and v where it lies in the qkv matrix.
// On a CPU it runs by tests/cuda_emulation.
#include "self_attention.cuh"

#include <climits>

#include "cuda_check.h"
#include "launchers.h"

namespace dit4dit {
namespace {

using attention::Request;

template <int kQueries>
__global__ void __launch_bounds__(kQueries * 2) self_attention_kernel(const __grid_constant__ Request request) {
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

attention::Operand operand_of(const TensorView& t, const TensorView& q, const std::string& device) {
    expect_dtype(t, {"bfloat16"});
    expect_shape(t, {q.shape[0], q.shape[1], q.shape[2], attention::kDim});
    expect_device(t, device);
    expect_rows(t, 8);
    return {t.data<const std::uint16_t>(), t.strides[0], t.strides[1], t.strides[2]};
}

Request request_of(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out) {
    const std::string device = expect_cuda(out);
    expect_shape(q, {-1, -1, -1, attention::kDim});
    const std::int64_t heads = q.shape[1], length = q.shape[2];
    if (heads > INT_MAX / attention::kDim) refuse("q", "fewer heads", to_string(q.shape));
    if (length > INT_MAX - 256) refuse("q", "less than 2^31 - 256 tokens", to_string(q.shape));
    expect_dtype(out, {"bfloat16"});
    expect_shape(out, {q.shape[0], length, heads * attention::kDim});
    expect_rows(out, 8);
    expect_writable(out);

    Request r{};
    r.q = operand_of(q, q, device), r.k = operand_of(k, q, device), r.v = operand_of(v, q, device);
    r.out = out.data<std::uint16_t>();
    r.out_batch = out.strides[0], r.out_row = out.strides[1];
    r.heads = static_cast<int>(heads);
    r.length = static_cast<int>(length);
    return r;
}

}  // namespace

void self_attention_cuda(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out, int queries,
                         std::uintptr_t stream, bool programmatic) {
    const Request request = request_of(q, k, v, out);
    if (queries != 64 && queries != 128) refuse("queries", "64 or 128", std::to_string(queries));
    const std::int64_t tiles = (std::int64_t{request.length} + queries - 1) / queries;
    if (q.shape[0] > INT_MAX / tiles / request.heads) refuse("q", "fewer than 2^31 blocks of queries", to_string(q.shape));
    for (const auto* read : {&q, &k, &v}) expect_apart(out, *read);
    const DeviceGuard guard(out);
    const auto on = reinterpret_cast<cudaStream_t>(stream);
    const std::int64_t blocks = q.shape[0] * request.heads * tiles;
    if (queries == 64) return launch<64>(request, blocks, on, programmatic);
    launch<128>(request, blocks, on, programmatic);
}

}  // namespace dit4dit
