// Kernel avx512vnni: 512-bit registers and vpdpbusd (u8 x s8 quads to int32).
// Registers of a 6-row tile: 12 int32 sums, 12 float sums, 2 codes, 1 activation, and the nibble mask where codes come
// packed: 28 of 32.
#include "kernels/x86/avx512vnni.h"

#include "kernels/simd/table.h"
#include "kernels/x86/microkernel_avx512_asm.h"
#include "kernels/x86/vec512.h"
#include "runtime/cpu.h"

namespace da8w4 {

extern constexpr Kernel kernel_avx512vnni =
    simd_kernel<Vec512, AsmFastPath>("avx512vnni", "AVX-512 VNNI: 512-bit vpdpbusd", kAvx512Vnni);

namespace avx512vnni {

void quantize_row(const void *x, da8w4_type x_type, size_t k, bool symmetric, uint8_t flip, void *act, float *scale,
                  int32_t *zp) {
    kernel_avx512vnni.quantize_row(x, x_type, k, symmetric, flip, act, scale, zp);
}

void sum_row(const int8_t *act, const Grouping &grouping, int32_t *chunk_sums, float *group_sums, size_t stride) {
    kernel_avx512vnni.packed.sum_row(act, grouping, chunk_sums, group_sums, stride);
}

void sum_panel_row(const int8_t *act, const Grouping &grouping, int32_t *chunk_sums, float *group_sums, size_t stride) {
    kernel_avx512vnni.unpacked.sum_row(act, grouping, chunk_sums, group_sums, stride);
}

Panel prepare_packed(const PanelJob &job) { return kernel_avx512vnni.packed.prepare(job); }
Panel prepare_panel(const PanelJob &job) { return kernel_avx512vnni.unpacked.prepare(job); }
void run_packed(const MicroTiles &tiles, Panel &panel) { kernel_avx512vnni.packed.run(tiles, panel); }
void run_panel(const MicroTiles &tiles, Panel &panel) { kernel_avx512vnni.unpacked.run(tiles, panel); }
void epilogue(const Epilogue &epilogue) { kernel_avx512vnni.epilogue(epilogue); }

}  // namespace avx512vnni
}  // namespace da8w4
