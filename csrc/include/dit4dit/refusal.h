// What is published, and why a chunk is not.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>

#include "ring.h"

namespace dit4dit {

constexpr double kLeastControlHz = 0.01;
constexpr double kMostControlHz = 100'000;
constexpr std::int64_t kFarthestStart = 3'600'000'000'000;  // of starts_at from observed_at: beyond an hour it is another clock's

// Nothing has changed where a chunk was refused: readers keep to the chunks that they have.
struct Refusal {
    enum class Why : std::uint8_t {
        none,
        closed,                 // by Writer::close
        forked,                 // this process is a child of the producer's
        no_values,
        rows,
        stride,
        control_hz,
        observed_never,         // observed_at_ns is 0 or below
        observed_in_future,
        observed_backwards,     // older than the last chunk's
        computed_before,        // than it was observed
        computed_in_future,
        starts_elsewhere,
        not_finite,
        not_binary,
    };
    Why why = Why::none;
    std::int32_t row = 0;                      // not_finite, not_binary
    char channel[sizeof(Channel::name)] = {};  // not_finite, not_binary
    double value = 0;                          // what was got: of the channel, control_hz, rows, stride
    std::int64_t at_ns = 0, other_ns = 0;      // the stamp in question, and the one that it is compared to

    explicit operator bool() const noexcept { return why != Why::none; }
    // One line; empty where nothing was refused.
    std::string text() const;
};

namespace detail {

inline Refusal refuse(Refusal::Why why, double value = 0) noexcept {
    Refusal refusal;
    refusal.why = why;
    refusal.value = value;
    return refusal;
}

inline Refusal refuse(Refusal::Why why, std::int64_t at_ns, std::int64_t other_ns) noexcept {
    Refusal refusal;
    refusal.why = why;
    refusal.at_ns = at_ns;
    refusal.other_ns = other_ns;
    return refusal;
}

inline Refusal check_stamps(const Chunk& chunk, std::int64_t last_observed_at, std::int64_t now_ns) noexcept {
    using Why = Refusal::Why;
    if (chunk.observed_at_ns <= 0) return refuse(Why::observed_never, chunk.observed_at_ns, 0);
    if (chunk.observed_at_ns > now_ns) return refuse(Why::observed_in_future, chunk.observed_at_ns, now_ns);
    if (chunk.observed_at_ns < last_observed_at)
        return refuse(Why::observed_backwards, chunk.observed_at_ns, last_observed_at);
    if (chunk.computed_at_ns < chunk.observed_at_ns)
        return refuse(Why::computed_before, chunk.computed_at_ns, chunk.observed_at_ns);
    if (chunk.computed_at_ns > now_ns) return refuse(Why::computed_in_future, chunk.computed_at_ns, now_ns);
    // observed_at is in 1..now: no overflow
    if (chunk.starts_at_ns < chunk.observed_at_ns - kFarthestStart || chunk.starts_at_ns - kFarthestStart > chunk.observed_at_ns)
        return refuse(Why::starts_elsewhere, chunk.starts_at_ns, chunk.observed_at_ns);
    return {};
}

inline Refusal check_values(const Layout& layout, const Chunk& chunk) noexcept {
    for (std::int32_t i = 0; i < chunk.rows; ++i) {
        const float* row = chunk.values + static_cast<std::ptrdiff_t>(i) * chunk.stride;
        for (std::uint32_t k = 0; k < layout.channels; ++k) {
            const bool finite = std::isfinite(row[k]);
            if (finite && (layout.channel[k].kind != Kind::binary || row[k] == 0 || row[k] == 1)) continue;
            Refusal refusal = refuse(finite ? Refusal::Why::not_binary : Refusal::Why::not_finite, static_cast<double>(row[k]));
            std::memcpy(refusal.channel, layout.channel[k].name, sizeof refusal.channel);
            refusal.row = i;
            return refusal;
        }
    }
    return {};
}

}  // namespace detail

// Whether a chunk can follow one that was observed at last_observed_at (0: there is none) in a stream of this layout.
inline Refusal check(const Layout& layout, const Chunk& chunk, std::int64_t last_observed_at, std::int64_t now_ns) noexcept {
    using Why = Refusal::Why;
    if (chunk.values == nullptr) return detail::refuse(Why::no_values);
    if (chunk.rows < 1 || chunk.rows > kMaxRows) return detail::refuse(Why::rows, chunk.rows);
    if (chunk.stride < static_cast<std::int64_t>(layout.channels)) {
        Refusal refusal = detail::refuse(Why::stride, chunk.stride);
        refusal.other_ns = layout.channels;
        return refusal;
    }
    // written so that a NaN fails
    if (!(chunk.control_hz >= kLeastControlHz && chunk.control_hz <= kMostControlHz))
        return detail::refuse(Why::control_hz, chunk.control_hz);
    const Refusal refusal = detail::check_stamps(chunk, last_observed_at, now_ns);
    return refusal ? refusal : detail::check_values(layout, chunk);
}

inline std::string Refusal::text() const {
    const std::string at = std::to_string(at_ns), other = std::to_string(other_ns);
    const auto number = [this] {
        char text[32];
        std::snprintf(text, sizeof text, "%.9g", value);
        return std::string(text);
    };
    const auto of_channel = [&] {
        return "channel '" + std::string(channel) + "', row " + std::to_string(row) + " is " + number();
    };
    const char* clock = "; is it CLOCK_MONOTONIC of this machine (time.monotonic_ns)?";
    switch (why) {
        case Why::none: return "";
        case Why::closed: return "the stream is closed; open a new one";
        case Why::forked: return "this process was forked from the producer's; publish there, or open the stream after the fork";
        case Why::no_values: return "values is a null pointer, wanted rows of floats";
        case Why::rows: return number() + " rows, wanted 1 to " + std::to_string(kMaxRows);
        case Why::stride: return number() + " values a row, wanted at least " + other + ", one for each channel";
        case Why::control_hz:
            return "control_hz is " + number() + ", wanted the rate of the rows, 0.01 to 100000";
        case Why::observed_never: return "observed_at_ns is " + at + ", wanted when the observation was taken" + clock;
        case Why::observed_in_future: return "observed_at_ns " + at + " is in the future, now is " + other + clock;
        case Why::observed_backwards:
            return "observed_at_ns " + at + " is before the last chunk's, " + other + "; publish chunks in the order of their "
                   "observations";
        case Why::computed_before:
            return "computed_at_ns " + at + " is before observed_at_ns, " + other + clock;
        case Why::computed_in_future: return "computed_at_ns " + at + " is in the future, now is " + other + clock;
        case Why::starts_elsewhere:
            return "starts_at_ns " + at + " is more than an hour from observed_at_ns, " + other + clock;
        case Why::not_finite: return of_channel() + ", wanted a finite number; look at what the policy returned";
        case Why::not_binary: return of_channel() + ", wanted exactly 0 or 1; threshold it before it is published";
    }
    return "";
}

}  // namespace dit4dit
