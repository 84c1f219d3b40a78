// Bounds of position, velocity, acceleration and jerk of one channel, kept by what is sent, whatever the targets and the ticks.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "limits.h"

namespace dit4dit {

namespace limiter {

// Position, velocity and acceleration at one moment.
struct Motion {
    double x, v, a;
};

inline Motion advanced(const Motion& m, double jerk, double t) noexcept {
    return {m.x + t * (m.v + t * (m.a * 0.5 + t * (jerk * (1.0 / 6)))), m.v + t * (m.a + t * (jerk * 0.5)), m.a + t * jerk};
}

// The fastest change to a velocity and no acceleration: `jerk` for t1, none for t2, -`jerk` for t3.
struct Ramp {
    double jerk, t1, t2, t3;
};

// `down` and `up`: the most acceleration in either direction, both > 0.
inline Ramp ramp_to(double goal, double v, double a, double down, double up, double jerk) noexcept {
    const double half = 0.5 / jerk;
    const bool rises = v + a * std::fabs(a) * half < goal;
    const double s = rises ? 1.0 : -1.0, most = rises ? up : down;
    const double missing = s * (goal - v), begin = s * a;
    const double square = jerk * missing + begin * begin * 0.5;
    double peak = square > 0 ? std::sqrt(square) : 0, t2 = 0;
    if (peak > most) {
        peak = most;
        t2 = (missing + begin * begin * half - peak * peak / jerk) / peak;
        if (t2 < 0) t2 = 0;
    }
    double t1 = (peak - begin) / jerk;
    if (t1 < 0) t1 = 0;
    return {s * jerk, t1, t2, peak / jerk};
}

// The motion after `t`; at most to the end of the ramp, whose velocity and acceleration are then `goal` and 0.
inline Motion along(const Motion& from, const Ramp& r, double goal, double t) noexcept {
    if (t <= r.t1) return advanced(from, r.jerk, t);
    Motion m = advanced(from, r.jerk, r.t1);
    t -= r.t1;
    if (t <= r.t2) return advanced(m, 0, t);
    m = advanced(m, 0, r.t2);
    t -= r.t2;
    if (t < r.t3) return advanced(m, -r.jerk, t);
    return {advanced(m, -r.jerk, r.t3).x, goal, 0};
}

// The motion after `t`, without a jerk behind the ramp's end.
inline Motion phases(const Motion& from, const Ramp& r, double t) noexcept {
    if (t <= r.t1) return advanced(from, r.jerk, t);
    Motion m = advanced(from, r.jerk, r.t1);
    t -= r.t1;
    if (t <= r.t2) return advanced(m, 0, t);
    m = advanced(m, 0, r.t2);
    t -= r.t2;
    if (t <= r.t3) return advanced(m, -r.jerk, t);
    return advanced(advanced(m, -r.jerk, r.t3), 0, t - r.t3);
}

inline double duration(const Ramp& r) noexcept { return r.t1 + r.t2 + r.t3; }

}  // namespace limiter

class ChannelLimiter {
public:
    explicit ChannelLimiter(const Limits& limits) noexcept : low_(limits.low), high_(limits.high) {
        constexpr double infinity = std::numeric_limits<double>::infinity();
        double v = limits.velocity, a = limits.acceleration, j = limits.jerk;
        dynamic_ = v < infinity || a < infinity || j < infinity;
        still_ = !(v > 0 && a > 0 && j > 0 && low_ <= high_);
        // an unlimited derivative gets a bound that the limited ones never let it reach
        if (!(a < infinity)) a = v < infinity ? v * 1e6 : j < infinity ? j * 1e6 : 1;
        if (!(j < infinity)) j = a * 1e6;
        if (!(v < infinity)) v = a * 1e6;
        v_ = v * kInside, a_ = a * kInside, j_ = j * kInside;
        bounded_ = low_ > -infinity || high_ < infinity;
        half_ = 0.5 / j_;
    }

    // At rest there; the next tick is the first.
    void reset(double position) noexcept {
        if (!finite(position)) return;
        started_ = true, first_ = true, locked_ = true;
        now_ = {position, 0, 0};
        goal_ = 0, v1_ = 0, a1_ = 0;
        floor_ = position < low_ ? position : low_;
        ceiling_ = position > high_ ? position : high_;
    }

