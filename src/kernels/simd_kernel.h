// The kernels of every ISA with an 8-bit dot product, written once over a small set of vector
// operations. An ISA file defines `struct Isa` in an anonymous namespace, includes this file, and
// fills its table. Everything here is internal to that file: a shared inline function would let the
// linker put one ISA's code into another's place.
//
// Isa gives:
//   kLanes                      32-bit lanes of a register: 8 or 16
//   Int, Float, Part            registers; Part is where dot products of one step block gather
//   kStepBlock                  steps (quads of k) after which a Part must be flushed
//   kRows                       rows of a tile
//   kSignedPanel                which kind of panel, see kernel.h
//   kSetsOneRow, kSetsTwoRows   independent sums of a tile with so few rows
//   and the operations used below.
//
// Column vectors. A register of L lanes read at byte 4*L*h of a packed line holds the columns
// h*L.. in its low nibbles and 16 + h*L.. in its high ones. So a tile works on that pair of column
// vectors, for h = 0 .. 16/L - 1 in turn; a panel line is read as the same pairs.
//
// Exactness. D = sum a'*code - zp * sum a', or with a signed panel sum (a' + 128)*(code - zp) - 128 * sum
// (code - zp): all sums modulo 2^32, and D in range (the plan of a packed weight sees to that). Int starts at
// the term that is subtracted and dot products are added in any order; the float chain is one fma per group,
// groups ascending.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "half.h"
#include "kernel.h"

namespace da8w4 {
namespace {

using Int = Isa::Int;
using Float = Isa::Float;
using Part = Isa::Part;
constexpr size_t kLanes = Isa::kLanes;
constexpr size_t kPairs = 16 / kLanes;  // values of h
constexpr size_t kHalf = 16;            // column distance between the two vectors of a pair

// ---- where a tile's weights come from --------------------------------------------------------

struct FromBlock {
    const Block block;
    static constexpr bool kSigned = false;

    static constexpr size_t kBytes = kLineBytes;
    const uint8_t *line(size_t quad, size_t h) const { return block.codes + quad * kBytes + h * kLanes * 4; }
    static void codes(const uint8_t *line, Int *low, Int *high) {
        Int both = Isa::load(line);
        *low = Isa::low_nibbles(both);
        *high = Isa::high_nibbles(both);
    }
    Float scale(size_t group, size_t column) const {
        size_t at = group * kBlock + column;
        if (block.scale_type == DA8W4_F32) return Isa::load_f32(static_cast<const float *>(block.scales) + at);
        const uint16_t *halves = static_cast<const uint16_t *>(block.scales) + at;
        return block.scale_type == DA8W4_F16 ? Isa::load_f16(halves) : Isa::load_bf16(halves);
    }
    Int zp(size_t group, size_t column) const {
        if (!block.zps) return Isa::broadcast(block.zp);
        return Isa::load_s8(block.zps + group * kBlock + column);
    }
    Int start(size_t group, size_t column) const { return Isa::zp_pairs(zp(group, column)); }
};

struct FromPanel {
    const Panel panel;
    size_t first_quad, first_group;
    static constexpr bool kSigned = Isa::kSignedPanel;

