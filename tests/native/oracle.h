// A plain evaluation of docs/numbers.md, one number after the other.
#pragma once

#include <vector>

#include "pyda8w4/pyda8w4.h"
#include "weight.h"

namespace check {

// One row of activations in the order of the weight's k.
struct Row {
    std::vector<int> act;  // as the type has them: 0..255, -128..127 or 16 bits
    float scale;
    int zp;
    std::vector<float> group_scales;  // of DA8W4_ACT_INT8_GROUP, which has no other
};

// A row of floats as it is quantized: permuted, multiplied by the factors, and rotated.
std::vector<float> transformed(const Matrix &matrix, const std::vector<float> &x);

Row quantized(const std::vector<float> &x, da8w4_scheme scheme, size_t group);

// Output n of a row as float32.
float product(const Matrix &matrix, const Row &row, da8w4_scheme scheme, size_t n, const float *bias);

float column_sum(const Matrix &matrix, size_t n);

// The values of a column, in the order of activations.
std::vector<float> dequantized(const Matrix &matrix, size_t n);

}  // namespace check
