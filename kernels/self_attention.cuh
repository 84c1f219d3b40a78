// Self-attention straight out of the qkv matrix: a block takes kQueries queries of one head past all of its keys.
// q and k are normed and turned in shared memory once they have landed; scores, weights and sums stay in registers.
// Plain C++ over target.cuh, so that tests/cuda_emulation runs it on a CPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "target.cuh"

namespace dit4dit::attention {

using namespace target;

constexpr int kDim = 128;
constexpr int kRows = 64;  // of a tile: queries, keys or values
constexpr int kTiles = 3;  // in shared memory: one in use, two on their way
// A tile: groups of eight columns, in each 16 bytes a row, and 16 bytes more. Eight rows of a group, which is what ldmatrix and
// warpgroup products read at once, and the eight pieces of a row that threads write at once, meet every bank once.
constexpr int kGroupBytes = kRows * 16 + 16;
constexpr int kTileBytes = kDim / 8 * kGroupBytes;
constexpr int kSharedBytes = kTiles * kTileBytes;
static_assert(2 * (kSharedBytes + 1024) <= 100 << 10, "two blocks a multiprocessor, also on sm_89 and sm_120");
constexpr float kLog2E = 1.4426950408889634f;

// The caller's tensors, as device addresses. Strides in elements; columns are dense.
struct Request {
    const std::uint16_t* qkv;  // bf16 [batch, length, 3 * heads * 128]
    const void* norm_q;        // [128], float32 or bf16, or null: no norm
    const void* norm_k;
    const float* rotary;       // [2, length, 64]: cosines, sines; or null: no rotation
    std::uint16_t* out;        // bf16 [batch, length, heads * 128]
    std::int64_t qkv_batch, qkv_row, out_batch, out_row;
    int heads, length, norm_is_float32;
    float eps;
};

struct alignas(8) Pair {
    std::uint32_t v[2];
};

struct Tile {
    std::uint8_t* at;

    DEVICE std::uint8_t* row(int r, int column) const { return at + column / 8 * kGroupBytes + r * 16; }
};
DEVICE Tile tile_of(int index) { return {shared_memory() + index % kTiles * kTileBytes}; }

// A thread's part of a row, while it is normed and turned: four columns, and those that turn with them.
struct Eight {
    float v[8];

    DEVICE static Eight of_weight(const void* weight, int column, bool is_float32) {
        Eight w;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int at = column + i / 4 * (kDim / 2) + i % 4;
            if (is_float32) w.v[i] = static_cast<const float*>(weight)[at];
            else w.v[i] = as_float(static_cast<std::uint32_t>(static_cast<const std::uint16_t*>(weight)[at]) << 16);
        }
        return w;
    }
    DEVICE void load(const std::uint8_t* low, const std::uint8_t* high) {
        const Pair a = *reinterpret_cast<const Pair*>(low), b = *reinterpret_cast<const Pair*>(high);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            v[2 * i] = low_half(a.v[i]), v[2 * i + 1] = high_half(a.v[i]);
            v[4 + 2 * i] = low_half(b.v[i]), v[5 + 2 * i] = high_half(b.v[i]);
        }
    }
    DEVICE void store(std::uint8_t* low, std::uint8_t* high) const {
        *reinterpret_cast<Pair*>(low) = {{pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])}};
        *reinterpret_cast<Pair*>(high) = {{pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])}};
    }
    DEVICE void turn(const Float4& cosine, const Float4& sine) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float first = v[i], second = v[4 + i];
            v[i] = first * cosine.v[i] - second * sine.v[i];
            v[4 + i] = second * cosine.v[i] + first * sine.v[i];
        }
    }
};

