// Kernel amx: tdpbssd, 16 x 16 sums of 64 products in 16 cycles. A micro-tile is 32 rows by 32 columns in 2 x 2 tile
// registers, so that each register of activations and of weights that is loaded is used twice.
//
// A panel holds value - zp as int8, in rows of 16 quads for each 64 k of a group; a group that is no multiple of 64 is
// filled up with zeros. So activations beyond its end, which lie in the same row or right after it in the workspace,
// are multiplied by zero, and one tile configuration does for all of k. Only the number of rows makes another.
//
// The sums of a group are stored and scaled as 512-bit floats while the next group multiplies. Exact: int32 sums of
// int8 products, and the same chain of fma as everywhere. Few rows, and panels whose zero points leave value - zp
// no room in int8, are left to avx512vnni.
#include "kernels/simd/table.h"
#include "kernels/x86/amx_tile.h"
#include "kernels/x86/avx512vnni.h"
#include "kernels/x86/vec512.h"
#include "runtime/cpu.h"

namespace da8w4 {
namespace {

constexpr size_t kTileRows = 16, kTileK = 64, kTileQuads = kTileK / kQuad;
// One tile of avx512vnni: beyond, its dot products alone take longer than unpacking the panel for AMX.
constexpr size_t kAmxPackedMax = 6;
constexpr size_t kAmxTilesOfReading = 4;

// The thread's state is the number of rows that its configuration is for; 0 if it has none. Other code of the process
// may use tiles in between, so they are released at the end of each thread's part.
void configure(size_t rows, size_t *state) {
    if (rows == *state) return;
    TileConfig config = {};
    config.palette = 1;
    const size_t upper = rows < kTileRows ? rows : kTileRows, lower = rows - upper;
    const size_t tile_rows[8] = {upper, upper, lower, lower, upper, lower, kTileQuads, kTileQuads};
    for (size_t tile = 0; tile < 8; tile++) {
        config.rows[tile] = static_cast<uint8_t>(tile_rows[tile]);
        config.row_bytes[tile] = tile_rows[tile] ? kTileK : 0;
    }
    load_config(config);
    *state = rows;
}

void release(size_t state) {
    if (state) release_tiles();
}

Panel prepare_panel_amx(const PanelJob &job) {
    if (!fit_bytes(job)) return avx512vnni::prepare_panel(job);
    Panel panel = prepare_floats<Vec512>(job, false);
    panel.codes = job.buffer.codes;
    with_kind(job.block.kind, [&](auto kind) {
        unpack_codes<Vec512, PackedCodes<Vec512, kind.kKind>, Encoding::signed_, kTileQuads>(job, zero_points(job));
    });
    panel.prefetch = prefetch_next(job, 2 * kTileRows, kTileQuads);
    return panel;
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

void prefetch_step(Prefetch &prefetch) {
    if (prefetch.codes >= prefetch.end) return;
    for (size_t i = 0; i < prefetch.lines; i++, prefetch.codes += 64) __builtin_prefetch(prefetch.codes, 0, 2);
}

// What the end of a group takes beside its sums.
struct GroupEnd {
    const float *scales, *offsets;  // of the panel; no offsets: null
    const float *group_sums;        // of the rows
    const float *group_scales;      // of the rows, or null
};

// kRows: 1, or 2 of 16-bit activations.
template <bool kOffsets, bool kGroupScales, size_t kRows>
void scale_sums(const int32_t *sums, const GroupEnd &end, size_t rows, float *acc) {
    Vec512::Float scale[2], offset[2];
    for (size_t v = 0; v < 2; v++) {
        scale[v] = Vec512::load_f32(end.scales + v * kHalf);
        if (kOffsets) offset[v] = Vec512::load_f32(end.offsets + v * kHalf);
    }
    for (size_t row = 0; row < rows; row += kRows, sums += kRows * kBlock, acc += kRows * kBlock)
        for (size_t v = 0; v < 2; v++) {
            Vec512::Float sum = Vec512::to_float(Vec512::load(sums + v * kHalf)), factor = scale[v];
            if (kRows == 2)
                sum = Vec512::fma(Vec512::broadcast_float(256), sum,
                                  Vec512::to_float(Vec512::load(sums + kBlock + v * kHalf)));
            if (kGroupScales) factor = Vec512::mul(factor, Vec512::broadcast_float(end.group_scales[row]));
            Vec512::Float total = Vec512::fma(sum, factor, Vec512::load_f32(acc + v * kHalf));
            if (kOffsets) total = Vec512::fma(Vec512::broadcast_float(end.group_sums[row]), offset[v], total);
            Vec512::store_f32(acc + v * kHalf, total);
        }
}

auto scale_sums_of(const GroupEnd &end, bool is_int16) {
    if (is_int16) return end.offsets ? scale_sums<true, false, 2> : scale_sums<false, false, 2>;
    if (end.group_scales) return end.offsets ? scale_sums<true, true, 1> : scale_sums<false, true, 1>;
    return end.offsets ? scale_sums<true, false, 1> : scale_sums<false, false, 1>;
}

// Rows row.. of the tiles, at most two tile registers of them.
void run_tile_amx(const MicroTiles &tiles, size_t row, size_t rows, Panel &panel) {
    alignas(64) int32_t sums[2][2 * kTileRows * kBlock];
    const Grouping &grouping = tiles.grouping;
    const KBlock &block = tiles.k;
    const bool two = rows > kTileRows;
    const int8_t *act = tiles.act.rows + row * tiles.act.stride;
    float *acc = tiles.acc + row * kBlock;
    int32_t *carried = tiles.carried + row * kBlock;
    const uint8_t *codes = panel.codes;
    GroupEnd scaled = {
        .scales = static_cast<const float *>(panel.scales),
        .offsets = static_cast<const float *>(panel.offsets),
        .group_sums = tiles.act.group_sums + row,
        .group_scales = tiles.act.group_scales ? tiles.act.group_scales + row : nullptr,
    };
    const int32_t *waiting = nullptr;  // sums of the group before, not scaled yet
    const auto scale = scale_sums_of(scaled, tiles.act.is_int16);
    const auto scale_waiting = [&] {
        scale(waiting, scaled, rows, acc);
        scaled.scales += kBlock;
        scaled.group_sums += tiles.act.sums_stride;
        if (scaled.offsets) scaled.offsets += kBlock;
        if (scaled.group_scales) scaled.group_scales += tiles.act.sums_stride;
    };
    if (block.begin == 0) memset(acc, 0, rows * kBlock * sizeof(float));
    for (size_t k = block.begin, group = block.group, end; k < block.end; k = end, group++) {
        const size_t group_end = (group + 1) * grouping.group;
        end = lesser(group_end, block.end);
        start_sums(k == group * grouping.group ? nullptr : carried, two);
        for (size_t at = k; at < end; at += kTileK) {
            prefetch_step(panel.prefetch);
            add_products(act + (at - block.begin), tiles.act.stride, codes, two);
            codes += kTileQuads * kPanelLineBytes;
        }
        if (waiting) scale_waiting();
        waiting = nullptr;
        if (end == group_end || end == grouping.k) {
            int32_t *to = sums[group % 2];
            store_sums(to, two);
            waiting = to;
        } else {
            store_sums(carried, two);
        }
    }
    if (waiting) scale_waiting();
}

// Two rows of 16-bit activations stay together.
void run_panel_amx(const MicroTiles &tiles, Panel &panel) {
    if (panel.zp_terms) return avx512vnni::run_panel(tiles, panel);
    const size_t together = tiles.act.is_int16 ? 2 : 1, all = tiles.rows / together;
    const size_t count = ceil_div(all, 2 * kTileRows / together), height = all / count, higher = all % count;
    for (size_t tile = 0, row = 0, rows; tile < count; tile++, row += rows) {
        rows = (height + (tile < higher)) * together;
        configure(rows, tiles.state);
        run_tile_amx(tiles, row, rows, panel);
    }
}

constexpr Kernel amx_kernel() {
    return {
        .name = "amx",
        .description = "AMX-INT8: 16 x 16 tiles, tdpbssd",
        .needs = kAvx512Vnni | kAmxInt8 | kAmxAllowed,
        .packed_max = kAmxPackedMax,
        .packed =
            {
                .mr = Vec512::kRows,
                .mc = kMc,
                .kc = kPackedKc,
                .pass_blocks = 1,
                .tiles_of_reading = Vec512::kTilesOfReading,
                .panel_bytes = no_panel,
                .sum_row = avx512vnni::sum_row,
                .prepare = avx512vnni::prepare_packed,
                .run = avx512vnni::run_packed,
            },
        .unpacked =
            {
                .mr = 2 * kTileRows,
                .mc = kMc,
                .kc = kPanelKc,
                .pass_blocks = kPassBlocks,
                .tiles_of_reading = kAmxTilesOfReading,
                .panel_bytes = panel_bytes<kTileQuads>,
                .sum_row = avx512vnni::sum_panel_row,
                .prepare = prepare_panel_amx,
                .run = run_panel_amx,
            },
        .quantize_row = avx512vnni::quantize_row,
        .quantize_groups = avx512vnni::quantize_groups,
        .quantize_int16 = avx512vnni::quantize_int16,
        .transform_row = avx512vnni::transform_row,
        .epilogue = avx512vnni::epilogue,
        .gate = avx512vnni::gate,
        .sum_slots = avx512vnni::sum_slots,
        .release = release,
    };
}

}  // namespace

extern constexpr Kernel kernel_amx = amx_kernel();

}  // namespace da8w4
