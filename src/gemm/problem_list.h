// Lists of problems, and how the threads of a parallel region quantize and multiply their parts of one.
#pragma once

#include "gemm/activations.h"
#include "gemm/multiplier.h"
#include "runtime/parallel.h"

namespace da8w4 {

// Problems whose rows follow each other.
struct ProblemList {
    Problem *problems;
    size_t count = 0;
    size_t first = 0, rows = 0;  // of all
    size_t most_rows = 0;        // of one

    explicit ProblemList(Problem *memory) : problems(memory) {}
    // The next rows, which this weight multiplies, as row blocks.
    void add(const ProductPlan &plan, size_t weight, size_t more_rows);
};

// As many problems as so many rows of so many weights can make.
size_t most_problems(const ProductPlan &plan, size_t weights, size_t rows);

class ListDriver {
public:
    ListDriver(const Kernel &kernel, const ProductPlan &plan, const Operands &operands, const ActQuantizer &quantizer)
        : kernel_(kernel), operands_(operands), quantizer_(quantizer), multiplier_(kernel, plan, operands) {}

    // This thread's part of all rows of the list, to the same places of `rows`. source_of(row) is the row of
    // activations.
    template <class SourceOf>
    void quantize(const ProblemList &list, Range part, const Rows &rows, char *own, SourceOf source_of) const {
        for (size_t i = 0; i < list.count; i++) {
            const Problem &problem = list.problems[i];
            const size_t begin = problem.first - list.first, end = begin + problem.rows;
            for (size_t row = begin > part.begin ? begin : part.begin; row < lesser(end, part.end); row++)
                quantize_row(problem, source_of(list.first + row), rows, row, own);
        }
    }

    void quantize_row(const Problem &problem, size_t source, const Rows &rows, size_t row, char *own) const {
        quantizer_.quantize(source, operands_.weights[problem.weight], rows, row, own);
        quantizer_.sum(*problem.blocking->form, rows, row, own);
    }

    // This thread's part of all products by these output blocks. rows_of(problem, range of its rows) gives those.
    template <class RowsOf>
    void multiply(const ProblemList &list, Range outputs, size_t thread, size_t threads, char *own,
                  RowsOf rows_of) const {
        WorkItems items(list.problems, list.count, outputs, thread, threads);
        size_t state = 0;
        for (WorkItem item; items.next(&item);) {
            const Problem &problem = list.problems[item.problem];
            multiplier_.multiply(problem, item, rows_of(problem, item.rows), own, &state);
        }
        if (kernel_.release) kernel_.release(state);
    }

private:
    const Kernel &kernel_;
    const Operands operands_;
    const ActQuantizer &quantizer_;
    const Multiplier multiplier_;
};

}  // namespace da8w4
