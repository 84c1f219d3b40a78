// Drives ChannelLimiter for tests/control/test_limiter*.py.
//
//   limiter_program run IN OUT          IN: float64 lanes, ticks, limits [lanes][5], pose [lanes] (NaN: no reset),
//                                       targets [ticks][lanes], dts [ticks][lanes]; OUT: what was sent [ticks][lanes]
//   limiter_program stress TICKS SEED   hostile targets at random ticks; what came out is held against the bounds, as JSON
//   limiter_program time                nanoseconds a tick, as JSON
#include <dit4dit/limiter.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace {

using dit4dit::ChannelLimiter;
using dit4dit::Limits;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kShortest = 0.2e-3, kLongest = 20e-3;  // ticks, in seconds

int run(const char* from, const char* to) {
    std::FILE* in = std::fopen(from, "rb");
    if (in == nullptr) return 2;
    const auto doubles = [in](std::size_t n) {
        std::vector<double> x(n);
        if (std::fread(x.data(), sizeof(double), n, in) != n) std::exit(3);
        return x;
    };
    const std::vector<double> sizes = doubles(2);
    const std::size_t lanes = static_cast<std::size_t>(sizes[0]), ticks = static_cast<std::size_t>(sizes[1]);
    const std::vector<double> limits = doubles(lanes * 5), pose = doubles(lanes), targets = doubles(ticks * lanes),
                              dts = doubles(ticks * lanes);
    std::fclose(in);
    std::vector<double> sent(ticks * lanes);
    for (std::size_t n = 0; n < lanes; ++n) {
        const double* l = &limits[n * 5];
        ChannelLimiter channel(Limits{l[0], l[1], l[2], l[3], l[4]});
        channel.reset(pose[n]);
        for (std::size_t k = 0; k < ticks; ++k) sent[k * lanes + n] = channel.tick(targets[k * lanes + n], dts[k * lanes + n]);
    }
    std::FILE* out = std::fopen(to, "wb");
    if (out == nullptr) return 2;
    const bool written = std::fwrite(sent.data(), sizeof(double), sent.size(), out) == sent.size();
    return std::fclose(out) == 0 && written ? 0 : 4;
}

// Differences of what is sent, worked out apart from the limiter: from the values and times themselves.
class Differences {
public:
    explicit Differences(double pose) : x_{pose, pose, pose} {}
    void add(double x, double dt) {
        if (d_[0] == 0) d_[0] = d_[1] = dt;
        const double f01 = (x_[1] - x_[0]) / d_[0], f12 = (x_[2] - x_[1]) / d_[1], f23 = (x - x_[2]) / dt;
        const double f012 = (f12 - f01) / (d_[0] + d_[1]), f123 = (f23 - f12) / (d_[1] + dt);
        v = f23, a = 2 * f123, j = 6 * (f123 - f012) / (d_[0] + d_[1] + dt);
        x_[0] = x_[1], x_[1] = x_[2], x_[2] = x;
        d_[0] = d_[1], d_[1] = dt;
    }
    double v = 0, a = 0, j = 0;

private:
    double x_[3], d_[2] = {0, 0};
};

class Random {
public:
    explicit Random(unsigned seed) : engine_(seed) {}
    double operator()(double low, double high) { return std::uniform_real_distribution<double>(low, high)(engine_); }
    bool chance(double p) { return (*this)(0, 1) < p; }
    int below(int n) { return std::uniform_int_distribution<int>(0, n - 1)(engine_); }
    double decades(double low, double high) { return std::pow(10.0, (*this)(low, high)); }

private:
    std::mt19937_64 engine_;
};

constexpr int kKinds = 9, kLaws = 5;

// One channel's bounds, targets and ticks, all at random.
struct Case {
    Limits limits;
    double centre, range, pace, pose;
    int kind, law;
    double constant, step, walk, slope = 0, side = 1, frequency, amplitude, edge, time = 0;

