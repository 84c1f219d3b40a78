// Functions and types as CPython takes them. pybind11's own can be made without anything in them (__new__), turned into each
// other (__class__) and end the process in their base; these cannot. Of pybind11 the handles and the errors are used.
#pragma once

#include <pybind11/pybind11.h>

#ifdef __GLIBCXX__
#include <cxxabi.h>
#endif
#include <unistd.h>

#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "errors.h"

namespace dit4dit {

// Runs a launcher while other Python threads go on. When the interpreter ends meanwhile, CPython up to 3.13 ends this thread by
// unwinding it, which C++ answers with abort() in the first destructor; it waits for the end of the process instead, as in 3.14.
template <class Work>
void without_gil(Work work) {
    struct Released {
        PyThreadState* state = PyEval_SaveThread();
        ~Released() {
#ifdef __GLIBCXX__
            try {
                PyEval_RestoreThread(state);
            } catch (const abi::__forced_unwind&) {
                for (;;) pause();
            }
#else
            PyEval_RestoreThread(state);
#endif
        }
    };
    const Released released;
    work();
}

// The arguments of one call by name. Its signature is the first line of a docstring, "launch($self, grid, stream)": one text for
// inspect.signature and for the call. A default is written "library='x'" there, and is the caller's to supply.
class Given {
public:
    Given(const char* signature, PyObject* args, PyObject* kwargs) {
        const char* open = std::strchr(signature, '(');
        const std::string name(signature, open);
        std::vector<std::string> names;
        std::size_t optional = 0;
        for (const char* at = open + 1; *(at - 1) != ')';) {
            const std::size_t length = std::strcspn(at, ",)");
            const std::string one(at, length);
            const std::size_t equals = one.find('=');
            if (one[0] != '$') names.push_back(one.substr(0, equals)), optional += equals != std::string::npos;
            at += length + 1;
            if (*at == ' ') ++at;
        }
        values_.reserve(names.size());
        const auto wrong = [&](const std::string& got) {
            std::string wanted;
            for (const auto& one : names) wanted += (wanted.empty() ? "" : ", ") + one;
            throw py::type_error(name + ": expected the arguments (" + wanted + "), got " + got);
        };
        const auto count = static_cast<std::size_t>(PyTuple_GET_SIZE(args));
        if (count > names.size()) wrong(std::to_string(count));
        for (std::size_t i = 0; i < names.size(); ++i) {
            PyObject* value = i < count ? PyTuple_GET_ITEM(args, static_cast<Py_ssize_t>(i)) : nullptr;
            PyObject* named = kwargs == nullptr ? nullptr : PyDict_GetItemString(kwargs, names[i].c_str());
            if (value != nullptr && named != nullptr) wrong(names[i] + " twice");
            if (value == nullptr && named == nullptr && i + optional < names.size()) wrong("no " + names[i]);
            taken_ += named != nullptr;
            values_.emplace_back(names[i], py::reinterpret_borrow<py::object>(value != nullptr ? value : named));
        }
        if (kwargs != nullptr && PyDict_GET_SIZE(kwargs) > taken_) wrong("a name that is none of these");
    }

    // Of an argument with a default that was left out: a handle to nothing.
    py::handle operator[](const char* name) const {
        for (const auto& [known, value] : values_)
            if (known == name) return value;
        throw std::logic_error(std::string("no argument ") + name);
    }

private:
    std::vector<std::pair<std::string, py::object>> values_;
    Py_ssize_t taken_ = 0;
};

// body(), or a null pointer with Python's error set: no C++ exception may leave for C.
template <class Body>
PyObject* guarded(Body body) {
    try {
        return body();
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const py::builtin_exception& error) {
        error.set_error();
    } catch (const DtypeError& error) {
        PyErr_SetString(PyExc_TypeError, error.what());
    } catch (const CudaError& error) {
        PyObject* errors = PyImport_ImportModule("dit4dit.errors");
        PyObject* kind = errors == nullptr ? nullptr
                                           : PyObject_GetAttrString(errors, CudaError::sticky(error.code) ? "DeviceError" : "CudaError");
        if (kind != nullptr) PyErr_SetString(kind, error.what());
        Py_XDECREF(kind);
        Py_XDECREF(errors);
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::length_error& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

// A function or method `body(self, given)`, with the signature that its docstring begins with.
template <const char* signature, py::object (*body)(PyObject*, const Given&)>
PyMethodDef method() {
    static const std::string name(signature, std::strchr(signature, '('));
    PyObject* (*const call)(PyObject*, PyObject*, PyObject*) = [](PyObject* self, PyObject* args, PyObject* kwargs) {
        return guarded([&] { return body(self, Given(signature, args, kwargs)).release().ptr(); });
    };
    return {name.c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_VARARGS | METH_KEYWORDS,
            signature};
}

// A Python object that shares a T. It is never without: `hold` alone makes one.
template <class T>
struct Held {
    PyObject_HEAD
    std::shared_ptr<T> value;

    static T& of(PyObject* self) { return *reinterpret_cast<Held*>(self)->value; }

    static py::object hold(PyTypeObject* type, std::shared_ptr<T> value) {
        py::object self = owned(type->tp_alloc(type, 0));
        new (&reinterpret_cast<Held*>(self.ptr())->value) std::shared_ptr<T>(std::move(value));
        return self;
    }

    static void release(PyObject* self) {
        PyTypeObject* type = Py_TYPE(self);
        reinterpret_cast<Held*>(self)->value.~shared_ptr();
        type->tp_free(self);
        Py_DECREF(type);
    }

    // Final and immutable: no subclass, no other __class__. Without `make` no instance can be made from Python.
    static py::object type(const char* name, const char* doc, PyMethodDef* methods, PyGetSetDef* properties, newfunc make) {
        std::vector<PyType_Slot> slots{{Py_tp_dealloc, reinterpret_cast<void*>(&Held::release)},
                                       {Py_tp_doc, const_cast<char*>(doc)},
                                       {Py_tp_methods, methods},
                                       {Py_tp_getset, properties}};
        if (make != nullptr) slots.push_back({Py_tp_new, reinterpret_cast<void*>(make)});
        slots.push_back({0, nullptr});
        const unsigned flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE |
                               (make == nullptr ? Py_TPFLAGS_DISALLOW_INSTANTIATION : 0);
        PyType_Spec spec{name, sizeof(Held), 0, flags, slots.data()};
        return owned(PyType_FromSpec(&spec));
    }
};

}  // namespace dit4dit
