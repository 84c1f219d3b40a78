// Bounds of position, velocity, acceleration and jerk of one channel, kept by what is sent, for any targets at any ticks.
//
// What holds: with the first, second and third divided differences of the values sent (v = f[t0,t1], a = 2 f[t0,t1,t2],
// j = 6 f[t0..t3]; before the first tick the channel has been at rest), every bound holds and low..high is never left. On uniform
// ticks these are the usual backward differences. A target whose own differences stay below 0.8 of the bounds is sent as it is; any
// other is approached in nearly the least time that the bounds allow, and sent as it is from where it is met.
//
// Why: n! times the n-th divided difference of samples of a path is an average of the path's n-th derivative. The values sent
// are samples of a path within the bounds whose rest of the way is known at every tick: it comes to rest within the bounds. What
// is sent next is accepted only where that holds again; otherwise the known way to rest is followed, which is possible at any tick.
//
// What cannot hold: a step from rest whose differences are below 0.8 of the bounds looks like a ramp until the next tick, and is
// sent. If the target stays there, it may be passed, by less than the step; steps that small are below jerk * dt^3. Where ticks
// vary, a target that turns around within a tick or two is not followed when a next tick as short as kLeastTick would leave no
// way to rest, and near low and high even at uniform ticks. The jerk of doubles near x has a noise of 4 ulp(x) / dt^3, their
// acceleration one of 2 ulp(x) / dt^2: bounds below a thousand times that cannot be kept.
//
// Only + - * / sqrt and comparisons, never contracted (exact_begin.h): the same bits everywhere.
#pragma once

#include <cmath>
#include <limits>

#include "limits.h"
#include "ramp.h"

#include "exact_begin.h"

namespace dit4dit {

class ChannelLimiter {
public:
    // Shorter ticks are ignored, in seconds.
    static constexpr double kLeastTick = 50e-6;

    // A bound of velocity, acceleration or jerk that is not > 0, or low > high: the channel never moves.
    explicit ChannelLimiter(const Limits& limits) noexcept : low_(limits.low), high_(limits.high) {
        constexpr double infinity = std::numeric_limits<double>::infinity();
        double v = limits.velocity, a = limits.acceleration, j = limits.jerk;
        still_ = !(v > 0 && a > 0 && j > 0 && low_ <= high_);
        dynamic_ = v < infinity || a < infinity || j < infinity;
        bounded_ = low_ > -infinity || high_ < infinity;
        // an unlimited derivative gets a bound that the limited ones never let it reach
        if (!(a < infinity)) a = v < infinity ? v * 1e6 : j < infinity ? j * 1e6 : 1;
        if (!(j < infinity)) j = a * 1e6;
        if (!(v < infinity)) v = a * 1e6;
        v_ = v * kInside, a_ = a * kInside, j_ = j * kInside;
        own_ = {a_, a_, j_, j_};
        half_ = 0.5 / j_;
    }

    // At rest there; the next tick is the first. May lie outside low..high: the channel then comes in, and never goes farther out.
    // NaN and infinities are ignored.
    void reset(double position) noexcept {
        if (!finite(position)) return;
        started_ = true, first_ = true, exact_ = true, aimless_ = true, met_ = 0, open_ = false;
        now_ = {position, 0, 0};
        goal_ = 0, v1_ = 0, a1_ = 0;
    }

    // `dt`: seconds since the last tick that was not ignored. Returns what is sent. NaN or an infinity as target: as `brake`; as
    // dt, or less than kLeastTick: ignored. Before any `reset` the first target is taken for the position at rest.
    double tick(double target, double dt) noexcept {
        if (!(dt >= kLeastTick && finite(dt))) return now_.x;
        if (!finite(target)) return brake(dt);
        target = target < low_ ? low_ : target > high_ ? high_ : target;
        if (!started_) reset(target);
        if (still_) return now_.x;
        if (!dynamic_) return now_.x = target;
        begin(dt);
        if (aimless_) target1_ = target2_ = target3_ = target;
        aimless_ = false;
        if (!(exact_ && send_exactly(target, dt))) approach(target, dt);
        target3_ = target2_, target2_ = target1_, target1_ = target;
        return now_.x;
    }

