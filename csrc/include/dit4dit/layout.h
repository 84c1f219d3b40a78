// What an action stream is made of, byte for byte: the header of a segment says which robot it is for and how chunks become
// commands; behind it lie the stamps, the driver's feedback and a ring of chunks. One layout for shared memory and for one process.
//
// Everything that changes while others read is a lock-free atomic of 8 bytes; the rest is written before the segment has a name.
#pragma once

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "dit4dit/action_stream.h: -ffast-math and -ffinite-math-only take its NaN checks away; compile this file without them"
#endif

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "limits.h"

namespace dit4dit {

constexpr std::uint64_t kMagic = 0x0074696434746964;  // "dit4dit", little-endian
constexpr std::uint32_t kVersion = 1;
constexpr int kMaxChannels = 64;
constexpr int kMaxRows = 64;
constexpr int kMaxGroups = 8;
constexpr int kSlots = 16;

// What a channel's number asks for. angle: radians, wraps at pi. relative: a displacement per row. binary: 0 or 1.
enum class Kind : std::uint8_t { position, angle, velocity, relative, binary };

// hold: the row that has begun. linear and cubic (Catmull-Rom): between rows, which are meant for starts_at + i / control_hz.
enum class Interpolation : std::uint8_t { hold, linear, cubic };

// How one chunk follows another: newest: at once. ensemble: the mean of the last `history` chunks, weighted by
// exp(alpha cosine(chunk, newest)). blend: over `rows` rows of the new one, from what would have been sent.
enum class SeamKind : std::uint8_t { newest, ensemble, blend };

// What a group does without a chunk to follow. hold: it stands still. decay: velocities and displacements fall to 0 linearly over
// decay_ns, the rest holds. finish (stale and dead only): the rows that are left are executed, then on_dry.
enum class Rule : std::uint8_t { hold, decay, finish };

// In order of precedence, last wins: ok, contended (going on with the rows already copied), dry (no row for this moment), stale
// (the observation is older than max_age_ns), dead (the producer is), estop.
enum class Status : std::uint8_t { ok, contended, dry, stale, dead, estop };

struct Channel {
    char name[47];  // ends with a NUL
    Kind kind;
    std::uint64_t group;  // index into Layout::group
    Limits limits;
};

struct Group {
    char name[32];  // ends with a NUL
    std::int64_t max_age_ns;  // of the observation; 0: any
    std::int64_t decay_ns;
    Rule on_dry, on_stale, on_dead;
    std::uint8_t reserved[5];
};

struct Seam {
    SeamKind kind;
    std::uint8_t reserved[3];
    std::int32_t history;  // ensemble: 1 to kMostHistory chunks
    double alpha;          // ensemble
    double rows;           // blend: above 0
};
constexpr int kMostHistory = 8;

// What does not change while a segment exists. Unused bytes are 0: two layouts are equal where their bytes are.
struct Layout {
    char robot[56];  // ends with a NUL
    std::uint32_t channels;
    std::uint32_t groups;
    std::int64_t command_period_ns;
    Seam seam;
    Interpolation interpolation;
    std::uint8_t reserved[7];
    Channel channel[kMaxChannels];
    Group group[kMaxGroups];
};

using Word = std::atomic<std::uint64_t>;
using Stamp = std::atomic<std::int64_t>;  // CLOCK_MONOTONIC, ns; 0: never

// Who produces. Written by the producer alone, but for estop.
struct alignas(64) Stamps {
    Word head;             // chunks published so far; chunk n (from 1) lies in slot (n - 1) % kSlots
    Stamp alive_at;        // by a thread of the producer's process, at 100 Hz
    Stamp loop_at;         // by the producer's own loop: ActionStream.heartbeat, and each publish
    Stamp closed_at;       // the producer has ended in order; 0 while one is at work
    Word producer;         // its process id
    Word producers;        // how many have taken this segment so far
    alignas(64) Stamp estop_at;  // 0: not latched
    Word estop_by;         // process id
};

// What the driver sent last. Its own sequence lock: odd while it is written.
struct alignas(64) Feedback {
    Word sequence;
    Word driver;  // process id
    Word tick;    // reads so far
    Stamp at;     // now_ns of the read
    Word chunk;   // 0: none yet
    Stamp row;    // of that chunk; -1: none was followed
    Word status;  // of Status
    Word values[kMaxChannels];  // bits of doubles, by the layout's channels; NaN where the driver has not this one
};

// Chunk n is whole while sequence == 2 n. Rows are floats, two to a word, kMaxChannels to a row.
struct alignas(64) Slot {
    Word sequence;
    Stamp observed_at, computed_at, starts_at, published_at;
    Word period;  // bits of a double: ns from row to row
    Word rows;
    Word reserved;
    Word values[kMaxRows * kMaxChannels / 2];
};

struct Header {
    Word magic;  // kMagic
    std::uint32_t version;
    std::uint32_t bytes;         // of the segment
    std::uint32_t header_bytes;  // of this struct
    std::uint32_t slot_bytes;
    std::uint32_t slots, max_rows, max_channels, max_groups;
    std::uint32_t shared;        // 0: memory of one process, which needs no alive_at
    std::uint32_t reserved;
    std::int64_t created_at;
    Layout layout;
    Stamps stamps;
    Feedback feedback;
};

struct Segment {
    Header header;
    Slot slot[kSlots];
};

static_assert(Word::is_always_lock_free && sizeof(Word) == 8 && sizeof(Stamp) == 8);
static_assert(sizeof(Limits) == 40 && sizeof(Channel) == 96 && sizeof(Group) == 56 && sizeof(Seam) == 24);
static_assert(sizeof(Layout) == 64 + 8 + 24 + 8 + kMaxChannels * sizeof(Channel) + kMaxGroups * sizeof(Group));
static_assert(std::is_trivially_copyable_v<Layout> && std::is_standard_layout_v<Segment>);
static_assert(sizeof(Stamps) == 128 && sizeof(Feedback) == 576 && sizeof(Slot) == 64 + kMaxRows * kMaxChannels * 4);
static_assert(offsetof(Header, layout) == 56 && offsetof(Segment, slot) == sizeof(Header) && sizeof(Header) % 64 == 0);
static_assert(sizeof(Segment) <= 320 * 1024);

}  // namespace dit4dit
