// A 1 kHz motor controller without Python: it attaches to the stream of a policy as the driver and sends one command per tick.
//
//   controller NAME [--group GROUP] [--seconds S] [--wait S] [--stop-when-dead] [--priority P] [--json FILE]
//
// Two threads. The control thread wakes up once per command period (1 ms where the policy's side says command_hz=1000), reads,
// checks, sends; it makes no system call but its sleep. The main thread waits for signals, writes what happens and the summary.
//
// SIGINT, SIGTERM: bring the robot to rest, then end. SIGUSR1: e-stop. Exit code 0: ended in order; 1: no stream; 2: usage; 3: a
// command was not sent, because it was outside the limits; 4: with --stop-when-dead, the policy's process died and the robot is at rest.
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <array>
#include <atomic>
#include <string>
#include <thread>

#include <dit4dit/action_stream.h>

#include "guard.h"
#include "realtime.h"
#include "robot.h"

namespace {

using dit4dit::Status;

constexpr const char* kUsage =
    "usage: controller NAME [--group GROUP] [--seconds S] [--wait S] [--stop-when-dead] [--priority P] [--json FILE]\n"
    "  NAME              of the stream, such as /dit4dit.g1: shared=... of ActionStream on the policy's side\n"
    "  --group GROUP     drive one group of channels alone\n"
    "  --seconds S       end after so long; 0: at a signal\n"
    "  --wait S          for the policy's side to be there; 30\n"
    "  --stop-when-dead  end when the policy's process is dead and the robot is at rest; without: wait for the next one\n"
    "  --priority P      of SCHED_FIFO, 1 to 99; 80\n"
    "  --json FILE       write the summary\n";
constexpr std::array<const char*, 6> kStatusNames = {"ok", "contended", "dry", "stale", "dead", "estop"};
constexpr std::int64_t kSecond = 1'000'000'000;
constexpr std::int64_t kAtRest = kSecond / 20;  // no change for so long
constexpr std::int64_t kToRest = 5 * kSecond;   // it has so long to get there

enum Exit { kOrder = 0, kNoStream = 1, kMisuse = 2, kRefused = 3, kDead = 4 };

struct Arguments {
    std::string name, group, json;
    double seconds = 0.0, wait = 30.0;
    int priority = 80;
    bool stop_when_dead = false;
};

// What the two threads share.
struct Shared {
    std::atomic<bool> stop{false};    // main: bring it to rest and end
    std::atomic<bool> estop{false};   // main: latch the e-stop
    std::atomic<int> status{-1};      // control: of the last command
    std::atomic<bool> ended{false};   // control
};

// What the control thread leaves.
struct Report {
    Exit code = kOrder;
    std::uint64_t ticks = 0, missed = 0, chunks = 0;
    std::array<std::uint64_t, kStatusNames.size()> of_status{};
    Samples late{60'000}, age{60'000};
    std::string refused;  // channel
    double used = 0.0;
    bool fifo = false, locked = false, at_rest = false;
};

bool parse(int count, char** words, Arguments& arguments) {
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        const bool last = i + 1 == count;
        if (word == "--stop-when-dead") {
            arguments.stop_when_dead = true;
        } else if (word.rfind("--", 0) != 0 && arguments.name.empty()) {
            arguments.name = word;
        } else if (last) {
            return false;
        } else if (word == "--group") {
            arguments.group = words[++i];
        } else if (word == "--json") {
            arguments.json = words[++i];
        } else if (word == "--seconds") {
            arguments.seconds = std::atof(words[++i]);
        } else if (word == "--wait") {
            arguments.wait = std::atof(words[++i]);
        } else if (word == "--priority") {
            arguments.priority = std::atoi(words[++i]);
        } else {
            return false;
        }
    }
    return !arguments.name.empty();
}

sigset_t signals() {
    sigset_t set;
    sigemptyset(&set);
    for (const int one : {SIGINT, SIGTERM, SIGUSR1}) sigaddset(&set, one);
    return set;
}

// A signal that came within so long, or -1.
int wait_for_signal(std::int64_t ns) {
    const sigset_t set = signals();
    timespec time{};
    time.tv_nsec = static_cast<long>(ns);
    return sigtimedwait(&set, nullptr, &time);
}

