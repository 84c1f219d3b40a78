// What a rank has of an attention tile. The warp that fetches features must know it as well as those that compute.
#pragma once

#include "action_ode_block.cuh"

namespace dit4dit::ode {

// Of how many ranks each head of a tile is; without clusters the compiler knows it.
DEVICE int share_of(const Attend& w) { return DIT4DIT_BULK_COPIES ? w.share : 1; }

// Bytes from row to row of a head's queries, keys or values in shared memory: 16 apart from a multiple of the banks.
DEVICE int row_bytes(const Launch& launch) { return launch.head_dim * 2 + 16; }

// How a warp goes through rows of one head, 16 bytes a lane: so many rows at a time, of which this lane has one, or none.
struct Sweep {
    int rows, row, column;

    DEVICE explicit Sweep(const Block& block) {
        const int pieces = block.launch.head_dim / 8;  // of 16 bytes: 2, 4, 6 or 8 a row
        rows = pieces == 6 ? 5 : 32 >> log2_of(pieces);
        row = pieces == 6 ? block.lane * 43 >> 8 : block.lane >> log2_of(pieces);
        column = (block.lane - row * pieces) * 8;
    }
    DEVICE bool idle() const { return row >= rows; }
};

// One head of one sample, some of its keys, and of its result some columns.
struct Shares {
    int sample, head;
    int index, base;  // of this rank among those that share the head, and the first of them in the team
    int ranks;        // of them those with keys
    int first, keys;  // of this rank; none, with no columns, if the tile has no head for it
    int columns;
    int query_tiles;  // rows of 16 queries; each has kWarps / query_tiles warps, groups
    int per_warp;     // keys that a warp takes at a time: of the tokens its only ones
    int panel;        // of the features: keys of one panel, as many times per_warp as it holds

    DEVICE Shares(const Block& block, const Attend& w)
        : index(block.rank & (share_of(w) - 1)), base(block.rank & -share_of(w)), ranks((w.keys + w.slice - 1) / w.slice),
          first(index * w.slice), query_tiles(w.tokens <= 16 ? 1 : w.tokens <= 32 ? 2 : 4) {
        const int which = block.rank >> log2_of(share_of(w)), pair = w.pair + which;
        const bool busy = which < w.pairs;
        sample = pair / block.launch.heads, head = pair - sample * block.launch.heads;
        const int left = busy ? w.keys - first : 0;
        columns = busy ? block.launch.head_dim >> log2_of(share_of(w)) : 0;
        keys = left < 0 ? 0 : left < w.slice ? left : w.slice;
        per_warp = ((w.slice + groups() * 16 - 1) >> (7 - log2_of(query_tiles))) * 16;
        if (per_warp > kMostKeys) per_warp = kMostKeys;
        const int most = kSlotBytes / 2 / row_bytes(block.launch);
        if (w.context != kNone && per_warp > most) per_warp -= 16;
        panel = per_warp;
        while (panel < w.slice && panel + per_warp <= most) panel += per_warp;
    }

    DEVICE int groups() const { return kWarps >> log2_of(query_tiles); }
    DEVICE int filled(int done) const {  // rows of the panel that begins with key `done`
        int rows = 0;
        while (rows < panel && done + rows < keys) rows += per_warp;
        return rows;
    }
    DEVICE int padded() const { return per_warp * groups(); }  // keys of all warps of a row of queries
    DEVICE int query(int warp) const { return (warp & (query_tiles - 1)) * 16; }
    DEVICE int group(int warp) const { return warp >> log2_of(query_tiles); }

    // The word of the head's first column of a token, where words of the first sample's and first head's begin at `at`.
    DEVICE int word(const Block& block, const Attend& w, int at, int stride, int token) const {
        return at + (sample * w.tokens + token) * stride + head * (block.launch.head_dim / 2);
    }

private:
    static constexpr int kMostKeys = 64;  // for which a warp has registers; of the widest heads a panel has room for 16 fewer
};
static_assert(2 * 48 * (kMaxHeadDim * 2 + 16) <= kSlotBytes, "a panel has room for 48 keys and values");

}  // namespace dit4dit::ode
