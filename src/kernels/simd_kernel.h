// The kernels of every ISA with an 8-bit dot product, written once over a small set of vector
// operations. An ISA file defines `struct Isa` in an anonymous namespace, includes this file, and
// fills its table. Everything here is internal to that file: a shared inline function would let the
// linker put one ISA's code into another's place.
//
// Isa gives:
//   kLanes                      32-bit lanes of a register: 8 or 16
//   Int, Float, Part            registers; Part is where dot products of one step gather
//   kRows                       rows of a tile
//   kOwnPair                    whether tiles use Isa::usual_pair instead of ours
//   kShifted                    which kind of panel, see kernel.h
//   kSetsOneRow, kSetsTwoRows   independent sums of a tile with so few rows
//   and the operations used below.
//
// Column vectors. A register of L lanes read at byte 4*L*h of a packed line holds the columns
// h*L.. in its low nibbles and 16 + h*L.. in its high ones. So a tile works on that pair of column
// vectors, for h = 0 .. 16/L - 1 in turn; a panel line is read as the same pairs.
//
// Exactness. D = sum a'*code - zp * sum a', or with a shifted panel sum a'*(code - zp + 128) - 128 * sum a': all
// sums modulo 2^32, and D in range (the plan of a packed weight sees to that). Sums start at the term that is
// subtracted, and dot products are added in any order; the float chain is one fma per group, or two where there are
// offsets, groups ascending.
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

// ---- weights ---------------------------------------------------------------------------------

template <da8w4_type kType>
Float load_as(const void *values, size_t i) {
    if (kType == DA8W4_F32) return Isa::load_f32(static_cast<const float *>(values) + i);
    const uint16_t *halves = static_cast<const uint16_t *>(values) + i;
    return kType == DA8W4_F16 ? Isa::load_f16(halves) : Isa::load_bf16(halves);
}

constexpr size_t bytes_of(da8w4_type type) { return type == DA8W4_F32 ? 4 : 2; }

template <da8w4_type kType>
void convert(const void *from, size_t count, float *to) {
    for (size_t i = 0; i < count; i += kLanes) Isa::store_f32(to + i, load_as<kType>(from, i));
}

Int load_zps(const Block &block, size_t at) {
    return block.zps ? Isa::load_s8(block.zps + at) : Isa::broadcast(block.zp);
}

void unpack_line(const uint8_t *line, Int *low, Int *high) {
    const Int both = Isa::load(line);
    *low = Isa::low_nibbles(both);
    *high = Isa::high_nibbles(both);
}

// Columns of scales, or of offsets, which are of the same type: as floats, or where they lie.
const void *floats_of(const Block &block, const void *from, size_t first, size_t count, float *room, bool in_place,
                      const char *ahead) {
    const size_t bytes = bytes_of(block.scale_type);
    from = static_cast<const char *>(from) + first * bytes;
    for (size_t i = 0; i < count * bytes; i += 64) __builtin_prefetch(ahead + i);
    if (in_place) return from;
    block.scale_type == DA8W4_F16 ? convert<DA8W4_F16>(from, count, room) : convert<DA8W4_BF16>(from, count, room);
    return room;
}

void store_zp_pairs(const Block &block, size_t first, size_t count, int32_t *to) {
    for (size_t i = 0; i < count; i += kLanes) Isa::store(to + i, Isa::zp_pairs(load_zps(block, first + i)));
}

// Whole groups, each of one chunk and some steps long. Where a group is short, what it costs beside its dot
// products decides.
bool has_usual_groups(size_t group, const Span &span) {
    return span.groups && group % (kStepQuads * kQuad) == 0 && group <= kChunk;
}

