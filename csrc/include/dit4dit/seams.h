// How one chunk follows another: what the chunks of a chain say together for a moment.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "chain.h"
#include "interpolation.h"
#include "layout.h"

#include "exact_begin.h"

namespace dit4dit {

// A channel of a reader. column: its index in the layout. path: its number among the relative ones; -1: it is not.
struct Column {
    int column, group, path;
    Kind kind;
};

// e^x, x cut to [-100, 100]: a series for x / 256, squared eight times. The library's own differs from machine to machine.
inline double exponential(double x) noexcept {
    const double y = (x < -100 ? -100 : x > 100 ? 100 : x) / 256;
    double sum = 1;
    for (int k = 8; k > 0; --k) sum = 1 + y / k * sum;
    for (int i = 0; i < 8; ++i) sum = sum * sum;
    return sum;
}

// From 0 at `begins_at` to 1 after `length` ns, level at both ends.
inline double ramp(std::int64_t now, std::int64_t begins_at, double length) noexcept {
    const double s = static_cast<double>(now - begins_at) / length;
    if (s >= 1) return 1;
    return s > 0 ? s * s * (3 - 2 * s) : 0;
}

// `newer` with so much weight, the rest of `older`. Binary channels take no value between.
inline double mix(Kind kind, double newer, double older, double weight) noexcept {
    if (kind == Kind::binary) return newer;
    return newer + (1 - weight) * difference(kind, older, newer);
}

// The time that a relative channel's command is for, ns.
struct Span {
    std::int64_t from, to;
    double seconds() const noexcept { return static_cast<double>(to - from) * 1e-9; }
};

// What a group of channels goes on from: the value (of a relative channel: displacement per second) that lies under the chunks
// that began at or before `at`. NaN: there is none.
struct Base {
    std::int64_t at = 0;
    double* values = nullptr;  // [channels of the reader]
};

// Values are those of the reader's channels; of a relative one the displacement over the span. For one moment after the other:
// begin(), then follow() or finish() for each group.
class Seams {
  public:
    Seams(const Layout& layout, const std::vector<Column>& columns)
        : seam_(layout.seam), interpolation_(layout.interpolation), columns_(columns), values_(columns.size() * kMostHeld) {}

    // Chunks that have begun and can still matter: for Chain.
    static int depth(const Seam& seam) noexcept {
        return seam.kind == SeamKind::newest ? 1 : seam.kind == SeamKind::ensemble ? seam.history : kMostHistory;
    }

    // At least one chunk of the chain has begun.
    void begin(const Chain& chain, std::int64_t now, Span span) noexcept {
        chain_ = &chain, now_ = now, whole_ = span, own_ = span, known_ = 0, weighed_ = false;
        const std::int64_t begins_at = chain[0].begins_at;
        if (own_.from < begins_at) own_.from = begins_at < own_.to ? begins_at : own_.to;
    }

    // Into `out`. on: the group followed the chain at the read before, and owes what older chunks say for their part of the span.
    // Returns the span that the displacements are for.
    Span follow(int group, Base& base, bool on, double* out) noexcept {
        if (seam_.kind == SeamKind::newest) copy(group, value(0), out);
        if (seam_.kind == SeamKind::ensemble) average(group, out);
        if (seam_.kind == SeamKind::blend) blend(group, base, out);
        if (!on || own_.from == whole_.from) return own_;
        for (std::size_t i = 0; i < columns_.size(); ++i)
            if (columns_[i].path >= 0 && columns_[i].group == group) out[i] += earlier(columns_[i]);
        return whole_;
    }

    // For a group that followed the chain at the read before and finds it ended: what is left of relative channels' rows.
    void finish(int group, double* out) noexcept {
        for (std::size_t i = 0; i < columns_.size(); ++i)
            if (columns_[i].path >= 0 && columns_[i].group == group) out[i] = value(0)[i] + earlier(columns_[i]);
    }

    // Drops the chunks that no later moment needs.
    void prune(Chain& chain, std::int64_t now) const noexcept {
        const int most = depth(seam_);
        int kept = chain.begun() < most ? chain.begun() : most;
        if (seam_.kind == SeamKind::blend)
            for (int n = 0; n < kept; ++n)
                if (weight(chain[n], chain[n].begins_at, now) == 1) kept = n + 1;
        chain.keep(kept);
    }

  private:
    double weight(const Link& link, std::int64_t begins_at, std::int64_t now) const noexcept {
        return ramp(now, begins_at, seam_.rows * link.chunk.period_ns);
    }

    double displacement(const Link& link, const Column& c, Span span, bool goes_on) const noexcept {
        const double* sums = link.sums + c.path * (kMaxRows + 1);
        const double to = path_at(interpolation_, link.chunk, sums, rows_since(link.chunk, span.to), c.column, goes_on);
        return to - path_at(interpolation_, link.chunk, sums, rows_since(link.chunk, span.from), c.column, goes_on);
    }

    // What chunk n of the chain says for all channels. An older one that has ended says its last row.
    const double* value(int n) noexcept {
        for (; known_ <= n; ++known_) {
            const Link& link = (*chain_)[known_];
            const Moment at = moment(link.chunk, now_);
            double* out = values_.data() + static_cast<std::size_t>(known_) * columns_.size();
            for (const Column& c : columns_)
                *out++ = c.path < 0 ? value_at(c.kind, interpolation_, link.chunk, at, c.column)
                                    : displacement(link, c, own_, known_ > 0);
        }
        return values_.data() + static_cast<std::size_t>(n) * columns_.size();
    }

