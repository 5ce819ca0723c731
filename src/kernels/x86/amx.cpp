// Kernel amx: tdpbssd, 16 x 16 sums of up to 64 products each in 16 cycles. A micro-tile is up to 16 rows by 32
// columns: two tile registers of sums, with one of activations and two of weights. Two such pairs of sums alternate:
// one multiplies, while the other is stored and scaled as 512-bit floats. docs/amx.md has the measurements behind this.
//
// A panel holds value - zp as int8, in rows of 32 columns for each quad of a group; a group that is no multiple of its
// tiles is filled up with zeros. So activations beyond its end, which lie in the same row or right after it in the
// workspace, are multiplied by zero, and one tile configuration does for all of a panel.
//
// Exact: int32 sums of int8 products, and the same chain of fma as everywhere. Few rows, the shortest groups, and
// panels whose zero points leave value - zp no room in int8, are left to avx512vnni.
#include "kernels/simd/table.h"
#include "kernels/x86/amx_tile.h"
#include "kernels/x86/avx512vnni.h"
#include "kernels/x86/vec512.h"
#include "runtime/cpu.h"

namespace da8w4 {
namespace {

constexpr size_t kTileRows = 16, kTileQuads = 16;

// Shorter K blocks and row blocks than avx512vnni has: what decides is how much comes from L2. A panel and the
// activations of some micro-tiles stay in L1, and the activations of a row block in half an L2.
constexpr size_t kAmxKc = 256, kAmxMc = 128;
constexpr size_t kAmxTilesOfReading = 3;

// A product of tiles takes as long for 4 k as for 64, and scaling its sums longer than that: so the shortest groups are
// left to avx512vnni whatever the rows. Where it has as few as two micro-tiles, or four of groups that suit it, it is
// faster than one tile and the unpacking.
constexpr size_t kAmxLeastGroup = 20;
size_t amx_packed_max(size_t group, const Tuning &) { return group < 24 || group == 32 ? 24 : 12; }

// Quads of a tile: those of a group, or of the part of one that a K block may have, in tiles of equal length.
size_t tile_quads(size_t group) {
    const size_t quads = quads_of(lesser(group, kAmxKc));
    return ceil_div(quads, ceil_div(quads, kTileQuads));
}

size_t amx_panel_bytes(size_t length, size_t group) {
    return ceil_div(length, group) * round_up(quads_of(lesser(length, group)), tile_quads(group)) * kPanelLineBytes;
}

// The thread's state is the number of rows and of k that its configuration is for; 0 if it has none. Other code of the
// process may use tiles in between, so they are released at the end of each thread's part.
void configure(size_t rows, size_t quads, size_t *state) {
    const size_t wanted = quads * 256 + rows;
    if (wanted == *state) return;
    TileConfig config = {};
    config.palette = 1;
    for (int sums = 0; sums < 4; sums++) config.set(sums, rows, kTileRows * sizeof(int32_t));
    config.set(4, rows, quads * kQuad);
    for (int weights = 5; weights < 7; weights++) config.set(weights, quads, kTileRows * kQuad);
    load_config(config);
    *state = wanted;
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

void prefetch_step(Prefetch &prefetch) {
    if (prefetch.codes >= prefetch.end) return;
    for (size_t i = 0; i < prefetch.lines; i++, prefetch.codes += 64) __builtin_prefetch(prefetch.codes, 0, 2);
}

// What a K block has of one group, in one micro-tile.
struct Part {
    size_t row, rows;   // whose sums are wanted
    size_t skip;        // rows of the tiles before these
    size_t group;       // from the first one of the K block
    bool begins, ends;  // the group, in this K block
};

// Multiplies the parts of all micro-tiles one after the other, and finishes the sums of each while the next one is
// multiplied. kRows is 1, or 2 of 16-bit activations. All is inlined, so that what describes a part stays in registers:
// the CPU looks only so many instructions ahead.
template <bool kOffsets, bool kGroupScales, size_t kRows>
class PanelRun {
public:
    DA8W4_INLINE PanelRun(const MicroTiles &tiles, const Panel &panel, int32_t *sums)
        : tiles_(tiles),
          panel_(panel),
          prefetch_(panel.prefetch),
          quads_(tile_quads(tiles.grouping.group)),
          sums_(sums) {}

    // Micro-tiles have equal heights, for another one takes another configuration: the last may begin in the one
    // before.
    DA8W4_INLINE Prefetch run() {
        const size_t count = ceil_div(tiles_.rows, kTileRows);
        const size_t height = round_up(ceil_div(tiles_.rows, count), kRows);
        configure(height, quads_, tiles_.state);
        if (tiles_.k.begin == 0) memset(tiles_.acc, 0, tiles_.rows * kBlock * sizeof(float));
        for (size_t row = 0; row < tiles_.rows; row += height) {
            const size_t rows = lesser(height, tiles_.rows - row);
            run_tile({.row = row, .rows = rows, .skip = height - rows, .group = 0, .begins = false, .ends = false});
        }
        if (odd_)
            finish<0>();
        else
            finish<2>();
        return prefetch_;
    }

private:
    DA8W4_INLINE void run_tile(Part part) {
        const size_t group = tiles_.grouping.group, k_end = tiles_.k.end;
        const int8_t *act = tiles_.act.rows + (part.row - part.skip) * tiles_.act.stride;
        const uint8_t *codes = panel_.codes;
        size_t k = tiles_.k.begin, group_end = tiles_.k.group * group;
        part.begins = k == group_end;
        for (; k < k_end; part.group++, part.begins = true) {
            group_end = lesser(group_end + group, tiles_.grouping.k);
            const size_t end = lesser(group_end, k_end), quads = round_up(quads_of(end - k), quads_);
            part.ends = end == group_end;
            if (odd_)
                add<2, 0>(act, codes, quads);
            else
                add<0, 2>(act, codes, quads);
            odd_ = !odd_;
            last_ = part;
            act += end - k;
            codes += quads * kPanelLineBytes;
            k = end;
        }
    }

    // Sums to two tiles, and on with those of the part before.
    template <int kSums, int kLast>
    DA8W4_INLINE void add(const int8_t *act, const uint8_t *codes, size_t quads) {
        zero_tile<kSums>();
        zero_tile<kSums + 1>();
        const uint8_t *const end = codes + quads * kPanelLineBytes;
        for (; codes < end; codes += quads_ * kPanelLineBytes, act += quads_ * kQuad) {
            prefetch_step(prefetch_);
            load_tile<4>(act, tiles_.act.stride);
            load_tile<5>(codes, kPanelLineBytes);
            multiply_tiles<kSums, 4, 5>();
            load_tile<6>(codes + kHalf * kQuad, kPanelLineBytes);
            multiply_tiles<kSums + 1, 4, 6>();
        }
        if (last_.rows) finish<kLast>();
    }

    template <int kSums>
    DA8W4_INLINE void finish() {
        store_tile<kSums>(sums_, kBlock * sizeof(int32_t));
        store_tile<kSums + 1>(sums_ + kHalf, kBlock * sizeof(int32_t));
        if (!last_.begins || !last_.ends) carry();
        if (last_.ends) scale();
    }

    // From the K block before, and to the next one.
    DA8W4_INLINE void carry() {
        int32_t *sums = sums_ + last_.skip * kBlock, *carried = tiles_.carried + last_.row * kBlock;
        int32_t *to = last_.ends ? sums : carried;
        for (size_t i = 0; i < last_.rows * kBlock; i += Vec512::kLanes) {
            Vec512::Int sum = Vec512::load(sums + i);
            if (!last_.begins) sum = Vec512::add(sum, Vec512::load(carried + i));
            Vec512::store(to + i, sum);
        }
    }

    // The end of a group.
    DA8W4_INLINE void scale() {
        const float *scales = static_cast<const float *>(panel_.scales) + last_.group * kBlock;
        const float *offsets = kOffsets ? static_cast<const float *>(panel_.offsets) + last_.group * kBlock : nullptr;
        const size_t of_rows = last_.group * tiles_.act.sums_stride + last_.row;
        const float *group_sums = kOffsets ? tiles_.act.group_sums + of_rows : nullptr;
        const float *group_scales = kGroupScales ? tiles_.act.group_scales + of_rows : nullptr;
        const int32_t *sums = sums_ + last_.skip * kBlock;
        float *acc = tiles_.acc + last_.row * kBlock;
        Vec512::Float scale[2], offset[2];
        for (size_t v = 0; v < 2; v++) {
            scale[v] = Vec512::load_f32(scales + v * kHalf);
            if (kOffsets) offset[v] = Vec512::load_f32(offsets + v * kHalf);
        }
        const auto scale_row = [&](size_t row) {
            for (size_t v = 0; v < 2; v++) {
                const size_t at = row * kBlock + v * kHalf;
                Vec512::Float sum = Vec512::to_float(Vec512::load(sums + at)), factor = scale[v];
                if (kRows == 2)
                    sum = Vec512::fma(Vec512::broadcast_float(256), sum,
                                      Vec512::to_float(Vec512::load(sums + at + kBlock)));
                if (kGroupScales) factor = Vec512::mul(factor, Vec512::broadcast_float(group_scales[row]));
                Vec512::Float total = Vec512::fma(sum, factor, Vec512::load_f32(acc + at));
                if (kOffsets) total = Vec512::fma(Vec512::broadcast_float(group_sums[row]), offset[v], total);
                Vec512::store_f32(acc + at, total);
            }
        };
        if (last_.rows == kTileRows) {
#pragma GCC unroll 16
            for (size_t row = 0; row < kTileRows; row += kRows) scale_row(row);
        } else {
            for (size_t row = 0; row < last_.rows; row += kRows) scale_row(row);
        }
    }

    const MicroTiles &tiles_;
    const Panel &panel_;
    Prefetch prefetch_;
    const size_t quads_;  // of a tile
    int32_t *const sums_;
    Part last_ = {};  // whose sums are still in tiles; no rows: none
    bool odd_ = false;
};

template <bool kOffsets, bool kGroupScales, size_t kRows>
void run_tiles_of(const MicroTiles &tiles, Panel &panel) {
    alignas(64) int32_t sums[kTileRows * kBlock];
    panel.prefetch = PanelRun<kOffsets, kGroupScales, kRows>(tiles, panel, sums).run();
}

void run_panel_amx(const MicroTiles &tiles, Panel &panel) {
    if (tiles.grouping.group < kAmxLeastGroup || panel.zp_terms) return avx512vnni::run_panel(tiles, panel);
    if (tiles.act.is_int16)
        return panel.offsets ? run_tiles_of<true, false, 2>(tiles, panel) : run_tiles_of<false, false, 2>(tiles, panel);
    if (tiles.act.group_scales)
        return panel.offsets ? run_tiles_of<true, true, 1>(tiles, panel) : run_tiles_of<false, true, 1>(tiles, panel);
    return panel.offsets ? run_tiles_of<true, false, 1>(tiles, panel) : run_tiles_of<false, false, 1>(tiles, panel);
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
                .mc = kAmxMc,
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
