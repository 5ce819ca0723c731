// A plain evaluation of docs/numbers.md, one number after the other.
#pragma once

#include <vector>

#include "weight.h"

namespace check {

// One row of activations, as the product reads it.
struct Row {
    std::vector<int> act;  // as the type has them: 0..255 or -128..127
    float scale;
    int zp;
};

Row quantized(const std::vector<float> &x, bool symmetric);

// Output n of a row as float32. The columns' compensation is taken from act - c, where c is 128 for uint8, 0 for int8.
float product(const Matrix &matrix, const Row &row, int c, size_t n, const float *bias);

}  // namespace check
