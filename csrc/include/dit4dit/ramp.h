// Motions with piecewise constant jerk, and the fastest change from one velocity to another. Of limiter.h.
#pragma once

#include <cmath>

#include "exact_begin.h"

namespace dit4dit {

namespace limiter {

// Position, velocity and acceleration at one moment.
struct Motion {
    double x, v, a;
};

inline Motion operator-(const Motion& m, const Motion& n) noexcept { return {m.x - n.x, m.v - n.v, m.a - n.a}; }

inline Motion advanced(const Motion& m, double jerk, double t) noexcept {
    return {m.x + t * (m.v + t * (m.a * 0.5 + t * (jerk * (1.0 / 6)))), m.v + t * (m.a + t * (jerk * 0.5)), m.a + t * jerk};
}

// The most acceleration and jerk in either direction; all > 0.
struct Reach {
    double down, up, jerk_down, jerk_up;
};

// A way to another velocity: jerk j1 for t1, none for t2, j3 for t3.
struct Ramp {
    double j1, j3, t1, t2, t3;
    double duration() const noexcept { return t1 + t2 + t3; }
};

// The fastest way to velocity `goal` and no acceleration.
inline Ramp ramp_to(double goal, double v, double a, const Reach& reach) noexcept {
    const double level = v + a * std::fabs(a) * 0.5 / (a > 0 ? reach.jerk_down : reach.jerk_up);  // where letting go leads to
    const bool rises = level < goal;
    const double s = rises ? 1.0 : -1.0, most = rises ? reach.up : reach.down;
    const double on = rises ? reach.jerk_up : reach.jerk_down, off = rises ? reach.jerk_down : reach.jerk_up;
    const double begin = s * a, gap = s * (goal - v);
    if (begin > most) {  // more than there may be: back to it first
        const double t2 = (gap - begin * begin * 0.5 / off) / most;
        return {-s * off, -s * off, (begin - most) / off, t2 > 0 ? t2 : 0, most / off};
    }
    const double missing = gap + begin * begin * 0.5 / on, square = missing * (2 * on * off / (on + off));
    double peak = square > 0 ? std::sqrt(square) : 0, t2 = 0;
    if (peak > most) {
        peak = most;
        t2 = missing / peak - peak * (0.5 / on + 0.5 / off);
    }
    const double t1 = (peak - begin) / on;
    return {s * on, -s * off, t1 > 0 ? t1 : 0, t2 > 0 ? t2 : 0, peak / off};
}

// The motion `t` after the ramp's begin, with jerk `between` in its second phase and behind its end.
inline Motion along(const Motion& from, const Ramp& r, double between, double t) noexcept {
    if (t <= r.t1) return advanced(from, r.j1, t);
    Motion m = advanced(from, r.j1, r.t1);
    t -= r.t1;
    if (t <= r.t2) return advanced(m, between, t);
    m = advanced(m, between, r.t2);
    t -= r.t2;
    if (t <= r.t3) return advanced(m, r.j3, t);
    return advanced(advanced(m, r.j3, r.t3), between, t - r.t3);
}

// The position at the ramp's end.
inline double end_of(const Motion& from, const Ramp& r) noexcept {
    return advanced(advanced(advanced(from, r.j1, r.t1), 0, r.t2), r.j3, r.t3).x;
}

// The motion `t` after the ramp's begin, where velocity `goal` is kept behind its end; without what rounding leaves.
inline Motion settled(const Motion& from, const Ramp& r, double goal, double t) noexcept {
    const double over = t - r.duration();
    if (over < 0) return along(from, r, 0, t);
    return {end_of(from, r) + over * goal, goal, 0};
}

}  // namespace limiter

}  // namespace dit4dit

#include "exact_end.h"
