#include "gemm/plan.h"

namespace da8w4 {
namespace {

// Multiplications that are worth a thread: a few microseconds, like the hand-over itself.
constexpr size_t kMinWorkPerThread = 1 << 17;
// As many as large machines have CPUs. Each thread that a call may use takes scratch memory, whether it runs or not.
constexpr size_t kMostThreads = 1024;
// Units of work for each thread, where rows can be split to make them.
constexpr size_t kUnitsPerThread = 4;

// An odd number of cache lines, so that rows do not compete for the same sets of L1.
size_t row_stride(size_t k) { return (ceil_div(k, 64) | 1) * 64; }

Blocking plan_blocking(const Product &product, const WeightForm &form, size_t rows, ScratchLayout *own) {
    const Grouping &grouping = product.grouping;
    const size_t parts = product.act_parts(), of_output = product.blocks_of_output();
    Blocking blocking = {
        .form = &form,
        .mr = form.mr / parts,
        .mc = form.mc / parts,
        .pass_outputs = form.pass_blocks > of_output ? form.pass_blocks / of_output : 1,
        .k_blocks = KBlocks(grouping, form.kc),
        .tiles = {},
    };
    const size_t most_rows = lesser(rows, blocking.mc) * parts;
    const size_t accumulators = blocking.pass_outputs * of_output * most_rows * kBlock;
    const size_t values = blocking.k_blocks.most_groups() * kBlock;
    TileScratch &tiles = blocking.tiles;
    tiles.acc = own->add<float>(accumulators);
    tiles.carried = own->add<int32_t>(grouping.group > form.kc ? accumulators : 0);
    tiles.codes = own->add<uint8_t>(form.panel_bytes(blocking.k_blocks.longest(), grouping.group));
    tiles.scales = own->add<float>(values);
    tiles.offsets = own->add<float>(product.has_offsets ? values : 0);
    tiles.zp_terms = own->add<int32_t>(values);
    return blocking;
}

}  // namespace

KBlocks::KBlocks(const Grouping &grouping, size_t kc)
    : grouping_(grouping),
      length_(grouping.group <= kc ? kc / grouping.group * grouping.group : kc),
      groups_(kc / grouping.group),
      whole_groups_(grouping.k / grouping.group) {}

KBlock KBlocks::after(const KBlock &block) const {
    const size_t group =
        block.group + (groups_ ? block.whole_groups : block.end == (block.group + 1) * grouping_.group);
    const size_t chunks = groups_ ? block.whole_groups * grouping_.chunks_of_group() : ceil_div(block.length(), kChunk);
    return at(block.end, group, block.chunk + chunks);
}

KBlock KBlocks::at(size_t begin, size_t group, size_t chunk) const {
    size_t end = begin + length_, whole = groups_;
    if (!groups_) end = lesser(end, (group + 1) * grouping_.group);
    if (end > grouping_.k) {
        whole = groups_ ? whole_groups_ - group : 0;
        end = whole ? whole_groups_ * grouping_.group : grouping_.k;
    }
    return {.begin = begin, .end = end, .group = group, .chunk = chunk, .whole_groups = whole};
}

size_t Product::blocks_of_output() const {
    if (columns == Columns::outputs) return 1;
    return columns == Columns::halves && outputs() % kBlock ? 3 : 2;
}

BlocksOfOutput Product::blocks_at(size_t output_block) const {
    if (columns == Columns::outputs) return {.count = 1, .blocks = {output_block, 0, 0}};
    const size_t first = output_block * kBlock, last = lesser(first + kBlock, outputs()) - 1;
    if (columns == Columns::pairs) {
        const size_t block = 2 * output_block;
        return {.count = block == (2 * last + 1) / kBlock ? size_t{1} : 2, .blocks = {block, block + 1, 0}};
    }
    const size_t ups = (outputs() + first) / kBlock, last_ups = (outputs() + last) / kBlock;
    return {.count = last_ups > ups ? size_t{3} : 2, .blocks = {output_block, ups, last_ups}};
}

RowsPlan plan_rows(const Product &product, size_t rows, ScratchLayout &layout) {
    const Grouping &grouping = product.grouping;
    const size_t parts = product.act_parts(), act_rows = rows * parts;
    RowsPlan plan = {};
    plan.parts = parts;
    plan.groups = grouping.groups();
    plan.act_stride = row_stride(grouping.k);
    plan.sums_stride = round_up(act_rows, 16);
    plan.act = layout.add<int8_t>(act_rows * plan.act_stride);
    plan.chunk_sums = layout.add<int32_t>(grouping.chunks() * plan.sums_stride);
    plan.group_sums = layout.add<float>(product.has_offsets ? plan.groups * plan.sums_stride : 0);
    const bool group_scales = product.scheme == DA8W4_ACT_INT8_GROUP;
    plan.group_scales = layout.add<float>(group_scales ? plan.groups * plan.sums_stride : 0);
    plan.scales = layout.add<float>(rows);
    plan.zps = layout.add<float>(rows);
    return plan;
}

QuantizeScratch plan_quantize(const Product &product, ScratchLayout &layout) {
    const size_t sums = product.has_offsets ? product.act_parts() * product.grouping.groups() : 0;
    return {
        .transformed = layout.add<float>(product.transforms ? product.grouping.k : 0),
        .group_sums = layout.add<int32_t>(sums),
    };
}

ProductPlan plan_product(const Product &product, const Kernel &kernel, size_t rows, ScratchLayout &own) {
    // A thread multiplies in one form at a time, so the two share their memory.
    const size_t packed_max = kernel.packed_max(product.grouping.group, tuning()) / product.act_parts();
    ScratchLayout packed = own, unpacked = own;
    const ProductPlan plan = {
        .product = product,
        .packed_max = packed_max,
        .packed = plan_blocking(product, kernel.packed, lesser(rows, packed_max), &packed),
        .unpacked = plan_blocking(product, kernel.unpacked, rows > packed_max ? rows : 0, &unpacked),
    };
    own = rows <= packed_max || packed.bytes() > unpacked.bytes() ? packed : unpacked;
    return plan;
}

size_t ProductPlan::row_block(size_t rows) const {
    const Blocking &blocking = of(rows);
    const size_t count = ceil_div(rows, blocking.mc);
    return count <= 1 ? rows : lesser(blocking.mc, round_up(ceil_div(rows, count), blocking.mr));
}

size_t useful_threads(const Product &product, size_t rows, size_t threads) {
    // In integers: floating point would leave its exception flags with the caller.
    const size_t busy = rows * product.act_parts() * product.n / ceil_div(kMinWorkPerThread, product.grouping.k) + 1;
    return lesser(lesser(threads, kMostThreads), busy);
}

WorkItems::WorkItems(const Problem *problems, size_t count, Range outputs, size_t thread, size_t threads)
    : problems_(problems), count_(count), outputs_(outputs) {
    if (threads > 1 && count > 0)
        most_parts_ = ceil_div(kUnitsPerThread * threads, count * (outputs.end - outputs.begin));
    size_t cost = 0;
    for (size_t i = 0; i < count; i++) cost += units_of(problems[i]).cost();
    const size_t each = cost / threads, more = cost % threads;
    begin_ = each * thread + ceil_div(more * thread, threads);
    end_ = each * (thread + 1) + ceil_div(more * (thread + 1), threads);
}

WorkItems::Units WorkItems::units_of(const Problem &problem) const {
    const size_t tiles = ceil_div(problem.rows, problem.blocking->mr), parts = lesser(most_parts_, tiles);
    // A problem of few rows waits for its weights: so its tiles are not the measure.
    const auto cost_of = [&](size_t tiles) {
        const size_t reading = problem.blocking->form->tiles_of_reading;
        return tiles > reading ? tiles : reading;
    };
    Units units = {
        .outputs = outputs_.end - outputs_.begin,
        .parts = parts,
        .tiles = parts ? tiles / parts : 0,
        .higher = parts ? tiles % parts : 0,
        .low_cost = 0,
        .high_cost = 0,
    };
    units.low_cost = cost_of(units.tiles);
    units.high_cost = cost_of(units.tiles + 1);
    return units;
}

size_t WorkItems::Units::before(size_t cost) const {
    const size_t all_high = higher * outputs;
    if (cost <= all_high * high_cost) return ceil_div(cost, high_cost);
    return all_high + ceil_div(cost - all_high * high_cost, low_cost);
}

// A unit belongs to the thread in whose costs it begins.
bool WorkItems::next(WorkItem *item) {
    for (; problem_ < count_ && cost_before_ < end_; problem_++, unit_ = 0) {
        const Problem &problem = problems_[problem_];
        const Units units = units_of(problem);
        const size_t cost = units.cost();
        const size_t first = begin_ > cost_before_ ? units.before(lesser(cost, begin_ - cost_before_)) : 0;
        const size_t last = units.before(lesser(cost, end_ - cost_before_));
        if (unit_ < first) unit_ = first;
        if (unit_ < last) {
            const size_t part = unit_ / units.outputs, output = unit_ % units.outputs;
            const size_t end = lesser(units.outputs, output + (last - unit_));
            const RowTiles tiles({.begin = 0, .end = problem.rows}, problem.blocking->mr);
            const size_t tile = part * units.tiles + lesser(part, units.higher);
            const size_t tile_end = tile + units.tiles + (part < units.higher);
            *item = {
                .problem = problem_,
                .rows = {.begin = tiles.first_row(tile), .end = tiles.first_row(tile_end)},
                .outputs = {.begin = outputs_.begin + output, .end = outputs_.begin + end},
            };
            unit_ += end - output;
            return true;
        }
        cost_before_ += cost;
    }
    return false;
}

Steps::Steps(const Product &product, const Blocking &blocking, Range outputs)
    : product_(product),
      k_blocks_(blocking.k_blocks),
      pass_outputs_(blocking.pass_outputs),
      end_(outputs.end),
      pass_(outputs.begin),
      parts_{},
      now_(begin_of(outputs.begin, 0, k_blocks_.first())),
      next_(after(now_)) {}

void Steps::advance() {
    now_ = next_;
    if (more()) next_ = after(now_);
}

Step Steps::begin_of(size_t output, size_t turn, const KBlock &k) {
    if (output < end_) parts_ = product_.blocks_at(output);
    return {.output = output, .part = 0, .block = parts_.blocks[0], .turn = turn, .k = k};
}

Step Steps::after(const Step &step) {
    const size_t part = step.part + 1, pass_end = lesser(pass_ + pass_outputs_, end_);
    if (part < parts_.count)
        return {.output = step.output, .part = part, .block = parts_.blocks[part], .turn = step.turn + 1, .k = step.k};
    if (step.output + 1 < pass_end) return begin_of(step.output + 1, step.turn + 1, step.k);
    if (!k_blocks_.is_last(step.k)) return begin_of(pass_, 0, k_blocks_.after(step.k));
    pass_ = pass_end;
    return begin_of(pass_end, 0, k_blocks_.first());
}

}  // namespace da8w4
