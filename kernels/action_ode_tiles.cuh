// The records of the schedule and what a launch is given. dit4dit/engine/action_ode/schedule.py is the definition: the same names in
// the same order, which a test compares.
#pragma once

#include <cstdint>

namespace dit4dit::ode {

constexpr int kRecord = 24;  // int32 numbers of a tile: opcode, wait, target, signal, then one of the structs below
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSlotElements = 4096;
constexpr int kWeightUnit = 4096;  // bytes
constexpr int kSlotBytes = 2 * kWeightUnit;
constexpr int kCopySlots = 6;
constexpr int kMostSlots = 16;
constexpr int kMaxTokens = 64;
constexpr int kMaxHeadDim = 64;
constexpr int kMaxWidth = 2048;
constexpr int kCounterStride = 32;  // ints from one counter to the next
constexpr int kNone = -1;

enum Opcode { kStart, kProduct, kAttend };
enum Epilogue { kPlain, kGelu, kSilu, kRelu, kTokens, kResidual, kEuler };
enum Space {
    kActions, kNoisy, kEmbedded, kStream, kRounded, kProjected, kAttended, kStats, kHidden, kDecoded, kOut,
    kSpaces
};

struct Start {
    int token, tokens, prefix, sample;
};
struct Product {
    int source, token, tokens, planes, norm, modulation, row, rows, tile_rows, columns, weight, slots, fp8, bias, scale,
        epilogue, out, step;
};
struct Attend {
    int token, tokens, head, context, key, keys, sample, plane;
};

struct Tile {
    int opcode, wait, target, signal;
    int work[kRecord - 4];
};

// The caller's tensors and the schedule, as device addresses.
struct Launch {
    // schedule
    const int* tiles;          // [tiles, kRecord]
    const int* first_tile;     // [workers + 1]
    const int* segments;       // [products, 3]: weight offset in units, slots, units per slot
    const int* first_segment;  // [workers + 1]
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
    std::uint8_t* workspace;
    int* counters;  // [counter_count + 1, kCounterStride], the last one counts workers that are done; zero between launches
    // [4]: 0, or 1 + worker that waited in vain; tile; counter; what it had. Stays until the host clears it. Tile kNone: it waited
    // for its own weights, and the counter is the barrier in `Fixed`.
    int* status;

    std::int64_t offset[kSpaces];  // bytes of each buffer in the workspace
    int columns[kSpaces];
    int rows;  // of every buffer but the last
    int counter_count, workers;
    int width, head_dim, heads, horizon, actions, padded_actions, context_tokens, context_columns, steps, batch;
    int times;  // offset of the steps' times in the constants
    int padded_tokens, part, slots, staging;
    float max_guidance;
    std::int64_t limit_ns;  // longest wait
};

}  // namespace dit4dit::ode
