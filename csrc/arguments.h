// What Python hands over, made into plain C++. Any object may come, of any size, and its methods may do anything: every length
// is bounded before anything is copied, messages name a type and never call a repr, and lent memory is held until the call ends.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <list>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "tensor_view.h"

namespace dit4dit {

namespace py = pybind11;

constexpr std::size_t kMostViews = 32768, kMostText = 4096;

inline py::object owned(PyObject* result) {
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}

// The beginning of a text, on one line.
inline std::string shown(const std::string& text) {
    std::size_t end = std::min<std::size_t>(text.size(), 80);
    while (end < text.size() && end > 0 && (text[end] & 0xc0) == 0x80) --end;  // not within a character of UTF-8
    std::string out;
    for (const unsigned char c : text.substr(0, end)) {
        char escaped[8];
        std::snprintf(escaped, sizeof escaped, "\\x%02x", c);
        out += c < 0x20 || c == 0x7f ? std::string(escaped) : std::string(1, static_cast<char>(c));
    }
    return end == text.size() ? out : out + "... (" + std::to_string(text.size()) + " bytes)";
}

// An object for a message: small values as they are, all else by its type.
inline std::string described(const py::handle& object) {
    PyObject* o = object.ptr();
    if (o == Py_None || PyBool_Check(o) || PyFloat_CheckExact(o)) return py::repr(object).cast<std::string>();
    if (PyLong_CheckExact(o)) {
        int overflow = 0;
        const long long value = PyLong_AsLongLongAndOverflow(o, &overflow);
        return overflow ? "an int of more than 64 bits" : std::to_string(value);
    }
    if (PyUnicode_CheckExact(o)) {
        Py_ssize_t size = 0;
        const py::error_scope pending;  // what it is described for may be an error that is set
        const char* text = PyUnicode_AsUTF8AndSize(o, &size);
        if (text != nullptr) return "'" + shown(std::string(text, static_cast<std::size_t>(size))) + "'";
        PyErr_Clear();
        return "a str that UTF-8 cannot hold";
    }
    if (PyTuple_CheckExact(o) || PyList_CheckExact(o))
        return std::string(PyTuple_CheckExact(o) ? "a tuple" : "a list") + " of " + std::to_string(Py_SIZE(o));
    return "an object of type " + shown(Py_TYPE(o)->tp_name);
}

[[noreturn]] inline void refuse_type(const std::string& name, const std::string& wanted, const py::handle& got) {
    throw py::type_error(name + ": expected " + wanted + ", got " + described(got));
}

// An int, or what has __index__ (NumPy's), within [least, most].
template <class T>
T whole(const py::handle& object, const std::string& name, T least = std::numeric_limits<T>::min(),
        T most = std::numeric_limits<T>::max()) {
    static_assert(std::is_integral_v<T> && sizeof(T) <= sizeof(long long));
    if (!PyIndex_Check(object.ptr())) refuse_type(name, "a whole number", object);
    const py::object number = owned(PyNumber_Index(object.ptr()));
    using Wide = std::conditional_t<std::is_signed_v<T>, long long, unsigned long long>;
    Wide value;
    if constexpr (std::is_signed_v<T>) value = PyLong_AsLongLong(number.ptr());
    else value = PyLong_AsUnsignedLongLong(number.ptr());
    const bool outside = value == static_cast<Wide>(-1) && PyErr_Occurred() != nullptr;
    if (outside && !PyErr_ExceptionMatches(PyExc_OverflowError)) throw py::error_already_set();
    if (outside) PyErr_Clear();
    if (outside || value < static_cast<Wide>(least) || value > static_cast<Wide>(most))
        refuse(name, "a whole number from " + std::to_string(least) + " to " + std::to_string(most), described(number));
    return static_cast<T>(value);
}

// A float, or what becomes one. wanted: for the message.
inline double wide_real(const py::handle& object, const std::string& name, const char* wanted = "a number that a double holds") {
    if (!PyFloat_Check(object.ptr()) && !PyIndex_Check(object.ptr())) refuse_type(name, "a number", object);
    const double value = PyFloat_AsDouble(object.ptr());
    if (value == -1 && PyErr_Occurred() != nullptr) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError)) throw py::error_already_set();
        PyErr_Clear();
        refuse(name, wanted, described(object));
    }
    return value;
}

