#include "runtime/tuning.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "runtime/cpu.h"

namespace da8w4 {
namespace {

struct Row {
    const char *vendor;
    unsigned family, first_model, last_model;
    size_t near_k;
};

// benchmarks/tune.py prints a row. Of CPUs that are not here, what is good for most: the next panel.
constexpr Row rows[] = {
    // Zen 4. Measured on model 17; the others have the same cores.
    {.vendor = "AuthenticAMD", .family = 25, .first_model = 16, .last_model = 31, .near_k = 256},
    {.vendor = "AuthenticAMD", .family = 25, .first_model = 96, .last_model = 127, .near_k = 256},
    {.vendor = "AuthenticAMD", .family = 25, .first_model = 160, .last_model = 175, .near_k = 256},
};

constexpr size_t kMost = 4096;

size_t find_near_k() {
    if (const char *text = std::getenv("PYDA8W4_NEAR_K")) {
        const long value = std::strtol(text, nullptr, 10);
        return value > 0 && static_cast<size_t>(value) <= kMost ? static_cast<size_t>(value) / 4 * 4 : 0;
    }
    const CpuModel cpu = cpu_model();
    for (const Row &row : rows)
        if (std::strcmp(cpu.vendor, row.vendor) == 0 && cpu.family == row.family && cpu.model >= row.first_model &&
            cpu.model <= row.last_model)
            return row.near_k;
    return 0;
}

}  // namespace

// No static local, as in cpu_bits.
size_t near_k() {
    constexpr size_t kUnread = kMost + 1;
    static std::atomic<size_t> known{kUnread};
    size_t found = known.load(std::memory_order_relaxed);
    if (found == kUnread) known.store(found = find_near_k(), std::memory_order_relaxed);
    return found;
}

}  // namespace da8w4