// Scales, offsets and, where sums start from them, pairs of zero points.
Panel unpack_groups(const Block &block, size_t group, const Span &span, const Room &room, bool as_float32,
                    const Ahead &ahead) {
    const size_t groups = span.groups ? span.groups : ceil_div(span.end - span.group * group, group);
    const size_t first = span.group * kBlock, count = groups * kBlock;
    const bool in_place = block.scale_type == DA8W4_F32 || !as_float32;
    Panel panel = {};
    panel.codes = room.codes ? room.codes : block.codes + span.begin / kQuad * kLineBytes;
    panel.scale_type = in_place ? block.scale_type : DA8W4_F32;
    panel.scales = floats_of(block, block.scales, first, count, room.scales, in_place, ahead.scales);
    if (block.offsets)
        panel.offsets = floats_of(block, block.offsets, first, count, room.offsets, in_place, ahead.offsets);
    if (room.codes && Isa::kShifted) return panel;
    panel.zp_pairs = room.zp_pairs;
    panel.zp_step = block.zps ? kBlock : 0;
    store_zp_pairs(block, first, block.zps ? count : kBlock, room.zp_pairs);
    if (block.zps)
        for (size_t i = 0; i < count; i += 64) __builtin_prefetch(ahead.zps + i);
    return panel;
}

// Codes to a byte each: as they are, or code - zp + kShift. Groups are filled up with zeros to multiples of kQuads.
template <bool kMinusZp, int kShift, size_t kQuads>
void unpack_codes(const Block &block, size_t group, const Span &span, uint8_t *to) {
    const uint8_t *from = block.codes + span.begin / kQuad * kLineBytes;
    for (size_t g = span.group, begin = span.begin, end; begin < span.end; g++, begin = end) {
        end = (g + 1) * group < span.end ? (g + 1) * group : span.end;
        const size_t quads = ceil_div(end - begin, kQuad), all_quads = round_up(quads, kQuads);
        for (size_t h = 0; h < kPairs; h++) {
            Int shift[2];
            for (size_t v = 0; v < 2; v++) {
                const Int zps = load_zps(block, g * kBlock + h * kLanes + v * kHalf);
                shift[v] = Isa::replicate_byte(Isa::sub(Isa::broadcast(kShift), zps));
            }
            for (size_t quad = 0; quad < quads; quad++) {
                Int line[2];
                unpack_line(from + quad * kLineBytes + h * kLanes * 4, &line[0], &line[1]);
                for (size_t v = 0; v < 2; v++)
                    Isa::store(to + quad * kPanelLineBytes + (h * kLanes + v * kHalf) * 4,
                               kMinusZp ? Isa::add_bytes(line[v], shift[v]) : line[v]);
            }
        }
        memset(to + quads * kPanelLineBytes, 0, (all_quads - quads) * kPanelLineBytes);
        from += quads * kLineBytes;
        to += all_quads * kPanelLineBytes;
    }
}

Panel unpack(const Block &block, size_t group, const Span &span, const Room &room, size_t tiles, const Ahead &ahead) {
    if (room.codes) unpack_codes<Isa::kShifted, 128, 1>(block, group, span, room.codes);
    const bool one_tile = !room.codes && tiles == 1 && has_usual_groups(group, span);
    return unpack_groups(block, group, span, room, !one_tile, ahead);
}

// ---- the tile --------------------------------------------------------------------------------

template <size_t kValue>
struct Count {
    static constexpr size_t value = kValue;
};

// Independent sums per output: with few rows, one chain of dependent dot products would wait for
// its own latency. Integer sums may be split; the float chain may not.
constexpr size_t sets_for(size_t rows) { return rows == 1 ? Isa::kSetsOneRow : rows == 2 ? Isa::kSetsTwoRows : 1; }

// One step's part of what is needed soon; into L2, for L1 is full. One tile alone asks for a step's codes at
// once: where they are in cache already, a loop around each line would cost as much as multiplying them.
inline __attribute__((always_inline)) void fetch(Ahead &ahead) {
    constexpr size_t kLines = kStepQuads * kLineBytes / 64;
    if (ahead.lines == kLines) {
#pragma GCC unroll 16
        for (size_t i = 0; i < kLines; i++) __builtin_prefetch(ahead.codes + i * 64, 0, 2);
        ahead.codes += kLines * 64;
    } else {
        for (size_t i = 0; i < ahead.lines; i++, ahead.codes += 64) __builtin_prefetch(ahead.codes, 0, 2);
    }
}

