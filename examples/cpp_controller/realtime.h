// A thread that wakes up on time: priority, locked memory, absolute sleeps, and how late it was.
#pragma once

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

// SCHED_FIFO for the calling thread. False, and a message, where the system does not allow it: the loop runs, and may wake up
// late whenever another process wants the core.
inline bool request_priority(int priority) {
    sched_param param{};
    param.sched_priority = priority;
    const int error = pthread_setschedparam(pthread_self(), SCHED_FIFO, &param);
    if (error == 0) return true;
    std::fprintf(stderr,
                 "controller: SCHED_FIFO %d: %s; running with normal priority, so wake-ups may be late. To allow it: "
                 "sudo setcap cap_sys_nice+ep controller, or a line '@realtime - rtprio %d' in /etc/security/limits.conf\n",
                 priority, std::strerror(error), priority);
    return false;
}

// No page of this process leaves memory. Call it when everything that the loop uses is there: MCL_CURRENT alone, because with
// MCL_FUTURE and a small RLIMIT_MEMLOCK any later allocation of this process could fail.
inline bool lock_memory() {
    if (mlockall(MCL_CURRENT) == 0) return true;
    std::fprintf(stderr,
                 "controller: mlockall: %s; running without, so a page fault may delay a command. To allow it: sudo setcap "
                 "cap_ipc_lock+ep controller, or a line '@realtime - memlock unlimited' in /etc/security/limits.conf\n",
                 std::strerror(errno));
    return false;
}

// Sleeps until a moment of CLOCK_MONOTONIC. Absolute, so that errors do not add up.
inline void sleep_until(std::int64_t moment_ns) noexcept {
    timespec moment{};
    moment.tv_sec = static_cast<time_t>(moment_ns / 1'000'000'000);
    moment.tv_nsec = static_cast<long>(moment_ns % 1'000'000'000);
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &moment, nullptr) == EINTR) {
    }
}

struct Quantiles {
    std::int64_t p50 = 0, p99 = 0, p999 = 0, max = 0;
};

// The last `capacity` values, in memory that is there from the start; quantiles are for afterwards.
class Samples {
 public:
    explicit Samples(std::size_t capacity) : values_(capacity, 0) {}

    void add(std::int64_t value) noexcept { values_[count_++ % values_.size()] = value; }

    Quantiles quantiles() const {
        std::vector<std::int64_t> sorted = values_;
        sorted.resize(std::min(count_, values_.size()));
        if (sorted.empty()) return {};
        std::sort(sorted.begin(), sorted.end());
        const double last = static_cast<double>(sorted.size() - 1);
        const auto at = [&](double share) { return sorted[static_cast<std::size_t>(share * last)]; };
        return {at(0.5), at(0.99), at(0.999), sorted.back()};
    }

 private:
    std::vector<std::int64_t> values_;
    std::size_t count_ = 0;
};
