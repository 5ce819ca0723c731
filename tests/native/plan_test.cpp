// The plan of a product, over millions of shapes: K blocks cover k once, in whole groups where they can; scratch arrays
// do not overlap; work items cover every row of every output block of every problem once, evenly; steps come in order.
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
size_t few_rows(size_t group, const Tuning &) { return group < 32 ? 40 : 7; }
size_t no_rows(size_t, const Tuning &) { return 0; }

Kernel random_kernel(Random &random) {
    Kernel kernel = {};
    kernel.packed_max = random.bits() % 4 ? few_rows : no_rows;
    for (WeightForm *form : {&kernel.packed, &kernel.unpacked}) {
        form->mr = 2 * random.between(1, 16);
        form->mc = random.between(form->mr, 300);
        form->kc = kChunk * random.between(1, 4);
        form->pass_blocks = random.between(1, 4);
        form->tiles_of_reading = random.between(1, 4);
        form->panel_bytes = random.bits() % 2 ? a_line_a_quad : nothing;
    }
    return kernel;
}

Product random_product(Random &random) {
    const size_t k = random.up_to(5000);
    const size_t group = random.bits() % 8 ? lesser(k, 4 * random.up_to(600)) : k;
    const Columns columns = static_cast<Columns>(random.bits() % 3);
    return {
        .n = random.up_to(columns == Columns::outputs ? 3000 : 1500) * (columns == Columns::outputs ? 1 : 2),
        .grouping = {.k = k, .group = group % kQuad ? k : group},
        .has_offsets = random.bits() % 2 != 0,
        .transforms = random.bits() % 4 == 0,
        .scheme = static_cast<da8w4_scheme>(random.bits() % 4),
        .columns = columns,
    };
}

