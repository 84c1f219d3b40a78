// preprocess on the CPU: row by row, so that a row of the output is finished while its pixels are in the cache.
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "launchers.h"
#include "preprocess_plan.h"

namespace dit4dit {
namespace {

constexpr int C = 3;

struct Bfloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

// Finite input, to nearest, ties to even, as torch casts.
void store(float x, float* to) { *to = x; }

void store(float x, Bfloat16* to) {
    const std::uint32_t bits = bits_of(x);
    to->bits = static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// |x| <= 1, so nothing overflows. Below 2^-14 float16 counts in steps of 2^-24.
void store(float x, Float16* to) {
    const std::uint32_t bits = bits_of(x);
    const std::uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude < 0x38800000)
        to->bits = static_cast<std::uint16_t>(sign | static_cast<std::uint32_t>(std::lrint(std::fabs(x) * 0x1p24f)));
    else
        to->bits = static_cast<std::uint16_t>(
            sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

// One view of one batch entry; row(y) computes output row y into `values`, [out_width, 3] in 0..255.
class Resizer {
public:
    Resizer(const ViewPlan& view, int batch, int out_height)
        : view_(view), data_(view.data + batch * view.strides[0]), out_height_(out_height),
          values(static_cast<std::size_t>(view.out_width) * C), left_over_(values.size()) {
        const int n = view.out_width;
        switch (view.method) {
            case Method::area:
                for (int x = 0; x < n; ++x) area_.push_back(area_taps(x, cv2_scale(view.width, n), view.width));
                break;
            case Method::bilinear:
                for (int x = 0; x < n; ++x)
                    bilinear_.push_back(bilinear_taps(x, static_cast<float>(view.width) / n, view.width));
                break;
            case Method::enlarge:
                for (int x = 0; x < n; ++x)
                    enlarge_.push_back(enlarge_taps(x, static_cast<double>(n) / view.width, view.width));
                break;
            default: break;
        }
    }

    void row(int y) {
        switch (view_.method) {
            case Method::copy: return copy_row(y);
            case Method::box:
            case Method::box2x2: return box_row(y);
            case Method::area: return area_row(y);
            case Method::enlarge: return enlarge_row(y);
            case Method::bilinear: return bilinear_row(y);
        }
    }

private:
    const std::uint8_t* pixel(int y, int x) const { return data_ + y * view_.strides[1] + x * view_.strides[2]; }

    void copy_row(int y) {
        for (int x = 0; x < view_.out_width; ++x)
            for (int c = 0; c < C; ++c) values[x * C + c] = pixel(y, x)[c * view_.strides[3]];
    }

    void box_row(int y) {
        const int ky = view_.height / out_height_, kx = view_.width / view_.out_width;
        const float scale = static_cast<float>(1.0 / (static_cast<double>(ky) * kx));
        for (int x = 0; x < view_.out_width; ++x)
            for (int c = 0; c < C; ++c) {
                std::int64_t sum = 0;
                for (int j = 0; j < ky; ++j)
                    for (int i = 0; i < kx; ++i) sum += pixel(y * ky + j, x * kx + i)[c * view_.strides[3]];
                values[x * C + c] = static_cast<float>(
                    view_.method == Method::box2x2 ? (sum + 2) >> 2 : std::lrint(static_cast<float>(sum) * scale));
            }
    }

    // Neighbouring output rows share a source row where their border falls inside it: it is combined once.
    const std::vector<float>& area_columns(int y) {
        if (y != left_over_row_) {
            for (int x = 0; x < view_.out_width; ++x) {
                const AreaTaps& taps = area_[x];
                for (int c = 0; c < C; ++c) {
                    const std::uint8_t* p = pixel(y, taps.first) + c * view_.strides[3];
                    float sum = 0.f;
                    for (int k = 0; k < taps.count; ++k, p += view_.strides[2]) sum += *p * taps.weight(k);
                    left_over_[x * C + c] = sum;
                }
            }
            left_over_row_ = y;
        }
        return left_over_;
    }

    void area_row(int y) {
        const AreaTaps taps = area_taps(y, cv2_scale(view_.height, out_height_), view_.height);
        std::fill(values.begin(), values.end(), 0.f);
        for (int k = 0; k < taps.count; ++k) {
            const float weight = taps.weight(k);
            const auto& columns = area_columns(taps.first + k);
            for (std::size_t i = 0; i < values.size(); ++i) values[i] += weight * columns[i];
        }
        for (float& value : values) value = static_cast<float>(std::lrint(value));
    }

    void enlarge_row(int y) {
        const auto rows = enlarge_taps(y, static_cast<double>(out_height_) / view_.height, view_.height);
        for (int x = 0; x < view_.out_width; ++x) {
            const auto& t = enlarge_[x];
            for (int c = 0; c < C; ++c) {
                const auto at = [&](int j, int i) { return static_cast<int>(pixel(j, i)[c * view_.strides[3]]); };
                values[x * C + c] = static_cast<float>(enlarge_combine(
                    at(rows.left, t.left) * t.left_weight + at(rows.left, t.right) * t.right_weight,
                    at(rows.right, t.left) * t.left_weight + at(rows.right, t.right) * t.right_weight, rows));
            }
        }
    }

    void bilinear_row(int y) {
        const auto rows = bilinear_taps(y, static_cast<float>(view_.height) / out_height_, view_.height);
        for (int x = 0; x < view_.out_width; ++x) {
            const auto& t = bilinear_[x];
            for (int c = 0; c < C; ++c) {
                const auto at = [&](int j, int i) { return static_cast<float>(pixel(j, i)[c * view_.strides[3]]); };
                const float top = at(rows.left, t.left) * t.left_weight + at(rows.left, t.right) * t.right_weight;
                const float bottom = at(rows.right, t.left) * t.left_weight + at(rows.right, t.right) * t.right_weight;
                values[x * C + c] = top * rows.left_weight + bottom * rows.right_weight;
            }
        }
    }

    const ViewPlan& view_;
    const std::uint8_t* data_;
    int out_height_;

public:
    std::vector<float> values;

private:
    std::vector<float> left_over_;
    int left_over_row_ = -1;
    std::vector<AreaTaps> area_;
    std::vector<PairTaps<float>> bilinear_;
    std::vector<PairTaps<int>> enlarge_;
};

template <class T>
void run(const PreprocessPlan& plan, const TensorView& out) {
    const auto& s = out.strides;  // batch, channel, row, column
    for (const ViewPlan& view : plan.views)
        for (int b = 0; b < plan.batch; ++b) {
            Resizer resizer(view, b, plan.out_height);
            for (int y = 0; y < plan.out_height; ++y) {
                resizer.row(y);
                T* to = out.data<T>() + b * s[0] + y * s[2] + view.out_column * s[3];
                for (int c = 0; c < C; ++c)
                    for (int x = 0; x < view.out_width; ++x)
                        store(to_unit(resizer.values[x * C + c]), to + c * s[1] + x * s[3]);
                for (int c = C; c < plan.out_channels; ++c)
                    for (int x = 0; x < view.out_width; ++x) store(0.f, to + c * s[1] + x * s[3]);
            }
        }
}

}  // namespace

void preprocess_cpu(const std::vector<TensorView>& views, const std::vector<std::int64_t>& widths,
                    const TensorView& out, const std::string& filter) {
    const PreprocessPlan plan = plan_preprocess(views, widths, out, filter, "cpu");
    if (out.dtype == "float32") return run<float>(plan, out);
    if (out.dtype == "bfloat16") return run<Bfloat16>(plan, out);
    return run<Float16>(plan, out);
}

}  // namespace dit4dit
