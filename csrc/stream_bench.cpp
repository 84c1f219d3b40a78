#include "stream_bench.h"

#include <dit4dit/action_stream.h>
#include <sched.h>

#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <thread>

namespace dit4dit {

namespace {

constexpr std::int64_t kMillisecond = 1'000'000;
constexpr std::int64_t kChunkEvery = 300 * kMillisecond;
constexpr std::int64_t kWarmUp = 2000;  // reads until a robot that starts from rest is where the waves are

template <class T>
T got(Result<T> result) {
    if (!result) throw std::invalid_argument(result.error());
    return std::move(*result);
}

Layout bench_layout() {
    Layout layout;
    std::memset(static_cast<void*>(&layout), 0, sizeof layout);
    std::snprintf(layout.robot, sizeof layout.robot, "bench");
    layout.channels = kBenchChannels;
    layout.groups = 1;
    layout.command_period_ns = kMillisecond;
    layout.seam.kind = SeamKind::blend;
    layout.seam.rows = 3;
    layout.interpolation = Interpolation::cubic;
    std::snprintf(layout.group[0].name, sizeof layout.group[0].name, "arms");
    layout.group[0].on_stale = layout.group[0].on_dead = Rule::finish;
    for (int i = 0; i < kBenchChannels; ++i) {
        Channel& channel = layout.channel[i];
        std::snprintf(channel.name, sizeof channel.name, "joint.%d", i);
        channel.limits = {-3, 3, 2, 10, 100};
    }
    return layout;
}

// Slow waves, far inside the limits; or steps of 0.1 that take about as long as they stay, so that most ticks speed up or brake. `at`:
// of the first row, in seconds.
void fill(float* values, double at, bool jumps) {
    constexpr double pi = 3.14159265358979323846;
    for (int row = 0; row < kBenchRows; ++row)
        for (int i = 0; i < kBenchChannels; ++i) {
            const double t = at + row / kBenchControlHz;
            const double turns = (jumps ? 2 : 0.25) * t + 0.1 * i;
            values[row * kBenchChannels + i] =
                static_cast<float>(jumps ? (turns - std::floor(turns) < 0.5 ? -0.05 : 0.05) : 0.3 * std::sin(2 * pi * turns));
        }
}

void publish_bench(Writer& writer, std::int64_t now, double at, bool jumps) {
    float values[kBenchRows * kBenchChannels];
    fill(values, at, jumps);
    const Refusal refusal = writer.publish({now, now, now, kBenchControlHz, kBenchRows, kBenchChannels, values}, now);
    if (refusal) throw std::runtime_error(refusal.text());
}

void sleep_until(std::int64_t at) {
    const timespec deadline{at / 1'000'000'000, static_cast<long>(at % 1'000'000'000)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &deadline, nullptr) == EINTR) {}
}

template <class Work>
std::int64_t timed(Work work) {
    const std::int64_t begun = monotonic_ns();
    work();
    return monotonic_ns() - begun;
}

// Runs once a period beside the caller, until the end of its life.
class Beside {
  public:
    template <class Work>
    Beside(std::int64_t period, Work work)
        : thread_([this, period, work]() mutable {
              for (std::int64_t next = monotonic_ns(); !stop_.load(); next += period) {
                  sleep_until(next);
                  work();
              }
          }) {}
    ~Beside() {
        stop_ = true;
        thread_.join();
    }

  private:
    std::atomic<bool> stop_{false};
    std::thread thread_;
};

std::string ask_for(int priority) {
    sched_param wanted{};
    wanted.sched_priority = priority;
    const int error = pthread_setschedparam(pthread_self(), SCHED_FIFO, &wanted);
    return error ? std::strerror(error) : "";
}

void loop(Reader& reader, std::int64_t period, std::int64_t ticks, LoopTimes& times) {
    double values[kMaxChannels];
    std::int64_t deadline = monotonic_ns() + period;
    for (std::int64_t i = 0; i < ticks; ++i) {
        sleep_until(deadline);
        const std::int64_t woke = monotonic_ns();
        const Command command = reader.read(woke, values);
        const std::int64_t took = monotonic_ns() - woke;
        times.late[static_cast<std::size_t>(i)] = woke - deadline;
        times.took[static_cast<std::size_t>(i)] = took;
        times.age[static_cast<std::size_t>(i)] = command.chunk ? command.age_ns + took : -1;
        times.chunk[static_cast<std::size_t>(i)] = static_cast<std::int64_t>(command.chunk);
        ++times.status[static_cast<int>(command.status)];
        const std::int64_t over = (woke + took - deadline) / period;
        times.missed += over;
        deadline += (over + 1) * period;
    }
}

}  // namespace

Times time_clock(std::int64_t count) {
    Times took(count);
    for (auto& one : took) one = timed([] {});
    return took;
}

RingTimes time_ring(std::int64_t count) {
    Writer writer = got(Writer::in_process(bench_layout()));
    publish_bench(writer, monotonic_ns(), 0, false);
    const Beside producer(kMillisecond, [&] { publish_bench(writer, monotonic_ns(), 0, false); });
    const Segment& segment = writer.memory()->segment();
    HeldChunk held;
    RingTimes times{Times(count), 0};
    for (std::int64_t i = 0; i < count; ++i) {
        Read read;
        times.took[static_cast<std::size_t>(i)] = timed([&] { read = copy_newest(segment, held, static_cast<int>(i % (kBenchRows - 1)), 2); });
        times.contended += read.found == Found::contended;
    }
    return times;
}

Times time_reader(std::int64_t count, bool at_limits) {
    Writer writer = got(Writer::in_process(bench_layout()));
    Reader reader = got(Reader::of(writer.memory(), Options{}));
    double values[kMaxChannels] = {};
    reader.start_at(values);
    Times took;
    took.reserve(static_cast<std::size_t>(kWarmUp + count));
    for (std::int64_t i = 0; i < kWarmUp + count; ++i) {
        const std::int64_t now = (i + 1000) * kMillisecond;
        if (i * kMillisecond % kChunkEvery == 0) publish_bench(writer, now, static_cast<double>(i) / 1000, at_limits);
        took.push_back(timed([&] { reader.read(now, values); }));
    }
    took.erase(took.begin(), took.begin() + kWarmUp);
    return took;
}

LoopTimes run_loop(const std::string& name, std::int64_t period_ns, std::int64_t ticks, int priority) {
    Options options{};
    options.name = name.c_str();
    options.driver = true;
    Reader reader = got(Reader::open(options));
    LoopTimes times;
    for (Times* each : {&times.late, &times.age, &times.took, &times.chunk}) each->assign(ticks, 0);
    std::thread([&] {
        if (priority > 0) times.refused = ask_for(priority);
        loop(reader, period_ns, ticks, times);
    }).join();
    return times;
}

}  // namespace dit4dit
