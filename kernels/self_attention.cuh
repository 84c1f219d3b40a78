// Self-attention over q, k and v as qk_norm_rope leaves them: a block takes kQueries queries of one head past all of its keys.
// Scores, weights and sums stay in registers. While a tile's values are summed, the scores of the next one are on their way.
// Plain C++ over target.cuh, so that tests/cuda_emulation runs it on a CPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "target.cuh"

namespace dit4dit::attention {

using namespace target;

constexpr int kDim = 128;
constexpr int kRows = 64;  // of a tile: queries, keys or values
constexpr int kTiles = 4;  // in shared memory: keys and values in use, and those of the next step on their way
// A tile: groups of eight columns, in each 16 bytes a row, and 16 bytes more. Eight rows of a group, which is what ldmatrix and
// warpgroup products read at once, and the eight pieces of a row that threads write at once, meet every bank once.
constexpr int kGroupBytes = kRows * 16 + 16;
constexpr int kTileBytes = kDim / 8 * kGroupBytes;
constexpr int kSharedBytes = kTiles * kTileBytes;
static_assert(kSharedBytes + 1024 <= 100 << 10, "a block on every multiprocessor, also of sm_89 and sm_120");
constexpr float kLog2E = 1.4426950408889634f;

// bf16 [batch, heads, length, 128] as a device address; strides in elements, columns are dense.
struct Operand {
    const std::uint16_t* at;
    std::int64_t batch, head, row;
};

struct Request {
    Operand q, k, v;
    std::uint16_t* out;  // bf16 [batch, length, heads * 128]
    std::int64_t out_batch, out_row;
    int heads, length;
};

struct Tile {
    std::uint8_t* at;

    DEVICE std::uint8_t* row(int r, int column) const { return at + column / 8 * kGroupBytes + r * 16; }
};
DEVICE Tile tile_of(int index) { return {shared_memory() + index % kTiles * kTileBytes}; }
DEVICE Tile keys_of(int tile) { return tile_of(2 * tile); }
DEVICE Tile values_of(int tile) { return tile_of(2 * tile + 1); }

// What a warp knows of its 16 queries; this thread of the queries lane / 4 and eight further.
struct Sums {
    float values[16][4] = {};
    float most[2] = {-INFINITY, -INFINITY}, total[2] = {};  // largest score so far; sum of this thread's weights
    float fade[2] = {};  // what `values` still have to be multiplied by, since `most` has grown

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
            const float base = -largest * scale;
            fade[half] = power_of_two_or_zero((most[half] - largest) * scale);
            most[half] = largest;
            total[half] *= fade[half];
#pragma unroll
            for (int j = 0; j < 8; ++j)
                for (int e = 0; e < 2; ++e) {
                    // scaled here, not in q, which would round it a second time; it costs nothing
                    float& score = scores[j][2 * half + e];
                    score = power_of_two_or_zero(multiply_add(score, scale, base));
                    total[half] += score;
                }
        }
    }
    DEVICE void catch_up() {
#pragma unroll
        for (int j = 0; j < 16; ++j)
            for (int i = 0; i < 4; ++i) values[j][i] *= fade[i / 2];
    }
};

// Weights of 64 keys as the left operand of products.
struct Weights {
    std::uint32_t v[kRows / 16][4];

    DEVICE void round(const float (&weights)[8][4]) {
#pragma unroll
        for (int j = 0; j < kRows / 16; ++j)
            for (int i = 0; i < 4; ++i)
                v[j][i] = pack_bf16(weights[2 * j + i / 2][i % 2 * 2], weights[2 * j + i / 2][i % 2 * 2 + 1]);
    }
};

#if DIT4DIT_WARPGROUPS
DEVICE std::uint64_t describe(const std::uint8_t* at, std::uint64_t along_k, std::uint64_t along_columns) {
    return (shared_address(at) >> 4 & 0x3fffu) | along_k >> 4 << 16 | along_columns >> 4 << 32;
}
#endif

// `score` and `gather` only begin where a chip has warpgroup products: until `finish`, nothing may touch what they write.
// kLater: how many of those begun later may still run.
template <int kLater, int kCount>
DEVICE void finish([[maybe_unused]] float (&sums)[kCount][4]) {
#if DIT4DIT_WARPGROUPS
    products_wait<kLater>();
    settle(sums);
#endif
}

// scores = q, fragments of 16 queries a warp, times the keys of a tile.
DEVICE void score(float (&scores)[8][4], const std::uint32_t (&q)[8][4], const Tile& keys) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
        for (int i = 0; i < 4; ++i) scores[j][i] = 0;
