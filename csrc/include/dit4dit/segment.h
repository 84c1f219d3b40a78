// The memory that a Segment lies in: of one process, or shared under a name such as "/dit4dit.g1" (a file of that name in
// /dev/shm).
//
// A shared segment appears at once and complete: it is written without a name and linked then. Nothing that is not a segment of
// ours, of this version and size, is ever written to or deleted.
#pragma once

#include <sys/mman.h>

#include <cerrno>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "descriptor.h"
#include "layout_check.h"
#include "result.h"
#include "ring.h"
#include "segment_check.h"

namespace dit4dit {

// watch: mapped read-only. use: what readers (estop, feedback) and producers need.
enum class Access { watch, use };

// Each is one's at a time, and is free again when its process ends, however it does. The values are bytes of the file that are
// locked.
enum class Role { producer = 0, driver = 1 };

class Memory {
  public:
    // What is there under the name. An error for anything but a complete segment of this version and size.
    static Result<std::shared_ptr<Memory>> open(const std::string& name, Access access);
    // Made if it is not there; with the producer's lock, or an error that names who has it. The segment of a dead producer is
    // taken over: its ids continue if the layout is the same, and it is replaced if not, unless a driver is at work on it.
    static Result<std::shared_ptr<Memory>> produce(const std::string& name, const Layout& layout, unsigned mode = 0600);
    // Memory that threads of this process share; a forked child has a copy. With the producer's lock.
    static Result<std::shared_ptr<Memory>> in_process(const Layout& layout);
    // Takes the name away; who has the segment open keeps it. True: it is gone, or was not there. An error where a producer or a
    // driver is at work on it, and for what is no segment of dit4dit (of any version).
    static Result<bool> remove(const std::string& name);

    ~Memory() {
        if (address_) munmap(address_, sizeof(Segment));
    }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    const Segment& segment() const noexcept { return *segment_; }
    // Only with Access::use.
    Segment& writable() noexcept { return *segment_; }
    const Layout& layout() const noexcept { return segment_->header.layout; }
    const std::string& name() const noexcept { return name_; }  // empty: of one process
    Access access() const noexcept { return access_; }
    bool shared() const noexcept { return !name_.empty(); }

    // False: another one has it, of whichever process (errno is EAGAIN), or the name is another segment's by now (ESTALE).
    bool lock(Role role) noexcept;
    void unlock(Role role) noexcept;
    // Whether this Memory has it; never in a child forked since. No system call.
    bool holds(Role role) const noexcept {
        return held_[static_cast<int>(role)].load(std::memory_order_relaxed) && !forked();
    }
    // Whether anybody has it.
    bool locked(Role role) const noexcept;
    // This process was forked from the one that opened the shared segment, whose part it must not play.
    bool forked() const noexcept { return shared() && file_.forked(); }

  private:
    Memory() = default;

    static Result<std::shared_ptr<Memory>> adopt(const std::string& name, detail::Descriptor file, Access access);
    // Null: there is something of that name meanwhile.
    static Result<std::shared_ptr<Memory>> create(const std::string& name, const Layout& layout, unsigned mode);
    bool map(Access access, int file) noexcept;
    bool open_for_locks(int file) noexcept;
    void fill(const Layout& layout) noexcept;
    void begin() noexcept;
    static detail::Descriptor new_file(unsigned mode, std::string& hidden);
    std::string prepare(int file, const Layout& layout, unsigned mode);
    bool give_name(int file, const std::string& hidden) const noexcept;
    bool has_its_name() const noexcept;
    enum class Taken { yes, no, again };
    Taken take_over(const Layout& layout, std::string& why);
    bool set_lock(Role role, short type) const noexcept;

