// The table of a kernel whose functions are those of kernels/simd/ over the vector operations V.
#pragma once

#include "kernels/kernel.h"
#include "kernels/simd/epilogue.h"
#include "kernels/simd/gate.h"
#include "kernels/simd/limits.h"
#include "kernels/simd/microkernel.h"
#include "kernels/simd/quantize.h"
#include "kernels/simd/rotate.h"
#include "kernels/simd/unpack.h"

namespace da8w4 {
namespace {

// Unpacking a panel pays from some micro-tiles on; before, each may as well unpack for itself. 24 was measured for
// 256-bit vpmaddubsw.
template <class V>
size_t packed_max(size_t group, const Tuning &tuning) {
    return V::kLanes == kHalf ? tuning.packed_max[group < 64 ? 0 : group < 128 ? 1 : 2] : 24;
}

// Where several pairs of column vectors read a panel or packed codes one after the other, a panel is 16 KiB of codes,
// half an L1 cache. Where one does, neither need stay in L1: what begins and ends a K block takes longer than L2. A row
// block's activations of one K block and its accumulators, 512 and 128 KiB, stay in L2.
template <class V>
constexpr size_t kPanelKc = V::kLanes == kHalf ? 2048 : 512;
template <class V>
constexpr size_t kPackedKc = V::kLanes == kHalf ? 4096 : 1024;
constexpr size_t kMc = 256;
constexpr size_t kPassBlocks = 4;

template <VectorOps V, class Fast = FastPath>
constexpr Kernel simd_kernel(const char *name, const char *description, uint64_t needs) {
    return {
        .name = name,
        .description = description,
        .needs = needs,
        .packed_max = packed_max<V>,
        .packed =
            {
                .mr = V::kRows,
                .mc = kMc,
                .kc = kPackedKc<V>,
                .pass_blocks = 1,
                .tiles_of_reading = V::kTilesOfReading,
                .panel_bytes = no_panel,
                .sum_row = sum_row<V, Encoding::plain>,
                .prepare = prepare_packed<V>,
                .run = run_tiles<V, Fast, true>,
                .path = path_of<V, true>,
            },
        .unpacked =
            {
                .mr = V::kRows,
                .mc = kMc,
                .kc = kPanelKc<V>,
                .pass_blocks = kPassBlocks,
                .tiles_of_reading = V::kTilesOfReading,
                .panel_bytes = panel_bytes,
                .sum_row = sum_row<V, V::kPanelEncoding>,
                .prepare = prepare_panel<V, kPanelKc<V>>,
                .run = run_tiles<V, Fast, false>,
                .path = path_of<V, false>,
            },
        .quantize_row = quantize_row<V>,
        .quantize_groups = quantize_groups<V>,
        .quantize_int16 = quantize_int16<V>,
        .transform_row = transform_row<V>,
        .rotate_row = rotate_row<V>,
        .epilogue = epilogue<V>,
        .gate = gate<V>,
        .sum_slots = sum_slots<V>,
        .release = nullptr,
        .read = read_memory<V>,
        .multiply = multiply_registers<V>,
    };
}

}  // namespace
}  // namespace da8w4
