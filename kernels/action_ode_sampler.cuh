// The sampler: its noise, and the step that a velocity makes.
#pragma once

#include "action_ode_block.cuh"

namespace dit4dit::ode {

// One action of one token, in both of its places; columns past the last action are the zeros that pad NOISY.
DEVICE void set_action(const Block& block, int token, int a, float x) {
    if (a < block.launch.actions) block.buffer<float>(kActions, token)[a] = x;
    block.buffer<std::uint16_t>(kNoisy, token)[a] = static_cast<std::uint16_t>(pack_bf16(x, 0.0f) & 0xffffu);
}

DEVICE bool start(const Block& block, const Tile& tile, int index) {
    const Start& w = block.work<Start>(tile);
    const Launch& launch = block.launch;
    if (!block.wait(tile, index)) return false;
    for (int i = thread_index(); i < w.tokens * launch.padded_actions; i += kThreads) {
        const int place = i / launch.padded_actions, a = i % launch.padded_actions, k = place - w.prefix;
        const std::int64_t row = static_cast<std::int64_t>(w.sample) * launch.horizon + k;
        set_action(block, w.token + place, a, k >= 0 && a < launch.actions ? launch.noise[row * launch.actions + a] : 0.0f);
    }
    return true;
}

// Strength of the guidance at time t, as model/flow.py has it.
DEVICE float guidance_strength(float t, float most) {
    const float tau = 1 - t;
    if (t <= 0 || tau <= 0) return most;
    const float g = (t * t + tau * tau) / (t * tau);
    return g < most ? g : most;
}

// One action of the token at `place` of its sample, which is not the state's. Past the last action: NOISY's padding.
DEVICE void euler(const Block& block, const Product& w, int token, int place, int a, float v) {
    const Launch& launch = block.launch;
    if (a >= launch.padded_actions) return;
    float x = 0;
    if (a < launch.actions) {
        x = load_float(block.buffer<float>(kActions, token) + a);
        const int per_sample = block.tokens(), k = place - (per_sample - launch.horizon);
        const std::int64_t at = (static_cast<std::int64_t>(token / per_sample) * launch.horizon + k) * launch.actions + a;
        if (launch.previous != nullptr) {
            const float t = *block.constant(launch.times + w.step);
            const float pull = guidance_strength(t, launch.max_guidance) * launch.guidance[k];
            v = v - pull * (launch.previous[at] - (x - t * v));
        }
        x = x - 1.0f / static_cast<float>(launch.steps) * v;
        if (w.step == launch.steps - 1) launch.out[at] = x;
    }
    set_action(block, token, a, x);
}

}  // namespace dit4dit::ode
