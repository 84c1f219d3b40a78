// What a layout must be, said in words: of one that a producer asks for, and of one that is found in a segment.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>

#include "layout.h"

namespace dit4dit {

inline const char* name_of(Kind kind) noexcept {
    constexpr const char* names[] = {"position", "angle", "velocity", "relative", "binary"};
    return kind <= Kind::binary ? names[static_cast<int>(kind)] : "unknown";
}

inline const char* name_of(Interpolation interpolation) noexcept {
    constexpr const char* names[] = {"hold", "linear", "cubic"};
    return interpolation <= Interpolation::cubic ? names[static_cast<int>(interpolation)] : "unknown";
}

inline const char* name_of(SeamKind kind) noexcept {
    constexpr const char* names[] = {"newest", "ensemble", "blend"};
    return kind <= SeamKind::blend ? names[static_cast<int>(kind)] : "unknown";
}

inline const char* name_of(Rule rule) noexcept {
    constexpr const char* names[] = {"hold", "decay", "finish"};
    return rule <= Rule::finish ? names[static_cast<int>(rule)] : "unknown";
}

inline const char* name_of(Status status) noexcept {
    constexpr const char* names[] = {"ok", "contended", "dry", "stale", "dead", "estop"};
    return status <= Status::estop ? names[static_cast<int>(status)] : "unknown";
}

namespace detail {

inline std::string number(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.9g", value);
    return text;
}

inline std::string quoted(const std::string& text) { return "'" + text + "'"; }

// A name that ends inside its array and is not empty.
template <std::size_t N>
bool is_name(const char (&text)[N]) noexcept {
    return text[0] != 0 && std::memchr(text, 0, N) != nullptr;
}

inline std::string no_name(std::size_t size) { return " has no name of 1 to " + std::to_string(size - 1) + " bytes"; }

template <std::size_t N>
std::string text_of(const char (&text)[N]) {
    const void* end = std::memchr(text, 0, N);
    return std::string(text, end ? static_cast<std::size_t>(static_cast<const char*>(end) - text) : N);
}

inline std::string why_bad_limits(Kind kind, const Limits& limits) {
    constexpr double inf = std::numeric_limits<double>::infinity();
    // written so that a NaN fails
    if (!(limits.low < limits.high))
        return "low " + number(limits.low) + " and high " + number(limits.high) + ": low must be below high";
    if (!(limits.velocity > 0) || !(limits.acceleration > 0) || !(limits.jerk > 0))
        return "velocity " + number(limits.velocity) + ", acceleration " + number(limits.acceleration) + ", jerk " +
               number(limits.jerk) + ": each must be above 0";
    if (kind == Kind::binary && limits.limited()) return "limits of a binary channel: it has none";
    if ((kind == Kind::angle || kind == Kind::relative) && (limits.low != -inf || limits.high != inf))
        return std::string("low and high of a channel of kind ") + name_of(kind) + " are unsupported: " +
               (kind == Kind::angle ? "it wraps at pi; use kind position for a joint with end stops"
                                    : "only its changes are known");
    if (kind == Kind::velocity && !(limits.low <= 0 && limits.high >= 0))
        return "low " + number(limits.low) + " and high " + number(limits.high) +
               " of a velocity must include 0, at which it stops";
    return "";
}

inline std::string why_bad_seam(const Seam& seam) {
    if (seam.kind > SeamKind::blend) return "seam: unknown kind " + std::to_string(static_cast<int>(seam.kind));
    if (seam.kind == SeamKind::ensemble && (seam.history < 1 || seam.history > kMostHistory))
        return "seam: history is " + std::to_string(seam.history) + ", wanted 1 to " + std::to_string(kMostHistory);
    if (seam.kind == SeamKind::ensemble && !std::isfinite(seam.alpha))
        return "seam: alpha is " + number(seam.alpha) + ", wanted a finite number";
    if (seam.kind == SeamKind::blend && !(seam.rows > 0 && seam.rows <= kMaxRows))
        return "seam: rows is " + number(seam.rows) + ", wanted above 0 and at most " + std::to_string(kMaxRows);
    return "";
}

inline std::string why_bad_group(const Layout& layout, std::uint32_t index) {
    const Group& group = layout.group[index];
    if (!is_name(group.name)) return "group " + std::to_string(index) + no_name(sizeof group.name);
    const std::string where = "group " + quoted(group.name) + ": ";
    for (std::uint32_t i = 0; i < index; ++i)
        if (std::strcmp(layout.group[i].name, group.name) == 0) return where + "the name is there twice";
    if (group.max_age_ns < 0 || group.decay_ns < 0)
        return where + "max_age_ns is " + std::to_string(group.max_age_ns) + " and decay_ns " +
               std::to_string(group.decay_ns) + ", wanted 0 or above";
    if (group.on_dry > Rule::decay)
        return where + "on_dry is " + name_of(group.on_dry) + ", wanted hold or decay";
    if (group.on_stale > Rule::finish || group.on_dead > Rule::finish)
        return where + "unknown rule for stale or dead, wanted hold, decay or finish";
    for (std::uint32_t i = 0; i < layout.channels; ++i)
        if (layout.channel[i].group == index) return "";
    return where + "it has no channel";
}

inline std::string why_bad_channel(const Layout& layout, std::uint32_t index) {
    const Channel& channel = layout.channel[index];
    if (!is_name(channel.name)) return "channel " + std::to_string(index) + no_name(sizeof channel.name);
    const std::string where = "channel " + quoted(channel.name) + ": ";
    for (std::uint32_t i = 0; i < index; ++i)
        if (std::strcmp(layout.channel[i].name, channel.name) == 0) return where + "the name is there twice";
    if (channel.kind > Kind::binary) return where + "unknown kind " + std::to_string(static_cast<int>(channel.kind));
    if (channel.group >= layout.groups)
        return where + "group is " + std::to_string(channel.group) + ", wanted 0 to " + std::to_string(layout.groups - 1);
    const std::string why = why_bad_limits(channel.kind, channel.limits);
    return why.empty() ? why : where + why;
}

}  // namespace detail

// One line on the first thing that is wrong with it; empty: it is good.
inline std::string why_bad(const Layout& layout) {
    using std::to_string;
    constexpr std::int64_t shortest = 50'000, longest = 1'000'000'000;
    if (!detail::is_name(layout.robot)) return "robot" + detail::no_name(sizeof layout.robot);
    if (layout.channels < 1 || layout.channels > kMaxChannels)
        return to_string(layout.channels) + " channels, wanted 1 to " + to_string(kMaxChannels);
    if (layout.groups < 1 || layout.groups > kMaxGroups)
        return to_string(layout.groups) + " groups, wanted 1 to " + to_string(kMaxGroups);
    if (layout.command_period_ns < shortest || layout.command_period_ns > longest)
        return "command_period_ns is " + to_string(layout.command_period_ns) + ", wanted " + to_string(shortest) + " to " +
               to_string(longest);
    if (layout.interpolation > Interpolation::cubic)
        return "unknown interpolation " + to_string(static_cast<int>(layout.interpolation));
    std::string why = detail::why_bad_seam(layout.seam);
    for (std::uint32_t i = 0; i < layout.channels && why.empty(); ++i) why = detail::why_bad_channel(layout, i);
    for (std::uint32_t i = 0; i < layout.groups && why.empty(); ++i) why = detail::why_bad_group(layout, i);
    return why;
}

namespace detail {

// The first of several fields that differs.
class FirstDifference {
  public:
    void at(std::string place) { place_ = std::move(place); }
    void compare(const char* field, const std::string& have, const std::string& wanted) {
        if (text.empty() && have != wanted) text = place_ + field + " is " + quoted(have) + ", not " + quoted(wanted);
    }
    void compare(const char* field, double have, double wanted) {
        if (text.empty() && have != wanted) text = place_ + field + " is " + number(have) + ", not " + number(wanted);
    }
    void compare(const char* field, std::int64_t have, std::int64_t wanted) {
        if (text.empty() && have != wanted)
            text = place_ + field + " is " + std::to_string(have) + ", not " + std::to_string(wanted);
    }

