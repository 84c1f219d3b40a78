// One block: its tiles in order, each when what it reads is there.
#pragma once

#include "action_ode_attention.cuh"
#include "action_ode_product.cuh"

namespace dit4dit::ode {

// False: the launch has failed.
DEVICE bool run(const Block& block, Weights& weights, const Tile& tile, int index) {
    switch (tile.opcode) {
        case kProduct: return product(block, weights, tile, index);
        case kAttend: return attend(block, tile, index);
        default: return start(block, tile, index);
    }
}

// The last block to end leaves all counters at zero for the next launch; of a launch that failed no action is left.
DEVICE void end(const Block& block) {
    const Launch& launch = block.launch;
    sync_block();
    if (thread_index() == 0) block.fixed.alive = fetch_add(block.counter(launch.counter_count)) == launch.workers - 1;
    sync_block();
    if (!block.fixed.alive) return;
    for (int i = thread_index(); i <= launch.counter_count; i += kThreads) *block.counter(i) = 0;
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
        if (thread == 0 && signal != kNone) add_release(block.counter(signal));
    }
    if (thread == 0) block.report();
    weights.drain();
    end(block);
}

}  // namespace dit4dit::ode
