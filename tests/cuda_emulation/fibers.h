// Blocks of threads as fibers of one CPU thread: each runs until it must meet others, then another one goes on, chosen at
// random and without fairness. A barrier or warp instruction that not all of its threads reach ends in an error instead of a hang.
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
#include <vector>

namespace emulation {

constexpr int kWarp = 32;
constexpr std::size_t kStack = 128 << 10;
constexpr long kMostIdle = 5'000'000;

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
    std::uint64_t* barrier;
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
    std::vector<std::function<void()>> products;  // not committed
    std::deque<std::vector<std::function<void()>>> committed_products;
    std::map<float*, Lent> lent;
};

struct Block {
    int index = 0;
    std::uint8_t* shared = nullptr;
    std::size_t shared_bytes = 0;
    Meeting all;
    std::vector<Meeting> warps, groups;
};

class Machine {
public:
    Machine(int blocks, int threads, std::size_t shared_bytes, unsigned seed, std::function<void()> kernel)
        : random_(seed), kernel_(std::move(kernel)) {
        const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        const std::size_t rounded = (shared_bytes + page - 1) / page * page;
        for (int b = 0; b < blocks; ++b) {
            auto block = std::make_unique<Block>();
            block->index = b;
            // the page after the last byte faults
            std::uint8_t* memory = map(rounded + page, PROT_READ | PROT_WRITE);
            if (mprotect(memory + rounded, page, PROT_NONE) != 0) throw std::runtime_error("mprotect");
            block->shared = memory + rounded - shared_bytes;
            block->shared_bytes = shared_bytes;
            std::memset(memory, 0xff, rounded);  // NaN in every format
            block->all.size = threads;
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
            // the copy engine works when it likes, at the latest when nobody else can
            if (!engine_.empty() && (ready_.empty() || random_() % 64 == 0)) land_any();
            if (ready_.empty()) {
                if (!engine_.empty()) continue;
                fail("deadlock: " + std::to_string(fibers_.size() - done) + " threads wait for others that never come");
            }
            if (++idle_ > kMostIdle) fail("endless: threads ask again and again for what never comes");
            const std::size_t pick = choose();
            current_ = ready_[pick];
            ready_[pick] = ready_.back();
            ready_.pop_back();
            resume(fibers_[current_]);
            if (!error_.empty()) throw std::runtime_error(error_);
            if (fibers_[current_].done) ++done, idle_ = 0;
        }
        if (!engine_.empty()) throw std::runtime_error("a copy into shared memory outlives its block");
        for (const Fiber& fiber : fibers_) {
            for (const auto& group : fiber.committed)
                if (!group.empty()) throw std::runtime_error("a copy into shared memory outlives its block");
            if (!fiber.lent.empty()) throw std::runtime_error("a product outlives its block");
        }
    }

    Fiber& self() { return fibers_[current_]; }
    std::uint64_t clock() { return clock_ += 1000; }

    // Let others run; come back at any time.
    void yield() {
        ready_.push_back(current_);
        leave();
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
        idle_ = 0;
        meeting.arrived = 0;
        for (int fiber : meeting.waiting) ready_.push_back(fiber);
        meeting.waiting.clear();
        yield();
    }

    void engine_copy(const Copy& copy) { engine_.push_back(copy); }
    std::function<void(std::uint64_t*, int)> arrived_bytes;

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

    void land_any() {
        const std::size_t pick = random_() % engine_.size();
        const Copy copy = engine_[pick];
        engine_[pick] = engine_.back();
        engine_.pop_back();
        std::memcpy(copy.to, copy.from, copy.bytes);
        arrived_bytes(copy.barrier, copy.bytes);
        idle_ = 0;
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
    std::function<void()> kernel_;
    std::vector<std::unique_ptr<Block>> blocks_;
    std::vector<Fiber> fibers_;
    std::vector<int> ready_;
    std::vector<Copy> engine_;
    std::uint8_t* stacks_ = nullptr;
    std::size_t stack_bytes_ = 0, mapped_ = 0;
    jmp_buf home_;
    int current_ = 0;
    std::uint64_t turns_ = 0;
    long idle_ = 0;  // turns since threads last met or a copy came
    bool inside_ = false;
    std::uint64_t clock_ = 0;
    std::string error_;
};

inline Machine* machine = nullptr;

}  // namespace emulation
