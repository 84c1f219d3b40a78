// One block: a warp that fetches weights, and eight that compute its team's tiles, step by step.
#pragma once

#include "action_ode_attention.cuh"
#include "action_ode_product.cuh"

namespace dit4dit::ode {

DEVICE void begin(const Block& block) {
    if (block.thread == 0) {
        const int ranks = ranks_of(block.launch);
        block.fixed.failed = block.fixed.apart = 0;
        for (int s = 0; s < block.launch.slots; ++s) {
            barrier_init(&block.fixed.full[s], 32);  // of all lanes that fetch
            barrier_init(&block.fixed.empty[s], kWarps);
        }
        for (int i = 0; i < 2; ++i) {
            barrier_init(&block.fixed.sums[i], 1);
            barrier_init(&block.fixed.room[i], kWarps * ranks);
        }
        fence_barrier_init();
    }
#if DIT4DIT_BULK_COPIES
    if (ranks_of(block.launch) > 1) sync_cluster();  // nobody pushes before all have their barriers
#endif
    sync_block();
}

// The noise, by the threads that will make the step's new words: the last tiles of a team.
DEVICE void start_all(const Block& block, const Moment& now, int first, int last) {
    for (int index = last - 1; index >= first; --index) {
        const Tile& tile = *reinterpret_cast<const Tile*>(block.launch.tiles + index * kRecord);
        if (tile.opcode != kProduct || Block::work<Product>(tile).epilogue != kEuler) return;
        start(block, Block::work<Product>(tile), now.set);
    }
}

DEVICE void compute(const Block& block, int first, int last) {
    const Launch& launch = block.launch;
    const int thread = block.thread;
    Moment now(launch.progress[0]);
    Ring ring;
    start_all(block, now, first, last);
    if (thread < kRecord && first < last) block.fixed.records[0][thread] = load_int(launch.tiles + first * kRecord + thread);
    if (thread == 0) block.fixed.tiles[0] = first, block.fixed.tiles[1] = last;
    sync_computing();
    for (; now.step < launch.steps; now.advance()) {
        fence();  // what was made kEmpty in the step before is so for all that comes of this one
        for (now.tile = block.fixed.tiles[0]; now.tile < block.fixed.tiles[1]; ++now.tile) {
            const int following = now.tile + 1 < block.fixed.tiles[1] ? now.tile + 1 : block.fixed.tiles[0];
            now.count = now.step * (block.fixed.tiles[1] - block.fixed.tiles[0]) + now.tile - block.fixed.tiles[0];
            int next = 0;
            if (thread < kRecord) next = load_int(launch.tiles + following * kRecord + thread);
            // a warp may still be at the tile before, whose record stays; the one before that is free
            if (thread < kRecord) block.fixed.records[(now.count + 1) & 3][thread] = next;
            const Block here(launch, renewed(block.rank), renewed(block.thread));  // else 50 registers would hold what follows from it
            const Tile& tile = reinterpret_cast<const Tile&>(block.fixed.records[now.count & 3]);
            if (tile.opcode == kProduct)
                product(here, ring, tile, now);
            else
                attend(here, ring, tile, now);
        }
    }
}

// The last block to end leaves things as the next launch wants them; of a launch that failed no action and no word is left.
DEVICE void end(const Block& block) {
    const Launch& launch = block.launch;
#if DIT4DIT_BULK_COPIES
    if (ranks_of(launch) > 1) sync_cluster();  // nobody reaches into the memory of a block that has ended
#endif
    sync_block();
    if (block.thread == 0) block.fixed.last = fetch_add(&launch.progress[1]) == launch.teams * ranks_of(launch) - 1;
    sync_block();
    if (!block.fixed.last) return;
    const bool failed = load_acquire(launch.status) != 0;
    if (failed) {
        for (std::int64_t i = block.thread; i < static_cast<std::int64_t>(kSets) * launch.set_words; i += kThreads)
            launch.words[i] = kEmpty;
        for (int i = block.thread; i < launch.batch * launch.horizon * launch.actions; i += kThreads)
            launch.out[i] = as_float(0x7fc00000u);
    }
    if (block.thread == 0) {
        launch.progress[0] = failed ? 0 : (launch.progress[0] + launch.steps) % kSets;
        launch.progress[1] = 0;
    }
}

DEVICE void worker(const Launch& launch) {
    const int team = block_index() / ranks_of(launch);
    const Block block(launch, block_index() - team * ranks_of(launch), thread_index());
    begin(block);
    const int first = load_int(launch.first_tile + team), last = load_int(launch.first_tile + team + 1);
    if (block.warp < kWarps)
        compute(block, first, last);
    else
        fetch(block, first, last);
    end(block);
}

}  // namespace dit4dit::ode
