// A call goes in rounds of some rows, each one parallel region: the rows are quantized, all threads meet, and each
// takes its work items. With few rows of each weight, threads do not meet: each quantizes the rows of its items.
#include "gemm/driver.h"

#include "runtime/barrier.h"

namespace da8w4 {
namespace {

// With several weights, a round reads nearly all of them whatever its rows are.
constexpr size_t kRoundRows = 2048;

class GroupedDriver {
public:
    GroupedDriver(const GroupedCall &call, const Kernel &kernel, const GroupedPlan &plan, char *workspace)
        : call_(call),
          plan_(plan),
          workspace_(workspace),
          quantizer_(kernel, plan.product.product, call.source, plan.quantize),
          driver_(kernel, plan.product, call.operands, quantizer_) {}

    void run(size_t threads) const {
        for (size_t weight = 0, done_of_weight = 0, done = 0; done < call_.rows;) {
            ProblemList list(plan_.problems.in(workspace_));
            list.first = done;
            while (weight < call_.weights && list.rows < plan_.round_rows) {
                const size_t left = call_.rows_of_weight[weight] - done_of_weight;
                const size_t rows = lesser(left, plan_.round_rows - list.rows);
                list.add(plan_.product, weight, rows);
                done_of_weight = rows < left ? done_of_weight + rows : 0;
                weight += rows == left;
            }
            run_round(list, threads);
            done += list.rows;
        }
    }

private:
    void run_round(const ProblemList &list, size_t threads) const {
        Barrier barrier;
        const bool private_rows = list.most_rows <= kPrivateRows;
        const Rows shared = {.plan = &plan_.rows, .memory = workspace_, .first = 0};
        parallel(threads, [&](size_t thread, size_t count) {
            char *own = workspace_ + plan_.shared_bytes + thread * plan_.thread_bytes;
            const Rows mine = {.plan = &plan_.private_rows, .memory = own, .first = 0};
            if (!private_rows) {
                driver_.quantize(list, part_of(list.rows, thread, count), shared, own, [](size_t row) { return row; });
                barrier.wait(count);
            }
            const Range outputs = {.begin = 0, .end = plan_.product.product.output_blocks()};
            driver_.multiply(list, outputs, thread, count, own, [&](const Problem &problem, Range rows) {
                if (!private_rows) return shared.from(problem.first - list.first + rows.begin);
                for (size_t row = rows.begin; row < rows.end; row++)
                    driver_.quantize_row(problem, problem.first + row, mine, row - rows.begin, own);
                return mine;
            });
        });
    }

    const GroupedCall &call_;
    const GroupedPlan &plan_;
    char *const workspace_;
    const ActQuantizer quantizer_;
    const ListDriver driver_;
};

}  // namespace

GroupedPlan plan_grouped(const Product &product, const Kernel &kernel, size_t weights, size_t rows) {
    ScratchLayout shared, own;
    GroupedPlan plan = {
        .product = plan_product(product, kernel, rows, own),
        .round_rows = 0,
        .rows = {},
        .private_rows = {},
        .quantize = {},
        .problems = {},
        .shared_bytes = 0,
        .thread_bytes = 0,
    };
    plan.round_rows = weights == 1 ? plan.product.row_block(rows) : lesser(rows, kRoundRows);
    plan.rows = plan_rows(product, rows > kPrivateRows ? plan.round_rows : 0, shared);
    plan.private_rows = plan_rows(product, lesser(rows, kPrivateRows), own);
    plan.quantize = plan_quantize(product, own);
    plan.problems = shared.add<Problem>(most_problems(plan.product, weights, plan.round_rows));
    plan.shared_bytes = shared.bytes();
    plan.thread_bytes = own.bytes();
    return plan;
}

void multiply_grouped(const GroupedCall &call, const Kernel &kernel, const GroupedPlan &plan, char *workspace,
                      size_t threads) {
    GroupedDriver(call, kernel, plan, workspace).run(threads);
}

}  // namespace da8w4