    void copy(int group, const double* values, double* out) const noexcept {
        for (std::size_t i = 0; i < columns_.size(); ++i)
            if (columns_[i].group == group) out[i] = values[i];
    }

    // The part of the span from before the newest chunk began: each moment belongs to the chunk that was the newest then.
    double earlier(const Column& c) const noexcept {
        double sum = 0;
        Span left{whole_.from, own_.from};
        for (int n = 1; n < chain_->begun() && left.to > left.from; ++n) {
            const Link& link = (*chain_)[n];
            const std::int64_t from = link.begins_at > left.from ? link.begins_at : left.from;
            sum += displacement(link, c, {from, left.to}, false);
            left.to = from;
        }
        return sum;
    }

    // Weights of the last `history` chunks that have not ended, by how well they agree with the newest over all channels of the
    // reader. Displacements are counted per row: at 500 Hz they would vanish before the 1e-7.
    void weigh() noexcept {
        weighed_ = true, members_ = 0;
        const double per_row = own_.to > own_.from ? (*chain_)[0].chunk.period_ns / static_cast<double>(own_.to - own_.from) : 0;
        double total = 0, square0 = 0;
        for (int n = 0; n < chain_->begun() && n < seam_.history; ++n) {
            if (n > 0 && moment((*chain_)[n].chunk, now_).over) continue;
            const double *newest = value(0), *other = value(n);
            double dot = 0, square = 0;
            for (std::size_t i = 0; i < columns_.size(); ++i) {
                const double scale = columns_[i].path < 0 ? 1 : per_row;
                const double x = scale * newest[i], y = x + scale * difference(columns_[i].kind, other[i], newest[i]);
                dot += x * y, square += y * y;
            }
            if (n == 0) square0 = square;
            const double cosine = dot / (std::sqrt(square) * std::sqrt(square0) + 1e-7);
            member_[members_] = n, weight_[members_] = exponential(seam_.alpha * cosine);
            total += weight_[members_++];
        }
        for (int m = 0; m < members_; ++m) weight_[m] /= total;
    }

    void average(int group, double* out) noexcept {
        if (!weighed_) weigh();
        const double* newest = value(0);
        for (std::size_t i = 0; i < columns_.size(); ++i) {
            if (columns_[i].group != group) continue;
            const Kind kind = columns_[i].kind;
            double away = 0;  // of a binary channel: the weight of those that contradict the newest
            for (int m = 1; m < members_; ++m) {
                const double apart = difference(kind, value(member_[m])[i], newest[i]);
                away += weight_[m] * (kind == Kind::binary ? apart * apart : apart);
            }
            out[i] = kind != Kind::binary ? newest[i] + away : away > 0.5 ? 1 - newest[i] : newest[i];
        }
    }

    // Each chunk ramps up over what would have been sent without it, from the last one that nothing older shows through. Where
    // more than kMostHistory do so at once, what lies under the oldest of them becomes the group's base: it stands still instead
    // of jumping.
    void blend(int group, Base& base, double* out) noexcept {
        int bottom = 0;
        bool on_base = false;
        double weights[kMostHeld];
        for (;; ++bottom) {
            const Link& link = (*chain_)[bottom];
            on_base = link.begins_at <= base.at;
            weights[bottom] = weight(link, on_base ? base.at : link.begins_at, now_);
            if (on_base || weights[bottom] == 1 || bottom + 1 == chain_->begun()) break;
        }
        copy(group, value(bottom), out);
        const double seconds = own_.seconds();
        if (on_base)
            for (std::size_t i = 0; i < columns_.size(); ++i) {
                const double under = base.values[i] * (columns_[i].path < 0 ? 1 : seconds);
                if (columns_[i].group == group && under == under) out[i] = mix(columns_[i].kind, out[i], under, weights[bottom]);
            }
        for (int n = bottom - 1; n >= 0; --n) {
            if (n == kMostHistory - 1) freeze(group, base, (*chain_)[n].begins_at, out, seconds);
            // displacements are not made up: a chunk that comes when the one before has ended is sent as it is
            const bool alone = (*chain_)[n + 1].ends_at <= (*chain_)[n].begins_at;
            const double* values = value(n);
            for (std::size_t i = 0; i < columns_.size(); ++i)
                if (columns_[i].group == group)
                    out[i] = alone && columns_[i].path >= 0 ? values[i] : mix(columns_[i].kind, values[i], out[i], weights[n]);
        }
    }

    void freeze(int group, Base& base, std::int64_t at, const double* values, double seconds) const noexcept {
        base.at = at;
        for (std::size_t i = 0; i < columns_.size(); ++i)
            if (columns_[i].group == group)
                base.values[i] = columns_[i].path < 0 ? values[i] : seconds > 0 ? values[i] / seconds : 0;
    }

    Seam seam_;
    Interpolation interpolation_;
    std::vector<Column> columns_;
    std::vector<double> values_;  // [kMostHeld, channels]
    const Chain* chain_ = nullptr;
    std::int64_t now_ = 0;
    Span whole_{0, 0}, own_{0, 0};
    int known_ = 0, members_ = 0;
    bool weighed_ = false;
    int member_[kMostHistory];
    double weight_[kMostHistory];
};

}  // namespace dit4dit

#include "exact_end.h"