// RMS norm of rows, each held by 16 threads; the rows' sums take turns, so that none waits for its own.
template <int kCount>
DEVICE void norm(Eight (&x)[kCount], const Eight& weight, float eps) {
    float squares[kCount] = {};
#pragma unroll
    for (int u = 0; u < kCount; ++u)
        for (int i = 0; i < 8; ++i) squares[u] += x[u].v[i] * x[u].v[i];
#pragma unroll
    for (int mask = 1; mask < 16; mask <<= 1)
#pragma unroll
        for (int u = 0; u < kCount; ++u) squares[u] += shuffle_xor(squares[u], mask);
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
        const float scale = inverse_root(squares[u] / kDim + eps);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[u].v[i] = x[u].v[i] * scale * weight.v[i];
    }
}

// What a warp knows of its 16 queries; this thread of the queries lane / 4 and eight further.
struct Sums {
    float values[16][4] = {};
    float most[2] = {-INFINITY, -INFINITY}, total[2] = {};  // largest score so far; sum of this thread's weights

    // Scores -> weights 2^(score - most); keys from `count` on count for nothing. `scale` includes log2(e).
    DEVICE void soften(float (&scores)[8][4], int count, float scale) {
        const int column = thread_index() % 4 * 2;
        if (count < kRows)
#pragma unroll
            for (int j = 0; j < 8; ++j)
                for (int i = 0; i < 4; ++i)
                    if (j * 8 + column + i % 2 >= count) scores[j][i] = -INFINITY;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float largest = most[half];
#pragma unroll
            for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
            for (int mask = 1; mask < 4; mask <<= 1) largest = fmaxf(largest, shuffle_xor(largest, mask));
            const float fade = power_of_two((most[half] - largest) * scale), base = -largest * scale;
            most[half] = largest;
            total[half] *= fade;
#pragma unroll
            for (int j = 0; j < 16; ++j)
                for (int e = 0; e < 2; ++e) values[j][2 * half + e] *= fade;
#pragma unroll
            for (int j = 0; j < 8; ++j)
                for (int e = 0; e < 2; ++e) {
                    // scaled here, not in q, which would round it a second time; it costs nothing
                    float& score = scores[j][2 * half + e];
                    score = power_of_two(multiply_add(score, scale, base));
                    total[half] += score;
                }
        }
    }
};

#if DIT4DIT_WARPGROUPS
DEVICE std::uint64_t describe(const std::uint8_t* at, std::uint64_t along_k, std::uint64_t along_columns) {
    return (shared_address(at) >> 4 & 0x3fffu) | along_k >> 4 << 16 | along_columns >> 4 << 32;
}
#endif

// q, fragments of 16 queries a warp, times the keys of a tile.
DEVICE void score(float (&scores)[8][4], const std::uint32_t (&q)[8][4], const Tile& keys) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
        for (int i = 0; i < 4; ++i) scores[j][i] = 0;
#if DIT4DIT_WARPGROUPS
    settle(scores);  // written before the fence, as PTX wants
    products_begin();
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step)
        multiply_warpgroup<kRows>(scores, q[step], describe(keys.row(0, step * 16), kGroupBytes, 128));
    products_end();
    settle(scores);
#else
    const int lane = thread_index() % 32;
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step)
#pragma unroll
        for (int j = 0; j < kRows / 16; ++j) {
            std::uint32_t b[4];
            load_matrices(b, keys.row(j * 16 + lane / 16 * 8 + lane % 8, step * 16 + lane / 8 % 2 * 8));
            multiply(scores[2 * j], q[step], b[0], b[1]);
            multiply(scores[2 * j + 1], q[step], b[2], b[3]);
        }
#endif
}

// sums += weights times the values of a tile.
DEVICE void gather(float (&sums)[16][4], const float (&weights)[8][4], const Tile& values) {
    std::uint32_t a[kRows / 16][4];
#pragma unroll
    for (int j = 0; j < kRows / 16; ++j)
        for (int i = 0; i < 4; ++i) a[j][i] = pack_bf16(weights[2 * j + i / 2][i % 2 * 2], weights[2 * j + i / 2][i % 2 * 2 + 1]);
#if DIT4DIT_WARPGROUPS
    settle(sums);
    products_begin();
#pragma unroll
    for (int j = 0; j < kRows / 16; ++j)
        multiply_warpgroup_transposed(sums, a[j], describe(values.row(j * 16, 0), 128, kGroupBytes));
    products_end();
    settle(sums);
#else
    const int lane = thread_index() % 32;
#pragma unroll
    for (int j = 0; j < kRows / 16; ++j)
#pragma unroll
        for (int n = 0; n < kDim / 16; ++n) {
            std::uint32_t b[4];
            load_matrices_transposed(b, values.row(j * 16 + lane % 16, n * 16 + lane / 16 * 8));
            multiply(sums[2 * n], a[j], b[0], b[1]);
            multiply(sums[2 * n + 1], a[j], b[2], b[3]);
        }
#endif
}

