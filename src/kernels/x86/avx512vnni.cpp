// Kernel avx512vnni: 512-bit registers and vpdpbusd (u8 x s8 quads to int32).
// Registers of a 6-row tile: 12 int32 sums, 12 float sums, 2 codes, 1 activation, and the nibble mask where codes come
// packed: 28 of 32. Codes of 5 and 6 bits take a mask and a line of upper bits more, a table one.
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

void quantize_groups(const void *x, da8w4_type x_type, const Grouping &grouping, int8_t *act, float *scales,
                     size_t stride) {
    kernel_avx512vnni.quantize_groups(x, x_type, grouping, act, scales, stride);
}

void quantize_int16(const void *x, da8w4_type x_type, size_t k, int8_t *upper, int8_t *lower, float *scale) {
    kernel_avx512vnni.quantize_int16(x, x_type, k, upper, lower, scale);
}

void transform_row(const void *x, da8w4_type x_type, size_t k, const int32_t *perm, const float *factors, float *to) {
    kernel_avx512vnni.transform_row(x, x_type, k, perm, factors, to);
}

void rotate_row(float *x, size_t k, size_t rotation) { kernel_avx512vnni.rotate_row(x, k, rotation); }

void sum_row(const int8_t *act, const Grouping &grouping, int32_t *chunk_sums, size_t stride, int32_t *group_sums) {
    kernel_avx512vnni.packed.sum_row(act, grouping, chunk_sums, stride, group_sums);
}

void sum_panel_row(const int8_t *act, const Grouping &grouping, int32_t *chunk_sums, size_t stride,
                   int32_t *group_sums) {
    kernel_avx512vnni.unpacked.sum_row(act, grouping, chunk_sums, stride, group_sums);
}

Panel prepare_packed(const PanelJob &job) { return kernel_avx512vnni.packed.prepare(job); }
Panel prepare_panel(const PanelJob &job) { return kernel_avx512vnni.unpacked.prepare(job); }
void run_packed(const MicroTiles &tiles, Panel &panel) { kernel_avx512vnni.packed.run(tiles, panel); }
void run_panel(const MicroTiles &tiles, Panel &panel) { kernel_avx512vnni.unpacked.run(tiles, panel); }
void epilogue(const Epilogue &epilogue) { kernel_avx512vnni.epilogue(epilogue); }
void gate(const GateJob &job) { kernel_avx512vnni.gate(job); }
void sum_slots(const SlotSum &sum) { kernel_avx512vnni.sum_slots(sum); }
PanelPath packed_path(const PanelJob &job) { return kernel_avx512vnni.packed.path(job); }
PanelPath panel_path(const PanelJob &job) { return kernel_avx512vnni.unpacked.path(job); }

void read(const char *first, const char *second, size_t step, size_t rounds) {
    kernel_avx512vnni.read(first, second, step, rounds);
}

}  // namespace avx512vnni
}  // namespace da8w4
