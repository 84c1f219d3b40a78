// Clusters of blocks of threads as fibers of one CPU thread: each runs until it must meet others, then another one continues,
// chosen at random and without fairness. A barrier or warp instruction that not all of its threads reach ends in an error instead
// of a hang. Threads that ask again and again for something sleep until it changes; now and then one is woken for nothing.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace emulation {

constexpr int kWarp = 32;
constexpr int kComputing = 256;  // threads of sync_computing
constexpr std::size_t kStack = 128 << 10;
constexpr long kMostIdle = 10'000'000;
constexpr std::uint64_t kNight = 10'000;  // ns that pass when all threads sleep; 1 between two looks at the clock

// A place where `size` threads meet: each leaves its operand, the last one does the work for all.
struct Meeting {
    int size = 0, arrived = 0;
    std::string what;
    std::vector<void*> operands;
    std::vector<int> waiting;  // fibers
};

struct Copy {
    void* to;
    const void* from;
    int bytes;
};

struct Block;

// A thread's sums while products run: what they are, and how many products still write them.
struct Lent {
    std::vector<float> values;
    int products = 0;
};

struct Fiber {
    Block* block = nullptr;
    int thread = 0;
    bool started = false, done = false;
    jmp_buf at;
    std::vector<Copy> copies;                // not committed
    std::deque<std::vector<Copy>> committed;  // groups under way
    std::deque<std::pair<std::vector<Copy>, std::uint64_t*>> announced;  // with the barrier on which they arrive
    std::vector<std::function<void()>> products;  // not committed
    std::deque<std::vector<std::function<void()>>> committed_products;
    std::map<float*, Lent> lent;
};

constexpr std::uint32_t kEmpty = 0xffffffffu;  // a word that is not there

// A word on its way to all others. `met`: the block has had a barrier since, so that any of its threads may fence it. `last`: it
// stays on its way until a fence, or until nothing else can happen.
struct Store {
    int fiber;
    std::uint32_t* to;
    std::uint32_t value;
    bool met, last;
};

struct Cluster {
    std::vector<Block*> blocks;
    Meeting all;
};

struct Block {
    int index = 0, rank = 0;
    Cluster* cluster = nullptr;
    std::uint8_t* shared = nullptr;
    std::size_t shared_bytes = 0;
    int threads = 0;
    bool begun = false;
    int done = 0;
    Meeting all, computing;
    std::vector<Meeting> warps, groups;
    std::vector<Store> stores;
    std::unordered_map<std::uintptr_t, int> stored;  // address / 16 -> how many of `stores`

    bool ended() const { return done == threads; }
};

// What happens by itself, later: a copy from global memory, 8 bytes pushed or an arrival from another block, a thread's copies that
// are to arrive on a barrier, a word that a thread of `block` has stored.
struct Event {
    enum Kind { kCopy, kPush, kArrival, kCopies, kStore } kind;
    Block* block;
    void* to;
    const void* from;
    std::uint64_t value;
    int bytes;
    std::uint64_t* barrier;
    int fiber;
};

