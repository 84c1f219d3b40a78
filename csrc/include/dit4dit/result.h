// A value, or why there is none: opening a segment fails for reasons that a controller without exceptions has to print.
#pragma once

#include <string>
#include <utility>
#include <variant>

namespace dit4dit {

struct Error {
    std::string text;  // one line: where, wanted, got, what to do
};

template <class T>
class Result {
  public:
    Result(T value) : either_(std::in_place_index<0>, std::move(value)) {}
    Result(Error error) : either_(std::in_place_index<1>, std::move(error)) {}

    explicit operator bool() const noexcept { return either_.index() == 0; }

    // Only where there is a value: std::bad_variant_access elsewhere.
    T& operator*() { return std::get<0>(either_); }
    const T& operator*() const { return std::get<0>(either_); }
    T* operator->() { return &std::get<0>(either_); }
    const T* operator->() const { return &std::get<0>(either_); }

    // Empty where there is a value.
    const std::string& error() const noexcept {
        static const std::string none;
        const Error* error = std::get_if<1>(&either_);
        return error ? error->text : none;
    }

  private:
    std::variant<T, Error> either_;
};

}  // namespace dit4dit
