// Floats to codes of 4 bits, by a search for the scales, zero points and offsets of least squared error. capi.cpp
// checks the operands.
#pragma once

#include "pyda8w4/pyda8w4.h"

namespace da8w4 {

// See da8w4_quantize_weight.
da8w4_status quantize_weight(const da8w4_quantization &given);

}  // namespace da8w4
