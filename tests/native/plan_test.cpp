// The plan of a product, over millions of shapes: K blocks cover k once, in whole groups where they can; scratch arrays
// do not overlap; work items cover every row of every column block of every problem once, evenly; steps come in order.
//
//     plan_test [SHAPES]
#include "gemm/plan.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace da8w4;

namespace {

#define CHECK(condition)                                                                  \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            printf("FAILED line %d: %s, in shape %zu\n", __LINE__, #condition, shape_at); \
            exit(1);                                                                      \
        }                                                                                 \
    } while (0)

size_t shape_at;

// splitmix64, seeded by the shape, so that one can be replayed alone.
struct Random {
    uint64_t state;
    uint64_t bits() {
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    size_t between(size_t low, size_t high) { return low + bits() % (high - low + 1); }
    // Small numbers as often as large ones.
    size_t up_to(size_t high) { return between(1, lesser(high, size_t{1} << between(0, 16))); }
};

size_t a_line_a_quad(size_t length, size_t) { return quads_of(length) * 128; }
size_t nothing(size_t, size_t) { return 0; }

Kernel random_kernel(Random &random) {
    Kernel kernel = {};
    kernel.packed_max = random.between(0, 40);
    for (WeightForm *form : {&kernel.packed, &kernel.unpacked}) {
        form->mr = 2 * random.between(1, 16);
        form->mc = random.between(form->mr, 300);
        form->kc = kChunk * random.between(1, 4);
        form->pass_blocks = random.between(1, 4);
        form->panel_bytes = random.bits() % 2 ? a_line_a_quad : nothing;
    }
    return kernel;
}

Problem random_problem(Random &random) {
    const size_t k = random.up_to(5000);
    const size_t group = random.bits() % 8 ? lesser(k, 4 * random.up_to(600)) : k;
    return {
        .m = random.up_to(900),
        .n = random.up_to(3000),
        .grouping = {.k = k, .group = group % kQuad ? k : group},
        .has_offsets = random.bits() % 2 != 0,
        .transforms = random.bits() % 4 == 0,
        .scheme = static_cast<da8w4_scheme>(random.bits() % 4),
    };
}

void check_k_blocks(const ProblemPlan &plan) {
    const Grouping &grouping = plan.problem.grouping;
    const KBlocks &blocks = plan.k_blocks;
    size_t k = 0, groups = 0;
    for (KBlock block = blocks.first();; block = blocks.after(block)) {
        CHECK(block.begin == k && block.end > k && block.end <= grouping.k);
        CHECK(block.length() <= plan.form->kc && block.length() <= blocks.longest());
        CHECK(block.group == block.begin / grouping.group);
        const size_t in_group = block.begin % grouping.group;
        CHECK(in_group % kChunk == 0);
        CHECK(block.chunk == block.group * grouping.chunks_of_group() + in_group / kChunk);
        const bool whole = in_group == 0 && block.length() % grouping.group == 0;
        CHECK(block.whole_groups == 0 || (whole && block.whole_groups * grouping.group == block.length()));
        // Only the shorter last group of k costs a K block its whole groups.
        if (whole && grouping.k % grouping.group == 0 && grouping.group <= plan.form->kc) CHECK(block.whole_groups);
        CHECK(ceil_div(block.end - block.group * grouping.group, grouping.group) <= blocks.most_groups());
        groups = lesser(grouping.groups(), ceil_div(block.end, grouping.group));
        k = block.end;
        if (blocks.is_last(block)) {
            CHECK(block.chunk + ceil_div(block.length(), kChunk) <= grouping.chunks() || block.whole_groups > 1 ||
                  grouping.group < kChunk);
            break;
        }
        CHECK(block.end % kQuad == 0);
    }
    CHECK(k == grouping.k && groups == grouping.groups());
}

// Arrays in the order in which they are laid out.
class Arrays {
public:
    template <class T>
    void next(const Scratch<T> &array, size_t count) {
        CHECK(array.offset % 64 == 0 && array.offset >= end_);
        end_ = array.offset + count * sizeof(T);
    }
    size_t end_ = 0;
};

// Rows of int8 for each row of activations: the upper and the lower bytes of 16 bits.
size_t parts_of(const ProblemPlan &plan) { return plan.problem.scheme == DA8W4_ACT_INT16 ? 2 : 1; }

void check_scratch(const ProblemPlan &plan) {
    const Grouping &grouping = plan.problem.grouping;
    const size_t parts = parts_of(plan), all_rows = plan.mc * parts, groups = grouping.groups();
    const bool has_offsets = plan.problem.has_offsets, by_group = plan.problem.scheme == DA8W4_ACT_INT8_GROUP;
    Arrays shared, own;
    Arrays &rows = plan.private_rows ? own : shared;
    CHECK(plan.act_stride >= grouping.k && plan.act_stride % 64 == 0 && plan.act_stride / 64 % 2 == 1);
    CHECK(plan.sums_stride >= all_rows);
    rows.next(plan.rows.act, all_rows * plan.act_stride);
    rows.next(plan.rows.chunk_sums, grouping.chunks() * plan.sums_stride);
    rows.next(plan.rows.group_sums, has_offsets ? groups * plan.sums_stride : 0);
    rows.next(plan.rows.group_scales, by_group ? groups * plan.sums_stride : 0);
    rows.next(plan.rows.scales, plan.mc);
    rows.next(plan.rows.zps, plan.mc);
    own.next(plan.quantize.transformed, plan.problem.transforms ? grouping.k : 0);
    own.next(plan.quantize.group_sums, has_offsets ? parts * groups : 0);
    const size_t outputs = plan.form->pass_blocks * all_rows * kBlock;
    const size_t values = plan.k_blocks.most_groups() * kBlock;
    own.next(plan.tiles.acc, outputs);
    own.next(plan.tiles.carried, grouping.group > plan.form->kc ? outputs : 0);
    own.next(plan.tiles.codes, plan.form->panel_bytes(plan.k_blocks.longest(), grouping.group));
    own.next(plan.tiles.scales, values);
    own.next(plan.tiles.offsets, has_offsets ? values : 0);
    own.next(plan.tiles.zp_terms, values);
    CHECK(shared.end_ <= plan.shared_bytes && own.end_ <= plan.thread_bytes);
    CHECK(plan.shared_bytes % 64 == 0 && plan.thread_bytes % 64 == 0);
}

// A kernel gets micro-tiles and row blocks of at most its own sizes, in rows of int8.
void check_row_blocks(const ProblemPlan &plan, const Kernel &kernel) {
    const size_t m = plan.problem.m, parts = parts_of(plan), blocks = ceil_div(m, plan.mc);
    const size_t most = plan.form->mc / parts;
    CHECK(plan.form == (m * parts <= kernel.packed_max ? &kernel.packed : &kernel.unpacked));
    CHECK(plan.mr == plan.form->mr / parts && plan.mc <= most && plan.mc <= m);
    CHECK(blocks == 1 || plan.mc % plan.mr == 0 || plan.mc == most);
    // No more passes over the weights than whole micro-tiles of the largest row block make necessary.
    CHECK(blocks <= ceil_div(m, most - most % plan.mr));
}

// A batch of micro-tiles that a kernel gets by itself is cut where the whole was.
void check_row_tiles(size_t rows, size_t mr) {
    const RowTiles tiles({7, 7 + rows}, mr);
    CHECK(tiles.first_row(0) == 7 && tiles.first_row(tiles.count()) == 7 + rows);
    for (size_t tile = 0, end; tile < tiles.count(); tile = end) {
        end = lesser(tile + kEpilogueTiles, tiles.count());
        const RowTiles batch({tiles.first_row(tile), tiles.first_row(end)}, mr);
        CHECK(batch.count() == end - tile);
        for (size_t i = 0; i < batch.count(); i++) {
            CHECK(batch.first_row(i) == tiles.first_row(tile + i));
            CHECK(batch.first_row(i + 1) - batch.first_row(i) <= mr);
        }
    }
}

void check_steps(const ProblemPlan &plan, Range blocks) {
    const size_t pass_blocks = plan.form->pass_blocks;
    size_t block = blocks.begin;
    Steps steps(plan, blocks);
    while (block < blocks.end) {
        const size_t pass_end = lesser(block + pass_blocks, blocks.end);
        for (KBlock k = plan.k_blocks.first();; k = plan.k_blocks.after(k)) {
            for (size_t turn = 0; block + turn < pass_end; turn++, steps.advance()) {
                CHECK(steps.more());
                const Step &now = steps.now();
                CHECK(now.block == block + turn && now.turn == turn && now.k.begin == k.begin && now.k.end == k.end);
                const bool last = now.block + 1 == blocks.end && plan.k_blocks.is_last(k);
                CHECK((steps.next() == nullptr) == last);
                if (!last && turn + 1 < pass_end - block) CHECK(steps.next()->block == now.block + 1);
            }
            if (plan.k_blocks.is_last(k)) break;
        }
        block = pass_end;
    }
    CHECK(!steps.more());
}

// Every row of every column block of every problem, once; and no thread does much more than its part.
void check_work(const std::vector<ProblemPlan> &plans, const std::vector<size_t> &rows, size_t threads) {
    std::vector<std::vector<size_t>> done(plans.size());  // rows done of each column block
    size_t all = 0, largest_unit = 0;
    for (size_t i = 0; i < plans.size(); i++) done[i].resize(plans[i].column_blocks());
    std::vector<size_t> costs(threads);
    for (size_t thread = 0; thread < threads; thread++) {
        WorkItems items(plans.data(), rows.data(), plans.size(), thread, threads);
        for (WorkItem item; items.next(&item);) {
            CHECK(item.problem < plans.size());
            const ProblemPlan &plan = plans[item.problem];
            CHECK(item.rows.begin < item.rows.end && item.rows.end <= rows[item.problem]);
            CHECK(item.blocks.begin < item.blocks.end && item.blocks.end <= plan.column_blocks());
            const size_t height = item.rows.end - item.rows.begin;
            const size_t unit = ceil_div(height, plan.mr) * quads_of(plan.problem.grouping.k);
            largest_unit = unit > largest_unit ? unit : largest_unit;
            for (size_t block = item.blocks.begin; block < item.blocks.end; block++) {
                // Threads and items come in order, so rows of a block are done from the top down.
                CHECK(done[item.problem][block] == item.rows.begin);
                done[item.problem][block] = item.rows.end;
                costs[thread] += unit;
                all += unit;
            }
        }
    }
    for (size_t i = 0; i < plans.size(); i++)
        for (const size_t count : done[i]) CHECK(count == rows[i]);
    for (const size_t cost : costs) CHECK(cost <= all / threads + largest_unit);
}

}  // namespace