    std::string name_;
    detail::Descriptor file_;  // that locks are on
    Access access_ = Access::use;
    void* address_ = nullptr;
    Segment* segment_ = nullptr;
    std::atomic<bool> held_[2] = {{false}, {false}};
};

// -- locks -----------------------------------------------------------------------------------------

inline bool Memory::set_lock(Role role, short type) const noexcept {
    struct flock range{};
    range.l_type = type;
    range.l_whence = SEEK_SET;
    range.l_start = static_cast<off_t>(role);
    range.l_len = 1;
    return fcntl(file_.get(), F_OFD_SETLK, &range) == 0;
}

inline bool Memory::lock(Role role) noexcept {
    // within this Memory the file's lock does not tell one from another
    errno = EAGAIN;
    std::atomic<bool>& held = held_[static_cast<int>(role)];
    if (forked() || held.exchange(true)) return false;
    if (!shared()) return true;
    if (set_lock(role, F_WRLCK)) {
        if (has_its_name()) return true;
        set_lock(role, F_UNLCK);
        errno = ESTALE;
    }
    held.store(false);
    return false;
}

// Whether the file that this one has open is the one under its name: it may have been replaced since open.
inline bool Memory::has_its_name() const noexcept {
    struct stat own{}, named{};
    return fstat(file_.get(), &own) == 0 && lstat(detail::path_of(name_).c_str(), &named) == 0 && own.st_ino == named.st_ino &&
           own.st_dev == named.st_dev;
}

inline void Memory::unlock(Role role) noexcept {
    if (!holds(role)) return;
    if (shared()) set_lock(role, F_UNLCK);
    held_[static_cast<int>(role)].store(false);
}

inline bool Memory::locked(Role role) const noexcept {
    if (holds(role)) return true;
    if (!shared() || forked()) return false;
    struct flock range{};
    range.l_type = F_WRLCK;
    range.l_whence = SEEK_SET;
    range.l_start = static_cast<off_t>(role);
    range.l_len = 1;
    return fcntl(file_.get(), F_OFD_GETLK, &range) == 0 && range.l_type != F_UNLCK;
}

// -- what is found under a name --------------------------------------------------------------------

inline bool Memory::map(Access access, int file) noexcept {
    access_ = access;
    const int protection = access == Access::watch ? PROT_READ : PROT_READ | PROT_WRITE;
    const int flags = MAP_POPULATE | (shared() ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS);
    void* address = mmap(nullptr, sizeof(Segment), protection, flags, file, 0);
    if (address == MAP_FAILED) return false;
    address_ = address;
    segment_ = static_cast<Segment*>(address);
    // where it is not allowed to stay in memory, pages may be swapped out, and a read may take longer
    static_cast<void>(mlock(address, sizeof(Segment)));
    return true;
}

// The same file once more: a mapping keeps the open file that it was made of, locks and all, and a forked child has the mapping.
inline bool Memory::open_for_locks(int file) noexcept {
    char own[64];
    std::snprintf(own, sizeof own, "/proc/self/fd/%d", file);
    file_ = detail::Descriptor(own, access_ == Access::watch ? O_RDONLY : O_RDWR);
    return static_cast<bool>(file_);
}

inline Result<std::shared_ptr<Memory>> Memory::adopt(const std::string& name, detail::Descriptor file, Access access) {
    std::string why = detail::why_foreign(name, file.get());
    if (!why.empty()) return Error{why};
    std::shared_ptr<Memory> memory(new Memory);
    memory->name_ = name;
    if (!memory->map(access, file.get())) return detail::failed(name, "mmap", errno);
    if (!memory->open_for_locks(file.get())) return detail::failed(name, "open once more, in /proc", errno);
    why = why_bad(memory->layout());
    if (!why.empty()) return Error{name + ": its layout is corrupt (" + why + "); remove it (rm " + detail::path_of(name) + ")"};
    return memory;
}

inline Result<std::shared_ptr<Memory>> Memory::open(const std::string& name, Access access) {
    const std::string why = detail::why_bad_name(name);
    if (!why.empty()) return Error{why};
    const int flags = (access == Access::watch ? O_RDONLY : O_RDWR) | O_NOFOLLOW | O_NONBLOCK;
    detail::Descriptor file(detail::path_of(name).c_str(), flags);
    if (file) return adopt(name, std::move(file), access);
    if (errno == ENOENT) return Error{name + ": there is no such segment; start the producer first"};
    return detail::failed(name, "open", errno);
}

inline Result<bool> Memory::remove(const std::string& name) {
    std::string why = detail::why_bad_name(name);
    if (!why.empty()) return Error{why};
    Memory memory;
    memory.name_ = name;
    memory.file_ = detail::Descriptor(detail::path_of(name).c_str(), O_RDWR | O_NOFOLLOW | O_NONBLOCK);
    if (!memory.file_) return errno == ENOENT ? Result<bool>(true) : Result<bool>(detail::failed(name, "open", errno));
    Word magic{0};
    if (pread(memory.file_.get(), &magic, sizeof magic, 0) != static_cast<ssize_t>(sizeof magic) || magic.load() != kMagic)
        return Error{name + " is no segment of dit4dit and is left alone; remove it yourself (rm " + detail::path_of(name) + ")"};
    // held until the name is gone: nobody takes it over meanwhile. Of a driver too: its robot would have a second one soon
    for (const Role role : {Role::producer, Role::driver}) {
        if (memory.lock(role)) continue;
        if (errno == ESTALE) return true;
        return Error{name + ": a " + (role == Role::producer ? "producer" : "driver") + " is at work on it; close it first"};
    }
    if (unlink(detail::path_of(name).c_str()) == 0 || errno == ENOENT) return true;
    return detail::failed(name, "unlink", errno);
}

// -- making one ------------------------------------------------------------------------------------

// A producer begins, on a new segment or on a dead one's.
inline void Memory::begin() noexcept {
    Stamps& stamps = segment_->header.stamps;
    const std::int64_t now = monotonic_ns();
    stamps.producer.store(static_cast<std::uint64_t>(getpid()), std::memory_order_release);
    stamps.producers.fetch_add(1, std::memory_order_acq_rel);
    stamps.loop_at.store(now, std::memory_order_release);
    stamps.alive_at.store(now, std::memory_order_release);
    stamps.closed_at.store(0, std::memory_order_release);
}

inline void Memory::fill(const Layout& layout) noexcept {
    new (address_) Segment{};
    Header& header = segment_->header;
    header.version = kVersion;
    header.bytes = sizeof(Segment);
    header.header_bytes = sizeof(Header);
    header.slot_bytes = sizeof(Slot);
    header.slots = kSlots;
    header.max_rows = kMaxRows;
    header.max_channels = kMaxChannels;
    header.max_groups = kMaxGroups;
    header.shared = shared();
    header.created_at = monotonic_ns();
    header.layout = layout;
    begin();
    header.magic.store(kMagic, std::memory_order_release);
}

inline Result<std::shared_ptr<Memory>> Memory::in_process(const Layout& layout) {
    const std::string why = why_bad(layout);
    if (!why.empty()) return Error{why};
    std::shared_ptr<Memory> memory(new Memory);
    if (!memory->map(Access::use, -1)) return detail::failed("action stream", "mmap", errno);
    memory->fill(layout);
    memory->lock(Role::producer);
    return memory;
}

// A file of /dev/shm that nobody else can open yet: without a name, or where that is unsupported under `hidden`, a name of its
// own.
inline detail::Descriptor Memory::new_file(unsigned mode, std::string& hidden) {
    hidden.clear();
#ifndef DIT4DIT_WITHOUT_TMPFILE
    detail::Descriptor file("/dev/shm", O_TMPFILE | O_RDWR, mode);
    if (file || (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL)) return file;
#endif
    static std::atomic<unsigned> count{0};
    hidden = "/dev/shm/.dit4dit." + std::to_string(getpid()) + "." + std::to_string(count.fetch_add(1));
    unlink(hidden.c_str());  // of a process of this id that died before it was done
    return detail::Descriptor(hidden.c_str(), O_CREAT | O_EXCL | O_RDWR | O_NOFOLLOW, mode);
}

// False: errno says why; EEXIST: there is something of that name.
inline bool Memory::give_name(int file, const std::string& hidden) const noexcept {
    const std::string path = detail::path_of(name_);
    if (!hidden.empty()) return ::link(hidden.c_str(), path.c_str()) == 0;
    char own[64];
    std::snprintf(own, sizeof own, "/proc/self/fd/%d", file);
    return linkat(AT_FDCWD, own, AT_FDCWD, path.c_str(), AT_SYMLINK_FOLLOW) == 0;
}

// Everything before the name: an error says what failed.
inline std::string Memory::prepare(int file, const Layout& layout, unsigned mode) {
    if (file < 0) return detail::failed(name_, "a new file in /dev/shm", errno).text;
    if (fchmod(file, mode) != 0) return detail::failed(name_, "fchmod", errno).text;
    // not ftruncate: where /dev/shm is full, the first write to a page would kill the process
    const int error = posix_fallocate(file, 0, sizeof(Segment));
    if (error) return detail::failed(name_, "no room in /dev/shm", error).text;
    if (!map(Access::use, file)) return detail::failed(name_, "mmap", errno).text;
    if (!open_for_locks(file)) return detail::failed(name_, "open once more, in /proc", errno).text;
    if (!set_lock(Role::producer, F_WRLCK)) return detail::failed(name_, "lock", errno).text;
    held_[static_cast<int>(Role::producer)].store(true);
    fill(layout);
    return "";
}

inline Result<std::shared_ptr<Memory>> Memory::create(const std::string& name, const Layout& layout, unsigned mode) {
    std::shared_ptr<Memory> memory(new Memory);
    memory->name_ = name;
    std::string hidden;
    const detail::Descriptor file = new_file(mode, hidden);
    const std::string why = memory->prepare(file.get(), layout, mode);
    const int error = !why.empty() || memory->give_name(file.get(), hidden) ? 0 : errno;
    if (!hidden.empty()) unlink(hidden.c_str());
    if (!why.empty()) return Error{why};
    if (error == EEXIST) return std::shared_ptr<Memory>();
    if (error) return detail::failed(name, "link", error);
    return memory;
}

inline Memory::Taken Memory::take_over(const Layout& layout, std::string& why) {
    if (!lock(Role::producer)) {
        if (errno == ESTALE) return Taken::again;
        const std::uint64_t producer = segment_->header.stamps.producer.load(std::memory_order_acquire);
        why = name_ + ": process " + std::to_string(producer) + " is its producer and lives; end it, or use another name";
        if (errno != EAGAIN && errno != EACCES) why = detail::failed(name_, "lock", errno).text;
        return Taken::no;
    }
    const std::string other = difference(this->layout(), layout);
    if (other.empty()) {
        begin();
        return Taken::yes;
    }
    // kept while the name goes: no driver begins on what is about to be replaced
    if (!lock(Role::driver)) {
        const std::uint64_t driver = segment_->header.feedback.driver.load(std::memory_order_acquire);
        const std::string which = driver ? " (process " + std::to_string(driver) + ")" : "";  // it has not read yet
        why = name_ + ": a driver" + which + " is at work on another layout: " + other +
              "; end the driver, or use another name";
        return Taken::no;
    }
    if (unlink(detail::path_of(name_).c_str()) == 0 || errno == ENOENT) return Taken::again;
    why = detail::failed(name_, "unlink", errno).text;
    return Taken::no;
}

inline Result<std::shared_ptr<Memory>> Memory::produce(const std::string& name, const Layout& layout, unsigned mode) {
    std::string why = detail::why_bad_name(name);
    if (why.empty() && !(why = why_bad(layout)).empty()) why = name + ": " + why;
    if (!why.empty()) return Error{why};
    constexpr int tries = 100;  // each means that somebody else made or removed it meanwhile
    for (int i = 0; i < tries; ++i) {
        detail::Descriptor file(detail::path_of(name).c_str(), O_RDWR | O_NOFOLLOW | O_NONBLOCK);
        if (!file) {
            if (errno != ENOENT) return detail::failed(name, "open", errno);
            Result<std::shared_ptr<Memory>> made = create(name, layout, mode);
            if (!made || *made) return made;
            continue;
        }
        Result<std::shared_ptr<Memory>> found = adopt(name, std::move(file), Access::use);
        if (!found) return found;
        switch ((*found)->take_over(layout, why)) {
            case Taken::yes: return found;
            case Taken::no: return Error{why};
            case Taken::again: break;
        }
    }
    return Error{name + ": other processes make and remove it all the time; use another name"};
}

}  // namespace dit4dit
