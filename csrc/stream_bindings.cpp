// dit4dit._C.StreamWriter, StreamReader and stream_remove: the action stream's headers for dit4dit.control. No logic; names,
// defaults and units are Python's. Every call takes its now_ns, as the headers do.
//
// A writer and a reader are for one thread at a time, Python's for any: each is behind a lock. Nobody who has it waits for the GIL, so
// no two threads wait for each other. The GIL is given up only by what may block: a tick that gave it up would wait for other threads
// of Python to take it back.
#include <dit4dit/action_stream.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <mutex>
#include <optional>

#include "arguments.h"
#include "without_gil.h"

namespace dit4dit {

using namespace py::literals;

namespace {

using Given = const py::object&;

// -- a layout --------------------------------------------------------------------------------------

// The enumerator that name_of calls so.
template <class Enum>
Enum named(const py::handle& object, const std::string& name, Enum last) {
    const std::string wanted = text(object, name);
    std::string known;
    for (int i = 0; i <= static_cast<int>(last); ++i) {
        const char* one = name_of(static_cast<Enum>(i));
        if (wanted == one) return static_cast<Enum>(i);
        known += (i ? ", " : "") + std::string(one);
    }
    refuse(name, known, "'" + shown(wanted) + "'");
}

template <std::size_t N>
void set_name(char (&place)[N], const py::handle& object, const std::string& name) {
    const std::string given = text(object, name, N - 1);
    std::memcpy(place, given.data(), given.size());
}

std::vector<py::object> parts(const py::handle& object, const std::string& name, std::size_t count, const char* wanted) {
    auto found = elements(object, name, count);
    if (found.size() != count) refuse(name, wanted, std::to_string(found.size()) + " elements");
    return found;
}

Seam seam_from(Given object) {
    const auto given = parts(object, "seam", 4, "(kind, history, alpha, rows)");
    Seam seam{};
    seam.kind = named(given[0], "seam: kind", SeamKind::blend);
    seam.history = whole<std::int32_t>(given[1], "seam: history");
    seam.alpha = wide_real(given[2], "seam: alpha");
    seam.rows = wide_real(given[3], "seam: rows");
    return seam;
}

Channel channel_from(const py::handle& object, const std::string& name) {
    const auto given = parts(object, name, 4, "(name, kind, group, limits)");
    Channel channel{};
    set_name(channel.name, given[0], name + ": name");
    channel.kind = named(given[1], name + ": kind", Kind::binary);
    channel.group = whole<std::uint64_t>(given[2], name + ": group");
    const auto limits = parts(given[3], name + ": limits", 5, "(low, high, velocity, acceleration, jerk)");
    double* const bounds[] = {&channel.limits.low, &channel.limits.high, &channel.limits.velocity,
                              &channel.limits.acceleration, &channel.limits.jerk};
    for (std::size_t i = 0; i < limits.size(); ++i) *bounds[i] = wide_real(limits[i], name + ": limits");
    return channel;
}

Group group_from(const py::handle& object, const std::string& name) {
    const auto given = parts(object, name, 6, "(name, on_dry, on_stale, on_dead, max_age_ns, decay_ns)");
    Group group{};
    set_name(group.name, given[0], name + ": name");
    group.on_dry = named(given[1], name + ": on_dry", Rule::finish);
    group.on_stale = named(given[2], name + ": on_stale", Rule::finish);
    group.on_dead = named(given[3], name + ": on_dead", Rule::finish);
    group.max_age_ns = whole<std::int64_t>(given[4], name + ": max_age_ns");
    group.decay_ns = whole<std::int64_t>(given[5], name + ": decay_ns");
    return group;
}

Layout layout_from(Given robot, Given command_period_ns, Given interpolation, Given seam, Given channels, Given groups) {
    Layout layout{};
    set_name(layout.robot, robot, "robot");
    layout.command_period_ns = whole<std::int64_t>(command_period_ns, "command_period_ns");
    layout.interpolation = named(interpolation, "interpolation", Interpolation::cubic);
    layout.seam = seam_from(seam);
    for (const auto& channel : elements(channels, "channels", kMaxChannels)) {
        layout.channel[layout.channels] = channel_from(channel, at("channels", layout.channels));
        ++layout.channels;
    }
    for (const auto& group : elements(groups, "groups", kMaxGroups)) {
        layout.group[layout.groups] = group_from(group, at("groups", layout.groups));
        ++layout.groups;
    }
    return layout;
}

template <class T>
T expect(Result<T> result) {
    if (!result) throw py::value_error(result.error());
    return std::move(*result);
}

TensorView lent_by(Given object, const std::string& name, Buffers& buffers, bool writable = false) {
    if (!PyObject_CheckBuffer(object.ptr())) refuse_type(name, "an array", object);
    TensorView view = buffers.view(object, name, writable);
    expect_sound(view);
    return view;
}

std::int64_t time_from(Given object, const char* name) { return whole<std::int64_t>(object, name, 0); }

py::object feedback_of(const Memory& memory) {
    DriverFeedback sent;
    if (!read_feedback(memory.segment(), sent)) return py::none();
    py::list values;
    for (std::uint32_t i = 0; i < memory.layout().channels; ++i) values.append(sent.values[i]);
    return py::make_tuple(sent.driver, sent.tick, sent.at_ns, sent.chunk, sent.row, static_cast<int>(sent.status), values);
}

// -- the producer's side ---------------------------------------------------------------------------

struct StreamWriter {
    explicit StreamWriter(Writer made) : writer(std::move(made)) {}

