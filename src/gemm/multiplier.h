// The loop nest of a work item: for each K block and column block prepare a panel, run the micro-kernel over all rows,
// and after the last K block the epilogue, and gates. docs/architecture.md has the picture.
#pragma once

#include "gemm/activations.h"
#include "gemm/plan.h"

namespace da8w4 {

// What is multiplied beside the rows, and where results go.
struct Operands {
    const da8w4_packed *weights;
    const float *bias;           // [weight][n], or null
    const da8w4_gating *gating;  // null: none
    void *out;                   // from this output block on
    size_t first_output;
    da8w4_type out_type;
    size_t out_stride;
};

class Multiplier {
public:
    Multiplier(const Kernel &kernel, const ProductPlan &plan, const Operands &operands)
        : kernel_(kernel), product_(plan.product), operands_(operands) {}

    // The item's rows of the problem, which are the first of `rows`, by its output blocks. `state` is the thread's: see
    // MicroTiles.
    void multiply(const Problem &problem, const WorkItem &item, const Rows &rows, char *own, size_t *state) const;

private:
    // One item as its steps see it.
    struct Work {
        const Blocking &blocking;
        const da8w4_packed &weight;
        const float *bias;
        Rows rows;
        size_t count;  // of rows
        RowTiles tiles;
        char *out;  // of the first row
        char *own;

        float *acc(size_t turn, size_t row) const;
    };
    void run_tiles(const Work &work, const Step &step, Panel &panel, size_t *state) const;
    void finish(const Work &work, const Step &step, Range rows) const;
    void epilogue(const Work &work, const Step &step, Range rows) const;
    void gate(const Work &work, const Step &step, Range rows) const;
    ActRows act_rows(const Rows &rows, const KBlock &k) const;
    char *out_at(const Work &work, size_t output, size_t row) const;

    const Kernel &kernel_;
    const Product &product_;
    const Operands operands_;
};

}  // namespace da8w4
