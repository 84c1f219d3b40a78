// Attention of heads of samples, each by some ranks of a team, or by one. Each rank takes some of the keys, scores and sums of values
// on the tensor cores; then each of those that share a head puts some of its columns together.
#pragma once

#include "action_ode_scores.cuh"
#include "action_ode_weights.cuh"

namespace dit4dit::ode {

// Two columns of one query, put together from parts of the keys.
struct Merged {
    float most = -INFINITY, total = 0, y[2] = {};

    // stats(part): where a part's largest score and its sum lie, value(part): its sums over values. Parts' weights do not wait for
    // each other. Some parts may have no keys, and sums of 0.
    template <class Stats, class Value>
    DEVICE Merged(int parts, const Stats& stats, const Value& value) {
#pragma unroll 4
        for (int part = 0; part < parts; ++part) most = fmaxf(most, stats(part)[0]);
        const float base = most == -INFINITY ? 0.0f : most;
#pragma unroll 4
        for (int part = 0; part < parts; ++part) {
            const Float2 sums = *reinterpret_cast<const Float2*>(value(part));
            const float share = exponential(stats(part)[0] - base);
            total += share * stats(part)[1];
            y[0] += share * sums.v[0];
            y[1] += share * sums.v[1];
        }
    }
};

// What each warp has found, for all of the block: [warps][16][2] in the staging memory and behind it [warps][16][head_dim].
DEVICE void leave(const Block& block, const Warp& found) {
    sync_computing();
    float* stats = reinterpret_cast<float*>(block.staging);
    const int d = block.launch.head_dim;
    found.leave(stats + kWarps * 16 * 2 + block.warp * 16 * d, stats + block.warp * 16 * 2, d, block.lane);
    sync_computing();
}

// Of the tokens themselves, which all lie in the staging memory.
DEVICE void attend_to_tokens(const Block& block, const Attend& w, const Moment& now, const Shares& mine) {
    const int d = block.launch.head_dim;
    const Rows k{block.staging, row_bytes(block.launch)}, v{k.row(mine.padded(), 0), k.stride}, q{v.row(mine.padded(), 0), k.stride};
    if (block.warp < 3) {  // q, k and v
        const bool queries = block.warp == 0, values = block.warp == 2;
        const Rows to{queries ? q.at : values ? v.at : k.at, k.stride};
        const int from = mine.word(block, w, queries ? w.query : values ? w.value : w.key, w.stride, queries ? 0 : mine.first);
        load_words_of_rows(block, now, to, from, w.stride, queries ? w.tokens : mine.keys, queries ? mine.query_tiles * 16 : mine.padded());
    }
    sync_computing();
    const int lane = renewed(block.lane), first = mine.group(block.warp) * mine.per_warp;
    Warp found;
    found.score(q, k, mine.query(block.warp), first, mine.per_warp, d, lane);
    found.soften(first, mine.per_warp, mine.keys, inverse_root(static_cast<float>(d)), lane);
    found.gather(v, first, mine.per_warp, d, lane);
    leave(block, found);
}

// Of the features, which come with the weights, panel after panel. Of each row of queries the warps take keys in turn.
DEVICE void attend_to_features(const Block& block, Ring& ring, const Attend& w, const Moment& now, const Shares& mine) {
    const int d = block.launch.head_dim;
    const Rows q{block.staging, row_bytes(block.launch)};
    if (block.warp == 0)
        load_words_of_rows(block, now, q, mine.word(block, w, w.query, w.stride, 0), w.stride, w.tokens, mine.query_tiles * 16);
    sync_computing();
    Warp found;
    int next = mine.group(block.warp) * mine.per_warp;  // this warp's next keys, from the panel's first on
    for (int done = 0; done < mine.keys; done += mine.panel) {
        block.wait<true>(&block.fixed.full[ring.slot], ring.parity, now.tile, kWeights, ring.slot);
#pragma unroll 1
        for (; next < mine.panel && done + next < mine.keys; next += mine.padded()) {
            const int lane = renewed(block.lane);
            const Rows k{block.ring + ring.slot * kSlotBytes, q.stride}, v{k.row(mine.panel, 0), q.stride};
            found.score(q, k, mine.query(block.warp), next, mine.per_warp, d, lane);
            found.soften(next, mine.per_warp, mine.keys - done, inverse_root(static_cast<float>(d)), lane);
            found.gather(v, next, mine.per_warp, d, lane);
        }
        next -= mine.panel;
        leave_panel(block, ring);
    }
    leave(block, found);
}

// What the warps of one query tile left, in the order of their keys.
DEVICE Merged merge_warps(const Block& block, const Shares& mine, int query, int column) {
    const int d = block.launch.head_dim;
    const float* stats = reinterpret_cast<const float*>(block.staging);
    const float* left = stats + kWarps * 16 * 2;
    const auto row = [&](int part) { return (query / 16 + part * mine.query_tiles) * 16 + query % 16; };
    return {mine.groups(), [&](int part) { return stats + row(part) * 2; },
            [&](int part) { return left + place_of(row(part), column, d); }};
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

DEVICE void write(const Block& block, const Attend& w, const Moment& now, const Shares& mine, int query, int column, const Merged& all) {
    const std::int64_t at = mine.word(block, w, w.out, w.out_stride, query) + column / 2;
    store_word(block.words(now.set) + at, pack_bf16(quotient(all.y[0], all.total), quotient(all.y[1], all.total)));
    store_word(block.words(now.before()) + at, kEmpty);
}

// Of a rank that has all keys of its head, or no head.
DEVICE void attend_alone(const Block& block, const Attend& w, const Moment& now, const Shares& mine) {
    const int pairs = mine.columns / 2;
    for (int i = block.thread; i < w.tokens * pairs; i += kComputing) {
        const int query = i / pairs, column = i % pairs * 2;
        write(block, w, now, mine, query, column, merge_warps(block, mine, query, column));
    }
}

// Of ranks that share a head, each of which gives the others what it has found.
DEVICE void attend_together(const Block& block, const Attend& w, const Moment& now, const Shares& mine, const Exchange& exchange,
                            const Inbox& inbox) {
    const int pairs = block.launch.head_dim / 2, own_pairs = mine.columns / 2;
    if (mine.keys > 0)
        for (int i = block.thread; i < w.tokens * pairs; i += kComputing) {
            const int query = i / pairs, column = i % pairs * 2, rank = column / mine.columns, of_rank = column - rank * mine.columns;
            const Merged all = merge_warps(block, mine, query, column);
            exchange.push(mine.base + rank, inbox.value(mine.index, query, of_rank) * 4, {{all.y[0], all.y[1]}});
            if (of_rank == 0) exchange.push(mine.base + rank, inbox.stats(mine.index, query) * 4, {{all.most, all.total}});
        }
    const float* found = exchange.sums();
    for (int i = block.thread; i < w.tokens * own_pairs; i += kComputing) {
        const int query = i / own_pairs, column = i % own_pairs * 2;
        const Merged all(mine.ranks, [&](int rank) { return found + inbox.stats(rank, query); },
                         [&](int rank) { return found + inbox.value(rank, query, column); });
        write(block, w, now, mine, query, mine.index * mine.columns + column, all);
    }
}

DEVICE void attend(const Block& block, Ring& ring, const Tile& tile, const Moment& now) {
    const Attend& w = Block::work<Attend>(tile);
    const Shares mine(block, w);
    const Exchange exchange(block, now);
    const Inbox inbox{mine.ranks, w.tokens, mine.columns};
    const bool alone = share_of(w) == 1 || mine.columns == 0;
    if (block.thread == 0) exchange.expect(alone ? 0 : inbox.bytes());
    sync_computing();  // a product's sums may still be read where keys will lie
    if (mine.keys > 0) {
        if (w.context != kNone)
            attend_to_features(block, ring, w, now, mine);
        else
            attend_to_tokens(block, w, now, mine);
    }
    exchange.wait_for_room();
    if (alone)
        attend_alone(block, w, now, mine);
    else
        attend_together(block, w, now, mine, exchange, inbox);
    exchange.release();
    sync_computing();  // the next tile's tokens come where the warps left this
}

}  // namespace dit4dit::ode
