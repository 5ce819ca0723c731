// The list of kernels and the choice among them.
#pragma once

#include "kernel.h"

namespace da8w4 {

// The kernel of that name, or the default one where name is null, if it can run here.
da8w4_status find_kernel(const char *name, const Kernel **kernel);

}  // namespace da8w4
