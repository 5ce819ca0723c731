// What the CPU and the operating system offer, as a set of bits. Included by ISA units: no code here.
#pragma once

#include <fenv.h>
#include <stddef.h>
#include <stdint.h>

namespace da8w4 {

enum CpuBit : uint64_t {
    kAvx2 = 1 << 0,        // AVX2, FMA, F16C and the YMM state
    kAvxVnni = 1 << 1,     // kAvx2 and AVX-VNNI
    kAvx512Vnni = 1 << 2,  // kAvx2 and AVX-512 F, BW, DQ, VL, VNNI and the ZMM state
};

struct CpuFeature {
    uint64_t bit;
    const char *name;
};

extern const CpuFeature cpu_features[];
extern const size_t cpu_feature_count;

uint64_t cpu_bits();  // found at the first call

// Sets floating point to round to nearest even with subnormals kept while it lives, whatever the
// calling thread had chosen: the results must not depend on it.
class DefaultRounding {
public:
    DefaultRounding();
    ~DefaultRounding();
    DefaultRounding(const DefaultRounding &) = delete;
    DefaultRounding &operator=(const DefaultRounding &) = delete;

private:
#if defined(__x86_64__) || defined(__i386__)
    uint32_t saved_;  // MXCSR: fenv.h would save the slow x87 state, too
#else
    fenv_t saved_;
#endif
};

}  // namespace da8w4