void check_k_blocks(const Grouping &grouping, const Blocking &plan) {
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
        // Where groups fit, K blocks are of whole ones; a shorter last one has a K block of its own.
        if (grouping.group <= plan.form->kc)
            CHECK(block.whole_groups || block.begin == grouping.k / grouping.group * grouping.group);
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
size_t parts_of(const Product &product) { return product.scheme == DA8W4_ACT_INT16 ? 2 : 1; }

void check_rows(const Product &product, size_t count) {
    const Grouping &grouping = product.grouping;
    const size_t all_rows = count * parts_of(product), groups = grouping.groups();
    const bool by_group = product.scheme == DA8W4_ACT_INT8_GROUP;
    ScratchLayout layout;
    const RowsPlan rows = plan_rows(product, count, layout);
    CHECK(rows.parts == parts_of(product) && rows.groups == groups);
    CHECK(rows.act_stride >= grouping.k && rows.act_stride % 64 == 0 && rows.act_stride / 64 % 2 == 1);
    CHECK(rows.sums_stride >= all_rows);
    Arrays arrays;
    arrays.next(rows.act, all_rows * rows.act_stride);
    arrays.next(rows.chunk_sums, grouping.chunks() * rows.sums_stride);
    arrays.next(rows.group_sums, product.has_offsets ? groups * rows.sums_stride : 0);
    arrays.next(rows.group_scales, by_group ? groups * rows.sums_stride : 0);
    arrays.next(rows.scales, count);
    arrays.next(rows.zps, count);
    const QuantizeScratch quantize = plan_quantize(product, layout);
    arrays.next(quantize.transformed, product.transforms ? grouping.k : 0);
    arrays.next(quantize.group_sums, product.has_offsets ? parts_of(product) * groups : 0);
    CHECK(arrays.end_ <= layout.bytes() && layout.bytes() % 64 == 0);
}

// Each form has memory for the largest row block that it gets.
void check_tiles(const ProductPlan &plan, const Blocking &blocking, size_t rows, size_t bytes) {
    const Product &product = plan.product;
    const size_t all_rows = lesser(rows, blocking.mc) * parts_of(product);
    size_t of_output = 1;
    for (size_t output = 0; output < product.output_blocks(); output++)
        of_output =
            lesser(3, product.blocks_at(output).count > of_output ? product.blocks_at(output).count : of_output);
    CHECK(of_output <= product.blocks_of_output());
    const size_t outputs = blocking.pass_outputs * of_output * all_rows * kBlock;
    const size_t values = blocking.k_blocks.most_groups() * kBlock;
    Arrays own;
    own.next(blocking.tiles.acc, outputs);
    own.next(blocking.tiles.carried, product.grouping.group > blocking.form->kc ? outputs : 0);
    own.next(blocking.tiles.codes, blocking.form->panel_bytes(blocking.k_blocks.longest(), product.grouping.group));
    own.next(blocking.tiles.scales, values);
    own.next(blocking.tiles.offsets, product.has_offsets ? values : 0);
    own.next(blocking.tiles.zp_terms, values);
    CHECK(own.end_ <= bytes);
}

// A kernel gets micro-tiles and row blocks of at most its own sizes, in rows of int8.
void check_row_blocks(const ProductPlan &plan, const Kernel &kernel, size_t m) {
    const size_t parts = parts_of(plan.product), row_block = plan.row_block(m), blocks = ceil_div(m, row_block);
    const Blocking &blocking = plan.of(m);
    const size_t most = blocking.form->mc / parts;
    CHECK(blocking.form ==
          (m * parts <= kernel.packed_max(plan.product.grouping.group, tuning()) ? &kernel.packed : &kernel.unpacked));
    CHECK(blocking.mr == blocking.form->mr / parts && blocking.mc == most);
    CHECK(row_block <= most && row_block <= m && row_block <= plan.most_row_block(m));
    CHECK(blocks == 1 || row_block % blocking.mr == 0 || row_block == most);
    // No more passes over the weights than whole micro-tiles of the largest row block make necessary.
    CHECK(blocks <= ceil_div(m, most - most % blocking.mr));
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

// The columns of all column blocks of an output block have its gates and its ups.
void check_columns(const Product &product) {
    const size_t outputs = product.outputs();
    for (size_t output = 0; output < product.output_blocks(); output++) {
        const BlocksOfOutput parts = product.blocks_at(output);
        const auto has = [&](size_t column) {
            for (size_t part = 0; part < parts.count; part++)
                if (column / kBlock == parts.blocks[part]) return true;
            return false;
        };
        for (size_t i = output * kBlock; i < lesser(outputs, (output + 1) * kBlock); i++) {
            if (product.columns == Columns::outputs) CHECK(has(i));
            if (product.columns == Columns::halves) CHECK(has(i) && has(outputs + i));
            if (product.columns == Columns::pairs) CHECK(has(2 * i) && has(2 * i + 1));
        }
        for (size_t part = 0; part < parts.count; part++) CHECK(parts.blocks[part] < blocks_of(product.n));
    }
}

void check_steps(const Product &product, const Blocking &blocking, Range outputs) {
    size_t output = outputs.begin;
    Steps steps(product, blocking, outputs);
    while (output < outputs.end) {
        const size_t pass_end = lesser(output + blocking.pass_outputs, outputs.end);
        for (KBlock k = blocking.k_blocks.first();; k = blocking.k_blocks.after(k)) {
            size_t turn = 0;
            for (size_t at = output; at < pass_end; at++) {
                const BlocksOfOutput parts = product.blocks_at(at);
                for (size_t part = 0; part < parts.count; part++, turn++, steps.advance()) {
                    CHECK(steps.more());
                    const Step &now = steps.now();
                    CHECK(now.output == at && now.part == part && now.block == parts.blocks[part]);
                    CHECK(now.turn == turn && now.k.begin == k.begin && now.k.end == k.end);
                    const bool last = at + 1 == outputs.end && part + 1 == parts.count && blocking.k_blocks.is_last(k);
                    CHECK((steps.next() == nullptr) == last);
                    if (part + 1 < parts.count) CHECK(steps.next()->block == parts.blocks[part + 1]);
                }
            }
            CHECK(turn <= blocking.pass_outputs * product.blocks_of_output());
            if (blocking.k_blocks.is_last(k)) break;
        }
        output = pass_end;
    }
    CHECK(!steps.more());
}

// Every row of every output block of every problem, once; and no thread does much more than its part.
void check_work(const Product &product, const std::vector<Problem> &problems, Range outputs, size_t threads) {
    std::vector<std::vector<size_t>> done(problems.size());  // rows done of each output block
    size_t all = 0, largest_unit = 0;
    for (auto &each : done) each.resize(product.output_blocks());
    std::vector<size_t> costs(threads);
    for (size_t thread = 0; thread < threads; thread++) {
        WorkItems items(problems.data(), problems.size(), outputs, thread, threads);
        for (WorkItem item; items.next(&item);) {
            CHECK(item.problem < problems.size());
            const Problem &problem = problems[item.problem];
            CHECK(item.rows.begin < item.rows.end && item.rows.end <= problem.rows);
            CHECK(item.outputs.begin >= outputs.begin && item.outputs.begin < item.outputs.end);
            CHECK(item.outputs.end <= outputs.end);
            const size_t tiles = ceil_div(item.rows.end - item.rows.begin, problem.blocking->mr);
            const size_t reading = problem.blocking->form->tiles_of_reading;
            const size_t unit = tiles > reading ? tiles : reading;
            largest_unit = unit > largest_unit ? unit : largest_unit;
            for (size_t output = item.outputs.begin; output < item.outputs.end; output++) {
                // Threads and items come in order, so rows of a block are done from the top down.
                CHECK(done[item.problem][output] == item.rows.begin);
                done[item.problem][output] = item.rows.end;
                costs[thread] += unit;
                all += unit;
            }
        }
    }
    for (size_t i = 0; i < problems.size(); i++)
        for (size_t output = 0; output < done[i].size(); output++)
            CHECK(done[i][output] == (output >= outputs.begin && output < outputs.end ? problems[i].rows : 0));
    for (const size_t cost : costs) CHECK(cost <= all / threads + largest_unit);
}

}  // namespace

int main(int count, char **arguments) {
    const size_t shapes = count > 1 ? strtoull(arguments[1], nullptr, 10) : 1000000;
    for (shape_at = 0; shape_at < shapes; shape_at++) {
        Random random = {shape_at};
        const Kernel kernel = random_kernel(random);
        const Product product = random_product(random);
        const size_t m = random.up_to(900);
        ScratchLayout own;
        const ProductPlan plan = plan_product(product, kernel, m, own);
        const Blocking &blocking = plan.of(random.between(1, m));
        check_k_blocks(product.grouping, blocking);
        check_rows(product, m);
        if (m > plan.packed_max) check_tiles(plan, plan.unpacked, m, own.bytes());
        check_tiles(plan, plan.packed, lesser(m, plan.packed_max), own.bytes());
        check_row_blocks(plan, kernel, m);
        check_row_tiles(m, blocking.mr);
        if (shape_at % 4 == 0) {
            check_columns(product);
            const size_t begin = random.between(0, product.output_blocks() - 1);
            check_steps(product, blocking, {begin, random.between(begin + 1, product.output_blocks())});
        }
        CHECK(useful_threads(product, m, 3) >= 1 && useful_threads(product, m, 3) <= 3);
        if (shape_at % 16) continue;
        std::vector<Problem> problems(random.bits() % 2 ? 1 : random.between(1, 9));
        for (Problem &problem : problems) {
            const size_t rows = random.bits() % 4 ? random.between(1, m) : m;
            problem = {.blocking = &plan.of(rows), .weight = 0, .first = 0, .rows = rows};
        }
        const size_t begin = random.bits() % 2 ? 0 : random.between(0, product.output_blocks() - 1);
        check_work(product, problems, {begin, random.between(begin + 1, product.output_blocks())}, random.up_to(70));
    }
    printf("%zu shapes\n", shapes);
    return 0;
}
