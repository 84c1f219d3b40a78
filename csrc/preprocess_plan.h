// What both implementations of preprocess check and decide before they touch a pixel.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "resize.h"
#include "tensor_view.h"

namespace dit4dit {

constexpr std::int64_t kLargestExtent = 32768;  // keeps products of two extents within an int

struct ViewPlan {
    const std::uint8_t* data;
    std::int64_t strides[4];  // batch, row, column, channel
    int height, width;
    int out_width;
    int out_column;  // where the view begins in the output
    Method method;
};

struct PreprocessPlan {
    int batch, out_channels, out_height, out_width;
    std::vector<ViewPlan> views;
};

inline Method choose_method(int height, int width, int out_height, int out_width, const std::string& filter) {
    if (height == out_height && width == out_width) return Method::copy;
    if (filter == "bilinear") return Method::bilinear;
    const double y = cv2_scale(height, out_height), x = cv2_scale(width, out_width);
    if (y < 1 || x < 1) return Method::enlarge;
    if (y == std::floor(y) && x == std::floor(x)) return y == 2 && x == 2 ? Method::box2x2 : Method::box;
    return Method::area;
}

inline void expect_extents(const TensorView& t) {
    for (auto extent : t.shape)
        if (extent > kLargestExtent)
            refuse(t.name, "extents up to " + std::to_string(kLargestExtent), to_string(t.shape));
}

// views uint8 [B, H_i, W_i, 3], out [B, 3 or more, h, sum of widths]; view i fills widths[i] columns, from left to right.
// Channels of out beyond the third get zeros.
inline PreprocessPlan plan_preprocess(const std::vector<TensorView>& views, const std::vector<std::int64_t>& widths,
                                      const TensorView& out, const std::string& filter, const std::string& device) {
    if (filter != "cv2_area" && filter != "bilinear") refuse("filter", "'cv2_area' or 'bilinear'", "'" + filter + "'");
    if (views.empty()) refuse("views", "at least one view", "none");
    if (widths.size() != views.size())
        refuse("widths", std::to_string(views.size()) + " numbers, one per view", to_string(widths));
    std::int64_t total = 0;
    for (auto width : widths) {
        if (width <= 0 || width > kLargestExtent)
            refuse("widths", "positive numbers up to " + std::to_string(kLargestExtent), to_string(widths));
        total = plus("widths", total, width);
    }
    expect_dtype(out, {"float32", "bfloat16", "float16"});
    expect_shape(out, {-1, out.shape.size() > 1 ? std::max<std::int64_t>(3, out.shape[1]) : 3, -1, total});
    expect_device(out, device);
    expect_writable(out);
    expect_extents(out);

    PreprocessPlan plan{static_cast<int>(out.shape[0]),
                        static_cast<int>(out.shape[1]),
                        static_cast<int>(out.shape[2]),
                        static_cast<int>(total),
                        {}};
    int column = 0;
    for (std::size_t i = 0; i < views.size(); ++i) {
        const TensorView& view = views[i];
        expect_dtype(view, {"uint8"}, " in 0..255");
        expect_shape(view, {out.shape[0], -1, -1, 3});
        expect_device(view, device);
        expect_extents(view);
        expect_apart(out, view);

        ViewPlan v{};
        v.data = view.data<const std::uint8_t>();
        for (int d = 0; d < 4; ++d) v.strides[d] = view.strides[d];
        v.height = static_cast<int>(view.shape[1]);
        v.width = static_cast<int>(view.shape[2]);
        v.out_width = static_cast<int>(widths[i]);
        v.out_column = column;
        v.method = choose_method(v.height, v.width, plan.out_height, v.out_width, filter);
        column += v.out_width;
        plan.views.push_back(v);
    }
    return plan;
}

}  // namespace dit4dit
