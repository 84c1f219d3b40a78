// One warp's share of attention: 16 queries of one head, and some keys and values, all of which are rows in shared memory.
#pragma once

#include "action_ode_shares.cuh"

namespace dit4dit::ode {

// Rows of one head in shared memory, 16 bytes apart from a multiple of the banks.
struct Rows {
    std::uint8_t* at;
    int stride;  // bytes

    DEVICE std::uint8_t* row(int r, int column) const { return at + r * stride + column * 2; }
};

// By one warp: words that another team writes, from `first` on, and zeros for rows that only pad.
DEVICE void load_words_of_rows(const Block& block, const Moment& now, const Rows& to, int first, int stride, int count, int padded) {
    constexpr int kAtOnce = DIT4DIT_BULK_COPIES ? 6 : 4;
    const Sweep sweep(block);
    const std::uint32_t* source = block.words(now.set);
    for (int begin = 0; begin < padded; begin += sweep.rows * kAtOnce) {
        Quad q[kAtOnce];
        const auto at = [&](int u) { return begin + u * sweep.rows + sweep.row; };
        const auto wanted = [&](int u) { return !sweep.idle() && at(u) < count; };
        const auto word = [&](int u) { return first + at(u) * stride + sweep.column / 2; };
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) q[u] = wanted(u) ? load_words(source + word(u)) : Quad{};
        Patience patience(block, now.tile);
        for (;;) {
            int missing = kNone;
#pragma unroll
            for (int u = 0; u < kAtOnce; ++u)
                if (incomplete(q[u])) {
                    missing = word(u);
                    q[u] = load_words(source + missing);
                }
            if (!any_lane(missing != kNone) || patience.over(missing)) break;
        }
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u)
            if (!sweep.idle() && at(u) < padded) *reinterpret_cast<Quad*>(to.row(at(u), sweep.column)) = q[u];
    }
}

// Where a row's column lies among the sums over values that warps leave: eight columns stay together, and of four rows in turn they
// lie in other banks.
DEVICE int place_of(int row, int column, int head_dim) {
    const int inside = (head_dim & -head_dim) - 1;
    return row * head_dim + (column ^ (row * 8 & inside & 24));
}

// One warp: 16 queries, and its share of the keys, which come 64 or fewer at a time.
struct Warp {
    float scores[8][4], values[8][4] = {};
    float most[2] = {-INFINITY, -INFINITY}, total[2] = {};  // of query lane / 4 and the one eight further

    // Keys `first` to first + keys - 1 of those that are staged; keys: a multiple of 16 up to 64.
    DEVICE void score(const Rows& q, const Rows& k, int query, int first, int keys, int head_dim, int lane) {
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

    // Scores -> exp(score - most), and all that was summed up so far to the new `most`; keys from `limit` on count for nothing.
    DEVICE void soften(int first, int keys, int limit, float scale, int lane) {
        float before[2] = {most[0], most[1]};
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
        float sum[2] = {};
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                scores[j][i] = exponential(scores[j][i] - base(i / 2));
                sum[i / 2] += scores[j][i];
            }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            for (int mask = 1; mask < 4; mask <<= 1) sum[half] += shuffle_xor(sum[half], mask);
            const float fade = exponential(before[half] - base(half));
            total[half] = total[half] * fade + sum[half];
#pragma unroll
            for (int j = 0; j < 8; ++j)
                for (int e = 0; e < 2; ++e) values[j][half * 2 + e] *= fade;
        }
    }

    DEVICE void gather(const Rows& v, int first, int keys, int head_dim, int lane) {
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
    DEVICE void leave(float* to, float* stats, int head_dim, int lane) const {
#pragma unroll
        for (int j = 0; j < 8; ++j)
            if (j * 8 < head_dim)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    *reinterpret_cast<Float2*>(to + place_of(lane / 4 + half * 8, j * 8 + lane % 4 * 2, head_dim)) = {
                        {values[j][half * 2], values[j][half * 2 + 1]}};
        if (lane % 4 == 0)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                stats[(lane / 4 + half * 8) * 2] = most[half];
                stats[(lane / 4 + half * 8) * 2 + 1] = total[half];
            }
    }

private:
    DEVICE float base(int half) const { return most[half] == -INFINITY ? 0.0f : most[half]; }
};

}  // namespace dit4dit::ode
