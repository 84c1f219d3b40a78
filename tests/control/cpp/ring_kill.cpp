// A producer that writes all the time is killed at random moments, again and again, while a reader reads: ring_kill NAME KILLS
// SEED
//
// Prints one line of JSON. Between two kills a second live producer is tried and must be refused with the pid of the first;
// with the producer dead, every read must succeed at once.
#include <chrono>
#include <random>
#include <thread>
#include <vector>

#include <sys/wait.h>

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

}  // namespace

int main(int count, char** arguments) {
    if (count != 4) return 2;
    const std::string name = arguments[1];
    const int kills = std::atoi(arguments[2]);
    std::mt19937 random(static_cast<unsigned>(std::atoi(arguments[3])));
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
