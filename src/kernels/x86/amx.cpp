// Kernel amx: tdpbssd, 16 x 16 sums of up to 64 products each in 16 cycles. A micro-tile is up to 16 rows by 32
// columns: two tile registers of sums, with one of activations and two of weights. docs/amx.md has the measurements
// behind this.
//
// A panel holds value - zp as int8, in rows of 32 columns for each quad of a group; a group that is no multiple of its
// tiles is filled up with zeros. So activations beyond its end, which lie in the same row or right after it in the
// workspace, are multiplied by zero, and one tile configuration does for all of a panel.
//
// Exact: int32 sums of int8 products, and the same chain of fma as everywhere. Few rows, the shortest groups, and
// panels whose zero points leave value - zp no room in int8, are left to avx512vnni.
#include "kernels/simd/table.h"
#include "kernels/x86/avx512vnni.h"
#include "kernels/x86/microkernel_amx.h"
#include "runtime/cpu.h"

namespace da8w4 {
namespace {

constexpr size_t kAmxTilesOfReading = 3;

// A product of tiles takes as long for 4 k as for 64, and scaling its sums longer than that: so the shortest groups are
// left to avx512vnni whatever the rows. Elsewhere it has those rows that it multiplies in less time than one tile and
// the unpacking take; docs/amx.md has the measurements. Of groups that are not whole K steps that is two micro-tiles.
constexpr size_t kAmxLeastGroup = 20;
size_t amx_packed_max(size_t group, const Tuning &) {
    if (group < 24 || group == 32) return 24;
    return group % (kStepQuads * kQuad) ? 12 : 16;
}

size_t amx_panel_bytes(size_t length, size_t group) {
    return ceil_div(length, group) * round_up(quads_of(lesser(length, group)), tile_quads(group)) * kPanelLineBytes;
}

void release(size_t state) {
    if (state) release_tiles();
}

// What avx512vnni multiplies in the place of this kernel.
PanelPath left_to_avx512vnni(PanelPath path, const char *reason) {
    path.left_to = "avx512vnni";
    path.reason = reason;
    return path;
}

PanelPath packed_path_amx(const PanelJob &job) {
    return left_to_avx512vnni(avx512vnni::packed_path(job), "few rows take less time there than a panel of tiles");
}

PanelPath panel_path_amx(const PanelJob &job) {
    if (job.grouping.group < kAmxLeastGroup)
        return left_to_avx512vnni(avx512vnni::panel_path(job), "groups below 20 k are too short for tiles");
    if (!fit_bytes(job)) return left_to_avx512vnni(avx512vnni::panel_path(job), kZpsBeyondBytes);
    return {.left_to = nullptr, .fast = true, .reason = nullptr};
}

Panel prepare_panel_amx(const PanelJob &job) {
    if (job.grouping.group < kAmxLeastGroup || !fit_bytes(job)) return avx512vnni::prepare_panel(job);
    Panel panel = prepare_floats<Vec512>(job);
    panel.codes = job.buffer.codes;
    const size_t tile = tile_quads(job.grouping.group);
    with_kind(job.block.kind, [&](auto kind) {
        unpack_codes<Vec512, PackedCodes<Vec512, kind.kKind>, Encoding::signed_>(
            job, zero_points(job), [&](size_t quads) { return round_up(quads, tile); });
    });
    panel.prefetch = prefetch_next(job, kTileRows, tile);
    return panel;
}

void run_panel_amx(const MicroTiles &tiles, Panel &panel) {
    if (tiles.grouping.group < kAmxLeastGroup || panel.zp_terms) return avx512vnni::run_panel(tiles, panel);
    if (tiles.act.is_int16)
        return panel.offsets ? run_micro_tiles<true, false, 2>(tiles, panel)
                             : run_micro_tiles<false, false, 2>(tiles, panel);
    if (tiles.act.group_scales)
        return panel.offsets ? run_micro_tiles<true, true, 1>(tiles, panel)
                             : run_micro_tiles<false, true, 1>(tiles, panel);
    return panel.offsets ? run_micro_tiles<true, false, 1>(tiles, panel)
                         : run_micro_tiles<false, false, 1>(tiles, panel);
}

// Four independent tiles of sums hide the latency of each other.
size_t multiply_registers_amx(size_t rounds) {
    size_t state = 0;
    configure(kTileRows, kTileQuads, &state);
    for (size_t i = 0; i < rounds; i++) {
        multiply_tiles<0, 4, 5>();
        multiply_tiles<1, 4, 6>();
        multiply_tiles<2, 4, 5>();
        multiply_tiles<3, 4, 6>();
    }
    release(state);
    return rounds * 4 * kTileRows * kHalf * kTileQuads * kQuad;
}

constexpr Kernel amx_kernel() {
    return {
        .name = "amx",
        .description = "AMX-INT8: 16 x 16 tiles, tdpbssd",
        .needs = kAvx512Vnni | kAmxInt8 | kAmxAllowed,
        .packed_max = amx_packed_max,
        .packed =
            {
                .mr = Vec512::kRows,
                .mc = kMc,
                .kc = kPackedKc<Vec512>,
                .pass_blocks = 1,
                .tiles_of_reading = Vec512::kTilesOfReading,
                .panel_bytes = no_panel,
                .sum_row = avx512vnni::sum_row,
                .prepare = avx512vnni::prepare_packed,
                .run = avx512vnni::run_packed,
                .path = packed_path_amx,
            },
        .unpacked =
            {
                .mr = kTileRows,
                .mc = kMc,
                .kc = kAmxKc,
                .pass_blocks = kPassBlocks,
                .tiles_of_reading = kAmxTilesOfReading,
                .panel_bytes = amx_panel_bytes,
                .sum_row = avx512vnni::sum_panel_row,
                .prepare = prepare_panel_amx,
                .run = run_panel_amx,
                .path = panel_path_amx,
            },
        .quantize_row = avx512vnni::quantize_row,
        .quantize_groups = avx512vnni::quantize_groups,
        .quantize_int16 = avx512vnni::quantize_int16,
        .transform_row = avx512vnni::transform_row,
        .rotate_row = avx512vnni::rotate_row,
        .epilogue = avx512vnni::epilogue,
        .gate = avx512vnni::gate,
        .sum_slots = avx512vnni::sum_slots,
        .release = release,
        .read = avx512vnni::read,
        .multiply = multiply_registers_amx,
    };
}

}  // namespace

extern constexpr Kernel kernel_amx = amx_kernel();

}  // namespace da8w4
