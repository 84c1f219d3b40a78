// dit4dit._C: one m.def per launcher, no logic. A tensor comes in as the tuple (address, shape, strides, dtype, device), or
// on the CPU as an array that lends its memory (NumPy). Every parameter is any object: arguments.h converts it, and says what is
// wrong in words of bounded length; pybind11's own message for a type that it cannot convert has the repr of every argument in it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arguments.h"
#include "driver.h"
#include "launchers.h"
#include "without_gil.h"

#ifndef DIT4DIT_CUDA_ARCHITECTURES
#define DIT4DIT_CUDA_ARCHITECTURES ""
#endif
#ifndef DIT4DIT_CUDA_VERSION
#define DIT4DIT_CUDA_VERSION ""
#endif

namespace dit4dit {
void add_stream(py::module_& m);        // stream_bindings.cpp
void add_snapshot(py::module_& m);      // snapshot_bindings.cpp
void add_stream_bench(py::module_& m);  // snapshot_bindings.cpp
}

using namespace dit4dit;
using namespace py::literals;

namespace {

using Given = const py::object&;

// -- launchers -------------------------------------------------------------------------------------------------------------

// launcher(views, widths, out, filter): what both implementations of preprocess take.
template <class Launcher>
void with_views(Given views, Given widths, Given out, Given filter, Launcher launcher) {
    Buffers buffers;
    std::vector<TensorView> view_list;
    for (const auto& view : elements(views, "views", kMostViews))
        view_list.push_back(view_from(view, at("views", view_list.size()), buffers));
    const auto width_list = whole_numbers(widths, "widths", kMostViews);
    const auto out_view = view_from(out, "out", buffers, true);
    launcher(view_list, width_list, out_view, text(filter, "filter"));
}

void preprocess(Given views, Given widths, Given out, Given filter) {
    with_views(views, widths, out, filter, [](const auto&... all) { without_gil([&] { preprocess_cpu(all...); }); });
}

py::tuple cuda_architectures() {
    const std::string names = DIT4DIT_CUDA_ARCHITECTURES;
    return names.empty() ? py::tuple() : py::tuple(py::str(names).attr("split")(","));
}

py::dict build_info() {
    return py::dict("compiler"_a = __VERSION__, "cuda"_a = DIT4DIT_CUDA_VERSION,
                    "architectures"_a = cuda_architectures());
}

#ifdef DIT4DIT_WITH_CUDA
void preprocess_on_cuda(Given views, Given widths, Given out, Given filter, Given stream, Given programmatic) {
    with_views(views, widths, out, filter, [&](const auto&... all) {
        const auto on = whole<std::uintptr_t>(stream, "stream");
        const bool early = truth(programmatic, "programmatic");
        without_gil([&] { preprocess_cuda(all..., on, early); });
    });
}

void action_ode_on_cuda(Given tensors, Given numbers, Given max_guidance, Given limit_ns, Given stream) {
    Buffers lent;
    const NamedViews views = by_name(tensors, "tensors", [&](const py::handle& tensor, const std::string& name) {
        return view_from(tensor, name, lent);
    });
    const NamedNumbers named = by_name(numbers, "numbers", [](const py::handle& number, const std::string& name) {
        return whole<std::int64_t>(number, name);
    });
    const auto most = real(max_guidance, "max_guidance");
    const auto limit = whole<std::int64_t>(limit_ns, "limit_ns");
    const auto on = whole<std::uintptr_t>(stream, "stream");
    without_gil([&] { action_ode_cuda(views, named, most, limit, on); });
}

std::map<std::string, int> action_ode_facts_of(Given device, Given shared_bytes) {
    return action_ode_facts(whole<int>(device, "device", 0), whole<int>(shared_bytes, "shared_bytes", 0));
}

void self_attention_on_cuda(Given q, Given k, Given v, Given out, Given queries, Given stream, Given programmatic) {
    Buffers lent;
    const auto q_view = view_from(q, "q", lent), k_view = view_from(k, "k", lent), v_view = view_from(v, "v", lent);
    const auto out_view = view_from(out, "out", lent);
    const auto query_count = whole<int>(queries, "queries");
    const auto on = whole<std::uintptr_t>(stream, "stream");
    const bool early = truth(programmatic, "programmatic");
    without_gil([&] { self_attention_cuda(q_view, k_view, v_view, out_view, query_count, on, early); });
}
#endif

// -- the driver ------------------------------------------------------------------------------------------------------------

std::shared_ptr<Driver> driver(Given self) { return held<Driver>(self, "a Driver, made by Driver(library)"); }
std::shared_ptr<Kernel> kernel(Given self) { return held<Kernel>(self, "a Kernel, made by Driver.load"); }

std::vector<Value> values_from(Given arguments) {
    std::vector<Value> values;
    for (const auto& argument : elements(arguments, "arguments", kMostParameters)) {
        if (PyLong_CheckExact(argument.ptr())) {
            int overflow = 0;  // by hand: a launch is to cost microseconds, and names are only for messages
            const auto value = PyLong_AsLongLongAndOverflow(argument.ptr(), &overflow);
            if (overflow) refuse(at("arguments", values.size()), "a number of 64 bits", described(argument));
            values.push_back({Value::Type::integer, value, 0});
        } else if (PyFloat_CheckExact(argument.ptr())) {
            values.push_back({Value::Type::real, 0, PyFloat_AS_DOUBLE(argument.ptr())});
        } else {
            refuse_type(at("arguments", values.size()), "an int or a float", argument);
        }
    }
    return values;
}

void launch(Given self, Given grid, Given stream, Given arguments, Given programmatic) {
    const auto launched = kernel(self);
    const auto blocks = whole_numbers(grid, "grid", kMostDimensions);
    const auto on = whole<std::uintptr_t>(stream, "stream");
    const auto values = values_from(arguments);
    const bool early = truth(programmatic, "programmatic");
    without_gil([&] { launched->launch(blocks, on, values, early); });
}

std::pair<std::string, std::string> parameter_from(Given argument, const std::string& name) {
    const auto pair = elements(argument, name, 2);
    if (pair.size() != 2) refuse(name, "(name, kind)", std::to_string(pair.size()) + " elements");
    return {text(pair[0], name + ": name"), text(pair[1], name + ": kind")};
}

std::shared_ptr<Kernel> load(Given self, Given image, Given entry, Given device, Given threads, Given shared, Given arguments,
                             Given scratch) {
    const auto loads = driver(self);
    if (!PyBytes_Check(image.ptr())) refuse_type("image", "bytes", image);
    const std::string_view code(PyBytes_AS_STRING(image.ptr()), static_cast<std::size_t>(PyBytes_GET_SIZE(image.ptr())));
    const auto name = text(entry, "entry", kMostText);
    const auto ordinal = whole<int>(device, "device", 0);
    const auto thread_count = whole<unsigned>(threads, "threads");
    const auto shared_bytes = whole<int>(shared, "shared", 0);
    const auto scratch_count = whole<unsigned>(scratch, "scratch", 0, kMostParameters);
    std::vector<std::pair<std::string, std::string>> parameters;
    for (const auto& argument : elements(arguments, "arguments", kMostParameters))
        parameters.push_back(parameter_from(argument, at("arguments", parameters.size())));
    std::shared_ptr<Kernel> loaded;
    without_gil([&] { loaded = loads->load(code, name, ordinal, thread_count, shared_bytes, parameters, scratch_count); });
    return loaded;
}

void add_driver(py::module_& m) {
    py::class_<Kernel, std::shared_ptr<Kernel>>(m, "Kernel", "A kernel on a device, out of machine code.", py::is_final())
        .def_property_readonly("entry", [](Given self) { return kernel(self)->entry(); },
                               "The kernel's name in the machine code.")
        .def("launch", &launch, "grid"_a, "stream"_a, "arguments"_a, "programmatic"_a = false);
    py::class_<Driver, std::shared_ptr<Driver>>(m, "Driver", "The CUDA driver, loaded when this is made.", py::is_final())
        .def(py::init([](Given library) { return std::make_shared<Driver>(text(library, "library", kMostText)); }),
             "library"_a = "libcuda.so.1")
        .def_property_readonly("version", [](Given self) { return driver(self)->version(); },
                               "13000 for CUDA 13.0: the newest that this driver runs.")
        .def_property_readonly("programmatic", [](Given self) { return driver(self)->programmatic(); },
                               "Whether it can launch a kernel while the one before it runs (since 11.8).")
        .def("load", &load, "image"_a, "entry"_a, "device"_a, "threads"_a, "shared"_a, "arguments"_a, "scratch"_a);
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.doc() = "The compiled half of dit4dit; dit4dit.ops is its door.";
    py::register_exception_translator([](std::exception_ptr error) {
        try {
            if (error) std::rethrow_exception(error);
        } catch (const DtypeError& e) {
            PyErr_SetString(PyExc_TypeError, e.what());
        } catch (const CudaError& e) {
            const auto errors = py::module_::import("dit4dit.errors");
            py::set_error(errors.attr(CudaError::sticky(e.code) ? "DeviceError" : "CudaError"), e.what());
        }
    });
    add_driver(m);
    add_stream(m);
    add_snapshot(m);
    add_stream_bench(m);
    m.attr("cuda_architectures") = cuda_architectures();
    m.def("build_info", &build_info, "compiler, cuda (version, empty without), architectures");
    m.def("preprocess", &preprocess, "views"_a, "widths"_a, "out"_a, "filter"_a);
#ifdef DIT4DIT_WITH_CUDA
    m.def("preprocess_cuda", &preprocess_on_cuda, "views"_a, "widths"_a, "out"_a, "filter"_a, "stream"_a,
          "programmatic"_a = false);
    m.def("action_ode_cuda", &action_ode_on_cuda, "tensors"_a, "numbers"_a, "max_guidance"_a, "limit_ns"_a, "stream"_a);
    m.def("action_ode_facts", &action_ode_facts_of, "device"_a, "shared_bytes"_a);
    m.def("self_attention_cuda", &self_attention_on_cuda, "q"_a, "k"_a, "v"_a, "out"_a, "queries"_a, "stream"_a,
          "programmatic"_a = false);
#endif
}