template <int kQueries>
class Block {
public:
    static constexpr int kThreads = kQueries * 2;  // a warp for 16 queries

    DEVICE explicit Block(const Request& request)
        : request_(request), query_tiles_((request.length + kQueries - 1) / kQueries),
          first_(block_index() % query_tiles_ * kQueries), head_(block_index() / query_tiles_ % request.heads),
          batch_(block_index() / query_tiles_ / request.heads), column_(thread_index() % 16 * 4) {}

    DEVICE void run() {
        const int warp = thread_index() / 32, lane = thread_index() % 32, mine = warp % 4 * 16;
        const float scale = kLog2E * inverse_root(static_cast<float>(kDim));
        std::uint32_t q[8][4];
        fetch(0);
        fetch(1);
        const Eight norm_q = weight(request_.norm_q);
        Angles angles;
        for (int part = 0; part < kParts; ++part) {
            load(angles, first_ + part * kRows);
            next(part);
            prepare(tile_of(part), norm_q, angles, first_ + part * kRows);
            if (warp / 4 == part)
#pragma unroll
                for (int step = 0; step < 8; ++step)
                    load_matrices(q[step], tile_of(part).row(mine + lane % 16, step * 16 + lane / 16 * 8));
        }
        const Eight norm_k = weight(request_.norm_k);
        Sums sums;
        load(angles, 0);
        for (int key = 0, index = kParts; key < request_.length; key += kRows, index += 2) {
            float scores[8][4];
            next(index);
            prepare(tile_of(index), norm_k, angles, key);
            score(scores, q, tile_of(index));
            sums.soften(scores, request_.length - key, scale);
            load(angles, key + kRows);  // on their way while the values are summed
            next(index + 1);
            gather(sums.values, scores, tile_of(index + 1));
        }
        finish(sums);
    }

private:
    static constexpr int kParts = kQueries / kRows;        // tiles of queries
    static constexpr int kPasses = kRows * 16 / kThreads;  // rows of a tile that one thread norms and turns
    static constexpr int kAtOnce = kPasses < 4 ? kPasses : 4;

    struct Angles {
        Float4 cosine[kAtOnce] = {}, sine[kAtOnce] = {};
    };

    DEVICE Eight weight(const void* of) const {
        return of == nullptr ? Eight{} : Eight::of_weight(of, column_, request_.norm_is_float32 != 0);
    }

    // Tiles in the order of their use: the queries', then keys and values in turns. Rows past the end are zeros.
    DEVICE void fetch(int index) const {
        const bool query = index < kParts;
        const int pair = (index - kParts) / 2, length = request_.length;
        const int part = query ? 0 : 1 + (index - kParts) % 2, begin = query ? first_ + index * kRows : pair * kRows;
        if (query || begin < length) {
            const std::uint16_t* from = request_.qkv + batch_ * request_.qkv_batch + (part * request_.heads + head_) * kDim;
            const Tile to = tile_of(index);
#pragma unroll
            for (int i = 0; i < kRows * 16 / kThreads; ++i) {
                const int at = i * kThreads + thread_index(), row = at / 16, column = at % 16 * 8;
                const bool there = begin + row < length;
                copy_async_or_zeros(to.row(row, column), from + (there ? begin + row : 0) * request_.qkv_row + column, there);
            }
        }
        commit_copies();  // also where there is nothing: `next` counts groups
    }