    // Comes to rest within the bounds as fast as they allow, wherever that is, and stays. `dt` as for `tick`.
    double brake(double dt) noexcept {
        if (!(dt >= kLeastTick && finite(dt)) || !started_ || still_ || !dynamic_) return now_.x;
        begin(dt);
        exact_ = false, aimless_ = true;
        double goal;
        const Motion m = backup(dt, goal);
        send(m, goal, dt);
        return now_.x;
    }

    double sent() const noexcept { return now_.x; }

private:
    using Motion = limiter::Motion;
    using Ramp = limiter::Ramp;
    // room for rounding; a step from rest to be sent as it is; a bound that is reached, after rounding
    static constexpr double kInside = 0.999, kFromRest = 0.8 / kInside, kReached = 1 + 1e-9;

    // A target's motion and its jerk, which is kept.
    struct Aim {
        Motion at;
        double jerk;
        Aim after(double t) const noexcept { return {advanced(at, jerk, t), jerk}; }
    };

    // Paths through the last three values: cubics of any jerk between low and high, by their motion at the last one.
    struct Cubics {
        double x, v0, a0, by_v, by_a, low, high;
        Cubics(double x_, double v, double a, double dt, double before, double most, double jerk) noexcept
            : x(x_), v0(v + a * dt * 0.5), a0(a), by_v(dt * (dt + before) * (1.0 / 6)), by_a((2 * dt + before) * (1.0 / 3)),
              low((-most - a) / by_a), high((most - a) / by_a) {
            low = low < -jerk ? -jerk : low, high = high > jerk ? jerk : high;
        }
        Motion end(double q) const noexcept { return {x, v0 + q * by_v, a0 + q * by_a}; }
    };

    static bool finite(double x) noexcept { return x - x == 0; }

    void begin(double dt) noexcept {
        if (first_) d1_ = d2_ = dt;
        first_ = false;
    }

    void send(const Motion& m, double goal, double dt) noexcept {
        const double floor = now_.x < low_ ? now_.x : low_, ceiling = now_.x > high_ ? now_.x : high_;
        const double x = m.x < floor ? floor : m.x > ceiling ? ceiling : m.x;
        const double v = (x - now_.x) / dt;
        moved({x, m.v, m.a}, goal, v, (v - v1_) * 2 / (dt + d1_), dt);
    }

    // v and a: the differences of what is sent.
    void moved(const Motion& m, double goal, double v, double a, double dt) noexcept {
        now_ = m, goal_ = goal, v1_ = v, a1_ = a, open_ = false;
        d2_ = d1_, d1_ = dt;
    }

    // --- the way to rest: to velocity `goal` first and then to 0, both as fast as possible

    struct Turns {
        double turn, end;  // positions; without a turn it is where the way begins
    };

    Turns turns(const Motion& m, double goal) const noexcept {
        const Ramp r = limiter::ramp_to(goal, m.v, m.a, own_);
        const double end = limiter::end_of(m, r);
        if (goal != 0) {  // such a goal that the velocity is 0 when the last phase begins
            return {advanced(advanced(m, r.j1, r.t1), 0, r.t2).x,
                    limiter::end_of({end, goal, 0}, limiter::ramp_to(0, goal, 0, own_))};
        }
        // letting go of the acceleration turns the velocity around
        const double square = m.a * m.a - 2 * r.j1 * m.v;
        const bool turning = m.v * r.j1 > 0 && square > 0;
        return {turning ? advanced(m, r.j1, (std::fabs(m.a) - std::sqrt(square)) / j_).x : m.x, end};
    }