    std::mutex one_at_a_time;  // publish and close; all else is for any thread
    Writer writer;
};

std::shared_ptr<StreamWriter> writer(Given self) { return held<StreamWriter>(self, "a StreamWriter"); }

std::shared_ptr<StreamWriter> open_writer(Given name, Given robot, Given command_period_ns, Given interpolation, Given seam,
                                          Given channels, Given groups) {
    const auto layout = std::make_unique<Layout>(layout_from(robot, command_period_ns, interpolation, seam, channels, groups));
    const auto segment = name.is_none() ? std::nullopt : std::optional(text(name, "name", kMostText));
    std::optional<Result<Writer>> made;
    without_gil([&] { made.emplace(segment ? Writer::open_or_create(*segment, *layout) : Writer::in_process(*layout)); });
    return std::make_shared<StreamWriter>(expect(std::move(*made)));
}

void publish(Given self, Given values, Given observed_at_ns, Given computed_at_ns, Given starts_at_ns, Given control_hz,
             Given now_ns) {
    const auto to = writer(self);
    Buffers lent;
    const TensorView rows = lent_by(values, "values", lent);
    const auto channels = static_cast<std::int64_t>(to->writer.layout().channels);
    const bool sound = rows.dtype == "float32" && rows.shape.size() == 2 &&
                       rows.shape[1] == channels && rows.shape[0] >= 1 && rows.shape[0] <= kMaxRows &&
                       (channels == 1 || rows.strides[1] == 1) &&
                       (rows.shape[0] == 1 || (rows.strides[0] >= channels && rows.strides[0] <= 1 << 24));
    if (!sound)
        refuse("values", "float32 [1 to " + std::to_string(kMaxRows) + ", " + std::to_string(channels) + "], row by row",
               rows.dtype + " " + to_string(rows.shape));
    const auto stride = rows.shape[0] == 1 ? channels : rows.strides[0];
    const Chunk chunk{time_from(observed_at_ns, "observed_at_ns"),
                      time_from(computed_at_ns, "computed_at_ns"),
                      whole<std::int64_t>(starts_at_ns, "starts_at_ns"),
                      wide_real(control_hz, "control_hz"),
                      static_cast<std::int32_t>(rows.shape[0]),
                      static_cast<std::int32_t>(stride),
                      reinterpret_cast<const float*>(rows.address)};
    const auto now = time_from(now_ns, "now_ns");
    const std::lock_guard<std::mutex> lock(to->one_at_a_time);
    const Refusal refusal = to->writer.publish(chunk, now);
    if (refusal) throw py::value_error(refusal.text());
}

void close_writer(Given self, Given now_ns) {
    const auto to = writer(self);
    const auto now = time_from(now_ns, "now_ns");
    without_gil([&] {  // it waits for the thread that stamps
        const std::lock_guard<std::mutex> lock(to->one_at_a_time);
        to->writer.close(now);
    });
}

// -- the robot's side ------------------------------------------------------------------------------

struct StreamReader {
    StreamReader(std::shared_ptr<Memory> from, Reader made) : memory(std::move(from)), reader(std::move(made)) {}