    static constexpr size_t kBytes = kPanelLineBytes;
    const uint8_t *line(size_t quad, size_t h) const {
        return panel.codes + (quad - first_quad) * kBytes + h * kLanes * 4;
    }
    static void codes(const uint8_t *line, Int *low, Int *high) {
        *low = Isa::load(line);
        *high = Isa::load(line + kHalf * 4);
    }
    Float scale(size_t group, size_t column) const {
        return Isa::load_f32(panel.scales + (group - first_group) * kBlock + column);
    }
    Int start(size_t group, size_t column) const {
        return Isa::load(panel.starts + (group - first_group) * kBlock + column);
    }
};

// ---- the tile --------------------------------------------------------------------------------

template <size_t kValue>
struct Count {
    static constexpr size_t value = kValue;
};

// Independent sums per output: with few rows, one chain of dependent dot products would wait for
// its own latency. Integer sums may be split; the float chain may not.
constexpr size_t sets_for(size_t rows) { return rows == 1 ? Isa::kSetsOneRow : rows == 2 ? Isa::kSetsTwoRows : 1; }

// Adds the dot products of kCount quads, at most a step block, to sum; `line` and `act` are at the first.
template <size_t kRows, class Source, size_t kCount>
__attribute__((always_inline)) inline void add_dots(Int (&sum)[sets_for(kRows)][kRows][2], const uint8_t *line,
                                                    const int8_t *act, size_t stride, Count<kCount>) {
    constexpr size_t kSets = sets_for(kRows);
    Part part[kSets][kRows][2];
    for (size_t s = 0; s < kSets; s++)
        for (size_t r = 0; r < kRows; r++)
            for (size_t v = 0; v < 2; v++) part[s][r][v] = Isa::open(sum[s][r][v]);
#pragma GCC unroll 16
    for (size_t i = 0; i < kCount; i++) {
        Int low, high;
        Source::codes(line + i * Source::kBytes, &low, &high);
#pragma GCC unroll 16
        for (size_t r = 0; r < kRows; r++) {
            const Int a = Isa::broadcast_quad(act + r * stride + i * kQuad);
            Part *to = part[i % kSets][r];
            to[0] = Source::kSigned ? Isa::dot(to[0], a, low) : Isa::dot(to[0], low, a);
            to[1] = Source::kSigned ? Isa::dot(to[1], a, high) : Isa::dot(to[1], high, a);
        }
    }
    for (size_t s = 0; s < kSets; s++)
        for (size_t r = 0; r < kRows; r++)
            for (size_t v = 0; v < 2; v++) sum[s][r][v] = Isa::flush(sum[s][r][v], part[s][r][v]);
}

// Adds the dot products of any number of quads to sum.
template <size_t kRows, class Source>
void add_any_dots(Int (&sum)[kRows][2], const uint8_t *line, const int8_t *act, size_t stride, size_t quads) {
    constexpr size_t kSets = sets_for(kRows);
    Int sets[kSets][kRows][2];
    for (size_t r = 0; r < kRows; r++)
        for (size_t v = 0; v < 2; v++) {
            sets[0][r][v] = sum[r][v];
            for (size_t s = 1; s < kSets; s++) sets[s][r][v] = Isa::zero();
        }
    auto steps = [&](auto count) {
        add_dots<kRows, Source>(sets, line, act, stride, count);
        line += count.value * Source::kBytes;
        act += count.value * kQuad;
        quads -= count.value;
    };
    while (quads >= Isa::kStepBlock) steps(Count<Isa::kStepBlock>());
    while (quads > 0) steps(Count<1>());
    for (size_t r = 0; r < kRows; r++)
        for (size_t v = 0; v < 2; v++) {
            sum[r][v] = sets[0][r][v];
            for (size_t s = 1; s < kSets; s++) sum[r][v] = Isa::add(sum[r][v], sets[s][r][v]);
        }
}

template <size_t kRows, class Source>
void rows_tile(const Tile &tile, const Source &source) {
    const int32_t *sums = tile.act.sums + chunks_before(tile.k_begin, tile.group);
    for (size_t h = 0; h < kPairs; h++) {
        const size_t column = h * kLanes;
        size_t k = tile.k_begin, group = k / tile.group, group_end = (group + 1) * tile.group, chunk = 0;
        Int sum[kRows][2];
        Float acc[kRows][2];
        auto start_group = [&] {
            for (size_t v = 0; v < 2; v++) {
                Int start = Source::kSigned ? source.start(group, column + v * kHalf) : Isa::zero();
                for (size_t r = 0; r < kRows; r++) sum[r][v] = start;
            }
        };
        start_group();
        for (size_t r = 0; r < kRows; r++)
            for (size_t v = 0; v < 2; v++) {
                const size_t at = r * kBlock + column + v * kHalf;
                acc[r][v] = k == 0 ? Isa::zero_float() : Isa::load_f32(tile.acc + at);
                if (k % tile.group != 0) sum[r][v] = Isa::add(sum[r][v], Isa::load(tile.partial + at));
            }
        while (k < tile.k_end) {
            size_t end = Source::kSigned ? tile.k_end : k + kChunk;
            if (end > group_end) end = group_end;
            if (end > tile.k) end = tile.k;
            if (!Source::kSigned) {
                for (size_t v = 0; v < 2; v++) {
                    Int zp = source.start(group, column + v * kHalf);
                    for (size_t r = 0; r < kRows; r++) {
                        Int chunk_sum = Isa::broadcast(sums[r * tile.act.sums_stride + chunk]);
                        sum[r][v] = Isa::add_product(sum[r][v], zp, chunk_sum);
                    }
                }
                chunk++;
            }
            add_any_dots<kRows, Source>(sum, source.line(k / kQuad, h), tile.act.rows + k, tile.act.stride,
                                        ceil_div(end - k, kQuad));
            k = end;
            if (k == group_end || k == tile.k) {
                for (size_t v = 0; v < 2; v++) {
                    Float scale = source.scale(group, column + v * kHalf);
                    for (size_t r = 0; r < kRows; r++) acc[r][v] = Isa::fma(Isa::to_float(sum[r][v]), scale, acc[r][v]);
                }
                group++;
                group_end += tile.group;
                if (k < tile.k_end) start_group();
            }
        }
        const bool unfinished = k % tile.group != 0 && k != tile.k;
        for (size_t r = 0; r < kRows; r++)
            for (size_t v = 0; v < 2; v++) {
                const size_t at = r * kBlock + column + v * kHalf;
                Isa::store_f32(tile.acc + at, acc[r][v]);
                if (unfinished) Isa::store(tile.partial + at, sum[r][v]);
            }
    }
}

// rows_tile for the usual range of k: whole groups, each some step blocks long, and a chunk at most where
// chunks count. Where a group is short, what it costs beside its dot products decides.
template <class Source>
bool has_whole_groups(const Tile &tile) {
    return tile.group % (Isa::kStepBlock * kQuad) == 0 && (Source::kSigned || tile.group <= kChunk) &&
           tile.k_begin % tile.group == 0 && tile.k_end % tile.group == 0;
}

template <size_t kRows, class Source>
void whole_groups_tile(const Tile &tile, const Source source) {
    constexpr size_t kSets = sets_for(kRows);
    for (size_t h = 0; h < kPairs; h++) {
        const size_t column = h * kLanes;
        const int8_t *act = tile.act.rows + tile.k_begin;
        const uint8_t *line = source.line(tile.k_begin / kQuad, h);
        size_t group = tile.k_begin / tile.group;
        Float acc[kRows][2];
        for (size_t r = 0; r < kRows; r++)
            for (size_t v = 0; v < 2; v++) {
                const size_t at = r * kBlock + column + v * kHalf;
                acc[r][v] = tile.k_begin == 0 ? Isa::zero_float() : Isa::load_f32(tile.acc + at);
            }
        for (const size_t groups_end = tile.k_end / tile.group; group < groups_end; group++) {
            Int sum[kSets][kRows][2];
            for (size_t v = 0; v < 2; v++) {
                const Int start = source.start(group, column + v * kHalf);
                for (size_t r = 0; r < kRows; r++) {
                    sum[0][r][v] = start;
                    if (!Source::kSigned) {
                        const Int group_sum = Isa::broadcast(tile.act.sums[r * tile.act.sums_stride + group]);
                        sum[0][r][v] = Isa::add_product(Isa::zero(), start, group_sum);
                    }
                    for (size_t s = 1; s < kSets; s++) sum[s][r][v] = Isa::zero();
                }
            }
            for (size_t steps = tile.group / kQuad; steps; steps -= Isa::kStepBlock) {
                add_dots<kRows, Source>(sum, line, act, tile.act.stride, Count<Isa::kStepBlock>());
                act += Isa::kStepBlock * kQuad;
                line += Isa::kStepBlock * Source::kBytes;
            }
            for (size_t v = 0; v < 2; v++) {
                const Float scale = source.scale(group, column + v * kHalf);
                for (size_t r = 0; r < kRows; r++) {
                    for (size_t s = 1; s < kSets; s++) sum[0][r][v] = Isa::add(sum[0][r][v], sum[s][r][v]);
                    acc[r][v] = Isa::fma(Isa::to_float(sum[0][r][v]), scale, acc[r][v]);
                }
            }
        }
        for (size_t r = 0; r < kRows; r++)
            for (size_t v = 0; v < 2; v++) Isa::store_f32(tile.acc + r * kBlock + column + v * kHalf, acc[r][v]);
    }
}

// Calls use(Count<rows>()).
template <class Use, size_t kRows = Isa::kRows>
void with_rows(size_t rows, Use use) {
    if constexpr (kRows > 1)
        if (rows < kRows) return with_rows<Use, kRows - 1>(rows, use);
    use(Count<kRows>());
}

template <class Source>
void any_tile(const Tile &tile, size_t rows, const Source &source) {
    if (has_whole_groups<Source>(tile))
        with_rows(rows, [&](auto count) { whole_groups_tile<count.value>(tile, source); });
    else
        with_rows(rows, [&](auto count) { rows_tile<count.value>(tile, source); });
}

void direct_tile(const Tile &tile, size_t rows, const Block &block) { any_tile(tile, rows, FromBlock{block}); }

void panel_tile(const Tile &tile, size_t rows, const Panel &panel) {
    any_tile(tile, rows, FromPanel{panel, tile.k_begin / kQuad, tile.k_begin / tile.group});
}

void unpack_panel(const Block &block, size_t k, size_t group, size_t k_begin, size_t k_end, const Panel &panel) {
    const FromBlock source{block};
    const size_t first_quad = k_begin / kQuad, first_group = k_begin / group;
    for (size_t g = first_group; g * group < k_end && g * group < k; g++) {
        const size_t begin = g * group > k_begin ? g * group : k_begin;
        const size_t end = (g + 1) * group < k_end ? (g + 1) * group : k_end;
        for (size_t h = 0; h < kPairs; h++) {
            const size_t column = h * kLanes;
            Int zp[2], sum[2];
            for (size_t v = 0; v < 2; v++) {
                zp[v] = source.zp(g, column + v * kHalf);
                sum[v] = Isa::zero();
            }
            const Int zp_bytes[2] = {Isa::replicate_byte(zp[0]), Isa::replicate_byte(zp[1])};
            uint8_t *line = panel.codes + (begin / kQuad - first_quad) * kPanelLineBytes + column * 4;
            for (size_t quad = begin / kQuad; quad < ceil_div(end, kQuad); quad++, line += kPanelLineBytes) {
                Int codes[2];
                source.codes(source.line(quad, h), &codes[0], &codes[1]);
                for (size_t v = 0; v < 2; v++) {
                    if (Isa::kSignedPanel) {
                        codes[v] = Isa::sub_bytes(codes[v], zp_bytes[v]);
                        sum[v] = Isa::add_s8(sum[v], codes[v]);
                    }
                    Isa::store(line + v * kHalf * 4, codes[v]);
                }
            }
            for (size_t v = 0; v < 2; v++) {
                const size_t at = (g - first_group) * kBlock + column + v * kHalf;
                Isa::store_f32(panel.scales + at, source.scale(g, column + v * kHalf));
                Isa::store(panel.starts + at, Isa::kSignedPanel ? Isa::times_minus_128(sum[v]) : Isa::zp_pairs(zp[v]));
            }
        }
    }
}

// ---- rows of activations ---------------------------------------------------------------------

Float load_floats(const void *x, da8w4_type type) {
    if (type == DA8W4_F32) return Isa::load_f32(static_cast<const float *>(x));
    const uint16_t *halves = static_cast<const uint16_t *>(x);
    return type == DA8W4_F16 ? Isa::load_f16(halves) : Isa::load_bf16(halves);
}

// Calls use(floats, index) for each register of a row; the last one is filled up with zeros.
template <class Use>
void for_each_register(const void *x, da8w4_type type, size_t k, Use use) {
    const size_t bytes = type == DA8W4_F32 ? 4 : 2;
    const char *at = static_cast<const char *>(x);
    size_t i = 0;
    for (; i + kLanes <= k; i += kLanes) use(load_floats(at + i * bytes, type), i);
    if (i < k) {
        alignas(64) char rest[kLanes * 4] = {};
        memcpy(rest, at + i * bytes, (k - i) * bytes);
        use(load_floats(rest, type), i);
    }
}

void quantize_row(const void *x, da8w4_type x_type, size_t k, bool symmetric, uint8_t flip, void *act, float *scale,
                  int32_t *zp) {
    uint8_t *bytes = static_cast<uint8_t *>(act);
    Float low = Isa::zero_float(), high = Isa::zero_float();
    Int magnitude = Isa::zero();
    for_each_register(x, x_type, k, [&](Float value, size_t) {
        low = Isa::min(low, value);
        high = Isa::max(high, value);
        magnitude = Isa::max_magnitude(magnitude, value);
    });
    const float mn = Isa::lowest(low), mx = Isa::highest(high);
    const float range = symmetric ? (mx > -mn ? mx : -mn) / 127.0f : (mx - mn) / 255.0f;
    if (Isa::highest_magnitude(magnitude) >= 0x7f800000 || !(range <= 0x1.fffffep127f)) {
        memset(bytes, flip, k);
        *scale = float_of(kNanF32);
        *zp = 0;
        return;
    }
    const float epsilon = 0x1p-23f;
    const float s = range > epsilon ? range : epsilon;
    int32_t z = symmetric ? 0 : -Isa::nearest(mn / s);
    z = z > 255 ? 255 : z;
    // Clamping to 0..255 and subtracting c = 128 is subtracting first and saturating to int8. A
    // symmetric row needs no clamp at -127: |x / s| exceeds 127 only by rounding errors.
    const int32_t shifted = symmetric ? 0 : z - 128;
    const Float inverse = Isa::broadcast_float(1.0f / s);
    const Int offset = Isa::broadcast(shifted);
    for_each_register(x, x_type, k, [&](Float value, size_t i) {
        Int a = Isa::add(Isa::to_nearest(Isa::mul(value, inverse)), offset);
        if (i + kLanes <= k) {
            Isa::store_s8_saturated(bytes + i, a, flip);
        } else {
            uint8_t rest[kLanes];
            Isa::store_s8_saturated(rest, a, flip);
            memcpy(bytes + i, rest, k - i);
        }
    });
    *scale = s;
    *zp = shifted;
}

void sum_row(const int8_t *act, size_t k, size_t group, int32_t *sums) {
    for (size_t begin = 0; begin < k;) {
        size_t group_end = (begin / group + 1) * group, end = begin + kChunk;
        if (end > group_end) end = group_end;
        if (end > k) end = k;
        Int sum = Isa::zero();
        for (; begin + kLanes * 4 <= end; begin += kLanes * 4) sum = Isa::add_s8(sum, Isa::load(act + begin));
        if (begin < end) {
            alignas(64) int8_t rest[kLanes * 4] = {};
            memcpy(rest, act + begin, end - begin);
            sum = Isa::add_s8(sum, Isa::load(rest));
            begin = end;
        }
        *sums++ = Isa::total(sum);
    }
}

// ---- the last step ---------------------------------------------------------------------------

void finish_row(const Finish &finish) {
    const size_t bytes = finish.out_type == DA8W4_F32 ? 4 : 2;
    const bool whole = finish.cols == kBlock;
    alignas(64) float bias_rest[kBlock] = {};
    alignas(64) char out_rest[kBlock * 4];
    const float *bias = finish.bias;
    if (bias && !whole) bias = static_cast<float *>(memcpy(bias_rest, bias, finish.cols * sizeof(float)));
    char *out = whole ? static_cast<char *>(finish.out) : out_rest;

    const Float scale = Isa::broadcast_float(finish.act_scale), zp = Isa::broadcast_float(finish.act_zp);
    for (size_t n = 0; n < kBlock; n += kLanes) {
        Float t = Isa::load_f32(finish.acc + n);
        if (finish.act_zp != 0) t = Isa::fnma(zp, Isa::load_f32(finish.sums + n), t);
        Float y = bias ? Isa::fma(t, scale, Isa::load_f32(bias + n)) : Isa::mul(t, scale);
        y = Isa::one_nan(y);
        char *to = out + n * bytes;
        if (finish.out_type == DA8W4_F32)
            Isa::store_f32(to, y);
        else if (finish.out_type == DA8W4_F16)
            Isa::store_f16(to, y);
        else
            Isa::store_bf16(to, y);
    }
    if (!whole) memcpy(finish.out, out_rest, finish.cols * bytes);
}

// Unpacking a panel pays from about five tiles on: before, each tile may as well unpack for itself. Where
// the two cross was measured for 512-bit vpdpbusd and for 256-bit vpmaddubsw, with the same outcome.
constexpr size_t kDirectMax = 24;

constexpr Kernel simd_kernel(const char *name, const char *description, uint64_t needs) {
    Kernel kernel = {};
    kernel.name = name;
    kernel.description = description;
    kernel.needs = needs;
    kernel.direct_max = kDirectMax;
    kernel.direct_rows = Isa::kRows;
    kernel.panel_rows = Isa::kRows;
    kernel.signed_panel = Isa::kSignedPanel;
    kernel.quantize_row = quantize_row;
    kernel.sum_row = sum_row;
    kernel.direct_tile = direct_tile;
    kernel.unpack_panel = unpack_panel;
    kernel.panel_tile = panel_tile;
    kernel.finish_row = finish_row;
    return kernel;
}

}  // namespace
}  // namespace da8w4
