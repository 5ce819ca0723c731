// A round of tokens is one parallel region, in whose steps all threads meet:
//
//     tokens are quantized, once each             few: every thread for itself
//     gate_up                                     work items of all experts; rows are gathered from the tokens
//     its results are quantized                   few of each expert: by the work items that follow
//     for each stripe of outputs                  so many that their results stay in cache
//         down                                    work items of all experts
//         results of each token are added         in the order of its slots
#include "gemm/experts.h"

#include <cstring>

#include "runtime/barrier.h"

namespace da8w4 {
namespace {

// What results of a stripe take, one of which is added while the next one is multiplied.
constexpr size_t kStripeBytes = size_t{4} << 20;
// What quantized tokens and results that wait to be quantized may take. More tokens in a round would read weights less
// often, but with so many that already makes no difference.
constexpr size_t kRoundBytes = size_t{128} << 20;
// Outputs of a token that one thread adds at a time.
constexpr size_t kSumCols = 256;

class MoeDriver {
public:
    MoeDriver(const da8w4_moe_call &call, const Kernel &kernel, const MoePlan &plan)
        : call_(call),
          kernel_(kernel),
          plan_(plan),
          workspace_(static_cast<char *>(call.workspace)),
          hidden_(plan.hidden.in(workspace_)),
          inputs_(plan.down.product.grouping.k),
          outputs_(plan.down.product.n),
          quantizer_(
              kernel, plan.gate_up.product,
              {.act = call.act, .type = call.act_type, .stride = call.act_stride, .scales = nullptr, .zps = nullptr},
              plan.quantize_tokens),
          slot_quantizer_(
              kernel, plan.down.product,
              {.act = hidden_, .type = DA8W4_F32, .stride = inputs_ * sizeof(float), .scales = nullptr, .zps = nullptr},
              plan.quantize_slots),
          gate_up_(kernel, plan.gate_up,
                   {.weights = call.gate_up,
                    .bias = call.gate_up_bias,
                    .gating = call.gating,
                    .out = hidden_,
                    .first_output = 0,
                    .out_type = DA8W4_F32,
                    .out_stride = inputs_ * sizeof(float)},
                   quantizer_) {}

    void run(size_t threads) const {
        for (size_t token = 0; token < call_.m; token += plan_.round_tokens)
            run_round({.begin = token, .end = lesser(token + plan_.round_tokens, call_.m)}, threads);
    }

private:
    void run_round(Range tokens, size_t threads) const {
        ProblemList gate_up(plan_.gate_up_problems.in(workspace_)), down(plan_.down_problems.in(workspace_));
        sort_slots(tokens, gate_up, down);
        Barrier barrier;
        const size_t count = tokens.end - tokens.begin;
        const bool private_tokens = count <= kPrivateRows, private_slots = down.most_rows <= kPrivateRows;
        // Experts have rotations alike, but each a permutation and factors of its own.
        const bool gathers = !call_.gate_up->perm && !call_.gate_up->factors;
        const Rows shared_slots = {.plan = &plan_.slot_rows, .memory = workspace_, .first = 0};
        parallel(threads, [&](size_t thread, size_t all) {
            char *own = workspace_ + plan_.shared_bytes + thread * plan_.thread_bytes;
            const Rows token_rows = {.plan = private_tokens ? &plan_.private_tokens : &plan_.tokens,
                                     .memory = private_tokens ? own : workspace_,
                                     .first = 0};
            const Rows item_rows = {.plan = &plan_.item_rows, .memory = own, .first = 0};
            const Rows own_slots = {.plan = &plan_.private_slot_rows, .memory = own, .first = 0};
            if (gathers) {
                const Range part = private_tokens ? Range{.begin = 0, .end = count} : part_of(count, thread, all);
                for (size_t token = part.begin; token < part.end; token++)
                    quantizer_.quantize(tokens.begin + token, *call_.gate_up, token_rows, token, own);
                if (!private_tokens) barrier.wait(all);
            }
            const int32_t *token_of = plan_.token_of.in(workspace_);
            const Range all_outputs = {.begin = 0, .end = plan_.gate_up.product.output_blocks()};
            gate_up_.multiply(gate_up, all_outputs, thread, all, own, [&](const Problem &problem, Range rows) {
                for (size_t row = rows.begin; row < rows.end; row++) {
                    const size_t token = static_cast<size_t>(token_of[problem.first + row]), to = row - rows.begin;
                    if (gathers)
                        quantizer_.copy(token_rows, token, item_rows, to);
                    else
                        quantizer_.quantize(tokens.begin + token, call_.gate_up[problem.weight], item_rows, to, own);
                    quantizer_.sum(*problem.blocking->form, item_rows, to, own);
                }
                return item_rows;
            });
            barrier.wait(all);
            if (!private_slots) {
                down_of(0).quantize(down, part_of(down.rows, thread, all), shared_slots, own,
                                    [](size_t row) { return row; });
                barrier.wait(all);
            }
            const size_t stripes = ceil_div(blocks_of(outputs_), plan_.stripe_outputs);
            for (size_t stripe = 0; stripe < stripes; stripe++) {
                const ListDriver driver = down_of(stripe);
                driver.multiply(down, outputs_of(stripe), thread, all, own, [&](const Problem &problem, Range rows) {
                    if (!private_slots) return shared_slots.from(problem.first + rows.begin);
                    for (size_t row = rows.begin; row < rows.end; row++)
                        driver.quantize_row(problem, problem.first + row, own_slots, row - rows.begin, own);
                    return own_slots;
                });
                // Nobody writes to a stripe's memory before all have met once more, at the end of the next one.
                barrier.wait(all);
                sum_results(tokens, stripe, thread, all);
            }
        });
    }

