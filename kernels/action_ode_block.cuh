// What the tiles of one block share: shared memory, the weights on their way, sums over the block, waiting for others.
#pragma once

#include "target.cuh"
#include "action_ode_tiles.cuh"

namespace dit4dit::ode {

using namespace target;

struct Fixed {
    std::uint64_t full[kMostSlots], empty[kMostSlots];
    int records[2][kRecord];
    int alive;
    int failed;  // 0, or 1 + the barrier, of `full` or `empty`, that was waited for in vain
};
constexpr int kFixedBytes = 1536;
static_assert(sizeof(Fixed) <= kFixedBytes, "plan.py counts with this");

// Shared memory: fixed part, weight slots, staging.
struct Block {
    const Launch& launch;
    Fixed& fixed;
    std::uint8_t* ring;
    std::uint8_t* staging;

    DEVICE explicit Block(const Launch& l)
        : launch(l), fixed(*reinterpret_cast<Fixed*>(shared_memory())), ring(shared_memory() + kFixedBytes),
          staging(shared_memory() + kFixedBytes + l.slots * kSlotBytes) {}

    template <class T>
    DEVICE T* buffer(int space, int row, int plane = 0) const {
        const std::int64_t at = static_cast<std::int64_t>(plane) * launch.rows + row;
        return reinterpret_cast<T*>(launch.workspace + launch.offset[space]) + at * launch.columns[space];
    }
    template <class Work>
    DEVICE const Work& work(const Tile& tile) const {
        static_assert(sizeof(Work) <= sizeof(tile.work), "a record has no room for it");
        return reinterpret_cast<const Work&>(tile.work);
    }
    DEVICE int tokens() const { return launch.rows / launch.batch; }  // of one sample
    DEVICE const float* constant(int offset) const { return launch.constants + offset; }

    DEVICE int* counter(int index) const { return launch.counters + index * kCounterStride; }

    // Until the tile's counter has its target; what the block stored before is seen by all of it after. False: the launch has
    // failed, here or elsewhere, and ends.
    DEVICE bool wait(const Tile& tile, int index) const {
        if (thread_index() == 0) fixed.alive = !barrier_failed() && (tile.wait == kNone || poll(tile, index));
        sync_block();
        return fixed.alive != 0;
    }

#if DIT4DIT_BULK_COPIES
    // Until a phase of a weight slot's barrier is over. The copy engine or the block's own warps end it, never another block; it is
    // bounded like `poll` all the same, and more tightly: those who wait for this block are not to be the first to say so. After a
    // wait in vain threads go on with what lies there until the next `wait` ends the launch, and no longer wait for what may never
    // come, but at the end (`last`), where a copy may still be on its way.
    DEVICE void wait_for_slot(std::uint64_t* barrier, int parity, bool last = false) const {
        if (barrier_try_wait(barrier, parity)) return;
        const std::int64_t begin = nanoseconds();  // a barrier sleeps before it says no, so that the clock is not asked often
        for (;;) {
            const std::int64_t now = nanoseconds();  // before the barrier: between the two the GPU may be another process's
            if (barrier_try_wait(barrier, parity) || (!last && barrier_failed())) return;
            if (now - begin > launch.limit_ns / 4) break;
        }
        *static_cast<volatile int*>(&fixed.failed) = 1 + static_cast<int>(barrier - fixed.full);  // `empty` lies behind
    }
#endif

    // By one thread, after the last tile: what happened to its barriers is known outside.
    DEVICE void report() const {
        if (barrier_failed()) fail(kNone, barrier_failed() - 1, 0);
    }

private:
    static constexpr int kPolls = 64;  // before the clock and what others say have their turn

    DEVICE int barrier_failed() const {
#if DIT4DIT_BULK_COPIES
        return *static_cast<const volatile int*>(&fixed.failed);
#else
        return 0;
#endif
    }

    // The launch has failed; the first to say so is the one that is heard.
    DEVICE void fail(int tile, int counter, int have) const {
        if (compare_and_swap(launch.status, 0, 1 + block_index()) != 0) return;
        launch.status[1] = tile;
        launch.status[2] = counter;
        launch.status[3] = have;
    }

    // A poll is a round trip to the second-level cache, so that the clock and the error flag have their turn now and then only.
    DEVICE int poll(const Tile& tile, int index) const {
        std::int64_t begin = 0;
        for (int turn = 1;; ++turn) {
            const int have = load_acquire(counter(tile.wait));
            if (have >= tile.target) return 1;
            if (turn % kPolls != 0) continue;
            if (load_acquire(launch.status) != 0) return 0;
            const std::int64_t now = nanoseconds();
            if (begin == 0) begin = now;
            if (now - begin > launch.limit_ns) {
                fail(index, tile.wait, have);
                return 0;
            }
        }
    }
};

DEVICE float exponential(float x) { return power_of_two(x * 1.4426950408889634f); }

// Two e4m3 numbers, which bf16 holds exactly.
DEVICE std::uint32_t unpack_e4m3(std::uint32_t low, std::uint32_t high) {
    const float scale = as_float((120u + 127u) << 23);  // the difference of the exponents' biases
    const float a = as_float((low & 0x80u) << 24 | (low & 0x7fu) << 20) * scale;
    const float b = as_float((high & 0x80u) << 24 | (high & 0x7fu) << 20) * scale;
    return as_bits(a) >> 16 | (as_bits(b) & 0xffff0000u);
}

// The weights of this block's products, one slot after the other in the schedule's order, fetched as far ahead as there are
// slots. Fetching waits for no counter: weights never change. dit4dit/engine/action_ode/weights.py says how a slot lies.
class Weights {
public:
    struct Fragments {
        std::uint32_t a[2][4];  // two of 16 x 16, next to each other
    };