// The same; no number that only a double holds.
inline float real(const py::handle& object, const std::string& name) {
    constexpr const char* wanted = "a number that a float holds";
    const double value = wide_real(object, name, wanted);
    if (std::isfinite(value) && std::fabs(value) > std::numeric_limits<float>::max())
        refuse(name, wanted, described(py::float_(value)));
    return static_cast<float>(value);
}

// True or False itself.
inline bool truth(const py::handle& object, const std::string& name) {
    if (!PyBool_Check(object.ptr())) refuse_type(name, "True or False", object);
    return object.ptr() == Py_True;
}

inline std::string text(const py::handle& object, const std::string& name, std::size_t most = 128) {
    if (!PyUnicode_Check(object.ptr())) refuse_type(name, "a str", object);
    Py_ssize_t size = 0;
    const char* bytes = PyUnicode_AsUTF8AndSize(object.ptr(), &size);
    if (bytes == nullptr) {
        if (!PyErr_ExceptionMatches(PyExc_UnicodeError)) throw py::error_already_set();
        PyErr_Clear();
        refuse(name, "text that UTF-8 can hold", "a lone surrogate");
    }
    const std::string found(bytes, static_cast<std::size_t>(size));
    if (found.size() > most) refuse(name, "at most " + std::to_string(most) + " bytes of text", std::to_string(found.size()));
    if (found.find('\0') != std::string::npos) refuse(name, "text without a NUL", "'" + shown(found) + "'");
    return found;
}

// The elements of a list, a tuple or another sequence, `most` at most.
inline std::vector<py::object> elements(const py::handle& object, const std::string& name, std::size_t most) {
    PyObject* o = object.ptr();
    if (!PySequence_Check(o) || PyUnicode_Check(o) || PyBytes_Check(o)) refuse_type(name, "a sequence", object);
    const Py_ssize_t size = PySequence_Size(o);
    if (size < 0) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError)) throw py::error_already_set();
        PyErr_Clear();
    }
    if (size < 0 || static_cast<std::size_t>(size) > most)
        refuse(name, "at most " + std::to_string(most) + " elements", size < 0 ? "more than 2^63" : std::to_string(size));
    std::vector<py::object> found;
    for (Py_ssize_t i = 0; i < size; ++i) found.push_back(owned(PySequence_GetItem(o, i)));
    return found;
}

inline std::string at(const std::string& name, std::size_t i) { return name + "[" + std::to_string(i) + "]"; }

inline std::vector<std::int64_t> whole_numbers(const py::handle& object, const std::string& name, std::size_t most) {
    std::vector<std::int64_t> numbers;
    for (const auto& element : elements(object, name, most))
        numbers.push_back(whole<std::int64_t>(element, at(name, numbers.size())));
    return numbers;
}

// Each key of a dict with convert(value, key).
template <class Convert>
auto by_name(const py::handle& object, const std::string& argument, Convert convert) {
    std::map<std::string, decltype(convert(py::handle(), std::string()))> found;
    if (!PyDict_Check(object.ptr())) refuse_type(argument, "a dict", object);
    constexpr std::size_t kMost = 256;
    if (static_cast<std::size_t>(PyDict_Size(object.ptr())) > kMost)
        refuse(argument, "at most " + std::to_string(kMost) + " entries", std::to_string(PyDict_Size(object.ptr())));
    // a copy: a value's methods may change the dict meanwhile
    const py::object items = owned(PyDict_Items(object.ptr()));
    for (const auto& item : elements(items, argument, kMost)) {
        const std::string name = text(PyTuple_GET_ITEM(item.ptr(), 0), argument + ": a key");
        found.emplace(name, convert(py::handle(PyTuple_GET_ITEM(item.ptr(), 1)), name));
    }
    return found;
}

// Memory that Python objects lend. While it is held their owners can neither free nor resize it, whatever another thread, or
// a method of another argument, tries.
class Buffers {
public:
    Buffers() = default;
    Buffers(const Buffers&) = delete;
    Buffers& operator=(const Buffers&) = delete;
    ~Buffers() {
        if (!PyGILState_Check()) return;  // a thread that ends because the interpreter does: too late to give back
        for (auto& buffer : held_) PyBuffer_Release(&buffer);
    }

