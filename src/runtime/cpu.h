// What the CPU and the operating system offer, as a set of bits. Included by ISA units: no code here.
#pragma once

#include <fenv.h>
#include <stddef.h>
#include <stdint.h>

namespace da8w4 {

// The bits are the rows of cpu_bits.inc, numbered in their order.
enum CpuBitNumber {
#define DA8W4_X86_BIT(bit, ...) bit##Number,
#define DA8W4_ARM_BIT DA8W4_X86_BIT
#include "runtime/cpu_bits.inc"
#undef DA8W4_X86_BIT
    kCpuBitCount
};

enum CpuBit : uint64_t {
#define DA8W4_X86_BIT(bit, ...) bit = uint64_t{1} << bit##Number,
#include "runtime/cpu_bits.inc"
#undef DA8W4_X86_BIT
#undef DA8W4_ARM_BIT
};

struct CpuFeature {
    uint64_t bit;
    const char *name;
};

extern const CpuFeature cpu_features[];
extern const size_t cpu_feature_count;

// Detected at the first call.
uint64_t cpu_bits();
// What that calls: of this architecture.
uint64_t detect_cpu_bits();

// As CPUID of x86 has them; elsewhere empty and 0.
struct CpuModel {
    char vendor[13];
    unsigned family, model;
};
CpuModel cpu_model();

// Sets floating point to round to nearest even with subnormals kept while it lives, whatever the
// calling thread had chosen: the results must not depend on it.
class DefaultRounding {
public:
    DefaultRounding();
    ~DefaultRounding();
    DefaultRounding(const DefaultRounding &) = delete;
    DefaultRounding &operator=(const DefaultRounding &) = delete;

private:
#ifdef __x86_64__
    uint32_t saved_;  // MXCSR: fenv.h would save the slow x87 state, too, in which only a 32-bit libm computes
#else
    fenv_t saved_;
#endif
};

}  // namespace da8w4