int main(int count, char **arguments) {
    const size_t shapes = count > 1 ? strtoull(arguments[1], nullptr, 10) : 1000000;
    for (shape_at = 0; shape_at < shapes; shape_at++) {
        Random random = {shape_at};
        const Kernel kernel = random_kernel(random);
        const ProblemPlan plan = plan_problem(random_problem(random), kernel);
        check_k_blocks(plan);
        check_scratch(plan);
        check_row_blocks(plan, kernel);
        check_row_tiles(plan.mc, plan.mr);
        const size_t begin = random.between(0, plan.column_blocks() - 1);
        if (shape_at % 4 == 0) check_steps(plan, {begin, random.between(begin + 1, plan.column_blocks())});
        CHECK(useful_threads(plan.problem, 3) >= 1 && useful_threads(plan.problem, 3) <= 3);
        if (shape_at % 16) continue;
        std::vector<ProblemPlan> plans(random.bits() % 2 ? 1 : random.between(1, 9), plan);
        std::vector<size_t> rows;
        for (ProblemPlan &each : plans) {
            if (&each != &plans[0]) each = plan_problem(random_problem(random), kernel);
            rows.push_back(random.bits() % 4 ? random.between(1, each.mc) : plans.size() > 1 ? 0 : each.mc);
        }
        check_work(plans, rows, random.up_to(70));
    }
    printf("%zu shapes\n", shapes);
    return 0;
}
