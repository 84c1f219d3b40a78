// What is in a segment at this moment, for who looks on (dit4dit control watch). It is mapped for reading alone: nothing here can
// write to it. Made of the same functions that readers use.
#pragma once

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "refusal.h"
#include "ring.h"
#include "segment.h"

namespace dit4dit {

// A chunk without its rows.
struct ChunkSeen {
    std::uint64_t id;
    std::int64_t observed_at, computed_at, starts_at, published_at;
    double period_ns;
    std::int32_t rows;
};

struct Snapshot {
    std::int64_t now;  // CLOCK_MONOTONIC, right after the stamps were read
    std::uint64_t head, producer, producers, estop_by;
    std::int64_t alive_at, loop_at, closed_at, estop_at;
    bool producer_holds, driver_holds;  // their locks, which end with their processes
    bool driven;                        // false: no driver has sent anything, or it was writing each time that this looked
    DriverFeedback feedback;
    std::vector<ChunkSeen> chunks;      // those that are whole, the newest last
};

namespace detail {

// The stamps, and the time right after: once more where the thread was held up in between, or ages come out too long.
inline void read_stamps(const Stamps& from, Snapshot& into) noexcept {
    constexpr auto acquire = std::memory_order_acquire;
    for (int tries = 0; tries < kMostTries; ++tries) {
        const std::int64_t begun = monotonic_ns();
        into.head = from.head.load(acquire);
        into.producer = from.producer.load(acquire);
        into.producers = from.producers.load(acquire);
        into.estop_by = from.estop_by.load(acquire);
        into.alive_at = from.alive_at.load(acquire);
        into.loop_at = from.loop_at.load(acquire);
        into.closed_at = from.closed_at.load(acquire);
        into.estop_at = from.estop_at.load(acquire);
        into.now = monotonic_ns();
        if (into.now - begun < 100'000) return;
    }
}

// What no producer publishes, and a stranger may have written: ages and rows could not be told of it.
inline bool sound(const HeldChunk& chunk) noexcept {
    return chunk.rows > 0 && chunk.period_ns >= 1e9 / kMostControlHz && chunk.period_ns <= 1e9 / kLeastControlHz;
}

}  // namespace detail

inline Snapshot take_snapshot(const Memory& memory) {
    const Segment& segment = memory.segment();
    Snapshot seen{};
    // a ring of chunks that is being written all the time would keep this from ending, so: one try each
    auto held = std::make_unique<HeldChunk>();
    const std::uint64_t newest = head(segment);
    for (std::uint64_t id = newest < kSlots ? 1 : newest - kSlots + 1; id <= newest; ++id)
        if (copy_rows(segment, id, 0, 0, *held) && detail::sound(*held))
            seen.chunks.push_back({id, held->observed_at, held->computed_at, held->starts_at, held->published_at,
                                   held->period_ns, held->rows});
    seen.driven = read_feedback(segment, seen.feedback);
    seen.driver_holds = memory.locked(Role::driver);
    // the lock before the stamps: who ends in order stamps first and frees its lock then, and must not look killed. After them too:
    // who begins has the lock first
    seen.producer_holds = memory.locked(Role::producer);
    detail::read_stamps(segment.header.stamps, seen);
    seen.producer_holds = seen.producer_holds || memory.locked(Role::producer);
    return seen;
}

// Names of the segments of this machine that this user may read, of every version, sorted.
inline std::vector<std::string> segment_names() {
    constexpr const char* kFolder = "/dev/shm";
    std::vector<std::string> names;
    DIR* folder = ::opendir(kFolder);
    if (folder == nullptr) return names;
    while (const dirent* entry = ::readdir(folder)) {
        // a pipe must not block this
        const int file = ::openat(::dirfd(folder), entry->d_name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY);
        if (file < 0) continue;
        struct stat facts {};
        std::uint64_t magic = 0;
        if (::fstat(file, &facts) == 0 && S_ISREG(facts.st_mode) && ::pread(file, &magic, sizeof magic, 0) == sizeof magic &&
            magic == kMagic)
            names.push_back(std::string("/") + entry->d_name);
        ::close(file);
    }
    ::closedir(folder);
    std::sort(names.begin(), names.end());
    return names;
}

}  // namespace dit4dit
