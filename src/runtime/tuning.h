// What depends on the microarchitecture, and not on an instruction set: found by measurement, a row for each that was
// measured. Included by ISA units: no code here.
#pragma once

#include <stddef.h>

namespace da8w4 {

struct Tuning {
    // How many k ahead of its loads one row or two by packed codes prefetch, into L1; a multiple of 4. 0: they prefetch
    // the next panel into L2, as more rows do.
    size_t near_k;
    // Up to how many rows micro-kernels with one pair of column vectors read packed codes: in groups below 64, below
    // 128, and longer ones.
    size_t packed_max[3];
};

// That of this CPU, found at the first call.
Tuning tuning();

}  // namespace da8w4
