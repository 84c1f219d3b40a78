// reader_live NAME: a producer that publishes as fast as it can and a reader, in two threads, over a segment of that name.
// Chunk n says n in all its rows and channels, so every command that says two things, or not its chunk, is torn.
#include <dit4dit/action_stream.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <thread>

using namespace dit4dit;

int main(int count, char** given) {
    if (count < 2) return 2;
    Layout layout{};
    std::strcpy(layout.robot, "robot");
    std::strcpy(layout.group[0].name, "all");
    layout.channels = kMaxChannels, layout.groups = 1, layout.command_period_ns = 1'000'000;
    layout.seam.rows = 1;
    for (int i = 0; i < kMaxChannels; ++i) std::snprintf(layout.channel[i].name, sizeof layout.channel[i].name, "channel%d", i);
    auto writer = Writer::open_or_create(given[1], layout);
    if (!writer) return std::printf("%s\n", writer.error().c_str()), 1;
    auto reader = Reader::open({given[1], true});
    if (!reader) return std::printf("%s\n", reader.error().c_str()), 1;

    std::atomic<bool> ends{false};
    std::thread producer([&] {
        static float values[kMaxRows * kMaxChannels];
        for (std::int64_t n = 1; !ends.load(std::memory_order_relaxed); ++n) {
            for (float& value : values) value = static_cast<float>(n);
            writer->publish({n, n, n, 0.02, kMaxRows, kMaxChannels, values}, n);
        }
    });
    std::uint64_t last = 0;
    int torn = 0, fresh = 0;
    double values[kMaxChannels];
    // time is such that each chunk has begun when it is there
    for (int tick = 1; fresh < 5000; ++tick) {
        const Command command = reader->read(tick * 1'000'000ll, values);
        fresh += command.chunk != last;
        if (command.chunk == 0) continue;
        for (const double value : values) torn += value != static_cast<float>(command.chunk);
        if (command.chunk < last) ++torn;
        last = command.chunk;
    }
    ends = true;
    producer.join();
    if (torn) return std::printf("%d values are torn\n", torn), 1;
}
