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
    Tuning tuning;
};

// Zen 4 makes one 512-bit dot product in a cycle, so that unpacking codes hides behind them; Intel's cores make two. It
// was measured on model 17.
constexpr Tuning zen4 = {.near_k = 256, .packed_max = {32, 48, 96}};

// benchmarks/tune.py prints near_k. Of CPUs that are not here, what is good for most: the next panel.
constexpr Row rows[] = {
    {.vendor = "AuthenticAMD", .family = 25, .first_model = 16, .last_model = 31, .tuning = zen4},
    {.vendor = "AuthenticAMD", .family = 25, .first_model = 96, .last_model = 127, .tuning = zen4},
    {.vendor = "AuthenticAMD", .family = 25, .first_model = 160, .last_model = 175, .tuning = zen4},
};
// Measured on Cascade Lake; near_k on Emerald Rapids, too.
constexpr Tuning usual = {.near_k = 0, .packed_max = {24, 24, 24}};

constexpr size_t kMost = 4096;

const Tuning *find_tuning() {
    const CpuModel cpu = cpu_model();
    for (const Row &row : rows)
        if (std::strcmp(cpu.vendor, row.vendor) == 0 && cpu.family == row.family && cpu.model >= row.first_model &&
            cpu.model <= row.last_model)
            return &row.tuning;
    return &usual;
}

// No static local, as in cpu_bits.
const Tuning &tuning_of_cpu() {
    static std::atomic<const Tuning *> known{nullptr};
    const Tuning *found = known.load(std::memory_order_relaxed);
    if (!found) known.store(found = find_tuning(), std::memory_order_relaxed);
    return *found;
}

size_t find_near_k() {
    if (const char *text = std::getenv("PYDA8W4_NEAR_K")) {
        const long value = std::strtol(text, nullptr, 10);
        return value > 0 && static_cast<size_t>(value) <= kMost ? static_cast<size_t>(value) / 4 * 4 : 0;
    }
    return tuning_of_cpu().near_k;
}

size_t near_k() {
    constexpr size_t kUnread = kMost + 1;
    static std::atomic<size_t> known{kUnread};
    size_t found = known.load(std::memory_order_relaxed);
    if (found == kUnread) known.store(found = find_near_k(), std::memory_order_relaxed);
    return found;
}

}  // namespace

Tuning tuning() {
    Tuning found = tuning_of_cpu();
    found.near_k = near_k();
    return found;
}

}  // namespace da8w4
