// A producer that writes all the time is killed at random moments, again and again, while a reader reads: ring_kill NAME KILLS
// SEED
//
// Prints one line of JSON. Between two kills a second live producer is tried and must be refused with the pid of the first;
// with the producer dead, every read must succeed at once.
#include <chrono>
#include <random>
#include <thread>
#include <vector>

#include <signal.h>
#include <sys/wait.h>
#include <time.h>

#include <dit4dit/writer.h>

#include "ring_case.h"

using namespace dit4dit;

namespace {

constexpr int kRows = 16, kChannels = 33;

struct Tally {
    unsigned long long reads = 0, torn = 0, older = 0, contended = 0, beyond = 0;
    unsigned long long inside = 0, not_refused = 0, lost = 0, not_dead = 0, idle_failed = 0, published = 0;
};

void read_once(const Segment& segment, std::uint64_t& last, Tally& tally) {
    HeldChunk held;
    const std::uint64_t before = head(segment);
    const Read read = copy_newest(segment, held);
    ++tally.reads;
    tally.beyond += read.tries > 4;
    tally.contended += read.found == Found::contended;
    if (read.found != Found::whole) return;
    tally.torn += !ring_case::whole(held, kRows, kChannels, 0, kRows);
    tally.older += held.id < before || held.id < last;
    last = held.id;
}

// Never returns.
[[noreturn]] void produce(const std::string& name) {
    Result<Writer> writer = Writer::open_or_create(name, ring_case::layout(kChannels));
    if (!writer) {
        std::fprintf(stderr, "%s\n", writer.error().c_str());
        _exit(1);
    }
    // without the checks of Writer::publish: about half the time is spent inside a write
    std::vector<float> values(kRows * kChannels);
    Segment& segment = writer->memory()->writable();
    for (;;) {
        const std::uint64_t id = head(segment) + 1;
        publish(segment, ring_case::chunk(id, kRows, kChannels, values.data()), ring_case::published(id));
    }
}

pid_t start(const std::string& name) {
    const pid_t child = fork();
    if (child == 0) produce(name);
    return child;
}

// A process that dies after_ns after it begins to open the segment: a timer of its own, so that a machine that is busy
// elsewhere does not decide when.
void begin_and_die(const std::string& name, const Layout& layout, long after_ns) {
    const pid_t child = fork();
    if (child == 0) {
        timer_t timer;
        sigevent event{};
        event.sigev_notify = SIGEV_SIGNAL;
        event.sigev_signo = SIGKILL;
        timer_create(CLOCK_MONOTONIC, &event, &timer);
        const itimerspec once{{0, 0}, {0, after_ns}};
        timer_settime(timer, 0, &once, nullptr);
        const Result<Writer> writer = Writer::open_or_create(name, layout);
        for (;;) pause();
    }
    waitpid(child, nullptr, 0);
}

// Leaves a complete segment or none, whose lock is free, and the next producer begins on it.
int kill_while_they_begin(const std::string& name, int rounds, unsigned seed) {
    std::mt19937 random(seed);
    const Layout layouts[] = {ring_case::layout(kChannels), ring_case::layout(kChannels + 1)};
    unsigned long long there = 0, absent = 0, replaced = 0, wrong = 0;
    for (int i = 0; i < rounds * 20 && (i < rounds || there < 10 || absent < 10); ++i) {
        if (i % 3 == 0) Writer::remove(name);
        const auto before = Memory::open(name, Access::watch);
        const Layout& layout = layouts[random() % 2];
        begin_and_die(name, layout, 1 + static_cast<long>(random() % 500'000));
        const auto after = Memory::open(name, Access::watch);
        ++(after ? there : absent);
        if (after) {
            const std::string other = difference((*after)->layout(), layout);
            replaced += before && !difference((*before)->layout(), (*after)->layout()).empty();
            wrong += (*after)->locked(Role::producer) || (!before && !other.empty());
        } else {
            wrong += after.error().find("there is no such segment") == std::string::npos;
        }
        if (i % 5 == 0) wrong += !Writer::open_or_create(name, layout);
    }
    std::printf("{\"there\": %llu, \"absent\": %llu, \"replaced\": %llu, \"wrong\": %llu}\n", there, absent, replaced, wrong);
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    const auto seed = static_cast<unsigned>(std::atoi(arguments[count - 1]));
    if (count == 5) return kill_while_they_begin(arguments[1], std::atoi(arguments[3]), seed);
    if (count != 4) return 2;
    const std::string name = arguments[1];
    const int kills = std::atoi(arguments[2]);
    std::mt19937 random(seed);
    Tally tally;
    {
        Result<Writer> made = Writer::open_or_create(name, ring_case::layout(kChannels));
        if (!made) return 1;
        std::vector<float> values(kRows * kChannels);
        made->publish(ring_case::chunk(1, kRows, kChannels, values.data()), ring_case::published(1));
        made->close(monotonic_ns());
    }
    auto memory = Memory::open(name, Access::watch);
    if (!memory) return 1;
    const Segment& segment = (*memory)->segment();
    std::uint64_t last = 0;
    for (int i = 0; i < kills; ++i) {
        const std::uint64_t began = head(segment);
        const pid_t producer = start(name);
        // it has taken over once the ids go on; a producer that cannot ends by itself
        while (head(segment) == began && waitpid(producer, nullptr, WNOHANG) == 0) read_once(segment, last, tally);
        const Result<Writer> second = Writer::open_or_create(name, ring_case::layout(kChannels));
        tally.not_refused += second || second.error().find("process " + std::to_string(producer) + " ") == std::string::npos;
        const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(100 + random() % 5000);
        while (std::chrono::steady_clock::now() < until) read_once(segment, last, tally);
        kill(producer, SIGKILL);
        waitpid(producer, nullptr, 0);

        const std::uint64_t ended = head(segment);
        tally.published += ended - began;
        tally.lost += ended == began;
        tally.inside += segment.slot[ended % kSlots].sequence.load() == 2 * (ended + 1) - 1;
        tally.not_dead += (*memory)->locked(Role::producer) ||
                          !producer_dead(segment, segment.header.stamps.alive_at.load() + 50, 50);
        for (int k = 0; k < 1000; ++k) {
            HeldChunk held;
            const Read read = copy_newest(segment, held);
            tally.idle_failed += read.found != Found::whole || read.tries != 1 || held.id != ended ||
                                 !ring_case::whole(held, kRows, kChannels, 0, kRows);
        }
    }
    std::printf("{\"reads\": %llu, \"torn\": %llu, \"older\": %llu, \"contended\": %llu, \"beyond\": %llu, \"inside\": %llu, "
                "\"not_refused\": %llu, \"lost\": %llu, \"not_dead\": %llu, \"idle_failed\": %llu, \"published\": %llu}\n",
                tally.reads, tally.torn, tally.older, tally.contended, tally.beyond, tally.inside, tally.not_refused, tally.lost,
                tally.not_dead, tally.idle_failed, tally.published);
    Writer::remove(name);
    return 0;
}
