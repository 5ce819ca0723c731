// Packing and unpacking of checked operands; capi.cpp checks them.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "pyda8w4/pyda8w4.h"

namespace da8w4 {

// The arrays of a packed weight, to be written; zps and offsets are null where it has none.
struct PackedArrays {
    uint8_t *codes;
    void *scales;
    int8_t *zps;
    void *offsets;
    float *sums;
};

// How a weight will be stored: see da8w4_plan_pack. Refuses values that cannot be.
da8w4_status plan_pack(const da8w4_weight &weight, da8w4_packed *packed, da8w4_packed_bytes *bytes);

// False if a code is out of range.
bool pack(const da8w4_weight &weight, const da8w4_packed &plan, const PackedArrays &to);

// Codes [n][k] as 0..15; scales, zps and offsets [n][groups].
void unpack(const da8w4_packed &packed, uint8_t *codes, float *scales, int8_t *zps, float *offsets);

// Threads that packing or unpacking so many codes is worth, of those that there are.
size_t threads_for_packing(size_t codes);

}  // namespace da8w4
