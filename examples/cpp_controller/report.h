// What the control loop leaves behind: counts, how late it woke up, how old the observations were; as a line and as JSON.
#pragma once

#include <array>
#include <cerrno>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

#include <dit4dit/action_stream.h>

#include "realtime.h"

constexpr std::size_t kStatuses = static_cast<std::size_t>(dit4dit::Status::estop) + 1;

enum Exit { kOrder = 0, kNoStream = 1, kMisuse = 2, kRefused = 3, kDead = 4 };

struct Report {
    Exit code = kOrder;
    std::uint64_t ticks = 0, missed = 0, chunks = 0;
    std::array<std::uint64_t, kStatuses> of_status{};
    Samples late_ns{60'000}, age_ns{60'000};  // of the last minute
    std::string refused;                      // channel
    double limit_used = 0.0;
    bool fifo = false, locked = false, at_rest = false;
};

inline void print(const Report& report) {
    std::printf("controller: %" PRIu64 " ticks, %" PRIu64 " missed, ", report.ticks, report.missed);
    std::printf("%" PRIu64 " chunks;", report.chunks);
    for (std::size_t i = 0; i < kStatuses; ++i) {
        const char* name = dit4dit::name_of(static_cast<dit4dit::Status>(i));
        if (report.of_status[i] != 0) std::printf(" %s %" PRIu64, name, report.of_status[i]);
    }
    const Quantiles late = report.late_ns.quantiles(), age = report.age_ns.quantiles();
    const auto ms = [](std::int64_t ns) { return static_cast<double>(ns) * 1e-6; };
    std::printf("; woke up late by %.3f ms (p50), %.3f ms (p99.9); ", ms(late.p50), ms(late.p999));
    std::printf("age %.0f ms (p50), %.0f ms (max)%s\n", ms(age.p50), ms(age.max), report.at_rest ? "; at rest" : "");
}

// False, and a message, where it cannot be written.
inline bool write_json(const std::string& path, const Report& report, const dit4dit::Reader& reader) {
    std::FILE* file = std::fopen(path.c_str(), "w");
    if (file == nullptr) {
        std::fprintf(stderr, "controller: --json %s: %s\n", path.c_str(), std::strerror(errno));
        return false;
    }
    const auto said = [](bool value) { return value ? "true" : "false"; };
    const auto quantiles = [&](const char* name, const Quantiles& q) {
        std::fprintf(file, " \"%s\": {\"p50\": %" PRId64 ", \"p99\": %" PRId64, name, q.p50, q.p99);
        std::fprintf(file, ", \"p99.9\": %" PRId64 ", \"max\": %" PRId64 "},\n", q.p999, q.max);
    };
    std::fprintf(file, "{\"channels\": %zu, \"period_ns\": %" PRId64 ",\n", reader.dims(), reader.command_period_ns());
    std::fprintf(file, " \"exit_code\": %d, \"at_rest\": %s,\n", report.code, said(report.at_rest));
    std::fprintf(file, " \"fifo\": %s, \"memory_locked\": %s,\n", said(report.fifo), said(report.locked));
    std::fprintf(file, " \"ticks\": %" PRIu64 ", \"missed\": %" PRIu64 ",\n", report.ticks, report.missed);
    std::fprintf(file, " \"chunks\": %" PRIu64 ", \"limit_used\": %.9f,\n", report.chunks, report.limit_used);
    quantiles("wake_up_late_ns", report.late_ns.quantiles());
    quantiles("age_ns", report.age_ns.quantiles());
    for (std::size_t i = 0; i < kStatuses; ++i) {
        const char* name = dit4dit::name_of(static_cast<dit4dit::Status>(i));
        std::fprintf(file, "%s\"%s\": %" PRIu64, i == 0 ? " \"status\": {" : ", ", name, report.of_status[i]);
    }
    std::fprintf(file, "}}\n");
    return std::fclose(file) == 0;
}