#if DIT4DIT_WARPGROUPS
    settle(scores);  // written before the fence, as PTX wants
    products_begin();
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step)
        multiply_warpgroup(scores, q[step], describe(keys.row(0, step * 16), kGroupBytes, 128));
    products_commit();
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
DEVICE void gather(float (&sums)[16][4], const Weights& weights, const Tile& values) {
#if DIT4DIT_WARPGROUPS
    settle(sums);
    products_begin();
#pragma unroll
    for (int j = 0; j < kRows / 16; ++j)
        multiply_warpgroup_transposed(sums, weights.v[j], describe(values.row(j * 16, 0), 128, kGroupBytes));
    products_commit();
#else
    const int lane = thread_index() % 32;
#pragma unroll
    for (int j = 0; j < kRows / 16; ++j)
#pragma unroll
        for (int n = 0; n < kDim / 16; ++n) {
            std::uint32_t b[4];
            load_matrices_transposed(b, values.row(j * 16 + lane % 16, n * 16 + lane / 16 * 8));
            multiply(sums[2 * n], weights.v[j], b[0], b[1]);
            multiply(sums[2 * n + 1], weights.v[j], b[2], b[3]);
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
          batch_(block_index() / query_tiles_ / request.heads), keys_(first_of(request.k)), values_(first_of(request.v)) {}

    DEVICE void run() {
        const float scale = kLog2E * inverse_root(static_cast<float>(kDim));
        const int last = (request_.length - 1) / kRows;
        const std::uint16_t* const queries = first_of(request_.q);
        std::uint32_t q[8][4];
        float scores[8][4];
        Weights weights;
        Sums sums;
        for (int part = 0; part < kParts; ++part) fetch(queries_of(part), queries, request_.q.row, first_ + part * kRows);
        fetch_keys(0);
        commit_copies();
        fetch_values(0);
        commit_copies();
        arrive<1>();
        load(q);
        sync_block();  // all have their queries: the next keys take their place
        fetch_keys(1);
        commit_copies();
        score(scores, q, keys_of(0));
        finish<0>(scores);
        sums.soften(scores, request_.length, scale);
        // A tile's weights are made while the values of the tile before are summed. The wait for those sums opens the next turn:
        // at the end of the same one, the compiler moves it to before the weights.
#pragma unroll 1
        for (int tile = 0;; ++tile) {
            finish<0>(sums.values);
            sums.catch_up();
            weights.round(scores);
            next(tile);
            if (tile == last) break;
            score(scores, q, keys_of(tile + 1));
            gather(sums.values, weights, values_of(tile));
            finish<1>(scores);
            sums.soften(scores, request_.length - (tile + 1) * kRows, scale);
        }
        gather(sums.values, weights, values_of(last));
        finish<0>(sums.values);
        store(sums);
    }

private:
    static constexpr int kParts = kQueries / kRows;  // tiles of queries

    // Where keys_of(1) and values_of(1) come later.
    DEVICE static Tile queries_of(int part) { return tile_of(2 + part); }

    // This thread's first 16 bytes of a tile, in global and in shared memory; the others lie kStep rows further each.
    static constexpr int kStep = kThreads / 16;
    DEVICE static int row() { return thread_index() / 16; }
    DEVICE static int column() { return thread_index() % 16 * 8; }
    DEVICE const std::uint16_t* first_of(const Operand& operand) const {
        return operand.at + batch_ * operand.batch + head_ * operand.head + row() * operand.row + column();
    }

    // Copies of rows begin.. on their way into a tile, zeros for rows past the end; nothing where all are past it.
    DEVICE void fetch(const Tile& to, const std::uint16_t* first, std::int64_t stride, int begin) const {
        if (begin >= request_.length) return;
        const std::uint16_t* from = first + begin * stride;
        std::uint8_t* const into = to.row(row(), column());
#pragma unroll
        for (int i = 0; i < kRows / kStep; ++i, from += kStep * stride)
            copy_async_or_zeros(into + i * kStep * 16, from, begin + row() + i * kStep < request_.length);
    }
    DEVICE void fetch_keys(int tile) const { fetch(keys_of(tile), keys_, request_.k.row, tile * kRows); }
    DEVICE void fetch_values(int tile) const { fetch(values_of(tile), values_, request_.v.row, tile * kRows); }

    // All copies but the last kLater groups are there, for all threads and for their products.
    template <int kLater>
    DEVICE void arrive() const {
        wait_copies<kLater>();
#if DIT4DIT_WARPGROUPS
        fence_shared_for_products();
#endif
        sync_block();
    }

    // keys_of(tile + 1) and values_of(tile) are there; what was read in the step before makes room for what comes after them.
    DEVICE void next(int tile) const {
        arrive<0>();
        fetch_keys(tile + 2);
        fetch_values(tile + 1);
        commit_copies();
    }

    DEVICE void load(std::uint32_t (&q)[8][4]) const {
        const int warp = thread_index() / 32, lane = thread_index() % 32;
        const Tile from = queries_of(warp / 4);
#pragma unroll
        for (int step = 0; step < 8; ++step)
            load_matrices(q[step], from.row(warp % 4 * 16 + lane % 16, step * 16 + lane / 16 * 8));
    }

    // Through shared memory, so that rows are written whole. In the place of keys, which nobody has read since `next`, and
    // where no copies are on their way.
    DEVICE void store(Sums& sums) const {
        const int warp = thread_index() / 32, lane = thread_index() % 32, mine = warp % 4 * 16;
        const Tile to = keys_of(warp / 4);
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
    const std::uint16_t *keys_, *values_;
};

}  // namespace dit4dit::attention
