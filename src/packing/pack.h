// Packing and unpacking of checked operands; capi.cpp checks them.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "pyda8w4/pyda8w4.h"

namespace da8w4 {

// How a weight will be stored: see da8w4_plan_pack. Refuses values that cannot be.
da8w4_status plan_pack(const da8w4_weight &weight, da8w4_packed *packed, da8w4_packed_bytes *bytes);

// Arrays that the weight has none of are null. False if a code is out of range.
bool pack(const da8w4_weight &weight, const da8w4_packed &plan, const da8w4_packed_arrays &to);

// Codes [n][k]; scales, zps and offsets [n][groups].
void unpack(const da8w4_packed &packed, uint8_t *codes, float *scales, int8_t *zps, float *offsets);

// See da8w4_dequantize.
void dequantize(const da8w4_packed &packed, const size_t *columns, size_t count, float *out, size_t out_stride);

// See da8w4_sum_columns.
void sum_columns(const da8w4_packed &packed, float *sums);

// Threads that packing or unpacking so many codes is worth, of those that there are.
size_t threads_for_packing(size_t codes);

}  // namespace da8w4
