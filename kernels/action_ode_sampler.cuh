// The sampler: its noise, and the step that a velocity makes.
#pragma once

#include "action_ode_block.cuh"

namespace dit4dit::ode {

// Two neighbouring rows of a tile and one token: what a thread finishes.
struct Item {
    int row, token;  // row of the tile

    DEVICE Item(const Block& block, const Product& w, int index) {
        const int padded = block.launch.padded_tokens, own = w.tile_rows >> log2_of(ranks_of(block.launch)), pair = index / padded;
        row = block.rank * own + 2 * pair;
        token = index - pair * padded;
    }
    // Of a rank's rows, tokens that only pad included.
    DEVICE static int count(const Block& block, const Product& w) {
        return (w.tile_rows >> log2_of(ranks_of(block.launch))) / 2 * block.launch.padded_tokens;
    }
    DEVICE float* own(const Block& block, const Product& w, int e) const {
        return block.launch.private_memory + w.stream + (row + e) * block.launch.padded_tokens + token;
    }
};

// The word of an item in set `set`.
DEVICE void write(const Block& block, const Product& w, const Item& item, int set, std::uint32_t word) {
    store_word(block.words(set) + w.out + item.token * w.out_stride + item.row / 2, word);
}

// Before the first step: noise to the words of the first set, and the sampler's own numbers. State tokens and padding are zeros.
DEVICE void start(const Block& block, const Product& w, int set) {
    const Launch& launch = block.launch;
    const int per_sample = block.tokens(), before = per_sample - launch.horizon;
    for (int i = block.thread; i < Item::count(block, w); i += kComputing) {
        const Item item(block, w, i);
        if (item.token >= w.tokens || w.row + item.row >= launch.padded_actions) continue;
        const int to = w.token + item.token, sample = to / per_sample, k = to - sample * per_sample - before;
        float x[2] = {};
        for (int e = 0; e < 2; ++e) {
            const int a = w.row + item.row + e;
            if (k >= 0 && a < launch.actions)
                x[e] = launch.noise[(static_cast<std::int64_t>(sample) * launch.horizon + k) * launch.actions + a];
            *item.own(block, w, e) = x[e];
        }
        write(block, w, item, set, pack_bf16(x[0], x[1]));
    }
}

// Strength of the guidance at time t, as model/flow.py has it.
DEVICE float guidance_strength(float t, float most) {
    const float tau = 1 - t;
    if (t <= 0 || tau <= 0) return most;
    const float g = (t * t + tau * tau) / (t * tau);
    return g < most ? g : most;
}

// The sampler's step for two actions of one token, whose velocities are v.
DEVICE void euler(const Block& block, const Product& w, const Item& item, const Moment& now, const float (&v)[2]) {
    const Launch& launch = block.launch;
    if (w.row + item.row >= launch.padded_actions) return;
    const int per_sample = block.tokens(), to = w.token + item.token, sample = to / per_sample;
    const int k = to - sample * per_sample - (per_sample - launch.horizon);
    const bool last = now.step == launch.steps - 1;
    float x[2] = {};
    for (int e = 0; e < 2; ++e) {
        const int a = w.row + item.row + e;
        if (k < 0 || a >= launch.actions) continue;
        const std::int64_t at = (static_cast<std::int64_t>(sample) * launch.horizon + k) * launch.actions + a;
        x[e] = *item.own(block, w, e);
        float velocity = v[e];
        if (launch.previous != nullptr) {
            const float t = *block.constant(launch.times + now.step);
            const float pull = guidance_strength(t, launch.max_guidance) * launch.guidance[k];
            velocity = velocity - pull * (launch.previous[at] - (x[e] - t * velocity));
        }
        x[e] = x[e] - 1.0f / static_cast<float>(launch.steps) * velocity;
        *item.own(block, w, e) = x[e];
        if (last) launch.out[at] = x[e];
    }
    if (!last) write(block, w, item, now.next(), pack_bf16(x[0], x[1]));
    write(block, w, item, now.set, kEmpty);  // all have read this step's
}

}  // namespace dit4dit::ode
