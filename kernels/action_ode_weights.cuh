// Weights on their way: a warp fetches panels of this rank, one behind the other in the order of the tiles, as far ahead as there are
// slots; the computing warps take fragments from them. dit4dit/engine/action_ode/weights.py says how a panel lies. Keys and values of
// the features, which a launch never changes, come in the same way.
#pragma once

#include "action_ode_shares.cuh"

namespace dit4dit::ode {

// The slots in turn. A lap's parity tells its phases of a slot's barriers from those of the lap before.
struct Ring {
    int slot = 0, parity = 0;

    DEVICE void advance(int slots) {
        if (++slot < slots) return;
        slot = 0;
        parity ^= 1;
    }
};

// What a product's weights are for one rank.
struct Panels {
    int groups, unit_bytes, steps, panel_steps;

    DEVICE Panels(const Product& w, int ranks)
        : groups(w.tile_rows * split_of(w) >> (log2_of(ranks) + 4)), unit_bytes(w.fp8 ? kWeightUnit : 2 * kWeightUnit),
          steps(w.slice / kStepColumns), panel_steps(w.panel_steps) {}

    DEVICE int step_bytes() const { return groups * unit_bytes; }
    DEVICE int length(int first) const { return steps - first < panel_steps ? steps - first : panel_steps; }
};

// -- the warp that fetches ---------------------------------------------------------------------------------------------------

// No copy may land in the shared memory of a block that has ended: after a failure, which may be seen when all panels are on their
// way already, nobody else waits for them.
DEVICE void drain([[maybe_unused]] const Block& block, [[maybe_unused]] const Ring& ring) {
#if DIT4DIT_BULK_COPIES
    for (int s = 0; s < block.launch.slots; ++s)  // behind the ring's place is the lap before
        block.wait<true>(&block.fixed.full[s], s < ring.slot ? ring.parity : ring.parity ^ 1, kNone, kWeights, s, true);
#else
    commit_copies();
    wait_copies<0>();
#endif
}

DEVICE void fetch_panel(const Block& block, const Ring& ring, const std::uint8_t* from, int bytes) {
    std::uint8_t* to = block.ring + ring.slot * kSlotBytes;
    std::uint64_t* full = &block.fixed.full[ring.slot];
#if DIT4DIT_BULK_COPIES
    if (block.lane != 0) return;
    barrier_expect(full, bytes);
    barrier_arrive_times(full, 31);  // for the other lanes, which arrive themselves when they copy rows
    fence_shared_for_copies();       // of what lanes have copied into this slot
    bulk_copy_once(to, from, bytes, full);
#else
    for (int at = block.lane * 16; at < bytes; at += 32 * 16) copy_async_once(to + at, from + at);
    arrive_on_copies(full);
#endif
}

// Until the next slot may be filled; false: the launch has failed, and nothing more is to be fetched.
DEVICE bool wait_for_slot(const Block& block, const Ring& ring, int index) {
    block.wait<true>(&block.fixed.empty[ring.slot], ring.parity ^ 1, index, kRoomForWeights, ring.slot);
    return !any_lane(block.failed());
}

DEVICE bool fetch_product(const Block& block, Ring& ring, const Product& w, int index) {
    const Launch& launch = block.launch;
    const Panels panels(w, ranks_of(launch));
    const std::uint8_t* from = launch.weights + (w.weight + static_cast<std::int64_t>(block.rank) * w.rank_units) * kWeightUnit;
    for (int done = 0; done < panels.steps; done += panels.panel_steps) {
        if (!wait_for_slot(block, ring, index)) return false;
        const int bytes = panels.length(done) * panels.step_bytes();
        fetch_panel(block, ring, from, bytes);
        from += bytes;
        ring.advance(launch.slots);
    }
    return true;
}

// Panels of keys and behind them values, a row for each; behind the last key it is there again, up to the end of what a warp takes:
// what only pads counts for nothing, but must be a number. Lanes copy them, on all GPUs: the copy engine takes rows of so few bytes one by one.
DEVICE bool fetch_features(const Block& block, Ring& ring, const Attend& w, int index) {
    const Launch& launch = block.launch;
    const Shares mine(block, w);
    const Sweep sweep(block);
    const std::uint16_t* from = launch.context +
                                (mine.sample * static_cast<std::int64_t>(launch.context_tokens) + mine.first) * launch.context_columns +
                                2 * w.context * launch.width + mine.head * launch.head_dim + sweep.column;
    const int stride = row_bytes(launch);
    for (int done = 0; done < mine.keys; done += mine.panel) {
        if (!wait_for_slot(block, ring, index)) return false;
        const int last = mine.keys - 1 - done, end = sweep.idle() ? 0 : mine.filled(done);
        for (int value = 0; value < 2; ++value) {
            std::uint8_t* to = block.ring + ring.slot * kSlotBytes + value * mine.panel * stride + sweep.column * 2;
            const std::uint16_t* source = from + static_cast<std::int64_t>(done) * launch.context_columns + value * launch.width;
            for (int row = sweep.row; row < end; row += sweep.rows)
                copy_async(to + row * stride, source + static_cast<std::int64_t>(row < last ? row : last) * launch.context_columns);
        }
        arrive_on_copies(&block.fixed.full[ring.slot]);
        ring.advance(launch.slots);
    }
    return true;
}

// Tiles `first` to `last` - 1, of all steps.
DEVICE void fetch(const Block& block, int first, int last) {
    const Launch& launch = block.launch;
    Ring ring;
    bool more = true;
    for (int step = 0; step < launch.steps && more; ++step)
        for (int index = first; index < last && more; ++index) {
            const Tile& tile = *reinterpret_cast<const Tile*>(launch.tiles + index * kRecord);
            if (tile.opcode == kProduct)
                more = fetch_product(block, ring, Block::work<Product>(tile), index);
            else if (Block::work<Attend>(tile).context != kNone)
                more = fetch_features(block, ring, Block::work<Attend>(tile), index);
        }
    drain(block, ring);
}

// -- the warps that compute --------------------------------------------------------------------------------------------------

// This warp has read what it needs of the panel.
DEVICE void leave_panel(const Block& block, Ring& ring) {
    sync_warp();
    if (block.lane == 0 && !block.failed()) barrier_arrive(&block.fixed.empty[ring.slot]);
    ring.advance(block.launch.slots);
}

// Two e4m3 numbers, which bf16 holds exactly.
DEVICE std::uint32_t unpack_e4m3(std::uint32_t four, int half) {
    const std::uint32_t x = spread_bytes(four, half);
    return times_two_to_120((x & 0x80008000u) | (x >> 4 & 0x07f007f0u));  // the difference of the exponents' biases
}

// 16 rows x 32 columns, as one lane has them: two operands of tensor cores.
struct Fragments {
    std::uint32_t a[2][4];

