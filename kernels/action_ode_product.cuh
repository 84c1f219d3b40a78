// Products of the action head, transposed: rows of weights are the tall operand, tokens the narrow one.
#pragma once

#include "action_ode_block.cuh"

namespace dit4dit::ode {

constexpr int kSumRow = 20;  // floats between two tokens of a warp's sums: 16, and 4 so that a warp meets no bank twice

// Columns of activations in shared memory: groups of eight, in each 16 bytes a token, and 16 bytes more.
struct Staged {
    const std::uint8_t* at;
    int group;  // bytes

    DEVICE const std::uint8_t* row(int column, int token) const { return at + column / 8 * group + token * 16; }
};

DEVICE Staged stage(const Block& block, const Product& w, int column, int span) {
    const int padded = block.launch.padded_tokens, groups = span / 8, stride = padded * 16 + 16;
    const int limit = w.column + w.columns, source_columns = block.launch.columns[w.source];
    const std::uint16_t* source = block.buffer<std::uint16_t>(w.source, w.token);
    constexpr int kAtOnce = 4;
    for (int begin = thread_index(); begin < groups * padded; begin += kThreads * kAtOnce) {
        Quad values[kAtOnce];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            const int i = begin + u * kThreads, token = i / groups, c = w.column + column + i % groups * 8;
            values[u] = Quad{};
            if (token < w.tokens && c < limit) values[u] = load_quad(source + token * source_columns + c);
        }
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            const int i = begin + u * kThreads, token = i / groups;
            if (token < padded)
                *reinterpret_cast<Quad*>(block.staging + i % groups * stride + token * 16) = values[u];
        }
    }
    return {block.staging, stride};
}

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
    products_begin();
    multiply_warpgroup<kTokens>(sums, weights.a[0], describe_tokens(tokens, column));
    multiply_warpgroup<kTokens>(sums, weights.a[1], describe_tokens(tokens, column + 16));
    products_end();
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

// Sums of all warps for two neighbouring rows of one token, in the order of the columns.
DEVICE void finish_pair(const Block& block, const Product& w, int token, int row) {
    const int row_groups = w.tile_rows / 16, padded = block.launch.padded_tokens;
    const float* sums = reinterpret_cast<const float*>(block.staging);
    float y[2] = {};
    for (int warp = row / 16; warp < kWarps; warp += row_groups)
        for (int e = 0; e < 2; ++e) y[e] += sums[(warp * padded + token) * kSumRow + row % 16 + e];
    for (int e = 0; e < 2; ++e)
        if (row + e < w.rows) {
            if (w.fp8) y[e] *= *block.constant(w.scale + row + e);
            if (w.epilogue != kPartial) y[e] = activate(y[e] + *block.constant(w.bias + row + e), w.epilogue);
        }
    const int at = w.row + row;
    if (w.epilogue != kPartial) {  // whose rows are multiples of 16
        if (row < w.rows)
            reinterpret_cast<std::uint32_t*>(block.buffer<std::uint16_t>(w.out, w.token + token))[at / 2] = pack_bf16(y[0], y[1]);
    } else {
        float* out = block.buffer<float>(w.out, w.token + token, w.plane) + at;
        for (int e = 0; e < 2; ++e)
            if (row + e < w.rows) out[e] = y[e];
    }
}

DEVICE void product(const Block& block, Weights& weights, const Product& w) {
    const int warp = thread_index() / 32, lane = thread_index() % 32, padded = block.launch.padded_tokens;
    const int row_groups = w.tile_rows / 16, slot_columns = kSlotElements / w.tile_rows;
    const int mine = warp / row_groups * 32;  // of a slot's columns
    const int all = w.slots * slot_columns;
    float sums[8][4] = {};
    for (int begin = 0; begin < all; begin += block.launch.part) {
        const int span = all - begin < block.launch.part ? all - begin : block.launch.part;
        if (begin > 0) sync_block();  // all have read the part before
        const Staged tokens = stage(block, w, begin, span);
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
    sync_block();
    float* to = reinterpret_cast<float*>(block.staging);
#pragma unroll
    for (int j = 0; j < 8; ++j)
        if (j < padded / 8)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = j * 8 + lane % 4 * 2 + i % 2, row = lane / 4 + i / 2 * 8;
                to[(warp * padded + token) * kSumRow + row] = sums[j][i];
            }
    sync_block();
    for (int i = thread_index(); i < w.tokens * w.tile_rows / 2; i += kThreads)
        finish_pair(block, w, i / (w.tile_rows / 2), i % (w.tile_rows / 2) * 2);
}

}  // namespace dit4dit::ode
