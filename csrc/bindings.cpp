// dit4dit._C: one m.def per launcher, no logic. A tensor comes in as the tuple (address, shape, strides, dtype, device).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

TensorView view_from(const py::handle& tuple, const std::string& name) {
    using Numbers = std::vector<std::int64_t>;
    using Facts = std::tuple<std::uintptr_t, Numbers, Numbers, std::string, std::string>;
    try {
        auto [address, shape, strides, dtype, device] = tuple.cast<Facts>();
        return {name, address, shape, strides, dtype, device};
    } catch (const py::cast_error&) {
        throw py::type_error(name + ": expected (address, shape, strides in elements, dtype, device), got " +
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

NamedViews views_by_name(const py::dict& tuples) {
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
    return [launcher](const py::sequence& views, const std::vector<std::int64_t>& widths, const py::tuple& out,
                      Rest... rest) {
        const auto view_list = views_from(views, "views");
        const auto out_view = view_from(out, "out");
        const py::gil_scoped_release release;
        launcher(view_list, widths, out_view, rest...);
    };
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
        }
    });
    py::register_exception<DeviceLost>(m, "DeviceLost", PyExc_RuntimeError);
    m.attr("cuda_architectures") = cuda_architectures();
    m.def("build_info", &build_info, "compiler, cuda (version, empty without), architectures");

    m.def("preprocess", unpacked(&preprocess_cpu), "views"_a, "widths"_a, "out"_a, "filter"_a);
#ifdef DIT4DIT_WITH_CUDA
    m.def("preprocess_cuda", unpacked(&preprocess_cuda), "views"_a, "widths"_a, "out"_a, "filter"_a, "stream"_a);
    m.def(
        "action_ode_cuda",
        [](const py::dict& tensors, const NamedNumbers& numbers, const std::vector<std::pair<std::int64_t, int>>& buffers,
           float max_guidance, std::int64_t limit_ns, std::uintptr_t stream) {
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
