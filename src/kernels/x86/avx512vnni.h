// The functions of kernel avx512vnni, which kernel amx takes over: one copy in the library serves both.
#pragma once

#include "kernels/kernel.h"

namespace da8w4::avx512vnni {

void quantize_row(const void *x, da8w4_type x_type, size_t k, bool symmetric, uint8_t flip, void *act, float *scale,
                  int32_t *zp);
void quantize_groups(const void *x, da8w4_type x_type, const Grouping &grouping, int8_t *act, float *scales,
                     size_t stride);
void quantize_int16(const void *x, da8w4_type x_type, size_t k, int8_t *upper, int8_t *lower, float *scale);
void transform_row(const void *x, da8w4_type x_type, size_t k, const int32_t *perm, const float *factors, float *to);
void rotate_row(float *x, size_t k, size_t rotation);
void sum_row(const int8_t *act, const Grouping &grouping, int32_t *chunk_sums, size_t stride, int32_t *group_sums);
void sum_panel_row(const int8_t *act, const Grouping &grouping, int32_t *chunk_sums, size_t stride,
                   int32_t *group_sums);
Panel prepare_packed(const PanelJob &job);
Panel prepare_panel(const PanelJob &job);
void run_packed(const MicroTiles &tiles, Panel &panel);
void run_panel(const MicroTiles &tiles, Panel &panel);
void epilogue(const Epilogue &epilogue);
void gate(const GateJob &job);
void sum_slots(const SlotSum &sum);
PanelPath packed_path(const PanelJob &job);
PanelPath panel_path(const PanelJob &job);
void read(const char *first, const char *second, size_t step, size_t rounds);

}  // namespace da8w4::avx512vnni
