// The controller's side of an action stream: one command per tick, from whatever chunks there are.
//
// Each read: new chunks are copied from the ring; each group of channels follows them or does what its rules say; what a group
// asks for goes through the limiters of its channels. All memory is allocated when the reader is made.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "chain.h"
#include "layout.h"
#include "limiter.h"
#include "result.h"
#include "ring.h"
#include "seams.h"
#include "segment.h"

#include "exact_begin.h"

namespace dit4dit {

struct Options {
    const char* name;     // of the segment, "/dit4dit.g1"
    bool driver = false;  // this reader moves the robot: it writes feedback, and is the only one that does
    std::int64_t dead_after_ns = 50'000'000;    // since the last sign of life of the producer's process
    std::int64_t loop_dead_after_ns = 0;        // since the last one of its loop; 0: any time
    const char* group = nullptr;                // the channels of this group only
    const Layout* expected = nullptr;           // a segment of another layout is an error
};

struct Command {
    std::uint64_t chunk;  // the newest that has begun; 0: none yet
    std::int32_t row;     // of it; -1: no group follows it
    Status status;
    std::int64_t age_ns;  // of the chunk's observation; -1: no chunk yet
};

// Not thread safe: it holds the state of seams and limiters.
class Reader {
  public:
    // A read that comes so soon after the tick before is none: it gives the same command again, and displacements of 0.
    static constexpr std::int64_t kShortestTick = 50'000;
    // A tick that comes later than this, and than 2 command periods, moves limited channels no farther than one of that length:
    // a robot that was left alone must not be sent a step.
    static constexpr std::int64_t kLongestTick = 20'000'000;
    // After this long, and 4 command periods, without a tick the robot is taken to rest at what was sent last.
    static constexpr std::int64_t kAtRest = 250'000'000;
    // Displacements that limits hold back are made up for, up to what the velocity limit allows in so many seconds: a policy that
    // asks for more than the robot can do must not send it on for long afterwards.
    static constexpr double kMadeUpFor = 0.5;

    static Result<Reader> open(const Options& options);
    // In the producer's process; options.name is not looked at.
    static Result<Reader> of(std::shared_ptr<Memory> memory, const Options& options);

    std::size_t dims() const noexcept { return columns_.size(); }
    int channel(int i) const noexcept { return columns_[static_cast<std::size_t>(i)].column; }  // in the layout
    std::int64_t command_period_ns() const noexcept { return layout_->command_period_ns; }
    const Layout& layout() const noexcept { return *layout_; }

    // The command for the tick that begins at now_ns, out [dims()]. The same time again: the same command. A time before that of
    // a read before, until there is a later one or start_at: the same command, and displacements of 0. No allocation, lock or
    // system call.
    Command read(std::int64_t now_ns, double* out) noexcept;

    // The robot is at rest in this measured pose [dims()]: of velocities what they are, of displacements nothing is taken. NaN:
    // not known. Ends stop(). The first tick after it counts as one command period, and may be at any time.
    void start_at(const double* values) noexcept;
    // The robot comes to rest within its limits and stays, for this reader: as in an e-stop, but nobody else sees it.
    void stop() noexcept { stopped_ = true; }

    // Latches for every reader until clear_estop(). Chunks that were observed before that are not followed any more. No
    // safety-rated function: it needs a controller that reads.
    void estop(std::int64_t now_ns) noexcept { dit4dit::estop(memory_->writable(), now_ns); }
    void clear_estop() noexcept { dit4dit::clear_estop(memory_->writable()); }

  private:
    static constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();

    enum class Mode : std::uint8_t { none, follow, hold, decay };

    // What a group does.
    struct Regime {
        Mode mode = Mode::none;
        bool brakes = false;  // to rest, wherever that is; else what was asked for last is still gone to
        std::int64_t since = 0;
        Base base;
    };

    struct State {
        ChannelLimiter limiter;
        bool limited, started = false;
        double asked;  // last; of a relative channel: displacement per second. NaN: nothing yet
        double fades_from = 0;
        double path = 0;  // relative: all displacements that were asked for
        double sent;
        double farthest;  // relative: of the path from what was sent
    };

    struct Situation {
        bool estop, dead, dry;
        std::uint32_t stale;  // bit per group
        Status status;
    };

    // Gives the driver's lock back.
    struct Unlock {
        std::shared_ptr<Memory> memory;
        void operator()(Memory* held) const noexcept { held->unlock(Role::driver); }
    };

    Reader(std::shared_ptr<Memory> memory, const Options& options);

    static std::vector<Column> columns_of(const Layout& layout, const char* group);
    static std::vector<int> relative_of(const std::vector<Column>& columns);
    static Limits limits_of(const Channel& channel) noexcept;
    static Mode mode_of(Rule rule) noexcept { return rule == Rule::decay ? Mode::decay : Mode::hold; }

    Situation look(std::int64_t now, bool whole) noexcept;
    void tick(std::int64_t now, const Situation& seen) noexcept;
    double seconds_since(std::int64_t now) noexcept;
    void enter(std::uint32_t group, std::int64_t now, const Situation& seen) noexcept;
    void move(std::size_t i, const Regime& regime, std::int64_t now, double seconds, double dt) noexcept;
    static double displaced(State& state, bool brakes, double wanted, double dt) noexcept;
    static double limited(State& state, Kind kind, bool brakes, double dt) noexcept;
    void write(std::int64_t now, const double* out) noexcept;

    std::shared_ptr<Memory> memory_;
    std::unique_ptr<Memory, Unlock> driver_;
    std::unique_ptr<Layout> layout_;  // a copy: nobody else can change it
    std::int64_t dead_after_ns_, loop_dead_after_ns_;
    std::vector<Column> columns_;
    Chain chain_;
    Seams seams_;
    std::vector<State> states_;
    std::vector<double> follows_, bases_;
    Regime regimes_[kMaxGroups];
    std::uint32_t groups_ = 0;  // bit per group that this reader has
    bool ticked_ = false, stopped_ = false;
    std::int64_t last_ = 0;   // the tick before
    std::int64_t until_ = 0;  // what has been asked of relative channels is for the time before
    std::uint64_t newest_ = 0;
    std::int64_t newest_observed_at_ = 0, sent_observed_at_ = 0;
    Command command_{0, -1, Status::dry, -1};
    DriverFeedback feedback_;
};

}  // namespace dit4dit

#include "exact_end.h"

#include "reader_inl.h"