    // 1 if the way from x goes up to more than `high_`, -1 if it goes down to less than `low_`. A start outside is no fault.
    int beyond(double x, const Turns& way, double rounding) const noexcept {
        const double slack = rounding * (std::fabs(way.turn) + std::fabs(way.end)) + 1e-17 * j_;
        const double up = way.turn > x ? way.turn : way.end, down = way.turn < x ? way.turn : way.end;
        if (up > high_ + slack && (up > x || way.turn < x)) return 1;
        return down < low_ - slack && (down < x || way.turn > x) ? -1 : 0;
    }

    // 0 where there is a way to rest within the bounds, by way of velocity `goal`; otherwise the direction in which they are left.
    // `rounding`: how much of a position may be missing to the limits.
    int leaves(const Motion& m, double& goal, double rounding = 4e-16) const noexcept {
        const double level = m.v + m.a * std::fabs(m.a) * half_, v = v_ * kReached, a = a_ * kReached;
        goal = 0;
        if (level > v || m.v > v || m.a > a) return 1;
        if (level < -v || m.v < -v || m.a < -a) return -1;
        if (!bounded_) return 0;
        const double slack = rounding * std::fabs(m.x) + 1e-17 * j_;
        if (m.x > high_ + slack && m.x > now_.x) return 1;
        if (m.x < low_ - slack && m.x < now_.x) return -1;
        const int side = beyond(m.x, turns(m, 0), rounding);
        if (side == 0) return 0;
        // brake as hard as possible until the velocity is 0, and let go of the acceleration only then
        const double full = a_ * a_ * half_;
        double back = m.a * m.a * half_ + side * m.v;
        back = back > full ? full : back;
        if (!(side * m.v > 0 && back > 0 && back <= v)) return side;
        goal = -side * back;
        return beyond(m.x, turns(m, goal), rounding);
    }

    // The motion after dt on the way to rest, and the goal from there.
    Motion backup(double dt, double& goal) const noexcept {
        const Ramp r = limiter::ramp_to(goal_, now_.v, now_.a, own_);
        const double left = dt - r.duration();
        goal = left < 0 ? goal_ : 0;
        const Motion m = limiter::settled(now_, r, goal_, left < 0 ? dt : r.duration());
        if (left < 0 || goal_ == 0) return m;
        return limiter::settled(m, limiter::ramp_to(0, m.v, m.a, own_), 0, left);
    }

    // --- a target that is followed

    // Sends the target where that keeps the bounds and leaves a way to rest.
    bool send_exactly(double target, double dt) noexcept {
        const double v = (target - now_.x) / dt;
        const double a = (v - v1_) * 2 / (dt + d1_);
        if (met_ > 0 && send_along(target, v, a, dt)) return true;
        const double j = (a - a1_) * 3 / (dt + d1_ + d2_);
        const double part = v1_ == 0 && a1_ == 0 ? kFromRest : 1.0;
        if (!(std::fabs(v) <= part * v_ && std::fabs(a) <= part * a_ && std::fabs(j) <= part * j_)) return false;
        const Cubics past(target, v, a, dt, d1_, a_, j_);
        double low = past.low, high = past.high, q = j < low ? low : j > high ? high : j;
        const double level = -(a * dt * 0.5) / past.by_v;
        bool tried = false;
        for (int i = 0; i < 8; ++i) {
            const Motion m = past.end(q);
            double goal;
            const int side = leaves(m, goal);
            if (side == 0) {
                moved(m, goal, v, a, dt);
                open_ = true;
                return true;
            }
            if (q == (side > 0 ? low : high)) return false;
            // the one whose velocity is the last difference, the end on the other side, and halves after that
            (side > 0 ? high : low) = q;
            if (i == 0 && level > low && level < high) {
                q = level;
                continue;
            }
            q = tried ? 0.5 * (low + high) : side > 0 ? low : high;
            tried = true;
        }
        return false;
    }