    double tick(double target, double dt) noexcept {
        if (!usable(dt)) return now_.x;
        if (!finite(target)) return brake(dt);
        target = target < low_ ? low_ : target > high_ ? high_ : target;
        if (!started_) reset(target);
        if (still_) return now_.x;
        if (!dynamic_) return now_.x = target;
        begin(target, dt);
        if (locked_ && send_exactly(target, dt)) return now_.x;
        approach(target, dt);
        return now_.x;
    }

    double brake(double dt) noexcept {
        if (!usable(dt) || !started_ || still_ || !dynamic_) return now_.x;
        begin(now_.x, dt);
        known_ = 0, locked_ = false;
        double goal = goal_;
        const Motion m = backup(dt, goal);
        goal_ = goal;
        send(m, dt);
        return now_.x;
    }

    double sent() const noexcept { return now_.x; }

private:
    using Motion = limiter::Motion;
    using Ramp = limiter::Ramp;
    static constexpr double kInside = 0.999, kFromRest = 0.8, kLeast = 50e-6, kRounded = 1 + 1e-9;

    static bool finite(double x) noexcept { return x - x == 0; }
    static bool usable(double dt) noexcept { return dt >= kLeast && finite(dt); }

    void begin(double target, double dt) noexcept {
        if (first_) {
            d1_ = dt, d2_ = dt, known_ = 0;
            first_ = false;
        }
        if (known_ == 0) target1_ = target2_ = target3_ = target;
        known_ = 1;
    }

    // `m` is sent.
    void send(const Motion& m, double dt) noexcept {
        const double x = m.x < floor_ ? floor_ : m.x > ceiling_ ? ceiling_ : m.x;
        const double v = (x - now_.x) / dt;
        const double a = (v - v1_) * 2 / (dt + d1_);
        moved(Motion{x, m.v, m.a}, v, a, dt);
    }
    void moved(const Motion& m, double v, double a, double dt) noexcept {
        now_ = m, v1_ = v, a1_ = a;
        d2_ = d1_, d1_ = dt;
        if (floor_ < low_ || ceiling_ > high_) tighten();
    }

    // Out of low..high: what has been come back from is never gone out to again.
    void tighten() noexcept {
        double least, most;
        reach(now_, goal_, least, most);
        if (floor_ < low_) floor_ = least > floor_ ? (least < low_ ? least : low_) : floor_;
        if (ceiling_ > high_) ceiling_ = most < ceiling_ ? (most > high_ ? most : high_) : ceiling_;
    }

    // The least and the most position on the way to rest, by way of velocity `goal`.
    void reach(const Motion& m, double goal, double& least, double& most) const noexcept {
        const Ramp r = limiter::ramp_to(goal, m.v, m.a, a_, a_, j_);
        least = most = m.x;
        double turn = m.x;
        if (goal != 0) {  // the goal of backup's first ramp is such that the velocity is 0 as its last phase begins
            turn = advanced(advanced(m, r.jerk, r.t1), 0, r.t2).x;
        } else if (m.v * r.jerk < 0 ? false : m.v != 0) {
            // turns in the first phase: the jerk already has the direction of the way back
            const double square = m.a * m.a - 2 * r.jerk * m.v, root = square > 0 ? std::sqrt(square) : 0;
            turn = advanced(m, r.jerk, (std::fabs(m.a) - root) / j_).x;
        }
        Motion end = limiter::along(m, r, goal, limiter::duration(r) + 1);
        if (goal != 0) {
            const Ramp back = limiter::ramp_to(0, end.v, end.a, a_, a_, j_);
            end = limiter::along(end, back, 0, limiter::duration(back) + 1);
        }
        if (turn < least) least = turn;
        if (turn > most) most = turn;
        if (end.x < least) least = end.x;
        if (end.x > most) most = end.x;
    }