// What one tile of kRows rows by a pair of column vectors takes, from the first k of its span.
struct Pair {
    const int8_t *act;
    size_t stride;
    const int32_t *sums;      // [chunk][row]
    const float *group_sums;  // [group][row]
    size_t sums_stride;
    const uint8_t *line;
    const char *scales;       // [group][kBlock]
    const char *offsets;      // [group][kBlock], or null
    const int32_t *zp_pairs;  // [group][kBlock], or [kBlock]
    size_t zp_step;           // from group to group
    const float *acc_from;    // [row][kBlock]
    float *acc;               // [row][kBlock]
    Ahead ahead;

    void shift(ptrdiff_t columns, ptrdiff_t scale_bytes) {
        line += columns * 4;
        scales += columns * scale_bytes;
        if (offsets) offsets += columns * scale_bytes;
        zp_pairs += columns;
        acc_from += columns;
        acc += columns;
    }
};

// What a chunk adds to an integer sum beside its dot products: -zp * chunk_sum, where a shifted panel has
// the one zero point 128 and the driver has multiplied by it.
template <bool kPacked>
Int chunk_start(const int32_t *zp_pairs, int32_t chunk_sum) {
    const Int sums = Isa::broadcast(chunk_sum);
    if (!kPacked && Isa::kShifted) return sums;
    return Isa::add_product(Isa::zero(), Isa::load(zp_pairs), sums);
}

// Adds the dot products of kCount quads, at most a step, to sum; `line` and `act` are at the first.
template <size_t kRows, bool kPacked, size_t kCount>
__attribute__((always_inline)) inline void add_dots(Int (&sum)[sets_for(kRows)][kRows][2], const uint8_t *&line,
                                                    const int8_t *&act, size_t stride, Count<kCount>) {
    constexpr size_t kSets = sets_for(kRows), kBytes = kPacked ? kLineBytes : kPanelLineBytes;
    Part part[kSets][kRows][2];
    for (size_t s = 0; s < kSets; s++)
        for (size_t r = 0; r < kRows; r++)
            for (size_t v = 0; v < 2; v++) part[s][r][v] = Isa::open(sum[s][r][v]);
#pragma GCC unroll 16
    for (size_t i = 0; i < kCount; i++) {
        Int low, high;
        if (kPacked) {
            unpack_line(line + i * kBytes, &low, &high);
        } else {
            low = Isa::load(line + i * kBytes);
            high = Isa::load(line + i * kBytes + kHalf * 4);
        }
#pragma GCC unroll 16
        for (size_t r = 0; r < kRows; r++) {
            const Int a = Isa::broadcast_quad(act + r * stride + i * kQuad);
            Part *to = part[i % kSets][r];
            to[0] = Isa::dot(to[0], low, a);
            to[1] = Isa::dot(to[1], high, a);
        }
    }
    line += kCount * kBytes;
    act += kCount * kQuad;
    for (size_t s = 0; s < kSets; s++)
        for (size_t r = 0; r < kRows; r++)
            for (size_t v = 0; v < 2; v++) sum[s][r][v] = Isa::flush(sum[s][r][v], part[s][r][v]);
}

// Adds the dot products of any number of quads to sum.
template <size_t kRows, bool kPacked>
void add_any_dots(Int (&sum)[kRows][2], const uint8_t *&line, const int8_t *&act, size_t stride, size_t quads,
                  Ahead &ahead) {
    constexpr size_t kSets = sets_for(kRows);
    Int sets[kSets][kRows][2];
    for (size_t r = 0; r < kRows; r++)
        for (size_t v = 0; v < 2; v++) {
            sets[0][r][v] = sum[r][v];
            for (size_t s = 1; s < kSets; s++) sets[s][r][v] = Isa::zero();
        }
    for (; quads >= kStepQuads; quads -= kStepQuads) {
        fetch(ahead);
        add_dots<kRows, kPacked>(sets, line, act, stride, Count<kStepQuads>());
    }
    for (; quads; quads--) add_dots<kRows, kPacked>(sets, line, act, stride, Count<1>());
    for (size_t r = 0; r < kRows; r++)
        for (size_t v = 0; v < 2; v++) {
            sum[r][v] = sets[0][r][v];
            for (size_t s = 1; s < kSets; s++) sum[r][v] = Isa::add(sum[r][v], sets[s][r][v]);
        }
}

