// The packed layout n32k4: its constants and where things lie in it. docs/packed-format.md has the picture.
// Included by ISA units, so C headers and internal linkage only.
#pragma once

#include "types.h"

namespace da8w4 {

constexpr size_t kBlock = 32;      // columns (n) of one packed block
constexpr size_t kHalf = 16;       // distance of the two columns that share a byte
constexpr size_t kQuad = 4;        // consecutive k
constexpr size_t kLineBytes = 64;  // a line: the low 4 bits of a quad of all columns, or what other lines say below

static inline constexpr size_t blocks_of(size_t n) { return ceil_div(n, kBlock); }
static inline constexpr size_t quads_of(size_t k) { return ceil_div(k, kQuad); }

// What the codes of one kind are, and how they lie in lines. A unit is some quads with all of their lines.
//
//    4 bits   one quad:   its line of nibbles
//    5 bits   four quads: their lines of nibbles, then one line with bit 4 of all
//    6 bits   two quads:  their lines of nibbles, then one line with bits 4 and 5 of all
//    8 bits   one quad:   columns 0..15 in one line, 16..31 in the next; a byte is the value + 128
struct CodeLayout {
    int bits;
    unsigned log_unit_quads;  // divisions by it are shifts: a panel of few rows takes less time than some divisions
    size_t unit_lines;
    int least, most;  // codes; of a table, indices
    int bias;         // what micro-kernels multiply, an unsigned byte, is the value of the code plus this

    DA8W4_INLINE constexpr size_t unit_quads() const { return size_t{1} << log_unit_quads; }
    DA8W4_INLINE constexpr size_t in_unit(size_t quad) const { return quad & (unit_quads() - 1); }
    // The first line of the unit that has this quad, and how many lines so many quads take.
    DA8W4_INLINE constexpr size_t unit_line(size_t quad) const { return (quad >> log_unit_quads) * unit_lines; }
    DA8W4_INLINE constexpr size_t lines(size_t quads) const { return unit_line(quads + unit_quads() - 1); }
    DA8W4_INLINE constexpr int high_bits() const { return bits < 8 ? bits - 4 : 0; }
};

static inline constexpr CodeLayout layout_of(da8w4_kind kind) {
    switch (kind) {
        case DA8W4_INT4: return {.bits = 4, .log_unit_quads = 0, .unit_lines = 1, .least = 0, .most = 15, .bias = 0};
        case DA8W4_INT5: return {.bits = 5, .log_unit_quads = 2, .unit_lines = 5, .least = 0, .most = 31, .bias = 0};
        case DA8W4_INT6: return {.bits = 6, .log_unit_quads = 1, .unit_lines = 3, .least = 0, .most = 63, .bias = 0};
        case DA8W4_INT8:
            return {.bits = 8, .log_unit_quads = 0, .unit_lines = 2, .least = -128, .most = 127, .bias = 128};
        case DA8W4_TABLE4:
            return {.bits = 4, .log_unit_quads = 0, .unit_lines = 1, .least = 0, .most = 15, .bias = 128};
    }
    return {};
}

// Where column `n` of a block has a code of quad `quad`, its k at `j`: the byte, from the first line of the block, and
// the shift, of its lower bits. Those of 8 bits have no other.
static inline constexpr size_t code_byte(const CodeLayout &layout, size_t n, size_t quad, size_t j) {
    const size_t line = layout.unit_line(quad) + (layout.bits == 8 ? n / kHalf : layout.in_unit(quad));
    return line * kLineBytes + n % kHalf * kQuad + j;
}
static inline constexpr int code_shift(size_t n) { return n < kHalf ? 0 : 4; }

// The same of its upper bits, if it has 5 or 6: bit field (quad in unit) * 2 + half of a byte of the unit's last line.
static inline constexpr size_t high_byte(const CodeLayout &layout, size_t n, size_t quad, size_t j) {
    return (layout.unit_line(quad) + layout.unit_quads()) * kLineBytes + n % kHalf * kQuad + j;
}
static inline constexpr int high_shift(const CodeLayout &layout, size_t n, size_t quad) {
    return static_cast<int>(layout.in_unit(quad) * 2 + n / kHalf) * layout.high_bits();
}

// One column block of a packed weight.
struct PackedBlock {
    da8w4_kind kind;
    const uint8_t *codes;  // [lines][kLineBytes]
    const int8_t *table;   // [16]; of a table only
    size_t super;          // groups of a super-group; 0: one level
    da8w4_type scale_type, sub_scale_type, sub_offset_type;
    const void *scales;       // [groups or supers][kBlock] of scale_type
    const void *sub_scales;   // [groups][kBlock]; of two levels only
    const void *offsets;      // as scales, or null
    const void *sub_offsets;  // as sub_scales, or null
    const int8_t *zps;        // [groups][kBlock], or null
    int zp;                   // every zero point, where zps is null