class Machine {
public:
    Machine(int blocks, int threads, std::size_t shared_bytes, unsigned seed, std::function<void()> kernel, int ranks = 1)
        : random_(seed), pace_(seed % 2 == 0 ? 64 : 4096), kernel_(std::move(kernel)) {
        if (blocks % ranks != 0) throw std::runtime_error("blocks are no multiple of the cluster's");
        const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        const std::size_t rounded = (shared_bytes + page - 1) / page * page;
        for (int b = 0; b < blocks; ++b) {
            auto block = std::make_unique<Block>();
            block->index = b;
            block->rank = b % ranks;
            block->threads = threads;
            if (block->rank == 0) clusters_.push_back(std::make_unique<Cluster>());
            block->cluster = clusters_.back().get();
            block->cluster->blocks.push_back(block.get());
            block->cluster->all.size = ranks * threads;
            // the page after the last byte faults
            std::uint8_t* memory = map(rounded + page, PROT_READ | PROT_WRITE);
            if (mprotect(memory + rounded, page, PROT_NONE) != 0) throw std::runtime_error("mprotect");
            block->shared = memory + rounded - shared_bytes;
            block->shared_bytes = shared_bytes;
            std::memset(memory, 0xff, rounded);  // NaN in every format
            block->all.size = threads;
            block->computing.size = kComputing;
            block->warps.assign(threads / kWarp, Meeting{kWarp, 0, "", {}, {}});
            block->groups.assign(threads / (4 * kWarp), Meeting{4 * kWarp, 0, "", {}, {}});
            blocks_.push_back(std::move(block));
        }
        fibers_.resize(static_cast<std::size_t>(blocks) * threads);
        stacks_ = map(fibers_.size() * kStack, PROT_READ | PROT_WRITE);
        stack_bytes_ = fibers_.size() * kStack;
        for (std::size_t i = 0; i < fibers_.size(); ++i) {
            fibers_[i].block = blocks_[i / threads].get();
            fibers_[i].thread = static_cast<int>(i % threads);
            ready_.push_back(static_cast<int>(i));
        }
        mapped_ = rounded + page;
    }

    ~Machine() {
        for (auto& block : blocks_) {
            const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
            const auto begin = reinterpret_cast<std::uintptr_t>(block->shared) / page * page;
            munmap(reinterpret_cast<void*>(begin), mapped_);
        }
        munmap(stacks_, stack_bytes_);
    }

    void run() {
        std::size_t done = 0;
        while (done < fibers_.size()) {
            // what happens by itself does so at any time, of odd seeds hardly ever before no thread can run
            if (!events_.empty() && (ready_.empty() || chance(pace_)))
                for (std::size_t i = 0, count = 1 + events_.size() / 16; i < count && !events_.empty(); ++i) happen_any();
            if (asleep_ > 0 && chance(256)) wake(sleeping_.begin()->first);
            if (ready_.empty()) {
                if (!events_.empty()) continue;
                if (last_ > 0) {
                    publish_all();
                    continue;
                }
                if (asleep_ == 0)
                    fail("deadlock: " + std::to_string(fibers_.size() - done) + " threads wait for others that never come");
                clock_ += kNight;
                while (asleep_ > 0) wake(sleeping_.begin()->first);
            }
            if (++idle_ > kMostIdle) fail("endless: threads ask again and again for what never comes");
            const std::size_t pick = choose();
            current_ = ready_[pick];
            ready_[pick] = ready_.back();
            ready_.pop_back();
            Fiber& fiber = fibers_[current_];
            fiber.block->begun = true;
            resume(fiber);
            if (!error_.empty()) throw std::runtime_error(error_);
            if (fiber.done) ++done, idle_ = 0, end(fiber);
        }
        publish_all();
    }

    Fiber& self() { return fibers_[current_]; }
    int index() const { return current_; }
    std::uint64_t clock() { return ++clock_; }
    bool chance(unsigned one_of) { return random_() % one_of == 0; }

    // Let others run; come back at any time.
    void yield() {
        ready_.push_back(current_);
        leave();
    }

    // Let others run until someone says that what lies at `place` has changed, or for no reason.
    void sleep(const void* place) {
        sleeping_[place].push_back(current_);
        ++asleep_;
        leave();
    }
    void wake(const void* place) {
        const auto at = sleeping_.find(place);
        if (at == sleeping_.end()) return;
        for (int fiber : at->second) ready_.push_back(fiber);
        asleep_ -= at->second.size();
        sleeping_.erase(at);
    }

    // Wait until all of `meeting` are here. The last one calls `work` with all operands, by thread.
    void meet(Meeting& meeting, const std::string& what, int place, void* operand,
              const std::function<void(std::vector<void*>&)>& work) {
        if (meeting.arrived == 0) {
            meeting.what = what;
            meeting.operands.assign(meeting.size, nullptr);
        }
        if (meeting.what != what) fail("threads of one group are at " + meeting.what + " and at " + what);
        if (meeting.operands[place] != nullptr) fail("a thread came twice to " + what);
        meeting.operands[place] = operand;
        if (++meeting.arrived < meeting.size) {
            meeting.waiting.push_back(current_);
            leave();
            return;
        }
        work(meeting.operands);
        if (meeting.size > kWarp) idle_ = 0;  // warps also meet in loops that wait
        meeting.arrived = 0;
        for (int fiber : meeting.waiting) ready_.push_back(fiber);
        meeting.waiting.clear();
        yield();
    }

