// dit4dit._C.segment_snapshot and segment_names: what `dit4dit control watch` shows, as plain numbers and texts.
#include <dit4dit/snapshot.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arguments.h"

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

}  // namespace

void add_snapshot(py::module_& m) {
    m.def("segment_snapshot", &segment_snapshot, "name"_a, "What is in a segment of shared memory; ValueError says why not.");
    m.def("segment_names", &segment_names, "Names of the segments that are there, of every version.");
}

}  // namespace dit4dit
