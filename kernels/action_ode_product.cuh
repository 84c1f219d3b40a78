// Products of the action head, transposed: rows of weights are the tall operand, tokens the narrow one.
#pragma once

#include "action_ode_sampler.cuh"
#include "action_ode_stage.cuh"

namespace dit4dit::ode {

constexpr int kSumRow = 20;  // floats between two tokens of a warp's sums: 16, and 4 so that a warp meets no bank twice

DEVICE void multiply_slot(float (&sums)[8][4], const Weights::Fragments& weights, const Staged& tokens, int column, int count) {
    const int lane = thread_index() % 32;
#pragma unroll
    for (int j = 0; j < 8; ++j)
        if (j < count) {
            std::uint32_t b[4];
            load_matrices(b, tokens.row(column + lane / 8 * 8, j * 8 + lane % 8));
            multiply(sums[j], weights.a[0], b[0], b[1]);
            multiply(sums[j], weights.a[1], b[2], b[3]);
        }
}

#if DIT4DIT_WARPGROUPS
// 16 columns of all tokens as a warpgroup product takes them: 8 x 8 blocks of 128 bytes, no swizzle.
DEVICE std::uint64_t describe_tokens(const Staged& tokens, int column) {
    const std::uint64_t along_columns = tokens.group >> 4, along_tokens = 128 >> 4;
    return (shared_address(tokens.row(column, 0)) >> 4 & 0x3fffu) | along_columns << 16 | along_tokens << 32;
}

template <int kTokens>
DEVICE void multiply_slot_warpgroup(float (&sums)[8][4], const Weights::Fragments& weights, const Staged& tokens, int column) {
    sync_warp();  // one thread has been away to fetch weights
    settle(sums);  // written before the fence, as PTX wants
    products_begin();
    multiply_warpgroup<kTokens>(sums, weights.a[0], describe_tokens(tokens, column));
    multiply_warpgroup<kTokens>(sums, weights.a[1], describe_tokens(tokens, column + 16));
    products_end();
    settle(sums);
}

DEVICE void multiply_slot_warpgroup(float (&sums)[8][4], const Weights::Fragments& weights, const Staged& tokens, int column,
                                    int padded) {
    switch (padded) {
        case 8: return multiply_slot_warpgroup<8>(sums, weights, tokens, column);
        case 16: return multiply_slot_warpgroup<16>(sums, weights, tokens, column);
        case 24: return multiply_slot_warpgroup<24>(sums, weights, tokens, column);
        case 32: return multiply_slot_warpgroup<32>(sums, weights, tokens, column);
        case 48: return multiply_slot_warpgroup<48>(sums, weights, tokens, column);
        default: return multiply_slot_warpgroup<64>(sums, weights, tokens, column);
    }
}
#endif

DEVICE float activate(float x, int epilogue) {
    switch (epilogue) {
        case kGelu: {
            const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
            return x - x / (1 + exponential(2 * u));  // x (1 + tanh u) / 2
        }
        case kSilu: return x / (1 + exponential(-x));
        case kRelu: return x < 0 ? 0.0f : x;  // a NaN stays one
        default: return x;
    }
}

// What this thread's sums are multiplied by, and what is added to them: of the rows and tokens of its fragments, and fetched long
// before the sums are there.
struct Addends {
    float scale[2], bias[2], more[8][4];
    bool first;  // of the warps that share rows: only this one adds

    DEVICE Addends(const Product& w) : first(thread_index() / 32 < w.tile_rows / 16) {}

    DEVICE static int row(const Product& w, int half) {
        return thread_index() / 32 % (w.tile_rows / 16) * 16 + thread_index() % 32 / 4 + half * 8;
    }

    // Before the wait: what never changes.
    DEVICE void fetch_constants(const Block& block, const Product& w) {
        for (int half = 0; half < 2; ++half) {
            const int r = row(w, half);
            const bool there = r < w.rows, biased = there && first && w.epilogue != kTokens;
            scale[half] = there && w.fp8 ? load_constant_float(block.constant(w.scale + r)) : 1.0f;
            bias[half] = biased ? load_constant_float(block.constant(w.bias + r)) : 0.0f;
        }
    }

    // The residual stream, or the bias of each token.
    DEVICE void fetch(const Block& block, const Product& w) {
        const int columns = block.launch.padded_tokens / 8, width = block.launch.width;
        const bool stream = w.epilogue == kResidual;
#pragma unroll
        for (int j = 0; j < 8; ++j)
            for (int i = 0; i < 4; ++i) more[j][i] = 0;
        if (!first || !(stream || w.epilogue == kTokens)) return;
#pragma unroll
        for (int j = 0; j < 8; ++j)
            if (j < columns)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int token = j * 8 + thread_index() % 4 * 2 + i % 2, r = row(w, i / 2);
                    if (token >= w.tokens || r >= w.rows) continue;
                    const float* of_token = block.constant(w.bias + token % block.tokens() * width + r);
                    more[j][i] = stream ? load_float(block.buffer<float>(kStream, w.token + token) + w.row + r)
                                        : load_constant_float(of_token);
                }
    }
};