    void begin(const Event& event) { events_.push_back(event); }
    std::function<void(std::uint64_t*, int)> arrived_bytes;  // of emulated_target.h, as these barriers are
    std::function<void(std::uint64_t*)> arrived;

    // A word that others see later; those of one thread to one place in their order.
    void store(std::uint32_t* to, std::uint32_t value) {
        Block* block = self().block;
        const bool last = value == kEmpty && chance(8);  // nobody waits for these
        block->stores.push_back({current_, to, value, false, last});
        ++block->stored[reinterpret_cast<std::uintptr_t>(to) / 16];
        if (last)
            ++last_;
        else
            begin({Event::kStore, block, nullptr, nullptr, 0, 0, nullptr, 0});
    }
    // All words that this thread has stored, or seen stored by its block before a barrier, are seen by all.
    void fence() {
        publish(*self().block, [this](const Store& store) { return store.met || store.fiber == current_; });
    }
    // What a thread reads is at least as new as what it has stored there, or its block before a barrier.
    void catch_up(const void* quad) {
        Block& block = *self().block;
        const auto place = reinterpret_cast<std::uintptr_t>(quad) / 16;
        if (block.stored.find(place) == block.stored.end()) return;
        publish(block, [this, place](const Store& store) {
            return (store.met || store.fiber == current_) && reinterpret_cast<std::uintptr_t>(store.to) / 16 == place;
        });
    }
    static void met(Block& block) {
        for (Store& store : block.stores) store.met = true;
    }
    // All arrivals and words on their way from the blocks of the cluster.
    void settle(Cluster& cluster) {
        for (Block* block : cluster.blocks) publish(*block, [](const Store&) { return true; });
        for (std::size_t i = events_.size(); i-- > 0;)
            if (events_[i].kind == Event::kArrival && events_[i].block->cluster == &cluster) happen(i);
    }

