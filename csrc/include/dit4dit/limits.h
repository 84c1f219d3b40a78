// Bounds of one channel, in its own units and seconds.
#pragma once

#include <limits>

namespace dit4dit {

// Of a velocity channel: low and high bound the velocity itself, acceleration and jerk its changes. Infinite: unlimited.
struct Limits {
    double low = -std::numeric_limits<double>::infinity();
    double high = std::numeric_limits<double>::infinity();
    double velocity = std::numeric_limits<double>::infinity();
    double acceleration = std::numeric_limits<double>::infinity();
    double jerk = std::numeric_limits<double>::infinity();

    bool limited() const noexcept {
        constexpr double inf = std::numeric_limits<double>::infinity();
        return low != -inf || high != inf || velocity != inf || acceleration != inf || jerk != inf;
    }
};

}  // namespace dit4dit