// Sums of all warps for two neighbouring rows of one token, in the order of the columns.
DEVICE void finish_pair(const Block& block, const Product& w, int token, int row) {
    const Launch& launch = block.launch;
    const int row_groups = w.tile_rows / 16, padded = launch.padded_tokens, at = w.row + row, to = w.token + token;
    const float* sums = reinterpret_cast<const float*>(block.staging);
    float y[2] = {};
    for (int warp = row / 16; warp < kWarps; warp += row_groups)
        for (int e = 0; e < 2; ++e) y[e] += sums[(warp * padded + token) * kSumRow + row % 16 + e];
    if (w.epilogue == kEuler) {
        const int place = to % block.tokens();
        if (place < block.tokens() - launch.horizon) return;
        for (int e = 0; e < 2; ++e) euler(block, w, to, place, at + e, y[e]);
        return;
    }
    if (row >= w.rows) return;  // which are multiples of 16
    if (w.epilogue == kTokens || w.epilogue == kResidual) {
        if (w.epilogue == kTokens && launch.prefix != nullptr && to % block.tokens() == 0) {
            const float* state = launch.prefix + static_cast<std::int64_t>(to / block.tokens()) * launch.width + at;
            for (int e = 0; e < 2; ++e) y[e] = state[e];
        }
        *reinterpret_cast<Float2*>(block.buffer<float>(kStream, to) + at) = {{y[0], y[1]}};
        reinterpret_cast<std::uint32_t*>(block.buffer<std::uint16_t>(kRounded, to))[at / 2] = pack_bf16(y[0], y[1]);
        return;
    }
    for (int e = 0; e < 2; ++e) y[e] = activate(y[e], w.epilogue);
    reinterpret_cast<std::uint32_t*>(block.buffer<std::uint16_t>(w.out, to))[at / 2] = pack_bf16(y[0], y[1]);
}

DEVICE void multiply_all(const Block& block, Weights& weights, const Product& w, float (&sums)[8][4]) {
    const int warp = thread_index() / 32, padded = block.launch.padded_tokens;
    const int row_groups = w.tile_rows / 16, slot_columns = kSlotElements / w.tile_rows;
    const int mine = warp / row_groups * 32;  // of a slot's columns
    const int all = w.slots * slot_columns;
    const Staged tokens = staged(block, w);
    for (int begin = 0; begin < all; begin += block.launch.part) {
        const int span = all - begin < block.launch.part ? all - begin : block.launch.part;
        if (begin > 0) sync_block();  // all have read the part before
        stage(block, w, tokens, begin, span);
#if DIT4DIT_WARPGROUPS
        fence_shared_for_products();
#endif
        sync_block();
        for (int column = 0; column < span; column += slot_columns) {
            const Weights::Fragments fragments = weights.next(w.fp8 != 0);
#if DIT4DIT_WARPGROUPS
            if (row_groups == 4) {
                multiply_slot_warpgroup(sums, fragments, tokens, column + mine, padded);
                continue;
            }
#endif
            multiply_slot(sums, fragments, tokens, column + mine, padded / 8);
        }
    }
}

// False: the launch has failed.
DEVICE bool product(const Block& block, Weights& weights, const Tile& tile, int index) {
    const Product& w = block.work<Product>(tile);
    const int warp = thread_index() / 32, lane = thread_index() % 32, padded = block.launch.padded_tokens;
    Addends addends(w);
    addends.fetch_constants(block, w);
    fetch_modulation(block, w);
    if (!block.wait(tile, index)) return false;
    // before the products, to be there after them; where the compiler has no registers left for that (sm_100, sm_120), after them
    constexpr bool kEarly = DIT4DIT_WARPGROUPS || !DIT4DIT_BULK_COPIES;
    if (kEarly) addends.fetch(block, w);
    float sums[8][4] = {};
    multiply_all(block, weights, w, sums);
    if (!kEarly) addends.fetch(block, w);
    sync_block();
    float* to = reinterpret_cast<float*>(block.staging);
#pragma unroll
    for (int j = 0; j < 8; ++j)
        if (j < padded / 8)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = j * 8 + lane % 4 * 2 + i % 2, half = i / 2;
                to[(warp * padded + token) * kSumRow + lane / 4 + half * 8] =
                    sums[j][i] * addends.scale[half] + addends.bias[half] + addends.more[j][i];
            }
    sync_block();
    for (int i = thread_index(); i < w.tokens * w.tile_rows / 2; i += kThreads)
        finish_pair(block, w, i / (w.tile_rows / 2), i % (w.tile_rows / 2) * 2);
    return true;
}

}  // namespace dit4dit::ode