// The stream, tried again until the policy's side has made it; an error where that takes too long, or a signal came.
dit4dit::Result<dit4dit::Reader> open(const Arguments& arguments) {
    dit4dit::Options options;
    options.name = arguments.name.c_str();
    options.driver = true;
    options.group = arguments.group.empty() ? nullptr : arguments.group.c_str();
    const std::int64_t until = dit4dit::monotonic_ns() + static_cast<std::int64_t>(arguments.wait * 1e9);
    std::string said;
    for (;;) {
        dit4dit::Result<dit4dit::Reader> reader = dit4dit::Reader::open(options);
        if (reader) return reader;
        if (reader.error() != said) {
            said = reader.error();
            std::fprintf(stderr, "controller: waiting: %s\n", said.c_str());
        }
        const int signal = wait_for_signal(100'000'000);
        if (signal == SIGINT || signal == SIGTERM || dit4dit::monotonic_ns() >= until) return reader;
    }
}

// One tick after the other until there is a reason to end.
void control(const Arguments& arguments, dit4dit::Reader& reader, Shared& shared, Report& report) {
    Robot robot(reader);
    Guard guard(reader, robot.measured());
    std::array<double, dit4dit::kMaxChannels> command{};
    const std::int64_t period = reader.command_period_ns();
    report.locked = lock_memory();
    report.fifo = request_priority(arguments.priority);

    reader.start_at(robot.measured());  // the limits begin where the robot stands
    const std::int64_t began = dit4dit::monotonic_ns();
    std::int64_t due = began + period, moved = began, stopping = 0;
    std::uint64_t chunk = 0;
    for (;; due += period) {
        sleep_until(due);
        const std::int64_t now = dit4dit::monotonic_ns();
        report.late.add(now - due);
        if (now - due >= period) {  // ticks that are over are not made up for
            const std::int64_t over = (now - due) / period;
            report.missed += static_cast<std::uint64_t>(over);
            due += over * period;
        }

        if (shared.estop.exchange(false, std::memory_order_relaxed)) reader.estop(now);
        const bool time_is_up = arguments.seconds > 0.0 && static_cast<double>(now - began) * 1e-9 >= arguments.seconds;
        if (stopping == 0 && (time_is_up || shared.stop.load(std::memory_order_relaxed))) {
            reader.stop();
            stopping = now;
        }

        const dit4dit::Command read = reader.read(now, command.data());
        ++report.ticks;
        ++report.of_status[static_cast<std::size_t>(read.status)];
        shared.status.store(static_cast<int>(read.status), std::memory_order_relaxed);
        if (read.chunk != chunk) ++report.chunks;
        chunk = read.chunk;

        // Whatever the status, what was read is what to send: the stream's rules have decided what happens without a chunk.
        const int wrong = guard.check(command.data(), now);
        if (wrong >= 0) {
            report.code = kRefused;
            report.refused = guard.name(wrong);
            break;
        }
        robot.send(command.data());

        if (guard.moving()) moved = now;
        const bool at_rest = now - moved >= kAtRest;
        switch (read.status) {
            case Status::ok:         // the policy's rows
            case Status::contended:  // the producer was faster than 4 tries to copy its newest chunk: rows of the one before
                report.age.add(read.age_ns);
                break;
            case Status::dry:    // the chunk has ended: on_dry. Often: the policy is too slow, or its chunks are too short
            case Status::stale:  // the observation is too old: on_stale
            case Status::estop:  // braking or at rest, until somebody clears it
                break;
            case Status::dead:  // on_dead. The next producer may take the stream over: then the status is ok again
                if (arguments.stop_when_dead && at_rest && stopping == 0) {
                    report.code = kDead;
                    stopping = now;
                }
                break;
        }
        if (stopping != 0 && (at_rest || now - stopping >= kToRest)) {
            report.at_rest = at_rest;
            break;
        }
    }
    report.used = guard.used();
    shared.ended.store(true);
}

// Signals and changes of status, until the control thread has ended.
void supervise(Shared& shared) {
    int said = -1;
    while (!shared.ended.load()) {
        const int signal = wait_for_signal(20'000'000);
        if (signal == SIGUSR1) {
            shared.estop.store(true);
        } else if (signal > 0) {
            shared.stop.store(true);
        }
        const int status = shared.status.load(std::memory_order_relaxed);
        if (status != said && status >= 0) std::fprintf(stderr, "controller: %s\n", kStatusNames[static_cast<std::size_t>(status)]);
        said = status;
    }
}

