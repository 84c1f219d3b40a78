// What a product takes: tokens in shared memory, as they are, normed, or merged from ranges of keys.
#pragma once

#include "action_ode_block.cuh"

namespace dit4dit::ode {

// Columns of activations in shared memory: groups of eight, in each 16 bytes a token, and 16 bytes more.
struct Staged {
    std::uint8_t* at;
    int group;  // bytes

    DEVICE std::uint8_t* row(int column, int token) const { return at + column / 8 * group + token * 16; }
};

// Scale and shift of a norm lie before the tokens.
DEVICE float* modulation_of(const Block& block) { return reinterpret_cast<float*>(block.staging); }

DEVICE Staged staged(const Block& block, const Product& w) {
    const int before = w.modulation == kNone ? 0 : 2 * w.columns * static_cast<int>(sizeof(float));
    return {block.staging + before, block.launch.padded_tokens * 16 + 16};
}

// Before the wait: it never changes. `wait` makes it seen by all.
DEVICE void fetch_modulation(const Block& block, const Product& w) {
    if (w.modulation == kNone) return;
    for (int i = 4 * thread_index(); i < 2 * w.columns; i += 4 * kThreads)
        *reinterpret_cast<Float4*>(modulation_of(block) + i) = load_constant_float4(block.constant(w.modulation) + i);
}

DEVICE float warp_sum(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) x += shuffle_xor(x, mask);
    return x;
}

// Eight columns of one token, as they come together from the planes of a head's ranges of keys.
struct Merged {
    float most = -INFINITY, total = 0, y[8] = {};

    DEVICE void add(const Quad& part, float score, float sum) {
        const float largest = fmaxf(most, score), fade = exponential(most - largest), share = exponential(score - largest) * sum;
        most = largest;
        total = total * fade + share;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            y[2 * i] = y[2 * i] * fade + share * low_half(part.v[i]);
            y[2 * i + 1] = y[2 * i + 1] * fade + share * high_half(part.v[i]);
        }
    }
    DEVICE Quad rounded() const {
        Quad q;
#pragma unroll
        for (int i = 0; i < 4; ++i) q.v[i] = pack_bf16(y[2 * i] / total, y[2 * i + 1] / total);
        return q;
    }
};

DEVICE void stage_merged(const Block& block, const Product& w, const Staged& to, int column, int span) {
    constexpr int kItems = 3, kPlanes = 3;  // on their way at a time
    const int groups = span / 8, all = groups * block.launch.padded_tokens;
    for (int begin = thread_index(); begin < all; begin += kThreads * kItems) {
        Merged merged[kItems];
        for (int first = 0; first < w.planes; first += kPlanes) {
            Quad part[kItems][kPlanes];
            Float2 stats[kItems][kPlanes];
#pragma unroll
            for (int u = 0; u < kItems; ++u) {
                const int i = begin + u * kThreads, token = i / groups, c = column + i % groups * 8;
#pragma unroll
                for (int p = 0; p < kPlanes; ++p)
                    if (token < w.tokens && c < w.columns && first + p < w.planes) {
                        const int head = c / block.launch.head_dim;
                        stats[u][p] = load_float2(block.buffer<float>(kStats, w.token + token, first + p) + 2 * head);
                        part[u][p] = load_quad(block.buffer<std::uint16_t>(kAttended, w.token + token, first + p) + c);
                    }
            }
#pragma unroll
            for (int u = 0; u < kItems; ++u) {
                const int i = begin + u * kThreads;
#pragma unroll
                for (int p = 0; p < kPlanes; ++p)
                    if (i / groups < w.tokens && column + i % groups * 8 < w.columns && first + p < w.planes)
                        merged[u].add(part[u][p], stats[u][p].v[0], stats[u][p].v[1]);
            }
        }
#pragma unroll
        for (int u = 0; u < kItems; ++u) {
            const int i = begin + u * kThreads, token = i / groups, c = i % groups * 8;
            const bool there = token < w.tokens && column + c < w.columns;
            if (i < all) *reinterpret_cast<Quad*>(to.row(c, token)) = there ? merged[u].rounded() : Quad{};
        }
    }
}