    // Whether a motion can come to rest inside the bounds, and by way of which velocity: 0, or the direction in which it leaves them.
    int leaves(const Motion& m, double& goal) const noexcept {
        const double level = m.v + m.a * std::fabs(m.a) * half_;
        goal = 0;
        if (level > v_ * kRounded || m.v > v_ * kRounded || m.a > a_ * kRounded) return 1;
        if (level < -v_ * kRounded || m.v < -v_ * kRounded || m.a < -a_ * kRounded) return -1;
        if (!bounded_) return 0;
        double least, most;
        reach(m, 0, least, most);
        const double slack = 4e-16 * (std::fabs(least) + std::fabs(most));
        if (least >= floor_ - slack && most <= ceiling_ + slack) return 0;
        // brake as hard as possible until the velocity is 0, and let go of the acceleration then
        const double s = most > ceiling_ + slack ? 1.0 : -1.0;
        double way = m.a * m.a * half_ + s * m.v;
        if (way > a_ * a_ * half_) way = a_ * a_ * half_;
        if (!(way > 0 && way <= v_ && s * m.v > 0)) return static_cast<int>(s);
        goal = -s * way;
        reach(m, goal, least, most);
        if (most > ceiling_ + slack) return 1;
        return least < floor_ - slack ? -1 : 0;
    }

    // The motion after dt on the way to rest.
    Motion backup(double dt, double& goal) const noexcept {
        const Ramp r = limiter::ramp_to(goal, now_.v, now_.a, a_, a_, j_);
        const double t = limiter::duration(r);
        const Motion m = limiter::along(now_, r, goal, dt);
        if (goal == 0 || dt < t) return m;
        goal = 0;
        const Ramp back = limiter::ramp_to(0, m.v, m.a, a_, a_, j_);
        return limiter::along(m, back, 0, dt - t);
    }

    bool send_exactly(double target, double dt) noexcept {
        const double v = (target - now_.x) / dt;
        const double a = (v - v1_) * 2 / (dt + d1_);
        const double j = (a - a1_) * 3 / (dt + d1_ + d2_);
        const double most = v1_ == 0 && a1_ == 0 ? kFromRest / kInside : 1.0;
        if (!(std::fabs(v) <= most * v_ && std::fabs(a) <= most * a_ && std::fabs(j) <= most * j_)) return false;
        // the cubic through the last three positions whose third derivative is j
        const double begin = v + a * dt * 0.5, by_v = dt * (dt + d1_) * (1.0 / 6), by_a = (2 * dt + d1_) * (1.0 / 3);
        double low = -j_, high = j_, goal;
        if (a + low * by_a < -a_) low = (-a_ - a) / by_a;
        if (a + high * by_a > a_) high = (a_ - a) / by_a;
        double q = j < low ? low : j > high ? high : j;
        bool low_tried = false, high_tried = false;
        for (int attempt = 0; attempt < 8; ++attempt) {
            const Motion m{target, begin + q * by_v, a + q * by_a};
            const int side = leaves(m, goal);
            if (side == 0) {
                goal_ = goal;
                moved(m, v, a, dt);
                remember(target);
                return true;
            }
            if (q == (side > 0 ? low : high)) return false;
            // too high: lower, to the end first
            bool& tried = side > 0 ? low_tried : high_tried;
            (side > 0 ? high : low) = q;
            (side > 0 ? high_tried : low_tried) = true;
            q = tried ? 0.5 * (low + high) : side > 0 ? low : high;
            tried = true;
        }
        return false;
    }

    void remember(double target) noexcept { target3_ = target2_, target2_ = target1_, target1_ = target; }

    // Velocity and acceleration of the target at its last value; of a target that jumps: rest.
    Motion aimed(double target, double dt) const noexcept {
        const double v = (target - target1_) / dt, v1 = (target1_ - target2_) / d1_, v2 = (target2_ - target3_) / d2_;
        const double a = (v - v1) * 2 / (dt + d1_), a1 = (v1 - v2) * 2 / (d1_ + d2_);
        const double j = (a - a1) * 3 / (dt + d1_ + d2_);
        if (!(std::fabs(v) <= v_ && std::fabs(a) <= a_)) return {target, 0, 0};
        if (!(std::fabs(j) <= j_)) return {target, v, 0};
        double at = a + j * ((2 * dt + d1_) * (1.0 / 3));
        const double vt = v + a * dt * 0.5 + j * (dt * (dt + d1_) * (1.0 / 6));
        at = at > 0.9 * a_ ? 0.9 * a_ : at < -0.9 * a_ ? -0.9 * a_ : at;
        return {target, vt, at};
    }

    static Motion minus(const Motion& m, const Motion& n) noexcept { return {m.x - n.x, m.v - n.v, m.a - n.a}; }

