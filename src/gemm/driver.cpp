// The loop nest of a product. For each row block, the rows are quantized; then each thread takes its work items, and
// for each K block and column block prepares a panel, runs the micro-kernel over all rows, and after the last K block
// the epilogue. docs/architecture.md has the picture.
//
// Each byte of the weights comes from memory once for each row block, and is prefetched while the bytes before it are
// multiplied. K is never split between threads and rows never meet, so neither changes a bit of the result.
#include "gemm/driver.h"

#include "gemm/activations.h"

namespace da8w4 {
namespace {

class GemmDriver {
public:
    GemmDriver(const da8w4_call &call, const Kernel &kernel, const ProblemPlan &plan)
        : call_(call),
          weight_(*call.weight),
          blocks_(weight_),
          kernel_(kernel),
          plan_(plan),
          form_(*plan.form),
          quantizer_(call, kernel, plan) {}

    void run(size_t threads) const {
        for (size_t first_row = 0; first_row < call_.m; first_row += plan_.mc) {
            const size_t rows = lesser(plan_.mc, call_.m - first_row);
            if (!plan_.private_rows)
                parallel(threads, [&](size_t thread, size_t count) {
                    quantize_rows(first_row, part_of(rows, thread, count), memory_of(thread));
                });
            parallel(threads, [&](size_t thread, size_t count) {
                const ThreadMemory memory = memory_of(thread);
                if (plan_.private_rows) quantize_rows(first_row, {.begin = 0, .end = rows}, memory);
                WorkItems items(&plan_, &rows, 1, thread, count);
                size_t state = 0;
                for (WorkItem item; items.next(&item);) multiply(first_row, item, memory, &state);
                if (kernel_.release) kernel_.release(state);
            });
        }
    }

private:
    ThreadMemory memory_of(size_t thread) const {
        char *shared = static_cast<char *>(call_.workspace);
        char *own = shared + plan_.shared_bytes + thread * plan_.thread_bytes;
        return {.rows = plan_.private_rows ? own : shared, .own = own};
    }

    // Rows of the row block that begins at first_row.
    void quantize_rows(size_t first_row, Range rows, const ThreadMemory &memory) const {
        for (size_t row = rows.begin; row < rows.end; row++) quantizer_.quantize(first_row + row, row, memory);
    }

    void multiply(size_t first_row, const WorkItem &item, const ThreadMemory &memory, size_t *state) const {
        const Grouping &grouping = plan_.problem.grouping;
        const size_t rows = item.rows.end - item.rows.begin;
        const size_t parts = plan_.problem.act_parts();
        const RowTiles tiles(item.rows, plan_.mr);
        const PanelBuffer buffer = {
            .codes = plan_.tiles.codes.in(memory.own),
            .scales = plan_.tiles.scales.in(memory.own),
            .offsets = plan_.tiles.offsets.in(memory.own),
            .zp_terms = plan_.tiles.zp_terms.in(memory.own),
        };
        for (Steps steps(plan_, item.blocks); steps.more(); steps.advance()) {
            const Step &step = steps.now(), *next = steps.next();
            const bool last = plan_.k_blocks.is_last(step.k);
            const PackedBlock block = blocks_[step.block];
            const PackedBlock next_block = blocks_[next ? next->block : step.block];
            Panel panel = form_.prepare({
                .block = block,
                .k = step.k,
                .grouping = grouping,
                .buffer = buffer,
                .rows = rows * parts,
                .next_block = next ? &next_block : nullptr,
                .next_k = next ? &next->k : nullptr,
            });
            for (size_t tile = 0, end; tile < tiles.count(); tile = end) {
                end = last ? lesser(tile + kEpilogueTiles, tiles.count()) : tiles.count();
                const Range batch = {.begin = tiles.first_row(tile), .end = tiles.first_row(end)};
                if (last) prefetch_out(step.block, first_row, batch);
                const size_t at = (step.turn * rows + batch.begin - item.rows.begin) * parts * kBlock;
                float *acc = plan_.tiles.acc.in(memory.own) + at;
                form_.run(
                    {
                        .rows = (batch.end - batch.begin) * parts,
                        .act = act_rows(batch.begin, step.k, memory.rows),
                        .grouping = grouping,
                        .k = step.k,
                        .acc = acc,
                        .carried = plan_.tiles.carried.in(memory.own) + at,
                        .state = state,
                    },
                    panel);
                if (last) epilogue(step.block, first_row, batch, memory.rows, acc);
            }
        }
    }

    ActRows act_rows(size_t row, const KBlock &k, char *memory) const {
        const size_t first = row * plan_.problem.act_parts(), group = k.group * plan_.sums_stride + first;
        const bool group_scales = plan_.problem.scheme == DA8W4_ACT_INT8_GROUP;
        return {
            .rows = plan_.rows.act.in(memory) + first * plan_.act_stride + k.begin,
            .stride = plan_.act_stride,
            .is_int16 = plan_.problem.scheme == DA8W4_ACT_INT16,
            .chunk_sums = plan_.rows.chunk_sums.in(memory) + k.chunk * plan_.sums_stride + first,
            .group_sums = plan_.rows.group_sums.in(memory) + group,
            .group_scales = group_scales ? plan_.rows.group_scales.in(memory) + group : nullptr,
            .sums_stride = plan_.sums_stride,
        };
    }

    char *out_at(size_t block, size_t row) const {
        return static_cast<char *>(call_.out) + row * call_.out_stride + block * kBlock * size_of(call_.out_type);
    }

    // Always inlined: GCC takes a function that only prefetches for one without effect, and drops calls of it.
    DA8W4_INLINE void prefetch_out(size_t block, size_t first_row, Range rows) const {
        for (size_t row = rows.begin; row < rows.end; row++) __builtin_prefetch(out_at(block, first_row + row), 0, 2);
    }

    void epilogue(size_t block, size_t first_row, Range rows, char *memory, const float *acc) const {
        const size_t n = block * kBlock;
        kernel_.epilogue({
            .rows = rows.end - rows.begin,
            .cols = lesser(kBlock, weight_.n - n),
            .acc = acc,
            .acc_stride = kBlock * plan_.problem.act_parts(),
            .column_sums = weight_.sums + n,
            .bias = call_.bias ? call_.bias + n : nullptr,
            .act_scales = plan_.rows.scales.in(memory) + rows.begin,
            .act_zps = plan_.rows.zps.in(memory) + rows.begin,
            .out = out_at(block, first_row + rows.begin),
            .out_stride = call_.out_stride,
            .out_type = call_.out_type,
        });
    }

    const da8w4_call &call_;
    const da8w4_packed &weight_;
    const PackedBlocks blocks_;
    const Kernel &kernel_;
    const ProblemPlan &plan_;
    const WeightForm &form_;
    const ActQuantizer quantizer_;
};

}  // namespace

void multiply(const da8w4_call &call, const Kernel &kernel, const ProblemPlan &plan, size_t threads) {
    GemmDriver(call, kernel, plan).run(threads);
}

}  // namespace da8w4
