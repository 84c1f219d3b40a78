// How chunks, stamps and the driver's feedback pass from one process to another: sequence locks over a Segment.
//
// No function here waits, allocates, locks or, but for estop, enters the kernel: a writer never waits for readers, a reader
// gives up after kMostTries.
//
// Memory order. A payload word is stored with release and loaded with acquire; the mark "being written" is stored relaxed
// before the payload, the mark "whole" with release after it; a reader loads the sequence with acquire first, relaxed last. A
// reader that sees any word of a later write has synchronised with it, so its last load cannot see a mark older than that
// write's odd one. There is no atomic_thread_fence, which ThreadSanitizer does not know.
#pragma once

#include <time.h>
#include <unistd.h>

#include <cstring>

#include "layout.h"

namespace dit4dit {

constexpr int kMostTries = 4;
// Times beyond this, 73 years from 0 either way, are nobody's: differences of two others fit into 64 bits.
constexpr std::int64_t kLatest = std::int64_t{1} << 61;

// CLOCK_MONOTONIC, as time.monotonic_ns() of Python: the clock of every stamp.
inline std::int64_t monotonic_ns() noexcept {
    timespec now{};
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<std::int64_t>(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

namespace detail {

inline double as_double(std::uint64_t word) noexcept {
    double value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

inline std::uint64_t as_word(double value) noexcept {
    std::uint64_t word;
    std::memcpy(&word, &value, sizeof word);
    return word;
}

constexpr int kRowWords = kMaxChannels / 2;

// `count` floats of a row from its words.
inline void load_row(const Word* words, int count, float* out) noexcept {
    for (int i = 0; i < count / 2; ++i) {
        const std::uint64_t word = words[i].load(std::memory_order_acquire);
        std::memcpy(out + 2 * i, &word, sizeof word);
    }
    if (count % 2) {
        const std::uint64_t word = words[count / 2].load(std::memory_order_acquire);
        std::memcpy(out + count - 1, &word, sizeof(float));
    }
}

inline void store_row(Word* words, int count, const float* values) noexcept {
    for (int i = 0; i < count / 2; ++i) {
        std::uint64_t word;
        std::memcpy(&word, values + 2 * i, sizeof word);
        words[i].store(word, std::memory_order_release);
    }
    if (count % 2) {
        std::uint64_t word = 0;
        std::memcpy(&word, values + count - 1, sizeof(float));
        words[count / 2].store(word, std::memory_order_release);
    }
}

inline int clamp(std::int64_t value, int low, int high) noexcept {
    return static_cast<int>(value < low ? low : value > high ? high : value);
}

}  // namespace detail

// -- chunks ----------------------------------------------------------------------------------------

// What is published: row i of `rows` is meant for starts_at_ns + i / control_hz. Rows hold a float for each channel of the
// layout, in its order and in physical units; `stride` floats lie from row to row.
struct Chunk {
    std::int64_t observed_at_ns, computed_at_ns, starts_at_ns;
    double control_hz;
    std::int32_t rows;
    std::int32_t stride;
    const float* values;
};

// A chunk copied out of the ring.
struct HeldChunk {
    std::uint64_t id = 0;  // 0: none
    std::int64_t observed_at = 0, computed_at = 0, starts_at = 0, published_at = 0;
    double period_ns = 0;
    std::int32_t rows = 0;
    float values[kMaxRows * kMaxChannels];  // kMaxChannels from row to row; only the layout's channels are written

    const float* row(int i) const noexcept { return values + i * kMaxChannels; }
};

// The id of the newest chunk; 0: none yet.
inline std::uint64_t head(const Segment& segment) noexcept {
    return segment.header.stamps.head.load(std::memory_order_acquire);
}

// Writes the next chunk, unchecked (Writer::publish checks), and returns its id. Only for the one that holds the producer's lock.
inline std::uint64_t publish(Segment& segment, const Chunk& chunk, std::int64_t now_ns) noexcept {
    constexpr auto release = std::memory_order_release;
    Stamps& stamps = segment.header.stamps;
    const std::uint64_t id = stamps.head.load(std::memory_order_relaxed) + 1;
    Slot& slot = segment.slot[(id - 1) % kSlots];
    slot.sequence.store(2 * id - 1, std::memory_order_relaxed);
    slot.observed_at.store(chunk.observed_at_ns, release);
    slot.computed_at.store(chunk.computed_at_ns, release);
    slot.starts_at.store(chunk.starts_at_ns, release);
    slot.published_at.store(now_ns, release);
    slot.period.store(detail::as_word(1e9 / chunk.control_hz), release);
    slot.rows.store(static_cast<std::uint64_t>(chunk.rows), release);
    const int channels = static_cast<int>(segment.header.layout.channels);
    for (int i = 0; i < chunk.rows; ++i) {
        const float* row = chunk.values + static_cast<std::ptrdiff_t>(i) * chunk.stride;
        detail::store_row(slot.values + i * detail::kRowWords, channels, row);
    }
    slot.sequence.store(2 * id, release);
    stamps.loop_at.store(now_ns, release);
    stamps.head.store(id, release);
    return id;
}

// Copies rows [first, first + count) of chunk `id`, cut to the rows that it has. False: it is not there, no longer, or was
// overwritten while it was read, and `held` is garbage with id 0. One try.
inline bool copy_rows(const Segment& segment, std::uint64_t id, int first, int count, HeldChunk& held) noexcept {
    constexpr auto acquire = std::memory_order_acquire;
    const Slot& slot = segment.slot[(id - 1) % kSlots];
    held.id = 0;
    if (id == 0 || slot.sequence.load(acquire) != 2 * id) return false;
    held.observed_at = slot.observed_at.load(acquire);
    held.computed_at = slot.computed_at.load(acquire);
    held.starts_at = slot.starts_at.load(acquire);
    held.published_at = slot.published_at.load(acquire);
    held.period_ns = detail::as_double(slot.period.load(acquire));
    // of a chunk that is being overwritten, or by a stranger, it may be anything
    held.rows = detail::clamp(static_cast<std::int64_t>(slot.rows.load(acquire)), 0, kMaxRows);
    const int channels = detail::clamp(segment.header.layout.channels, 0, kMaxChannels);
    const int end = first + count < held.rows ? first + count : held.rows;
    for (int i = first < 0 ? 0 : first; i < end; ++i)
        detail::load_row(slot.values + i * detail::kRowWords, channels, held.values + i * kMaxChannels);
    if (slot.sequence.load(std::memory_order_relaxed) != 2 * id) return false;
    held.id = id;
    return true;
}

// The whole chunk. Chunk n can be had from when head() says n until chunk n + kSlots is begun.
inline bool copy(const Segment& segment, std::uint64_t id, HeldChunk& held) noexcept {
    // above the head there may be one whose producer was killed before it counted: its successor writes it anew, under the same
    // marks
    if (id <= head(segment)) return copy_rows(segment, id, 0, kMaxRows, held);
    held.id = 0;
    return false;
}

// What became of a read. none: nothing has been published. contended: every try met a chunk that was being overwritten.
enum class Found : std::uint8_t { whole, none, contended };

struct Read {
    Found found;
    std::int32_t tries;
};

// The newest chunk: whole, and not older than head() on entry. After kMostTries: contended, and `held` is garbage with id 0.
inline Read copy_newest(const Segment& segment, HeldChunk& held, int first = 0, int count = kMaxRows) noexcept {
    held.id = 0;
    for (int tries = 1; tries <= kMostTries; ++tries) {
        const std::uint64_t id = head(segment);
        if (id == 0) return {Found::none, tries};
        if (copy_rows(segment, id, first, count, held)) return {Found::whole, tries};
    }
    return {Found::contended, kMostTries};
}

// -- stamps and e-stop -----------------------------------------------------------------------------

// Says that the producer's process lives. now_ns above 0.
inline void stamp_alive(Segment& segment, std::int64_t now_ns) noexcept {
    segment.header.stamps.alive_at.store(now_ns, std::memory_order_release);
}

// Says that the producer's own loop goes round. now_ns above 0.
inline void stamp_loop(Segment& segment, std::int64_t now_ns) noexcept {
    segment.header.stamps.loop_at.store(now_ns, std::memory_order_release);
}

// Whether the producer is dead for a reader that is at now_ns: it has ended, its process has not stamped for dead_after_ns
// (memory of one process needs no such stamp), or, where loop_dead_after_ns is above 0, its loop has not for that long. Dead at
// exactly stamp + dead_after. now_ns is not negative.
inline bool producer_dead(const Segment& segment, std::int64_t now_ns, std::int64_t dead_after_ns,
                          std::int64_t loop_dead_after_ns = 0) noexcept {
    constexpr auto acquire = std::memory_order_acquire;
    const Header& header = segment.header;
    const auto silent = [&](const Stamp& stamp, std::int64_t after) {
        const std::int64_t last = stamp.load(acquire);
        return (last ? last : header.created_at) <= now_ns - after;  // a stranger's stamp may be anything
    };
    if (header.stamps.closed_at.load(acquire) != 0) return true;
    if (header.shared && silent(header.stamps.alive_at, dead_after_ns)) return true;
    return loop_dead_after_ns > 0 && silent(header.stamps.loop_at, loop_dead_after_ns);
}

// Latches for every reader until clear_estop. The first one's stamp stays.
inline void estop(Segment& segment, std::int64_t now_ns) noexcept {
    Stamps& stamps = segment.header.stamps;
    std::int64_t none = 0;
    if (stamps.estop_at.compare_exchange_strong(none, now_ns ? now_ns : 1, std::memory_order_acq_rel))
        stamps.estop_by.store(static_cast<std::uint64_t>(getpid()), std::memory_order_release);
}

inline void clear_estop(Segment& segment) noexcept {
    segment.header.stamps.estop_at.store(0, std::memory_order_release);
}

// When it was latched; 0: it is not.
inline std::int64_t estop_at(const Segment& segment) noexcept {
    return segment.header.stamps.estop_at.load(std::memory_order_acquire);
}

// -- the driver's feedback -------------------------------------------------------------------------

// What the driver sent last. `values` as the layout's channels; those of groups that are not the driver's are what it puts there.
struct DriverFeedback {
    std::uint64_t driver = 0;  // process id
    std::uint64_t tick = 0;    // its reads so far
    std::int64_t at_ns = 0;    // now_ns of that read
    std::uint64_t chunk = 0;   // 0: none yet
    std::int32_t row = -1;     // of that chunk; -1: none was followed
    Status status = Status::ok;
    double values[kMaxChannels];
};

// Only for the one that holds the driver's lock.
inline void write_feedback(Segment& segment, const DriverFeedback& sent) noexcept {
    constexpr auto release = std::memory_order_release;
    Feedback& slot = segment.header.feedback;
    // odd already: the driver before died here; another odd mark tells its write from ours
    const std::uint64_t odd = (slot.sequence.load(std::memory_order_relaxed) + 1) | 1;
    slot.sequence.store(odd, std::memory_order_relaxed);
    slot.driver.store(sent.driver, release);
    slot.tick.store(sent.tick, release);
    slot.at.store(sent.at_ns, release);
    slot.chunk.store(sent.chunk, release);
    slot.row.store(sent.row, release);
    slot.status.store(static_cast<std::uint64_t>(sent.status), release);
    const int channels = static_cast<int>(segment.header.layout.channels);
    for (int i = 0; i < channels; ++i) slot.values[i].store(detail::as_word(sent.values[i]), release);
    slot.sequence.store(odd + 1, release);
}

// False: no driver has sent anything, or kMostTries met one that was being written.
inline bool read_feedback(const Segment& segment, DriverFeedback& sent) noexcept {
    constexpr auto acquire = std::memory_order_acquire;
    const Feedback& slot = segment.header.feedback;
    const int channels = detail::clamp(segment.header.layout.channels, 0, kMaxChannels);
    for (int tries = 1; tries <= kMostTries; ++tries) {
        const std::uint64_t begun = slot.sequence.load(acquire);
        if (begun == 0) return false;
        if (begun % 2) continue;
        sent.driver = slot.driver.load(acquire);
        sent.tick = slot.tick.load(acquire);
        sent.at_ns = slot.at.load(acquire);
        sent.chunk = slot.chunk.load(acquire);
        sent.row = static_cast<std::int32_t>(slot.row.load(acquire));
        sent.status = static_cast<Status>(
            detail::clamp(static_cast<std::int64_t>(slot.status.load(acquire)), 0, static_cast<int>(Status::estop)));
        for (int i = 0; i < channels; ++i) sent.values[i] = detail::as_double(slot.values[i].load(acquire));
        if (slot.sequence.load(std::memory_order_relaxed) == begun) return true;
    }
    return false;
}

}  // namespace dit4dit
