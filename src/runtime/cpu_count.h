// How many CPUs this process may use.
#pragma once

#include <stddef.h>

namespace da8w4 {

// The CPUs that affinity and quota leave, at least 1. Found at the first call, and again in a forked child.
size_t allowed_cpus();

}  // namespace da8w4
