// The producer's side of an action stream: checks chunks, publishes them and says that it lives.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <memory>
#include <string>
#include <utility>

#include "refusal.h"
#include "segment.h"

namespace dit4dit {

struct WriterOptions {
    unsigned mode = 0600;                       // of a segment that is made
    std::int64_t alive_period_ns = 10'000'000;  // between two stamps of the thread that says that the process lives; 0: no thread
};

namespace detail {

// Stamps that the process lives, from a thread of its own: a producer whose loop waits for a GPU is not dead. Not std::thread,
// whose failure is an exception: controllers are built without them.
class Alive {
  public:
    Alive(std::shared_ptr<Memory> memory, std::int64_t period_ns) : memory_(std::move(memory)), period_ns_(period_ns) {
        // signals are for the threads of the program
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        error_ = pthread_create(&thread_, nullptr, run, this);
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    ~Alive() {
        stop_.store(true, std::memory_order_relaxed);
        if (error_ == 0) pthread_join(thread_, nullptr);
    }
    Alive(const Alive&) = delete;
    Alive& operator=(const Alive&) = delete;

    // Why there is no thread; 0: there is one.
    int error() const noexcept { return error_; }

  private:
    static void* run(void* given) noexcept {
        const Alive& self = *static_cast<const Alive*>(given);
        while (!self.stop_.load(std::memory_order_relaxed)) {
            stamp_alive(self.memory_->writable(), monotonic_ns());
            const timespec period{self.period_ns_ / 1'000'000'000, static_cast<long>(self.period_ns_ % 1'000'000'000)};
            clock_nanosleep(CLOCK_MONOTONIC, 0, &period, nullptr);
        }
        return nullptr;
    }

    std::shared_ptr<Memory> memory_;
    std::int64_t period_ns_;
    std::atomic<bool> stop_{false};
    pthread_t thread_{};
    int error_;
};

}  // namespace detail

// Movable. publish and close are for one thread at a time; heartbeat, estop, clear_estop and feedback for any.
class Writer {
  public:
    // "/dit4dit.g1". Takes over the segment of a dead producer and refuses that of a live one, with its process id:
    // Memory::produce.
    static Result<Writer> open_or_create(const std::string& name, const Layout& layout, WriterOptions options = {});
    static Result<Writer> in_process(const Layout& layout);
    // Takes the name of a segment without a producer away: Memory::remove.
    static Result<bool> remove(const std::string& name) { return Memory::remove(name); }

    Writer(Writer&&) noexcept = default;
    Writer& operator=(Writer&& other) noexcept {
        if (this == &other) return *this;
        close(monotonic_ns());
        memory_ = std::move(other.memory_);
        thread_ = std::move(other.thread_);
        return *this;
    }
    ~Writer() { close(monotonic_ns()); }

    // Refused, with nothing changed: NaN and inf, a stride below the layout's channels, rows beyond 1 to kMaxRows, control_hz
    // beyond kLeastControlHz to kMostControlHz, anything but observed_at <= computed_at <= now_ns, an observation older than
    // the last chunk's, starts_at farther than kFarthestStart from observed_at, and a binary channel that is neither 0 nor 1.
    Refusal publish(const Chunk& chunk, std::int64_t now_ns) noexcept;
    // The producer's own loop goes round; publish says so too.
    void heartbeat(std::int64_t now_ns) noexcept {
        if (memory_->holds(Role::producer)) stamp_loop(memory_->writable(), now_ns);
    }
    // Readers see a dead producer from now on. Frees the lock and keeps the segment; may take one alive_period.
    void close(std::int64_t now_ns) noexcept;

    void estop(std::int64_t now_ns) noexcept { dit4dit::estop(memory_->writable(), now_ns); }
    void clear_estop() noexcept { dit4dit::clear_estop(memory_->writable()); }
    bool feedback(DriverFeedback& sent) const noexcept { return read_feedback(memory_->segment(), sent); }

    const Layout& layout() const noexcept { return memory_->layout(); }
    // For a Reader in this process.
    std::shared_ptr<Memory> memory() const noexcept { return memory_; }

  private:
    explicit Writer(std::shared_ptr<Memory> memory) noexcept : memory_(std::move(memory)) {}

    std::int64_t last_observed_at() const noexcept;

    std::shared_ptr<Memory> memory_;
    std::unique_ptr<detail::Alive> thread_;
};

inline Result<Writer> Writer::open_or_create(const std::string& name, const Layout& layout, WriterOptions options) {
    Result<std::shared_ptr<Memory>> memory = Memory::produce(name, layout, options.mode);
    if (!memory) return Error{memory.error()};
    Writer writer(*memory);
    if (options.alive_period_ns <= 0) return writer;
    writer.thread_ = std::make_unique<detail::Alive>(*memory, options.alive_period_ns);
    if (const int error = writer.thread_->error())
        return detail::failed(name, "a thread for the stamp that says that the producer lives", error);
    return writer;
}

inline Result<Writer> Writer::in_process(const Layout& layout) {
    Result<std::shared_ptr<Memory>> memory = Memory::in_process(layout);
    if (!memory) return Error{memory.error()};
    return Writer(*memory);
}

inline void Writer::close(std::int64_t now_ns) noexcept {
    if (!memory_) return;  // moved from
    if (memory_->forked()) {
        // the thread is the parent's; a child has nothing to join
        static_cast<void>(thread_.release());
        return;
    }
    thread_.reset();
    if (!memory_->holds(Role::producer)) return;
    memory_->writable().header.stamps.closed_at.store(now_ns ? now_ns : 1, std::memory_order_release);
    memory_->unlock(Role::producer);
}

// Of the chunk at the head, which may be an earlier producer's; 0: there is none.
inline std::int64_t Writer::last_observed_at() const noexcept {
    const Segment& segment = memory_->segment();
    const std::uint64_t id = head(segment);
    return id ? segment.slot[(id - 1) % kSlots].observed_at.load(std::memory_order_relaxed) : 0;
}

inline Refusal Writer::publish(const Chunk& chunk, std::int64_t now_ns) noexcept {
    if (!memory_->holds(Role::producer))
        return detail::refuse(memory_->forked() ? Refusal::Why::forked : Refusal::Why::closed);
    const Refusal refusal = check(layout(), chunk, last_observed_at(), now_ns);
    if (!refusal) dit4dit::publish(memory_->writable(), chunk, now_ns);
    return refusal;
}

}  // namespace dit4dit