void write_json(const std::string& path, const Report& report, const dit4dit::Reader& reader) {
    std::FILE* file = std::fopen(path.c_str(), "w");
    if (file == nullptr) {
        std::fprintf(stderr, "controller: --json %s: %s\n", path.c_str(), std::strerror(errno));
        return;
    }
    const auto quantiles = [&](const char* name, const Samples& samples) {
        const auto q = samples.quantiles();
        std::fprintf(file, " \"%s\": {\"p50\": %lld, \"p99\": %lld, \"p99.9\": %lld, \"max\": %lld},\n", name, static_cast<long long>(q[0]),
                     static_cast<long long>(q[1]), static_cast<long long>(q[2]), static_cast<long long>(q[3]));
    };
    std::fprintf(file, "{\"robot\": \"%s\", \"channels\": %zu, \"period_ns\": %lld,\n", reader.layout().robot, reader.dims(),
                 static_cast<long long>(reader.command_period_ns()));
    std::fprintf(file, " \"exit_code\": %d, \"refused\": \"%s\", \"at_rest\": %s, \"fifo\": %s, \"memory_locked\": %s,\n", report.code,
                 report.refused.c_str(), report.at_rest ? "true" : "false", report.fifo ? "true" : "false",
                 report.locked ? "true" : "false");
    std::fprintf(file, " \"ticks\": %llu, \"missed\": %llu, \"chunks\": %llu, \"limit_used\": %.9f,\n",
                 static_cast<unsigned long long>(report.ticks), static_cast<unsigned long long>(report.missed),
                 static_cast<unsigned long long>(report.chunks), report.used);
    quantiles("wake_up_late_ns", report.late);
    quantiles("age_ns", report.age);
    std::fprintf(file, " \"status\": {");
    for (std::size_t i = 0; i < kStatusNames.size(); ++i) {
        std::fprintf(file, "%s\"%s\": %llu", i == 0 ? "" : ", ", kStatusNames[i], static_cast<unsigned long long>(report.of_status[i]));
    }
    std::fprintf(file, "}}\n");
    std::fclose(file);
}

void print_summary(const Report& report) {
    const auto late = report.late.quantiles();
    const auto age = report.age.quantiles();
    std::printf("controller: %llu ticks, %llu missed, %llu chunks;", static_cast<unsigned long long>(report.ticks),
                static_cast<unsigned long long>(report.missed), static_cast<unsigned long long>(report.chunks));
    for (std::size_t i = 0; i < kStatusNames.size(); ++i) {
        if (report.of_status[i] != 0) std::printf(" %s %llu", kStatusNames[i], static_cast<unsigned long long>(report.of_status[i]));
    }
    std::printf("; woke up late by %.3f ms (p50), %.3f ms (p99.9); age %.0f ms (p50), %.0f ms (max)%s\n", static_cast<double>(late[0]) * 1e-6,
                static_cast<double>(late[2]) * 1e-6, static_cast<double>(age[0]) * 1e-6, static_cast<double>(age[3]) * 1e-6,
                report.at_rest ? "; at rest" : "");
}

}  // namespace

int main(int count, char** words) {
    Arguments arguments;
    if (!parse(count, words, arguments)) {
        std::fputs(kUsage, stderr);
        return kMisuse;
    }
    // before the other thread begins, which inherits it: signals are for this one alone
    const sigset_t set = signals();
    pthread_sigmask(SIG_BLOCK, &set, nullptr);

    dit4dit::Result<dit4dit::Reader> reader = open(arguments);
    if (!reader) {
        std::fprintf(stderr, "controller: %s\n", reader.error().c_str());
        return kNoStream;
    }
    std::fprintf(stderr, "controller: %s: robot %s, %zu channels, %.0f Hz\n", arguments.name.c_str(), reader->layout().robot, reader->dims(),
                 1e9 / static_cast<double>(reader->command_period_ns()));

    Shared shared;
    Report report;
    std::thread thread([&] { control(arguments, *reader, shared, report); });
    supervise(shared);
    thread.join();

    if (report.code == kRefused) {
        std::fprintf(stderr, "controller: channel %s: the command was outside its limits and was not sent\n", report.refused.c_str());
    }
    print_summary(report);
    if (!arguments.json.empty()) write_json(arguments.json, report, *reader);
    return report.code;
}
