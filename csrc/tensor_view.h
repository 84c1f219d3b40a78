// A tensor as five plain facts, so that the extension needs no framework's headers, and the checks every launcher makes.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "errors.h"

namespace dit4dit {

struct TensorView {
    std::string name;  // the argument this came in as, for messages: "views[1]"
    std::uintptr_t address = 0;
    std::vector<std::int64_t> shape;
    std::vector<std::int64_t> strides;  // in elements, any sign
    std::string dtype;                  // "uint8", "float32", "bfloat16", "float16"
    std::string device;                 // "cpu" or "cuda:0"

    template <class T>
    T* data() const {
        return reinterpret_cast<T*>(address);
    }
};

inline std::string to_string(const std::vector<std::int64_t>& numbers) {
    std::string text = "[";
    for (std::size_t i = 0; i < numbers.size(); ++i) text += (i ? ", " : "") + std::to_string(numbers[i]);
    return text + "]";
}

[[noreturn]] inline void refuse(const std::string& name, const std::string& wanted, const std::string& got) {
    throw std::invalid_argument(name + ": expected " + wanted + ", got " + got);
}

inline void expect_dtype(const TensorView& t, const std::vector<std::string>& dtypes, const std::string& meaning = "") {
    std::string wanted;
    for (const auto& dtype : dtypes) {
        if (t.dtype == dtype) return;
        wanted += (wanted.empty() ? "" : " or ") + dtype;
    }
    throw DtypeError(t.name + ": expected " + wanted + meaning + ", got " + t.dtype);
}

// A wanted extent of -1 takes any positive number.
inline void expect_shape(const TensorView& t, const std::vector<std::int64_t>& wanted) {
    bool fits = t.shape.size() == wanted.size();
    for (std::size_t i = 0; fits && i < wanted.size(); ++i)
        fits = wanted[i] == -1 ? t.shape[i] > 0 : t.shape[i] == wanted[i];
    if (!fits) refuse(t.name, "shape " + to_string(wanted) + " (-1: any)", to_string(t.shape));
    if (t.strides.size() != t.shape.size())
        refuse(t.name, std::to_string(t.shape.size()) + " strides", to_string(t.strides));
    if (t.address == 0) refuse(t.name, "an address", "null");
}

inline void expect_device(const TensorView& t, const std::string& device) {
    if (t.device != device) refuse(t.name, "device " + device, t.device);
}

inline void expect_contiguous(const TensorView& t) {
    std::int64_t wanted = 1;
    for (std::size_t i = t.shape.size(); i-- > 0; wanted *= t.shape[i])
        if (t.shape[i] > 1 && t.strides[i] != wanted)
            refuse(t.name, "contiguous elements", "strides " + to_string(t.strides) + " of shape " + to_string(t.shape));
}

// An output whose elements share memory would hold whatever was written last.
inline void expect_writable(const TensorView& t) {
    for (std::size_t i = 0; i < t.shape.size(); ++i)
        if (t.shape[i] > 1 && t.strides[i] == 0)
            refuse(t.name, "elements that do not overlap", "stride 0 in dimension " + std::to_string(i));
}

}  // namespace dit4dit
