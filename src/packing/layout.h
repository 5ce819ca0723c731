// The packed layout n32k4: its constants and where things lie in it. docs/packed-format.md has the picture.
// Included by ISA units, so C headers and internal linkage only.
#pragma once

#include "types.h"

namespace da8w4 {

constexpr size_t kBlock = 32;      // columns (n) of one packed block
constexpr size_t kHalf = 16;       // distance of the two columns that share a byte
constexpr size_t kQuad = 4;        // consecutive k of one packed line
constexpr size_t kLineBytes = 64;  // one line: kQuad k of kBlock columns, two codes a byte

static inline constexpr size_t blocks_of(size_t n) { return ceil_div(n, kBlock); }
static inline constexpr size_t quads_of(size_t k) { return ceil_div(k, kQuad); }

// One column block of a packed weight.
struct PackedBlock {
    const uint8_t *codes;   // [quads][kLineBytes]
    da8w4_type scale_type;  // of scales and offsets
    const void *scales;     // [groups][kBlock]
    const void *offsets;    // [groups][kBlock], or null
    const int8_t *zps;      // [groups][kBlock], or null
    int zp;                 // every zero point, where zps is null

    DA8W4_INLINE const uint8_t *codes_at(size_t k) const { return codes + k / kQuad * kLineBytes; }
    DA8W4_INLINE const void *scales_at(size_t group) const { return element(scales, scale_type, group * kBlock); }
    DA8W4_INLINE const void *offsets_at(size_t group) const {
        return offsets ? element(offsets, scale_type, group * kBlock) : nullptr;
    }
    DA8W4_INLINE const int8_t *zps_at(size_t group) const { return zps ? zps + group * kBlock : nullptr; }
};

static inline PackedBlock block_of(const da8w4_packed &weight, size_t groups, size_t block) {
    const size_t at = block * groups * kBlock;
    return {
        .codes = weight.codes + block * quads_of(weight.k) * kLineBytes,
        .scale_type = weight.scale_type,
        .scales = element(weight.scales, weight.scale_type, at),
        .offsets = weight.offsets ? element(weight.offsets, weight.scale_type, at) : nullptr,
        .zps = weight.zps ? weight.zps + at : nullptr,
        .zp = weight.zp,
    };
}

// Where column `n` of a block has the code of `k`: bits `code_shift(n)` to +3 of this byte.
static inline constexpr size_t code_byte(size_t n, size_t k) {
    return k / kQuad * kLineBytes + n % kHalf * kQuad + k % kQuad;
}
static inline constexpr int code_shift(size_t n) { return n < kHalf ? 0 : 4; }

}  // namespace da8w4