    // The tile is there for all, and the one before it is read by nobody any more.
    DEVICE void next(int index) const {
        wait_copies<1>();
#if DIT4DIT_WARPGROUPS
        fence_shared_for_products();
#endif
        sync_block();
        fetch(index + 2);
    }

    DEVICE int row_of(int pass) const { return (pass * kThreads + thread_index()) / 16; }

    // Of kAtOnce rows of the tile whose first row is token `first`: long before they are used, because they come from far.
    DEVICE void load(Angles& angles, int first, int begin = 0) const {
        if (request_.rotary == nullptr) return;
        constexpr int kAngles = kDim / 2;
        const std::int64_t sines = static_cast<std::int64_t>(request_.length) * kAngles;
        const int last = request_.length - 1;
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            // tokens past the end are zeros, which any angle leaves
            const int token = first + row_of(begin + u) < last ? first + row_of(begin + u) : last;
            const float* at = request_.rotary + static_cast<std::int64_t>(token) * kAngles + column_;
            angles.cosine[u] = load_constant_float4(at);
            angles.sine[u] = load_constant_float4(at + sines);
        }
    }

    // Norm and rotation of a tile's rows, the first of which is token `first`, in place: float32, rounded once.
    // `next`: angles of the first rows.
    DEVICE void prepare(const Tile& tile, const Eight& weight, Angles& next, int first) const {
        if (request_.norm_q == nullptr && request_.rotary == nullptr) return;
#pragma unroll
        for (int begin = 0; begin < kPasses; begin += kAtOnce) {
            const Angles angles = next;
            if (begin + kAtOnce < kPasses) load(next, first, begin + kAtOnce);
            Eight x[kAtOnce];
#pragma unroll
            for (int u = 0; u < kAtOnce; ++u) x[u].load(piece(tile, begin + u, 0), piece(tile, begin + u, kDim / 2));
            if (request_.norm_q != nullptr) norm(x, weight, request_.eps);
            if (request_.rotary != nullptr)
#pragma unroll
                for (int u = 0; u < kAtOnce; ++u) x[u].turn(angles.cosine[u], angles.sine[u]);
#pragma unroll
            for (int u = 0; u < kAtOnce; ++u) x[u].store(piece(tile, begin + u, 0), piece(tile, begin + u, kDim / 2));
        }
#if DIT4DIT_WARPGROUPS
        fence_shared_for_products();
#endif
        sync_block();
    }
    DEVICE std::uint8_t* piece(const Tile& tile, int pass, int half) const {
        return tile.row(row_of(pass), column_ + half) + column_ % 8 * 2;
    }

    // Through shared memory, so that rows are written whole.
    DEVICE void finish(Sums& sums) const {
        const int warp = thread_index() / 32, lane = thread_index() % 32, mine = warp % 4 * 16;
        const Tile to = tile_of(warp / 4);
        sync_block();  // all have read the last values
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            for (int mask = 1; mask < 4; mask <<= 1) sums.total[half] += shuffle_xor(sums.total[half], mask);
            const float inverse = 1.0f / sums.total[half];
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                const std::uint32_t pair = pack_bf16(sums.values[j][2 * half] * inverse, sums.values[j][2 * half + 1] * inverse);
                *reinterpret_cast<std::uint32_t*>(to.row(mine + lane / 4 + half * 8, j * 8) + lane % 4 * 4) = pair;
            }
        }
        sync_warp();
        std::uint16_t* out = request_.out + batch_ * request_.out_batch + head_ * kDim;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int row = mine + i * 2 + lane / 16, column = lane % 16 * 8, query = first_ + warp / 4 * kRows + row;
            const Quad eight = *reinterpret_cast<const Quad*>(to.row(row, column));
            if (query < request_.length) *reinterpret_cast<Quad*>(out + query * request_.out_row + column) = eight;
        }
    }

    const Request& request_;
    int query_tiles_, first_, head_, batch_;
    int column_;  // of a row, where this thread norms and turns
};

}  // namespace dit4dit::attention