    DEVICE explicit Weights(const Block& block)
        : block_(block), segment_(load_int(block.launch.first_segment + block_index())),
          last_(load_int(block.launch.first_segment + block_index() + 1)) {
#if DIT4DIT_BULK_COPIES
        if (thread_index() == 0) {
            block.fixed.failed = 0;
            for (int s = 0; s < slots(); ++s) {
                barrier_init(&block.fixed.full[s], 1);
                barrier_init(&block.fixed.empty[s], kWarps);
            }
            fence_barrier_init();
        }
        sync_block();
#endif
        for (int i = 0; i + 1 < slots(); ++i) fetch();
    }

    // The next slot's fragments of this lane. All threads of the block call it.
    DEVICE Fragments next(bool fp8) {
        const int slot = used_ % slots();
        const std::uint8_t* at = block_.ring + slot * kSlotBytes;
#if DIT4DIT_BULK_COPIES
        block_.wait_for_slot(&block_.fixed.full[slot], used_ / slots() & 1);
#else
        wait_copies<kCopySlots - 2>();
#endif
        const Fragments fragments = fp8 ? read_e4m3(at) : read_bf16(at);
#if DIT4DIT_BULK_COPIES
        sync_warp();
        if (thread_index() % 32 == 0) barrier_arrive(&block_.fixed.empty[slot]);
#endif
        ++used_;
        fetch();
        return fragments;
    }

    // No copy may land in the shared memory of a block that has ended.
    DEVICE void drain() {
#if DIT4DIT_BULK_COPIES
        if (thread_index() == 0)
            for (; used_ < fetched_; ++used_) {
                const int slot = used_ % slots();
                block_.wait_for_slot(&block_.fixed.full[slot], used_ / slots() & 1, true);
            }
#else
        wait_copies<0>();
#endif
    }

private:
    DEVICE int slots() const {
#if DIT4DIT_BULK_COPIES
        return block_.launch.slots;
#else
        return kCopySlots;
#endif
    }

    DEVICE void fetch() {
#if DIT4DIT_BULK_COPIES
        if (thread_index() == 0 && advance()) {
            const int slot = fetched_ % slots(), bytes = units_ * kWeightUnit;
            if (fetched_ >= slots())
                block_.wait_for_slot(&block_.fixed.empty[slot], (fetched_ / slots() - 1) & 1);
            barrier_expect(&block_.fixed.full[slot], bytes);
            bulk_copy(block_.ring + slot * kSlotBytes, from_, bytes, &block_.fixed.full[slot]);
            from_ += bytes;
            ++fetched_;
        }
#else
        // each thread fetches what it will read itself, so that nobody waits for another
        if (advance()) {
            std::uint8_t* to = block_.ring + fetched_ % slots() * kSlotBytes;
            const int lane = thread_index() % 32, warp = thread_index() / 32;
            if (units_ == 1) {
                copy_async(to + 16 * thread_index(), from_ + 16 * thread_index());
            } else {
                for (int f = 0; f < 2; ++f) {
                    const int at = (warp * 2 + f) * 512 + lane * 16;
                    copy_async(to + at, from_ + at);
                }
            }
            from_ += units_ * kWeightUnit;
            ++fetched_;
        }
        commit_copies();  // an empty group too: waits count groups
#endif
    }

    // To the next slot; false after the last one.
    DEVICE bool advance() {
        if (left_ == 0) {
            if (segment_ == last_) return false;
            const int* row = block_.launch.segments + 3 * segment_++;
            from_ = block_.launch.weights + static_cast<std::int64_t>(load_int(row)) * kWeightUnit;
            left_ = load_int(row + 1);
            units_ = load_int(row + 2);
        }
        --left_;
        return true;
    }

    DEVICE Fragments read_bf16(const std::uint8_t* at) const {
        const int lane = thread_index() % 32, warp = thread_index() / 32;
        Fragments fragments;
        for (int f = 0; f < 2; ++f) {
            const Quad q = *reinterpret_cast<const Quad*>(at + (warp * 2 + f) * 512 + lane * 16);
            for (int i = 0; i < 4; ++i) fragments.a[f][i] = q.v[i];
        }
        return fragments;
    }

    DEVICE Fragments read_e4m3(const std::uint8_t* at) const {
        const Quad q = *reinterpret_cast<const Quad*>(at + 16 * thread_index());
        Fragments fragments;
        for (int f = 0; f < 2; ++f)
            for (int i = 0; i < 4; ++i) {
                const std::uint32_t pair = q.v[f * 2 + i / 2] >> (i % 2 * 16);
                fragments.a[f][i] = unpack_e4m3(pair & 0xffu, pair >> 8 & 0xffu);
            }
        return fragments;
    }

    const Block& block_;
    int segment_, last_;
    int left_ = 0, units_ = 0, fetched_ = 0, used_ = 0;
    const std::uint8_t* from_ = nullptr;
};

}  // namespace dit4dit::ode
