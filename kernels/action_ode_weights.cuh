// Weights on their way: a warp fetches panels of this rank, one behind the other in the order of the tiles, as far ahead as there are
// slots; the computing warps take fragments from them. dit4dit/engine/action_ode/weights.py says how a panel lies.
#pragma once

#include "action_ode_block.cuh"

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
        block.wait<false>(&block.fixed.full[s], s < ring.slot ? ring.parity : ring.parity ^ 1, kNone, kWeights, s, true);
#else
    commit_copies();
    wait_copies<0>();
#endif
}

DEVICE void fetch_panel(const Block& block, const Ring& ring, const std::uint8_t* from, int bytes) {
    std::uint8_t* to = block.ring + ring.slot * kSlotBytes;
    std::uint64_t* full = &block.fixed.full[ring.slot];
#if DIT4DIT_BULK_COPIES
    barrier_expect(full, bytes);
    bulk_copy_once(to, from, bytes, full);
#else
    for (int at = block.lane * 16; at < bytes; at += 32 * 16) copy_async_once(to + at, from + at);
    arrive_on_copies(full);
#endif
}

// Whether the launch has failed, the same for all lanes that fetch.
DEVICE bool stop_fetching(const Block& block) {
#if DIT4DIT_BULK_COPIES
    return block.failed();
#else
    return any_lane(block.failed());
#endif
}

// Tiles `first` to `last` - 1, of all steps. One lane is enough for bulk copies.
DEVICE void fetch_weights(const Block& block, int first, int last) {
    const Launch& launch = block.launch;
    if (DIT4DIT_BULK_COPIES && block.lane != 0) return;
    Ring ring;
    bool stop = false;
    for (int step = 0; step < launch.steps && !stop; ++step)
        for (int index = first; index < last && !stop; ++index) {
            const Tile& tile = *reinterpret_cast<const Tile*>(launch.tiles + index * kRecord);
            if (tile.opcode != kProduct) continue;
            const Product& w = Block::work<Product>(tile);
            const Panels panels(w, ranks_of(launch));
            const std::uint8_t* from =
                launch.weights + (w.weight + static_cast<std::int64_t>(block.rank) * w.rank_units) * kWeightUnit;
            for (int done = 0; done < panels.steps; done += panels.panel_steps) {
                block.wait<!DIT4DIT_BULK_COPIES>(&block.fixed.empty[ring.slot], ring.parity ^ 1, index, kRoomForWeights, ring.slot);
                stop = stop_fetching(block);
                if (stop) break;
                const int bytes = panels.length(done) * panels.step_bytes();
                fetch_panel(block, ring, from, bytes);
                from += bytes;
                ring.advance(launch.slots);
            }
        }
    drain(block, ring);
}

// -- the warps that compute --------------------------------------------------------------------------------------------------

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
            if (open_) leave();
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
    // This warp has read what it needs of the panel.
    DEVICE void leave() {
        sync_warp();
        if (block_.lane == 0 && !block_.failed()) barrier_arrive(&block_.fixed.empty[ring_.slot]);
        ring_.advance(block_.launch.slots);
        open_ = false;
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
