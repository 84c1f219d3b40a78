// A 1 kHz motor controller without Python: it attaches to the stream of a policy as the driver and sends one command per tick.
//
// Two threads. The control thread wakes up once per command period (1 ms where the policy's side says command_hz=1000), reads,
// checks, sends; it makes no system call but its sleep. The main thread waits for signals, says what happens, writes the summary.
#include <pthread.h>
#include <signal.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

#include <dit4dit/action_stream.h>

#include "guard.h"
#include "realtime.h"
#include "report.h"
#include "robot.h"

namespace {

using dit4dit::Status;

constexpr const char* kUsage =
    "usage: controller NAME [--group GROUP] [--seconds S] [--wait S] [--dead-after MS] [--stop-when-dead]\n"
    "                  [--priority P] [--json FILE]\n"
    "  NAME              of the stream, such as /dit4dit.g1: shared=... of ActionStream on the policy's side\n"
    "  --group GROUP     drive one group of channels alone\n"
    "  --seconds S       end after so long; 0: at a signal\n"
    "  --wait S          for the policy's side to be there; 30\n"
    "  --dead-after MS   the policy's process counts as dead after so long without a sign of life; 50\n"
    "  --stop-when-dead  end when the policy's process is dead and the robot is at rest; without: wait for the next one\n"
    "  --priority P      of SCHED_FIFO, 1 to 99; 80\n"
    "  --json FILE       write the summary\n"
    "SIGINT, SIGTERM: bring the robot to rest, then end. SIGUSR1: latch the e-stop.\n"
    "exit code: 0 ended in order; 1 no stream; 2 usage; 3 a command was outside the limits and was not sent;\n"
    "  4 with --stop-when-dead, the policy's process died and the robot is at rest\n";
constexpr std::int64_t kAtRest = 50'000'000;      // ns without a change
constexpr std::int64_t kToRest = 5'000'000'000;  // ns that it has to get there

struct Arguments {
    std::string name, group, json;
    double seconds = 0.0, wait = 30.0, dead_after_ms = 50.0;
    int priority = 80;
    bool stop_when_dead = false;
};

bool parse(int count, char** words, Arguments& arguments) {
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        if (word == "--stop-when-dead") {
            arguments.stop_when_dead = true;
            continue;
        }
        if (word.rfind("--", 0) != 0 && arguments.name.empty()) {
            arguments.name = word;
            continue;
        }
        if (i + 1 == count) return false;
        const char* value = words[++i];
        if (word == "--group") arguments.group = value;
        else if (word == "--json") arguments.json = value;
        else if (word == "--seconds") arguments.seconds = std::atof(value);
        else if (word == "--wait") arguments.wait = std::atof(value);
        else if (word == "--dead-after") arguments.dead_after_ms = std::atof(value);
        else if (word == "--priority") arguments.priority = std::atoi(value);
        else return false;
    }
    return !arguments.name.empty();
}

sigset_t signals() {
    sigset_t set;
    sigemptyset(&set);
    for (const int one : {SIGINT, SIGTERM, SIGUSR1}) sigaddset(&set, one);
    return set;
}

// A signal that came within so many ms, or -1.
int wait_for_signal(long ms) {
    const sigset_t set = signals();
    timespec time{};
    time.tv_nsec = ms * 1'000'000;
    return sigtimedwait(&set, nullptr, &time);
}

// The stream, tried again until the policy's side has made it; an error where that takes too long, or a signal came.
dit4dit::Result<dit4dit::Reader> open(const Arguments& arguments) {
    dit4dit::Options options;
    options.name = arguments.name.c_str();
    options.driver = true;
    options.dead_after_ns = static_cast<std::int64_t>(arguments.dead_after_ms * 1e6);
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
        const int signal = wait_for_signal(100);
        if (signal == SIGINT || signal == SIGTERM || dit4dit::monotonic_ns() >= until) return reader;
    }
}

class Controller {
 public:
    Controller(const Arguments& arguments, dit4dit::Reader& reader)
        : arguments_(arguments), reader_(reader), robot_(reader), guard_(reader, robot_.measured()) {}