    // The same with the path so far, of another jerk in this tick, while values from before the target was met tell nothing about
    // the target. (Not for long: what is off in the path's velocity grows from tick to tick.)
    bool send_along(double target, double v, double a, double dt) noexcept {
        const double jerk = (target - now_.x - dt * (now_.v + dt * (now_.a * 0.5))) * 6 / (dt * dt * dt);
        const Motion m{target, now_.v + dt * (now_.a + dt * (jerk * 0.5)), now_.a + dt * jerk};
        double goal;
        if (!(std::fabs(jerk) <= j_ && std::fabs(v) <= v_ * kReached && leaves(m, goal) == 0)) return false;
        if (!(jerk == 0 && now_.v == 0 && now_.a == 0)) --met_;  // at rest it may stay
        moved(m, goal, v, a, dt);
        return true;
    }

    // --- a target that is approached

    // The target's motion, by its last four values; of one that jumps: as if it stayed.
    Aim aimed(double target, double dt) const noexcept {
        const double v = (target - target1_) / dt, v1 = (target1_ - target2_) / d1_, v2 = (target2_ - target3_) / d2_;
        const double a = (v - v1) * 2 / (dt + d1_), a1 = (v1 - v2) * 2 / (d1_ + d2_);
        const double j = (a - a1) * 3 / (dt + d1_ + d2_);
        if (!(std::fabs(v) <= v_ && std::fabs(a) <= a_)) return {{target, 0, 0}, 0};
        if (!(std::fabs(j) <= j_)) return {{target, v, 0}, 0};
        const double most = 0.9 * a_, most_jerk = 0.9 * j_;  // some of the bounds is left for coming nearer
        const double now = a + j * ((2 * dt + d1_) * (1.0 / 3));
        const double end = now > most ? most : now < -most ? -most : now;
        double begin = end - j * dt;
        begin = begin > most ? most : begin < -most ? -most : begin;
        double jerk = (end - begin) / dt;
        jerk = jerk > most_jerk ? most_jerk : jerk < -most_jerk ? -most_jerk : jerk;
        return {{target, v + a * dt * 0.5 + j * (dt * (dt + d1_) * (1.0 / 6)), end}, jerk};
    }

    // What is left for coming to rest relative to a target, whose acceleration is between `low` and `high` in this tick.
    limiter::Reach reach(const Aim& from, const Aim& to) const noexcept {
        const double low = from.at.a < to.at.a ? from.at.a : to.at.a, high = from.at.a < to.at.a ? to.at.a : from.at.a;
        return {a_ + low, a_ - high, j_ + from.jerk, j_ - from.jerk};
    }

    // Where, relative to the target, the way to rest relative to it ends.
    static double miss(const Motion& m, const Aim& aim, const limiter::Reach& reach) noexcept {
        const Motion r = m - aim.at;
        return limiter::end_of(r, limiter::ramp_to(0, r.v, r.a, reach));
    }

    // The target has been sent exactly and cannot be followed: of the paths that were possible, the one that ends nearest to it.
    void choose_past(const Aim& from, const limiter::Reach& left) noexcept {
        const Cubics past(now_.x, v1_, a1_, d1_, d2_, a_, j_);
        double low = past.low, high = past.high;
        for (int i = 0; i < 12; ++i) {
            const double q = 0.5 * (low + high);
            (miss(past.end(q), from, left) > 0 ? high : low) = q;
        }
        double goal;
        const Motion m = past.end(0.5 * (low + high));
        if (leaves(m, goal) == 0) now_ = m, goal_ = goal;
    }

