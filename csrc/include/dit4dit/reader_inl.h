// Reader's functions.
#pragma once

#include "reader.h"

#include "exact_begin.h"

namespace dit4dit {

// -- opening ---------------------------------------------------------------------------------------

inline Result<Reader> Reader::open(const Options& options) {
    if (!options.name) return Error{"Reader::open: no name, wanted one such as \"/dit4dit.g1\""};
    Result<std::shared_ptr<Memory>> memory = Memory::open(options.name, Access::use);
    if (!memory) return Error{memory.error()};
    return of(*memory, options);
}

inline Result<Reader> Reader::of(std::shared_ptr<Memory> memory, const Options& options) {
    const Layout& layout = memory->layout();
    const std::string where = memory->name().empty() ? "action stream: " : memory->name() + ": ";
    if (options.dead_after_ns <= 0 || options.loop_dead_after_ns < 0)
        return Error{where + "dead_after_ns is " + std::to_string(options.dead_after_ns) + " and loop_dead_after_ns " +
                     std::to_string(options.loop_dead_after_ns) + ", wanted above 0, and 0 (any time) or above"};
    if (options.expected) {
        const std::string differs = difference(layout, *options.expected);
        if (!differs.empty()) return Error{where + "the producer's layout is not the one expected: " + differs};
    }
    if (columns_of(layout, options.group).empty()) {
        std::string known;
        for (std::uint32_t g = 0; g < layout.groups; ++g) known += (g ? ", " : "") + std::string(layout.group[g].name);
        return Error{where + "no group '" + options.group + "'; there are: " + known};
    }
    if (options.driver && !memory->lock(Role::driver))
        return Error{where + "another reader is the driver; close it, or open this one without driver"};
    return Reader(std::move(memory), options);
}

inline Reader::Reader(std::shared_ptr<Memory> memory, const Options& options)
    : memory_(std::move(memory)),
      driver_(options.driver ? memory_.get() : nullptr, Unlock{memory_}),
      layout_(std::make_unique<Layout>(memory_->layout())),
      dead_after_ns_(options.dead_after_ns),
      loop_dead_after_ns_(options.loop_dead_after_ns),
      columns_(columns_of(*layout_, options.group)),
      chain_(relative_of(columns_), Seams::depth(layout_->seam)),
      seams_(*layout_, columns_),
      follows_(columns_.size()),
      bases_(columns_.size()) {
    for (Regime& regime : regimes_) regime.base.values = bases_.data();
    for (const Column& column : columns_) {
        groups_ |= 1u << column.group;
        const Limits limits = limits_of(layout_->channel[column.column]);
        const bool moves = column.kind == Kind::velocity || column.kind == Kind::relative;
        State state{ChannelLimiter(limits), limits.limited(), moves, moves ? 0 : kUnknown, 0, 0, moves ? 0 : kUnknown,
                    limits.velocity * kMadeUpFor};
        if (moves) state.limiter.reset(0);  // until something is asked for it stands
        states_.push_back(state);
    }
    feedback_.driver = static_cast<std::uint64_t>(getpid());
    for (double& value : feedback_.values) value = kUnknown;
}

inline std::vector<Column> Reader::columns_of(const Layout& layout, const char* group) {
    std::vector<Column> columns;
    int relative = 0;
    for (std::uint32_t i = 0; i < layout.channels; ++i) {
        const Channel& channel = layout.channel[i];
        if (group && std::string(group) != layout.group[channel.group].name) continue;
        const int path = channel.kind == Kind::relative ? relative++ : -1;
        columns.push_back({static_cast<int>(i), static_cast<int>(channel.group), path, channel.kind});
    }
    return columns;
}

inline std::vector<int> Reader::relative_of(const std::vector<Column>& columns) {
    std::vector<int> relative;
    for (const Column& column : columns)
        if (column.path >= 0) relative.push_back(column.column);
    return relative;
}

// A limiter bounds a position. A velocity takes its place, an acceleration the velocity's, a jerk the acceleration's.
inline Limits Reader::limits_of(const Channel& channel) noexcept {
    const Limits& given = channel.limits;
    Limits limits;
    if (channel.kind == Kind::binary) return limits;
    if (channel.kind != Kind::velocity) return given;
    limits.low = given.low > -given.velocity ? given.low : -given.velocity;
    limits.high = given.high < given.velocity ? given.high : given.velocity;
    limits.velocity = given.acceleration;
    limits.acceleration = given.jerk;
    return limits;
}

inline void Reader::start_at(const double* values) noexcept {
    for (std::size_t i = 0; i < columns_.size(); ++i) {
        State& state = states_[i];
        const Kind kind = columns_[i].kind;
        state.path = 0;
        if (kind == Kind::relative) {
            state.limiter.reset(0);
            state.asked = state.sent = 0;
        } else if (std::isfinite(values[i])) {
            state.asked = state.sent = kind == Kind::binary ? (values[i] > 0.5 ? 1 : 0) : values[i];
            state.limiter.reset(values[i]);
            state.started = true;
        }
    }
    for (Regime& regime : regimes_) regime.mode = Mode::none;
    ticked_ = stopped_ = false;
    last_ = 0;
}

// -- reading ---------------------------------------------------------------------------------------

inline Command Reader::read(std::int64_t now_ns, double* out) noexcept {
    const std::int64_t now = now_ns < last_ ? last_ : now_ns > kLatest ? kLatest : now_ns;
    const bool whole = chain_.take(memory_->segment(), ticked_ ? until_ : now);
    const Situation seen = look(now, whole);
    const bool again = ticked_ && now_ns == last_, ticks = !ticked_ || now - last_ >= kShortestTick;
    if (ticks) tick(now, seen);
    for (std::size_t i = 0; i < columns_.size(); ++i) {
        const double sent = columns_[i].path < 0 || ticks || again ? states_[i].sent : 0;
        out[i] = columns_[i].kind == Kind::angle ? wrap(sent) : sent;
    }
    command_.status = seen.status;
    command_.age_ns = command_.chunk ? now - sent_observed_at_ : -1;
    if (ticks && driver_) write(now, out);
    return command_;
}

inline Reader::Situation Reader::look(std::int64_t now, bool whole) noexcept {
    const Segment& segment = memory_->segment();
    const bool dead = producer_dead(segment, now, dead_after_ns_, loop_dead_after_ns_);
    Situation seen{stopped_ || estop_at(segment) != 0, dead, true, 0, Status::ok};
    // the robot stops elsewhere than they planned
    if (seen.estop) chain_.forget_before(now);
    if (chain_.begin(now) > 0) {
        const HeldChunk& newest = chain_[0].chunk;
        newest_ = newest.id, newest_observed_at_ = newest.observed_at;
        seen.dry = moment(newest, now).over;
    }
    for (std::uint32_t g = 0; g < layout_->groups; ++g) {
        const std::int64_t most = layout_->group[g].max_age_ns;
        if (groups_ >> g & 1 && newest_ && most > 0 && now - newest_observed_at_ > most) seen.stale |= 1u << g;
    }
    if (!whole) seen.status = Status::contended;
    if (seen.dry) seen.status = Status::dry;
    if (seen.stale) seen.status = Status::stale;
    if (seen.dead) seen.status = Status::dead;
    if (seen.estop) seen.status = Status::estop;
    return seen;
}

inline void Reader::tick(std::int64_t now, const Situation& seen) noexcept {
    const std::int64_t period = layout_->command_period_ns, end = now + period;
    const double dt = seconds_since(now);
    bool followed[kMaxGroups], any = false;
    for (std::uint32_t g = 0; g < layout_->groups; ++g) {
        if (!(groups_ >> g & 1)) continue;
        followed[g] = regimes_[g].mode == Mode::follow;
        enter(g, now, seen);
        any = any || regimes_[g].mode == Mode::follow;
    }
    Span span{ticked_ ? until_ : now, end};
    const bool some = chain_.begun() > 0;
    if (some) {
        const std::int64_t ends_at = chain_[0].ends_at;
        if (span.to > ends_at) span.to = ends_at > span.from ? ends_at : span.from;
        seams_.begin(chain_, now, span);
    }
    for (std::uint32_t g = 0; g < layout_->groups; ++g) {
        if (!(groups_ >> g & 1)) continue;
        Regime& regime = regimes_[g];
        const int group = static_cast<int>(g);
        const bool follows = regime.mode == Mode::follow, ends = some && followed[g] && !follows && !regime.brakes;
        double seconds = static_cast<double>(period) * 1e-9;
        if (follows) seconds = seams_.follow(group, regime.base, followed[g], follows_.data()).seconds();
        if (ends) seams_.finish(group, follows_.data());
        for (std::size_t i = 0; i < columns_.size(); ++i) {
            if (columns_[i].group != group) continue;
            if (!follows && !ends) follows_[i] = 0;
            move(i, regime, now, seconds, dt);
        }
    }
    command_.chunk = newest_, command_.row = any ? moment(chain_[0].chunk, now).row : -1;
    sent_observed_at_ = newest_observed_at_;
    until_ = any ? span.to : end, last_ = now, ticked_ = true;
    seams_.prune(chain_, now);
}

// For the limiters: since the tick before.
inline double Reader::seconds_since(std::int64_t now) noexcept {
    const std::int64_t period = layout_->command_period_ns;
    const std::int64_t passed = ticked_ ? now - last_ : period, longest = 2 * period > kLongestTick ? 2 * period : kLongestTick;
    if (passed > kAtRest && passed > 4 * period)
        for (State& state : states_)
            if (state.started) state.limiter.reset(state.limiter.sent());
    return static_cast<double>(passed < longest ? passed : longest) * 1e-9;
}

inline void Reader::enter(std::uint32_t group, std::int64_t now, const Situation& seen) noexcept {
    const Group& rules = layout_->group[group];
    Regime& regime = regimes_[group];
    Mode mode = Mode::follow;
    regime.brakes = true;
    if (seen.estop) {
        mode = Mode::hold;
    } else if (seen.dead && rules.on_dead != Rule::finish) {
        mode = mode_of(rules.on_dead);
    } else if (seen.stale >> group & 1 && rules.on_stale != Rule::finish) {
        mode = mode_of(rules.on_stale);
    } else {
        regime.brakes = false;
        if (seen.dry) mode = mode_of(rules.on_dry);
    }
    if (mode != regime.mode && mode != Mode::hold) {
        regime.since = now;
        if (mode == Mode::follow) regime.base.at = now;
        for (std::size_t i = 0; i < columns_.size(); ++i) {
            if (columns_[i].group != static_cast<int>(group)) continue;
            if (mode == Mode::decay) states_[i].fades_from = states_[i].asked;
            // the first displacements are not made smaller
            if (mode == Mode::follow) bases_[i] = columns_[i].path < 0 ? states_[i].asked : kUnknown;
        }
    }
    regime.mode = mode;
}

// follows_[i]: what the chunks say. seconds: that a relative channel's displacement is for.
inline void Reader::move(std::size_t i, const Regime& regime, std::int64_t now, double seconds, double dt) noexcept {
    State& state = states_[i];
    const Kind kind = columns_[i].kind;
    const bool moves = kind == Kind::velocity || kind == Kind::relative, fades = moves && regime.mode == Mode::decay;
    const bool brakes = regime.brakes && !fades && kind != Kind::velocity;
    double wanted = follows_[i];
    if (regime.mode == Mode::follow) {
        if (kind != Kind::relative) state.asked = wanted;
        if (kind == Kind::relative && seconds > 0) state.asked = wanted / seconds;
    } else if (moves) {
        const std::int64_t length = layout_->group[columns_[i].group].decay_ns, passed = now - regime.since;
        const double left = length > passed ? 1 - static_cast<double>(passed) / static_cast<double>(length) : 0;
        state.asked = fades ? state.fades_from * left : 0;
        wanted += state.asked * seconds;
    }
    if (kind == Kind::relative)
        state.sent = displaced(state, brakes, wanted, dt);
    else
        state.sent = state.limited ? limited(state, kind, brakes, dt) : state.asked;
}

inline double Reader::displaced(State& state, bool brakes, double wanted, double dt) noexcept {
    if (!state.limited) return wanted;
    const double before = state.limiter.sent();
    state.path += wanted;
    if (state.path - before > state.farthest) state.path = before + state.farthest;
    if (state.path - before < -state.farthest) state.path = before - state.farthest;
    if (!brakes) return state.limiter.tick(state.path, dt) - before;
    state.path = state.limiter.brake(dt);
    return state.path - before;
}

inline double Reader::limited(State& state, Kind kind, bool brakes, double dt) noexcept {
    if (!state.started && std::isnan(state.asked)) return state.asked;
    double target = state.asked;
    if (state.started && kind == Kind::angle) {  // the limiter's angle does not wrap
        const double sent = state.limiter.sent();
        target = sent + wrap(target - sent);
    }
    state.started = true;
    if (!brakes) return state.limiter.tick(target, dt);
    return state.asked = state.limiter.brake(dt);
}

inline void Reader::write(std::int64_t now, const double* out) noexcept {
    if (!memory_->holds(Role::driver)) return;  // a forked child
    ++feedback_.tick;
    feedback_.at_ns = now;
    feedback_.chunk = command_.chunk, feedback_.row = command_.row, feedback_.status = command_.status;
    for (std::size_t i = 0; i < columns_.size(); ++i) feedback_.values[columns_[i].column] = out[i];
    write_feedback(memory_->writable(), feedback_);
}

}  // namespace dit4dit

#include "exact_end.h"
