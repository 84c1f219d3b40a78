// One process of a stream, for tests that start, stop and kill several.
//
//   ring_tool open NAME watch|use       whether it can be opened
//   ring_tool create NAME [LAYOUT]      makes it (or takes it over), publishes three chunks and closes in order
//   ring_tool produce NAME [LAYOUT]     publishes 1000 times a second until its input has something or ends
//   ring_tool drive NAME                holds the driver's lock, with feedback, until its input ends
//   ring_tool fork NAME                 produces, with a forked child that tries to as well; both wait for their input to end
//   ring_tool dead NAME AFTER           whether a reader that is AFTER - 1, then AFTER, past the producer's stamp calls it dead
//   ring_tool remove NAME
//
// LAYOUT: arms (default), base (another robot), long (arms with 24 channels). Each prints lines; "error: ..." is the last one
// of a failure, exit code 1.
#include <chrono>
#include <iostream>
#include <thread>
#include <vector>

#include <poll.h>

#include <dit4dit/writer.h>

#include "ring_case.h"

using namespace dit4dit;

namespace {

int failed(const std::string& text) {
    std::printf("error: %s\n", text.c_str());
    return 1;
}

void say(const char* text, unsigned long long number) {
    std::printf("%s %llu\n", text, number);
    std::fflush(stdout);
}

Layout layout_of(const std::string& name) {
    Layout layout = ring_case::layout(name == "long" ? 24 : 23);
    if (name == "base") std::strcpy(layout.robot, "another");
    return layout;
}

bool publish_next(Writer& writer) {
    std::vector<float> values(kMaxRows * kMaxChannels);
    const std::uint64_t id = head(writer.memory()->segment()) + 1;
    const int channels = static_cast<int>(writer.layout().channels);
    const Refusal refusal = writer.publish(ring_case::chunk(id, 4, channels, values.data()), monotonic_ns());
    if (refusal) failed(refusal.text());
    return !refusal;
}

bool input_waits() {
    pollfd input{0, POLLIN, 0};
    return poll(&input, 1, 0) > 0;
}

int open(const std::string& name, const std::string& how) {
    auto memory = Memory::open(name, how == "watch" ? Access::watch : Access::use);
    if (!memory) return failed(memory.error());
    const Stamps& stamps = (*memory)->segment().header.stamps;
    say("head", head((*memory)->segment()));
    say("producer", stamps.producer.load());
    say("producers", stamps.producers.load());
    say("closed", stamps.closed_at.load() != 0);
    say("producer_locked", (*memory)->locked(Role::producer));
    say("driver_locked", (*memory)->locked(Role::driver));
    return 0;
}

int produce(const std::string& name, const std::string& layout, bool go_on) {
    Result<Writer> writer = Writer::open_or_create(name, layout_of(layout));
    if (!writer) return failed(writer.error());
    for (int i = 0; i < 3; ++i)
        if (!publish_next(*writer)) return 1;
    say("ready", head(writer->memory()->segment()));
    while (go_on && !input_waits()) {
        if (!publish_next(*writer)) return 1;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return 0;
}

int drive(const std::string& name) {
    auto memory = Memory::open(name, Access::use);
    if (!memory) return failed(memory.error());
    if (!(*memory)->lock(Role::driver)) return failed("the driver's lock is taken");
    DriverFeedback sent;
    sent.driver = static_cast<std::uint64_t>(getpid());
    std::memset(sent.values, 0, sizeof sent.values);
    write_feedback((*memory)->writable(), sent);
    say("ready", sent.driver);
    std::string line;
    std::getline(std::cin, line);
    return 0;
}

// What a child of the producer's process can do to the stream: nothing.
void be_child(Writer& writer, Writer& own) {
    float values[23] = {};
    const Refusal refusal = writer.publish({1, 1, 1, 20, 1, 23, values}, monotonic_ns());
    std::printf("child: %s\n", refusal.text().c_str());
    const std::int64_t loop_at = writer.memory()->segment().header.stamps.loop_at.load();
    writer.heartbeat(1);
    const bool quiet = writer.memory()->segment().header.stamps.loop_at.load() >= loop_at;
    writer.close(1);
    const bool closed = writer.memory()->segment().header.stamps.closed_at.load() != 0;
    // memory of one process is the child's own
    const bool works = !own.publish({1, 1, 1, 20, 1, 23, values}, monotonic_ns());
    std::printf("child: %d %d %d %d %d\n", quiet, closed, works, writer.memory()->lock(Role::driver),
                writer.memory()->locked(Role::producer));
    const std::string name = writer.memory()->name();
    const bool removed = static_cast<bool>(Writer::remove(name));
    auto again = Writer::open_or_create(name, layout_of("arms"));
    std::printf("child: %d %s\n", removed, again.error().c_str());
}

int fork_one(const std::string& name) {
    Result<Writer> writer = Writer::open_or_create(name, layout_of("arms"));
    Result<Writer> own = Writer::in_process(layout_of("arms"));
    if (!writer || !own) return failed(writer.error() + own.error());
    publish_next(*writer);
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        { Writer gone = std::move(*writer); be_child(gone, *own); }
        say("child: ready", 0);
    } else {
        say("parent: child", static_cast<unsigned long long>(child));
    }
    std::string line;
    std::getline(std::cin, line);
    return 0;
}

int dead(const std::string& name, std::int64_t after) {
    auto memory = Memory::open(name, Access::watch);
    if (!memory) return failed(memory.error());
    const Segment& segment = (*memory)->segment();
    const std::int64_t stamp = segment.header.stamps.alive_at.load();
    say("just before", producer_dead(segment, stamp + after - 1, after));
    say("at", producer_dead(segment, stamp + after, after));
    say("by the clock", producer_dead(segment, monotonic_ns(), after));
    return 0;
}

int remove(const std::string& name) {
    const Result<bool> removed = Writer::remove(name);
    return removed ? 0 : failed(removed.error());
}

}  // namespace

int main(int count, char** arguments) {
    const std::string what = count > 2 ? arguments[1] : "", name = count > 2 ? arguments[2] : "";
    const std::string more = count > 3 ? arguments[3] : "arms";
    if (what == "open") return open(name, more);
    if (what == "create") return produce(name, more, false);
    if (what == "produce") return produce(name, more, true);
    if (what == "drive") return drive(name);
    if (what == "fork") return fork_one(name);
    if (what == "dead") return dead(name, std::atoll(more.c_str()));
    if (what == "remove") return remove(name);
    return failed("unknown: " + what);
}
