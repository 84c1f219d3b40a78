// preprocess on CUDA: one thread per output pixel of every view at once, in one launch. The op is bound by reading and
// writing the images, so each thread finds its taps again instead of a table that would have to be allocated.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda_check.h"
#include "launchers.h"
#include "preprocess_plan.h"
#include "target.cuh"

namespace dit4dit {
namespace {

constexpr int C = 3;
constexpr int kViews = 8;  // travel as a kernel argument

struct Arguments {
    ViewPlan views[kViews];
    int count, out_channels, out_height, out_width;
    std::int64_t out_strides[4];  // batch, channel, row, column
};

__device__ void store(float x, float* to) { *to = x; }
__device__ void store(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }
__device__ void store(float x, __half* to) { *to = __float2half_rn(x); }

struct Source {
    const std::uint8_t* data;
    std::int64_t row, column, channel;

    __device__ int operator()(int y, int x, int c) const { return data[y * row + x * column + c * channel]; }
};

__device__ void area(const Source& at, const ViewPlan& view, int out_height, int y, int x, float value[C]) {
    const AreaTaps rows = area_taps(y, cv2_scale(view.height, out_height), view.height);
    const AreaTaps columns = area_taps(x, cv2_scale(view.width, view.out_width), view.width);
    for (int j = 0; j < rows.count; ++j) {
        float sum[C] = {};
        for (int i = 0; i < columns.count; ++i)
            for (int c = 0; c < C; ++c) sum[c] += at(rows.first + j, columns.first + i, c) * columns.weight(i);
        for (int c = 0; c < C; ++c) value[c] += rows.weight(j) * sum[c];
    }
    for (int c = 0; c < C; ++c) value[c] = rintf(value[c]);
}

__device__ void box(const Source& at, const ViewPlan& view, int out_height, int y, int x, float value[C]) {
    const int ky = view.height / out_height, kx = view.width / view.out_width;
    const float scale = static_cast<float>(1.0 / (static_cast<double>(ky) * kx));
    for (int c = 0; c < C; ++c) {
        std::int64_t sum = 0;
        for (int j = 0; j < ky; ++j)
            for (int i = 0; i < kx; ++i) sum += at(y * ky + j, x * kx + i, c);
        value[c] = view.method == Method::box2x2 ? static_cast<float>((sum + 2) >> 2)
                                                 : rintf(static_cast<float>(sum) * scale);
    }
}

__device__ void enlarge(const Source& at, const ViewPlan& view, int out_height, int y, int x, float value[C]) {
    const auto rows = enlarge_taps(y, static_cast<double>(out_height) / view.height, view.height);
    const auto t = enlarge_taps(x, static_cast<double>(view.out_width) / view.width, view.width);
    for (int c = 0; c < C; ++c)
        value[c] = static_cast<float>(enlarge_combine(
            at(rows.left, t.left, c) * t.left_weight + at(rows.left, t.right, c) * t.right_weight,
            at(rows.right, t.left, c) * t.left_weight + at(rows.right, t.right, c) * t.right_weight, rows));
}

__device__ void bilinear(const Source& at, const ViewPlan& view, int out_height, int y, int x, float value[C]) {
    const auto rows = bilinear_taps(y, static_cast<float>(view.height) / out_height, view.height);
    const auto t = bilinear_taps(x, static_cast<float>(view.width) / view.out_width, view.width);
    for (int c = 0; c < C; ++c) {
        const float top = at(rows.left, t.left, c) * t.left_weight + at(rows.left, t.right, c) * t.right_weight;
        const float bottom = at(rows.right, t.left, c) * t.left_weight + at(rows.right, t.right, c) * t.right_weight;
        value[c] = top * rows.left_weight + bottom * rows.right_weight;
    }
}

template <class T>
__global__ void preprocess_kernel(const __grid_constant__ Arguments a, T* __restrict__ out) {
    target::wait_for_inputs();
    const int out_x = blockIdx.x * blockDim.x + threadIdx.x;
    const int y = blockIdx.y * blockDim.y + threadIdx.y;
    if (out_x >= a.out_width || y >= a.out_height) return;
    int v = 0;
    while (v + 1 < a.count && out_x >= a.views[v + 1].out_column) ++v;
    const ViewPlan& view = a.views[v];
    const int x = out_x - view.out_column;
    const Source at{view.data + blockIdx.z * view.strides[0], view.strides[1], view.strides[2], view.strides[3]};

    float value[C] = {};
    switch (view.method) {
        case Method::copy:
            for (int c = 0; c < C; ++c) value[c] = static_cast<float>(at(y, x, c));
            break;
        case Method::box:
        case Method::box2x2: box(at, view, a.out_height, y, x, value); break;
        case Method::area: area(at, view, a.out_height, y, x, value); break;
        case Method::enlarge: enlarge(at, view, a.out_height, y, x, value); break;
        case Method::bilinear: bilinear(at, view, a.out_height, y, x, value); break;
    }
    T* to = out + blockIdx.z * a.out_strides[0] + y * a.out_strides[2] + out_x * a.out_strides[3];
    for (int c = 0; c < C; ++c) store(to_unit(value[c]), to + c * a.out_strides[1]);
    for (int c = C; c < a.out_channels; ++c) store(0.f, to + c * a.out_strides[1]);
}

template <class T>
void launch(const Arguments& arguments, const TensorView& out, int batch, cudaStream_t stream, bool programmatic) {
    const dim3 block(32, 8);
    const dim3 grid((arguments.out_width + block.x - 1) / block.x, (arguments.out_height + block.y - 1) / block.y,
                    batch);
    launch_kernel("preprocess", preprocess_kernel<T>, grid, block, 0, stream, programmatic, arguments, out.data<T>());
}

}  // namespace

void preprocess_cuda(const std::vector<TensorView>& views, const std::vector<std::int64_t>& widths,
                     const TensorView& out, const std::string& filter, std::uintptr_t stream, bool programmatic) {
    const PreprocessPlan plan = plan_preprocess(views, widths, out, filter, expect_cuda(out));
    if (plan.views.size() > kViews)
        refuse("views", "at most " + std::to_string(kViews) + " on cuda", std::to_string(plan.views.size()));
    if (plan.batch > 65535) refuse("out", "a batch of at most 65535 on cuda", std::to_string(plan.batch));
    Arguments arguments{};
    for (std::size_t i = 0; i < plan.views.size(); ++i) arguments.views[i] = plan.views[i];
    arguments.count = static_cast<int>(plan.views.size());
    arguments.out_channels = plan.out_channels;
    arguments.out_height = plan.out_height;
    arguments.out_width = plan.out_width;
    for (int d = 0; d < 4; ++d) arguments.out_strides[d] = out.strides[d];

    const DeviceGuard guard(out);
    const auto on = reinterpret_cast<cudaStream_t>(stream);
    if (out.dtype == "float32") return launch<float>(arguments, out, plan.batch, on, programmatic);
    if (out.dtype == "bfloat16") return launch<__nv_bfloat16>(arguments, out, plan.batch, on, programmatic);
    launch<__half>(arguments, out, plan.batch, on, programmatic);
}

}  // namespace dit4dit
