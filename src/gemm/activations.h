// Rows of activations as kernels read them: permuted, quantized by the scheme of the call, and summed.
#pragma once

#include "gemm/plan.h"

namespace da8w4 {

// Where one thread finds its arrays.
struct ThreadMemory {
    char *rows;  // of RowScratch
    char *own;   // of QuantizeScratch and TileScratch
};

class ActQuantizer {
public:
    ActQuantizer(const da8w4_call &call, const Kernel &kernel, const ProblemPlan &plan)
        : call_(call), weight_(*call.weight), kernel_(kernel), plan_(plan) {}

    // Row `from` of the activations to row `to` of the row block.
    void quantize(size_t from, size_t to, const ThreadMemory &memory) const;

private:
    // Where one row goes.
    struct Row {
        int8_t *act[2];  // the second: lower bytes of 16 bits
        float *scale, *zp;
        float *group_scales;  // [group * sums_stride]
    };
    void quantize_floats(const void *x, const Row &row, const ThreadMemory &memory) const;
    void copy_quantized(size_t from, const void *act, const Row &row) const;
    void sum_groups(const int32_t *sums, const Row &row, float *to) const;

    const da8w4_call &call_;
    const da8w4_packed &weight_;
    const Kernel &kernel_;
    const ProblemPlan &plan_;
};

}  // namespace da8w4
