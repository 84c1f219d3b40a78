// What tests/control/test_reader.py cannot see from outside: reader_checks CHECK [NAME OF A SEGMENT]. Says the first thing that
// is wrong and exits with 1.
#include <dit4dit/action_stream.h>

#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#define CHECK(true_, ...)                                                  \
    do {                                                                   \
        if (!(true_)) {                                                    \
            std::printf("line %d: %s: ", __LINE__, #true_);                \
            std::printf(__VA_ARGS__);                                      \
            std::printf("\n");                                             \
            std::exit(1);                                                  \
        }                                                                  \
    } while (0)

// -- every allocation is counted -------------------------------------------------------------------

namespace {
std::size_t allocations = 0;
}
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* malloc(std::size_t size) { return ++allocations, __libc_malloc(size); }
void* calloc(std::size_t count, std::size_t size) { return ++allocations, __libc_calloc(count, size); }
void* realloc(void* old, std::size_t size) { return ++allocations, __libc_realloc(old, size); }
}

namespace {

using namespace dit4dit;

constexpr std::int64_t kMs = 1'000'000, kBegin = 1'000'000 * kMs;

// As many channels as a G1 in two groups, kinds in turn, all but the last with limits.
Layout layout_of(SeamKind seam, int channels = 23) {
    Layout layout{};
    std::strcpy(layout.robot, "robot");
    layout.channels = static_cast<std::uint32_t>(channels), layout.groups = 2;
    layout.command_period_ns = 2 * kMs;
    layout.seam = {seam, {}, 3, 0.1, 3.0};
    layout.interpolation = Interpolation::cubic;
    for (int i = 0; i < channels; ++i) {
        Channel& channel = layout.channel[i];
        std::snprintf(channel.name, sizeof channel.name, "channel%d", i);
        channel.kind = static_cast<Kind>(i % 5);
        channel.group = i >= channels / 2;
        const bool limited = channel.kind != Kind::binary && i + 1 < channels;
        if (limited) channel.limits.velocity = 4, channel.limits.acceleration = 30, channel.limits.jerk = 1000;
        if (limited && channel.kind == Kind::position) channel.limits.low = -2, channel.limits.high = 2;
    }
    for (const char* name : {"left", "right"}) {
        Group& group = layout.group[name[0] == 'r'];
        std::strcpy(group.name, name);
        group.decay_ns = 100 * kMs;
        group.on_dry = name[0] == 'r' ? Rule::decay : Rule::hold;
    }
    return layout;
}

// K rows at 30 Hz of slow sines, for any time.
struct Sines {
    explicit Sines(const Layout& layout) : layout(layout) {}
    Chunk chunk(std::int64_t observed_at, int rows = 16, double level = 0) {
        for (int i = 0; i < rows; ++i)
            for (std::uint32_t c = 0; c < layout.channels; ++c) {
                const double t = static_cast<double>(observed_at - kBegin) * 1e-9 + i / 30.0 + 0.3 * c;
                const double x = level + 0.5 * std::sin(2 * t);
                values[i * layout.channels + c] = static_cast<float>(layout.channel[c].kind == Kind::binary ? x > 0 : x);
            }
        const auto stride = static_cast<std::int32_t>(layout.channels);
        return {observed_at, observed_at, observed_at, 30, rows, stride, values};
    }
    const Layout layout;
    float values[kMaxRows * kMaxChannels];
};

// -- what a read does not do -----------------------------------------------------------------------

// 10 s of reads with chunks at 10 Hz, an e-stop, a dry time and a pose, for all three seams. `around` is called before and after.
template <class Around>
void read_much(SeamKind kind, Around around) {
    const Layout layout = layout_of(kind);
    Sines sines(layout);
    auto writer = Writer::in_process(layout);
    CHECK(writer, "%s", writer.error().c_str());
    auto reader = Reader::of(writer->memory(), {"", true});
    CHECK(reader, "%s", reader.error().c_str());
    double values[kMaxChannels] = {}, sum = 0;
    reader->start_at(values);
    int followed = 0;
    around(true);
    for (int tick = 0; tick < 5000; ++tick) {
        const std::int64_t now = kBegin + tick * 2 * kMs;
        if (tick % 50 == 0 && tick % 2000 < 1500) writer->publish(sines.chunk(now), now);
        if (tick == 1000) writer->memory()->writable().header.stamps.estop_at = now;  // estop() asks for the process id
        if (tick == 1200) writer->clear_estop();
        if (tick == 4000) reader->start_at(values);
        followed += reader->read(now, values).row >= 0;
        sum += values[0];
    }
    around(false);
    CHECK(followed > 3000 && sum == sum, "the reads are no test: %d followed", followed);
}

void no_allocation(const char*) {
    for (const SeamKind kind : {SeamKind::newest, SeamKind::ensemble, SeamKind::blend}) {
        std::size_t before = 0;
        read_much(kind, [&](bool begins) {
            if (begins) before = allocations;
            CHECK(begins || allocations == before, "%zu allocations", allocations - before);
        });
    }
}

// In a process that the kernel kills at its first system call but exit.
void no_system_call(const char*) {
    const pid_t child = fork();
    if (child == 0) {
        read_much(SeamKind::blend, [](bool begins) {
            if (begins && prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT)) _exit(77);
            if (!begins) syscall(SYS_exit, 0);
        });
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77) std::exit(77);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with %x", static_cast<unsigned>(status));
}

