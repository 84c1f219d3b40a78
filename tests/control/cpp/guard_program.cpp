// examples/cpp_controller/guard.h on commands that a stream never gives. One channel of each kind, bounds: a position -1 to 1 and
// 2 a second, an angle 2 a second, a velocity -0.5 to 0.5 and 4 a second, a relative one 2 a second, a binary one.
// The position begins at the argument, all else at 0. Lines of "ms position angle velocity relative binary" on stdin; for each
// the refused channel's name or "sent", and "moving" or "still"; last the share of a limit that was used.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include <dit4dit/action_stream.h>

#include "guard.h"

int main(int count, char** given) {
    using namespace dit4dit;
    static Layout layout{};
    std::snprintf(layout.robot, sizeof layout.robot, "guarded");
    layout.channels = 5;
    layout.groups = 1;
    layout.command_period_ns = 1'000'000;
    std::snprintf(layout.group[0].name, sizeof layout.group[0].name, "all");
    const char* names[] = {"position", "angle", "velocity", "relative", "binary"};
    for (int i = 0; i < 5; ++i) {
        std::snprintf(layout.channel[i].name, sizeof layout.channel[i].name, "%s", names[i]);
        layout.channel[i].kind = static_cast<Kind>(i);
    }
    for (const int i : {0, 1, 3}) layout.channel[i].limits.velocity = 2.0;
    layout.channel[0].limits.low = -1.0;
    layout.channel[0].limits.high = 1.0;
    layout.channel[2].limits.low = -0.5;
    layout.channel[2].limits.high = 0.5;
    layout.channel[2].limits.acceleration = 4.0;

    auto writer = Writer::in_process(layout);
    if (!writer) return std::fprintf(stderr, "%s\n", writer.error().c_str()), 1;
    auto reader = Reader::of(writer->memory(), Options{});
    if (!reader) return std::fprintf(stderr, "%s\n", reader.error().c_str()), 1;

    const double pose[5] = {count > 1 ? std::atof(given[1]) : 0.0};
    Guard guard(*reader, pose);
    double ms, command[5];
    while (std::scanf("%lf %lf %lf %lf %lf %lf", &ms, command, command + 1, command + 2, command + 3, command + 4) == 6) {
        const int wrong = guard.check(command, static_cast<std::int64_t>(ms * 1e6));
        std::printf("%s %s\n", wrong < 0 ? "sent" : guard.name(wrong), guard.moving() ? "moving" : "still");
    }
    std::printf("%.6f\n", guard.used());
    return 0;
}
