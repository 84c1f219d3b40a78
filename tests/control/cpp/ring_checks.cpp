// What one thread can see of the ring, the stamps, the feedback and the checks at publish: ring_checks CASE [NAME]. Silent and 0
// if it holds.
//
// `ring_checks refusals` prints one line for each refused chunk, "case: text"; `ring_checks layouts` one for each bad layout.
#include <cfloat>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <thread>
#include <vector>

#include <dit4dit/writer.h>

#include "ring_case.h"

using namespace dit4dit;

#define CHECK(holds)                                                              \
    do {                                                                          \
        if (!(holds)) {                                                           \
            std::fprintf(stderr, "line %d: not so: %s\n", __LINE__, #holds);       \
            std::exit(1);                                                         \
        }                                                                         \
    } while (false)

namespace {

constexpr int kRows = 4, kChannels = 23;

Writer open(int channels = kChannels) {
    Result<Writer> writer = Writer::in_process(ring_case::layout(channels));
    CHECK(writer);
    return std::move(*writer);
}

void publish_next(Writer& writer, int rows = kRows) {
    std::vector<float> values(kMaxRows * kMaxChannels);
    const std::uint64_t id = head(writer.memory()->segment()) + 1;
    const int channels = static_cast<int>(writer.layout().channels);
    const Refusal refusal = writer.publish(ring_case::chunk(id, rows, channels, values.data()), ring_case::published(id));
    CHECK(!refusal);
    CHECK(head(writer.memory()->segment()) == id);
}

void contended() {
    Writer writer = open();
    const Segment& segment = writer.memory()->segment();
    HeldChunk held;
    Read read = copy_newest(segment, held);
    CHECK(read.found == Found::none && read.tries == 1 && held.id == 0);
    for (int i = 0; i < 20; ++i) publish_next(writer);
    Slot& slot = writer.memory()->writable().slot[(20 - 1) % kSlots];
    slot.sequence.store(2 * 36 - 1);
    held.id = 7;
    read = copy_newest(segment, held);
    CHECK(read.found == Found::contended && read.tries == 4 && held.id == 0);
    held.id = 7;
    CHECK(!copy(segment, 20, held) && held.id == 0);
    CHECK(copy(segment, 19, held) && held.id == 19);
    slot.sequence.store(2 * 20);
    read = copy_newest(segment, held);
    CHECK(read.found == Found::whole && read.tries == 1 && held.id == 20);
}

void overwritten() {
    Writer writer = open();
    const Segment& segment = writer.memory()->segment();
    HeldChunk held;
    for (std::uint64_t newest = 1; newest <= 40; ++newest) {
        publish_next(writer);
        for (std::uint64_t id = 0; id <= newest + 20; ++id) {
            const bool there = id >= 1 && id <= newest && id + kSlots > newest;
            CHECK(copy(segment, id, held) == there);
            CHECK(held.id == (there ? id : 0));
            CHECK(!there || ring_case::whole(held, kRows, kChannels, 0, kRows));
        }
    }
}

// Killed after the chunk was whole and before it counted: it does not exist, and its successor has its id.
void uncounted() {
    Writer writer = open();
    for (int i = 0; i < 20; ++i) publish_next(writer);
    Segment& segment = writer.memory()->writable();
    segment.header.stamps.head.store(19);
    HeldChunk held;
    CHECK(!copy(segment, 20, held));
    CHECK(copy_newest(segment, held).found == Found::whole && held.id == 19);
    publish_next(writer);
    CHECK(copy(segment, 20, held) && ring_case::whole(held, kRows, kChannels, 0, kRows));
}

// Killed inside a write.
void odd_mark() {
    Writer writer = open();
    for (int i = 0; i < 20; ++i) publish_next(writer);
    Segment& segment = writer.memory()->writable();
    Slot& next = segment.slot[20 % kSlots];
    next.sequence.store(2 * 21 - 1);
    next.observed_at.store(-1);
    HeldChunk held;
    CHECK(copy_newest(segment, held).found == Found::whole && held.id == 20);
    CHECK(!copy(segment, 5, held));  // it lay there
    CHECK(copy(segment, 6, held));
    publish_next(writer);
    CHECK(copy_newest(segment, held).found == Found::whole && held.id == 21);
    CHECK(ring_case::whole(held, kRows, kChannels, 0, kRows));
}

void some_rows() {
    Writer writer = open();
    publish_next(writer);
    const Segment& segment = writer.memory()->segment();
    for (int first = -3; first < kRows + 3; ++first) {
        for (int count = 0; count < kRows + 3; ++count) {
            HeldChunk held;
            for (float& value : held.values) value = -1;
            CHECK(copy_newest(segment, held, first, count).found == Found::whole);
            CHECK(held.rows == kRows);
            for (int i = 0; i < kMaxRows; ++i) {
                for (int k = 0; k < kMaxChannels; ++k) {
                    const bool copied = i >= first && i < first + count && i < kRows && k < kChannels;
                    const float wanted = ring_case::base(1) + static_cast<float>(i * kMaxChannels + k);
                    CHECK(held.row(i)[k] == (copied ? wanted : -1));
                }
            }
        }
    }
}

// Every width and many heights, any bits of finite floats, rows with a gap between them.
void every_size() {
    const float some[] = {0.0f, -0.0f, FLT_MAX, -FLT_MAX, FLT_MIN, std::numeric_limits<float>::denorm_min(), 1 / 3.0f};
    for (int channels = 1; channels <= kMaxChannels; ++channels) {
        Writer writer = open(channels);
        for (const int rows : {1, 2, 17, kMaxRows}) {
            const int stride = channels + rows % 3;
            std::vector<float> values(static_cast<std::size_t>(rows * stride), std::nanf(""));
            for (int i = 0; i < rows; ++i)
                for (int k = 0; k < channels; ++k) values[static_cast<std::size_t>(i * stride + k)] = some[(i * 5 + k) % 7];
            CHECK(!writer.publish({10, 20, 5, 20.0, rows, stride, values.data()}, 30));
            HeldChunk held;
            CHECK(copy_newest(writer.memory()->segment(), held).found == Found::whole);
            CHECK(held.rows == rows && held.observed_at == 10 && held.computed_at == 20 && held.starts_at == 5);
            CHECK(held.published_at == 30 && held.period_ns == 5e7);
            for (int i = 0; i < rows; ++i)
                CHECK(std::memcmp(held.row(i), &values[static_cast<std::size_t>(i * stride)],
                                  sizeof(float) * static_cast<std::size_t>(channels)) == 0);
        }
    }
}

// A segment that somebody else has spoilt: no read beyond any array (AddressSanitizer looks on).
void spoilt() {
    Writer writer = open();
    publish_next(writer);
    Segment& segment = writer.memory()->writable();
    HeldChunk held;
    for (const std::uint64_t rows : {std::uint64_t{65}, ~std::uint64_t{0}, std::uint64_t{1} << 32, std::uint64_t{1} << 63}) {
        segment.slot[0].rows.store(rows);
        CHECK(copy_newest(segment, held).found == Found::whole);
        CHECK(held.rows >= 0 && held.rows <= kMaxRows);
    }
    segment.header.layout.channels = 4'000'000'000;
    CHECK(copy_newest(segment, held).found == Found::whole);
    DriverFeedback sent;
    segment.header.feedback.sequence.store(2);
    segment.header.feedback.status.store(~std::uint64_t{0});
    CHECK(read_feedback(segment, sent) && sent.status <= Status::estop);
}

void dead() {
    Writer writer = open();
    Segment& segment = writer.memory()->writable();
    Header& header = segment.header;
    header.created_at = 1000;
    header.stamps.alive_at.store(0);
    header.stamps.loop_at.store(0);
    // one process: no stamp of its life
    CHECK(!producer_dead(segment, 1'000'000, 50));
    CHECK(!producer_dead(segment, 1049, 0, 50) && producer_dead(segment, 1050, 0, 50));
    header.shared = 1;
    CHECK(!producer_dead(segment, 1049, 50) && producer_dead(segment, 1050, 50));
    stamp_alive(segment, 2000);
    CHECK(!producer_dead(segment, 2049, 50) && producer_dead(segment, 2050, 50));
    CHECK(!producer_dead(segment, 1900, 50));  // a reader whose `now` is from before the stamp
    CHECK(!producer_dead(segment, 2010, 50, 0) && producer_dead(segment, 2010, 50, 1010));
    stamp_loop(segment, 2005);
    CHECK(!producer_dead(segment, 2014, 50, 10) && producer_dead(segment, 2015, 50, 10));
    writer.heartbeat(2010);
    CHECK(!producer_dead(segment, 2019, 50, 10) && producer_dead(segment, 2020, 50, 10));
    publish_next(writer);
    CHECK(header.stamps.loop_at.load() == ring_case::published(1));
    stamp_loop(segment, 2010);
    CHECK(!producer_dead(segment, 2011, 50, 10));
    writer.close(2012);
    CHECK(header.stamps.closed_at.load() == 2012 && producer_dead(segment, 2011, 50, 10));
    writer.heartbeat(3000);
    CHECK(header.stamps.loop_at.load() == 2010);  // closed: it stamps nothing
}

void latch() {
    Writer writer = open();
    const Segment& segment = writer.memory()->segment();
    CHECK(estop_at(segment) == 0);
    writer.estop(100);
    writer.estop(200);
    CHECK(estop_at(segment) == 100 && segment.header.stamps.estop_by.load() == static_cast<std::uint64_t>(getpid()));
    publish_next(writer);  // latched, not blocked
    CHECK(estop_at(segment) == 100);
    writer.clear_estop();
    CHECK(estop_at(segment) == 0);
    writer.estop(0);
    CHECK(estop_at(segment) != 0);
    writer.close(300);
    CHECK(estop_at(segment) != 0);
    writer.clear_estop();
    CHECK(estop_at(segment) == 0);
}

DriverFeedback feedback_of(std::uint64_t n) {
    DriverFeedback sent;
    sent.driver = sent.tick = sent.chunk = n;
    sent.at_ns = static_cast<std::int64_t>(n) << 33;
    sent.row = -1;
    sent.status = Status::stale;
    for (double& value : sent.values) value = static_cast<double>(n) / 3;
    sent.values[1] = std::nan("");
    return sent;
}

void feedback() {
    Writer writer = open();
    Segment& segment = writer.memory()->writable();
    DriverFeedback got;
    CHECK(!writer.feedback(got));
    for (std::uint64_t n = 1; n < 100; ++n) {
        const DriverFeedback sent = feedback_of(n);
        write_feedback(segment, sent);
        CHECK(writer.feedback(got));
        CHECK(got.driver == n && got.tick == n && got.chunk == n && got.at_ns == sent.at_ns && got.row == -1);
        CHECK(got.status == Status::stale);
        CHECK(std::memcmp(got.values, sent.values, sizeof(double) * kChannels) == 0);
        CHECK(segment.header.feedback.sequence.load() == 2 * n);
    }
    // a driver that was killed inside a write, and the next one
    segment.header.feedback.sequence.store(199);
    CHECK(!writer.feedback(got));
    write_feedback(segment, feedback_of(100));
    CHECK(writer.feedback(got) && got.tick == 100 && segment.header.feedback.sequence.load() == 202);
}

void refusals() {
    const float nan = std::nanf(""), inf = std::numeric_limits<float>::infinity();
    Layout layout = ring_case::layout(kChannels);
    layout.channel[4].kind = Kind::binary;
    std::strcpy(layout.channel[4].name, "hand.closed");
    Result<Writer> writer = Writer::in_process(layout);
    CHECK(writer);
    const Segment& segment = writer->memory()->segment();
    std::vector<float> values(kRows * kChannels, 0.5f);
    for (int i = 0; i < kRows; ++i) values[static_cast<std::size_t>(i * kChannels + 4)] = static_cast<float>(i % 2);
    const std::int64_t hour = 3'600'000'000'000;
    const Chunk good{hour * 2, hour * 2 + 5, hour * 2, 20, kRows, kChannels, values.data()};
    CHECK(!writer->publish(good, hour * 2 + 5));
    CHECK(!writer->publish(good, hour * 2 + 6));  // the same observation once more

    std::vector<char> before(sizeof(Segment));
    const auto refuse = [&](const char* name, std::function<void(Chunk&)> change, std::size_t at = 0, float value = 0.5f) {
        Chunk chunk = good;
        change(chunk);
        const float kept = std::exchange(values[at], value);
        std::memcpy(before.data(), &segment, sizeof segment);
        const Refusal refusal = writer->publish(chunk, hour * 2 + 10);
        std::printf("%s: %s\n", name, refusal.text().c_str());
        CHECK(refusal && std::memcmp(before.data(), &segment, sizeof segment) == 0);
        values[at] = kept;
    };
    const auto same = [](Chunk&) {};
    constexpr std::size_t at = 2 * kChannels + 7, last = kRows * kChannels - 1, binary = kChannels + 4;
    refuse("nan", same, at, nan);
    refuse("inf", same, last, inf);
    refuse("minus inf", same, 0, -inf);
    refuse("binary", same, binary, 0.25f);
    refuse("binary nan", same, binary, nan);
    refuse("no values", [](Chunk& chunk) { chunk.values = nullptr; });
    refuse("no rows", [](Chunk& chunk) { chunk.rows = 0; });
    refuse("many rows", [](Chunk& chunk) { chunk.rows = kMaxRows + 1; });
    refuse("stride", [](Chunk& chunk) { chunk.stride = kChannels - 1; });
    refuse("negative stride", [](Chunk& chunk) { chunk.stride = -kChannels; });
    refuse("rate 0", [](Chunk& chunk) { chunk.control_hz = 0; });
    refuse("rate nan", [](Chunk& chunk) { chunk.control_hz = std::nan(""); });
    refuse("rate inf", [](Chunk& chunk) { chunk.control_hz = HUGE_VAL; });
    refuse("rate below", [](Chunk& chunk) { chunk.control_hz = -20; });
    refuse("never", [](Chunk& chunk) { chunk.observed_at_ns = 0; });
    refuse("backwards", [](Chunk& chunk) { --chunk.observed_at_ns; });
    refuse("computed before", [](Chunk& chunk) { chunk.computed_at_ns = chunk.observed_at_ns - 1; });
    refuse("future", [&](Chunk& chunk) { chunk.computed_at_ns = hour * 2 + 11; });
    refuse("observed in the future", [&](Chunk& chunk) { chunk.observed_at_ns = chunk.computed_at_ns = hour * 2 + 11; });
    refuse("starts early", [&](Chunk& chunk) { chunk.starts_at_ns = chunk.observed_at_ns - hour - 1; });
    refuse("starts late", [&](Chunk& chunk) { chunk.starts_at_ns = chunk.observed_at_ns + hour + 1; });
    refuse("starts at the end of time", [](Chunk& chunk) { chunk.starts_at_ns = std::numeric_limits<std::int64_t>::max(); });
    refuse("starts at its beginning", [](Chunk& chunk) { chunk.starts_at_ns = std::numeric_limits<std::int64_t>::min(); });

    Chunk edge = good;
    edge.starts_at_ns = edge.observed_at_ns + hour;
    edge.computed_at_ns = hour * 2 + 10;
    CHECK(!writer->publish(edge, hour * 2 + 10));
    writer->close(hour * 3);
    refuse("closed", same);
    CHECK(Refusal{}.text().empty());
}

void layouts() {
    const auto bad = [](const char* name, std::function<void(Layout&)> change) {
        Layout layout = ring_case::layout(3);
        CHECK(why_bad(layout).empty());
        change(layout);
        std::printf("%s: %s\n", name, why_bad(layout).c_str());
        CHECK(!Writer::in_process(layout));
        CHECK(Writer::in_process(layout).error() == why_bad(layout));
    };
    const auto of_kind = [](Kind kind, double low, double high) {
        return [=](Layout& layout) {
            layout.channel[1].kind = kind;
            layout.channel[1].limits.low = low;
            layout.channel[1].limits.high = high;
        };
    };
    const double nan = std::nan("");
    bad("robot", [](Layout& layout) { layout.robot[0] = 0; });
    bad("robot without end", [](Layout& layout) { std::memset(layout.robot, 'x', sizeof layout.robot); });
    bad("no channels", [](Layout& layout) { layout.channels = 0; });
    bad("65 channels", [](Layout& layout) { layout.channels = 65; });
    bad("no groups", [](Layout& layout) { layout.groups = 0; });
    bad("9 groups", [](Layout& layout) { layout.groups = 9; });
    bad("period", [](Layout& layout) { layout.command_period_ns = 0; });
    bad("interpolation", [](Layout& layout) { layout.interpolation = static_cast<Interpolation>(3); });
    bad("seam", [](Layout& layout) { layout.seam.kind = static_cast<SeamKind>(3); });
    bad("history", [](Layout& layout) { layout.seam = {SeamKind::ensemble, {}, 9, 0.1, 0}; });
    bad("alpha", [=](Layout& layout) { layout.seam = {SeamKind::ensemble, {}, 2, nan, 0}; });
    bad("blend", [](Layout& layout) { layout.seam = {SeamKind::blend, {}, 0, 0, 0}; });
    bad("blend nan", [=](Layout& layout) { layout.seam = {SeamKind::blend, {}, 0, 0, nan}; });
    bad("name", [](Layout& layout) { layout.channel[2].name[0] = 0; });
    bad("name without end", [](Layout& layout) { std::memset(layout.channel[2].name, 'x', sizeof layout.channel[2].name); });
    bad("name twice", [](Layout& layout) { std::strcpy(layout.channel[2].name, layout.channel[0].name); });
    bad("kind", [](Layout& layout) { layout.channel[2].kind = static_cast<Kind>(5); });
    bad("group of channel", [](Layout& layout) { layout.channel[2].group = 1; });
    bad("low above high", of_kind(Kind::position, 1, -1));
    bad("low nan", of_kind(Kind::position, nan, 1));
    bad("angle with end stops", of_kind(Kind::angle, -1, 1));
    bad("relative with end stops", of_kind(Kind::relative, -1, 1));
    bad("binary with limits", of_kind(Kind::binary, 0, 1));
    bad("velocity without 0", of_kind(Kind::velocity, 1, 2));
    bad("velocity 0", [](Layout& layout) { layout.channel[1].limits.velocity = 0; });
    bad("acceleration nan", [=](Layout& layout) { layout.channel[1].limits.acceleration = nan; });
    bad("jerk below 0", [](Layout& layout) { layout.channel[1].limits.jerk = -1; });
    bad("group's name", [](Layout& layout) { layout.group[0].name[0] = 0; });
    bad("group twice", [](Layout& layout) {
        layout.groups = 2;
        layout.group[1] = layout.group[0];
        layout.channel[1].group = 1;
    });
    bad("group without channel", [](Layout& layout) {
        layout.groups = 2;
        std::strcpy(layout.group[1].name, "base");
    });
    bad("age", [](Layout& layout) { layout.group[0].max_age_ns = -1; });
    bad("decay", [](Layout& layout) { layout.group[0].decay_ns = -1; });
    bad("finish when dry", [](Layout& layout) { layout.group[0].on_dry = Rule::finish; });
    bad("rule when stale", [](Layout& layout) { layout.group[0].on_stale = static_cast<Rule>(3); });
    bad("rule when dead", [](Layout& layout) { layout.group[0].on_dead = static_cast<Rule>(3); });
}

// Whatever byte differs, unless nobody reads it, difference() says so, with the names.
void differences() {
    for (const SeamKind kind : {SeamKind::newest, SeamKind::ensemble, SeamKind::blend}) {
        Layout wanted = ring_case::layout(2);
        wanted.seam = {kind, {}, 3, 0.5, 2.5};
        for (Limits* limits : {&wanted.channel[0].limits, &wanted.channel[1].limits}) *limits = {-1, 1, 1, 1, 1};
        CHECK(difference(wanted, wanted).empty());
        std::map<std::string, int> bytes;  // that make each line's first words differ
        for (std::size_t i = 0; i < sizeof(Layout); ++i) {
            Layout have = wanted;
            unsigned char byte;
            std::memcpy(&byte, reinterpret_cast<const char*>(&wanted) + i, 1);
            byte = static_cast<unsigned char>(byte ^ 1);
            std::memcpy(reinterpret_cast<char*>(&have) + i, &byte, 1);
            const std::string text = difference(have, wanted);
            ++bytes[text.substr(0, text.find(" is "))];
            CHECK(text.find('\n') == std::string::npos);
        }
        // the first byte of an empty tail of a name counts too: it would make the name longer
        CHECK(bytes["robot"] == 5 && bytes["channel 0: name"] == 8 && bytes["channel 1: name"] == 8);
        CHECK(bytes["group 0: name"] == 5);
        CHECK(bytes["number of channels"] == 4 && bytes["number of groups"] == 4 && bytes["command_period_ns"] == 8);
        CHECK(bytes["interpolation"] == 1 && bytes["seam"] == 1);
        CHECK(bytes["seam's history"] == (kind == SeamKind::ensemble ? 4 : 0));
        CHECK(bytes["seam's alpha"] == (kind == SeamKind::ensemble ? 8 : 0));
        CHECK(bytes["seam's rows"] == (kind == SeamKind::blend ? 8 : 0));
        for (const std::string channel : {"channel 'joint.0': ", "channel 'joint.1': "}) {
            CHECK(bytes[channel + "kind"] == 1 && bytes[channel + "group"] == 8);
            for (const char* limit : {"low", "high", "velocity", "acceleration", "jerk"}) CHECK(bytes[channel + limit] == 8);
        }
        for (const char* field : {"max_age_ns", "decay_ns"}) CHECK(bytes[std::string("group 'arms': ") + field] == 8);
        for (const char* field : {"on_dry", "on_stale", "on_dead"}) CHECK(bytes[std::string("group 'arms': ") + field] == 1);
    }
}

void moves() {
    Writer first = open(), second = open();
    std::shared_ptr<Memory> one = first.memory(), two = second.memory();
    Writer third = std::move(first);
    CHECK(one->holds(Role::producer));
    publish_next(third);
    third = std::move(second);  // closes what it had
    CHECK(!one->holds(Role::producer) && one->segment().header.stamps.closed_at.load() != 0);
    CHECK(two->holds(Role::producer) && two->segment().header.stamps.closed_at.load() == 0);
    publish_next(third);
    {
        const Writer last = std::move(third);
        CHECK(two->holds(Role::producer));
    }
    CHECK(!two->holds(Role::producer));
    CHECK(two->lock(Role::driver) && !two->lock(Role::driver));
    two->unlock(Role::driver);
    CHECK(two->lock(Role::driver));
}

// Whoever opens a name finds a complete segment or none, while another one makes it, removes it and replaces it.
void appears(const std::string& name) {
    std::atomic<bool> done{false};
    std::atomic<int> found{0};
    std::thread reader([&] {
        while (!done.load()) {
            const auto memory = Memory::open(name, Access::watch);
            CHECK(memory || memory.error().find("there is no such segment") != std::string::npos);
            if (memory) found.fetch_add(1);
        }
    });
    for (int i = 0; i < 300 || found.load() < 100; ++i) {
        const auto writer = Writer::open_or_create(name, ring_case::layout(1 + i % 2), {0600, 0});
        CHECK(writer);
        CHECK(!Writer::remove(name));  // it lives
        if (i % 3 == 1) {
            writer->memory()->unlock(Role::producer);
            CHECK(Writer::remove(name));
        }
    }
    done.store(true);
    reader.join();
    CHECK(Writer::remove(name));
}

}  // namespace

int main(int count, char** arguments) {
    const std::map<std::string, void (*)()> cases = {
        {"contended", contended}, {"overwritten", overwritten}, {"uncounted", uncounted},     {"odd_mark", odd_mark},
        {"some_rows", some_rows}, {"every_size", every_size},   {"spoilt", spoilt},           {"dead", dead},
        {"latch", latch},         {"feedback", feedback},       {"refusals", refusals},       {"layouts", layouts},
        {"moves", moves},         {"differences", differences},
    };
    if (count == 3 && std::string(arguments[1]) == "appears") {
        appears(arguments[2]);
        return 0;
    }
    const auto found = cases.find(count == 2 ? arguments[1] : "");
    CHECK(found != cases.end());
    found->second();
    return 0;
}
