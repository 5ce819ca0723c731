// Random weights: as plain matrices, as callers have them, and packed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "guarded.h"
#include "pyda8w4/pyda8w4.h"
#include "random.h"

namespace check {

struct Shape {
    size_t n, k, group;
};

// Every n, k and group at which a block, a line, a chunk, a step or a span ends, or ends one early or late.
const std::vector<Shape> &edge_shapes();

// A weight as a plain matrix: codes [n][k] and zps [n][groups] are those of the caller's format.
struct Matrix {
    size_t n, k, group, groups;
    da8w4_codes format;
    da8w4_type scale_type;
    std::vector<int> codes, zps;
    std::vector<float> scales, offsets;  // offsets empty: none
    bool one_zp;
};

Matrix random_matrix(Random &random, const Shape &shape);

// What the format's codes and zero points are lower than those of 0..15.
inline int code_offset(const Matrix &matrix) { return matrix.format == DA8W4_CODES_S4 ? 8 : 0; }

// The type in which the plan has to keep scales and offsets.
da8w4_type narrowest(const Matrix &matrix);

// A matrix in the arrays that a caller has, which `view` shows to the library.
struct RawWeight {
    Guarded codes, scales, zps, offsets;
    da8w4_weight view;
};

RawWeight raw_weight(Random &random, const Matrix &matrix, bool at_end);

struct PackedArrays {
    Guarded codes, scales, zps, offsets, sums;

    PackedArrays(const da8w4_packed_bytes &bytes, bool at_end);
    da8w4_status pack(const RawWeight &raw, const da8w4_packed &plan) const;
    // A view of the plan with these arrays.
    da8w4_packed view(const da8w4_packed &plan) const;
    // Puts garbage where no code, scale, offset, zero point or sum of the weight lies: a weight that was read from a
    // file may have anything there.
    void dirty_padding(const da8w4_packed &plan) const;
};

// A weight ready for products. Its packing is not checked.
struct Weight {
    Matrix matrix;
    PackedArrays arrays;
    da8w4_packed packed;
};

Weight packed_weight(const Random &random, Matrix matrix);
Weight random_weight(const Random &random, const Shape &shape);

}  // namespace check
