// What the warps of one block share: shared memory, where words lie, waiting for what others give, and giving it up.
//
// The idea of the whole kernel. A step of the action head is a chain of small products, each of which needs all that the one
// before has made; the time goes into handing results over, not into arithmetic. So
// - blocks work in teams (clusters). All ranks of a team do the same tile: each multiplies its slice of the columns, for which it
//   reads that slice of the activations only, and the sums are put together through the cluster's shared memory;
// - what teams give each other is words, two bfloat16 numbers each, that are kEmpty until they are there. Who needs words reads
//   them until none is kEmpty: no counter, no fence and no second trip for the data behind a flag;
// - a warp of its own fetches weights, and keys and values of the features, from the first tile to the last one without waiting for
//   any activation;
// - what few tokens need of each other, their attention, each block works out for the columns that it is going to multiply: doing it
//   in many blocks takes less time than another trip from team to team;
// - the residual stream and the sampler's state are private: the thread that writes an element is the one that reads it.
//
// Why no word is read that is old: a step's words lie in one of three sets. The thread that writes a word makes the same word
// kEmpty in the set of the step before, whose readers are all done, since all tiles of a step lead to its velocity and all tiles of
// the next step follow from that (validate.py proves it). That set is used again two steps later; before a thread writes any
// word of the step in between it passes a fence, and before a thread reads any word of a step it passes one too: whoever has read
// a word of the step in between finds the kEmpty, or what comes after it. Each word says for itself that it is there, so that two
// words need no order.
#pragma once

#include "target.cuh"
#include "action_ode_tiles.cuh"

namespace dit4dit::ode {

using namespace target;

// What a block may wait for, in `Launch::status`.
enum Wanted { kWords, kSums, kRoom, kWeights, kRoomForWeights };

struct Fixed {
    std::uint64_t full[kMostSlots], empty[kMostSlots];  // a panel of weights is there; all warps have read it
    std::uint64_t sums[2], room[2];                     // an inbox has all its sums; all ranks have read theirs
    int tiles[2];                                       // of this team: first, and last and one
    int records[4][kRecord];                            // of tiles in turn: the one before may still be read, the next one comes
    int failed;  // the launch has; nobody waits any more but for its own team
    int apart;   // the team's ranks have lost each other; nothing is pushed or waited for any more
    int last;                                           // this block is the last one to end
};
constexpr int kFixedBytes = 2048;
constexpr int kLooksAtBarrier = 16;
static_assert(sizeof(Fixed) <= kFixedBytes, "schedule.py counts with this");

// Of 1, 2, 4 or 8, as ranks, splits and parts are: shifts where divisions would be calls.
DEVICE int log2_of(int n) { return (n > 1) + (n > 2) + (n > 4); }

// Without clusters a team is one block, and the compiler knows it.
DEVICE int ranks_of(const Launch& launch) { return DIT4DIT_BULK_COPIES ? launch.ranks : 1; }
DEVICE int split_of(const Product& w) { return DIT4DIT_BULK_COPIES ? w.split : 1; }

// Shared memory: fixed part, weights, staging, two inboxes.
struct Block {
    const Launch& launch;
    Fixed& fixed;
    std::uint8_t* ring;
    std::uint8_t* staging;
    int rank, thread, warp, lane;

    // thread: thread_index(), through `renewed` where what follows from it must not stay in registers
    DEVICE Block(const Launch& l, int rank_of_block, int t)
        : launch(l), fixed(*reinterpret_cast<Fixed*>(shared_memory())), ring(shared_memory() + kFixedBytes),
          staging(ring + l.slots * kSlotBytes), rank(DIT4DIT_BULK_COPIES ? rank_of_block : 0), thread(t), warp(uniform(t / 32)), lane(t % 32) {}

