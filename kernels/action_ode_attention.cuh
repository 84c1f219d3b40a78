// Attention of one head of one sample. Each rank takes some of the keys, scores and sums of values on the tensor cores, at most 128
// keys at a time; then each rank puts some of the head's columns together.
#pragma once

#include "action_ode_block.cuh"

namespace dit4dit::ode {

// Rows of one head in shared memory, 16 bytes apart from a multiple of the banks.
struct Rows {
    std::uint8_t* at;
    int stride;  // bytes

    DEVICE std::uint8_t* row(int r, int column) const { return at + r * stride + column * 2; }
};

// Eight columns of some rows at a time, a piece: `read(row, column)` gives those of the first `count` rows, the others are zeros.
// `complete(piece)`: whether it is what was asked for; until then it is read again.
template <class Read, class Complete>
DEVICE void load_rows(const Block& block, const Moment& now, const Rows& to, int count, int padded, const Read& read,
                      const Complete& complete) {
    constexpr int kAtOnce = 4;
    const int pieces = block.launch.head_dim / 8, all = padded * pieces;
    for (int begin = 0; begin < all; begin += kComputing * kAtOnce) {
        Quad q[kAtOnce];
        int row[kAtOnce], column[kAtOnce];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            const int i = begin + u * kComputing + block.thread;
            row[u] = i / pieces, column[u] = (i - row[u] * pieces) * 8;
            q[u] = Quad{};
            if (row[u] < count) q[u] = read(row[u], column[u]);
        }
        Patience patience(block, now.tile);
        for (;;) {
            int missing = kNone;
#pragma unroll
            for (int u = 0; u < kAtOnce; ++u)
                if (row[u] < count && !complete(q[u])) {
                    missing = row[u];
                    q[u] = read(row[u], column[u]);
                }
            if (!any_lane(missing != kNone) || patience.over(missing)) break;
        }
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u)
            if (row[u] < padded) *reinterpret_cast<Quad*>(to.row(row[u], column[u])) = q[u];
    }
}

// Of the features, which are there.
DEVICE void load_features(const Block& block, const Moment& now, const Rows& to, const std::uint16_t* from, int count, int padded) {
    const std::int64_t stride = block.launch.context_columns;
    load_rows(
        block, now, to, count, padded, [&](int r, int c) { return load_quad(from + r * stride + c); },
        [](const Quad&) { return true; });
}

// Of words that another team writes, from `first` on.
DEVICE void load_words_of_rows(const Block& block, const Moment& now, const Rows& to, int first, int stride, int count, int padded) {
    const std::uint32_t* source = block.words(now.set) + first;
    load_rows(
        block, now, to, count, padded, [&](int r, int c) { return load_words(source + r * stride + c / 2); },
        [](const Quad& q) { return !incomplete(q); });
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
            for (int half = 0; half < 2; ++half) {
                stats[(lane / 4 + half * 8) * 2] = most[half];
                stats[(lane / 4 + half * 8) * 2 + 1] = total[half];
            }
    }

private:
    DEVICE float base(int half) const { return most[half] == -INFINITY ? 0.0f : most[half]; }
};

// Two columns of one query as they come together from parts of the keys, one after the other.
struct Merged {
    float most = -INFINITY, total = 0, y[2] = {};

    DEVICE void add(float part_most, float part_total, float a, float b) {
        if (part_most == -INFINITY) return;
        const float largest = fmaxf(most, part_most);
        const float fade = exponential(most - largest), share = exponential(part_most - largest);
        most = largest;
        total = total * fade + share * part_total;
        y[0] = y[0] * fade + share * a;
        y[1] = y[1] * fade + share * b;
    }
};

// How a tile's keys and columns are shared out.
struct Shares {
    int first, keys, ranks, columns, query_tiles, per_warp, padded;  // ranks: those that have keys; columns: of one rank

    DEVICE Shares(const Block& block, const Attend& w)
        : first(block.rank * w.slice), ranks((w.keys + w.slice - 1) / w.slice), columns(block.launch.head_dim >> log2_of(ranks_of(block.launch))),
          query_tiles(w.tokens <= 16 ? 1 : w.tokens <= 32 ? 2 : 4) {
        const int left = w.keys - first, groups = kWarps >> log2_of(query_tiles);
        keys = left < 0 ? 0 : left < w.slice ? left : w.slice;
        per_warp = ((w.slice + groups * 16 - 1) >> (7 - log2_of(query_tiles))) * 16;
        if (per_warp > 16 * query_tiles) per_warp = 16 * query_tiles;  // 128 keys at a time
        padded = per_warp * groups;
    }
};

