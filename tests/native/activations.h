// Random rows of activations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pyda8w4/pyda8w4.h"
#include "random.h"

namespace check {

// Floats in every situation that quantization has to master: constant, one-sided, tiny, huge, ties, NaN, ...
std::vector<uint8_t> random_floats(Random &random, size_t m, size_t k, size_t stride, da8w4_type type);

// Bytes of which some rows are all lowest or all highest.
std::vector<uint8_t> random_bytes(Random &random, size_t m, size_t k, size_t stride, bool is_signed);

std::vector<float> floats_at(const uint8_t *from, size_t count, da8w4_type type);

}  // namespace check
