// dit4dit._C: one m.def per launcher, no logic. A tensor comes in as the tuple (address, shape, strides, dtype, device), or
// on the CPU as an array that lends its memory (NumPy).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "driver.h"
#include "launchers.h"
#include "tensor_view.h"

#ifndef DIT4DIT_CUDA_ARCHITECTURES
#define DIT4DIT_CUDA_ARCHITECTURES ""
#endif
#ifndef DIT4DIT_CUDA_VERSION
#define DIT4DIT_CUDA_VERSION ""
#endif

namespace py = pybind11;
using namespace dit4dit;
using namespace py::literals;

namespace {

// A NumPy array, or whatever else lends its memory; the caller's reference keeps it alive through the call.
TensorView view_of_buffer(const py::handle& object, const std::string& name, bool writable) {
    if (writable && py::hasattr(object, "flags") && !object.attr("flags").attr("writeable").cast<bool>())
        throw py::value_error(name + ": expected memory that can be written, got a read-only array");
    const auto buffer = py::reinterpret_borrow<py::buffer>(object).request(writable);
    const std::map<std::string, std::string> names = {{"B", "uint8"}, {"e", "float16"}, {"f", "float32"}, {"d", "float64"}};
    const auto known = names.find(buffer.format);
    TensorView view{name, reinterpret_cast<std::uintptr_t>(buffer.ptr), {buffer.shape.begin(), buffer.shape.end()}, {},
                    known == names.end() ? "format " + buffer.format : known->second, "cpu"};
    for (const auto step : buffer.strides) {
        if (step % buffer.itemsize) refuse(name, "strides of whole elements", std::to_string(step) + " bytes");
        view.strides.push_back(step / buffer.itemsize);
    }
    return view;
}

TensorView view_from(const py::handle& tuple, const std::string& name, bool writable = false) {
    if (PyObject_CheckBuffer(tuple.ptr())) return view_of_buffer(tuple, name, writable);
    using Numbers = std::vector<std::int64_t>;
    using Facts = std::tuple<std::uintptr_t, Numbers, Numbers, std::string, std::string>;
    try {
        auto [address, shape, strides, dtype, device] = tuple.cast<Facts>();
        return {name, address, shape, strides, dtype, device};
    } catch (const py::cast_error&) {
        throw py::type_error(name + ": expected an array or (address, shape, strides in elements, dtype, device), got " +
                             py::repr(tuple).cast<std::string>());
    }
}

std::vector<TensorView> views_from(const py::sequence& tuples, const std::string& name) {
    std::vector<TensorView> views;
    for (std::size_t i = 0; i < tuples.size(); ++i)
        views.push_back(view_from(tuples[i], name + "[" + std::to_string(i) + "]"));
    return views;
}

#ifdef DIT4DIT_WITH_CUDA
std::optional<TensorView> optional_view_from(const std::optional<py::tuple>& tuple, const std::string& name) {
    if (!tuple) return std::nullopt;
    return view_from(*tuple, name);
}
#endif

[[maybe_unused]] NamedViews views_by_name(const py::dict& tuples) {
    NamedViews views;
    for (const auto& [key, tuple] : tuples) {
        const auto name = key.cast<std::string>();
        views.emplace(name, view_from(tuple, name));
    }
    return views;
}

// A launcher as Python calls it: tuples become tensor views, named after their argument, and the GIL is released.
template <class... Rest>
auto unpacked(void (*launcher)(const std::vector<TensorView>&, const std::vector<std::int64_t>&, const TensorView&,
                               Rest...)) {
    return [launcher](const py::sequence& views, const std::vector<std::int64_t>& widths, const py::object& out,
                      Rest... rest) {
        const auto view_list = views_from(views, "views");
        const auto out_view = view_from(out, "out", true);
        const py::gil_scoped_release release;
        launcher(view_list, widths, out_view, rest...);
    };
}

std::vector<Value> values_from(const py::sequence& arguments) {
    std::vector<Value> values;
    for (const auto& argument : arguments) {
        if (PyLong_CheckExact(argument.ptr()))
            values.push_back({Value::Type::integer, argument.cast<std::int64_t>(), 0});
        else if (PyFloat_CheckExact(argument.ptr()))
            values.push_back({Value::Type::real, 0, argument.cast<double>()});
        else
            throw py::type_error("arguments[" + std::to_string(values.size()) + "]: expected an int or a float, got " +
                                 py::repr(argument).cast<std::string>());
    }
    return values;
}

void add_driver(py::module_& m) {
    py::class_<Kernel, std::shared_ptr<Kernel>>(m, "Kernel", "A kernel on a device, out of machine code.")
        .def_property_readonly("entry", &Kernel::entry)
        .def(
            "launch",
            [](const Kernel& kernel, const std::vector<std::int64_t>& grid, std::uintptr_t stream,
               const py::sequence& arguments) {
                const auto values = values_from(arguments);
                const py::gil_scoped_release release;
                kernel.launch(grid, stream, values);
            },
            "grid"_a, "stream"_a, "arguments"_a);
    py::class_<Driver, std::shared_ptr<Driver>>(m, "Driver", "The CUDA driver, loaded when this is made.")
        .def(py::init<const std::string&>(), "library"_a = "libcuda.so.1")
        .def_property_readonly("version", &Driver::version)
        .def(
            "load",
            [](Driver& driver, const py::bytes& image, const std::string& entry, int device, unsigned threads,
               unsigned shared, const std::vector<std::pair<std::string, std::string>>& arguments, unsigned scratch) {
                const std::string bytes = image;
                const py::gil_scoped_release release;
                return driver.load(bytes, entry, device, threads, shared, arguments, scratch);
            },
            "image"_a, "entry"_a, "device"_a, "threads"_a, "shared"_a, "arguments"_a, "scratch"_a);
}

py::tuple cuda_architectures() {
    const std::string names = DIT4DIT_CUDA_ARCHITECTURES;
    return names.empty() ? py::tuple() : py::tuple(py::str(names).attr("split")(","));
}

py::dict build_info() {
    return py::dict("compiler"_a = __VERSION__, "cuda"_a = DIT4DIT_CUDA_VERSION,
                    "architectures"_a = cuda_architectures());
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
    m.attr("cuda_architectures") = cuda_architectures();
    m.def("build_info", &build_info, "compiler, cuda (version, empty without), architectures");

    m.def("preprocess", unpacked(&preprocess_cpu), "views"_a, "widths"_a, "out"_a, "filter"_a);
#ifdef DIT4DIT_WITH_CUDA
    m.def("preprocess_cuda", unpacked(&preprocess_cuda), "views"_a, "widths"_a, "out"_a, "filter"_a, "stream"_a);
    m.def(
        "action_ode_cuda",
        [](const py::dict& tensors, const NamedNumbers& numbers, const std::vector<BufferPlace>& buffers, float max_guidance,
           std::int64_t limit_ns, std::uintptr_t stream) {
            const auto views = views_by_name(tensors);
            const py::gil_scoped_release release;
            action_ode_cuda(views, numbers, buffers, max_guidance, limit_ns, stream);
        },
        "tensors"_a, "numbers"_a, "buffers"_a, "max_guidance"_a, "limit_ns"_a, "stream"_a);
    m.def(
        "self_attention_cuda",
        [](const py::tuple& qkv, const std::optional<py::tuple>& norm_q, const std::optional<py::tuple>& norm_k,
           const std::optional<py::tuple>& rotary, const py::tuple& out, int heads, float eps, int queries,
           std::uintptr_t stream) {
            const auto qkv_view = view_from(qkv, "qkv"), out_view = view_from(out, "out");
            const auto norm_q_view = optional_view_from(norm_q, "norm_q"), norm_k_view = optional_view_from(norm_k, "norm_k");
            const auto rotary_view = optional_view_from(rotary, "rotary");
            const py::gil_scoped_release release;
            self_attention_cuda(qkv_view, norm_q_view, norm_k_view, rotary_view, out_view, heads, eps, queries, stream);
        },
        "qkv"_a, "norm_q"_a, "norm_k"_a, "rotary"_a, "out"_a, "heads"_a, "eps"_a, "queries"_a, "stream"_a);
    m.def("action_ode_facts", &action_ode_facts, "device"_a, "shared_bytes"_a);
#endif
}
