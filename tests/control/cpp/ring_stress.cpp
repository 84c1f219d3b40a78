// Readers against a producer: reads that were torn, older than the head on entry, tried too often, or given up.
//
//   ring_stress --reads 100000000 --readers 4 --hz 1000 --rows 2 --channels 23 [--published 200]
//       [--behind 15] [--processes 1] [--one-mapping 1] [--time 1]
//
// hz 0: the producer writes all the time. published: readers go on until there are so many chunks. behind: chunks that far
// behind the head are copied, not the newest; 15 is the next to be overwritten, so that it often is, and is gone then.
// processes: each reader is a process of its own. one-mapping: readers look at the producer's own mapping, for ThreadSanitizer.
// time: the first reader times its reads. Prints one line of JSON.
#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#include <sys/mman.h>
#include <sys/wait.h>
#if defined(__x86_64__)
#include <x86intrin.h>
#endif

#include <dit4dit/writer.h>

#include "ring_case.h"

using namespace dit4dit;

struct Tally {
    std::uint64_t reads, torn, older, none, contended, gone, tries[kMostTries + 1], beyond, ids;
};

struct Settings {
    std::uint64_t reads, published;
    int readers, rows, channels, first, count, behind;
    double hz;
    bool processes, one_mapping, time;
};

static std::uint64_t ticks() {
#if defined(__x86_64__)
    unsigned aux;
    return __rdtscp(&aux);
#else
    return static_cast<std::uint64_t>(monotonic_ns());
#endif
}

// One try for the chunk that is `behind` the head at `newest`.
static Read copy_older(const Segment& segment, HeldChunk& held, int behind, std::uint64_t& newest, Tally& tally) {
    newest = newest > static_cast<std::uint64_t>(behind) ? newest - static_cast<std::uint64_t>(behind) : 1;
    if (copy(segment, newest, held)) {
        tally.older += held.id != newest;
        return {Found::whole, 1};
    }
    ++tally.gone;
    tally.older += held.id != 0;  // garbage must say so
    return {Found::none, 1};
}

template <bool timed, bool behind>
static void read_all(const Segment& segment, const Settings& set, Tally& result, std::vector<std::uint32_t>& times) {
    Tally tally{};
    HeldChunk held;
    std::uint64_t last = 0;
    const std::uint64_t reads = set.reads / static_cast<std::uint64_t>(set.readers);
    std::uint64_t before = head(segment);
    for (; tally.reads < reads || before < set.published; ++tally.reads) {
        before = head(segment);
        [[maybe_unused]] std::uint64_t begin = 0;
        if constexpr (timed) begin = ticks();
        std::uint64_t wanted = before;
        const Read read = behind ? copy_older(segment, held, set.behind, wanted, tally)
                                 : copy_newest(segment, held, set.first, set.count);
        if constexpr (timed) times.push_back(static_cast<std::uint32_t>(ticks() - begin));
        ++(read.tries >= 1 && read.tries <= kMostTries ? tally.tries[read.tries] : tally.beyond);
        if (read.found == Found::whole) {
            tally.torn += !ring_case::whole(held, set.rows, set.channels, set.first, set.count);
            tally.older += held.id < wanted || held.id < last;
            tally.ids += held.id != last;
            last = held.id;
        } else {
            tally.none += !behind && read.found == Found::none;
            tally.contended += read.found == Found::contended;
        }
    }
    result = tally;
}

static void publish_one(Writer& writer, const Settings& set) {
    static std::vector<float> values(kMaxRows * kMaxChannels);
    const std::uint64_t id = head(writer.memory()->segment()) + 1;
    const Chunk chunk = ring_case::chunk(id, set.rows, set.channels, values.data());
    if (const Refusal refusal = writer.publish(chunk, ring_case::published(id))) {
        std::fprintf(stderr, "%s\n", refusal.text().c_str());
        std::abort();
    }
}

static void publish_until(Writer& writer, const Settings& set, const std::atomic<bool>& done) {
    while (!done.load(std::memory_order_relaxed)) {
        publish_one(writer, set);
        if (set.hz > 0) std::this_thread::sleep_for(std::chrono::duration<double>(1 / set.hz));
    }
}

