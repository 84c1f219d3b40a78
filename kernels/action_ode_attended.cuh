// What a product takes whose rows are the tokens' attention to each other: each block works out its own columns of them, so that no
// word of the result has to go from team to team. Blocks of other teams work out the same; there are few keys. Only where a block
// has some of the columns, with clusters, that is less than the way of the words.
#pragma once

#include "action_ode_scores.cuh"
#include "action_ode_stage.cuh"

namespace dit4dit::ode {

DEVICE bool attends(const Product& w) { return DIT4DIT_BULK_COPIES && w.attend > 0; }

// The heads, of all samples, that some columns of a rank belong to. Pair p is head `head` + p % heads of sample p / heads.
struct Heads {
    int begin, end;  // columns of all heads
    int head, heads, tokens, pairs;
    int query_tiles;

    DEVICE Heads(const Block& block, const Product& w, int first, int span)
        : begin((block.rank & (split_of(w) - 1)) * w.slice + first), end(begin + span < w.columns ? begin + span : w.columns),
          head(begin / block.launch.head_dim), tokens(block.tokens()), query_tiles(tokens <= 16 ? 1 : tokens <= 32 ? 2 : 4) {
        heads = begin < end ? (end - 1) / block.launch.head_dim - head + 1 : 0;
        pairs = w.tokens / tokens * heads;
    }

    DEVICE int rows() const { return query_tiles * 16; }
};

// The attention of 16 queries to where the product reads it, of the columns that it wants.
DEVICE void attend_inside(const Block& block, const Heads& all, const Rows& q, const Rows& k, const Rows& v, int pair, int query,
                             const Staged& to) {
    const int d = block.launch.head_dim, lane = block.lane;
    Warp found;
    found.score(q, k, query, 0, all.rows(), d, lane);
    found.soften(0, all.rows(), all.tokens, inverse_root(static_cast<float>(d)), lane);
    found.gather(v, 0, all.rows(), d, lane);
    const int sample = pair / all.heads, first = (all.head + pair - sample * all.heads) * d - all.begin;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = query + lane / 4 + half * 8;
        if (row >= all.tokens) continue;
        const float share = quotient(1.0f, found.total[half]);
#pragma unroll
        for (int j = 0; j < kMaxHeadDim / 8; ++j) {
            const int column = first + j * 8;
            if (j * 8 >= d || column < 0 || all.begin + column >= all.end) continue;
            std::uint8_t* at = to.row(column, sample * all.tokens + row) + lane % 4 * 4;
            *reinterpret_cast<std::uint32_t*>(at) =
                pack_bf16(found.values[j][half * 2] * share, found.values[j][half * 2 + 1] * share);
        }
    }
}

// What lies past the last column of the matrix.
DEVICE void clear_past_end(const Block& block, const Product& w, const Heads& all, int span, const Staged& to) {
    const int here = all.end > all.begin ? all.end - all.begin : 0;
    for (int column = here + block.warp * 8; column < span; column += kWarps * 8)
        for (int token = block.lane; token < w.tokens; token += 32) *reinterpret_cast<Quad*>(to.row(column, token)) = Quad{};
}

// Columns `first` to + span - 1 of this rank's slice, of all tokens. Behind the staged columns lie queries, keys and values of
// `w.attend` heads of samples at a time.
DEVICE void stage_attended(const Block& block, const Product& w, const Moment& now, const Staged& to, int first, int span) {
    const Heads all(block, w, first, span);
    clear_past_end(block, w, all, span, to);
    const int matrix_bytes = all.rows() * row_bytes(block.launch);
    std::uint8_t* const behind = block.staging + block.launch.part / 8 * to.group;
    const auto rows = [&](int pair, int which) { return Rows{behind + (pair * 3 + which) * matrix_bytes, row_bytes(block.launch)}; };
    for (int done = 0; done < all.pairs; done += w.attend) {
        const int count = all.pairs - done < w.attend ? all.pairs - done : w.attend;
        sync_computing();  // all have read what lay there: sums of the tile before, or other heads
        for (int matrix = block.warp; matrix < count * 3; matrix += kWarps) {
            const int pair = matrix / 3, which = matrix - pair * 3, sample = (done + pair) / all.heads;
            const int head = all.head + done + pair - sample * all.heads;
            const int column = (which * w.columns + head * block.launch.head_dim) / 2;
            load_words_of_rows(block, now, rows(pair, which), w.source + sample * all.tokens * w.source_stride + column, w.source_stride,
                          all.tokens, all.rows());
        }
        sync_computing();
        for (int task = block.warp; task < count * all.query_tiles; task += kWarps) {
            const int pair = task >> log2_of(all.query_tiles), query = (task & (all.query_tiles - 1)) * 16;
            const Block here(block.launch, renewed(block.rank), renewed(block.thread));
            attend_inside(here, all, rows(pair, 0), rows(pair, 1), rows(pair, 2), done + pair, query, to);
        }
    }
}

}  // namespace dit4dit::ode
