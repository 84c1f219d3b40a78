// The records of the schedule and what a launch is given. dit4dit/engine/action_ode/schedule.py is the definition and says what each
// number means: the same names in the same order, which a test compares.
#pragma once

#include <cstdint>

namespace dit4dit::ode {

constexpr int kRecord = 32;  // int32 numbers of a tile: opcode, then one of the structs below
constexpr int kWarps = 8;    // that compute; one more fetches weights
constexpr int kComputing = 32 * kWarps;
constexpr int kThreads = kComputing + 32;
constexpr int kStepColumns = 32;
constexpr int kWeightUnit = 512;  // bytes
constexpr int kSlotBytes = 16384;
constexpr int kMostSlots = 16;
constexpr int kMaxTokens = 72;
constexpr int kMaxHeadDim = 64;
constexpr int kMaxWidth = 2048;
constexpr int kMaxWarpTiles = 2;
constexpr int kMostBlocksOfTwo = 5;  // of eight tokens, with which a warp may have two row groups
constexpr int kMaxRanks = 8;
constexpr int kSets = 3;
constexpr std::uint32_t kEmpty = 0xffffffffu;
constexpr int kNone = -1;

enum Opcode { kProduct, kAttend };
enum Epilogue { kPlain, kGelu, kSilu, kRelu, kTokens, kResidual, kEuler };

struct Product {
    int source, source_stride, columns, split, slice, row, rows, tile_rows, parts, weight, rank_units, panel_steps, fp8, token,
        tokens, norm, modulation, modulation_step, sums, bias, constant_step, scale, epilogue, out, out_stride, stream, attend;
};
struct Attend {
    int query, key, value, stride, context, pair, pairs, share, tokens, keys, slice, out, out_stride;
};

struct Tile {
    int opcode;
    int work[kRecord - 1];
};

// The caller's tensors and the schedule, as device addresses.
struct Launch {
    // schedule
    const int* tiles;       // [tiles, kRecord]
    const int* first_tile;  // [teams + 1]
    // constants of the head
    const std::uint8_t* weights;
    const float* constants;
    // request
    const float* noise;            // [batch, horizon, actions]
    const std::uint16_t* context;  // bf16 [batch, context_tokens, context_columns]
    const float* prefix;           // [batch, width] or null
    const float* previous;         // [batch, horizon, actions] or null: no guidance
    const float* guidance;         // [horizon] or null
    float* out;                    // [batch, horizon, actions]
    // workspace
    std::uint32_t* words;     // [kSets, set_words], as the launch before left them; kEmpty before the first
    float* private_memory;    // [private_floats], each read by the thread that wrote it
    int* progress;            // [2]: steps of all launches so far modulo kSets; blocks of this one that are done
    // [4]: 0, or 1 + block that waited in vain; its tile; what for, a `Wanted`; word, buffer or slot. Stays until the host clears it.
    int* status;

    int set_words, private_floats;
    int teams, ranks;
    int rows;  // tokens of all samples
    int width, head_dim, heads, horizon, actions, padded_actions, context_tokens, context_columns, steps, batch;
    int times;  // offset of the steps' times in the constants
    int padded_tokens, part, slots, staging, inbox;
    float max_guidance;
    std::int64_t limit_ns;  // longest wait
};

}  // namespace dit4dit::ode
