// The loop nest of a product. For each row block, the rows are quantized; then each thread takes its work items, and
// for each K block and column block prepares a panel, runs the micro-kernel over all rows, and after the last K block
// the epilogue. docs/architecture.md has the picture.
//
// Each byte of the weights comes from memory once for each row block, and is prefetched while the bytes before it are
// multiplied. K is never split between threads and rows never meet, so neither changes a bit of the result.
#include "gemm/driver.h"

#include <cstring>

namespace da8w4 {
namespace {

class GemmDriver {
public:
    GemmDriver(const da8w4_call &call, const Kernel &kernel, const ProblemPlan &plan)
        : call_(call), weight_(*call.weight), kernel_(kernel), plan_(plan), form_(*plan.form) {}

    void run(size_t threads) const {
        char *shared = static_cast<char *>(call_.workspace), *own = shared + plan_.shared_bytes;
        for (size_t first_row = 0; first_row < call_.m; first_row += plan_.mc) {
            const size_t rows = lesser(plan_.mc, call_.m - first_row);
            if (!plan_.private_rows)
                parallel(threads, [&](size_t thread, size_t count) {
                    quantize_rows(first_row, part_of(rows, thread, count), shared);
                });
            parallel(threads, [&](size_t thread, size_t count) {
                const Memory memory = {
                    .rows = plan_.private_rows ? own + thread * plan_.thread_bytes : shared,
                    .tiles = own + thread * plan_.thread_bytes,
                };
                if (plan_.private_rows) quantize_rows(first_row, {.begin = 0, .end = rows}, memory.rows);
                WorkItems items(&plan_, &rows, 1, thread, count);
                size_t state = 0;
                for (WorkItem item; items.next(&item);) multiply(first_row, item, memory, &state);
                if (kernel_.release) kernel_.release(state);
            });
        }
    }

private:
    // Where a thread finds the quantized rows of the row block, and what it multiplies in.
    struct Memory {
        char *rows, *tiles;
    };

    // Rows of the row block that begins at first_row.
    void quantize_rows(size_t first_row, Range rows, char *memory) const {
        for (size_t row = rows.begin; row < rows.end; row++) quantize_row(first_row + row, row, memory);
    }

    // Row `from` of the activations to row `to` of the row block.
    void quantize_row(size_t from, size_t to, char *memory) const {
        const Grouping &grouping = plan_.problem.grouping;
        const size_t k = grouping.k;
        const char *source = static_cast<const char *>(call_.act) + from * call_.act_stride;
        int8_t *act = plan_.rows.act.in(memory) + to * plan_.act_stride;
        float *scale = plan_.rows.scales.in(memory) + to, *zp = plan_.rows.zps.in(memory) + to;
        if (is_float(call_.act_type)) {
            int32_t act_zp;
            kernel_.quantize_row(source, call_.act_type, k, call_.symmetric != 0, 0, act, scale, &act_zp);
            *zp = static_cast<float>(act_zp);
        } else {
            const bool is_unsigned = call_.act_type == DA8W4_U8;
            const uint8_t flip = is_unsigned ? 0x80 : 0;  // flipping the sign bit is subtracting 128
            for (size_t i = 0; i < k; i++) act[i] = static_cast<int8_t>(source[i] ^ flip);
            *scale = call_.act_scales ? call_.act_scales[from] : 1.0f;
            *zp = static_cast<float>((call_.act_zps ? call_.act_zps[from] : 0) - (is_unsigned ? 128 : 0));
        }
        memset(act + k, 0, plan_.act_stride - k);
        form_.sum_row(act, grouping, plan_.rows.chunk_sums.in(memory) + to,
                      plan_.problem.has_offsets ? plan_.rows.group_sums.in(memory) + to : nullptr, plan_.sums_stride);
    }

    void multiply(size_t first_row, const WorkItem &item, const Memory &memory, size_t *state) const {
        const Grouping &grouping = plan_.problem.grouping;
        const size_t groups = grouping.groups(), rows = item.rows.end - item.rows.begin;
        const RowTiles tiles(item.rows, form_.mr);
        const PanelBuffer buffer = {
            .codes = plan_.tiles.codes.in(memory.tiles),
            .scales = plan_.tiles.scales.in(memory.tiles),
            .offsets = plan_.tiles.offsets.in(memory.tiles),
            .zp_terms = plan_.tiles.zp_terms.in(memory.tiles),
        };
        for (Steps steps(plan_, item.blocks); steps.more(); steps.advance()) {
            const Step &step = steps.now(), *next = steps.next();
            const bool last = plan_.k_blocks.is_last(step.k);
            const PackedBlock block = block_of(weight_, groups, step.block);
            const PackedBlock next_block = block_of(weight_, groups, next ? next->block : step.block);
            Panel panel = form_.prepare({
                .block = block,
                .k = step.k,
                .grouping = grouping,
                .buffer = buffer,
                .rows = rows,
                .next_block = next ? &next_block : nullptr,
                .next_k = next ? &next->k : nullptr,
            });
            for (size_t tile = 0, end; tile < tiles.count(); tile = end) {
                end = last ? lesser(tile + kEpilogueTiles, tiles.count()) : tiles.count();
                const Range batch = {.begin = tiles.first_row(tile), .end = tiles.first_row(end)};
                if (last) prefetch_out(step.block, first_row, batch);
                const size_t at = (step.turn * rows + batch.begin - item.rows.begin) * kBlock;
                float *acc = plan_.tiles.acc.in(memory.tiles) + at;
                form_.run(
                    {
                        .rows = batch.end - batch.begin,
                        .act = act_rows(batch.begin, step.k, memory.rows),
                        .grouping = grouping,
                        .k = step.k,
                        .acc = acc,
                        .carried = plan_.tiles.carried.in(memory.tiles) + at,
                        .state = state,
                    },
                    panel);
                if (last) epilogue(step.block, first_row, batch, memory.rows, acc);
            }
        }
    }

    ActRows act_rows(size_t row, const KBlock &k, char *memory) const {
        return {
            .rows = plan_.rows.act.in(memory) + row * plan_.act_stride + k.begin,
            .stride = plan_.act_stride,
            .chunk_sums = plan_.rows.chunk_sums.in(memory) + k.chunk * plan_.sums_stride + row,
            .group_sums = plan_.rows.group_sums.in(memory) + k.group * plan_.sums_stride + row,
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
    const Kernel &kernel_;
    const ProblemPlan &plan_;
    const WeightForm &form_;
};

}  // namespace

void multiply(const da8w4_call &call, const Kernel &kernel, const ProblemPlan &plan, size_t threads) {
    GemmDriver(call, kernel, plan).run(threads);
}

}  // namespace da8w4
