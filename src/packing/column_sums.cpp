#include "packing/column_sums.h"

#include <cmath>

#include "packing/pack.h"
#include "runtime/parallel.h"

namespace da8w4 {
namespace {

// The sum of four bytes of at most 63 each.
uint32_t sum_of_bytes(uint32_t word) { return word * 0x01010101u >> 24; }

// Of the values of column n over k = begin to end, which begins a quad.
template <da8w4_kind kKind>
int32_t sum_of_values(const PackedBlock &block, size_t n, size_t begin, size_t end) {
    constexpr CodeLayout layout = layout_of(kKind);
    int32_t sum = 0;
    size_t k = begin;
    if (kKind != DA8W4_TABLE4 && kKind != DA8W4_INT8)
        for (; k + kQuad <= end; k += kQuad)
            sum += static_cast<int32_t>(sum_of_bytes(quad_codes(layout, block.codes, n, k / kQuad)));
    for (; k < end; k += kQuad) {
        const uint32_t word = quad_codes(layout, block.codes, n, k / kQuad);
        uint8_t codes[kQuad];
        memcpy(codes, &word, sizeof codes);
        for (size_t j = 0; j < lesser(kQuad, end - k); j++) sum += value_of(layout, block.table, codes[j]);
    }
    return sum;
}

// Group by group, so that a group's lines are in L1 for all columns but the first.
template <da8w4_kind kKind>
void sum_block(const PackedBlock &block, const Grouping &grouping, size_t cols, float *sums) {
    for (size_t n = 0; n < kBlock; n++) sums[n] = 0;
    for (size_t g = 0; g < grouping.groups(); g++) {
        const size_t begin = g * grouping.group, end = lesser(begin + grouping.group, grouping.k);
        const float length = static_cast<float>(end - begin);
        for (size_t n = 0; n < cols; n++) {
            const int32_t zps = static_cast<int32_t>(end - begin) * zp_of(block, g, n);
            const int32_t sum = sum_of_values<kKind>(block, n, begin, end) - zps;
            sums[n] = std::fma(static_cast<float>(sum), scale_of(block, g, n), sums[n]);
            if (block.offsets) sums[n] = std::fma(length, offset_of(block, g, n), sums[n]);
        }
    }
}

}  // namespace

void sum_columns(const PackedBlock &block, const Grouping &grouping, size_t cols, float *sums) {
    switch (block.kind) {
        case DA8W4_INT4: return sum_block<DA8W4_INT4>(block, grouping, cols, sums);
        case DA8W4_INT5: return sum_block<DA8W4_INT5>(block, grouping, cols, sums);
        case DA8W4_INT6: return sum_block<DA8W4_INT6>(block, grouping, cols, sums);
        case DA8W4_INT8: return sum_block<DA8W4_INT8>(block, grouping, cols, sums);
        case DA8W4_TABLE4: return sum_block<DA8W4_TABLE4>(block, grouping, cols, sums);
    }
}

void sum_columns(const da8w4_packed &packed, float *sums) {
    const Grouping grouping = {.k = packed.k, .group = packed.group};
    parallel(threads_for_packing(packed.n * packed.k), [&](size_t thread, size_t threads) {
        const Range range = part_of(blocks_of(packed.n), thread, threads);
        for (size_t block = range.begin; block < range.end; block++)
            sum_columns(PackedBlocks(packed)[block], grouping, lesser(kBlock, packed.n - block * kBlock),
                        sums + block * kBlock);
    });
}

}  // namespace da8w4
