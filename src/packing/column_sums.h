// C[n] of docs/numbers.md: the sum over k of each dequantized column.
#pragma once

#include "kernels/kernel.h"

namespace da8w4 {

// Of the first `cols` columns of a block; zero for the others.
void sum_columns(const PackedBlock &block, const Grouping &grouping, size_t cols, float *sums);

}  // namespace da8w4
