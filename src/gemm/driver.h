// Executes the product of rows by one weight, or of rows by the weights of several experts.
#pragma once

#include "gemm/problem_list.h"

namespace da8w4 {

// What such a call is of. Rows come weight by weight.
struct GroupedCall {
    size_t weights, rows;
    const size_t *rows_of_weight;  // [weights]
    Source source;
    Operands operands;
};

struct GroupedPlan {
    ProductPlan product;
    size_t round_rows;         // that are quantized and multiplied in one parallel region
    RowsPlan rows;             // shared: of a round
    RowsPlan private_rows;     // in the thread's memory
    QuantizeScratch quantize;  // the same
    Scratch<Problem> problems;
    size_t shared_bytes, thread_bytes;
};
GroupedPlan plan_grouped(const Product &product, const Kernel &kernel, size_t weights, size_t rows);

void multiply_grouped(const GroupedCall &call, const Kernel &kernel, const GroupedPlan &plan, char *workspace,
                      size_t threads);

}  // namespace da8w4
