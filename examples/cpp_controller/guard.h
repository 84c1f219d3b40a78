// A last look before the motors, independent of the stream: finite, inside the range, no faster than the limits say.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <dit4dit/action_stream.h>

class Guard {
 public:
    Guard(const dit4dit::Reader& reader, const double* pose)
        : last_(pose, pose + reader.dims()), period_ns_(reader.command_period_ns()) {
        for (std::size_t i = 0; i < last_.size(); ++i) {
            channels_.push_back(&reader.layout().channel[reader.channel(static_cast<int>(i))]);
        }
    }

    // -1, or the channel whose value must not be sent. Allocates nothing.
    int check(const double* command, std::int64_t now_ns) noexcept {
        const double seconds = static_cast<double>(last_ns_ == 0 ? period_ns_ : now_ns - last_ns_) * 1e-9;
        moving_ = false;
        for (std::size_t i = 0; i < last_.size(); ++i) {
            if (!allowed(*channels_[i], command[i], last_[i], seconds)) return static_cast<int>(i);
        }
        std::copy_n(command, last_.size(), last_.begin());
        last_ns_ = now_ns;
        return -1;
    }

    const char* name(int i) const noexcept { return channels_[static_cast<std::size_t>(i)]->name; }
    // Whether the last command differs from the one before, or is a speed or displacement other than 0.
    bool moving() const noexcept { return moving_; }
    // The largest share of a velocity limit (of a velocity channel: acceleration limit) that a command has used.
    double used() const noexcept { return used_; }

 private:
    static constexpr double kRounding = 1e-6;  // of a bound

    bool allowed(const dit4dit::Channel& channel, double value, double before, double seconds) noexcept {
        using dit4dit::Kind;
        const dit4dit::Limits& limits = channel.limits;
        if (!std::isfinite(value)) return false;
        double change = value - before;
        double most = limits.velocity;
        switch (channel.kind) {
            case Kind::binary:
                return value == 0.0 || value == 1.0;
            case Kind::position:
                moving_ |= change != 0.0;
                // a robot that stands outside is brought in
                if ((value < limits.low && value < before) || (value > limits.high && value > before)) return false;
                break;
            case Kind::angle:  // the short way
                change = std::remainder(change, 2.0 * 3.14159265358979323846);
                moving_ |= change != 0.0;
                break;
            case Kind::velocity:
                moving_ |= value != 0.0;
                if (value < limits.low || value > limits.high) return false;
                if (std::fabs(value) > limits.velocity * (1.0 + kRounding)) return false;
                most = limits.acceleration;
                break;
            case Kind::relative:
                change = value;
                moving_ |= value != 0.0;
                break;
        }
        if (seconds <= 0.0 || std::isinf(most)) return true;
        const double used = std::fabs(change) / seconds / most;
        used_ = std::max(used_, used);
        return used <= 1.0 + kRounding;
    }

    std::vector<const dit4dit::Channel*> channels_;
    std::vector<double> last_;
    std::int64_t period_ns_, last_ns_ = 0;
    bool moving_ = false;
    double used_ = 0.0;
};