    DEVICE std::uint8_t* inbox(int which) const { return staging + launch.staging + which * launch.inbox; }
    DEVICE std::uint32_t* words(int set) const {
        return launch.words + static_cast<std::int64_t>(set) * launch.set_words;
    }
    DEVICE int tokens() const { return launch.rows / launch.batch; }  // of one sample
    DEVICE const float* constant(int offset) const { return launch.constants + offset; }
    template <class Work>
    DEVICE static const Work& work(const Tile& tile) {
        static_assert(sizeof(Work) <= sizeof(tile.work), "a record has no room for it");
        return reinterpret_cast<const Work&>(tile.work);
    }

    DEVICE bool failed() const { return *static_cast<const volatile int*>(&fixed.failed) != 0; }
    DEVICE bool apart() const { return *static_cast<const volatile int*>(&fixed.apart) != 0; }

    // The launch has failed; the first to say so is the one that is heard.
    DEVICE void fail(int tile, Wanted wanted, int detail) const {
        *static_cast<volatile int*>(&fixed.failed) = 1;
        if (wanted == kSums || wanted == kRoom) *static_cast<volatile int*>(&fixed.apart) = 1;
        if (compare_and_swap(launch.status, 0, 1 + block_index()) != 0) return;
        launch.status[1] = tile;
        launch.status[2] = wanted;
        launch.status[3] = detail;
    }

    // Until a phase of a barrier in shared memory is over, or the launch has failed. After a wait in vain threads go on with what
    // lies there and wait for nothing more, so that all reach the end together; only the end itself waits on (`always`).
    // kTogether: all lanes of a warp wait and leave together, so that nothing behind it has to bring them together again.
    template <bool kTogether>
    DEVICE void wait(std::uint64_t* barrier, int parity, int tile, Wanted wanted, int detail, bool always = false) const {
        const auto over = [&](bool so) { return kTogether ? all_lanes(so) : so; };
        const auto ready = [&] {
            // only sums are read after it; room lets this thread write alone, and a wait for a cluster empties the SM's cache
            return over(wanted == kSums ? barrier_try_wait_cluster(barrier, parity) : barrier_try_wait(barrier, parity));
        };
        if (ready()) return;
        // who waits for the copy engine is to be heard before those who wait for this block; ranks wait longer for each other than for
        // words, which some of them may lack, and the fetching warp, which waits early, is to be heard last
        const bool of_team = wanted == kSums || wanted == kRoom;
        const int some = wanted == kWeights ? 1 : wanted == kRoomForWeights ? 6 : of_team ? 5 : 4;
        const std::int64_t limit = launch.limit_ns / 4 * some;
        const std::int64_t begin = nanoseconds();
        for (int looks = 1;; ++looks) {
            // clock and error flag, which is a trip to L2, have their turn now and then; the clock before the barrier: between the two
            // the GPU may be another process's
            const bool due = looks % kLooksAtBarrier == 0;
            const std::int64_t now = due ? nanoseconds() : begin;
            if (ready()) return;
            // ranks go on with each other also in a launch that has failed: no push is on its way when a block ends
            if (!always && over(of_team ? apart() : due ? others_failed() : failed())) return;
            if (over(now - begin > limit)) break;
        }
        fail(tile, wanted, detail);
    }

    DEVICE bool others_failed() const {
        if (failed()) return true;
        if (load_acquire(launch.status) == 0) return false;
        *static_cast<volatile int*>(&fixed.failed) = 1;
        return true;
    }
};

// How long a warp goes on reading words that are kEmpty.
class Patience {
public:
    DEVICE Patience(const Block& block, int tile) : block_(block), tile_(tile) {}

    // After a look in vain of some lane, whose `word` of a set it is, else kNone. All lanes of a warp call it, and get the same.
    // A look is a round trip to L2; clock and error flag have their turn now and then.
    DEVICE bool over(int word) {
        if (++looks_ % kLooks != 0) return false;
        if (any_lane(block_.others_failed())) return true;
        const std::int64_t now = nanoseconds();
        if (begin_ == 0) begin_ = now;
        // twice: before the first time the GPU may have been another process's since the look
        const bool again = late_;
        late_ = now - begin_ > block_.launch.limit_ns;
        if (again && word != kNone) block_.fail(tile_, kWords, word);
        return any_lane(again);
    }

private:
    static constexpr int kLooks = 64;