    size_t stripe_cols() const { return plan_.stripe_outputs * kBlock; }

    Range outputs_of(size_t stripe) const {
        const size_t begin = stripe * plan_.stripe_outputs;
        return {.begin = begin, .end = lesser(begin + plan_.stripe_outputs, blocks_of(outputs_))};
    }

    // Stripes take one memory and the other.
    float *results_of(size_t stripe) const {
        return plan_.results.in(workspace_) + stripe % 2 * plan_.round_tokens * call_.slots * stripe_cols();
    }

    ListDriver down_of(size_t stripe) const {
        return {kernel_,
                plan_.down,
                {.weights = call_.down,
                 .bias = call_.down_bias,
                 .gating = nullptr,
                 .out = results_of(stripe),
                 .first_output = outputs_of(stripe).begin,
                 .out_type = DA8W4_F32,
                 .out_stride = stripe_cols() * sizeof(float)},
                slot_quantizer_};
    }

    // Counts the slots of each expert, and gives each slot its row.
    void sort_slots(Range tokens, ProblemList &gate_up, ProblemList &down) const {
        size_t *starts = plan_.starts.in(workspace_);
        memset(starts, 0, call_.experts * sizeof *starts);
        const size_t count = (tokens.end - tokens.begin) * call_.slots;
        const int32_t *ids = call_.ids + tokens.begin * call_.slots;
        for (size_t i = 0; i < count; i++)
            if (ids[i] >= 0) starts[ids[i]]++;
        for (size_t expert = 0; expert < call_.experts; expert++) {
            const size_t rows = starts[expert];
            starts[expert] = gate_up.rows;
            gate_up.add(plan_.gate_up, expert, rows);
            down.add(plan_.down, expert, rows);
        }
        int32_t *row_of = plan_.row_of.in(workspace_), *token_of = plan_.token_of.in(workspace_);
        for (size_t token = 0, i = 0; i < count; token++)
            for (size_t slot = 0; slot < call_.slots; slot++, i++) {
                row_of[i] = -1;
                if (ids[i] < 0) continue;
                const size_t row = starts[ids[i]]++;
                row_of[i] = static_cast<int32_t>(row);
                token_of[row] = static_cast<int32_t>(token);
            }
    }

