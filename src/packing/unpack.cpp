// From the packed layout back to the weight matrix.
#include "packing/layout.h"
#include "packing/pack.h"
#include "runtime/parallel.h"

namespace da8w4 {
namespace {

void unpack_column(const da8w4_packed &packed, size_t column, uint8_t *codes, float *scales, int8_t *zps,
                   float *offsets) {
    const size_t groups = ceil_div(packed.k, packed.group), n = column % kBlock;
    const PackedBlock block = block_of(packed, groups, column / kBlock);
    for (size_t k = 0; k < packed.k; k++) codes[k] = block.codes[code_byte(n, k)] >> code_shift(n) & 15;
    for (size_t g = 0; g < groups; g++) {
        scales[g] = load_float(block.scales_at(g), block.scale_type, n);
        if (offsets) offsets[g] = load_float(block.offsets_at(g), block.scale_type, n);
        zps[g] = block.zps ? block.zps_at(g)[n] : static_cast<int8_t>(block.zp);
    }
}

}  // namespace

void unpack(const da8w4_packed &packed, uint8_t *codes, float *scales, int8_t *zps, float *offsets) {
    const size_t groups = ceil_div(packed.k, packed.group);
    parallel(threads_for_packing(packed.n * packed.k), [&](size_t thread, size_t threads) {
        const Range range = part_of(packed.n, thread, threads);
        for (size_t n = range.begin; n < range.end; n++)
            unpack_column(packed, n, codes + n * packed.k, scales + n * groups, zps + n * groups,
                          packed.offsets ? offsets + n * groups : nullptr);
    });
}

}  // namespace da8w4