// The float steps at the end of a group: one, or with offsets two.
template <size_t kRows, bool kOffsets, da8w4_type kScale>
__attribute__((always_inline)) inline void add_group(Float (&acc)[kRows][2], const Int (&sum)[kRows][2], Pair &pair) {
    for (size_t v = 0; v < 2; v++) {
        const Float scale = load_as<kScale>(pair.scales, v * kHalf);
        for (size_t r = 0; r < kRows; r++) acc[r][v] = Isa::fma(Isa::to_float(sum[r][v]), scale, acc[r][v]);
        if (!kOffsets) continue;
        const Float offset = load_as<kScale>(pair.offsets, v * kHalf);
        for (size_t r = 0; r < kRows; r++)
            acc[r][v] = Isa::fma(Isa::broadcast_float(pair.group_sums[r]), offset, acc[r][v]);
    }
    pair.scales += kBlock * bytes_of(kScale);
    pair.zp_pairs += pair.zp_step;
    if (!kOffsets) return;
    pair.offsets += kBlock * bytes_of(kScale);
    pair.group_sums += pair.sums_stride;
}

template <size_t kRows, bool kPacked>
void any_pair(const Tiles &tiles, Pair pair, int32_t *partial) {
    size_t k = tiles.span.begin, group_end = (tiles.span.group + 1) * tiles.group;
    const bool inside = k != tiles.span.group * tiles.group;
    Int sum[kRows][2];
    Float acc[kRows][2];
    for (size_t r = 0; r < kRows; r++)
        for (size_t v = 0; v < 2; v++) {
            acc[r][v] = Isa::load_f32(pair.acc_from + r * kBlock + v * kHalf);
            sum[r][v] = inside ? Isa::load(partial + r * kBlock + v * kHalf) : Isa::zero();
        }
    while (k < tiles.span.end) {
        size_t end = k + kChunk;
        if (end > group_end) end = group_end;
        if (end > tiles.k) end = tiles.k;
        for (size_t r = 0; r < kRows; r++)
            for (size_t v = 0; v < 2; v++)
                sum[r][v] = Isa::add(sum[r][v], chunk_start<kPacked>(pair.zp_pairs + v * kHalf, pair.sums[r]));
        pair.sums += pair.sums_stride;
        add_any_dots<kRows, kPacked>(sum, pair.line, pair.act, pair.stride, ceil_div(end - k, kQuad), pair.ahead);
        k = end;
        if (k != group_end && k != tiles.k) continue;
        pair.offsets ? add_group<kRows, true, DA8W4_F32>(acc, sum, pair)
                     : add_group<kRows, false, DA8W4_F32>(acc, sum, pair);
        for (size_t r = 0; r < kRows; r++)
            for (size_t v = 0; v < 2; v++) sum[r][v] = Isa::zero();
        group_end += tiles.group;
    }
    const bool unfinished = k + tiles.group != group_end && k != tiles.k;
    for (size_t r = 0; r < kRows; r++)
        for (size_t v = 0; v < 2; v++) {
            Isa::store_f32(pair.acc + r * kBlock + v * kHalf, acc[r][v]);
            if (unfinished) Isa::store(partial + r * kBlock + v * kHalf, sum[r][v]);
        }
}

