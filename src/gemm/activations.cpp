#include "gemm/activations.h"

#include <cstring>

namespace da8w4 {

void ActQuantizer::quantize(size_t from, const da8w4_packed &weight, const Rows &rows, size_t row, char *own) const {
    if (is_float(source_.type))
        quantize_floats(static_cast<const char *>(source_.act) + from * source_.stride, weight, rows, row, own);
    else
        copy_quantized(from, weight, rows, row);
    const size_t k = product_.grouping.k, stride = rows.plan->act_stride;
    for (size_t part = 0; part < rows.plan->parts; part++) memset(rows.act(row) + part * stride + k, 0, stride - k);
}

void ActQuantizer::copy(const Rows &from, size_t from_row, const Rows &rows, size_t row) const {
    memcpy(rows.act(row), from.act(from_row), rows.plan->parts * rows.plan->act_stride);
    *rows.scale(row) = *from.scale(from_row);
    *rows.zp(row) = *from.zp(from_row);
    if (product_.scheme != DA8W4_ACT_INT8_GROUP) return;
    const float *scales = from.group_scales(from_row);
    float *to = rows.group_scales(row);
    for (size_t g = 0; g < rows.plan->groups; g++) to[g * rows.plan->sums_stride] = scales[g * from.plan->sums_stride];
}

void ActQuantizer::sum(const WeightForm &form, const Rows &rows, size_t row, char *own) const {
    const RowsPlan &plan = *rows.plan;
    int32_t *sums = product_.has_offsets ? scratch_.group_sums.in(own) : nullptr;
    for (size_t part = 0; part < plan.parts; part++)
        form.sum_row(rows.act(row) + part * plan.act_stride, product_.grouping, rows.chunk_sums(row) + part,
                     plan.sums_stride, sums ? sums + part * plan.groups : nullptr);
    if (sums) sum_groups(sums, rows, row);
}

void ActQuantizer::quantize_floats(const void *x, const da8w4_packed &weight, const Rows &rows, size_t row,
                                   char *own) const {
    const Grouping &grouping = product_.grouping;
    da8w4_type type = source_.type;
    if (product_.transforms) {
        float *transformed = scratch_.transformed.in(own);
        kernel_.transform_row(x, type, grouping.k, weight.perm, weight.factors, transformed);
        if (weight.rotation) kernel_.rotate_row(transformed, grouping.k, weight.rotation);
        x = transformed;
        type = DA8W4_F32;
    }
    // What a scheme does not set: the epilogue multiplies by one and subtracts no zero point.
    float *scale = rows.scale(row);
    *scale = 1;
    int8_t *act = rows.act(row);
    int32_t zp = 0;
    switch (product_.scheme) {
        case DA8W4_ACT_UINT8:
        case DA8W4_ACT_INT8:
            kernel_.quantize_row(x, type, grouping.k, product_.scheme == DA8W4_ACT_INT8, 0, act, scale, &zp);
            break;
        case DA8W4_ACT_INT8_GROUP:
            kernel_.quantize_groups(x, type, grouping, act, rows.group_scales(row), rows.plan->sums_stride);
            break;
        case DA8W4_ACT_INT16:
            kernel_.quantize_int16(x, type, grouping.k, act, act + rows.plan->act_stride, scale);
            break;
    }
    *rows.zp(row) = static_cast<float>(zp);
}

void ActQuantizer::copy_quantized(size_t from, const da8w4_packed &weight, const Rows &rows, size_t row) const {
    const bool is_unsigned = source_.type == DA8W4_U8;
    const uint8_t *bytes = static_cast<const uint8_t *>(source_.act) + from * source_.stride;
    const uint8_t flip = is_unsigned ? 0x80 : 0;  // which subtracts 128
    const size_t k = product_.grouping.k;
    int8_t *act = rows.act(row);
    if (weight.perm)
        for (size_t i = 0; i < k; i++) act[i] = static_cast<int8_t>(bytes[weight.perm[i]] ^ flip);
    else
        for (size_t i = 0; i < k; i++) act[i] = static_cast<int8_t>(bytes[i] ^ flip);
    *rows.scale(row) = source_.scales ? source_.scales[from] : 1.0f;
    *rows.zp(row) = static_cast<float>((source_.zps ? source_.zps[from] : 0) - (is_unsigned ? 128 : 0));
}

// What is multiplied by offsets: the sum of a group's activations, which is rounded to float32 once.
void ActQuantizer::sum_groups(const int32_t *sums, const Rows &rows, size_t row) const {
    const RowsPlan &plan = *rows.plan;
    const float *scales = rows.group_scales(row);
    float *to = rows.group_sums(row);
    for (size_t g = 0; g < plan.groups; g++) {
        int64_t sum = sums[g];
        if (product_.scheme == DA8W4_ACT_INT16) sum = 256 * sum + sums[plan.groups + g];
        to[g * plan.sums_stride] = static_cast<float>(sum);
        if (product_.scheme == DA8W4_ACT_INT8_GROUP) to[g * plan.sums_stride] *= scales[g * plan.sums_stride];
    }
}

}  // namespace da8w4
