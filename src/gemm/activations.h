// Rows of activations as kernels read them: permuted, quantized by the scheme of the call, and summed.
#pragma once

#include "gemm/plan.h"

namespace da8w4 {

// Quantized rows in scratch memory, from one of them on. All arrays are those of ActRows.
struct Rows {
    const RowsPlan *plan;
    char *memory;
    size_t first;

    Rows from(size_t row) const { return {.plan = plan, .memory = memory, .first = first + row}; }
    int8_t *act(size_t row) const { return plan->act.in(memory) + (first + row) * plan->parts * plan->act_stride; }
    int32_t *chunk_sums(size_t row) const { return plan->chunk_sums.in(memory) + (first + row) * plan->parts; }
    float *group_sums(size_t row) const { return plan->group_sums.in(memory) + (first + row) * plan->parts; }
    float *group_scales(size_t row) const { return plan->group_scales.in(memory) + (first + row) * plan->parts; }
    float *scale(size_t row) const { return plan->scales.in(memory) + first + row; }
    float *zp(size_t row) const { return plan->zps.in(memory) + first + row; }
};

// Activations of a call: floats, or quantized already.
struct Source {
    const void *act;
    da8w4_type type;
    size_t stride;        // bytes
    const float *scales;  // of those that are quantized; null: 1
    const int32_t *zps;   // the same; null: 0
};

class ActQuantizer {
public:
    ActQuantizer(const Kernel &kernel, const Product &product, const Source &source, const QuantizeScratch &scratch)
        : kernel_(kernel), product_(product), source_(source), scratch_(scratch) {}

    // Row `from` of the activations, as this weight takes it, to `row` of the rows. Its sums are left to sum().
    void quantize(size_t from, const da8w4_packed &weight, const Rows &rows, size_t row, char *own) const;
    // What a row of other rows holds, but for its sums.
    void copy(const Rows &from, size_t from_row, const Rows &rows, size_t row) const;
    // The sums of a row that micro-kernels of this form need.
    void sum(const WeightForm &form, const Rows &rows, size_t row, char *own) const;

private:
    void quantize_floats(const void *x, const da8w4_packed &weight, const Rows &rows, size_t row, char *own) const;
    void copy_quantized(size_t from, const da8w4_packed &weight, const Rows &rows, size_t row) const;
    void sum_groups(const int32_t *sums, const Rows &rows, size_t row) const;

    const Kernel &kernel_;
    const Product &product_;
    const Source source_;
    const QuantizeScratch scratch_;
};

}  // namespace da8w4