// -- two sides of shared memory --------------------------------------------------------------------

Writer producer(const char* name, const Layout& layout) {
    WriterOptions options;
    options.alive_period_ns = 0;  // its stamps are the test's
    auto writer = Writer::open_or_create(name, layout, options);
    CHECK(writer, "%s", writer.error().c_str());
    return std::move(*writer);
}

Reader reader_of(const Options& options) {
    auto reader = Reader::open(options);
    CHECK(reader, "%s", reader.error().c_str());
    return std::move(*reader);
}

Status status_of(Reader& reader, std::int64_t now) {
    double values[kMaxChannels];
    return reader.read(now, values).status;
}

void dead(const char* name) {
    const Layout layout = layout_of(SeamKind::newest);
    Sines sines(layout);
    Writer writer = producer(name, layout);
    Segment& segment = writer.memory()->writable();
    Reader reader = reader_of({name});
    Options by_loop{name};
    by_loop.dead_after_ns = 1'000'000 * kMs, by_loop.loop_dead_after_ns = 80 * kMs;
    Reader loop = reader_of(by_loop);
    writer.publish(sines.chunk(kBegin), kBegin);  // a sign of life of the loop
    for (const std::int64_t stamp : {kBegin, kBegin + 7, kBegin + 123'456'789}) {
        stamp_alive(segment, stamp);
        const std::int64_t at = stamp + 50 * kMs;
        CHECK(status_of(reader, at - 1) == Status::ok, "a ns too soon");
        CHECK(status_of(reader, at) == Status::dead, "not dead");
        stamp_alive(segment, at);
        CHECK(status_of(reader, at) == Status::ok, "not alive again");
    }
    writer.heartbeat(kBegin + 150 * kMs);
    CHECK(status_of(loop, kBegin + 230 * kMs - 1) == Status::ok, "a ns too soon");
    CHECK(status_of(loop, kBegin + 230 * kMs) == Status::dead, "not dead");
    stamp_alive(segment, kBegin + 300 * kMs);
    CHECK(status_of(reader, kBegin + 300 * kMs) == Status::ok, "not alive");
    writer.close(kBegin + 300 * kMs);
    CHECK(status_of(reader, kBegin + 301 * kMs) == Status::dead, "closed, and not dead");
}

void estop(const char* name) {
    const Layout layout = layout_of(SeamKind::newest);
    Sines sines(layout);
    Writer writer = producer(name, layout);
    stamp_alive(writer.memory()->writable(), kBegin + 1000 * kMs);
    Reader first = reader_of({name, true}), second = reader_of({name});
    const auto both = [&](std::int64_t now, Status wanted) {
        const Status a = status_of(first, now), b = status_of(second, now);
        const auto at = static_cast<long long>((now - kBegin) / kMs);
        CHECK(a == wanted && b == wanted, "at %lld ms: %s and %s", at, name_of(a), name_of(b));
    };
    writer.publish(sines.chunk(kBegin), kBegin);
    both(kBegin + 1 * kMs, Status::ok);
    const pid_t child = fork();
    if (child == 0) {  // another process
        Reader third = reader_of({name});
        if (status_of(third, kBegin + 2 * kMs) != Status::ok) _exit(1);
        third.estop(kBegin + 2 * kMs);
        _exit(status_of(third, kBegin + 3 * kMs) == Status::estop ? 0 : 2);
    }
    int status = 0;
    waitpid(child, &status, 0);
    CHECK(status == 0, "the other process: %x", static_cast<unsigned>(status));
    both(kBegin + 4 * kMs, Status::estop);
    writer.publish(sines.chunk(kBegin + 5 * kMs), kBegin + 5 * kMs);
    both(kBegin + 300 * kMs, Status::estop);  // it latches
    second.clear_estop();
    both(kBegin + 302 * kMs, Status::dry);  // nothing has been observed since
    writer.publish(sines.chunk(kBegin + 299 * kMs), kBegin + 303 * kMs);
    both(kBegin + 304 * kMs, Status::dry);
    writer.publish(sines.chunk(kBegin + 303 * kMs), kBegin + 305 * kMs);
    both(kBegin + 306 * kMs, Status::ok);
    first.stop();  // for itself
    CHECK(status_of(first, kBegin + 308 * kMs) == Status::estop, "has not stopped");
    CHECK(status_of(second, kBegin + 308 * kMs) == Status::ok, "another one's stop");
    const double nowhere[kMaxChannels] = {};
    first.start_at(nowhere);
    CHECK(status_of(first, kBegin + 310 * kMs) == Status::dry, "stop() outlives start_at()");
}