DEVICE void stage_plain(const Block& block, const Product& w, const Staged& to, int column, int span) {
    constexpr int kTokens = 3, kPieces = 4;
    const int warp = thread_index() / 32, lane = thread_index() % 32, padded = block.launch.padded_tokens;
    const int source_columns = block.launch.columns[w.source];
    const std::uint16_t* source = block.buffer<std::uint16_t>(w.source, w.token) + column;
    for (int first = warp; first < padded; first += kWarps * kTokens)
        for (int begin = lane * 8; begin < span; begin += 32 * 8 * kPieces) {
            Quad x[kTokens][kPieces];
#pragma unroll
            for (int t = 0; t < kTokens; ++t)
#pragma unroll
                for (int p = 0; p < kPieces; ++p) {
                    const int token = first + t * kWarps, c = begin + p * 32 * 8;
                    x[t][p] = Quad{};
                    if (token < w.tokens && c < span && column + c < w.columns)
                        x[t][p] = load_quad(source + token * source_columns + c);
                }
#pragma unroll
            for (int t = 0; t < kTokens; ++t)
#pragma unroll
                for (int p = 0; p < kPieces; ++p) {
                    const int token = first + t * kWarps, c = begin + p * 32 * 8;
                    if (token < padded && c < span) *reinterpret_cast<Quad*>(to.row(c, token)) = x[t][p];
                }
        }
}

// A token's row, spread over a warp: columns 8 * lane to + 7 of each 256, which is a piece.
template <int kPieces>
struct NormedRow {
    Quad x[kPieces];

    DEVICE static int column(int piece) { return (piece * 32 + thread_index() % 32) * 8; }

    DEVICE void load(const std::uint16_t* row, int width) {
#pragma unroll
        for (int p = 0; p < kPieces; ++p) {
            x[p] = Quad{};
            if (column(p) < width) x[p] = load_quad(row + column(p));
        }
    }
    // mean, and the inverse of the standard deviation
    DEVICE void moments(int width, float eps, float& mean, float& inverse) const {
        float sum = 0, squares = 0;
#pragma unroll
        for (int p = 0; p < kPieces; ++p)
            for (int i = 0; i < 4; ++i) sum += low_half(x[p].v[i]) + high_half(x[p].v[i]);
        mean = warp_sum(sum) / static_cast<float>(width);
#pragma unroll
        for (int p = 0; p < kPieces; ++p)
            if (column(p) < width)
                for (int i = 0; i < 4; ++i) {
                    const float a = low_half(x[p].v[i]) - mean, b = high_half(x[p].v[i]) - mean;
                    squares += a * a + b * b;
                }
        inverse = inverse_root(warp_sum(squares) / static_cast<float>(width) + eps);
    }
};

// y = (x - mean) inverse scale + shift; scale and shift of eight columns, or null.
DEVICE Quad normed(const Quad& x, float mean, float inverse, const float* scale, const float* shift) {
    Quad y;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float a = (low_half(x.v[i]) - mean) * inverse, b = (high_half(x.v[i]) - mean) * inverse;
        if (scale != nullptr) {
            a = a * scale[2 * i] + shift[2 * i];
            b = b * scale[2 * i + 1] + shift[2 * i + 1];
        }
        y.v[i] = pack_bf16(a, b);
    }
    return y;
}

// kTokens rows a warp at a time. A row is normed anew for each part of its columns: it takes more than one part only on small
// chips or of very wide heads.
template <int kPieces, int kTokens>
DEVICE void stage_normed(const Block& block, const Product& w, const Staged& to, int column, int span) {
    const int warp = thread_index() / 32, padded = block.launch.padded_tokens, source_columns = block.launch.columns[w.source];
    const std::uint16_t* source = block.buffer<std::uint16_t>(w.source, w.token);
    const float* scale = w.modulation == kNone ? nullptr : modulation_of(block);
    for (int first = warp; first < padded; first += kWarps * kTokens) {
        NormedRow<kPieces> rows[kTokens] = {};
#pragma unroll
        for (int t = 0; t < kTokens; ++t)
            if (first + t * kWarps < w.tokens) rows[t].load(source + (first + t * kWarps) * source_columns, w.columns);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            const int token = first + t * kWarps;
            if (token >= padded) continue;
            float mean, inverse;
            rows[t].moments(w.columns, as_float(static_cast<std::uint32_t>(w.norm)), mean, inverse);
#pragma unroll
            for (int p = 0; p < kPieces; ++p) {
                const int c = NormedRow<kPieces>::column(p);
                if (c < column || c >= column + span) continue;
                Quad y{};
                if (token < w.tokens && c < w.columns)
                    y = normed(rows[t].x[p], mean, inverse, scale == nullptr ? nullptr : scale + c,
                               scale == nullptr ? nullptr : scale + w.columns + c);
                *reinterpret_cast<Quad*>(to.row(c - column, token)) = y;
            }
        }
    }
}

// Columns `column` to + span - 1 of all tokens.
DEVICE void stage(const Block& block, const Product& w, const Staged& to, int column, int span) {
    if (w.norm != 0 && w.columns <= 1024)
        stage_normed<4, 3>(block, w, to, column, span);
    else if (w.norm != 0)
        stage_normed<kMaxWidth / 256, 1>(block, w, to, column, span);
    else if (w.planes > 1)
        stage_merged(block, w, to, column, span);
    else
        stage_plain(block, w, to, column, span);
}

}  // namespace dit4dit::ode
