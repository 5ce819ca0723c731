#include "runtime/cpu.h"

#include <atomic>

#ifdef __x86_64__
#include <xmmintrin.h>
#endif

namespace da8w4 {

// Those of x86, or else of Arm.
const CpuFeature cpu_features[] = {
#if defined(__x86_64__) || defined(__i386__)
#define DA8W4_X86_BIT(bit, name, ...) {bit, name},
#define DA8W4_ARM_BIT(...)
#else
#define DA8W4_X86_BIT(...)
#define DA8W4_ARM_BIT(bit, name, ...) {bit, name},
#endif
#include "runtime/cpu_bits.inc"
#undef DA8W4_X86_BIT
#undef DA8W4_ARM_BIT
};
const size_t cpu_feature_count = sizeof cpu_features / sizeof *cpu_features;

namespace {

constexpr uint64_t kDetected = uint64_t{1} << 63;
static_assert(kCpuBitCount < 63, "the last bit says that the others are known");

}  // namespace

// Not a static local: its guard would stay taken in the child of a fork that another thread's first call met. Two
// threads that detect at the same time find the same.
uint64_t cpu_bits() {
    static std::atomic<uint64_t> known{0};
    uint64_t bits = known.load(std::memory_order_relaxed);
    if (!bits) known.store(bits = detect_cpu_bits() | kDetected, std::memory_order_relaxed);
    return bits & ~kDetected;
}

#ifdef __x86_64__

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

DefaultRounding::DefaultRounding() {
    fegetenv(&saved_);
    fesetenv(FE_DFL_ENV);
}
DefaultRounding::~DefaultRounding() { fesetenv(&saved_); }

#endif

}  // namespace da8w4
