// Products of the action head, transposed: rows of weights are the tall operand of the tensor cores, tokens the narrow one.
#pragma once

#include "action_ode_attended.cuh"
#include "action_ode_sampler.cuh"
#include "action_ode_stage.cuh"
#include "action_ode_weights.cuh"

namespace dit4dit::ode {

DEVICE float activate(float x, int epilogue) {
    switch (epilogue) {
        case kGelu: {
            const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
            return x - quotient(x, 1 + exponential(2 * u));  // x (1 + tanh u) / 2
        }
        case kSilu: return quotient(x, 1 + exponential(-x));
        case kRelu: return x < 0 ? 0.0f : x;  // a NaN stays one
        default: return x;
    }
}

// What finishes an item besides its sums.
struct Addends {
    float scale[2] = {}, sums[2] = {}, bias[2] = {};  // bias: the residual stream included, or the state token instead of all
    bool state = false;

    DEVICE void fetch(const Block& block, const Product& w, const Item& item, int step) {
        const Launch& launch = block.launch;
        const int token = w.token + item.token, per_sample = block.tokens(), sample = token / per_sample;
        const int place = token - sample * per_sample;
        state = w.epilogue == kTokens && launch.prefix != nullptr && place == 0;
        for (int e = 0; e < 2; ++e) {
            const int row = item.row + e;
            scale[e] = 1, sums[e] = 0, bias[e] = 0;
            if (item.token >= w.tokens || row >= w.rows) continue;
            const int of_token = w.epilogue == kTokens ? place * launch.width : 0;
            bias[e] = load_constant_float(block.constant(w.bias + now_offset(w, step) + of_token + row));
            if (w.fp8) scale[e] = load_constant_float(block.constant(w.scale + row));
            if (w.norm != 0) sums[e] = load_constant_float(block.constant(w.sums + now_offset(w, step) + row));
            if (state) bias[e] = launch.prefix[static_cast<std::int64_t>(sample) * launch.width + w.row + row];
            if (w.epilogue == kResidual) bias[e] += *item.own(block, w, e);
        }
    }

private:
    DEVICE static int now_offset(const Product& w, int step) { return step * w.constant_step; }
};

// Where the sums of a rank's rows lie, in an inbox or in the staging memory: moments of each token from each rank of the split, then
// planes of [own rows, padded tokens + 2].
struct Planes {
    int split, count, own, padded;

    DEVICE Planes(const Block& block, const Product& w)
        : split(split_of(w)), count(split_of(w) * w.parts), own(w.tile_rows >> log2_of(ranks_of(block.launch))), padded(block.launch.padded_tokens) {}

    DEVICE int stride() const { return own * (padded + 2); }
    DEVICE int moments(int rank, int token) const { return (rank * padded + token) * 2; }  // floats
    DEVICE int sum(int plane, int row, int token) const {
        return split * padded * 2 + plane * stride() + row * (padded + 2) + token;
    }
    DEVICE int bytes(const Product& w) const {
        return count * own * ((w.tokens + 1) / 2) * 8 + (w.norm != 0 ? split * w.tokens * 8 : 0);
    }
};

// Gives sums and moments to the ranks that finish them: itself, where no rank shares the columns, else through their inboxes.
struct Delivery {
    const Block& block;
    const Product& w;
    const Exchange& exchange;
    const Planes planes;

    DEVICE Delivery(const Block& b, const Product& product, const Exchange& e)
        : block(b), w(product), exchange(e), planes(b, product) {}

    // In an inbox, to which nobody else gives anything in this tile; in a team of one behind the staged tokens.
    DEVICE float* own_sums() const {
        if (ranks_of(block.launch) > 1) return exchange.own();
        return reinterpret_cast<float*>(block.staging + block.launch.part / 8 * (block.launch.padded_tokens * 16 + 16));
    }
    // `rank` of those that share this one's rows; more: to be added to what the part before left there.
    DEVICE void to(int rank, int place, Float2 x, bool more) const {
        if (split_of(w) > 1) return exchange.push((block.rank & -split_of(w)) + rank, place * 4, x);
        Float2& sum = *reinterpret_cast<Float2*>(own_sums() + place);
        if (more) x = {{sum.v[0] + x.v[0], sum.v[1] + x.v[1]}};
        sum = x;
    }
    DEVICE void moments(const Moments& mine) const {
        const int token = token_of_lane(block);
        if (token >= w.tokens) return;
        for (int rank = 0; rank < split_of(w); ++rank)
            to(rank, planes.moments(block.rank & (split_of(w) - 1), token), {{mine.mean, mine.squares}}, false);
    }
    // The sums of this warp's m-th row group.
    template <int kBlocks>
    DEVICE void sums(const float (&d)[kBlocks][4], int m, bool more) const {
        const int sets = kWarps >> log2_of(w.parts), part = block.warp >> log2_of(sets);
        const int group = (block.warp & (sets - 1)) + m * sets;
        const int lane = block.lane, plane = (block.rank & (split_of(w) - 1)) * w.parts + part;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = group * 16 + lane / 4 + half * 8, rank = row / planes.own;
            const int place = planes.sum(plane, row - rank * planes.own, lane % 4 * 2);
#pragma unroll
            for (int j = 0; j < kBlocks; ++j)
                if (j * 8 + lane % 4 * 2 < w.tokens) to(rank, place + j * 8, {{d[j][half * 2], d[j][half * 2 + 1]}}, more);
        }
    }
};