    // The unit that has this k.
    DA8W4_INLINE const uint8_t *codes_at(size_t k) const {
        return codes + layout_of(kind).unit_line(k / kQuad) * kLineBytes;
    }
    // Of scales and offsets: the row that has those of this group.
    DA8W4_INLINE size_t row_of(size_t group) const { return super ? group / super : group; }
    DA8W4_INLINE const void *scales_at(size_t group) const {
        return element(scales, scale_type, row_of(group) * kBlock);
    }
    DA8W4_INLINE const void *offsets_at(size_t group) const {
        return offsets ? element(offsets, scale_type, row_of(group) * kBlock) : nullptr;
    }
    DA8W4_INLINE const int8_t *zps_at(size_t group) const { return zps ? zps + group * kBlock : nullptr; }
};

// Four codes of column `n`, one a byte, as they are stored.
static inline uint32_t quad_codes(const CodeLayout &layout, const uint8_t *codes, size_t n, size_t quad) {
    uint32_t word;
    memcpy(&word, codes + code_byte(layout, n, quad, 0), kQuad);
    if (layout.bits == 8) return word;
    word = word >> code_shift(n) & 0x0f0f0f0f;
    if (!layout.high_bits()) return word;
    uint32_t high;
    memcpy(&high, codes + high_byte(layout, n, quad, 0), kQuad);
    return word | (high >> high_shift(layout, n, quad) & 0x01010101u * ((1u << layout.high_bits()) - 1)) << 4;
}

// What a stored code stands for, before zero point and scale.
static inline int value_of(const CodeLayout &layout, const int8_t *table, uint8_t code) {
    return table ? table[code] : layout.bits == 8 ? code - 128 : code;
}

// The scale or offset of column `n` and a group: `floats` and `subs` as PackedBlock has them.
static inline float group_float(const void *floats, da8w4_type type, const void *subs, da8w4_type sub_type,
                                size_t super, size_t group, size_t n) {
    if (!super) return load_float(floats, type, group * kBlock + n);
    const size_t at = group * kBlock + n;
    const int sub =
        sub_type == DA8W4_U8 ? static_cast<const uint8_t *>(subs)[at] : static_cast<const int8_t *>(subs)[at];
    return load_float(floats, type, group / super * kBlock + n) * static_cast<float>(sub);
}

static inline float scale_of(const PackedBlock &block, size_t group, size_t n) {
    return group_float(block.scales, block.scale_type, block.sub_scales, block.sub_scale_type, block.super, group, n);
}
static inline float offset_of(const PackedBlock &block, size_t group, size_t n) {
    return group_float(block.offsets, block.scale_type, block.sub_offsets, block.sub_offset_type, block.super, group,
                       n);
}
static inline int zp_of(const PackedBlock &block, size_t group, size_t n) {
    return block.zps ? block.zps[group * kBlock + n] : block.zp;
}

// The column blocks of a packed weight.
class PackedBlocks {
public:
    explicit PackedBlocks(const da8w4_packed &weight)
        : weight_(weight),
          groups_(ceil_div(weight.k, weight.group)),
          rows_(weight.super ? ceil_div(groups_, weight.super) : groups_),
          code_bytes_(layout_of(weight.kind).lines(quads_of(weight.k)) * kLineBytes) {}

    PackedBlock operator[](size_t block) const {
        const da8w4_packed &weight = weight_;
        const size_t at = block * groups_ * kBlock, row = block * rows_ * kBlock;
        const bool two_offsets = weight.super && weight.offsets;
        return {
            .kind = weight.kind,
            .codes = weight.codes + block * code_bytes_,
            .table = weight.table,
            .super = weight.super,
            .scale_type = weight.scale_type,
            .sub_scale_type = weight.sub_scale_type,
            .sub_offset_type = weight.sub_offset_type,
            .scales = element(weight.scales, weight.scale_type, row),
            .sub_scales = weight.super ? element(weight.sub_scales, weight.sub_scale_type, at) : nullptr,
            .offsets = weight.offsets ? element(weight.offsets, weight.scale_type, row) : nullptr,
            .sub_offsets = two_offsets ? element(weight.sub_offsets, weight.sub_offset_type, at) : nullptr,
            .zps = weight.zps ? weight.zps + at : nullptr,
            .zp = weight.zp,
        };
    }

private:
    const da8w4_packed &weight_;
    size_t groups_, rows_, code_bytes_;
};

}  // namespace da8w4
