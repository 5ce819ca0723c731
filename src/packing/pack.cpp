// From a weight matrix as its quantizer left it to the packed layout.
#include "packing/pack.h"

#include <atomic>
#include <cmath>
#include <cstring>

#include "packing/column_sums.h"
#include "packing/layout.h"
#include "runtime/parallel.h"

namespace da8w4 {
namespace {

constexpr size_t kMinCodesPerThread = 1 << 16;
constexpr size_t kSegment = 1024;  // codes of one row handled at a time: long reads, and their 16 KiB of lines fit L1

// How much is added to codes as the caller has them, and to their zero points, so that they are as their kind says.
int raise_of(const da8w4_weight &weight) {
    return weight.format == DA8W4_CODES_SIGNED && weight.kind != DA8W4_INT8 ? (layout_of(weight.kind).most + 1) / 2 : 0;
}

// Writes `count` codes of a row from k on (an even position), as unsigned bytes; what is out of range keeps bits above
// those of its kind.
void read_codes(const da8w4_weight &weight, size_t n, size_t k, size_t count, uint8_t *codes) {
    const uint8_t *row = static_cast<const uint8_t *>(weight.codes) + n * weight.codes_stride;
    switch (weight.format) {
        case DA8W4_CODES_UNSIGNED: memcpy(codes, row + k, count); break;
        case DA8W4_CODES_SIGNED: {
            const int half = (1 << layout_of(weight.kind).bits) / 2;
            for (size_t i = 0; i < count; i++) codes[i] = static_cast<uint8_t>(row[k + i] + half);
            break;
        }
        case DA8W4_CODES_LOW_FIRST:
        case DA8W4_CODES_HIGH_FIRST: {
            const int even = weight.format == DA8W4_CODES_LOW_FIRST ? 0 : 4;
            for (size_t i = 0; i < count; i++) codes[i] = row[(k + i) / 2] >> (i % 2 == 0 ? even : 4 - even) & 15;
            break;
        }
    }
}

// Writes four codes of columns n and n + kHalf, one a byte, to the lines of a block.
template <da8w4_kind kKind>
void store_quad(uint8_t *lines, size_t n, size_t quad, uint32_t low, uint32_t high) {
    constexpr CodeLayout layout = layout_of(kKind);
    constexpr uint32_t nibbles = 0x0f0f0f0f;
    if (layout.bits == 8) {
        memcpy(lines + code_byte(layout, n, quad, 0), &low, kQuad);
        memcpy(lines + code_byte(layout, n + kHalf, quad, 0), &high, kQuad);
        return;
    }
    const uint32_t both = (low & nibbles) | (high & nibbles) << 4;
    memcpy(lines + code_byte(layout, n, quad, 0), &both, kQuad);
    if (!layout.high_bits()) return;
    uint8_t *to = lines + high_byte(layout, n, quad, 0);
    uint32_t upper = 0;  // of the quads of the unit so far
    if (layout.in_unit(quad)) memcpy(&upper, to, kQuad);
    upper |= (low >> 4 & nibbles) << high_shift(layout, n, quad);
    upper |= (high >> 4 & nibbles) << high_shift(layout, n + kHalf, quad);
    memcpy(to, &upper, kQuad);
}

class Packer {
public:
    Packer(const da8w4_weight &weight, const da8w4_packed &packed, const da8w4_packed_arrays &to)
        : weight_(weight), packed_(packed), groups_(ceil_div(packed.k, packed.group)), to_(to) {}

    // False if a code is out of range.
    bool pack_block(size_t block) const {
        switch (packed_.kind) {
            case DA8W4_INT4:
            case DA8W4_TABLE4: return pack_block_of<DA8W4_INT4>(block);
            case DA8W4_INT5: return pack_block_of<DA8W4_INT5>(block);
            case DA8W4_INT6: return pack_block_of<DA8W4_INT6>(block);
            case DA8W4_INT8: return pack_block_of<DA8W4_INT8>(block);
        }
        return false;
    }

private:
    // Tables are stored as 4 bits are.
    template <da8w4_kind kKind>
    bool pack_block_of(size_t block) const {
        constexpr CodeLayout layout = layout_of(kKind);
        uint8_t all = 0;
        uint8_t *lines = to_.codes + block * layout.lines(quads_of(packed_.k)) * kLineBytes;
        for (size_t k = 0; k < packed_.k; k += kSegment) {
            const size_t count = lesser(kSegment, packed_.k - k);
            const size_t padded = round_up(count, kQuad * layout.unit_quads());
            for (size_t n = 0; n < kHalf; n++) {
                uint8_t low[kSegment] = {}, high[kSegment] = {};
                all |= read_column(block * kBlock + n, k, count, low);
                all |= read_column(block * kBlock + n + kHalf, k, count, high);
                for (size_t i = 0; i < padded; i += kQuad) {
                    uint32_t a, b;
                    memcpy(&a, low + i, kQuad);
                    memcpy(&b, high + i, kQuad);
                    store_quad<kKind>(lines, n, (k + i) / kQuad, a, b);
                }
            }
        }
        for (size_t n = 0; n < kBlock; n++) store_column(block, n);
        sum_columns(PackedBlocks(packed_)[block], {.k = packed_.k, .group = packed_.group},
                    lesser(kBlock, packed_.n - block * kBlock), to_.sums + block * kBlock);
        return all >> layout.bits == 0;
    }

