// What `dit4dit control watch` shows, as plain numbers and texts, and what `dit4dit bench stream` times.
#include <dit4dit/snapshot.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arguments.h"
#include "stream_bench.h"
#include "without_gil.h"

namespace dit4dit {

using namespace py::literals;

namespace {

// A text of the segment, which may hold any bytes.
py::str words(const char* bytes, std::size_t most) {
    const auto length = static_cast<Py_ssize_t>(::strnlen(bytes, most));
    return py::reinterpret_borrow<py::str>(owned(PyUnicode_DecodeUTF8(bytes, length, "backslashreplace")));
}

py::list channels_of(const Layout& layout) {
    py::list found;
    for (std::uint32_t i = 0; i < layout.channels; ++i) {
        const Channel& channel = layout.channel[i];
        const Limits& limits = channel.limits;
        found.append(py::dict("name"_a = words(channel.name, sizeof channel.name), "kind"_a = name_of(channel.kind),
                              "group"_a = channel.group, "low"_a = limits.low, "high"_a = limits.high,
                              "velocity"_a = limits.velocity, "acceleration"_a = limits.acceleration,
                              "jerk"_a = limits.jerk));
    }
    return found;
}

py::list groups_of(const Layout& layout) {
    py::list found;
    for (std::uint32_t i = 0; i < layout.groups; ++i) {
        const Group& group = layout.group[i];
        found.append(py::dict("name"_a = words(group.name, sizeof group.name), "max_age_ns"_a = group.max_age_ns,
                              "decay_ns"_a = group.decay_ns, "on_dry"_a = name_of(group.on_dry),
                              "on_stale"_a = name_of(group.on_stale), "on_dead"_a = name_of(group.on_dead)));
    }
    return found;
}

py::object feedback_of(const Snapshot& seen, std::uint32_t channels) {
    if (!seen.driven) return py::none();
    const DriverFeedback& sent = seen.feedback;
    py::list values;
    for (std::uint32_t i = 0; i < channels; ++i) values.append(sent.values[i]);
    return py::dict("pid"_a = sent.driver, "tick"_a = sent.tick, "at_ns"_a = sent.at_ns, "chunk"_a = sent.chunk,
                    "row"_a = sent.row, "status"_a = name_of(sent.status), "values"_a = values);
}

py::list chunks_of(const Snapshot& seen) {
    py::list found;
    for (const ChunkSeen& chunk : seen.chunks)
        found.append(py::dict("id"_a = chunk.id, "rows"_a = chunk.rows, "period_ns"_a = chunk.period_ns,
                              "observed_at_ns"_a = chunk.observed_at, "computed_at_ns"_a = chunk.computed_at,
                              "starts_at_ns"_a = chunk.starts_at, "published_at_ns"_a = chunk.published_at));
    return found;
}

py::dict segment_snapshot(const py::object& name) {
    const auto memory = Memory::open(text(name, "name", kMostText), Access::watch);
    if (!memory) throw py::value_error(memory.error());
    const Header& header = (*memory)->segment().header;
    const Layout& layout = header.layout;
    const Snapshot seen = take_snapshot(**memory);
    const Seam& seam = layout.seam;
    return py::dict(
        "version"_a = header.version, "bytes"_a = header.bytes, "created_at_ns"_a = header.created_at, "now_ns"_a = seen.now,
        "robot"_a = words(layout.robot, sizeof layout.robot), "command_period_ns"_a = layout.command_period_ns,
        "interpolation"_a = name_of(layout.interpolation),
        "seam"_a = py::dict("kind"_a = name_of(seam.kind), "history"_a = seam.history, "alpha"_a = seam.alpha,
                            "rows"_a = seam.rows),
        "channels"_a = channels_of(layout), "groups"_a = groups_of(layout),
        "producer"_a = py::dict("pid"_a = seen.producer, "count"_a = seen.producers, "holds"_a = seen.producer_holds,
                                "alive_at_ns"_a = seen.alive_at, "loop_at_ns"_a = seen.loop_at,
                                "closed_at_ns"_a = seen.closed_at),
        "head"_a = seen.head, "chunks"_a = chunks_of(seen), "driver_holds"_a = seen.driver_holds,
        "feedback"_a = feedback_of(seen, layout.channels),
        "estop"_a = py::dict("at_ns"_a = seen.estop_at, "pid"_a = seen.estop_by));
}

// -- times -----------------------------------------------------------------------------------------

constexpr std::int64_t kMostTimes = 20'000;  // at a time: a call is not to take longer than a moment

// int64 or float64 numbers, for numpy.frombuffer.
template <class T>
py::bytes raw(const std::vector<T>& numbers) {
    return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(T)};
}

template <class Work>
auto alone(Work work) {
    decltype(work()) found;
    without_gil([&] { found = work(); });
    return found;
}

py::bytes bench_clock(const py::object& count) {
    const auto times = whole<std::int64_t>(count, "count", 1, kMostTimes);
    return raw(alone([&] { return time_clock(times); }));
}

py::tuple bench_ring(const py::object& count) {
    const auto times = whole<std::int64_t>(count, "count", 1, kMostTimes);
    const RingTimes found = alone([&] { return time_ring(times); });
    return py::make_tuple(raw(found.took), found.contended);
}

py::bytes bench_reader(const py::object& count, const py::object& at_limits) {
    const auto times = whole<std::int64_t>(count, "count", 1, kMostTimes);
    const bool limited = truth(at_limits, "at_limits");
    return raw(alone([&] { return time_reader(times, limited); }));
}

py::dict bench_loop(const py::object& name, const py::object& period_ns, const py::object& ticks, const py::object& priority) {
    const auto segment = text(name, "name");
    const auto period = whole<std::int64_t>(period_ns, "period_ns", 1000, 10'000'000);
    const auto count = whole<std::int64_t>(ticks, "ticks", 1, kMostTimes);
    const auto wanted = whole<int>(priority, "priority", 0, 99);
    const LoopTimes found = alone([&] { return run_loop(segment, period, count, wanted); });
    return py::dict("late"_a = raw(found.late), "age"_a = raw(found.age), "took"_a = raw(found.took),
                    "chunk"_a = raw(found.chunk), "missed"_a = found.missed,
                    "status"_a = std::vector<std::int64_t>(std::begin(found.status), std::end(found.status)),
                    "refused"_a = found.refused);
}

}  // namespace

void add_stream_bench(py::module_& m) {
    m.def("stream_bench_clock", &bench_clock, "count"_a);
    m.def("stream_bench_ring", &bench_ring, "count"_a);
    m.def("stream_bench_reader", &bench_reader, "count"_a, "at_limits"_a);
    m.def("stream_bench_loop", &bench_loop, "name"_a, "period_ns"_a, "ticks"_a, "priority"_a);
}

void add_snapshot(py::module_& m) {
    m.def("segment_snapshot", &segment_snapshot, "name"_a, "What is in a segment of shared memory; ValueError says why not.");
    m.def("segment_names", &segment_names, "Names of the segments that are there, of every version.");
}

}  // namespace dit4dit