// A chunk that is being overwritten: the reader goes on with what it holds.
void contended(const char* name) {
    const Layout layout = layout_of(SeamKind::newest);
    Sines sines(layout);
    Writer writer = producer(name, layout);
    Segment& segment = writer.memory()->writable();
    stamp_alive(segment, kBegin + 1000 * kMs);
    Reader reader = reader_of({name}), other = reader_of({name});
    double values[kMaxChannels], wanted[kMaxChannels];
    writer.publish(sines.chunk(kBegin), kBegin);
    for (int tick = 0; tick < 10; ++tick) reader.read(kBegin + tick * kMs, values), other.read(kBegin + tick * kMs, wanted);
    other.read(kBegin + 10 * kMs, wanted);
    writer.publish(sines.chunk(kBegin + 10 * kMs, 16, 1.0), kBegin + 10 * kMs);
    segment.slot[1].sequence.store(3);
    const auto is = [](const Command& command, Status status, std::uint64_t chunk) {
        const auto got = static_cast<int>(command.chunk);
        CHECK(command.status == status && command.chunk == chunk, "%s, chunk %d", name_of(command.status), got);
    };
    is(reader.read(kBegin + 10 * kMs, values), Status::contended, 1);
    CHECK(std::memcmp(values, wanted, sizeof(double) * reader.dims()) == 0, "other values than without the new chunk");
    segment.slot[1].sequence.store(4);
    is(reader.read(kBegin + 11 * kMs, values), Status::ok, 2);
    // all of the old ones lost: not contended
    for (int i = 0; i < 40; ++i) writer.publish(sines.chunk(kBegin + 11 * kMs), kBegin + 11 * kMs);
    is(reader.read(kBegin + 12 * kMs, values), Status::ok, 42);
}

void feedback(const char* name) {
    const Layout layout = layout_of(SeamKind::newest);
    Sines sines(layout);
    Writer writer = producer(name, layout);
    stamp_alive(writer.memory()->writable(), kBegin + 1000 * kMs);
    DriverFeedback got;
    double values[kMaxChannels];
    Options options{name, true};
    options.group = "right";
    {
        Reader watcher = reader_of({name});
        watcher.read(kBegin, values);
        CHECK(!writer.feedback(got), "a reader that is no driver wrote feedback");
        Reader driver = reader_of(options);
        auto second = Reader::open(options);
        CHECK(!second, "two drivers");
        driver.read(kBegin, values);
        CHECK(writer.feedback(got) && got.row == -1 && got.chunk == 0 && got.tick == 1, "of a dry read");
        CHECK(got.status == Status::dry, "%s", name_of(got.status));
        writer.publish(sines.chunk(kBegin), kBegin + kMs);
        driver.read(kBegin + 70 * kMs, values);
        watcher.read(kBegin + 120 * kMs, values);  // is not what is fed back
        driver.read(kBegin + 70 * kMs + 10, values);  // no tick
        CHECK(writer.feedback(got) && got.tick == 2 && got.at_ns == kBegin + 70 * kMs, "tick %d", static_cast<int>(got.tick));
        CHECK(got.chunk == 1 && got.row == 2 && got.status == Status::ok, "row %d", got.row);
        CHECK(got.driver == static_cast<std::uint64_t>(getpid()), "another process");
        driver.read(kBegin + 72 * kMs, values);
        CHECK(writer.feedback(got), "none");
        for (int i = 0; i < static_cast<int>(layout.channels); ++i) {
            if (layout.channel[i].group == 0)
                CHECK(std::isnan(got.values[i]), "channel %d is not this driver's", i);
            else
                CHECK(got.values[i] == values[i - driver.channel(0)], "channel %d", i);
        }
    }
    Reader next = reader_of(options);  // the lock is free again
    auto memory = Memory::open(name, Access::use);
    Reader moved = std::move(next);
    CHECK(!(*memory)->lock(Role::driver), "a moved reader lost the driver's lock");
    writer.close(kBegin + 80 * kMs);
    const auto removed = Writer::remove(name);  // the robot would have a second driver, on the next segment
    CHECK(!removed && removed.error().find("a driver is at work on it") != std::string::npos, "'%s'", removed.error().c_str());
}

