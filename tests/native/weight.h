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
    size_t super, rows;  // groups of a super-group, or 0; rows: of scales, which are [n][rows]
    da8w4_kind kind;
    da8w4_codes format;
    da8w4_type scale_type, sub_scale_type, sub_offset_type;
    std::vector<int> codes, zps, table;        // table: of a table only
    std::vector<float> scales, offsets;        // offsets empty: none
    std::vector<int> sub_scales, sub_offsets;  // [n][groups], where there are two levels
    std::vector<int32_t> perm;                 // empty: none
    std::vector<float> factors;                // empty: none
    size_t rotation;                           // 0: none
    bool one_zp;

    bool has_table() const { return kind == DA8W4_TABLE4; }
    // The value of a code without its zero point, both as the caller has them.
    int value(size_t column, size_t at) const {
        const int code = codes[column * k + at];
        return has_table() ? table[static_cast<size_t>(code)] : code;
    }
    float scale(size_t column, size_t g) const { return product(scales, sub_scales, column, g); }
    float offset(size_t column, size_t g) const { return product(offsets, sub_offsets, column, g); }

private:
    float product(const std::vector<float> &of_rows, const std::vector<int> &of_groups, size_t column, size_t g) const {
        if (!super) return of_rows[column * rows + g];
        return of_rows[column * rows + g / super] * static_cast<float>(of_groups[column * groups + g]);
    }
};

// Of any kind, or of this one.
Matrix random_matrix(Random &random, const Shape &shape);
Matrix random_matrix(Random &random, const Shape &shape, da8w4_kind kind);

constexpr da8w4_kind all_kinds[] = {DA8W4_INT4, DA8W4_INT5, DA8W4_INT6, DA8W4_INT8, DA8W4_TABLE4};

int bits_of(da8w4_kind kind);

// The codes that the caller's format has.
int lowest_code(const Matrix &matrix);
int highest_code(const Matrix &matrix);

// What the format's codes and zero points are lower than those that are stored.
int code_offset(const Matrix &matrix);

// Whether every zero point is the same, which is then not stored for each.
bool same_zps(const Matrix &matrix);

// The type in which the plan has to keep scales and offsets.
da8w4_type narrowest(const Matrix &matrix);

// A matrix in the arrays that a caller has, which `view` shows to the library.
struct RawWeight {
    Guarded codes, table, scales, sub_scales, zps, offsets, sub_offsets;
    da8w4_weight view;
};

RawWeight raw_weight(Random &random, const Matrix &matrix, bool at_end);

struct PackedArrays {
    Guarded codes, scales, sub_scales, zps, offsets, sub_offsets, sums;

    PackedArrays(const da8w4_packed_bytes &bytes, bool at_end);
    da8w4_status pack(const RawWeight &raw, const da8w4_packed &plan) const;
    // A view of the plan with these arrays, and with the table, which packing does not copy.
    da8w4_packed view(const da8w4_packed &plan, const Guarded &table) const;
    // Puts garbage where no code, scale, offset, zero point or sum of the weight lies: a weight that was read from a
    // file may have anything there.
    void dirty_padding(const da8w4_packed &plan) const;
    std::vector<uint8_t> contents() const;
};

// What docs/packed-format.md says that these arrays hold, one after the other.
std::vector<uint8_t> packed_contents(const Matrix &matrix);

// A weight ready for products. Its packing is not checked.
struct Weight {
    Matrix matrix;
    PackedArrays arrays;
    Guarded table, perm, factors;
    da8w4_packed packed;
};

Weight packed_weight(const Random &random, Matrix matrix);
Weight random_weight(const Random &random, const Shape &shape);

}  // namespace check