    explicit Case(Random& random) {
        const double v = random.decades(-2, 2);
        double a = v * random.decades(-1.5, 4), j = a * random.decades(-1, 4);
        range = random.decades(-3, 1.5), centre = random(-1, 1);
        // what doubles can resolve: see limiter.h
        const double resolved = 4e3 * 2.3e-16 * (std::fabs(centre) + 2 * range) / (kShortest * kShortest);
        while (a < resolved) a *= 10;
        while (j < resolved / kShortest) j *= 10;
        limits.velocity = random.chance(0.05) ? kInfinity : v;
        limits.acceleration = random.chance(0.05) ? kInfinity : a;
        limits.jerk = random.chance(0.1) ? kInfinity : j;
        if (limits.velocity == kInfinity && limits.acceleration == kInfinity) limits.jerk = j;
        pace = v;
        const double narrow = random.chance(0.2) ? random.decades(-5, 0) : 1;
        if (random.chance(0.7)) limits.low = centre - narrow * range * random(0, 1);
        if (random.chance(0.7)) limits.high = centre + narrow * range * random(0, 1);
        pose = std::min(std::max(centre + range * random(-1, 1), limits.low), limits.high);
        if (random.chance(0.1)) pose = centre + range * random(-2, 2);  // maybe outside
        kind = random.below(kKinds), law = random.below(kLaws);
        constant = random(kShortest, kLongest), step = walk = pose;
        frequency = random.decades(-1, 2), amplitude = range * random(0.1, 2), edge = random(0.2, 1.5);
    }

    double tick(int k, Random& random) const {
        if (law == 0) return random(kShortest, kLongest);
        if (law == 1) return std::exp(random(std::log(kShortest), std::log(kLongest)));
        if (law == 2) return k % 2 ? kShortest : kLongest;
        if (law == 3) return constant;
        return k / 37 % 2 ? kShortest : constant;
    }

    double target(int k, double x, const Differences& past, double before, double dt, Random& random) {
        time += dt;
        const double anywhere = centre + 1.5 * range * random(-1, 1);
        switch (kind) {
            case 0: return anywhere;  // white noise
            case 1: return step = random.chance(0.03) ? anywhere : step;
            case 2:  // ramps with corners
                if (random.chance(0.02)) slope = random(-2, 2) * pace;
                if (std::fabs(walk - centre) > 2 * range) slope = walk > centre ? -std::fabs(slope) : std::fabs(slope);
                return walk += slope * dt;
            case 3: return centre + amplitude * std::sin(frequency * time);
            case 4: return walk += 2 * pace * random(-1, 1) * dt;
            case 5: return centre + range * (side = random.chance(0.5) ? -side : side);
            case 6:  // a bit of everything, NaN, infinities and far away
                switch (k / 50 % 4) {
                    case 0: return centre + amplitude * std::sin(frequency * time);
                    case 1: return anywhere;
                    case 2: return random.chance(0.1) ? kNaN : random.chance(0.05) ? kInfinity : centre;
                    default: return 1e3 * random(-1, 1);
                }
            default: return random.chance(0.005) ? anywhere : at_the_edge(x, past, before, dt, random);
        }
    }

    // A target whose differences are about the bounds: the ones that are sent as they are, one after the other.
    double at_the_edge(double x, const Differences& past, double before, double dt, Random& random) const {
        const double a = std::min(limits.acceleration, 1e6 * std::min(limits.velocity, limits.jerk));
        const double j = std::min(limits.jerk, 2 * a / dt), v = std::min(limits.velocity, 1e6 * a);
        const double share = kind == 7 ? random(-1, 1) : random.chance(0.5) ? -1 : 1;
        double wanted = past.a + share * edge * j * (2 * before + dt) / 3;
        wanted = std::min(std::max(wanted, -edge * a), edge * a);
        const double speed = past.v + wanted * (dt + before) / 2;
        return x + std::min(std::max(speed, -edge * v), edge * v) * dt;
    }
};

struct Worst {
    double velocity = 0, acceleration = 0, jerk = 0, outside = 0;
    long violations = 0;

