// The taps of each resize filter along one axis: the one definition that the CPU and the CUDA code share.
//
// Bit-exactness rests on the order of these operations and on no multiply-add being fused: compile with
// -ffp-contract=off (host) and --fmad=false (device).
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define DIT4DIT_HD __host__ __device__ inline
#else
#define DIT4DIT_HD inline
#endif

namespace dit4dit {

// How one view is resized; cv2_area falls into the four in the middle (see the reference in dit4dit/ops/preprocess.py).
enum class Method : int { copy, box, box2x2, area, enlarge, bilinear };

// The reciprocal of a reciprocal, as OpenCV has it: one rounding more than in / out.
DIT4DIT_HD double cv2_scale(int in, int out) { return 1.0 / (static_cast<double>(out) / in); }

// Output i is the mean of the inputs [first, first + count), of which the first and the last may be covered in part.
struct AreaTaps {
    int first, count;
    float head, inner, tail;

    DIT4DIT_HD float weight(int k) const { return k == 0 ? head : k == count - 1 ? tail : inner; }
};

DIT4DIT_HD AreaTaps area_taps(int i, double scale, int in) {
    const double begin = i * scale;
    const double end = begin + scale;
    const double width = scale < in - begin ? scale : in - begin;
    int last = static_cast<int>(floor(end));
    if (last > in - 1) last = in - 1;
    int start = static_cast<int>(ceil(begin));
    if (start > last) start = last;

    AreaTaps taps{start, last - start, 0.f, static_cast<float>(1.0 / width), 0.f};
    taps.head = taps.tail = taps.inner;
    // OpenCV leaves out what covers less than a thousandth of an input
    const bool partial_head = start - begin > 1e-3;
    if (partial_head) {
        taps.head = static_cast<float>((start - begin) / width);
        --taps.first;
        ++taps.count;
    }
    if (end - last > 1e-3) {
        double covered = end - last < 1.0 ? end - last : 1.0;
        if (covered > width) covered = width;
        taps.tail = static_cast<float>(covered / width);
        if (++taps.count == 1) taps.head = taps.tail;
    }
    return taps;
}

// Output i is left * left_weight + right * right_weight; weights are floats that sum to 1, or whole numbers to 2048.
template <class Weight>
struct PairTaps {
    int left, right;
    Weight left_weight, right_weight;
};

// scale = float(in) / out
DIT4DIT_HD PairTaps<float> bilinear_taps(int i, float scale, int in) {
    // torch computes this as one fused float32 operation; in double the product is exact, so the rounding is the same
    float x = static_cast<float>(static_cast<double>(scale) * (i + 0.5) - 0.5);
    if (x < 0.f) x = 0.f;
    int left = static_cast<int>(x);
    if (left > in - 1) left = in - 1;
    const float weight = x - static_cast<float>(left);
    return {left, left + 1 < in ? left + 1 : in - 1, 1.f - weight, weight};
}

DIT4DIT_HD PairTaps<int> enlarge_taps(int i, double inverse, int in) {
    int left = static_cast<int>(floor(i * (1.0 / inverse)));
    float weight = static_cast<float>((i + 1) - (left + 1) * inverse);
    weight = weight <= 0.f ? 0.f : weight - floorf(weight);
    if (left >= in - 1) {
        left = in - 1;
        weight = 0.f;
    }
    return {left, left + 1 < in ? left + 1 : in - 1, static_cast<int>(rintf((1.f - weight) * 2048.f)),
            static_cast<int>(rintf(weight * 2048.f))};
}

// One pixel from the horizontally combined pairs of its two rows, 11 fractional bits each.
DIT4DIT_HD int enlarge_combine(int top, int bottom, const PairTaps<int>& rows) {
    return ((((top >> 4) * rows.left_weight) >> 16) + (((bottom >> 4) * rows.right_weight) >> 16) + 2) >> 2;
}

// 0..255 -> [-1, 1]
DIT4DIT_HD float to_unit(float x) { return 2.f * (x / 255.f) - 1.f; }

}  // namespace dit4dit
