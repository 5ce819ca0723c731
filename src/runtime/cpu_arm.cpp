// What the operating system says of a 64-bit Arm CPU.
#include "runtime/cpu.h"

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#include <windows.h>
#endif

namespace da8w4 {
namespace {

enum Word { kHwcap, kHwcap2 };

struct Requirement {
    uint64_t bit;
    Word word;
    uint32_t mask;
    const char *apple;
    unsigned windows;
};

constexpr Requirement requirements[] = {
#define DA8W4_X86_BIT(...)
#define DA8W4_ARM_BIT(bit, name, word, mask, apple, windows) {bit, word, mask, apple, windows},
#include "runtime/cpu_bits.inc"
#undef DA8W4_X86_BIT
#undef DA8W4_ARM_BIT
};

bool meets(const Requirement &row) {
#if defined(__linux__)
    return (getauxval(row.word == kHwcap ? AT_HWCAP : AT_HWCAP2) & row.mask) != 0;
#elif defined(__APPLE__)
    int value = 0;
    size_t bytes = sizeof value;
    return sysctlbyname(row.apple, &value, &bytes, nullptr, 0) == 0 && value != 0;
#elif defined(_WIN32)
    return IsProcessorFeaturePresent(row.windows) != 0;
#else
    (void)row;
    return false;
#endif
}

}  // namespace

uint64_t detect_cpu_bits() {
    uint64_t bits = 0;
    for (const Requirement &row : requirements)
        if (meets(row)) bits |= row.bit;
    return bits;
}

CpuModel cpu_model() { return {}; }

}  // namespace da8w4
