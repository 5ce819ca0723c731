#include "gemm/problem_list.h"

namespace da8w4 {

void ProblemList::add(const ProductPlan &plan, size_t weight, size_t more_rows) {
    if (!more_rows) return;
    const size_t row_block = plan.row_block(more_rows);
    for (size_t done = 0; done < more_rows; done += row_block) {
        const size_t block_rows = lesser(row_block, more_rows - done);
        problems[count++] = {
            .blocking = &plan.of(more_rows), .weight = weight, .first = first + rows, .rows = block_rows};
        rows += block_rows;
        if (block_rows > most_rows) most_rows = block_rows;
    }
}

// Rows of one weight that make more than one row block make fewer than twice as many as they fill.
size_t most_problems(const ProductPlan &plan, size_t weights, size_t rows) {
    const size_t mc = lesser(plan.packed.mc, plan.unpacked.mc);
    return lesser(rows, lesser(weights, rows) + 2 * rows / mc);
}

}  // namespace da8w4