    // Reads a segment of column n; returns the union of its codes.
    uint8_t read_column(size_t n, size_t k, size_t count, uint8_t *codes) const {
        if (n >= packed_.n) return 0;
        read_codes(weight_, n, k, count, codes);
        uint8_t all = 0;
        for (size_t i = 0; i < count; i++) all |= codes[i];
        return all;
    }

    // What a column has beside its codes; nothing but zeros beyond the last.
    void store_column(size_t block, size_t n) const {
        const size_t column = block * kBlock + n;
        const bool real = column < packed_.n;
        const size_t rows = packed_.super ? ceil_div(groups_, packed_.super) : groups_;
        for (size_t row = 0; row < rows; row++) {
            const size_t at = (block * rows + row) * kBlock + n, from = column * rows + row;
            store_float(to_.scales, packed_.scale_type, at, real ? weight_.scales[from] : 0.0f);
            if (weight_.offsets) store_float(to_.offsets, packed_.scale_type, at, real ? weight_.offsets[from] : 0.0f);
        }
        for (size_t g = 0; g < groups_; g++) {
            const size_t at = (block * groups_ + g) * kBlock + n, from = column * groups_ + g;
            if (packed_.zps) to_.zps[at] = static_cast<int8_t>(real ? weight_.zps[from] + raise_of(weight_) : 0);
            if (packed_.sub_scales) store_sub(to_.sub_scales, at, weight_.sub_scales, from, real);
            if (packed_.sub_offsets) store_sub(to_.sub_offsets, at, weight_.sub_offsets, from, real);
        }
    }

    static void store_sub(void *to, size_t at, const void *subs, size_t from, bool real) {
        static_cast<uint8_t *>(to)[at] = real ? static_cast<const uint8_t *>(subs)[from] : 0;
    }