    std::string text;

  private:
    std::string place_;
};

inline void compare_channel(const Layout& have, const Layout& wanted, std::uint32_t i, FirstDifference& first) {
    const Channel &a = have.channel[i], &b = wanted.channel[i];
    first.at("channel " + std::to_string(i) + ": ");
    first.compare("name", text_of(a.name), text_of(b.name));
    first.at("channel " + quoted(text_of(b.name)) + ": ");
    first.compare("kind", name_of(a.kind), name_of(b.kind));
    first.compare("group", static_cast<std::int64_t>(a.group), static_cast<std::int64_t>(b.group));
    first.compare("low", a.limits.low, b.limits.low);
    first.compare("high", a.limits.high, b.limits.high);
    first.compare("velocity", a.limits.velocity, b.limits.velocity);
    first.compare("acceleration", a.limits.acceleration, b.limits.acceleration);
    first.compare("jerk", a.limits.jerk, b.limits.jerk);
}

inline void compare_group(const Group& a, const Group& b, std::uint32_t i, FirstDifference& first) {
    first.at("group " + std::to_string(i) + ": ");
    first.compare("name", text_of(a.name), text_of(b.name));
    first.at("group " + quoted(text_of(b.name)) + ": ");
    first.compare("max_age_ns", a.max_age_ns, b.max_age_ns);
    first.compare("decay_ns", a.decay_ns, b.decay_ns);
    first.compare("on_dry", name_of(a.on_dry), name_of(b.on_dry));
    first.compare("on_stale", name_of(a.on_stale), name_of(b.on_stale));
    first.compare("on_dead", name_of(a.on_dead), name_of(b.on_dead));
}

}  // namespace detail

// The first thing in which two good layouts differ, "channel 'base.x': kind is 'position', not 'velocity'"; empty: nothing.
// What a seam has for other kinds than its own does not count.
inline std::string difference(const Layout& have, const Layout& wanted) {
    detail::FirstDifference first;
    first.compare("robot", detail::text_of(have.robot), detail::text_of(wanted.robot));
    first.compare("number of channels", std::int64_t{have.channels}, std::int64_t{wanted.channels});
    first.compare("number of groups", std::int64_t{have.groups}, std::int64_t{wanted.groups});
    first.compare("command_period_ns", have.command_period_ns, wanted.command_period_ns);
    first.compare("interpolation", name_of(have.interpolation), name_of(wanted.interpolation));
    first.compare("seam", name_of(have.seam.kind), name_of(wanted.seam.kind));
    if (wanted.seam.kind == SeamKind::ensemble) {
        first.compare("seam's history", std::int64_t{have.seam.history}, std::int64_t{wanted.seam.history});
        first.compare("seam's alpha", have.seam.alpha, wanted.seam.alpha);
    }
    if (wanted.seam.kind == SeamKind::blend) first.compare("seam's rows", have.seam.rows, wanted.seam.rows);
    for (std::uint32_t i = 0; i < wanted.channels && first.text.empty(); ++i)
        detail::compare_channel(have, wanted, i, first);
    for (std::uint32_t i = 0; i < wanted.groups && first.text.empty(); ++i)
        detail::compare_group(have.group[i], wanted.group[i], i, first);
    return first.text;
}

}  // namespace dit4dit