// [readers] tallies that processes share.
static Tally* shared_tallies(int readers) {
    void* memory = mmap(nullptr, sizeof(Tally) * static_cast<std::size_t>(readers), PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? nullptr : static_cast<Tally*>(memory);
}

static void run_readers(const std::string& name, Writer& writer, const Settings& set, Tally* tallies,
                        std::vector<std::uint32_t>& times) {
    const auto reader = [&](int i) {
        std::shared_ptr<Memory> memory = writer.memory();
        if (!set.one_mapping) {
            auto opened = Memory::open(name, Access::watch);
            if (!opened) {
                std::fprintf(stderr, "%s\n", opened.error().c_str());
                std::abort();
            }
            memory = *opened;
        }
        std::vector<std::uint32_t> unused;
        if (set.time && i == 0)
            read_all<true, false>(memory->segment(), set, tallies[i], times);
        else if (set.behind)
            read_all<false, true>(memory->segment(), set, tallies[i], unused);
        else
            read_all<false, false>(memory->segment(), set, tallies[i], unused);
    };
    std::vector<std::thread> threads;
    std::vector<pid_t> processes;
    for (int i = 0; i < set.readers; ++i) {
        if (!set.processes) {
            threads.emplace_back(reader, i);
            continue;
        }
        const pid_t child = fork();
        if (child == 0) {
            reader(i);
            _exit(0);
        }
        processes.push_back(child);
    }
    for (std::thread& thread : threads) thread.join();
    for (const pid_t child : processes) {
        int status = 0;
        waitpid(child, &status, 0);
        if (status != 0) tallies[0].beyond += 1;  // it has crashed
    }
}

// ns of a tick, and of timing nothing.
static void report_times(std::vector<std::uint32_t> times) {
    if (times.empty()) return;
    const std::int64_t began = monotonic_ns();
    const std::uint64_t first = ticks();
    std::uint64_t empty = ~std::uint64_t{0};
    while (monotonic_ns() - began < 50'000'000) {
        const std::uint64_t one = ticks();
        empty = std::min(empty, ticks() - one);
    }
    const double ns = static_cast<double>(monotonic_ns() - began) / static_cast<double>(ticks() - first);
    std::sort(times.begin(), times.end());
    const auto at = [&](double part) {
        const double value = times[static_cast<std::size_t>(part * static_cast<double>(times.size() - 1))];
        return std::max(0.0, (value - static_cast<double>(empty)) * ns);
    };
    std::printf("\"p50_ns\": %.1f, \"p99_ns\": %.1f, \"p999_ns\": %.1f, ", at(0.5), at(0.99), at(0.999));
}

int main(int count, char** arguments) {
    const auto number = [&](const char* name, double otherwise) {
        return ring_case::argument(count, arguments, name, otherwise);
    };
    Settings set{};
    set.reads = static_cast<std::uint64_t>(number("--reads", 1e6));
    set.published = static_cast<std::uint64_t>(number("--published", 0));
    set.readers = static_cast<int>(number("--readers", 4));
    set.rows = static_cast<int>(number("--rows", 2));
    set.channels = static_cast<int>(number("--channels", 23));
    set.first = static_cast<int>(number("--first", 0));
    set.count = static_cast<int>(number("--count", kMaxRows));
    set.behind = static_cast<int>(number("--behind", 0));
    set.hz = number("--hz", 1000);
    set.processes = number("--processes", 0) != 0;
    set.one_mapping = number("--one-mapping", 0) != 0;
    set.time = number("--time", 0) != 0;

    const std::string name = ring_case::word(count, arguments, "--name", "/dit4dit.test.stress");
    Result<Writer> writer = Writer::open_or_create(name, ring_case::layout(set.channels));
    Tally* tallies = shared_tallies(set.readers);
    if (!writer || !tallies) {
        std::fprintf(stderr, "%s\n", writer.error().c_str());
        return 1;
    }
    std::vector<std::uint32_t> times;
    if (set.time) times.reserve(set.reads);
    std::atomic<bool> done{false};
    publish_one(*writer, set);
    std::thread producer([&] { publish_until(*writer, set, done); });
    run_readers(name, *writer, set, tallies, times);
    done.store(true);
    producer.join();

    Tally sum{};
    for (int i = 0; i < set.readers; ++i) {
        const Tally& one = tallies[i];
        sum.reads += one.reads, sum.torn += one.torn, sum.older += one.older, sum.none += one.none, sum.ids += one.ids;
        sum.contended += one.contended, sum.gone += one.gone, sum.beyond += one.beyond;
        for (int k = 1; k <= kMostTries; ++k) sum.tries[k] += one.tries[k];
    }
    std::printf("{");
    report_times(times);
    using Number = unsigned long long;
    std::printf("\"reads\": %llu, \"torn\": %llu, \"older\": %llu, \"none\": %llu, \"contended\": %llu, \"gone\": %llu, "
                "\"ids\": %llu, \"beyond\": %llu, \"tries\": [%llu, %llu, %llu, %llu], \"published\": %llu}\n",
                Number{sum.reads}, Number{sum.torn}, Number{sum.older}, Number{sum.none}, Number{sum.contended}, Number{sum.gone},
                Number{sum.ids}, Number{sum.beyond}, Number{sum.tries[1]}, Number{sum.tries[2]}, Number{sum.tries[3]},
                Number{sum.tries[4]}, Number{head(writer->memory()->segment())});
    writer->close(monotonic_ns());
    Writer::remove(name);
    return 0;
}
