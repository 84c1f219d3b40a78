// A tensor as five plain facts, so that the extension needs no framework's headers, and the checks every launcher makes.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "errors.h"

namespace dit4dit {

constexpr std::size_t kMostDimensions = 64;  // as NumPy and PyTorch have it

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

// Of a long list the beginning: a message is read by people.
inline std::string to_string(const std::vector<std::int64_t>& numbers) {
    constexpr std::size_t kMost = 16;
    std::string text = "[";
    for (std::size_t i = 0; i < numbers.size() && i < kMost; ++i) text += (i ? ", " : "") + std::to_string(numbers[i]);
    return text + (numbers.size() > kMost ? ", ...] (" + std::to_string(numbers.size()) + " numbers)" : "]");
}

[[noreturn]] inline void refuse(const std::string& name, const std::string& wanted, const std::string& got) {
    throw std::invalid_argument(name + ": expected " + wanted + ", got " + got);
}

// Sums and products of what a caller has sent: refused where they are no 64-bit number, which would be undefined.
inline std::int64_t plus(const std::string& name, std::int64_t a, std::int64_t b) {
    std::int64_t sum;
    if (__builtin_add_overflow(a, b, &sum))
        refuse(name, "sizes below 2^63", std::to_string(a) + " + " + std::to_string(b));
    return sum;
}

inline std::int64_t times(const std::string& name, std::int64_t a, std::int64_t b) {
    std::int64_t product;
    if (__builtin_mul_overflow(a, b, &product))
        refuse(name, "sizes below 2^63", std::to_string(a) + " * " + std::to_string(b));
    return product;
}

// Bytes of an element; 1 for a dtype that no launcher takes.
inline std::int64_t element_bytes(const TensorView& t) {
    if (t.dtype == "float64" || t.dtype == "int64") return 8;
    if (t.dtype == "float32" || t.dtype == "int32") return 4;
    return t.dtype == "float16" || t.dtype == "bfloat16" ? 2 : 1;
}

// The bytes [begin, end) from a tensor's first element to behind its last; none where it has no elements.
struct ByteRange {
    std::uintptr_t begin, end;
};

inline ByteRange span_of(const TensorView& t) {
    std::int64_t low = 0, high = element_bytes(t);
    for (const auto extent : t.shape)
        if (extent == 0) return {t.address, t.address};
    for (std::size_t i = 0; i < t.shape.size(); ++i) {
        if (t.shape[i] == 1) continue;
        const auto reach = times(t.name, times(t.name, t.strides[i], element_bytes(t)), t.shape[i] - 1);
        (reach < 0 ? low : high) = plus(t.name, reach < 0 ? low : high, reach);
    }
    // the subtraction in unsigned numbers is right for every negative `low`
    const auto below = std::uintptr_t{0} - static_cast<std::uintptr_t>(low), above = static_cast<std::uintptr_t>(high);
    if (below > t.address || above > std::numeric_limits<std::uintptr_t>::max() - t.address)
        refuse(t.name, "elements at addresses of 64 bits", "address " + std::to_string(t.address) + ", shape " +
                                                               to_string(t.shape) + ", strides " + to_string(t.strides));
    return {t.address - below, t.address + above};
}

// What every tensor is held to where it comes in, so that no arithmetic on its offsets and elements overflows later. Whether
// the memory is there is the caller's word, where it gives an address.
inline void expect_sound(const TensorView& t) {
    if (t.shape.size() > kMostDimensions)
        refuse(t.name, "at most " + std::to_string(kMostDimensions) + " dimensions", std::to_string(t.shape.size()));
    if (t.strides.size() != t.shape.size())
        refuse(t.name, std::to_string(t.shape.size()) + " strides", to_string(t.strides));
    std::int64_t elements = 1;
    for (const auto extent : t.shape) {
        if (extent < 0) refuse(t.name, "extents of at least 0", to_string(t.shape));
        if (extent > 1) elements = times(t.name, elements, extent);
    }
    if (t.address % static_cast<std::uintptr_t>(element_bytes(t)))
        refuse(t.name, "an address that is a multiple of " + std::to_string(element_bytes(t)) + " (" + t.dtype + ")",
               std::to_string(t.address));
    span_of(t);
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

// An output whose elements share memory would hold whatever was written last. Each stride must step over all that the smaller
// ones reach, as in every slice and permutation of dense memory; what interleaves otherwise is refused unexamined.
inline void expect_writable(const TensorView& t) {
    const auto size = [&](std::size_t i) {
        return t.strides[i] < 0 ? std::uint64_t{0} - static_cast<std::uint64_t>(t.strides[i])
                                : static_cast<std::uint64_t>(t.strides[i]);
    };
    std::vector<std::size_t> order;  // dimensions from the smallest stride to the largest
    for (std::size_t i = 0; i < t.shape.size(); ++i) {
        if (t.shape[i] == 0) return;
        if (t.shape[i] == 1) continue;
        auto at = order.begin();
        while (at != order.end() && size(*at) < size(i)) ++at;
        order.insert(at, i);
    }
    std::uint64_t reach = 0;  // of the dimensions so far, in elements; `span_of` has seen that it is a number
    for (const auto i : order) {
        if (size(i) <= reach)
            refuse(t.name, "elements that do not overlap",
                   "strides " + to_string(t.strides) + " of shape " + to_string(t.shape) + " (see dimension " +
                       std::to_string(i) + "); make it contiguous");
        reach += size(i) * static_cast<std::uint64_t>(t.shape[i] - 1);
    }
}

// An output must not lie in memory that is read, or written, for another tensor of the same launch: blocks and rows run in any
// order. By the first and the last byte: tensors that interleave are refused too.
inline void expect_apart(const TensorView& out, const TensorView& other) {
    const ByteRange a = span_of(out), b = span_of(other);
    if (a.begin < b.end && b.begin < a.end)
        refuse(out.name, "memory of its own", "some that " + other.name + " lies in; copy one of them");
}

}  // namespace dit4dit