    void take(double y, double before, const Differences& sent, const Case& c) {
        const Limits& l = c.limits;
        const double v = std::fabs(sent.v) / l.velocity, a = std::fabs(sent.a) / l.acceleration, j = std::fabs(sent.j) / l.jerk;
        velocity = std::max(velocity, v), acceleration = std::max(acceleration, a), jerk = std::max(jerk, j);
        // out of the limits by no more than before
        const double out = std::max(std::max(l.low - y, y - l.high), 0.0);
        const double farther = out - std::max(std::max(l.low - before, before - l.high), 0.0);
        outside = std::max(outside, farther);
        // not NaN either
        const bool kept = v <= 1 + 1e-9 && a <= 1 + 1e-9 && j <= 1 + 1e-9 && farther <= 0;
        if (!kept && ++violations <= 3)
            std::fprintf(stderr, "kind %d law %d: v %.12g a %.12g j %.12g of the bounds, %g farther out\n", c.kind, c.law, v, a, j,
                         farther);
    }
};

int stress(long ticks, unsigned seed) {
    Random random(seed);
    Worst worst;
    long done = 0, exact = 0;
    while (done < ticks) {
        Case c(random);
        ChannelLimiter channel(c.limits);
        channel.reset(c.pose);
        Differences sent(c.pose);
        double x = c.pose, before = 0;
        bool braking = false;
        for (int k = 0; k < 400; ++k, ++done) {
            const double dt = c.tick(k, random), target = c.target(k, x, sent, k ? before : dt, dt, random);
            if (random.chance(0.004)) braking = !braking && random.chance(0.5);
            const double y = braking ? channel.brake(dt) : channel.tick(target, dt);
            if (random.chance(0.01) && channel.tick(target, random(-1, 49e-6)) != y) return 5;  // ignored
            sent.add(y, dt);
            worst.take(y, x, sent, c);
            exact += y == target;
            x = y, before = dt;
        }
    }
    std::printf("{\"ticks\": %ld, \"violations\": %ld, \"velocity\": %.12g, \"acceleration\": %.12g, \"jerk\": %.12g, ", done,
                worst.violations, worst.velocity, worst.acceleration, worst.jerk);
    std::printf("\"farther_out\": %.12g, \"exact\": %.6g}\n", worst.outside, static_cast<double>(exact) / static_cast<double>(done));
    return 0;
}

// 23 channels at 500 Hz; the median and the 99.9th percentile of one channel's tick.
int time_it() {
    using Clock = std::chrono::steady_clock;
    const char* names[] = {"followed", "at_rest", "noise", "steps", "too_fast"};
    for (int kind = 0; kind < 5; ++kind) {
        std::vector<ChannelLimiter> channels(23, ChannelLimiter(Limits{-2, 2, 3, 20, 200}));
        for (ChannelLimiter& channel : channels) channel.reset(0);
        Random random(1);
        std::vector<double> took;
        double step = 0, sum = 0;
        for (int k = 0; k < 20000; ++k) {
            const double t = k * 2e-3;
            if (kind == 2 || (kind == 3 && k % 300 == 0)) step = 1.5 * random(-1, 1);
            const double target = kind == 0 ? 0.5 - 0.5 * std::cos(3 * t) : kind == 4 ? 1.5 * std::sin(12 * t) : step;
            const auto begin = Clock::now();
            for (ChannelLimiter& channel : channels) sum += channel.tick(target, 2e-3);
            took.push_back(std::chrono::duration<double, std::nano>(Clock::now() - begin).count() / 23);
        }
        std::sort(took.begin(), took.end());
        std::printf("%s\"%s\": {\"median_ns\": %.1f, \"p999_ns\": %.1f}", kind ? ", " : "{", names[kind], took[10000], took[19980]);
        if (!(sum < kInfinity)) return 6;
    }
    std::printf("}\n");
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc == 4 && std::strcmp(argv[1], "run") == 0) return run(argv[2], argv[3]);
    if (argc == 4 && std::strcmp(argv[1], "stress") == 0)
        return stress(std::atol(argv[2]), static_cast<unsigned>(std::atoi(argv[3])));
    if (argc == 2 && std::strcmp(argv[1], "time") == 0) return time_it();
    std::fprintf(stderr, "limiter_program run IN OUT | stress TICKS SEED | time\n");
    return 1;
}
