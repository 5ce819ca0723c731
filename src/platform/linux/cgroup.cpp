#include "platform/linux/cgroup.h"

#include <fcntl.h>
#include <limits.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace da8w4 {
namespace {

// All text here is on the stack: where memory has run out, the number of CPUs is still the right one.
template <size_t kBytes>
bool read_text(const char *path, char (&text)[kBytes]) {
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return false;
    size_t length = 0;
    ssize_t count;
    while (length < kBytes - 1 && (count = read(file, text + length, kBytes - 1 - length)) > 0)
        length += static_cast<size_t>(count);
    close(file);
    text[length] = 0;
    return length > 0;
}

// Part of a line of /proc/self/cgroup.
struct Text {
    const char *begin, *end;
};

// Whether a list with commas has the entry "cpu".
bool names_cpu(Text list) {
    for (const char *at = list.begin; at < list.end;) {
        const void *comma = std::memchr(at, ',', static_cast<size_t>(list.end - at));
        const char *end = comma ? static_cast<const char *>(comma) : list.end;
        if (end - at == 3 && std::memcmp(at, "cpu", 3) == 0) return true;
        at = end + 1;
    }
    return false;
}

// The quota of one cgroup: "<quota> <period>" or "max <period>" in one file (version 2), or two files where -1 is
// none (version 1).
size_t quota_of(const char *folder, bool v2) {
    char path[PATH_MAX], text[64];
    auto read_file = [&](const char *name) {
        const int length = std::snprintf(path, sizeof path, "%s/%s", folder, name);
        return length > 0 && static_cast<size_t>(length) < sizeof path && read_text(path, text);
    };
    char *rest = text;
    if (!read_file(v2 ? "cpu.max" : "cpu.cfs_quota_us")) return 0;
    const long long quota = std::strtoll(text, &rest, 10);  // 0 for "max"
    if (!v2 && !read_file("cpu.cfs_period_us")) return 0;
    const long long period = std::strtoll(v2 ? rest : text, nullptr, 10);
    if (quota <= 0 || period <= 0) return 0;
    return static_cast<size_t>(quota / period + (quota % period != 0));
}

// The tightest quota from the cgroup of a line "<id>:<controllers>:<path>" up to the root.
size_t cpus_of_line(Text line, const char *root) {
    auto behind_colon = [&](const char *from) {
        const void *colon = std::memchr(from, ':', static_cast<size_t>(line.end - from));
        return colon ? static_cast<const char *>(colon) + 1 : nullptr;
    };
    const char *controllers = behind_colon(line.begin);
    const char *path = controllers ? behind_colon(controllers) : nullptr;
    if (!path) return 0;
    const bool v2 = controllers + 1 == path;
    if (!v2 && !names_cpu({.begin = controllers, .end = path - 1})) return 0;
    char folder[PATH_MAX];
    const int length = std::snprintf(folder, sizeof folder, "%s/sys/fs/cgroup%s%.*s", root, v2 ? "" : "/cpu",
                                     static_cast<int>(line.end - path), path);
    if (length < 0 || static_cast<size_t>(length) >= sizeof folder) return 0;
    char *const mount = folder + length - (line.end - path);
    size_t least = 0;
    for (;;) {
        const size_t cpus = quota_of(folder, v2);
        if (cpus && (!least || cpus < least)) least = cpus;
        char *slash = std::strrchr(mount, '/');
        if (!slash) return least;
        *slash = 0;
    }
}

}  // namespace

size_t cgroup_cpus(const char *root) {
    char path[PATH_MAX], text[16384];
    const int length = std::snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    if (length < 0 || static_cast<size_t>(length) >= sizeof path || !read_text(path, text)) return 0;
    size_t least = 0;
    for (const char *begin = text; *begin;) {
        const Text line{.begin = begin, .end = begin + std::strcspn(begin, "\n")};
        const size_t cpus = cpus_of_line(line, root);
        if (cpus && (!least || cpus < least)) least = cpus;
        begin = line.end + (*line.end == '\n');
    }
    return least;
}

}  // namespace da8w4
