// The pretend robot: put the interface of your motor drives here. It does what it is sent, at once.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include <dit4dit/action_stream.h>

class Robot {
 public:
    // It stands at 0, or as near to it as its limits allow; velocities and displacements are 0 at rest.
    explicit Robot(const dit4dit::Reader& reader) : pose_(reader.dims(), 0.0) {
        for (std::size_t i = 0; i < pose_.size(); ++i) {
            const dit4dit::Limits& limits = reader.layout().channel[reader.channel(static_cast<int>(i))].limits;
            pose_[i] = std::min(std::max(0.0, limits.low), limits.high);
        }
    }

    // One value per channel, in the order of the reader's channels, as the encoders measure them.
    const double* measured() const noexcept { return pose_.data(); }

    void send(const double* command) noexcept { std::copy_n(command, pose_.size(), pose_.begin()); }

 private:
    std::vector<double> pose_;
};
