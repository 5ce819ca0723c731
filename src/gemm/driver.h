// Executes the plan of a call.
#pragma once

#include "gemm/plan.h"

namespace da8w4 {

void multiply(const da8w4_call &call, const Kernel &kernel, const ProblemPlan &plan, size_t threads);

}  // namespace da8w4