// Adds one step: `weights` times 32 columns of all tokens, of which `tokens` is the row that this lane gives to load_matrices.
template <int kTiles, int kBlocks>
DEVICE void multiply_step(float (&sums)[kTiles][kBlocks][4], const Fragments (&weights)[kTiles], const std::uint8_t* tokens) {
    constexpr int kAtOnce = kTiles * kBlocks > 9 ? (kBlocks + 1) / 2 : kBlocks;  // whose columns are in registers
#pragma unroll
    for (int first = 0; first < kBlocks; first += kAtOnce) {
        std::uint32_t b[kAtOnce][4];
#pragma unroll
        for (int j = 0; j < kAtOnce && first + j < kBlocks; ++j) load_matrices(b[j], tokens + (first + j) * 8 * 16);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int j = 0; j < kAtOnce && first + j < kBlocks; ++j)
#pragma unroll
                for (int m = 0; m < kTiles; ++m)
                    multiply(sums[m][first + j], weights[m].a[half], b[j][half * 2], b[j][half * 2 + 1]);
    }
}

// Steps `begin` to `end` - 1 of this warp, whose tokens' columns are staged; its sums to where they are finished. The next step's
// weights are asked for before this one's products.
template <int kTiles, int kBlocks>
DEVICE void multiply_steps(const Block& block, const Product& w, const Exchange& exchange, Weights& weights, int begin, int end) {
    const Staged tokens(block.staging, kBlocks * 8);
    const int lane = renewed(block.lane), step_bytes = kStepColumns / 8 * tokens.group;
    const std::uint8_t* row = tokens.row(lane / 8 * 8, lane % 8);
    float sums[kTiles][kBlocks][4] = {};
    Fragments mine[kTiles], next[kTiles];
    bool more = weights.load(mine, end);
    while (more) {
        const std::uint8_t* at = row + (weights.step() - begin) * step_bytes;
        more = weights.load(next, end);
        multiply_step(sums, mine, at);
        if (!more) break;
#pragma unroll
        for (int m = 0; m < kTiles; ++m) mine[m] = next[m];
    }
    exchange.wait_for_room();
    const Block here(block.launch, block.rank, renewed(block.thread));  // addresses are worked out after the products
    const Delivery delivery(here, w, exchange);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) delivery.sums<kBlocks>(sums[m], m, begin > 0);
}

// Of tokens that fill kBlocks times eight.
template <int kBlocks>
DEVICE void multiply_part(const Block& block, const Product& w, const Exchange& exchange, Weights& weights, int begin, int end) {
    const int groups = weights.groups();
    if (kBlocks <= kMostBlocksOfTwo && groups > 1)
        multiply_steps<kBlocks <= kMostBlocksOfTwo ? kMaxWarpTiles : 1, kBlocks>(block, w, exchange, weights, begin, end);
    else if (groups > 0)
        multiply_steps<1, kBlocks>(block, w, exchange, weights, begin, end);
    else
        weights.skip(end);
}

DEVICE void multiply_part(const Block& block, const Product& w, const Exchange& exchange, Weights& weights, int begin, int end) {
    switch (block.launch.padded_tokens) {
        case 16: return multiply_part<2>(block, w, exchange, weights, begin, end);
        case 24: return multiply_part<3>(block, w, exchange, weights, begin, end);
        case 40: return multiply_part<5>(block, w, exchange, weights, begin, end);
        case 56: return multiply_part<7>(block, w, exchange, weights, begin, end);
        default: return multiply_part<9>(block, w, exchange, weights, begin, end);
    }
}

