#include "gemm/activations.h"

#include <cstring>

namespace da8w4 {

void ActQuantizer::quantize(size_t from, size_t to, const ThreadMemory &memory) const {
    const Grouping &grouping = plan_.problem.grouping;
    const size_t k = grouping.k, parts = plan_.problem.act_parts(), first = to * parts;
    int8_t *act = plan_.rows.act.in(memory.rows) + first * plan_.act_stride;
    const Row row = {
        .act = {act, act + plan_.act_stride},
        .scale = plan_.rows.scales.in(memory.rows) + to,
        .zp = plan_.rows.zps.in(memory.rows) + to,
        .group_scales = plan_.rows.group_scales.in(memory.rows) + first,
    };
    const void *source = static_cast<const char *>(call_.act) + from * call_.act_stride;
    if (is_float(call_.act_type))
        quantize_floats(source, row, memory);
    else
        copy_quantized(from, source, row);

    const bool has_offsets = plan_.problem.has_offsets;
    int32_t *sums = plan_.quantize.group_sums.in(memory.own);
    for (size_t part = 0; part < parts; part++) {
        memset(row.act[part] + k, 0, plan_.act_stride - k);
        plan_.form->sum_row(row.act[part], grouping, plan_.rows.chunk_sums.in(memory.rows) + first + part,
                            plan_.sums_stride, has_offsets ? sums + part * grouping.groups() : nullptr);
    }
    if (has_offsets) sum_groups(sums, row, plan_.rows.group_sums.in(memory.rows) + first);
}

void ActQuantizer::quantize_floats(const void *x, const Row &row, const ThreadMemory &memory) const {
    const Grouping &grouping = plan_.problem.grouping;
    da8w4_type type = call_.act_type;
    if (plan_.problem.transforms) {
        float *transformed = plan_.quantize.transformed.in(memory.own);
        kernel_.transform_row(x, type, grouping.k, weight_.perm, weight_.factors, transformed);
        x = transformed;
        type = DA8W4_F32;
    }
    // What a scheme does not set: the epilogue multiplies by one and subtracts no zero point.
    *row.scale = 1;
    int32_t zp = 0;
    switch (plan_.problem.scheme) {
        case DA8W4_ACT_UINT8:
        case DA8W4_ACT_INT8:
            kernel_.quantize_row(x, type, grouping.k, plan_.problem.scheme == DA8W4_ACT_INT8, 0, row.act[0], row.scale,
                                 &zp);
            break;
        case DA8W4_ACT_INT8_GROUP:
            kernel_.quantize_groups(x, type, grouping, row.act[0], row.group_scales, plan_.sums_stride);
            break;
        case DA8W4_ACT_INT16: kernel_.quantize_int16(x, type, grouping.k, row.act[0], row.act[1], row.scale); break;
    }
    *row.zp = static_cast<float>(zp);
}

void ActQuantizer::copy_quantized(size_t from, const void *act, const Row &row) const {
    const bool is_unsigned = call_.act_type == DA8W4_U8;
    const uint8_t *bytes = static_cast<const uint8_t *>(act), flip = is_unsigned ? 0x80 : 0;  // which subtracts 128
    const size_t k = weight_.k;
    if (weight_.perm)
        for (size_t i = 0; i < k; i++) row.act[0][i] = static_cast<int8_t>(bytes[weight_.perm[i]] ^ flip);
    else
        for (size_t i = 0; i < k; i++) row.act[0][i] = static_cast<int8_t>(bytes[i] ^ flip);
    *row.scale = call_.act_scales ? call_.act_scales[from] : 1.0f;
    *row.zp = static_cast<float>((call_.act_zps ? call_.act_zps[from] : 0) - (is_unsigned ? 128 : 0));
}

// What is multiplied by offsets: the sum of a group's activations, which is rounded to float32 once.
void ActQuantizer::sum_groups(const int32_t *sums, const Row &row, float *to) const {
    const size_t groups = plan_.problem.grouping.groups(), stride = plan_.sums_stride;
    for (size_t g = 0; g < groups; g++) {
        int64_t sum = sums[g];
        if (plan_.problem.scheme == DA8W4_ACT_INT16) sum = 256 * sum + sums[groups + g];
        to[g * stride] = static_cast<float>(sum);
        if (plan_.problem.scheme == DA8W4_ACT_INT8_GROUP) to[g * stride] *= row.group_scales[g * stride];
    }
}

}  // namespace da8w4
