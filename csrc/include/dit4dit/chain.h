// The chunks that a reader holds: copied whole from the ring when it first sees them, so that nothing it reads later can change.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "interpolation.h"
#include "ring.h"

#include "exact_begin.h"

namespace dit4dit {

// Some have begun, some are meant for later.
constexpr int kMostHeld = kMostHistory + kSlots;

// One chunk and what follows from it. It begins when it is there and its first row's time has come; one that is too late ends
// then.
struct Link {
    HeldChunk chunk;
    std::int64_t begins_at, ends_at;
    double* sums;  // [relative channels, kMaxRows + 1]: their paths
};

// Chunks by id, and, as an older one that begins later than a newer one is never used, by begins_at.
class Chain {
  public:
    // relative: columns of the channels that need a path. depth: how many that have begun are wanted, at most.
    Chain(std::vector<int> relative, int depth)
        : relative_(std::move(relative)), links_(kMostHeld + 1), depth_(depth) {
        const std::size_t size = relative_.size() * (kMaxRows + 1);
        sums_.resize(size * links_.size());
        for (std::size_t i = 0; i < links_.size(); ++i) {
            links_[i].sums = sums_.data() + i * size;
            order_[i] = &links_[i];
        }
    }

    // Copies what is new in the ring; of chunks that have begun before `covered` no more than `depth`. False: every try met a
    // chunk that was being overwritten, and the chain is as it was.
    bool take(const Segment& segment, std::int64_t covered) noexcept {
        if (head(segment) == seen_) return true;
        for (int tries = 0; tries < kMostTries; ++tries) {
            const std::uint64_t newest = head(segment);
            if (!take_down_from(segment, newest, covered)) continue;
            seen_ = newest;
            leave_out_overtaken();
            return true;
        }
        return false;
    }

    // Chunks that were observed before `time` are dropped, and not taken later either.
    void forget_before(std::int64_t time) noexcept {
        forgotten_ = time;
        int kept = 0;
        for (int i = 0; i < count_; ++i)
            if (order_[i]->chunk.observed_at >= time) swap(kept++, i);
        count_ = kept;
    }

    // Finds out how many have begun.
    int begin(std::int64_t now) noexcept {
        begun_ = 0;
        if (now < forgotten_) forgotten_ = now;  // the clock was set back
        while (begun_ < count_ && order_[begun_]->begins_at <= now) ++begun_;
        return begun_;
    }
    int begun() const noexcept { return begun_; }

    // Those that have begun, newest first.
    const Link& operator[](int n) const noexcept { return *order_[begun_ - 1 - n]; }

    // Drops all but the newest `most` of those that have begun.
    void keep(int most) noexcept {
        for (; begun_ > most; --begun_) drop(0);
    }

  private:
    // False: the newest one itself was being overwritten. Where an older one is, all before it are lost.
    bool take_down_from(const Segment& segment, std::uint64_t newest, std::int64_t covered) noexcept {
        int deep = 0;
        std::int64_t next_begins_at = std::numeric_limits<std::int64_t>::max();
        for (std::uint64_t id = newest; id > seen_; --id) {
            Link& link = *order_[kMostHeld];  // never one that is held
            if (!copy(segment, id, link.chunk)) return id != newest;
            if (!complete(link) || link.begins_at >= next_begins_at) continue;
            next_begins_at = link.begins_at;
            insert();
            if (link.begins_at <= covered && ++deep >= depth_) break;
        }
        return true;
    }

    // Whether the chunk can be used; then with what follows from it.
    bool complete(Link& link) const noexcept {
        const HeldChunk& chunk = link.chunk;
        constexpr double longest = 1e12;  // a quarter of an hour from row to row
        if (chunk.observed_at < forgotten_ || chunk.rows < 1) return false;
        if (!(chunk.period_ns > 0 && chunk.period_ns <= longest)) return false;
        for (const std::int64_t time : {chunk.observed_at, chunk.starts_at, chunk.published_at})
            if (time < -kLatest || time > kLatest) return false;
        link.begins_at = chunk.published_at > chunk.starts_at ? chunk.published_at : chunk.starts_at;
        link.ends_at = chunk.starts_at + static_cast<std::int64_t>(std::ceil(chunk.rows * chunk.period_ns));
        if (link.ends_at < link.begins_at) link.ends_at = link.begins_at;
        for (std::size_t i = 0; i < relative_.size(); ++i) sum_rows(chunk, relative_[i], link.sums + i * (kMaxRows + 1));
        return true;
    }

    // The link that was filled goes to its place; another one is free then.
    void insert() noexcept {
        if (count_ == kMostHeld) drop(order_[1]->begins_at <= order_[kMostHeld]->chunk.published_at ? 0 : 1);
        swap(count_, kMostHeld);
        for (int i = count_++; i > 0 && order_[i - 1]->chunk.id > order_[i]->chunk.id; --i) swap(i - 1, i);
    }

    void leave_out_overtaken() noexcept {
        for (int i = count_ - 2; i >= 0; --i)
            if (order_[i]->begins_at >= order_[i + 1]->begins_at) drop(i);
    }

    void drop(int i) noexcept {
        for (--count_; i < count_; ++i) swap(i, i + 1);
    }
    void swap(int i, int j) noexcept {
        Link* link = order_[i];
        order_[i] = order_[j];
        order_[j] = link;
    }

    std::vector<int> relative_;
    std::vector<double> sums_;
    std::vector<Link> links_;
    Link* order_[kMostHeld + 1];  // held ones first, then spare ones
    int count_ = 0, begun_ = 0, depth_;
    std::uint64_t seen_ = 0;
    std::int64_t forgotten_ = 0;
};

}  // namespace dit4dit

#include "exact_end.h"
