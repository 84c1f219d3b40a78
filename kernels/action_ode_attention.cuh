// Attention of one head of one sample to a range of keys, at most 64 a warp: scores and sums of values on the tensor cores.
#pragma once

#include "action_ode_block.cuh"

namespace dit4dit::ode {

// Rows of one head in shared memory, 16 bytes apart from a multiple of the banks.
struct Rows {
    std::uint8_t* at;
    int stride;  // bytes

    DEVICE const std::uint8_t* row(int r, int column) const { return at + r * stride + column * 2; }
};

// `count` rows of head_dim columns from global memory, and zeros up to `padded` rows.
DEVICE void load_rows(const Rows& to, const std::uint16_t* from, std::int64_t stride, int count, int padded, int head_dim) {
    constexpr int kAtOnce = 8;
    const int pieces = head_dim / 8;
    for (int begin = thread_index(); begin < padded * pieces; begin += kThreads * kAtOnce) {
        Quad q[kAtOnce];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            const int i = begin + u * kThreads, r = i / pieces;
            q[u] = Quad{};
            if (r < count) q[u] = load_quad(from + r * stride + i % pieces * 8);
        }
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            const int i = begin + u * kThreads, r = i / pieces;
            if (r < padded) *reinterpret_cast<Quad*>(to.at + r * to.stride + i % pieces * 16) = q[u];
        }
    }
}

// One warp: 16 queries against `keys` keys from `first` on, a multiple of 16 and at most 64.
struct Warp {
    float scores[8][4], values[8][4];
    float most[2], total[2];  // of query lane / 4 and the one eight further

    DEVICE void score(const Rows& q, const Rows& k, int query, int first, int keys, int head_dim) {
        const int lane = thread_index() % 32;
#pragma unroll
        for (int j = 0; j < 8; ++j)
            for (int i = 0; i < 4; ++i) scores[j][i] = 0;
#pragma unroll
        for (int step = 0; step < kMaxHeadDim / 16; ++step)
            if (step * 16 < head_dim) {
                std::uint32_t a[4];
                load_matrices(a, q.row(query + lane % 16, step * 16 + lane / 16 * 8));
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    if (j * 16 < keys) {
                        std::uint32_t b[4];
                        load_matrices(b, k.row(first + j * 16 + lane / 16 * 8 + lane % 8, step * 16 + lane / 8 % 2 * 8));
                        multiply(scores[2 * j], a, b[0], b[1]);
                        multiply(scores[2 * j + 1], a, b[2], b[3]);
                    }
            }
    }

    // Scores -> exp(score - most); keys from `limit` on count for nothing.
    DEVICE void soften(int first, int keys, int limit, float scale) {
        const int lane = thread_index() % 32;
        for (int half = 0; half < 2; ++half) most[half] = -INFINITY, total[half] = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool there = j * 8 < keys && first + j * 8 + lane % 4 * 2 + i % 2 < limit;
                scores[j][i] = there ? scores[j][i] * scale : -INFINITY;
                most[i / 2] = fmaxf(most[i / 2], scores[j][i]);
            }
#pragma unroll
        for (int half = 0; half < 2; ++half)
            for (int mask = 1; mask < 4; mask <<= 1) most[half] = fmaxf(most[half], shuffle_xor(most[half], mask));
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float base = most[i / 2] == -INFINITY ? 0.0f : most[i / 2];
                scores[j][i] = exponential(scores[j][i] - base);
                total[i / 2] += scores[j][i];
            }
#pragma unroll
        for (int half = 0; half < 2; ++half)
            for (int mask = 1; mask < 4; mask <<= 1) total[half] += shuffle_xor(total[half], mask);
    }

    DEVICE void gather(const Rows& v, int first, int keys, int head_dim) {
        const int lane = thread_index() % 32;
#pragma unroll
        for (int j = 0; j < 8; ++j)
            for (int i = 0; i < 4; ++i) values[j][i] = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (j * 16 < keys) {
                const std::uint32_t a[4] = {
                    pack_bf16(scores[2 * j][0], scores[2 * j][1]), pack_bf16(scores[2 * j][2], scores[2 * j][3]),
                    pack_bf16(scores[2 * j + 1][0], scores[2 * j + 1][1]),
                    pack_bf16(scores[2 * j + 1][2], scores[2 * j + 1][3])};
#pragma unroll
                for (int n = 0; n < kMaxHeadDim / 16; ++n)
                    if (n * 16 < head_dim) {
                        std::uint32_t b[4];
                        load_matrices_transposed(b, v.row(first + j * 16 + lane % 16, n * 16 + lane / 16 * 8));
                        multiply(values[2 * n], a, b[0], b[1]);
                        multiply(values[2 * n + 1], a, b[2], b[3]);
                    }
            }
    }

    // Into [16][head_dim] and [16][2] of this warp.
    DEVICE void leave(float* to, float* stats, int head_dim) const {
        const int lane = thread_index() % 32;
#pragma unroll
        for (int j = 0; j < 8; ++j)
            if (j * 8 < head_dim)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    to[(lane / 4 + i / 2 * 8) * head_dim + j * 8 + lane % 4 * 2 + i % 2] = values[j][i];
        if (lane % 4 == 0)
            for (int half = 0; half < 2; ++half) {
                stats[(lane / 4 + half * 8) * 2] = most[half];
                stats[(lane / 4 + half * 8) * 2 + 1] = total[half];
            }
    }
};