    TensorView view(const py::handle& object, const std::string& name, bool writable) {
        const Py_buffer& buffer = hold(object, name, writable);
        if (buffer.itemsize < 1) refuse(name, "elements of at least one byte", std::to_string(buffer.itemsize));
        for (int d = 0; buffer.suboffsets != nullptr && d < buffer.ndim; ++d)
            if (buffer.suboffsets[d] >= 0) refuse(name, "memory with strides", "an array of pointers");
        static const std::map<std::string, std::string> names{
            {"B", "uint8"}, {"e", "float16"}, {"f", "float32"}, {"d", "float64"}};
        const char* given = buffer.format == nullptr ? "B" : buffer.format;
        const bool prefixed = *given != '\0' && std::strchr("@=<", *given) != nullptr;  // the machine is little-endian
        const std::string format = shown(given + prefixed);
        const auto known = names.find(format);
        TensorView t{name, reinterpret_cast<std::uintptr_t>(buffer.buf), {}, {},
                     known == names.end() ? "format " + format : known->second, "cpu"};
        if (known != names.end() && element_bytes(t) != buffer.itemsize)
            refuse(name, "elements of " + std::to_string(element_bytes(t)) + " bytes", std::to_string(buffer.itemsize));
        if (buffer.shape != nullptr) t.shape.assign(buffer.shape, buffer.shape + buffer.ndim);
        if (buffer.strides == nullptr) {  // of ctypes, whose memory is dense
            std::int64_t step = 1;
            for (std::size_t d = t.shape.size(); d-- > 0; step = times(name, step, t.shape[d]))
                t.strides.insert(t.strides.begin(), step);
            return t;
        }
        for (std::size_t d = 0; d < t.shape.size(); ++d) {
            if (buffer.strides[d] % buffer.itemsize)
                refuse(name, "strides of whole elements", std::to_string(buffer.strides[d]) + " bytes");
            t.strides.push_back(buffer.strides[d] / buffer.itemsize);
        }
        return t;
    }

private:
    const Py_buffer& hold(const py::handle& object, const std::string& name, bool writable) {
        Py_buffer& buffer = held_.emplace_back();  // in a list: it may point into itself
        if (PyObject_GetBuffer(object.ptr(), &buffer, PyBUF_STRIDED_RO | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0)) == 0)
            return buffer;
        held_.pop_back();
        for (PyObject* meant : {PyExc_BufferError, PyExc_ValueError, PyExc_TypeError})
            if (PyErr_ExceptionMatches(meant)) {
                const std::string wanted = writable ? "memory that can be written, with strides" : "memory with strides";
                py::raise_from(PyExc_ValueError, (name + ": expected " + wanted + ", which " + described(object) +
                                                  " does not lend").c_str());
                break;
            }
        throw py::error_already_set();
    }

    std::list<Py_buffer> held_;
};

// What `self` shares. Not by a parameter T& or a pointer to a member: for `T.__new__(T)`, which holds nothing, pybind11 would
// allocate a T there and then, without a constructor.
template <class T>
std::shared_ptr<T> held(const py::object& self, const char* wanted) {
    try {
        return self.cast<std::shared_ptr<T>>();
    } catch (const py::cast_error&) {
        const bool empty = py::isinstance<T>(self);
        throw py::type_error(std::string("self: expected ") + wanted + ", got " +
                             (empty ? "one made by __new__ alone, which holds nothing" : described(self)));
    }
}

// An array that lends its memory, or (address, shape, strides in elements, dtype, device).
inline TensorView view_from(const py::handle& object, const std::string& name, Buffers& buffers, bool writable = false) {
    TensorView view;
    if (PyObject_CheckBuffer(object.ptr())) {
        view = buffers.view(object, name, writable);
    } else {
        if (!PyTuple_Check(object.ptr()) || PyTuple_GET_SIZE(object.ptr()) != 5)
            refuse_type(name, "an array or (address, shape, strides in elements, dtype, device)", object);
        const auto fact = [&](Py_ssize_t i) { return py::handle(PyTuple_GET_ITEM(object.ptr(), i)); };
        view = {name,
                whole<std::uintptr_t>(fact(0), name + ": address"),
                whole_numbers(fact(1), name + ": shape", kMostDimensions),
                whole_numbers(fact(2), name + ": strides", kMostDimensions),
                text(fact(3), name + ": dtype"),
                text(fact(4), name + ": device")};
    }
    expect_sound(view);
    return view;
}

}  // namespace dit4dit
