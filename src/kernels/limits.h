// What a kernel's instructions can do at best on this machine, timed.
#pragma once

#include "kernels/kernel.h"

namespace da8w4 {

// The time in which up to `threads` threads read `bytes` bytes, each its part, `passes` times: from one end to the
// other or in two streams, its halves side by side.
uint64_t time_read(const Kernel &kernel, const char *memory, size_t bytes, size_t passes, bool two_streams,
                   size_t threads);

// The time in which they multiply registers, and how many multiplications that are.
uint64_t time_dots(const Kernel &kernel, size_t rounds, size_t threads, uint64_t *multiplications);

}  // namespace da8w4