    // Where, relative to the target, a motion comes to rest relative to it.
    double miss(const Motion& m, const Motion& from, double t) const noexcept {
        const Motion r = minus(m, advanced(from, 0, t));
        const Ramp stop = limiter::ramp_to(0, r.v, r.a, a_ + from.a, a_ - from.a, j_);
        return limiter::along(r, stop, 0, limiter::duration(stop) + 1).x;
    }

    void approach(double target, double dt) noexcept {
        const Motion aim = aimed(target, dt);
        const Motion from = advanced(aim, 0, -dt);
        const double tolerance = 4e-16 * (std::fabs(now_.x) + std::fabs(target)) + 1e-12 * j_ * dt * dt * dt;
        const double error = miss(now_, from, 0);
        const double s = error < 0 ? 1.0 : -1.0;
        const Ramp drive = limiter::ramp_to(s * v_, now_.v, now_.a, a_, a_, j_);
        double t = 0;
        if (std::fabs(error) > tolerance) t = switching(drive, s, from, error, dt, tolerance);
        Motion m = driven(drive, s, t);
        const double left = dt - t;
        const Motion r = minus(m, advanced(from, 0, t));
        const Ramp stop = limiter::ramp_to(0, r.v, r.a, a_ + aim.a, a_ - aim.a, j_);
        bool landed = left >= limiter::duration(stop) && std::fabs(limiter::along(r, stop, 0, left).x) <= tolerance;
        m = landed ? aim : limiter::phases(m, stop, left);  // not relative: a far target would cost digits
        double goal;
        if (!admissible(m, dt, goal)) {
            landed = false;
            m = nearest(m, dt, goal);
        }
        locked_ = landed;
        goal_ = goal;
        send(m, dt);
        remember(target);
    }

    bool admissible(const Motion& m, double dt, double& goal) const noexcept {
        return std::fabs(m.x - now_.x) <= v_ * dt && m.x >= floor_ && m.x <= ceiling_ && leaves(m, goal) == 0;
    }

    // As far from the way to rest toward `m` as can be.
    Motion nearest(const Motion& m, double dt, double& goal) const noexcept {
        double best = goal_;
        const Motion rest = backup(dt, best);
        Motion found = rest;
        double part = 0, step = 0.5;
        for (int i = 0; i < 12; ++i, step *= 0.5) {
            const double f = part + step;
            const Motion mixed{rest.x + f * (m.x - rest.x), rest.v + f * (m.v - rest.v), rest.a + f * (m.a - rest.a)};
            double way;
            if (!admissible(mixed, dt, way)) continue;
            part = f, found = mixed, best = way;
        }
        goal = best;
        return found;
    }

    // Driving toward velocity s * v_, which is kept when it is reached.
    Motion driven(const Ramp& drive, double s, double t) const noexcept {
        Motion m = limiter::along(now_, drive, s * v_, t);
        const double over = t - limiter::duration(drive);
        if (over > 0) m.x += over * m.v;
        return m;
    }

    // How long to drive before the way to rest relative to the target ends at the target; at most dt.
    double switching(const Ramp& drive, double s, const Motion& from, double error, double dt, double tolerance) const noexcept {
        double a = 0, fa = error, b = dt, fb = miss(driven(drive, s, dt), from, dt);
        if (!(s * fb > 0)) return dt;
        double t = 0;
        for (int i = 0; i < 40; ++i) {
            t = i % 3 == 2 ? 0.5 * (a + b) : (a * fb - b * fa) / (fb - fa);
            const double f = miss(driven(drive, s, t), from, t);
            if (std::fabs(f) <= tolerance) break;
            if (s * f > 0) {
                b = t, fb = f;
            } else {
                a = t, fa = f;
            }
        }
        return t;
    }

    double low_, high_, v_, a_, j_, half_;
    bool dynamic_, still_, bounded_;
    bool started_ = false, first_ = true, locked_ = true;
    int known_ = 0;
    Motion now_{0, 0, 0};
    double goal_ = 0, v1_ = 0, a1_ = 0, d1_ = 0, d2_ = 0;
    double floor_ = 0, ceiling_ = 0, target1_ = 0, target2_ = 0, target3_ = 0;
};

}  // namespace dit4dit