// any_pair for usual groups.
template <size_t kRows, bool kPacked, bool kOffsets, da8w4_type kScale>
void usual_pair(Pair pair, size_t groups, size_t steps) {
    constexpr size_t kSets = sets_for(kRows);
    Float acc[kRows][2];
    for (size_t r = 0; r < kRows; r++)
        for (size_t v = 0; v < 2; v++) acc[r][v] = Isa::load_f32(pair.acc_from + r * kBlock + v * kHalf);
    for (; groups; groups--) {
        Int sum[kSets][kRows][2];
        for (size_t r = 0; r < kRows; r++)
            for (size_t v = 0; v < 2; v++) {
                sum[0][r][v] = chunk_start<kPacked>(pair.zp_pairs + v * kHalf, pair.sums[r]);
                for (size_t s = 1; s < kSets; s++) sum[s][r][v] = Isa::zero();
            }
        for (size_t step = steps; step; step--) {
            fetch(pair.ahead);
            add_dots<kRows, kPacked>(sum, pair.line, pair.act, pair.stride, Count<kStepQuads>());
        }
        for (size_t v = 0; v < 2; v++)
            for (size_t r = 0; r < kRows; r++)
                for (size_t s = 1; s < kSets; s++) sum[0][r][v] = Isa::add(sum[0][r][v], sum[s][r][v]);
        add_group<kRows, kOffsets, kScale>(acc, sum[0], pair);
        pair.sums += pair.sums_stride;
    }
    for (size_t r = 0; r < kRows; r++)
        for (size_t v = 0; v < 2; v++) Isa::store_f32(pair.acc + r * kBlock + v * kHalf, acc[r][v]);
}

template <bool kPacked, bool kOffsets, da8w4_type kScale, size_t kRows = Isa::kRows, class Own = Isa>
void tiles_of(const Tiles &tiles, const Panel &panel) {
    if constexpr (kRows > 1)
        if (tiles.height < kRows) return tiles_of<kPacked, kOffsets, kScale, kRows - 1>(tiles, panel);
    alignas(64) static const float zeros[kRows * kBlock] = {};
    const bool usual = has_usual_groups(tiles.group, tiles.span), fresh = tiles.span.begin == 0;
    const size_t groups = tiles.span.groups, steps = tiles.group / (kStepQuads * kQuad);
    const size_t ahead_bytes = (tiles.span.end - tiles.span.begin) / (kStepQuads * kQuad) * tiles.ahead.lines * 64;
    Pair pair = {tiles.act.rows,
                 tiles.act.stride,
                 tiles.act.sums,
                 tiles.act.group_sums,
                 tiles.act.sums_stride,
                 panel.codes,
                 static_cast<const char *>(panel.scales),
                 static_cast<const char *>(panel.offsets),
                 panel.zp_pairs,
                 panel.zp_step,
                 fresh ? zeros : tiles.acc,
                 tiles.acc,
                 tiles.ahead};
    for (size_t row = 0; row < tiles.count * kRows; row += kRows) {
        pair.ahead.lines = pair.ahead.codes < pair.ahead.codes_end ? tiles.ahead.lines : 0;
        for (size_t h = 0; h < kPairs; h++) {
            if (kScale == DA8W4_F32 && !usual)
                any_pair<kRows, kPacked>(tiles, pair, tiles.partial + row * kBlock + h * kLanes);
            else if constexpr (Own::kOwnPair)
                Own::template usual_pair<kRows, kPacked, kOffsets, kScale>(pair, groups, steps);
            else
                usual_pair<kRows, kPacked, kOffsets, kScale>(pair, groups, steps);
            pair.shift(kLanes, bytes_of(kScale));
            pair.ahead.lines = 0;  // once a tile
        }
        pair.shift(-static_cast<ptrdiff_t>(kPairs * kLanes), bytes_of(kScale));
        pair.act += kRows * tiles.act.stride;
        pair.sums += kRows;
        pair.group_sums += kRows;
        if (!fresh) pair.acc_from += kRows * kBlock;
        pair.acc += kRows * kBlock;
        pair.ahead.codes += ahead_bytes;
    }
}

template <bool kPacked, da8w4_type kScale>
void tiles_with(const Tiles &tiles, const Panel &panel) {
    panel.offsets ? tiles_of<kPacked, true, kScale>(tiles, panel) : tiles_of<kPacked, false, kScale>(tiles, panel);
}

