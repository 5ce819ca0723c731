// The list of kernels, what this CPU can run of it, and the choice among those.
#pragma once

#include "kernels/kernel.h"

namespace da8w4 {

size_t kernel_count();
const Kernel &kernel_at(size_t index);

// Why kernel `index` cannot run here; null where it can.
const char *reason_not_runnable(size_t index);

// The default: PYDA8W4_KERNEL, or the first that can run. Decided once, at the first call.
struct KernelChoice {
    da8w4_status status;
    size_t index;
};
KernelChoice default_kernel();

// The kernel of that name, or the default one where name is null, if it can run here.
da8w4_status find_kernel(const char *name, const Kernel **kernel);

}  // namespace da8w4