// Steps whose tokens the staging memory holds: all, or whole panels.
DEVICE int steps_at_once(const Block& block, const Product& w) {
    const int steps = w.slice / kStepColumns, part = block.launch.part / kStepColumns;
    return steps <= part ? steps : part / w.panel_steps * w.panel_steps;
}

// All sums of this block to where they are finished; after it nobody reads the staged tokens any more.
DEVICE void multiply_tile(const Block& block, Ring& ring, const Product& w, const Moment& now, const Exchange& exchange) {
    Weights weights(block, ring, w, now.tile);
    const Staged tokens(block.staging, block.launch.padded_tokens);
    Moments moments;
    for (int begin = 0, end; begin < weights.steps(); begin = end) {
        end = begin + steps_at_once(block, w);
        if (end > weights.steps()) end = weights.steps();
        if (begin > 0) sync_computing();  // all have multiplied the part before
        if (attends(w))
            stage_attended(block, w, now, tokens, begin * kStepColumns, (end - begin) * kStepColumns);
        else
            stage(block, w, now, tokens, begin * kStepColumns, (end - begin) * kStepColumns, moments);
        sync_computing();
        multiply_part(block, w, exchange, weights, begin, end);
    }
    if (w.norm != 0) {
        exchange.wait_for_room();
        Delivery(block, w, exchange).moments(moments);
    }
    sync_computing();
}

DEVICE void finish(const Block& block, const Product& w, const Moment& now, const Planes& planes, const float* sums,
                   const Item& item, const Addends& addends) {
    if (item.token >= w.tokens) return;
    const int row = item.row - block.rank * planes.own;
    float y[2] = {};
#pragma unroll 4
    for (int plane = 0; plane < planes.count; ++plane)
        for (int e = 0; e < 2; ++e) y[e] += sums[planes.sum(plane, row + e, item.token)];
    for (int e = 0; e < 2; ++e) y[e] *= addends.scale[e];
    if (w.norm != 0) {
        Moments all;
#pragma unroll 2
        for (int rank = 0; rank < planes.split; ++rank) {
            const int left = w.columns - rank * w.slice, here = left < w.slice ? left : w.slice;
            const float* part = sums + planes.moments(rank, item.token);
            all.add(static_cast<float>(here > 0 ? here : 0), part[0], part[1]);
        }
        const float inverse =
            inverse_root(quotient(all.squares, static_cast<float>(w.columns)) + as_float(static_cast<std::uint32_t>(w.norm)));
        for (int e = 0; e < 2; ++e) y[e] = (y[e] - all.mean * addends.sums[e]) * inverse;
    }
    for (int e = 0; e < 2; ++e) y[e] = addends.state ? addends.bias[e] : y[e] + addends.bias[e];
    if (w.epilogue == kEuler) return euler(block, w, item, now, y);
    if (item.row >= w.rows) return;  // which are multiples of 16
    if (w.epilogue == kTokens || w.epilogue == kResidual)
        for (int e = 0; e < 2; ++e) *item.own(block, w, e) = y[e];
    else
        for (int e = 0; e < 2; ++e) y[e] = activate(y[e], w.epilogue);
    write(block, w, item, now.before(), kEmpty);
    write(block, w, item, now.set, pack_bf16(y[0], y[1]));
}

// All items of this block, whose sums are there or on their way.
DEVICE void finish_all(const Block& block, const Product& w, const Moment& now, const Exchange& exchange) {
    // most tiles give a thread no more than two items: what they need is fetched before the sums have come
    const int items = Item::count(block, w);
    Addends first, second;
    if (block.thread < items) first.fetch(block, w, Item(block, w, block.thread), now.step);
    if (block.thread + kComputing < items) second.fetch(block, w, Item(block, w, block.thread + kComputing), now.step);
    const Planes planes(block, w);
    const float* sums = split_of(w) > 1 ? exchange.sums() : Delivery(block, w, exchange).own_sums();
#pragma unroll 1
    for (int i = block.thread; i < items; i += kComputing) {
        const Item item(block, w, i);
        if (i >= 2 * kComputing) first.fetch(block, w, item, now.step);
        finish(block, w, now, planes, sums, item, first);
        first = second;
    }
}

DEVICE void product(const Block& block, Ring& ring, const Tile& tile, const Moment& now) {
    const Product& w = Block::work<Product>(tile);
    const Exchange exchange(block, now);
    if (block.thread == 0) exchange.expect(split_of(w) > 1 ? Planes(block, w).bytes(w) : 0);
    multiply_tile(block, ring, w, now, exchange);
    finish_all(Block(block.launch, renewed(block.rank), renewed(block.thread)), w, now, exchange);
    exchange.release();
}

}  // namespace dit4dit::ode