    [[noreturn]] void fail(const std::string& why) {
        error_ = why;
        if (inside_) leave();
        throw std::runtime_error(why);
    }

private:
    static std::uint8_t* map(std::size_t bytes, int protection) {
        void* p = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) throw std::runtime_error("mmap");
        return static_cast<std::uint8_t*>(p);
    }

    void happen_any() { happen(random_() % events_.size()); }

    void happen(std::size_t index) {
        const Event event = events_[index];
        events_[index] = events_.back();
        events_.pop_back();
        idle_ = 0;
        switch (event.kind) {
            case Event::kCopy: std::memcpy(event.to, event.from, event.bytes); break;
            case Event::kPush: std::memcpy(event.to, &event.value, event.bytes); break;
            case Event::kArrival: return arrived(event.barrier);
            case Event::kCopies: {
                auto& announced = fibers_[event.fiber].announced;
                const auto [copies, barrier] = std::move(announced.front());
                announced.pop_front();
                for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
                return arrived(barrier);
            }
            case Event::kStore: {
                const std::vector<Store>& stores = event.block->stores;
                std::size_t pick = stores.empty() ? 0 : random_() % stores.size(), index = 0, looked = 0;
                for (; looked < stores.size() && stores[pick].last; ++looked) pick = (pick + 1) % stores.size();
                if (looked == stores.size()) return;  // fenced since
                const std::uint32_t* to = stores[pick].to;
                return publish(*event.block, [to, pick, &index](const Store& store) { return index++ <= pick && store.to == to; });
            }
        }
        arrived_bytes(event.barrier, event.bytes);
    }

    template <class Which>
    void publish(Block& block, const Which& which) {
        std::size_t kept = 0;
        for (const Store& store : block.stores) {
            if (!which(store)) {
                block.stores[kept++] = store;
                continue;
            }
            if (*store.to != store.value) idle_ = 0;
            last_ -= store.last;
            *store.to = store.value;
            const auto place = reinterpret_cast<std::uintptr_t>(store.to) / 16;
            if (--block.stored[place] == 0) block.stored.erase(place);
            wake(reinterpret_cast<const void*>(place * 16));
        }
        block.stores.resize(kept);
    }

    void publish_all() {
        for (const auto& block : blocks_) publish(*block, [](const Store&) { return true; });
    }

    void end(const Fiber& fiber) {
        bool copies = !fiber.copies.empty();
        for (const auto& group : fiber.committed) copies |= !group.empty();
        if (copies) fail("a copy into shared memory outlives its block");
        if (!fiber.lent.empty()) fail("a product outlives its block");
        Block* block = fiber.block;
        if (++block->done < block->threads) return;
        for (const Event& event : events_)
            if (event.block == block && event.kind != Event::kStore)
                fail(event.kind == Event::kPush      ? "a push outlives the block that it goes to"
                     : event.kind == Event::kArrival ? "an arrival outlives the block that it goes to"
                                                     : "a copy into shared memory outlives its block");
    }

    // Of a few at random the one whose warp is in favour, which changes now and then: so warps get far ahead of each other.
    std::size_t choose() {
        const std::uint64_t era = turns_++ / 2048;
        std::size_t best = 0;
        std::uint64_t most = 0;
        for (int i = 0; i < 3; ++i) {
            const std::size_t pick = random_() % ready_.size();
            const std::uint64_t favour = (static_cast<std::uint64_t>(ready_[pick] / kWarp) + 1) * (2 * era + 0x9e3779b97f4a7c15ull);
            const std::uint64_t mixed = (favour ^ favour >> 29) * 0xbf58476d1ce4e5b9ull;
            if (i == 0 || mixed > most) best = pick, most = mixed;
        }
        return best;
    }

    static void trampoline(unsigned low, unsigned high) {
        auto* machine = reinterpret_cast<Machine*>(static_cast<std::uintptr_t>(low) | static_cast<std::uintptr_t>(high) << 32);
        machine->kernel_();
        machine->self().done = true;
        machine->leave();
    }

    void resume(Fiber& fiber) {
        inside_ = true;
        if (_setjmp(home_) == 0) {
            if (fiber.started) _longjmp(fiber.at, 1);
            fiber.started = true;
            ucontext_t context;
            getcontext(&context);
            context.uc_stack.ss_sp = stacks_ + (&fiber - fibers_.data()) * kStack;
            context.uc_stack.ss_size = kStack;
            context.uc_link = nullptr;
            const auto me = reinterpret_cast<std::uintptr_t>(this);
            makecontext(&context, reinterpret_cast<void (*)()>(&trampoline), 2, static_cast<unsigned>(me),
                        static_cast<unsigned>(me >> 32));
            setcontext(&context);
        }
        inside_ = false;
    }

    void leave() {
        if (_setjmp(self().at) == 0) _longjmp(home_, 1);
    }

    std::mt19937 random_;
    unsigned pace_;
    std::function<void()> kernel_;
    std::vector<std::unique_ptr<Cluster>> clusters_;
    std::vector<std::unique_ptr<Block>> blocks_;
    std::vector<Fiber> fibers_;
    std::vector<int> ready_;
    std::vector<Event> events_;
    std::unordered_map<const void*, std::vector<int>> sleeping_;
    std::size_t asleep_ = 0, last_ = 0;
    std::uint8_t* stacks_ = nullptr;
    std::size_t stack_bytes_ = 0, mapped_ = 0;
    jmp_buf home_;
    int current_ = 0;
    std::uint64_t turns_ = 0;
    long idle_ = 0;  // turns since a block last met or something happened
    bool inside_ = false;
    std::uint64_t clock_ = 0;
    std::string error_;
};

inline Machine* machine = nullptr;

}  // namespace emulation