    const Block& block_;
    const int tile_;
    int looks_ = 0;
    std::int64_t begin_ = 0;
    bool late_ = false;
};

// Where a launch is: the sets of the step, and the inbox of the tile.
struct Moment {
    int step = 0, set;
    int tile = 0;   // of the schedule
    int count = 0;  // tiles before it, of all steps

    DEVICE explicit Moment(int first_set) : set(first_set) {}

    DEVICE int next() const { return set + 1 < kSets ? set + 1 : 0; }      // set of the step after
    DEVICE int before() const { return set > 0 ? set - 1 : kSets - 1; }  // of the step before, which is made kEmpty
    DEVICE void advance() {
        ++step;
        set = next();
    }
    DEVICE int inbox() const { return count & 1; }
    DEVICE int lap() const { return count >> 1 & 1; }  // of the inboxes
};

// Sums that ranks of a team give each other. Each rank has two inboxes, which tiles use in turn, also those that exchange nothing.
class Exchange {
public:
    DEVICE Exchange(const Block& block, const Moment& now) : block_(block), now_(now) {}

    // By one thread of each rank, once a tile: how many bytes will come into this inbox.
    DEVICE void expect([[maybe_unused]] int bytes) const {
#if DIT4DIT_BULK_COPIES
        if (ranks_of(block_.launch) > 1 && !block_.apart()) barrier_expect(sums_barrier(), bytes);
#endif
    }
    // By all threads that write to an inbox, before they do: all ranks have read what lay in this one.
    DEVICE void wait_for_room() const {
#if DIT4DIT_BULK_COPIES
        if (ranks_of(block_.launch) > 1) block_.wait<true>(room_barrier(), now_.lap() ^ 1, now_.tile, kRoom, now_.inbox());
#endif
    }
    // Two floats to the same place, an offset in the inbox, of a rank of the team.
    DEVICE void push([[maybe_unused]] int rank, [[maybe_unused]] int offset, [[maybe_unused]] Float2 x) const {
#if DIT4DIT_BULK_COPIES
        if (!block_.apart())
            target::push(at_rank(block_.inbox(now_.inbox()) + offset, rank), x, at_rank(sums_barrier(), rank));
#endif
    }
    DEVICE const float* sums() const {
        block_.wait<true>(sums_barrier(), now_.lap(), now_.tile, kSums, now_.inbox());
        return reinterpret_cast<const float*>(block_.inbox(now_.inbox()));
    }
    // The tile's inbox, for a rank's own sums where ranks give each other none.
    DEVICE float* own() const { return reinterpret_cast<float*>(block_.inbox(now_.inbox())); }
    // By all computing threads, at the end of every tile: this inbox may be filled again.
    DEVICE void release() const {
#if DIT4DIT_BULK_COPIES
        if (ranks_of(block_.launch) == 1) return;
        sync_warp();
        if (block_.lane < ranks_of(block_.launch) && !block_.apart()) arrive_at(at_rank(room_barrier(), block_.lane));
#endif
    }

private:
    DEVICE std::uint64_t* sums_barrier() const { return &block_.fixed.sums[now_.inbox()]; }
    DEVICE std::uint64_t* room_barrier() const { return &block_.fixed.room[now_.inbox()]; }

    const Block& block_;
    const Moment& now_;
};

// A word of it is not there.
DEVICE bool incomplete(const Quad& q) {
    return q.v[0] == kEmpty || q.v[1] == kEmpty || q.v[2] == kEmpty || q.v[3] == kEmpty;
}

DEVICE float exponential(float x) { return power_of_two(x * 1.4426950408889634f); }

DEVICE float warp_sum(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) x += shuffle_xor(x, mask);
    return x;
}

}  // namespace dit4dit::ode
