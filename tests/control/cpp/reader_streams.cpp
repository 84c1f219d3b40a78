// Reads streams as tests/helpers/stream_programs.py writes them (stdin), runs a Writer and a Reader for each, and writes what was
// commanded (stdout): chunk, row, status, age_ns as int64, then the reader's channels as float64, for each read.
#include <dit4dit/action_stream.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

using namespace dit4dit;

enum Event : std::int64_t { kLatch = 1, kClear = 2, kStart = 4, kStop = 8, kHeartbeat = 16 };

struct Sizes {
    std::int64_t streams, chunks, rows, ticks;
};
struct Stream {
    Layout layout;
    std::int64_t created_at, loop_dead_after_ns, group;  // -1: all groups
    double pose[kMaxChannels];
};
struct Sent {
    std::int64_t observed_at, computed_at, starts_at, published_at;
    double control_hz;
    std::int64_t rows;
};
struct Tick {
    std::int64_t now, events;
};

template <class T>
void get(T* out, std::size_t count) {
    if (std::fread(out, sizeof(T), count, stdin) != count) std::exit(2);
}
template <class T>
void put(const T* values, std::size_t count) {
    if (std::fwrite(values, sizeof(T), count, stdout) != count) std::exit(3);
}
void fail(const std::string& text) {
    std::fprintf(stderr, "%s\n", text.c_str());
    std::exit(1);
}

void run(const Sizes& sizes) {
    Stream stream;
    get(&stream, 1);
    const std::size_t width = stream.layout.channels, size = static_cast<std::size_t>(sizes.rows) * width;
    std::vector<Sent> sent(static_cast<std::size_t>(sizes.chunks));
    std::vector<float> values(sent.size() * size);
    std::vector<Tick> ticks(static_cast<std::size_t>(sizes.ticks));
    get(sent.data(), sent.size());
    get(values.data(), values.size());
    get(ticks.data(), ticks.size());

    auto writer = Writer::in_process(stream.layout);
    if (!writer) fail(writer.error());
    // its clock is the one of the ticks
    stamp_loop(writer->memory()->writable(), stream.created_at);
    Options options{"", true};
    options.loop_dead_after_ns = stream.loop_dead_after_ns;
    if (stream.group >= 0) options.group = stream.layout.group[stream.group].name;
    auto reader = Reader::of(writer->memory(), options);
    if (!reader) fail(reader.error());
    double pose[kMaxChannels];
    for (std::size_t i = 0; i < reader->dims(); ++i) pose[i] = stream.pose[reader->channel(static_cast<int>(i))];

    std::size_t next = 0;
    for (const Tick& tick : ticks) {
        for (; next < sent.size() && sent[next].published_at <= tick.now; ++next) {
            const Sent& s = sent[next];
            const Chunk chunk{s.observed_at, s.computed_at, s.starts_at, s.control_hz, static_cast<std::int32_t>(s.rows),
                              static_cast<std::int32_t>(width), values.data() + next * size};
            if (const auto refusal = writer->publish(chunk, s.published_at)) fail(refusal.text());
        }
        if (tick.events & kHeartbeat) writer->heartbeat(tick.now);
        if (tick.events & kLatch) reader->estop(tick.now);
        if (tick.events & kClear) reader->clear_estop();
        if (tick.events & kStart) reader->start_at(pose);
        if (tick.events & kStop) reader->stop();
        double out[kMaxChannels];
        const Command command = reader->read(tick.now, out);
        const std::int64_t facts[4] = {static_cast<std::int64_t>(command.chunk), command.row,
                                       static_cast<std::int64_t>(command.status), command.age_ns};
        put(facts, 4);
        put(out, reader->dims());
    }
}

}  // namespace

int main() {
    Sizes sizes;
    get(&sizes, 1);
    for (std::int64_t i = 0; i < sizes.streams; ++i) run(sizes);
}