    // `at`: this lane's 16 bytes.
    DEVICE void load_bf16(const std::uint8_t* at) {
#pragma unroll
        for (int f = 0; f < 2; ++f) {
            const Quad half = *reinterpret_cast<const Quad*>(at + f * kWeightUnit);
#pragma unroll
            for (int i = 0; i < 4; ++i) a[f][i] = half.v[i];
        }
    }
    DEVICE void load_e4m3(const std::uint8_t* at) {
        const Quad both = *reinterpret_cast<const Quad*>(at);
#pragma unroll
        for (int f = 0; f < 2; ++f)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                a[f][i] = unpack_e4m3(both.v[f * 2 + i / 2], i % 2);
            }
    }
};

// The steps of a product that one warp multiplies, through all panels. Counters run along: no division, and few registers.
class Weights {
public:
    DEVICE Weights(const Block& block, Ring& ring, const Product& w, int tile)
        : block_(block), ring_(ring), w_(w), tile_(tile), parts_(w.parts) {
        const Panels panels(w, ranks_of(block.launch));
        const int sets = kWarps >> log2_of(w.parts), first = block.warp & (sets - 1);
        const int part = block.warp >> log2_of(sets);
        groups_ = first >= panels.groups ? 0 : first + sets < panels.groups ? 2 : 1;
        unit_bytes_ = panels.unit_bytes;
        group_bytes_ = sets * panels.unit_bytes;
        stride_ = parts_ * panels.step_bytes();
        origin_ = part * panels.step_bytes() + first * panels.unit_bytes + block.lane * 16;
    }

    DEVICE int steps() const { return w_.slice / kStepColumns; }
    DEVICE int groups() const { return groups_; }  // of this warp
    DEVICE int step() const { return step_; }      // of the slice: the one that `load` gave last

    // The next step of this warp before step `end`, which a panel ends at; false: there is none. All lanes of the warp call it.
    template <int kTiles>
    DEVICE bool load(Fragments (&to)[kTiles], int end) {
        const bool more = advance(end);
        if (!more) at_ = 0;  // anything, so that registers are never left as they were, which would keep them all through a launch
        const std::uint8_t* at = block_.ring + at_;
        if (unit_bytes_ == kWeightUnit) {
#pragma unroll
            for (int m = 0; m < kTiles; ++m) to[m].load_e4m3(at + m * group_bytes_);
        } else {
#pragma unroll
            for (int m = 0; m < kTiles; ++m) to[m].load_bf16(at + m * group_bytes_);
        }
        return more;
    }

    // All panels before step `end`, of which this warp multiplies nothing.
    DEVICE void skip(int end) {
        while (advance(end)) {
        }
    }

private:
    DEVICE bool advance(int end) {
        step_ += parts_;
        at_ += stride_;
        while (step_ >= panel_end_) {
            if (open_) leave_panel(block_, ring_);
            open_ = false;
            if (panel_end_ >= end) return false;
            open();
        }
        return true;
    }
    DEVICE void open() {
        block_.wait<true>(&block_.fixed.full[ring_.slot], ring_.parity, tile_, kWeights, ring_.slot);
        step_ = panel_end_ + (block_.warp >> log2_of(kWarps >> log2_of(w_.parts)));
        const int next = panel_end_ + w_.panel_steps;
        panel_end_ = next < steps() ? next : steps();
        at_ = ring_.slot * kSlotBytes + origin_;
        open_ = true;
    }

    const Block& block_;
    Ring& ring_;
    const Product& w_;  // in shared memory: what is needed once a panel is read again
    const int tile_, parts_;
    int groups_, unit_bytes_, group_bytes_, stride_, origin_;
    int step_ = 0, panel_end_ = 0, at_ = 0;
    bool open_ = false;
};

}  // namespace dit4dit::ode