    // Drives toward the target as hard as the bounds allow, for as long as the way to rest relative to the target ends before it;
    // that way follows. Both end with the tick: the next one plans again.
    void approach(double target, double dt) noexcept {
        const Aim to = aimed(target, dt), from = to.after(-dt);
        const limiter::Reach left = reach(from, to);
        if (open_) choose_past(from, left);
        const double tolerance = 4e-16 * (std::fabs(now_.x) + std::fabs(target)) + 1e-12 * j_ * (dt * dt * dt);

        const double error = miss(now_, from, left), full = error < 0 ? v_ : -v_;
        const Ramp drive = limiter::ramp_to(full, now_.v, now_.a, own_);
        const double t = std::fabs(error) <= tolerance ? 0 : switching(drive, full, from, left, error, dt, tolerance);
        Motion m = limiter::settled(now_, drive, full, t);
        const Motion r = m - from.after(t).at;
        Ramp stop = limiter::ramp_to(0, r.v, r.a, left);
        const double off = dt - t >= stop.duration() ? std::fabs(limiter::end_of(r, stop)) : 1 / tolerance;
        stop.j1 += from.jerk, stop.j3 += from.jerk;
        m = limiter::along(m, stop, from.jerk, dt - t);  // absolute: a far target would cost digits
        exact_ = off <= 100 * tolerance;                 // met within the tick, but for what rounding has added up to
        met_ = exact_ ? 3 : 0;
        if (exact_) m = {off <= tolerance ? target : m.x, to.at.v, to.at.a};
        double goal;
        if (!admissible(m, dt, goal, 1e-13)) {  // a target at a limit: rounding must not decide
            exact_ = false;
            m = nearest(m, dt, goal);
        }
        send(m, goal, dt);
    }

    // How long to drive, at most dt.
    double switching(const Ramp& drive, double full, const Aim& from, const limiter::Reach& left, double error, double dt,
                     double tolerance) const noexcept {
        double a = 0, at_a = error, b = dt, at_b = miss(limiter::settled(now_, drive, full, dt), from.after(dt), left), t = 0;
        if (!(at_b * full > 0)) return dt;  // it ends before the target still
        int side = 0;  // of the end that was moved last: the other one counts half if it stays (Illinois)
        for (int i = 0; i < 72; ++i) {
            t = i < 20 ? (a * at_b - b * at_a) / (at_b - at_a) : 0.5 * (a + b);
            const double f = miss(limiter::settled(now_, drive, full, t), from.after(t), left);
            if (std::fabs(f) <= tolerance) return t;
            if (f * full > 0) {
                b = t, at_b = f;
                at_a = side > 0 ? at_a * 0.5 : at_a;
                side = 1;
            } else {
                a = t, at_a = f;
                at_b = side < 0 ? at_b * 0.5 : at_b;
                side = -1;
            }
        }
        return a;  // where it ends before the target
    }

    bool admissible(const Motion& m, double dt, double& goal, double rounding = 4e-16) const noexcept {
        return std::fabs(m.x - now_.x) <= v_ * kReached * dt && leaves(m, goal, rounding) == 0;
    }

    // The admissible motion that is nearest to m on the line from the way to rest, which always is.
    Motion nearest(const Motion& m, double dt, double& goal) const noexcept {
        const Motion rest = backup(dt, goal), d = m - rest;
        Motion best = rest;
        double part = 0;
        for (double step = 0.5; step > 1e-4; step *= 0.5) {
            const double f = part + step;
            const Motion mixed{rest.x + f * d.x, rest.v + f * d.v, rest.a + f * d.a};
            double way;
            if (!admissible(mixed, dt, way)) continue;
            part = f, best = mixed, goal = way;
        }
        return best;
    }

    double low_, high_, v_, a_, j_, half_;  // the bounds, a little inside what was asked for
    limiter::Reach own_;
    bool dynamic_, still_, bounded_;
    bool started_ = false, first_ = true;
    bool exact_ = true;     // what was sent last is the target
    int met_ = 0;           // for how many ticks a target that was met just now is followed by the path's own motion
    bool open_ = false;     // now_ is one of many paths through the last values
    bool aimless_ = true;   // no target before the next one
    Motion now_{0, 0, 0};   // of the path that the values sent are samples of
    double goal_ = 0;       // of its way to rest
    double v1_ = 0, a1_ = 0, d1_ = 0, d2_ = 0;  // the last differences of what was sent, the last ticks
    double target1_ = 0, target2_ = 0, target3_ = 0;
};

}  // namespace dit4dit

#include "exact_end.h"