    void sum_results(Range tokens, size_t stripe, size_t thread, size_t threads) const {
        const size_t first = stripe * stripe_cols(), cols = lesser(stripe_cols(), outputs_ - first);
        const size_t pieces = ceil_div(cols, kSumCols);
        const Range part = part_of((tokens.end - tokens.begin) * pieces, thread, threads);
        for (size_t i = part.begin; i < part.end; i++) {
            const size_t token = i / pieces, col = i % pieces * kSumCols, row = tokens.begin + token;
            kernel_.sum_slots({
                .slots = call_.slots,
                .cols = lesser(kSumCols, cols - col),
                .results = results_of(stripe) + col,
                .stride = stripe_cols(),
                .rows = plan_.row_of.in(workspace_) + token * call_.slots,
                .weights = call_.weights + row * call_.slots,
                .scaling = call_.scaling,
                .out =
                    static_cast<char *>(call_.out) + row * call_.out_stride + (first + col) * size_of(call_.out_type),
                .out_type = call_.out_type,
            });
        }
    }

    const da8w4_moe_call &call_;
    const Kernel &kernel_;
    const MoePlan &plan_;
    char *const workspace_;
    float *const hidden_;
    const size_t inputs_, outputs_;  // of down
    const ActQuantizer quantizer_, slot_quantizer_;
    const ListDriver gate_up_;
};

}  // namespace

MoePlan plan_moe(const Product &gate_up, const Product &down, const Kernel &kernel, size_t experts, size_t tokens,
                 size_t slots) {
    const size_t token_bytes = gate_up.grouping.k + slots * (sizeof(float) + 1) * down.grouping.k;
    const size_t fitting = kRoundBytes / token_bytes;
    const size_t round_tokens = lesser(tokens, fitting > kLeastRoundTokens ? fitting : kLeastRoundTokens);
    const size_t rows = round_tokens * slots;
    const size_t stripe_outputs = lesser(blocks_of(down.n), kStripeBytes / (kBlock * sizeof(float)) / (rows + 1) + 1);
    // One product follows the other, so both have the same memory to multiply in.
    ScratchLayout shared, own, own_down;
    const ProductPlan first = plan_product(gate_up, kernel, rows, own);
    const ProductPlan second = plan_product(down, kernel, rows, own_down);
    if (own_down.bytes() > own.bytes()) own = own_down;
    MoePlan plan = {
        .gate_up = first,
        .down = second,
        .round_tokens = round_tokens,
        .starts = shared.add<size_t>(experts),
        .row_of = shared.add<int32_t>(rows),
        .token_of = shared.add<int32_t>(rows),
        .gate_up_problems = shared.add<Problem>(most_problems(first, experts, rows)),
        .down_problems = shared.add<Problem>(most_problems(second, experts, rows)),
        .tokens = plan_rows(gate_up, round_tokens > kPrivateRows ? round_tokens : 0, shared),
        .slot_rows = plan_rows(down, rows > kPrivateRows ? rows : 0, shared),
        .hidden = shared.add<float>(rows * down.grouping.k),
        .results = shared.add<float>(2 * rows * stripe_outputs * kBlock),
        .stripe_outputs = stripe_outputs,
        .private_tokens = plan_rows(gate_up, lesser(round_tokens, kPrivateRows), own),
        .item_rows = plan_rows(gate_up, first.most_row_block(rows), own),
        .private_slot_rows = plan_rows(down, lesser(rows, kPrivateRows), own),
        .quantize_tokens = plan_quantize(gate_up, own),
        .quantize_slots = plan_quantize(down, own),
        .shared_bytes = 0,
        .thread_bytes = 0,
    };
    plan.shared_bytes = shared.bytes();
    plan.thread_bytes = own.bytes();
    return plan;
}

void mix_experts(const da8w4_moe_call &call, const Kernel &kernel, const MoePlan &plan, size_t threads) {
    MoeDriver(call, kernel, plan).run(threads);
}

}  // namespace da8w4
