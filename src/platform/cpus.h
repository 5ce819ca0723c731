// The CPUs that the system lets this process use.
#pragma once

#include <stddef.h>

namespace da8w4 {

// How many there are now, at least 1: a process may be given others at any time.
size_t usable_cpus();

}  // namespace da8w4
