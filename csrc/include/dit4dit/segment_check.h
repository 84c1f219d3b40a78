// Whether what lies in /dev/shm under a name is a segment of this version and size, and what to say if not.
#pragma once

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <string>
#include <system_error>
#include <utility>

#include "layout_check.h"
#include "result.h"

namespace dit4dit::detail {

inline std::string path_of(const std::string& name) { return "/dev/shm" + name; }

inline Error failed(const std::string& name, const char* what, int error) {
    const bool foreign = error == EACCES && std::strcmp(what, "open") == 0;
    std::string message = name + ": " + what + ": " + std::generic_category().message(error);
    if (foreign)
        message += "; it belongs to another user: run as that one, or let its group in, chmod g+rw " + path_of(name);
    return {std::move(message)};
}

inline std::string why_bad_name(const std::string& name) {
    constexpr std::size_t longest = 200;
    const bool good = name.size() > 1 && name.size() <= longest && name[0] == '/' && name[1] != '.' &&
                      name.find('/', 1) == std::string::npos && name.find('\0') == std::string::npos;
    return good ? "" : quoted(name) + " is no name for a segment; wanted one such as \"/dit4dit.g1\", with no other slash";
}

inline std::string why_other_size(const std::string& name, const Header& header) {
    const struct {
        const char* field;
        std::uint64_t have, wanted;
    } sizes[] = {
        {"bytes", header.bytes, sizeof(Segment)},
        {"header_bytes", header.header_bytes, sizeof(Header)},
        {"slot_bytes", header.slot_bytes, sizeof(Slot)},
        {"slots", header.slots, kSlots},
        {"max_rows", header.max_rows, kMaxRows},
        {"max_channels", header.max_channels, kMaxChannels},
        {"max_groups", header.max_groups, kMaxGroups},
    };
    for (const auto& size : sizes)
        if (size.have != size.wanted)
            return name + ": " + size.field + " is " + std::to_string(size.have) + ", this program wants " +
                   std::to_string(size.wanted) + "; build producer and reader from the same dit4dit";
    return "";
}

// Looks with pread: a file that is shorter than its mapping would kill the process (SIGBUS).
inline std::string why_foreign(const std::string& name, int file) {
    struct stat found{};
    if (fstat(file, &found) != 0) return failed(name, "fstat", errno).text;
    // only what every version has: the fields before the layout
    constexpr std::size_t fixed = offsetof(Header, layout);
    alignas(Header) unsigned char bytes[sizeof(Header)] = {};
    const Header& header = *reinterpret_cast<const Header*>(bytes);
    const bool whole = S_ISREG(found.st_mode) && pread(file, bytes, fixed, 0) == static_cast<ssize_t>(fixed);
    if (!whole || header.magic.load(std::memory_order_relaxed) != kMagic)
        return name + " is no segment of dit4dit (its magic number is not there) and is left alone; use another name";
    if (header.version != kVersion)
        return name + ": version " + std::to_string(header.version) + ", this program wants " + std::to_string(kVersion) +
               "; install the same dit4dit on both sides, or end both and remove the segment (rm " + path_of(name) + ")";
    std::string why = why_other_size(name, header);
    if (why.empty() && found.st_size != static_cast<off_t>(sizeof(Segment)))
        why = name + ": corrupt: the file has " + std::to_string(found.st_size) + " bytes, its header says " +
              std::to_string(header.bytes) + "; remove it (rm " + path_of(name) + ")";
    return why;
}

}  // namespace dit4dit::detail
