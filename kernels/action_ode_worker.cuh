// One block: its tiles in order, each when what it reads is there.
#pragma once

#include "action_ode_attention.cuh"
#include "action_ode_product.cuh"
#include "action_ode_rows.cuh"

namespace dit4dit::ode {

template <class Work>
DEVICE const Work& work_of(const Tile& tile) {
    static_assert(sizeof(Work) <= sizeof(tile.work), "a record has no room for it");
    return reinterpret_cast<const Work&>(tile.work);
}

// False: the launch has failed.
DEVICE bool run(const Block& block, Weights& weights, const Tile& tile, int index) {
    if (tile.opcode == kAttend) return attend(block, tile, index);
    if (!block.wait(tile, index)) return false;
    switch (tile.opcode) {
        case kStart: start(block, work_of<Start>(tile)); break;
        case kProduct: product(block, weights, work_of<Product>(tile)); break;
        case kNorm: norm(block, work_of<Norm>(tile)); break;
        case kCombine: combine(block, work_of<Combine>(tile)); break;
        default: euler(block, work_of<Euler>(tile)); break;
    }
    return true;
}

// The last block to end leaves all counters at zero for the next launch; of a launch that failed no action is left.
DEVICE void end(const Block& block) {
    const Launch& launch = block.launch;
    sync_block();
    if (thread_index() == 0) block.fixed.alive = fetch_add(launch.counters + launch.counter_count) == launch.workers - 1;
    sync_block();
    if (!block.fixed.alive) return;
    for (int i = thread_index(); i <= launch.counter_count; i += kThreads) launch.counters[i] = 0;
    if (load_acquire(launch.status) != 0)
        for (int i = thread_index(); i < launch.batch * launch.horizon * launch.actions; i += kThreads)
            launch.out[i] = as_float(0x7fc00000u);
}

DEVICE void worker(const Launch& launch) {
    const Block block(launch);
    Weights weights(block);
    int index = load_int(launch.first_tile + block_index());
    const int last = load_int(launch.first_tile + block_index() + 1);
    const int thread = thread_index();
    if (thread < kRecord && index < last) block.fixed.records[index & 1][thread] = load_int(launch.tiles + index * kRecord + thread);
    sync_block();
    for (; index < last; ++index) {
        const Tile& tile = reinterpret_cast<const Tile&>(block.fixed.records[index & 1]);
        int next = 0;
        const bool more = thread < kRecord && index + 1 < last;
        if (more) next = load_int(launch.tiles + (index + 1) * kRecord + thread);
        if (!run(block, weights, tile, index)) break;
        if (more) block.fixed.records[(index + 1) & 1][thread] = next;
        const int signal = tile.signal;
        sync_block();
        if (thread == 0 && signal != kNone) add_release(launch.counters + signal);
    }
    weights.drain();
    end(block);
}

}  // namespace dit4dit::ode