void packed_tiles(const Tiles &tiles, const Panel &panel) {
    if (panel.scale_type == DA8W4_F32)
        tiles_with<true, DA8W4_F32>(tiles, panel);
    else if (panel.scale_type == DA8W4_F16)
        tiles_with<true, DA8W4_F16>(tiles, panel);
    else
        tiles_with<true, DA8W4_BF16>(tiles, panel);
}

void unpacked_tiles(const Tiles &tiles, const Panel &panel) { tiles_with<false, DA8W4_F32>(tiles, panel); }

// ---- rows of activations ---------------------------------------------------------------------

Float load_floats(const void *x, da8w4_type type) {
    return type == DA8W4_F32   ? load_as<DA8W4_F32>(x, 0)
           : type == DA8W4_F16 ? load_as<DA8W4_F16>(x, 0)
                               : load_as<DA8W4_BF16>(x, 0);
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

void sum_row(const int8_t *act, size_t k, size_t group, int32_t factor, int32_t *sums, size_t sums_stride) {
    for (size_t begin = 0; begin < k; sums += sums_stride) {
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
        *sums = Isa::total(sum) * factor;
    }
}

// ---- the last step ---------------------------------------------------------------------------

template <da8w4_type kType>
void finish_as(const Finish &finish) {
    constexpr size_t kBytes = kType == DA8W4_F32 ? 4 : 2;
    const bool whole = finish.cols == kBlock;
    alignas(64) float bias[kBlock] = {};
    alignas(64) char rest[kBlock * 4];
    if (finish.bias) memcpy(bias, finish.bias, finish.cols * sizeof(float));
    const float *acc = finish.acc;
    char *out = finish.out;
    for (size_t row = 0; row < finish.rows; row++) {
        const Float scale = Isa::broadcast_float(finish.act_scales[row]),
                    minus_zp = Isa::broadcast_float(-finish.act_zps[row]);
        for (size_t n = 0; n < kBlock; n += kLanes) {
            Float t = Isa::load_f32(acc + n);
            if (finish.act_zps[row] != 0) t = Isa::fma(minus_zp, Isa::load_f32(finish.sums + n), t);
            Float y = finish.bias ? Isa::fma(t, scale, Isa::load_f32(bias + n)) : Isa::mul(t, scale);
            y = Isa::one_nan(y);
            char *to = (whole ? out : rest) + n * kBytes;
            if (kType == DA8W4_F32)
                Isa::store_f32(to, y);
            else if (kType == DA8W4_F16)
                Isa::store_f16(to, y);
            else
                Isa::store_bf16(to, y);
        }
        if (!whole) memcpy(out, rest, finish.cols * kBytes);
        acc += kBlock;
        out += finish.out_stride;
    }
}

void finish_rows(const Finish &finish) {
    if (finish.out_type == DA8W4_F32)
        finish_as<DA8W4_F32>(finish);
    else if (finish.out_type == DA8W4_F16)
        finish_as<DA8W4_F16>(finish);
    else
        finish_as<DA8W4_BF16>(finish);
}

// Unpacking a panel pays from some tiles on; before, each may as well unpack for itself. Measured for 512-bit
// vpdpbusd and for 256-bit vpmaddubsw.
constexpr size_t kPackedMax = 24;

constexpr Kernel simd_kernel(const char *name, const char *description, uint64_t needs) {
    Kernel kernel = {};
    kernel.name = name;
    kernel.description = description;
    kernel.needs = needs;
    kernel.packed_max = kPackedMax;
    kernel.packed_rows = Isa::kRows;
    kernel.unpacked_rows = Isa::kRows;
    kernel.panel_quads = 1;
    kernel.shifted = Isa::kShifted;
    kernel.quantize_row = quantize_row;
    kernel.sum_row = sum_row;
    kernel.unpack = unpack;
    kernel.packed_tiles = packed_tiles;
    kernel.unpacked_tiles = unpacked_tiles;
    kernel.finish_rows = finish_rows;
    return kernel;
}

}  // namespace
}  // namespace da8w4
