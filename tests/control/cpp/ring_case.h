// A stream for tests: every number in chunk n follows from n, so that a mix of two chunks, or one under another's id, is seen.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include <dit4dit/ring.h>

namespace ring_case {

using namespace dit4dit;

inline Layout layout(int channels) {
    Layout made{};
    std::strcpy(made.robot, "test");
    made.channels = static_cast<std::uint32_t>(channels);
    made.groups = 1;
    made.command_period_ns = 2'000'000;
    made.interpolation = Interpolation::cubic;
    made.seam.kind = SeamKind::newest;
    for (int i = 0; i < channels; ++i) std::snprintf(made.channel[i].name, sizeof made.channel[i].name, "joint.%d", i);
    std::strcpy(made.group[0].name, "arms");
    return made;
}

// Below 2^24: every value is a float of its own.
inline float base(std::uint64_t id) { return static_cast<float>((id * 4099) & 0x7fffff); }

inline std::int64_t observed(std::uint64_t id) { return static_cast<std::int64_t>(id) * 10 + 1; }

// What chunk `id` holds, into values [kMaxRows * channels].
inline Chunk chunk(std::uint64_t id, int rows, int channels, float* values) {
    for (int i = 0; i < rows; ++i)
        for (int k = 0; k < channels; ++k) values[i * channels + k] = base(id) + static_cast<float>(i * kMaxChannels + k);
    return {observed(id), observed(id) + 1, observed(id) + 2, 1.0 + static_cast<double>(id % 1000), rows, channels, values};
}

inline std::int64_t published(std::uint64_t id) { return observed(id) + 3; }

// Whether what was copied as rows [first, first + count) is all of chunk held.id.
inline bool whole(const HeldChunk& held, int rows, int channels, int first, int count) {
    const std::uint64_t id = held.id;
    if (held.rows != rows || held.observed_at != observed(id) || held.computed_at != observed(id) + 1 ||
        held.starts_at != observed(id) + 2 || held.published_at != published(id) ||
        held.period_ns != 1e9 / (1.0 + static_cast<double>(id % 1000)))
        return false;
    int wrong = 0;
    for (int i = first; i < first + count && i < rows; ++i)
        for (int k = 0; k < channels; ++k)
            wrong += held.row(i)[k] != base(id) + static_cast<float>(i * kMaxChannels + k);
    return wrong == 0;
}

// The number after `--name` among the arguments, or the default.
inline double argument(int count, char** arguments, const char* name, double otherwise) {
    for (int i = 1; i + 1 < count; ++i)
        if (std::strcmp(arguments[i], name) == 0) return std::atof(arguments[i + 1]);
    return otherwise;
}

inline std::string word(int count, char** arguments, const char* name, const char* otherwise) {
    for (int i = 1; i + 1 < count; ++i)
        if (std::strcmp(arguments[i], name) == 0) return arguments[i + 1];
    return otherwise;
}

}  // namespace ring_case