    // The control thread: one tick after the other until there is a reason to end.
    void run() {
        report_.locked = lock_memory();
        report_.fifo = request_priority(arguments_.priority);
        reader_.start_at(robot_.measured());  // the limits begin where the robot stands
        began_ = moved_ = dit4dit::monotonic_ns();
        const std::int64_t period = reader_.command_period_ns();
        for (std::int64_t due = began_ + period;; due += period) {
            sleep_until(due);
            const std::int64_t now = dit4dit::monotonic_ns();
            report_.late_ns.add(now - due);
            if (const std::int64_t over = (now - due) / period; over > 0) {  // ticks that are over are not made up for
                report_.missed += static_cast<std::uint64_t>(over);
                due += over * period;
            }
            if (!tick(now)) break;
        }
        report_.limit_used = guard_.used();
        ended_.store(true);
    }

    // The main thread: signals and changes of status, until the control thread has ended.
    void supervise() {
        for (int said = -1; !ended_.load();) {
            const int signal = wait_for_signal(20);
            if (signal == SIGUSR1) estop_.store(true);
            else if (signal > 0) stop_.store(true);
            const int status = status_.load();
            if (status != said) std::fprintf(stderr, "controller: %s\n", dit4dit::name_of(static_cast<Status>(status)));
            said = status;
        }
    }

    // For when the control thread has ended.
    const Report& report() const noexcept { return report_; }

 private:
    // False: it was the last one.
    bool tick(std::int64_t now) noexcept {
        if (estop_.exchange(false)) reader_.estop(now);
        const bool over = arguments_.seconds > 0.0 && static_cast<double>(now - began_) * 1e-9 >= arguments_.seconds;
        if (stopping_ == 0 && (over || stop_.load())) {
            reader_.stop();
            stopping_ = now;
        }

        const dit4dit::Command read = reader_.read(now, command_.data());
        // whatever the status, this is what to send: the stream's rules have decided what happens without a chunk
        if (const int wrong = guard_.check(command_.data(), now); wrong >= 0) {
            report_.code = kRefused;
            report_.refused = guard_.name(wrong);
            return false;
        }
        robot_.send(command_.data());
        note(read);

        if (guard_.moving()) moved_ = now;
        const bool at_rest = now - moved_ >= kAtRest;
        // under on_dead: finish there may be rows left that the robot waits for
        const bool ended = read.status == Status::dead && read.row < 0;
        if (ended && arguments_.stop_when_dead && at_rest && stopping_ == 0) {
            report_.code = kDead;
            stopping_ = now;
        }
        report_.at_rest = at_rest;
        return stopping_ == 0 || !(at_rest || now - stopping_ >= kToRest);
    }

    void note(const dit4dit::Command& read) noexcept {
        ++report_.ticks;
        ++report_.of_status[static_cast<std::size_t>(read.status)];
        if (read.chunk != chunk_) ++report_.chunks;
        chunk_ = read.chunk;
        status_.store(static_cast<int>(read.status));
        switch (read.status) {
            case Status::ok:         // the policy's rows
            case Status::contended:  // the same, of the chunk before: 4 tries to copy the newest one have failed
                report_.age_ns.add(read.age_ns);
                break;
            case Status::dry:    // the chunk has ended: on_dry. Often: the policy is too slow, or its chunks are too short
            case Status::stale:  // its observation is too old: on_stale
            case Status::dead:   // on_dead. The next producer may take the stream over, and it is ok again
            case Status::estop:  // it brakes and stays, until somebody clears it; also after our own stop()
                break;
        }
    }

    const Arguments& arguments_;
    dit4dit::Reader& reader_;
    Robot robot_;
    Guard guard_;
    Report report_;
    std::array<double, dit4dit::kMaxChannels> command_{};
    std::int64_t began_ = 0, moved_ = 0, stopping_ = 0;
    std::uint64_t chunk_ = 0;

    // what the two threads share
    std::atomic<bool> stop_{false}, estop_{false}, ended_{false};
    std::atomic<int> status_{static_cast<int>(Status::dry)};
};

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
    std::fprintf(stderr, "controller: %s: robot %s, %zu channels, %.0f Hz\n", arguments.name.c_str(), reader->layout().robot,
                 reader->dims(), 1e9 / static_cast<double>(reader->command_period_ns()));

    Controller controller(arguments, *reader);
    std::thread thread([&] { controller.run(); });
    controller.supervise();
    thread.join();

    const Report& report = controller.report();
    if (report.code == kRefused) {
        std::fprintf(stderr, "controller: %s: a command was outside the limits and was not sent\n", report.refused.c_str());
    }
    print(report);
    if (!arguments.json.empty() && !write_json(arguments.json, report, *reader)) return kMisuse;
    return report.code;
}
