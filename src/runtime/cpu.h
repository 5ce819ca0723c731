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
    kAmxInt8 = 1 << 3,     // AMX-TILE, AMX-INT8 and the tile state
    kAmxAllowed = 1 << 4,  // kAmxInt8, and the system lets this process use it
};

struct CpuFeature {
    uint64_t bit;
    const char *name;
};

extern const CpuFeature cpu_features[];
extern const size_t cpu_feature_count;

// Found at the first call. For tests, PYDA8W4_EMULATED_AMX=1 in the environment claims AMX where AVX-512 VNNI is,
// without asking the CPU or the system: then something else has to execute its instructions.
uint64_t cpu_bits();

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