    std::mutex one_at_a_time;
    std::shared_ptr<Memory> memory;
    Reader reader;
};

std::shared_ptr<StreamReader> reader(Given self) { return held<StreamReader>(self, "a StreamReader"); }

struct ReaderOptions {
    ReaderOptions(Given driver, Given dead_after_ns, Given loop_dead_after_ns, Given group) {
        if (!group.is_none()) name = text(group, "group");
        options.driver = truth(driver, "driver");
        options.dead_after_ns = time_from(dead_after_ns, "dead_after_ns");
        options.loop_dead_after_ns = time_from(loop_dead_after_ns, "loop_dead_after_ns");
    }

    std::shared_ptr<StreamReader> of(std::shared_ptr<Memory> memory) {
        options.name = memory->name().c_str();
        options.group = name ? name->c_str() : nullptr;
        Reader made = expect(Reader::of(memory, options));
        return std::make_shared<StreamReader>(std::move(memory), std::move(made));
    }

    std::optional<std::string> name;
    Options options{};
};

std::shared_ptr<StreamReader> open_reader(Given name, Given driver, Given dead_after_ns, Given loop_dead_after_ns,
                                          Given group) {
    const std::string segment = text(name, "name", kMostText);
    ReaderOptions options(driver, dead_after_ns, loop_dead_after_ns, group);
    std::optional<Result<std::shared_ptr<Memory>>> memory;
    without_gil([&] { memory.emplace(Memory::open(segment, Access::use)); });
    return options.of(expect(std::move(*memory)));
}

// A contiguous row of doubles of a reader's width.
double* row_of(Given values, const std::string& name, const Reader& of, Buffers& lent, bool writable) {
    const TensorView row = lent_by(values, name, lent, writable);
    const auto dims = static_cast<std::int64_t>(of.dims());
    if (row.dtype != "float64" || row.shape.size() != 1 || row.shape[0] != dims ||
        (dims > 1 && row.strides[0] != 1))
        refuse(name, "float64 [" + std::to_string(dims) + "] without gaps", row.dtype + " " + to_string(row.shape));
    return reinterpret_cast<double*>(row.address);
}

py::tuple read(Given self, Given now_ns, Given out) {
    const auto from = reader(self);
    const auto now = time_from(now_ns, "now_ns");
    Buffers lent;
    double* const values = row_of(out, "out", from->reader, lent, true);
    const std::lock_guard<std::mutex> lock(from->one_at_a_time);
    const Command command = from->reader.read(now, values);
    return py::make_tuple(command.chunk, command.row, static_cast<int>(command.status), command.age_ns);
}

void start_at(Given self, Given values) {
    const auto from = reader(self);
    Buffers lent;
    const double* const pose = row_of(values, "values", from->reader, lent, false);
    for (std::size_t i = 0; i < from->reader.dims(); ++i)
        if (std::isinf(pose[i])) {
            const int channel = from->reader.channel(static_cast<int>(i));
            refuse("channel '" + std::string(from->reader.layout().channel[channel].name) + "'",
                   "a finite number, or NaN where it is not known", std::to_string(pose[i]));
        }
    const std::lock_guard<std::mutex> lock(from->one_at_a_time);
    from->reader.start_at(pose);
}

py::dict described_stream(Given self) {
    const auto from = reader(self);
    const Layout& layout = from->reader.layout();
    py::list names, groups;
    for (std::size_t i = 0; i < from->reader.dims(); ++i)
        names.append(layout.channel[from->reader.channel(static_cast<int>(i))].name);
    for (std::uint32_t i = 0; i < layout.groups; ++i) groups.append(layout.group[i].name);
    return py::dict("robot"_a = layout.robot, "command_period_ns"_a = layout.command_period_ns, "names"_a = names,
                    "groups"_a = groups);
}

// -- the module ------------------------------------------------------------------------------------

void add_writer(py::module_& m) {
    py::class_<StreamWriter, std::shared_ptr<StreamWriter>>(m, "StreamWriter", "The producer's side of an action stream.",
                                                            py::is_final())
        .def(py::init(&open_writer), "name"_a, "robot"_a, "command_period_ns"_a, "interpolation"_a, "seam"_a, "channels"_a,
             "groups"_a)
        .def("publish", &publish, "values"_a, "observed_at_ns"_a, "computed_at_ns"_a, "starts_at_ns"_a, "control_hz"_a,
             "now_ns"_a)
        .def("heartbeat", [](Given self, Given now_ns) { writer(self)->writer.heartbeat(time_from(now_ns, "now_ns")); },
             "now_ns"_a)
        .def("close", &close_writer, "now_ns"_a)
        .def("estop", [](Given self, Given now_ns) { writer(self)->writer.estop(time_from(now_ns, "now_ns")); }, "now_ns"_a)
        .def("clear_estop", [](Given self) { writer(self)->writer.clear_estop(); })
        .def("feedback", [](Given self) { return feedback_of(*writer(self)->writer.memory()); })
        .def("reader",
             [](Given self, Given driver, Given dead_after_ns, Given loop_dead_after_ns) {
                 const auto of = writer(self);
                 return ReaderOptions(driver, dead_after_ns, loop_dead_after_ns, py::none()).of(of->writer.memory());
             },
             "driver"_a, "dead_after_ns"_a, "loop_dead_after_ns"_a);
}

void add_reader(py::module_& m) {
    py::class_<StreamReader, std::shared_ptr<StreamReader>>(m, "StreamReader", "The robot's side of an action stream.",
                                                            py::is_final())
        .def(py::init(&open_reader), "name"_a, "driver"_a, "dead_after_ns"_a, "loop_dead_after_ns"_a, "group"_a)
        .def("read", &read, "now_ns"_a, "out"_a, "Fills float64 [dims]; (chunk, row, status, age_ns).")
        .def("start_at", &start_at, "values"_a)
        .def("stop",
             [](Given self) {
                 const auto from = reader(self);
                 const std::lock_guard<std::mutex> lock(from->one_at_a_time);
                 from->reader.stop();
             })
        .def("estop", [](Given self, Given now_ns) { reader(self)->reader.estop(time_from(now_ns, "now_ns")); }, "now_ns"_a)
        .def("clear_estop", [](Given self) { reader(self)->reader.clear_estop(); })
        .def("feedback", [](Given self) { return feedback_of(*reader(self)->memory); })
        .def("described", &described_stream, "robot, command_period_ns, names of what is read, and all groups.");
}

}  // namespace

void add_stream(py::module_& m) {
    add_writer(m);
    add_reader(m);
    m.def("stream_remove",
          [](Given name) {
              const std::string segment = text(name, "name", kMostText);
              expect(Writer::remove(segment));
          },
          "name"_a, "Takes the name of a segment without a producer away.");
}

}  // namespace dit4dit