// This rank's keys: what each warp finds is left in the staging memory, [warps][16][2] and behind it [warps][16][head_dim].
DEVICE void attend_to_keys(const Block& block, const Attend& w, const Moment& now, const Shares& mine) {
    const Launch& launch = block.launch;
    const int d = launch.head_dim, warp = block.warp;
    const Rows k{block.staging, d * 2 + 16}, v{k.at + mine.padded * k.stride, k.stride}, q{v.at + mine.padded * k.stride, k.stride};
    const int query = (warp & (mine.query_tiles - 1)) * 16, of_warp = (warp >> log2_of(mine.query_tiles)) * mine.per_warp;
    Warp found;
    for (int done = 0; done < mine.keys; done += mine.padded) {
        const int count = mine.keys - done < mine.padded ? mine.keys - done : mine.padded, key = mine.first + done;
        if (done > 0) sync_computing();  // all have read the keys before
        if (w.context != kNone) {  // which never change: they are fetched before the queries are there
            const std::int64_t stride = launch.context_columns;
            const std::uint16_t* from = launch.context +
                                        (w.sample * static_cast<std::int64_t>(launch.context_tokens) + key) * stride +
                                        2 * w.context * launch.width + w.head * d;
            load_features(block, now, k, from, count, mine.padded);
            load_features(block, now, v, from + launch.width, count, mine.padded);
        } else {
            load_words_of_rows(block, now, k, w.key + key * w.stride, w.stride, count, mine.padded);
            load_words_of_rows(block, now, v, w.value + key * w.stride, w.stride, count, mine.padded);
        }
        if (done == 0) load_words_of_rows(block, now, q, w.query, w.stride, w.tokens, mine.query_tiles * 16);
        sync_computing();
        const int lane = renewed(block.lane);
        found.score(q, k, query, of_warp, mine.per_warp, d, lane);
        found.soften(of_warp, mine.per_warp, count, inverse_root(static_cast<float>(d)), lane);
        found.gather(v, of_warp, mine.per_warp, d, lane);
    }
    sync_computing();
    float* stats = reinterpret_cast<float*>(block.staging);
    found.leave(stats + kWarps * 16 * 2 + warp * 16 * d, stats + warp * 16 * 2, d, block.lane);
    sync_computing();
}

// What the warps of one query tile left, in the order of their keys.
DEVICE Merged merge_warps(const Block& block, const Shares& mine, int query, int column) {
    const int d = block.launch.head_dim;
    const float* stats = reinterpret_cast<const float*>(block.staging);
    const float* left = stats + kWarps * 16 * 2;
    Merged all;
    for (int warp = query / 16; warp < kWarps; warp += mine.query_tiles) {
        const int row = warp * 16 + query % 16;
        const Float2 y = *reinterpret_cast<const Float2*>(left + place_of(row, column, d));
        all.add(stats[row * 2], stats[row * 2 + 1], y.v[0], y.v[1]);
    }
    return all;
}

// The inbox: of each rank with keys, largest score and sum of each query, then of each the sums over values of this rank's columns.
struct Inbox {
    int ranks, tokens, columns;

    DEVICE int stats(int rank, int query) const { return (rank * tokens + query) * 2; }  // floats
    DEVICE int value(int rank, int query, int column) const {
        return ranks * tokens * 2 + (rank * tokens + query) * columns + column;
    }
    DEVICE int bytes() const { return ranks * tokens * (columns * 4 + 8); }
};

DEVICE void write(const Block& block, const Attend& w, const Moment& now, int query, int column, const Merged& all) {
    const std::int64_t at = w.out + query * w.out_stride + column / 2;
    store_word(block.words(now.set) + at, pack_bf16(quotient(all.y[0], all.total), quotient(all.y[1], all.total)));
    store_word(block.words(now.before()) + at, kEmpty);
}

DEVICE void attend(const Block& block, const Tile& tile, const Moment& now) {
    const Attend& w = Block::work<Attend>(tile);
    const Launch& launch = block.launch;
    const Shares mine(block, w);
    const Exchange exchange(block, now);
    const Inbox inbox{mine.ranks, w.tokens, mine.columns};
    const int pairs = launch.head_dim / 2, own_pairs = mine.columns / 2;
    if (block.thread == 0) exchange.expect(inbox.bytes());
    sync_computing();  // a product's sums may still be read where keys will lie
    if (mine.keys > 0) attend_to_keys(block, w, now, mine);
    if (ranks_of(launch) == 1) {
        for (int i = block.thread; i < w.tokens * pairs; i += kComputing) {
            const int query = i / pairs, column = i % pairs * 2;
            write(block, w, now, query, column, merge_warps(block, mine, query, column));
        }
        sync_computing();  // the next tile's tokens come where the warps left this
        return;
    }
    exchange.wait_for_room();
    if (mine.keys > 0) {
        for (int i = block.thread; i < w.tokens * pairs; i += kComputing) {
            const int query = i / pairs, column = i % pairs * 2, rank = column / mine.columns, of_rank = column - rank * mine.columns;
            const Merged all = merge_warps(block, mine, query, column);
            exchange.push(rank, inbox.value(block.rank, query, of_rank) * 4, {{all.y[0], all.y[1]}});
            if (of_rank == 0) exchange.push(rank, inbox.stats(block.rank, query) * 4, {{all.most, all.total}});
        }
        sync_computing();
    }
    const float* found = exchange.sums();
    for (int i = block.thread; i < w.tokens * own_pairs; i += kComputing) {
        const int query = i / own_pairs, column = i % own_pairs * 2;
        Merged all;
        for (int rank = 0; rank < mine.ranks; ++rank) {
            const float *stats = found + inbox.stats(rank, query), *y = found + inbox.value(rank, query, column);
            all.add(stats[0], stats[1], y[0], y[1]);
        }
        write(block, w, now, query, block.rank * mine.columns + column, all);
    }
    exchange.release();
}

}  // namespace dit4dit::ode