    const da8w4_weight &weight_;
    const da8w4_packed &packed_;  // with the arrays that are written
    const size_t groups_;
    const da8w4_packed_arrays &to_;
};

struct Extremes {
    int least, most;
};

// The types in which scales and offsets are stored, the one to be preferred first; the last holds every value.
constexpr da8w4_type kScaleTypes[] = {DA8W4_F16, DA8W4_BF16, DA8W4_F32};
constexpr unsigned kLastScaleType = sizeof kScaleTypes / sizeof *kScaleTypes - 1;

// What all values of an array have in common.
struct Floats {
    bool finite;
    unsigned types;  // bit i: kScaleTypes[i] holds each of them exactly
};

Floats look_at(const float *values, size_t count) {
    std::atomic<bool> all_finite{true};
    std::atomic<unsigned> all_types{~0u};
    parallel(threads_for_packing(count), [&](size_t thread, size_t threads) {
        bool finite = true;
        unsigned types = ~0u;
        const Range range = part_of(count, thread, threads);
        for (size_t i = range.begin; i < range.end; i++) {
            finite = finite && std::isfinite(values[i]);
            for (unsigned type = 0; type < kLastScaleType; type++)
                if (types >> type & 1 && !holds_exactly(kScaleTypes[type], values[i])) types &= ~(1u << type);
        }
        if (!finite) all_finite = false;
        all_types &= types;
    });
    return {.finite = all_finite, .types = all_types};
}

// The least and the greatest zero point, as they are stored.
Extremes zero_points(const da8w4_weight &weight, size_t count) {
    const int raise = raise_of(weight);
    if (!weight.zps) return {.least = weight.zp + raise, .most = weight.zp + raise};
    Extremes found = {.least = weight.zps[0], .most = weight.zps[0]};
    for (size_t i = 1; i < count; i++) {
        found.least = weight.zps[i] < found.least ? weight.zps[i] : found.least;
        found.most = weight.zps[i] > found.most ? weight.zps[i] : found.most;
    }
    return {.least = found.least + raise, .most = found.most + raise};
}

// What codes can stand for.
Extremes values_of(const da8w4_weight &weight) {
    const CodeLayout layout = layout_of(weight.kind);
    if (weight.kind != DA8W4_TABLE4) return {.least = layout.least, .most = layout.most};
    Extremes found = {.least = weight.table[0], .most = weight.table[0]};
    for (int code = 1; code <= layout.most; code++) {
        found.least = weight.table[code] < found.least ? weight.table[code] : found.least;
        found.most = weight.table[code] > found.most ? weight.table[code] : found.most;
    }
    return found;
}

// Whether all products of two levels are floats: exact, and finite.
bool are_exact(const da8w4_weight &weight, const float *floats, const void *subs, da8w4_type type) {
    const size_t groups = ceil_div(weight.k, weight.group), rows = ceil_div(groups, weight.super);
    std::atomic<bool> all{true};
    parallel(threads_for_packing(weight.n * groups), [&](size_t thread, size_t threads) {
        const Range range = part_of(weight.n, thread, threads);
        bool exact = true;
        for (size_t n = range.begin; n < range.end; n++)
            for (size_t g = 0; g < groups; g++) {
                const size_t at = n * groups + g;
                const int sub =
                    type == DA8W4_U8 ? static_cast<const uint8_t *>(subs)[at] : static_cast<const int8_t *>(subs)[at];
                const double product = static_cast<double>(floats[n * rows + g / weight.super]) * sub;
                exact = exact && static_cast<double>(static_cast<float>(product)) == product;
            }
        if (!exact) all = false;
    });
    return all;
}

}  // namespace

size_t threads_for_packing(size_t codes) { return lesser(codes / kMinCodesPerThread + 1, num_threads()); }

da8w4_status plan_pack(const da8w4_weight &weight, da8w4_packed *packed, da8w4_packed_bytes *bytes) {
    const size_t groups = ceil_div(weight.k, weight.group), super = lesser(weight.super, groups);
    const size_t rows = super ? ceil_div(groups, super) : groups;
    Floats floats = look_at(weight.scales, weight.n * rows);
    if (!floats.finite) return DA8W4_BAD_SCALE;
    if (weight.offsets) {
        const Floats offsets = look_at(weight.offsets, weight.n * rows);
        if (!offsets.finite) return DA8W4_BAD_OFFSET;
        floats.types &= offsets.types;
    }
    size_t scale_type = 0;
    while (!(floats.types >> scale_type & 1)) scale_type++;
    if (super && !(are_exact(weight, weight.scales, weight.sub_scales, weight.sub_scale_type) &&
                   (!weight.offsets || are_exact(weight, weight.offsets, weight.sub_offsets, weight.sub_offset_type))))
        return DA8W4_INEXACT_SCALE;

    const Extremes zps = zero_points(weight, weight.n * groups), values = values_of(weight);
    if (zps.least < INT8_MIN || zps.most > INT8_MAX) return DA8W4_BAD_WEIGHT_ZP;
    if (weight.kind == DA8W4_TABLE4 && (zps.least || zps.most)) return DA8W4_BAD_WEIGHT_ZP;
    const int above = values.most - zps.least, below = zps.most - values.least;  // value - zp lies in -below..above
    const int largest = above > below ? above : below;
    const size_t group = lesser(weight.group, weight.k);
    if (largest && group > INT32_MAX / (size_t{128} * static_cast<size_t>(largest))) return DA8W4_INT32_OVERFLOW;
    if (group > INT32_MAX / 128) return DA8W4_INT32_OVERFLOW;  // sums of activations

    const bool one_zp = zps.least == zps.most;
    const size_t blocks = blocks_of(weight.n), values_count = blocks * groups * kBlock;
    *packed = {
        .n = weight.n,
        .k = weight.k,
        .group = group,
        .super = super,
        .kind = weight.kind,
        .scale_type = kScaleTypes[scale_type],
        .sub_scale_type = super ? weight.sub_scale_type : DA8W4_U8,
        .sub_offset_type = super && weight.offsets ? weight.sub_offset_type : DA8W4_U8,
        .zp = one_zp ? zps.least : 0,
        .codes = nullptr,
        .table = nullptr,
        .scales = nullptr,
        .sub_scales = nullptr,
        .zps = nullptr,
        .offsets = nullptr,
        .sub_offsets = nullptr,
        .sums = nullptr,
        .perm = nullptr,
        .factors = nullptr,
        .rotation = 0,
    };
    *bytes = {
        .codes = blocks * layout_of(weight.kind).lines(quads_of(weight.k)) * kLineBytes,
        .scales = blocks * rows * kBlock * size_of(packed->scale_type),
        .sub_scales = super ? values_count : 0,
        .zps = one_zp ? 0 : values_count,
        .offsets = weight.offsets ? blocks * rows * kBlock * size_of(packed->scale_type) : 0,
        .sub_offsets = super && weight.offsets ? values_count : 0,
        .sums = blocks * kBlock * sizeof(float),
    };
    return DA8W4_OK;
}

bool pack(const da8w4_weight &weight, const da8w4_packed &plan, const da8w4_packed_arrays &to) {
    da8w4_packed packed = plan;
    packed.table = weight.table;
    packed.codes = to.codes;
    packed.scales = to.scales;
    packed.sub_scales = to.sub_scales;
    packed.zps = to.zps;
    packed.offsets = to.offsets;
    packed.sub_offsets = to.sub_offsets;
    const Packer packer(weight, packed, to);
    const size_t blocks = blocks_of(weight.n);
    std::atomic<bool> good{true};
    // The split of the product: each thread first touches the pages that it will read.
    parallel(threads_for_packing(weight.n * weight.k), [&](size_t thread, size_t threads) {
        const Range range = part_of(blocks, thread, threads);
        for (size_t block = range.begin; block < range.end && good.load(std::memory_order_relaxed); block++)
            if (!packer.pack_block(block)) good = false;
    });
    return good;
}

}  // namespace da8w4
