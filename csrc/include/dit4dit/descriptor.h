// Open files that carry locks. A lock (open file description lock, F_OFD_SETLK) is freed when the last descriptor and the last
// mapping of its open file are gone, and fork makes more of both: a child would keep its parent's lock. So a child closes all
// of these descriptors as it begins, and what is mapped is opened once more for the lock.
#pragma once

#include <fcntl.h>
#include <pthread.h>
#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <utility>
#include <vector>

#ifndef __linux__
#error "dit4dit/action_stream.h: shared memory with locks of open file descriptions needs Linux"
#endif

namespace dit4dit::detail {

class Descriptors {
  public:
    // Never destroyed: a child may be forked while the process ends.
    static Descriptors& all() {
        static Descriptors* const one = new Descriptors;
        return *one;
    }

    // The mutex is held from before open until the descriptor is noted: none reaches a child unseen.
    int open(const char* path, int flags, mode_t mode) {
        const std::lock_guard<std::mutex> guard(mutex_);
        open_.reserve(open_.size() + 1);
        const int fd = ::open(path, flags | O_CLOEXEC, mode);
        if (fd >= 0) open_.push_back(fd);
        return fd;
    }

    void close(int fd) noexcept {
        const std::lock_guard<std::mutex> guard(mutex_);
        for (int& other : open_) {
            if (other != fd) continue;
            other = open_.back();
            open_.pop_back();
            ::close(fd);
            return;
        }
    }

    // How many forks lie between the first process and this one.
    unsigned generation() const noexcept { return generation_.load(std::memory_order_relaxed); }

  private:
    Descriptors() {
        pthread_atfork([] { all().mutex_.lock(); }, [] { all().mutex_.unlock(); }, [] { all().forked(); });
    }

    void forked() noexcept {
        for (const int fd : open_) ::close(fd);
        open_.clear();
        generation_.fetch_add(1, std::memory_order_relaxed);
        mutex_.unlock();
    }

    std::mutex mutex_;
    std::vector<int> open_;
    std::atomic<unsigned> generation_{0};
};

// A file that is closed with its owner, and in a forked child.
class Descriptor {
  public:
    Descriptor() = default;
    // errno says why, where the result is false.
    Descriptor(const char* path, int flags, mode_t mode = 0) : fd_(Descriptors::all().open(path, flags, mode)) {}
    Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)), born_(other.born_) {}
    Descriptor& operator=(Descriptor&& other) noexcept {
        std::swap(fd_, other.fd_);
        std::swap(born_, other.born_);
        return *this;
    }
    ~Descriptor() {
        // the number may be another file's in a child, where this one is closed
        if (fd_ >= 0 && !forked()) Descriptors::all().close(fd_);
    }

    explicit operator bool() const noexcept { return fd_ >= 0; }
    int get() const noexcept { return fd_; }
    // This process is a child of the one that opened it.
    bool forked() const noexcept { return Descriptors::all().generation() != born_; }

  private:
    int fd_ = -1;
    unsigned born_ = Descriptors::all().generation();
};

}  // namespace dit4dit::detail
