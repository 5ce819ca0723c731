#include "runtime/cpu.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#include <immintrin.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#define DA8W4_X86 1
#endif

namespace da8w4 {

const CpuFeature cpu_features[] = {
    {kAvx2, "avx2+fma+f16c"},
    {kAvxVnni, "avx_vnni"},
    {kAvx512Vnni, "avx512f+bw+dq+vl+vnni"},
    {kAmxInt8, "amx_tile+int8"},
    {kAmxAllowed, "permission to use amx"},
};
const size_t cpu_feature_count = sizeof cpu_features / sizeof *cpu_features;

#if DA8W4_X86

namespace {

// Register states that the operating system saves (XCR0); 0 where it does not say.
uint64_t saved_states(uint32_t leaf1_ecx) {
    if (!(leaf1_ecx & bit_OSXSAVE)) return 0;
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

bool all(uint64_t have, uint64_t needed) { return (have & needed) == needed; }

// Linux saves tiles only for processes that have asked. It refuses where signal stacks are too small for
// them (sigaltstack of some older faulthandlers), and sandboxes refuse the call.
bool allowed_to_use_amx() {
#ifdef __linux__
    const long kGetPermission = 0x1022, kRequestPermission = 0x1023, kTileData = 18;
    unsigned long granted = 0;
    auto has_it = [&] {
        return syscall(SYS_arch_prctl, kGetPermission, &granted) == 0 && (granted >> kTileData & 1) != 0;
    };
    if (has_it()) return true;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 && has_it();
#else
    return false;
#endif
}

uint64_t detect() {
    uint32_t eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
    const uint32_t leaf1_ecx = ecx;
    const uint64_t states = saved_states(leaf1_ecx);
    uint32_t leaf7_ebx = 0, leaf7_ecx = 0, leaf7_edx = 0, leaf7_1_eax = 0, subleaves = 0;
    if (__get_cpuid_count(7, 0, &subleaves, &ebx, &ecx, &edx)) {
        leaf7_ebx = ebx;
        leaf7_ecx = ecx;
        leaf7_edx = edx;
        if (subleaves >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) leaf7_1_eax = eax;
    }
    const uint64_t kYmm = 0x6, kZmm = 0xe6;  // SSE + AVX, and these with the three AVX-512 states
    const uint64_t kTiles = 0x60000;         // configuration and data
    const uint32_t kAvx512Vnni_ecx = 1u << 11, kAvxVnni_eax = 1u << 4, kAmxTileInt8_edx = 3u << 24;
    uint64_t bits = 0;
    if (all(states, kYmm) && all(leaf1_ecx, bit_AVX | bit_FMA | bit_F16C) && all(leaf7_ebx, bit_AVX2)) {
        bits |= kAvx2;
        if (all(leaf7_1_eax, kAvxVnni_eax)) bits |= kAvxVnni;
        if (all(states, kZmm) && all(leaf7_ecx, kAvx512Vnni_ecx) &&
            all(leaf7_ebx, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL))
            bits |= kAvx512Vnni;
    }
    const char *emulated = std::getenv("PYDA8W4_EMULATED_AMX");
    if (emulated && std::strcmp(emulated, "1") == 0) {
        if (bits & kAvx512Vnni) bits |= kAmxInt8 | kAmxAllowed;
    } else if (all(states, kTiles) && all(leaf7_edx, kAmxTileInt8_edx)) {
        bits |= kAmxInt8;
        if (allowed_to_use_amx()) bits |= kAmxAllowed;
    }
    return bits;
}

}  // namespace

uint64_t cpu_bits() {
    static const uint64_t bits = detect();
    return bits;
}

DefaultRounding::DefaultRounding() : saved_(_mm_getcsr()) {
    // The control bits of the reset state, all exceptions masked; keep the exception flags.
    const uint32_t wanted = (saved_ & 0x3f) | 0x1f80;
    if (wanted != saved_) _mm_setcsr(wanted);
}

// Restores all of it, flags too: what the kernels raised is not the caller's business.
DefaultRounding::~DefaultRounding() {
    if (_mm_getcsr() != saved_) _mm_setcsr(saved_);
}

#else

uint64_t cpu_bits() { return 0; }

DefaultRounding::DefaultRounding() {
    fegetenv(&saved_);
    fesetenv(FE_DFL_ENV);
}
DefaultRounding::~DefaultRounding() { fesetenv(&saved_); }

#endif

}  // namespace da8w4
