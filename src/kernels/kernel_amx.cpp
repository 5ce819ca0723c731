// Kernel amx: tdpbssd, 16 x 16 sums of 64 products in 16 cycles. A tile is 32 rows by 32 columns in 2 x 2 tile
// registers, so that each register of activations and of weights that is loaded is used twice.
//
// A panel holds code - zp as int8 (the driver keeps to zero points from -112), in rows of 16 quads for each 64 k
// of a group; a group that is no multiple of 64 is filled up with zeros. So activations beyond its end, which lie
// in the same row or right after it in the workspace, are multiplied by zero, and one tile configuration does for
// all of k. Only the number of rows makes another.
//
// The sums of a group are stored and scaled as 512-bit floats while the next group multiplies. Exact: int32 sums
// of int8 products, and the same chain of fma as everywhere. Few rows are left to the tiles of avx512vnni.
#include "isa512.h"

namespace da8w4 {
namespace {
using Isa = Isa512;
}
}  // namespace da8w4

#include "amx_tile.h"
#include "runtime/cpu.h"
#include "pair512.h"
#include "simd_kernel.h"

namespace da8w4 {
namespace {

constexpr size_t kTileRows = 16, kTileK = 64, kTileQuads = kTileK / kQuad;
// One tile of avx512vnni: beyond, its dot products alone take longer than unpacking the panel for AMX.
constexpr size_t kAmxPackedMax = 6;

// Rows that this thread's configuration is for; 0 if tiles are released. Other code of the process may use tiles
// in between, so the driver releases them at the end of each thread's part.
thread_local size_t configured_rows = 0;

void configure(size_t rows) {
    if (rows == configured_rows) return;
    TileConfig config = {};
    config.palette = 1;
    const size_t upper = rows < kTileRows ? rows : kTileRows, lower = rows - upper;
    const size_t tile_rows[8] = {upper, upper, lower, lower, upper, lower, kTileQuads, kTileQuads};
    for (size_t tile = 0; tile < 8; tile++) {
        config.rows[tile] = static_cast<uint8_t>(tile_rows[tile]);
        config.row_bytes[tile] = tile_rows[tile] ? kTileK : 0;
    }
    load_config(config);
    configured_rows = rows;
}

void leave() {
    if (configured_rows) release_tiles();
    configured_rows = 0;
}

Panel unpack_amx(const Block &block, size_t group, const Span &span, const Room &room, size_t tiles,
                 const Ahead &ahead) {
    if (!room.codes) return unpack(block, group, span, room, tiles, ahead);
    unpack_codes<true, 0, kTileQuads>(block, group, span, room.codes);
    return unpack_groups(block, group, span, room, true, ahead);
}

constexpr size_t kSumBytes = kBlock * sizeof(int32_t);

void start_sums(const int32_t *from, bool two) {
    if (!from) {
        zero_tile<0>();
        zero_tile<1>();
        if (two) {
            zero_tile<2>();
            zero_tile<3>();
        }
        return;
    }
    load_tile<0>(from, kSumBytes);
    load_tile<1>(from + kHalf, kSumBytes);
    if (!two) return;
    load_tile<2>(from + kTileRows * kBlock, kSumBytes);
    load_tile<3>(from + kTileRows * kBlock + kHalf, kSumBytes);
}

void store_sums(int32_t *to, bool two) {
    store_tile<0>(to, kSumBytes);
    store_tile<1>(to + kHalf, kSumBytes);
    if (!two) return;
    store_tile<2>(to + kTileRows * kBlock, kSumBytes);
    store_tile<3>(to + kTileRows * kBlock + kHalf, kSumBytes);
}

void add_products(const int8_t *act, size_t stride, const uint8_t *codes, bool two) {
    load_tile<6>(codes, kPanelLineBytes);
    load_tile<4>(act, stride);
    multiply_tiles<0, 4, 6>();
    load_tile<7>(codes + kHalf * kQuad, kPanelLineBytes);
    multiply_tiles<1, 4, 7>();
    if (!two) return;
    load_tile<5>(act + kTileRows * stride, stride);
    multiply_tiles<2, 5, 6>();
    multiply_tiles<3, 5, 7>();
}

// What the end of a group takes beside its sums.
struct GroupEnd {
    const float *scales, *offsets;  // of the panel; no offsets: null
    const float *group_sums;        // of the rows
};

template <bool kOffsets>
void scale_sums(const int32_t *sums, const GroupEnd &end, size_t rows, float *acc) {
    Float scale[2], offset[2];
    for (size_t v = 0; v < 2; v++) {
        scale[v] = Isa::load_f32(end.scales + v * kHalf);
        if (kOffsets) offset[v] = Isa::load_f32(end.offsets + v * kHalf);
    }
    const float *group_sum = end.group_sums;
    for (size_t row = 0; row < rows; row++, sums += kBlock, acc += kBlock)
        for (size_t v = 0; v < 2; v++) {
            Float sum = Isa::load_f32(acc + v * kHalf);
            sum = Isa::fma(Isa::to_float(Isa::load(sums + v * kHalf)), scale[v], sum);
            if (kOffsets) sum = Isa::fma(Isa::broadcast_float(group_sum[row]), offset[v], sum);
            Isa::store_f32(acc + v * kHalf, sum);
        }
}

void unpacked_tiles_amx(const Tiles &tiles, const Panel &panel) {
    alignas(64) int32_t sums[2][2 * kTileRows * kBlock];
    const size_t height = tiles.height;
    const bool two = height > kTileRows;
    configure(height);
    Ahead ahead = tiles.ahead;
    ahead.lines *= kTileQuads / kStepQuads;
    for (size_t row = 0; row < tiles.count * height; row += height) {
        const int8_t *act = tiles.act.rows + row * tiles.act.stride;
        float *acc = tiles.acc + row * kBlock;
        int32_t *partial = tiles.partial + row * kBlock;
        const uint8_t *codes = panel.codes;
        GroupEnd scaled = {static_cast<const float *>(panel.scales), static_cast<const float *>(panel.offsets),
                           tiles.act.group_sums + row};
        const int32_t *waiting = nullptr;  // sums of the group before, not scaled yet
        const auto scale_waiting = [&] {
            if (panel.offsets) {
                scale_sums<true>(waiting, scaled, height, acc);
                scaled.offsets += kBlock;
            } else {
                scale_sums<false>(waiting, scaled, height, acc);
            }
            scaled.scales += kBlock;
            scaled.group_sums += tiles.act.sums_stride;
        };
        if (tiles.span.begin == 0) memset(acc, 0, height * kBlock * sizeof(float));
        for (size_t k = tiles.span.begin, group = tiles.span.group, end; k < tiles.span.end; k = end, group++) {
            const size_t group_end = (group + 1) * tiles.group;
            end = group_end < tiles.span.end ? group_end : tiles.span.end;
            start_sums(k == group * tiles.group ? nullptr : partial, two);
            for (size_t at = k; at < end; at += kTileK) {
                if (ahead.codes < ahead.codes_end) fetch(ahead);
                add_products(act + (at - tiles.span.begin), tiles.act.stride, codes, two);
                codes += kTileQuads * kPanelLineBytes;
            }
            if (waiting) scale_waiting();
            waiting = nullptr;
            if (end == group_end || end == tiles.k) {
                int32_t *to = sums[group % 2];
                store_sums(to, two);
                waiting = to;
            } else {
                store_sums(partial, two);
            }
        }
        if (waiting) scale_waiting();
    }
}

constexpr Kernel amx_kernel() {
    Kernel kernel = simd_kernel("amx", "AMX-INT8: 16 x 16 tiles, tdpbssd", kAvx512Vnni | kAmxInt8 | kAmxAllowed);
    kernel.packed_max = kAmxPackedMax;
    kernel.unpacked_rows = 2 * kTileRows;
    kernel.panel_quads = kTileQuads;
    kernel.unpack = unpack_amx;
    kernel.unpacked_tiles = unpacked_tiles_amx;
    kernel.leave = leave;
    return kernel;
}

}  // namespace

extern constexpr Kernel kernel_amx = amx_kernel();

}  // namespace da8w4
