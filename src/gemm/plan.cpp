#include "gemm/plan.h"

namespace da8w4 {
namespace {

// Up to this many rows, every thread quantizes them all for itself.
constexpr size_t kPrivateRows = 4;
// Multiplications that are worth a thread: a few microseconds, like the hand-over itself.
constexpr size_t kMinWorkPerThread = 1 << 17;
// As many as large machines have CPUs. Each thread that a call may use takes scratch memory, whether it runs or not.
constexpr size_t kMostThreads = 1024;
// Units of work for each thread, where rows can be split to make them.
constexpr size_t kUnitsPerThread = 4;

// An odd number of cache lines, so that rows do not compete for the same sets of L1.
size_t row_stride(size_t k) { return (ceil_div(k, 64) | 1) * 64; }

// Row blocks of nearly equal size in whole micro-tiles: each one reads all weights again.
size_t row_block_of(size_t m, size_t mr, size_t mc) {
    const size_t count = ceil_div(m, mc);
    return count <= 1 ? m : lesser(mc, round_up(ceil_div(m, count), mr));
}

}  // namespace

KBlocks::KBlocks(const Grouping &grouping, size_t kc)
    : grouping_(grouping),
      length_(grouping.group <= kc ? kc / grouping.group * grouping.group : kc),
      groups_(kc / grouping.group),
      whole_groups_(grouping.k % grouping.group == 0 ? grouping.k / grouping.group : 0) {}

KBlock KBlocks::after(const KBlock &block) const {
    const size_t group = block.group + (groups_ ? groups_ : block.end == (block.group + 1) * grouping_.group);
    const size_t chunks = groups_ ? groups_ * grouping_.chunks_of_group() : ceil_div(block.length(), kChunk);
    return at(block.end, group, block.chunk + chunks);
}

KBlock KBlocks::at(size_t begin, size_t group, size_t chunk) const {
    size_t end = begin + length_, whole = groups_;
    if (!groups_) end = lesser(end, (group + 1) * grouping_.group);
    if (end > grouping_.k) {
        end = grouping_.k;
        whole = groups_ && whole_groups_ ? whole_groups_ - group : 0;
    }
    return {.begin = begin, .end = end, .group = group, .chunk = chunk, .whole_groups = whole};
}

ProblemPlan plan_problem(const Problem &problem, const Kernel &kernel) {
    const Grouping &grouping = problem.grouping;
    const size_t parts = problem.act_parts();
    const bool packed = problem.m <= kernel.packed_max / parts;
    const WeightForm &form = packed ? kernel.packed : kernel.unpacked;
    const size_t mr = form.mr / parts, mc = row_block_of(problem.m, mr, form.mc / parts), rows = mc * parts;
    ProblemPlan plan = {
        .problem = problem,
        .form = &form,
        .mr = mr,
        .mc = mc,
        .private_rows = problem.m <= kPrivateRows,
        .k_blocks = KBlocks(grouping, form.kc),
        .act_stride = row_stride(grouping.k),
        .sums_stride = round_up(rows, 16),
        .rows = {},
        .quantize = {},
        .tiles = {},
        .shared_bytes = 0,
        .thread_bytes = 0,
    };

    ScratchLayout shared, own;
    ScratchLayout &for_rows = plan.private_rows ? own : shared;
    const bool group_scales = problem.scheme == DA8W4_ACT_INT8_GROUP;
    plan.rows.act = for_rows.add<int8_t>(rows * plan.act_stride);
    plan.rows.chunk_sums = for_rows.add<int32_t>(grouping.chunks() * plan.sums_stride);
    plan.rows.group_sums = for_rows.add<float>(problem.has_offsets ? grouping.groups() * plan.sums_stride : 0);
    plan.rows.group_scales = for_rows.add<float>(group_scales ? grouping.groups() * plan.sums_stride : 0);
    plan.rows.scales = for_rows.add<float>(mc);
    plan.rows.zps = for_rows.add<float>(mc);
    plan.quantize.transformed = own.add<float>(problem.transforms ? grouping.k : 0);
    plan.quantize.group_sums = own.add<int32_t>(problem.has_offsets ? parts * grouping.groups() : 0);

    const size_t accumulators = form.pass_blocks * rows * kBlock;
    const size_t values = plan.k_blocks.most_groups() * kBlock;
    plan.tiles.acc = own.add<float>(accumulators);
    plan.tiles.carried = own.add<int32_t>(grouping.group > form.kc ? accumulators : 0);
    plan.tiles.codes = own.add<uint8_t>(form.panel_bytes(plan.k_blocks.longest(), grouping.group));
    plan.tiles.scales = own.add<float>(values);
    plan.tiles.offsets = own.add<float>(problem.has_offsets ? values : 0);
    plan.tiles.zp_terms = own.add<int32_t>(values);

    plan.shared_bytes = shared.bytes();
    plan.thread_bytes = own.bytes();
    return plan;
}

size_t useful_threads(const Problem &problem, size_t threads) {
    // In integers: floating point would leave its exception flags with the caller.
    const size_t busy =
        problem.m * problem.act_parts() * problem.n / ceil_div(kMinWorkPerThread, problem.grouping.k) + 1;
    return lesser(lesser(threads, kMostThreads), busy);
}

WorkItems::WorkItems(const ProblemPlan *plans, const size_t *rows, size_t count, size_t thread, size_t threads)
    : plans_(plans), rows_(rows), count_(count) {
    size_t blocks = 0, cost = 0;
    for (size_t i = 0; i < count; i++) blocks += plans[i].column_blocks();
    if (threads > 1 && blocks > 0) most_parts_ = ceil_div(kUnitsPerThread * threads, blocks);
    for (size_t i = 0; i < count; i++) cost += units_of(i).cost();
    const size_t each = cost / threads, more = cost % threads;
    begin_ = each * thread + ceil_div(more * thread, threads);
    end_ = each * (thread + 1) + ceil_div(more * (thread + 1), threads);
}

WorkItems::Units WorkItems::units_of(size_t problem) const {
    const ProblemPlan &plan = plans_[problem];
    const size_t tiles = ceil_div(rows_[problem], plan.mr), parts = lesser(most_parts_, tiles);
    return {
        .blocks = plan.column_blocks(),
        .parts = parts,
        .quads = quads_of(plan.problem.grouping.k),
        .tiles = parts ? tiles / parts : 0,
        .higher = parts ? tiles % parts : 0,
    };
}

size_t WorkItems::Units::before(size_t cost) const {
    const size_t high_cost = (tiles + 1) * quads, low_cost = tiles * quads, all_high = higher * blocks;
    if (cost <= all_high * high_cost) return ceil_div(cost, high_cost);
    return all_high + ceil_div(cost - all_high * high_cost, low_cost);
}

// A unit belongs to the thread in whose costs it begins.
bool WorkItems::next(WorkItem *item) {
    for (; problem_ < count_ && cost_before_ < end_; problem_++, unit_ = 0) {
        const Units units = units_of(problem_);
        const size_t cost = units.cost();
        const size_t first = begin_ > cost_before_ ? units.before(lesser(cost, begin_ - cost_before_)) : 0;
        const size_t last = units.before(lesser(cost, end_ - cost_before_));
        if (unit_ < first) unit_ = first;
        if (unit_ < last) {
            const size_t part = unit_ / units.blocks, block = unit_ % units.blocks;
            const size_t end = lesser(units.blocks, block + (last - unit_));
            const RowTiles tiles({.begin = 0, .end = rows_[problem_]}, plans_[problem_].mr);
            const size_t tile = part * units.tiles + lesser(part, units.higher);
            const size_t tile_end = tile + units.tiles + (part < units.higher);
            *item = {
                .problem = problem_,
                .rows = {.begin = tiles.first_row(tile), .end = tiles.first_row(tile_end)},
                .blocks = {.begin = block, .end = end},
            };
            unit_ += end - block;
            return true;
        }
        cost_before_ += cost;
    }
    return false;
}

Steps::Steps(const ProblemPlan &plan, Range blocks)
    : k_blocks_(plan.k_blocks),
      blocks_(blocks),
      pass_blocks_(plan.form->pass_blocks),
      now_{.block = blocks.begin, .turn = 0, .k = plan.k_blocks.first()},
      next_(after(now_)) {}

void Steps::advance() {
    now_ = next_;
    if (more()) next_ = after(now_);
}

Step Steps::after(const Step &step) const {
    const size_t pass = step.block - step.turn;
    if (step.block + 1 < lesser(pass + pass_blocks_, blocks_.end))
        return {.block = step.block + 1, .turn = step.turn + 1, .k = step.k};
    if (!k_blocks_.is_last(step.k)) return {.block = pass, .turn = 0, .k = k_blocks_.after(step.k)};
    return {.block = step.block + 1, .turn = 0, .k = k_blocks_.first()};
}

}  // namespace da8w4
