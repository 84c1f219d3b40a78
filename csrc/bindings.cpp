// dit4dit._C: one function per launcher, no logic. A tensor comes in as the tuple (address, shape, strides, dtype, device), or
// on the CPU as an array that lends its memory (NumPy).
#include "arguments.h"
#include "driver.h"
#include "launchers.h"
#include "python_types.h"

#ifndef DIT4DIT_CUDA_ARCHITECTURES
#define DIT4DIT_CUDA_ARCHITECTURES ""
#endif
#ifndef DIT4DIT_CUDA_VERSION
#define DIT4DIT_CUDA_VERSION ""
#endif

using namespace dit4dit;
using namespace py::literals;

namespace {

// -- launchers -------------------------------------------------------------------------------------------------------------

// views, widths, out, filter: what both implementations of preprocess take.
template <class Launcher>
void with_views(const Given& given, Launcher launcher) {
    Buffers buffers;
    std::vector<TensorView> views;
    for (const auto& view : elements(given["views"], "views", kMostViews))
        views.push_back(view_from(view, at("views", views.size()), buffers));
    const auto widths = whole_numbers(given["widths"], "widths", kMostViews);
    const auto out = view_from(given["out"], "out", buffers, true);
    const auto filter = text(given["filter"], "filter");
    launcher(views, widths, out, filter);
}

constexpr char kPreprocess[] = "preprocess($module, views, widths, out, filter)\n--\n\n";
py::object preprocess(PyObject*, const Given& given) {
    with_views(given, [](const auto&... all) { without_gil([&] { preprocess_cpu(all...); }); });
    return py::none();
}

constexpr char kBuildInfo[] = "build_info($module)\n--\n\ncompiler, cuda (version, empty without), architectures";
py::tuple cuda_architectures() {
    const std::string names = DIT4DIT_CUDA_ARCHITECTURES;
    return names.empty() ? py::tuple() : py::tuple(py::str(names).attr("split")(","));
}
py::object build_info(PyObject*, const Given&) {
    return py::dict("compiler"_a = __VERSION__, "cuda"_a = DIT4DIT_CUDA_VERSION,
                    "architectures"_a = cuda_architectures());
}

#ifdef DIT4DIT_WITH_CUDA
constexpr char kPreprocessCuda[] = "preprocess_cuda($module, views, widths, out, filter, stream)\n--\n\n";
py::object preprocess_on_cuda(PyObject*, const Given& given) {
    with_views(given, [&](const auto&... all) {
        const auto stream = whole<std::uintptr_t>(given["stream"], "stream");
        without_gil([&] { preprocess_cuda(all..., stream); });
    });
    return py::none();
}

constexpr char kActionOdeCuda[] =
    "action_ode_cuda($module, tensors, numbers, buffers, max_guidance, limit_ns, stream)\n--\n\n";
py::object action_ode_on_cuda(PyObject*, const Given& given) {
    Buffers lent;
    const NamedViews tensors = by_name(given["tensors"], "tensors", [&](const py::handle& tensor, const std::string& name) {
        return view_from(tensor, name, lent);
    });
    const NamedNumbers numbers = by_name(given["numbers"], "numbers", [](const py::handle& number, const std::string& name) {
        return whole<std::int64_t>(number, name);
    });
    std::vector<BufferPlace> buffers;
    for (const auto& place : elements(given["buffers"], "buffers", 256)) {
        const std::string name = at("buffers", buffers.size());
        const auto numbers_of = elements(place, name, 3);
        if (numbers_of.size() != 3) refuse(name, "(offset, planes, columns)", std::to_string(numbers_of.size()) + " numbers");
        buffers.emplace_back(whole<std::int64_t>(numbers_of[0], name + ": offset"), whole<int>(numbers_of[1], name + ": planes"),
                             whole<int>(numbers_of[2], name + ": columns"));
    }
    const auto max_guidance = real(given["max_guidance"], "max_guidance");
    const auto limit_ns = whole<std::int64_t>(given["limit_ns"], "limit_ns");
    const auto stream = whole<std::uintptr_t>(given["stream"], "stream");
    without_gil([&] { action_ode_cuda(tensors, numbers, buffers, max_guidance, limit_ns, stream); });
    return py::none();
}

constexpr char kActionOdeFacts[] = "action_ode_facts($module, device, shared_bytes)\n--\n\n";
py::object action_ode_facts_of(PyObject*, const Given& given) {
    const auto facts = action_ode_facts(whole<int>(given["device"], "device", 0), whole<int>(given["shared_bytes"], "shared_bytes", 0));
    py::dict found;
    for (const auto& [name, value] : facts) found[name.c_str()] = value;
    return found;
}

constexpr char kSelfAttentionCuda[] =
    "self_attention_cuda($module, qkv, norm_q, norm_k, rotary, out, heads, eps, queries, stream)\n--\n\n";
py::object self_attention_on_cuda(PyObject*, const Given& given) {
    Buffers lent;
    const auto view = [&](const char* name) { return view_from(given[name], name, lent); };
    const auto optional = [&](const char* name) { return given[name].is_none() ? std::nullopt : std::optional(view(name)); };
    const auto qkv = view("qkv"), out = view("out");
    const auto norm_q = optional("norm_q"), norm_k = optional("norm_k"), rotary = optional("rotary");
    const auto heads = whole<int>(given["heads"], "heads"), queries = whole<int>(given["queries"], "queries");
    const auto eps = real(given["eps"], "eps");
    const auto stream = whole<std::uintptr_t>(given["stream"], "stream");
    without_gil([&] { self_attention_cuda(qkv, norm_q, norm_k, rotary, out, heads, eps, queries, stream); });
    return py::none();
}
#endif

// -- the driver ------------------------------------------------------------------------------------------------------------

PyTypeObject* kernel_type = nullptr;

std::vector<Value> values_from(const py::handle& arguments) {
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

constexpr char kLaunch[] = "launch($self, grid, stream, arguments)\n--\n\n";
py::object launch(PyObject* self, const Given& given) {
    const auto grid = whole_numbers(given["grid"], "grid", kMostDimensions);
    const auto stream = whole<std::uintptr_t>(given["stream"], "stream");
    const auto values = values_from(given["arguments"]);
    without_gil([&] { Held<Kernel>::of(self).launch(grid, stream, values); });
    return py::none();
}

constexpr char kLoad[] = "load($self, image, entry, device, threads, shared, arguments, scratch)\n--\n\n";
py::object load(PyObject* self, const Given& given) {
    const auto image = given["image"];
    if (!PyBytes_Check(image.ptr())) refuse_type("image", "bytes", image);
    const std::string_view code(PyBytes_AS_STRING(image.ptr()), static_cast<std::size_t>(PyBytes_GET_SIZE(image.ptr())));
    const auto entry = text(given["entry"], "entry", kMostText);
    const auto device = whole<int>(given["device"], "device", 0);
    const auto threads = whole<unsigned>(given["threads"], "threads");
    const auto shared = whole<int>(given["shared"], "shared", 0);
    const auto scratch = whole<unsigned>(given["scratch"], "scratch", 0, kMostParameters);
    std::vector<std::pair<std::string, std::string>> arguments;
    for (const auto& argument : elements(given["arguments"], "arguments", kMostParameters)) {
        const std::string name = at("arguments", arguments.size());
        const auto pair = elements(argument, name, 2);
        if (pair.size() != 2) refuse(name, "(name, kind)", std::to_string(pair.size()) + " elements");
        arguments.emplace_back(text(pair[0], name + ": name"), text(pair[1], name + ": kind"));
    }
    std::shared_ptr<Kernel> kernel;
    without_gil([&] { kernel = Held<Driver>::of(self).load(code, entry, device, threads, shared, arguments, scratch); });
    return Held<Kernel>::hold(kernel_type, std::move(kernel));
}

constexpr char kDriver[] =
    "Driver(library='libcuda.so.1')\n--\n\nThe CUDA driver, loaded when this is made.";
PyObject* make_driver(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    return guarded([&] {
        const Given given(kDriver, args, kwargs);
        const auto library = given["library"];
        return Held<Driver>::hold(type, std::make_shared<Driver>(library ? text(library, "library", kMostText) : "libcuda.so.1"))
            .release()
            .ptr();
    });
}

void add_driver(py::module_& m) {
    static PyMethodDef of_kernel[] = {method<kLaunch, launch>(), {}};
    static PyGetSetDef facts_of_kernel[] = {
        {"entry",
         [](PyObject* self, void*) {
             return guarded([&] { return py::str(Held<Kernel>::of(self).entry()).release().ptr(); });
         },
         nullptr, "The kernel's name in the machine code.", nullptr},
        {}};
    static PyMethodDef of_driver[] = {method<kLoad, load>(), {}};
    static PyGetSetDef facts_of_driver[] = {
        {"version", [](PyObject* self, void*) { return PyLong_FromLong(Held<Driver>::of(self).version()); }, nullptr,
         "13000 for CUDA 13.0: the newest that this driver runs.", nullptr},
        {}};
    const auto kernel = Held<Kernel>::type("dit4dit._C.Kernel", "A kernel on a device, out of machine code.", of_kernel,
                                           facts_of_kernel, nullptr);
    m.attr("Kernel") = kernel;
    m.attr("Driver") = Held<Driver>::type("dit4dit._C.Driver", kDriver, of_driver, facts_of_driver, make_driver);
    kernel_type = reinterpret_cast<PyTypeObject*>(py::object(kernel).release().ptr());
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.doc() = "The compiled half of dit4dit; dit4dit.ops is its door.";
    add_driver(m);
    m.attr("cuda_architectures") = cuda_architectures();
    static PyMethodDef functions[] = {
        method<kBuildInfo, build_info>(),
        method<kPreprocess, preprocess>(),
#ifdef DIT4DIT_WITH_CUDA
        method<kPreprocessCuda, preprocess_on_cuda>(),
        method<kActionOdeCuda, action_ode_on_cuda>(),
        method<kActionOdeFacts, action_ode_facts_of>(),
        method<kSelfAttentionCuda, self_attention_on_cuda>(),
#endif
        {},
    };
    if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
}
