// Tiles that work on rows of tokens: noise, norms, attention's second pass, and the sampler's step.
#pragma once

#include "action_ode_block.cuh"

namespace dit4dit::ode {

// One action of one token, in both of its places; columns past the last action are the zeros that pad NOISY.
DEVICE void set_action(const Block& block, int token, int a, float x) {
    if (a < block.launch.actions) block.buffer<float>(kActions, token)[a] = x;
    block.buffer<std::uint16_t>(kNoisy, token)[a] = static_cast<std::uint16_t>(pack_bf16(x, 0.0f) & 0xffffu);
}

DEVICE void start(const Block& block, const Start& w) {
    const Launch& launch = block.launch;
    for (int i = thread_index(); i < w.tokens * launch.padded_actions; i += kThreads) {
        const int place = i / launch.padded_actions, a = i % launch.padded_actions, k = place - w.prefix;
        const std::int64_t row = static_cast<std::int64_t>(w.sample) * launch.horizon + k;
        set_action(block, w.token + place, a, k >= 0 && a < launch.actions ? launch.noise[row * launch.actions + a] : 0.0f);
    }
}

// Four columns of the residual stream, the branch before added.
DEVICE Float4 stream_of(const Block& block, const Norm& w, int c) {
    Float4 x = load_float4(w.first == 2 ? block.launch.prefix + static_cast<std::int64_t>(w.sample) * block.launch.width + c
                                        : block.constant(w.bias) + c);
    if (w.first == 2) return x;
    if (w.first == 0) {
        const Float4 before = load_float4(block.buffer<float>(kStream, w.token) + c);
        for (int e = 0; e < 4; ++e) x.v[e] = before.v[e] + x.v[e];
    }
    for (int plane = 0; plane < w.planes; ++plane) {
        const Float4 part = load_float4(block.buffer<float>(kPartials, w.token, plane) + c);
        for (int e = 0; e < 4; ++e) x.v[e] += part.v[e];
    }
    return x;
}

DEVICE void norm(const Block& block, const Norm& w) {
    constexpr int kPieces = kMaxWidth / (4 * kThreads);
    const int width = block.launch.width;
    Float4 x[kPieces];
    float sum = 0;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
        const int c = (p * kThreads + thread_index()) * 4;
        x[p] = Float4{};
        if (c < width) {
            x[p] = stream_of(block, w, c);
            *reinterpret_cast<Float4*>(block.buffer<float>(kStream, w.token) + c) = x[p];
        }
        for (int e = 0; e < 4; ++e) sum += x[p].v[e];
    }
    const float mean = block_sum(sum, block.fixed.sums[0]) / static_cast<float>(width);
    float squares = 0;
#pragma unroll
    for (int p = 0; p < kPieces; ++p)
        if ((p * kThreads + thread_index()) * 4 < width)
            for (int e = 0; e < 4; ++e) squares += (x[p].v[e] - mean) * (x[p].v[e] - mean);
    const float variance = block_sum(squares, block.fixed.sums[1]) / static_cast<float>(width);
    const float inverse = inverse_root(variance + as_float(static_cast<std::uint32_t>(w.eps)));
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
        const int c = (p * kThreads + thread_index()) * 4;
        if (c >= width) continue;
        float y[4];
        for (int e = 0; e < 4; ++e) y[e] = (x[p].v[e] - mean) * inverse;
        if (w.scale != kNone) {
            const Float4 scale = load_float4(block.constant(w.scale) + c), shift = load_float4(block.constant(w.shift) + c);
            for (int e = 0; e < 4; ++e) y[e] = y[e] * scale.v[e] + shift.v[e];
        }
        std::uint32_t* out = reinterpret_cast<std::uint32_t*>(block.buffer<std::uint16_t>(kNormed, w.token) + c);
        out[0] = pack_bf16(y[0], y[1]);
        out[1] = pack_bf16(y[2], y[3]);
    }
}

DEVICE void combine(const Block& block, const Combine& w) {
    const int d = block.launch.head_dim;
    for (int i = thread_index(); i < w.tokens * d / 2; i += kThreads) {
        const int token = w.token + i / (d / 2), column = w.head * d + i % (d / 2) * 2;
        float most = -INFINITY, total = 0, y[2] = {};
        for (int plane = 0; plane < w.planes; ++plane)
            most = fmaxf(most, load_float(block.buffer<float>(kStats, token, plane) + 2 * w.head));
        for (int plane = 0; plane < w.planes; ++plane) {
            const float* stats = block.buffer<float>(kStats, token, plane) + 2 * w.head;
            const float share = exponential(load_float(stats) - most);
            total += share * load_float(stats + 1);
            const float* values = block.buffer<float>(kHeads, token, plane) + column;
            for (int e = 0; e < 2; ++e) y[e] += share * load_float(values + e);
        }
        std::uint16_t* out = block.buffer<std::uint16_t>(kAttended, token);
        reinterpret_cast<std::uint32_t*>(out)[column / 2] = pack_bf16(y[0] / total, y[1] / total);
    }
}

// Strength of the guidance at time t, as ops/euler_step.py has it.
DEVICE float guidance_strength(float t, float most) {
    const float tau = 1 - t;
    if (t <= 0 || tau <= 0) return most;
    const float g = (t * t + tau * tau) / (t * tau);
    return g < most ? g : most;
}

// A NaN stays one.
DEVICE float to_units(const Launch& launch, int a, float y) {
    const float *low = launch.units + a, *high = low + launch.actions, *threshold = high + launch.actions;
    const float *scale = threshold + launch.actions, *offset = scale + launch.actions;
    y = y < *low ? *low : y > *high ? *high : y;
    if (*threshold == *threshold && y == y) y = y >= *threshold ? 1.0f : 0.0f;
    return *scale == 0 && y == y ? *offset : y * *scale + *offset;
}

DEVICE void euler(const Block& block, const Euler& w) {
    const Launch& launch = block.launch;
    const int padded = launch.padded_actions;
    const float t = *block.constant(launch.times + w.step), dt = 1.0f / static_cast<float>(launch.steps);
    for (int i = thread_index(); i < launch.horizon * padded; i += kThreads) {
        const int k = i / padded, a = i % padded, token = w.token + w.prefix + k;
        float x = 0;
        if (a < launch.actions) {
            float v = *block.constant(w.bias + a);
            for (int plane = 0; plane < w.planes; ++plane) v += load_float(block.buffer<float>(kPartials, token, plane) + a);
            x = load_float(block.buffer<float>(kActions, token) + a);
            const std::int64_t at = (static_cast<std::int64_t>(w.sample) * launch.horizon + k) * launch.actions + a;
            if (launch.previous != nullptr) {
                const float pull = guidance_strength(t, launch.max_guidance) * launch.guidance[k];
                v = v - pull * (launch.previous[at] - (x - t * v));
            }
            x = x - dt * v;
            if (w.last) launch.out[at] = launch.units == nullptr ? x : to_units(launch, a, x);
        }
        set_action(block, token, a, x);
    }
}

}  // namespace dit4dit::ode
