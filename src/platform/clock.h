// A clock that only goes forward.
#pragma once

#include <cstdint>

namespace da8w4 {

// Since a moment that is the same for all threads.
int64_t nanoseconds();

}  // namespace da8w4
