// What a product takes: a rank's slice of its tokens' columns in shared memory, as they are or times 1 + scale, and what a norm needs
// to know of them.
#pragma once

#include "action_ode_block.cuh"

namespace dit4dit::ode {

// Columns of activations in shared memory: groups of eight, in each 16 bytes a token, and 16 bytes more.
struct Staged {
    std::uint8_t* at;
    int group;  // bytes

    DEVICE Staged(std::uint8_t* staging, int padded_tokens) : at(staging), group(padded_tokens * 16 + 16) {}
    DEVICE std::uint8_t* row(int column, int token) const { return at + column / 8 * group + token * 16; }
};

// Of some columns of one token: how many, their mean, and the sum of squared deviations from it.
struct Moments {
    float count = 0, mean = 0, squares = 0;

    DEVICE void add(float n, float m, float q) {
        if (n == 0) return;
        const float all = count + n, apart = m - mean, share = quotient(n, all);
        mean += apart * share;
        squares += q + apart * apart * (count * share);
        count = all;
    }
};

// Lane i of a warp keeps the moments of the warp's i-th token: token warp + i * kWarps.
DEVICE int token_of_lane(const Block& block) { return block.warp + block.lane * kWarps; }

// One warp's share of a slice: some of its tokens, and of each these columns of a lane: eight from 8 * lane on, of each 256.
template <int kTokens, int kPieces>
class Window {
public:
    DEVICE Window(const Block& block, const Product& w, int column, int span, int first_token)
        : w_(w), column_(column), span_(span), token_(first_token), lane_(block.lane) {}

    // Asks for the modulation, then reads words until all are there.
    DEVICE void read(const Block& block, const Moment& now) {
        const float* table = block.constant(modulated() ? w_.modulation + now.step * w_.modulation_step : 0);
#pragma unroll
        for (int p = 0; p < kPieces; ++p) {
            scale_[p][0] = scale_[p][1] = Float4{};  // else they would be kept all through a launch
            if (!modulated() || !inside(p)) continue;
            for (int i = 0; i < 2; ++i) scale_[p][i] = load_constant_float4(table + column_ + offset(p) + 4 * i);
        }
        const std::uint32_t* source = block.words(now.set);
        Patience patience(block, now.tile);
#pragma unroll
        for (int t = 0; t < kTokens; ++t)
#pragma unroll
            for (int p = 0; p < kPieces; ++p)
#pragma unroll
                for (int i = 0; i < 4; ++i) x_[t][p].v[i] = wanted(t, p) ? kEmpty : 0;
#pragma unroll 1
        for (;;) {  // a round asks for all that was not there in the round before
            int missing = kNone;
#pragma unroll
            for (int t = 0; t < kTokens; ++t)
#pragma unroll
                for (int p = 0; p < kPieces; ++p)
                    if (incomplete(x_[t][p])) {
                        missing = word(t, p);
                        x_[t][p] = load_words(source + missing);
                    }
            if (!any_lane(missing != kNone) || patience.over(missing)) return;
        }
    }

    DEVICE void store(const Staged& to) const {
#pragma unroll
        for (int p = 0; p < kPieces; ++p) {
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                if (offset(p) >= span_ || token(t) >= w_.tokens) continue;
                Quad y = x_[t][p];
                if (modulated() && inside(p))
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        y.v[i] = pack_bf16(low_half(y.v[i]) * scale_[p][i / 2].v[i % 2 * 2],
                                           high_half(y.v[i]) * scale_[p][i / 2].v[i % 2 * 2 + 1]);
                *reinterpret_cast<Quad*>(to.row(from_ + offset(p), token(t))) = y;
            }
        }
    }

    // Adds the moments of token t's columns to those that the token's lane keeps.
    DEVICE void measure(const Block& block, Moments& mine) const {
        const int left = w_.columns - column_, here = left < span_ ? left : span_;
        const float count = static_cast<float>(here > 0 ? here : 0);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            float sum = 0, squares = 0;
#pragma unroll
            for (int p = 0; p < kPieces; ++p)
#pragma unroll
                for (int i = 0; i < 4; ++i) sum += low_half(x_[t][p].v[i]) + high_half(x_[t][p].v[i]);
            sum = warp_sum(sum);
            const float mean = count > 0 ? quotient(sum, count) : 0.0f;
#pragma unroll
            for (int p = 0; p < kPieces; ++p)
                if (wanted(t, p))
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float a = low_half(x_[t][p].v[i]) - mean, b = high_half(x_[t][p].v[i]) - mean;
                        squares += a * a + b * b;
                    }
            squares = warp_sum(squares);
            if (token(t) == token_of_lane(block)) mine.add(count, mean, squares);
        }
    }

    int from_ = 0;  // staged column that `column` goes to

private:
    DEVICE bool modulated() const { return w_.modulation != kNone; }
    DEVICE int offset(int piece) const { return (piece * 32 + lane_) * 8; }
    DEVICE int token(int t) const { return token_ + t * kWarps; }
    DEVICE bool inside(int p) const { return offset(p) < span_ && column_ + offset(p) < w_.columns; }
    DEVICE bool wanted(int t, int p) const { return token(t) < w_.tokens && inside(p); }
    DEVICE int word(int t, int p) const { return w_.source + token(t) * w_.source_stride + (column_ + offset(p)) / 2; }

    const Product& w_;
    const int column_, span_, token_, lane_;
    Quad x_[kTokens][kPieces];
    Float4 scale_[kPieces][2];
};

// Columns `first` to + span - 1 of this rank's slice, of all tokens; zeros past the last column of the matrix.
DEVICE void stage(const Block& block, const Product& w, const Moment& now, const Staged& to, int first, int span,
                  Moments& moments) {
    constexpr int kTokens = 3, kPieces = DIT4DIT_BULK_COPIES ? 2 : 1, kColumns = kPieces * 32 * 8;
    const int begin = (block.rank & (split_of(w) - 1)) * w.slice + first;
    for (int token = block.warp; token < w.tokens; token += kTokens * kWarps)
        for (int at = 0; at < span; at += kColumns) {
            Window<kTokens, kPieces> window(block, w, begin + at, span - at < kColumns ? span - at : kColumns, token);
            window.from_ = at;
            window.read(block, now);
            window.store(to);
            if (w.norm != 0) window.measure(block, moments);
        }
}

}  // namespace dit4dit::ode
