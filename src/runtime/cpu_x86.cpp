// What an x86 CPU says of itself: CPUID, and XCR0 for what the operating system saves.
#include <cpuid.h>

#include <cstdlib>
#include <cstring>

#include "platform/cpu_features.h"
#include "runtime/cpu.h"

namespace da8w4 {
namespace {

enum Register { kEax, kEbx, kEcx, kEdx };

// States of registers: bits of XCR0, and the number of one of them.
constexpr uint64_t kYmmStates = 0x6;       // SSE, AVX
constexpr uint64_t kZmmStates = 0xe6;      // these and the three of AVX-512
constexpr uint64_t kTileStates = 0x60000;  // configuration and data
constexpr int kTileData = 18;

struct CpuidBits {
    uint32_t leaf, subleaf;
    Register word;
    uint32_t mask;
};

struct Requirements {
    uint64_t bit, builds_on, saved;
    int permission;
    CpuidBits cpuid[2];  // an unused one has the mask 0
};

constexpr Requirements requirements[] = {
#define DA8W4_X86_BIT(bit, name, builds_on, saved, permission, ...) {bit, builds_on, saved, permission, {__VA_ARGS__}},
#define DA8W4_ARM_BIT(...)
#include "runtime/cpu_bits.inc"
#undef DA8W4_X86_BIT
#undef DA8W4_ARM_BIT
};

constexpr bool all(uint64_t have, uint64_t needed) { return (have & needed) == needed; }

constexpr bool in_order() {
    for (const Requirements &row : requirements)
        if (row.builds_on >= row.bit) return false;
    return true;
}
static_assert(in_order(), "a row builds on one below it");

// A word of CPUID; 0 where the CPU does not have the leaf or the subleaf.
uint32_t cpuid_word(const CpuidBits &at) {
    uint32_t words[4] = {};
    if (!__get_cpuid_count(at.leaf, 0, words, words + 1, words + 2, words + 3)) return 0;
    if (at.subleaf > 0) {
        if (at.subleaf > words[kEax]) return 0;
        __cpuid_count(at.leaf, at.subleaf, words[kEax], words[kEbx], words[kEcx], words[kEdx]);
    }
    return words[at.word];
}

// Register states that the operating system saves (XCR0); 0 where it does not say.
uint64_t saved_states() {
    if (!(cpuid_word({.leaf = 1, .subleaf = 0, .word = kEcx, .mask = 0}) & bit_OSXSAVE)) return 0;
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

bool meets(const Requirements &row, uint64_t bits, uint64_t states) {
    if (!all(bits, row.builds_on) || !all(states, row.saved)) return false;
    for (const CpuidBits &cpuid : row.cpuid)
        if (cpuid.mask && !all(cpuid_word(cpuid), cpuid.mask)) return false;
    return row.permission == 0 || may_use_state(row.permission);
}

}  // namespace

uint64_t detect_cpu_bits() {
    const uint64_t states = saved_states();
    uint64_t bits = 0;
    for (const Requirements &row : requirements)
        if (meets(row, bits, states)) bits |= row.bit;
#ifdef DA8W4_EMULATED_AMX
    // A build for tests takes AMX for present where AVX-512 VNNI is: an emulator then executes its instructions.
    const char *emulated = std::getenv("PYDA8W4_EMULATED_AMX");
    if (emulated && std::strcmp(emulated, "1") == 0 && (bits & kAvx512Vnni)) bits |= kAmxInt8 | kAmxAllowed;
#endif
    return bits;
}

CpuModel cpu_model() {
    CpuModel found = {};
    uint32_t most, ebx, ecx, edx;
    if (!__get_cpuid(0, &most, &ebx, &ecx, &edx)) return found;
    std::memcpy(found.vendor, &ebx, 4);
    std::memcpy(found.vendor + 4, &edx, 4);
    std::memcpy(found.vendor + 8, &ecx, 4);
    const uint32_t word = cpuid_word({.leaf = 1, .subleaf = 0, .word = kEax, .mask = 0});
    const unsigned family = word >> 8 & 15, model = word >> 4 & 15;
    found.family = family + (family == 15 ? word >> 20 & 255 : 0);
    found.model = model + (family == 6 || family == 15 ? word >> 12 & 0xf0 : 0);
    return found;
}

}  // namespace da8w4
