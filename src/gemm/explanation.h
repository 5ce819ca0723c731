// What the plan of a call says to whoever asks for it.
#pragma once

#include "gemm/driver.h"

namespace da8w4 {

// Fills all but `threads`. Reads zero points, whose paths differ, and no codes.
da8w4_explanation explain(const da8w4_packed &weight, const Kernel &kernel, const GroupedPlan &plan, size_t rows);

}  // namespace da8w4
