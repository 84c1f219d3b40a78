// What an action stream costs on this machine (dit4dit bench stream): single reads, and a loop at a robot's rate. Times are ns of
// CLOCK_MONOTONIC, whose own cost is in each of them: time_clock says how much that is.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dit4dit {

using Times = std::vector<std::int64_t>;

constexpr int kBenchChannels = 23, kBenchRows = 16;
constexpr double kBenchControlHz = 30;

struct RingTimes {
    Times took;
    std::int64_t contended;
};

struct LoopTimes {
    Times late;    // of each tick: when it woke, after when it should have
    Times age;     // when the command was there, after the observation that it answers; -1: it answers none
    Times took;    // the read
    Times chunk;   // of the command
    std::int64_t missed = 0;       // ticks that were left out, because one before ended after they were due
    std::int64_t status[6] = {};   // commands of each Status
    std::string refused;           // why the thread did not get the priority; it ran without
};

Times time_clock(std::int64_t count);

// Reads of 2 rows x 23 channels of the newest chunk, out of a ring that another thread publishes to at 1 kHz.
RingTimes time_ring(std::int64_t count);

// Reader::read of 23 channels at 1 kHz of a time that is made up: cubic, blended seams, limits, a chunk every 300 ms. at_limits: the
// chunks are steps, so that nearly every read is held by its limits; else none is.
Times time_reader(std::int64_t count, bool at_limits);

// The driver of the segment `name`, for so many ticks, in a thread of its own. priority: of SCHED_FIFO; 0: as the process is.
LoopTimes run_loop(const std::string& name, std::int64_t period_ns, std::int64_t ticks, int priority);

}  // namespace dit4dit