// What the warps of one query tile left, in the order of their keys: two columns of one query.
DEVICE void merge_pair(const Block& block, const Attend& w, int query_tiles, int query, int column) {
    const int d = block.launch.head_dim;
    const float* stats = reinterpret_cast<const float*>(block.staging);
    const float* left = stats + kWarps * 16 * 2;
    float most = -INFINITY, total = 0, y[2] = {};
    for (int warp = query / 16; warp < kWarps; warp += query_tiles)
        most = fmaxf(most, stats[(warp * 16 + query % 16) * 2]);
    for (int warp = query / 16; warp < kWarps; warp += query_tiles) {
        const int row = warp * 16 + query % 16;
        const float share = exponential(stats[row * 2] - most);
        total += share * stats[row * 2 + 1];
        for (int e = 0; e < 2; ++e) y[e] += share * left[row * d + column + e];
    }
    const int token = w.token + query, at = w.head * d + column;
    std::uint16_t* out = block.buffer<std::uint16_t>(kAttended, token, w.plane);
    reinterpret_cast<std::uint32_t*>(out)[at / 2] = pack_bf16(y[0] / total, y[1] / total);
    if (column == 0) {
        float* out_stats = block.buffer<float>(kStats, token, w.plane) + 2 * w.head;
        out_stats[0] = most;
        out_stats[1] = total;
    }
}

// False: the launch has failed. The features' keys and values never change: they are fetched before the wait.
DEVICE bool attend(const Block& block, const Tile& tile, int index) {
    const Attend& w = block.work<Attend>(tile);
    const Launch& launch = block.launch;
    const int d = launch.head_dim, warp = thread_index() / 32;
    const int query_tiles = w.tokens <= 16 ? 1 : w.tokens <= 32 ? 2 : 4, key_groups = kWarps / query_tiles;
    const int per_warp = (w.keys + key_groups * 16 - 1) / (key_groups * 16) * 16;
    const int padded_keys = per_warp * key_groups;
    const Rows k{block.staging, d * 2 + 16}, v{k.at + padded_keys * k.stride, k.stride}, q{v.at + padded_keys * k.stride, k.stride};
    if (w.context != kNone) {
        const std::int64_t stride = launch.context_columns;
        const std::uint16_t* from = launch.context + (w.sample * static_cast<std::int64_t>(launch.context_tokens) + w.key) * stride +
                                    2 * w.context * launch.width + w.head * d;
        load_rows(k, from, stride, w.keys, padded_keys, d);
        load_rows(v, from + launch.width, stride, w.keys, padded_keys, d);
    }
    if (!block.wait(tile, index)) return false;
    const std::uint16_t* projected = block.buffer<std::uint16_t>(kProjected, w.token) + w.head * d;
    const std::int64_t stride = launch.columns[kProjected];
    if (w.context == kNone) {
        load_rows(k, projected + w.key * stride + launch.width, stride, w.keys, padded_keys, d);
        load_rows(v, projected + w.key * stride + 2 * launch.width, stride, w.keys, padded_keys, d);
    }
    load_rows(q, projected, stride, w.tokens, query_tiles * 16, d);
    sync_block();

    const int query = warp % query_tiles * 16, first = warp / query_tiles * per_warp;
    Warp mine;
    mine.score(q, k, query, first, per_warp, d);
    mine.soften(first, per_warp, w.keys, inverse_root(static_cast<float>(d)));
    mine.gather(v, first, per_warp, d);
    sync_block();
    float* stats = reinterpret_cast<float*>(block.staging);
    mine.leave(stats + kWarps * 16 * 2 + warp * 16 * d, stats + warp * 16 * 2, d);
    sync_block();
    for (int i = thread_index(); i < w.tokens * d / 2; i += kThreads)
        merge_pair(block, w, query_tiles, i / (d / 2), i % (d / 2) * 2);
    return true;
}

}  // namespace dit4dit::ode
