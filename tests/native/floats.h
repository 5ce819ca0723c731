// Floats of all three types, and the modes of floating point.
#pragma once

#include <cfenv>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "pyda8w4/pyda8w4.h"
#include "random.h"

namespace check {

inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline bool same_bits(float a, float b) { return memcmp(&a, &b, sizeof a) == 0; }

size_t size_of(da8w4_type type);
const char *name_of(da8w4_type type);

// The value rounded to the type.
float as_type(float value, da8w4_type type);

// A finite float of any size, exactly representable in the type.
float any_finite(Random &random, da8w4_type type);

// Writes a float as F32, F16 or BF16, and reads one.
void put(void *to, float value, da8w4_type type);
float get(const void *from, da8w4_type type);

// A mode in which a library that trusts its caller's mode would compute other bits: rounding upward, and subnormal
// numbers flushed to zero.
class FloatMode {
public:
    explicit FloatMode(bool hostile);
    // Returns to the mode before; false if a call has changed the hostile one.
    bool restore();

private:
    bool hostile_;
    std::fenv_t before_;
    [[maybe_unused]] uint32_t csr_ = 0;
};

}  // namespace check
