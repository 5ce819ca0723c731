// Each byte of the weights comes from memory once for each problem, and is prefetched while the bytes before it are
// multiplied. K is never split between threads and rows never meet, so neither changes a bit of the result.
#include "gemm/multiplier.h"

namespace da8w4 {

void Multiplier::multiply(const Problem &problem, const WorkItem &item, const Rows &rows, char *own,
                          size_t *state) const {
    const size_t first = problem.first + item.rows.begin;
    const Work work = {
        .blocking = *problem.blocking,
        .weight = operands_.weights[problem.weight],
        .bias = operands_.bias ? operands_.bias + problem.weight * product_.n : nullptr,
        .rows = rows,
        .count = item.rows.end - item.rows.begin,
        .tiles = RowTiles({.begin = 0, .end = item.rows.end - item.rows.begin}, problem.blocking->mr),
        .out = static_cast<char *>(operands_.out) + first * operands_.out_stride,
        .own = own,
    };
    const PackedBlocks blocks(work.weight);
    const TileScratch &tiles = work.blocking.tiles;
    const PanelBuffer buffer = {
        .codes = tiles.codes.in(own),
        .scales = tiles.scales.in(own),
        .offsets = tiles.offsets.in(own),
        .zp_terms = tiles.zp_terms.in(own),
    };
    const size_t near = tuning().near_k;
    Steps steps(product_, work.blocking, item.outputs);
    PackedBlock next_block = blocks[steps.now().block];
    for (; steps.more(); steps.advance()) {
        const Step &step = steps.now(), *next = steps.next();
        const PackedBlock block = next_block;
        if (next && next->block != step.block) next_block = blocks[next->block];
        Panel panel = work.blocking.form->prepare({
            .block = block,
            .k = step.k,
            .grouping = product_.grouping,
            .buffer = buffer,
            .rows = work.count * product_.act_parts(),
            .near_k = near,
            .next_block = next ? &next_block : nullptr,
            .next_k = next ? &next->k : nullptr,
        });
        run_tiles(work, step, panel, state);
    }
}

void Multiplier::run_tiles(const Work &work, const Step &step, Panel &panel, size_t *state) const {
    const Blocking &blocking = work.blocking;
    const RowTiles &tiles = work.tiles;
    const bool last = blocking.k_blocks.is_last(step.k);
    for (size_t tile = 0, end; tile < tiles.count(); tile = end) {
        end = last ? lesser(tile + kEpilogueTiles, tiles.count()) : tiles.count();
        const Range batch = {.begin = tiles.first_row(tile), .end = tiles.first_row(end)};
        // Here, since GCC takes a function that only prefetches for one without effect, and drops calls of it.
        if (last)
            for (size_t row = batch.begin; row < batch.end; row++)
                for (size_t line = 0; line < kBlock * size_of(operands_.out_type); line += 64)
                    __builtin_prefetch(out_at(work, step.output, row) + line, 0, 2);
        float *acc = work.acc(step.turn, batch.begin);
        blocking.form->run(
            {
                .rows = (batch.end - batch.begin) * product_.act_parts(),
                .act = act_rows(work.rows.from(batch.begin), step.k),
                .grouping = product_.grouping,
                .k = step.k,
                .acc = acc,
                .carried = blocking.tiles.carried.in(work.own) + (acc - blocking.tiles.acc.in(work.own)),
                .state = state,
            },
            panel);
        if (last) finish(work, step, batch);
    }
}

float *Multiplier::Work::acc(size_t turn, size_t row) const {
    return blocking.tiles.acc.in(own) + (turn * count + row) * rows.plan->parts * kBlock;
}

ActRows Multiplier::act_rows(const Rows &rows, const KBlock &k) const {
    const size_t stride = rows.plan->sums_stride;
    const bool group_scales = product_.scheme == DA8W4_ACT_INT8_GROUP;
    return {
        .rows = rows.act(0) + k.begin,
        .stride = rows.plan->act_stride,
        .is_int16 = product_.scheme == DA8W4_ACT_INT16,
        .chunk_sums = rows.chunk_sums(0) + k.chunk * stride,
        .group_sums = rows.group_sums(0) + k.group * stride,
        .group_scales = group_scales ? rows.group_scales(0) + k.group * stride : nullptr,
        .sums_stride = stride,
    };
}

char *Multiplier::out_at(const Work &work, size_t output, size_t row) const {
    const size_t col = (output - operands_.first_output) * kBlock;
    return work.out + row * operands_.out_stride + col * size_of(operands_.out_type);
}

// The last step of a column block. Gates wait for all column blocks of their outputs.
void Multiplier::finish(const Work &work, const Step &step, Range rows) const {
    epilogue(work, step, rows);
    if (operands_.gating && step.part + 1 == product_.blocks_at(step.output).count) gate(work, step, rows);
}

// Gates and ups stay where they were accumulated.
void Multiplier::epilogue(const Work &work, const Step &step, Range rows) const {
    const size_t n = step.block * kBlock, stride = kBlock * product_.act_parts();
    float *acc = work.acc(step.turn, rows.begin);
    const bool stays = operands_.gating != nullptr;
    kernel_.epilogue({
        .rows = rows.end - rows.begin,
        .cols = lesser(kBlock, product_.n - n),
        .acc = acc,
        .acc_stride = stride,
        .column_sums = work.weight.sums + n,
        .bias = work.bias ? work.bias + n : nullptr,
        .act_scales = work.rows.scale(rows.begin),
        .act_zps = work.rows.zp(rows.begin),
        .out = stays ? acc : static_cast<void *>(out_at(work, step.output, rows.begin)),
        .out_stride = stays ? stride * sizeof(float) : operands_.out_stride,
        .out_type = stays ? DA8W4_F32 : operands_.out_type,
    });
}

// The outputs of one output block lie in up to two pieces: of two blocks of pairs, or of ups.
void Multiplier::gate(const Work &work, const Step &step, Range rows) const {
    const size_t outputs = product_.outputs(), begin = step.output * kBlock, first_turn = step.turn - step.part;
    const size_t cols = lesser(kBlock, outputs - begin);
    const bool pairs = product_.columns == Columns::pairs;
    const size_t up = pairs ? 1 : outputs % kBlock;
    const size_t first_piece = pairs ? kHalf : kBlock - up;
    char *out = out_at(work, step.output, rows.begin);
    for (size_t col = 0, piece = 0; col < cols; piece++) {
        const size_t end = lesser(cols, piece ? cols : first_piece);
        const float *gates = work.acc(first_turn + (pairs ? piece : 0), rows.begin);
        const float *ups = pairs ? gates : work.acc(first_turn + 1 + piece, rows.begin);
        kernel_.gate({
            .gating = *operands_.gating,
            .rows = rows.end - rows.begin,
            .cols = end - col,
            .gates = pairs ? gates : gates + col,
            .ups = piece && !pairs ? ups : ups + up,
            .stride = kBlock * product_.act_parts(),
            .out = out + col * size_of(operands_.out_type),
            .out_stride = operands_.out_stride,
            .out_type = operands_.out_type,
        });
        col = end;
    }
}

}  // namespace da8w4
