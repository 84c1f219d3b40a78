// What a channel may do: bounds of its position and of the position's first three derivatives, in the channel's unit and seconds.
#pragma once

#include <limits>

namespace dit4dit {

// Bounds of one channel; infinity: unlimited. `velocity`, `acceleration` and `jerk` bound both directions and are > 0; low < high.
struct Limits {
    double low = -std::numeric_limits<double>::infinity();
    double high = std::numeric_limits<double>::infinity();
    double velocity = std::numeric_limits<double>::infinity();
    double acceleration = std::numeric_limits<double>::infinity();
    double jerk = std::numeric_limits<double>::infinity();

    // Whether there is any bound.
    bool limited() const noexcept {
        constexpr double infinity = std::numeric_limits<double>::infinity();
        return !(low == -infinity && high == infinity && velocity == infinity && acceleration == infinity && jerk == infinity);
    }
};

}  // namespace dit4dit
