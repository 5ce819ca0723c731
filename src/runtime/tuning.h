// What depends on the microarchitecture, and not on an instruction set: found by measurement, a row for each that was
// measured.
#pragma once

#include <stddef.h>

namespace da8w4 {

// How many k ahead of its loads one row or two by packed codes prefetch, into L1; a multiple of 4. 0: they prefetch the
// next panel into L2, as more rows do. Read at the first call.
size_t near_k();

}  // namespace da8w4
