// What a chunk says between its rows.
//
// Row i is meant for starts_at + i * period. The moment `now` lies at u = (now - starts_at) / period rows; the chunk lasts while
// u < rows. Everything here is + - * / and floor on doubles, in a fixed order: tests/helpers/stream_rows.py has it once more.
#pragma once

#include <cmath>
#include <cstdint>

#include "layout.h"
#include "ring.h"

#include "exact_begin.h"

namespace dit4dit {

constexpr double kPi = 3.14159265358979323846;
constexpr double kTurn = 2 * kPi;

// Ticks are whole ns: at the policy's own rate they miss the row's time by half of one. So much earlier, in rows, a row begins.
constexpr double kRowTolerance = 1e-6;

// The same angle in [-pi, pi).
inline double wrap(double angle) noexcept {
    const double turned = angle - kTurn * std::floor(angle / kTurn + 0.5);
    if (turned >= kPi) return turned - kTurn;  // rounding
    return turned < -kPi ? turned + kTurn : turned;
}

// From `from` to `to`; of an angle by the short way.
inline double difference(Kind kind, double to, double from) noexcept {
    return kind == Kind::angle ? wrap(to - from) : to - from;
}

// A moment in a chunk's own time.
struct Moment {
    double u;          // rows since starts_at, >= 0
    std::int32_t row;  // that has begun, 0 to rows - 1
    std::int32_t nearest;
    std::int32_t knot;  // the row before the moment, without tolerance: linear and cubic are continuous there
    double part;        // u - knot
    bool over;          // the chunk has ended
};

inline double rows_since(const HeldChunk& chunk, std::int64_t now) noexcept {
    const double u = static_cast<double>(now - chunk.starts_at) / chunk.period_ns;
    return u < 0 ? 0 : u;
}

inline Moment moment(const HeldChunk& chunk, std::int64_t now) noexcept {
    Moment at;
    at.u = rows_since(chunk, now);
    const double last = chunk.rows - 1, begun = std::floor(at.u + kRowTolerance), near = std::floor(at.u + 0.5 + kRowTolerance);
    const double knot = std::floor(at.u);
    at.row = static_cast<std::int32_t>(begun < last ? begun : last);
    at.nearest = static_cast<std::int32_t>(near < last ? near : last);
    at.knot = static_cast<std::int32_t>(knot < last ? knot : last);
    at.part = at.u - at.knot;
    at.over = begun > last;
    return at;
}

// Catmull-Rom from one knot (t = 0) toward the next (t = 1), relative to the first, by the differences of four knots: to it from
// the one before, from it to the next, and from there to the one after.
inline double catmull_rom(double before, double here, double after, double t) noexcept {
    const double begin = 0.5 * (before + here), end = 0.5 * (here + after);
    return t * (begin + t * (3 * here - 2 * begin - end + t * (begin + end - 2 * here)));
}

// A channel that is not relative. A knot that is missing at the ends lies on the line through the next two; between the last row
// and the chunk's end it is the last row.
inline double value_at(Kind kind, Interpolation interpolation, const HeldChunk& chunk, const Moment& at, int column) noexcept {
    const auto row = [&](int i) { return static_cast<double>(chunk.values[i * kMaxChannels + column]); };
    const bool held = interpolation == Interpolation::hold;
    if (kind == Kind::binary) return row(held ? at.row : at.nearest);
    if (held) return row(at.row);
    const int last = chunk.rows - 1, k = at.knot;
    if (k >= last) return row(last);
    const double here = difference(kind, row(k + 1), row(k));
    if (interpolation == Interpolation::linear) return row(k) + at.part * here;
    const double before = k > 0 ? difference(kind, row(k), row(k - 1)) : here;
    const double after = k + 1 < last ? difference(kind, row(k + 2), row(k + 1)) : here;
    return row(k) + catmull_rom(before, here, after, at.part);
}

// The path of a relative channel: knot k is the sum of the rows before row k. sums [rows + 1].
inline void sum_rows(const HeldChunk& chunk, int column, double* sums) noexcept {
    sums[0] = 0;
    for (int i = 0; i < chunk.rows; ++i) sums[i + 1] = sums[i] + static_cast<double>(chunk.values[i * kMaxChannels + column]);
}

// Behind the last row the path stands still, or, where it `goes_on`, has the last row's slope.
inline double path_at(Interpolation interpolation, const HeldChunk& chunk, const double* sums, double u, int column,
                      bool goes_on) noexcept {
    const auto row = [&](int i) { return static_cast<double>(chunk.values[i * kMaxChannels + column]); };
    const int last = chunk.rows - 1;
    const double rest = u - chunk.rows;
    if (rest >= 0) return goes_on ? sums[chunk.rows] + rest * row(last) : sums[chunk.rows];
    const int k = static_cast<int>(std::floor(u));
    const double here = row(k), t = u - k;
    if (interpolation != Interpolation::cubic) return sums[k] + t * here;
    return sums[k] + catmull_rom(k > 0 ? row(k - 1) : here, here, k < last ? row(k + 1) : here, t);
}

}  // namespace dit4dit

#include "exact_end.h"
