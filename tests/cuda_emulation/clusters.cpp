// What emulated_target.h says of clusters, barriers and words: small kernels, sound ones and ones with a fault, by name.
// Arguments: name, seed. Prints what the kernel left, number by number, or the error.
#include <cstdio>
#include <cstdlib>

#include "emulated_target.h"

using namespace dit4dit::target;

namespace {

constexpr int kRanks = 4, kBlocks = 2 * kRanks, kThreads = 288, kComputing = 256;
constexpr int kShared = 16384;
constexpr int kRounds = 5;

float results[kBlocks];
alignas(16) std::uint32_t words[64];
alignas(16) float source[kThreads * 4];

std::uint64_t* barrier(int i) { return reinterpret_cast<std::uint64_t*>(shared_memory()) + i; }
[[maybe_unused]] int rank() { return block_index() % kRanks; }
bool computing() { return thread_index() < kComputing; }
[[maybe_unused]] bool first() { return thread_index() == 0; }
[[maybe_unused]] void wait(std::uint64_t* at, int parity) {
    while (!barrier_try_wait(at, parity)) {
    }
}
[[maybe_unused]] void init(int i, int arrivals) {
    if (first()) barrier_init(barrier(i), arrivals);
}

#if DIT4DIT_BULK_COPIES
enum Fault { kNone, kNoWait, kNoRoom, kFewBytes, kManyArrivals, kOtherBarrier, kOddAddress, kNoEnd, kNoBeginning };

Float2* inbox(int from) {
    return reinterpret_cast<Float2*>(shared_memory() + 1024) + from * kComputing + thread_index();
}

// Every rank gives every rank a number for each computing thread, again and again through one inbox.
void exchange(Fault fault) {
    std::uint64_t *full = barrier(0), *room = barrier(1);
    init(0, 1);
    init(1, kRanks * kComputing / 32);
    if (fault != kNoBeginning) sync_cluster();
    float sum = 0;
    for (int round = 0; computing() && round < kRounds; ++round) {
        if (first()) barrier_expect(full, kRanks * kComputing * 8 - (fault == kFewBytes ? 8 : 0));
        if (fault != kNoRoom) wait(room, (round % 2) ^ 1);
        for (int to = 0; to < kRanks; ++to)
            push(at_rank(inbox(rank()), to) + (fault == kOddAddress ? 4 : 0),
                 {{static_cast<float>(round + 1), static_cast<float>(rank())}},
                 at_rank(full, fault == kOtherBarrier ? (to + 1) % kRanks : to));
        if (fault != kNoWait) wait(full, round % 2);
        for (int from = 0; from < kRanks; ++from) sum += inbox(from)->v[0] * (1 + inbox(from)->v[1]);
        sync_warp();
        const int lane = thread_index() % 32;
        if (lane < kRanks || (fault == kManyArrivals && lane < 2 * kRanks)) arrive_at(at_rank(room, lane % kRanks));
    }
    // 10 for each round's number
    if (computing()) {
        reinterpret_cast<float*>(shared_memory() + 512)[0] = 0;
        sync_computing();
        if (sum != 10.0f * kRounds * (kRounds + 1) / 2) reinterpret_cast<float*>(shared_memory() + 512)[0] = 1;
        sync_computing();
        if (first()) results[block_index()] = reinterpret_cast<float*>(shared_memory() + 512)[0];
    }
    if (fault != kNoEnd) sync_cluster();
}

void bulk(bool expected) {
    init(0, 1);
    sync_block();
    auto* to = reinterpret_cast<float*>(shared_memory() + 1024);
    if (first()) {
        if (expected) barrier_expect(barrier(0), 1024);
        bulk_copy_once(to, source, 1024, barrier(0));
    }
    if (expected) wait(barrier(0), 0);
    if (first()) results[block_index()] = to[0] + to[255];
}
#else
// A thread's copies, twice, and barriers that say that they are there.
void copies(bool wait_for_them, bool tell) {
    init(0, kThreads);
    init(1, kThreads);
    sync_block();
    auto* to = reinterpret_cast<float*>(shared_memory() + 1024) + 4 * thread_index();
    for (int i = 0; i < 2; ++i) {
        copy_async_once(to + i * kThreads * 4, source + 4 * thread_index());
        if (tell) arrive_on_copies(barrier(i));
    }
    if (wait_for_them) wait(barrier(1), 0);  // all before it too
    float sum = 0;
    for (int i = 0; i < 2; ++i) sum += to[i * kThreads * 4];
    if (tell) wait(barrier(0), 0), wait(barrier(1), 0);
    if (thread_index() == kThreads - 1) results[block_index()] = sum;
}
#endif

void store(std::uint32_t* four, std::uint32_t x) {
    for (int i = 0; i < 4; ++i) store_word(four + i, x);
}
bool there(const std::uint32_t* p, std::uint32_t x) { return load_words(p).v[0] == x; }

// Block 1 sees the last four words of block 0: does it see the four before?
void message(bool fenced) {
    if (block_index() > 1 || !first()) return;
    if (block_index() == 0) {
        store(words + 16, 7);
        if (fenced) fence();
        store(words, 1);
    } else {
        while (!there(words, 1)) {
        }
        results[1] = there(words + 16, 7);
    }
}
// The first word is another thread's, before a barrier.
void message_of_block(bool fenced) {
    if (block_index() > 1 || !computing()) return;
    if (block_index() == 0) {
        if (thread_index() == 200) store(words + 16, 7);
        sync_computing();
        if (fenced && first()) fence();
        if (first()) store(words, 1);
    } else if (first()) {
        while (!there(words, 1)) {
        }
        results[1] = there(words + 16, 7);
    }
}
// A thread sees its own words, and its block's after a barrier.
void own_words() {
    if (block_index() > 0) return;
    if (first()) store(words, 1), store(words, 2), results[0] = there(words, 2);
    sync_block();
    if (thread_index() == 99) results[1] = there(words, 2);
}

void run(const std::string& name) {
#if DIT4DIT_BULK_COPIES
    if (name == "exchange") return exchange(kNone);
    if (name == "no wait") return exchange(kNoWait);
    if (name == "no room") return exchange(kNoRoom);
    if (name == "few bytes") return exchange(kFewBytes);
    if (name == "many arrivals") return exchange(kManyArrivals);
    if (name == "other barrier") return exchange(kOtherBarrier);
    if (name == "odd address") return exchange(kOddAddress);
    if (name == "no end") return exchange(kNoEnd);
    if (name == "no beginning") return exchange(kNoBeginning);
    if (name == "bulk") return bulk(true);
    if (name == "bulk left behind") return bulk(false);
    if (name == "rank too far") return static_cast<void>(at_rank(shared_memory(), kRanks));
    if (name == "some at sync_cluster") return rank() == 0 && first() ? void() : sync_cluster();
    if (name == "an arrival too many") {
        init(0, 2);
        if (first()) barrier_expect(barrier(0), 16), barrier_arrive(barrier(0)), barrier_arrive(barrier(0));
        return;
    }
    if (name == "push after the end") {
        init(0, 1);
        sync_cluster();
        if (rank() == 1 || !first()) return;
        for (int i = 0; i < 100; ++i) load_acquire(reinterpret_cast<const int*>(words));  // meanwhile rank 1 ends
        return push(at_rank(shared_memory() + 512, 1), {}, at_rank(barrier(0), 1));
    }
    if (name == "arrival after the end") {
        init(0, 2);
        sync_cluster();
        return rank() == 0 && first() ? arrive_at(at_rank(barrier(0), 1)) : void();
    }
#else
    if (name == "copies") return copies(true, true);
    if (name == "no wait") return copies(false, true);
    if (name == "copies left behind") return copies(false, false);
#endif
    if (name == "message") return message(true);
    if (name == "message without a fence") return message(false);
    if (name == "message of a block") return message_of_block(true);
    if (name == "message of a block without a fence") return message_of_block(false);
    if (name == "own words") return own_words();
    if (name == "all at sync_computing") return sync_computing();
    if (name == "some at sync_computing") return thread_index() < kComputing - 1 ? sync_computing() : void();
    if (name == "never") {
        init(0, 2);
        sync_block();
        if (first()) barrier_arrive(barrier(0));
        return wait(barrier(0), 0);
    }
    if (name == "no such barrier") return barrier_arrive(barrier(0));
    if (name == "twice") return init(0, 1), init(0, 1);
    machine->fail("no such kernel");
}

}  // namespace

int main(int, char** argv) {
    for (auto& word : words) word = 0xffffffffu;
    for (auto& x : source) x = 3;
    const std::string name = argv[1];
    try {
        emulation::Machine machine(kBlocks, kThreads, kShared, static_cast<unsigned>(std::atoi(argv[2])),
                                   [&name] { run(name); }, DIT4DIT_BULK_COPIES ? kRanks : 1);
        emulation::machine = &machine;
        machine.run();
        for (float x : results) std::printf("%g ", x);
    } catch (const std::exception& error) {
        std::printf("%s", error.what());
    }
}