// More chunks for later than the reader can hold on to would be a fault of the producer; 15 are none.
void ahead(const char*) {
    const Layout layout = layout_of(SeamKind::blend);
    Sines sines(layout);
    for (const int number : {15, 60}) {
        auto writer = Writer::in_process(layout);
        auto reader = Reader::of(writer->memory(), {""});
        double values[kMaxChannels];
        for (int n = 0; n < number; ++n) {
            Chunk chunk = sines.chunk(kBegin, 1);  // each 33 ms
            chunk.starts_at_ns = kBegin + (n + 1) * 30 * kMs;
            const auto refusal = writer->publish(chunk, kBegin);
            CHECK(!refusal, "%s", refusal.text().c_str());
            if (n % 10 == 9) reader->read(kBegin + n / 10 * kMs, values);
        }
        for (int n = 0; n < number; ++n) {
            const Command command = reader->read(kBegin + (n + 1) * 30 * kMs + 5 * kMs, values);
            const auto chunk = static_cast<int>(command.chunk);
            if (number == 15 || n < 1 || n >= number - kSlots)
                CHECK(chunk == n + 1 && command.status == Status::ok, "chunk %d of %d for %d", chunk, number, n + 1);
        }
    }
}

// A stranger's stamps, and a controller's clock that is wrong for a while. Built with -fsanitize=undefined too.
void strange_times(const char*) {
    constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max(), least = std::numeric_limits<std::int64_t>::min();
    for (const SeamKind seam : {SeamKind::newest, SeamKind::ensemble, SeamKind::blend})
        for (const std::int64_t strange : {most, most / 2, least / 2, least}) {
            const Layout layout = layout_of(seam);
            Sines sines(layout);
            auto writer = Writer::in_process(layout);
            Segment& segment = writer->memory()->writable();
            Options options{""};
            options.loop_dead_after_ns = most;
            auto reader = Reader::of(writer->memory(), options);
            double values[kMaxChannels] = {};
            reader->start_at(values);
            for (int field = 0; field < 3; ++field) {
                publish(segment, sines.chunk(kBegin), kBegin);
                Slot& slot = segment.slot[field];
                (field == 0 ? slot.observed_at : field == 1 ? slot.starts_at : slot.published_at).store(strange);
                segment.header.stamps.loop_at.store(strange);
                reader->read(kBegin + field * kMs, values);
            }
            CHECK(reader->read(kBegin + 3 * kMs, values).chunk == 0, "it follows a chunk of time %lld", static_cast<long long>(strange));
            segment.header.stamps.loop_at.store(kBegin);
            reader->estop(kBegin);
            reader->read(strange, values);
            reader->clear_estop();
            reader->read(strange, values);
            // the clock is right again
            reader->start_at(values);
            reader->read(kBegin + 4 * kMs, values);
            publish(segment, sines.chunk(kBegin + 5 * kMs), kBegin + 5 * kMs);
            const Command command = reader->read(kBegin + 6 * kMs, values);
            CHECK(command.status == Status::ok && command.chunk == 4, "%s after a clock at %lld", name_of(command.status), static_cast<long long>(strange));
        }
}

void opening(const char* name) {
    const Layout layout = layout_of(SeamKind::newest);
    Options options{name};
    const auto says = [&](const char* wanted) {
        auto reader = Reader::open(options);
        const std::string got = reader.error();
        CHECK(!reader && got.find(wanted) != std::string::npos, "wanted '%s', got '%s'", wanted, got.c_str());
        CHECK(got.find('\n') == std::string::npos, "more than a line");
        options = Options{name};
    };
    says(name);  // there is none
    Writer writer = producer(name, layout);
    options.group = "legs";
    says("no group 'legs'; there are: left, right");
    options.dead_after_ns = 0;
    says("dead_after_ns is 0");
    options.loop_dead_after_ns = -5;
    says("loop_dead_after_ns -5");
    Layout other = layout;
    other.channel[3].kind = Kind::position;
    options.expected = &other;
    says("channel3");
    options.name = nullptr;
    says("no name");
    options.driver = true;
    Reader driver = reader_of(options);
    options.driver = true;
    says("driver");
    options.group = "right", options.expected = &layout;
    Reader right = reader_of(options);
    CHECK(right.dims() == 12 && right.channel(0) == 11 && right.command_period_ns() == 2 * kMs, "%zu channels", right.dims());
}

}  // namespace

int main(int count, char** given) {
    struct {
        const char* name;
        void (*run)(const char*);
    } const checks[] = {{"no_allocation", no_allocation}, {"no_system_call", no_system_call}, {"dead", dead}, {"estop", estop},
                        {"strange_times", strange_times}, {"contended", contended}, {"feedback", feedback}, {"ahead", ahead}, {"opening", opening}};
    for (const auto& check : checks)
        if (count > 1 && std::strcmp(given[1], check.name) == 0) return check.run(count > 2 ? given[2] : nullptr), 0;
    return 2;
}
