// Products at the edge of what numbers hold: the longest groups, the lowest zero points, the smallest workspace.
#include <algorithm>
#include <iterator>

#include "harness.h"
#include "product.h"

namespace check {
namespace {

// The longest groups that are allowed: k * 128 * |code - zp| just below 2^31.
struct LongGroup {
    size_t k;
    int code, zp;
};
const LongGroup long_groups[] = {{117323, 15, -128}, {132104, 0, 127}, {1118481, 15, 0}};

void check_long_group(const Trial &trial) {
    const LongGroup &edge = long_groups[trial.index];
    if (trial.quick && edge.k > 200000) return;
    Matrix w = {};
    w.n = 3;
    w.k = w.group = edge.k;
    w.groups = 1;
    w.codes.assign(w.n * w.k, edge.code);
    w.zps.assign(w.n, edge.zp);
    w.scales = {1, -0.5f, 0.375f};
    w.offsets = {0.3f, -1, 1000};
    w.one_zp = true;
    const Weight weight = packed_weight(trial.random, w);
    for (size_t m : {1, 3, 9}) {
        if (m > 1 && edge.k > 200000) continue;
        Random random = trial.random.child(uint64_t{m});
        Operands o = random_operands(random, w, m, false);
        o.symmetric = m == 3;
        o.act_type = o.symmetric ? DA8W4_S8 : DA8W4_U8;
        o.act_stride = w.k;
        o.act.assign(m * w.k, o.symmetric ? 0x80 : 0);
        o.act[0] = 1;
        o.scales.clear();
        o.zps.assign(m, o.symmetric ? 127 : 0);
        check_product(random, weight, o);
    }
}

// Kernels that unpack to bytes hold code - zp + 128 in them, which the highest code leaves below the zero point -112.
const int low_zps[] = {-110, -111, -112, -113, -114, -127, -128};
// They are so low everywhere, in one block, in the last group, or in one place only.
bool (*const low_places[])(const Matrix &, size_t n, size_t g) = {
    [](const Matrix &, size_t, size_t) { return true; },
    [](const Matrix &, size_t n, size_t) { return n < 32; },
    [](const Matrix &, size_t n, size_t) { return n >= 32 && n < 64; },
    [](const Matrix &w, size_t, size_t g) { return g + 1 == w.groups; },
    [](const Matrix &w, size_t n, size_t g) { return n + 1 == w.n && g + 1 == w.groups; },
};
// Whole groups; the shortest; one that goes on over several K blocks; groups that end beside chunks.
const Shape low_shapes[] = {{70, 96, 32}, {70, 600, 4}, {70, 1300, 1300}, {70, 700, 300}};

void check_low_zps(const Trial &trial) {
    const int lowest = low_zps[trial.index / 2 % std::size(low_zps)];
    const auto is_low = low_places[trial.index / 2 / std::size(low_zps)];
    Random random = trial.random;
    const Shape &shape = low_shapes[trial.index % 2 ? 1 + random.below(3) : 0];
    Matrix w;
    do w = random_matrix(random, shape);
    while (w.format == DA8W4_CODES_S4);
    w.one_zp = false;
    for (size_t n = 0; n < w.n; n++)
        for (size_t g = 0; g < w.groups; g++) {
            const bool low = is_low(w, n, g);
            w.zps[n * w.groups + g] = low ? lowest : random.between(0, 15);
            const size_t begin = g * w.group, length = std::min(w.group, w.k - begin);
            if (low) w.codes[n * w.k + begin + random.below(length)] = 15;
        }
    const Weight weight = packed_weight(random, w);
    for (size_t m : {3, 25, 60}) check_either_product(trial.random.child(uint64_t{m}), weight, m);
}

// Every workspace that is smaller than da8w4_workspace_bytes is refused, though it has room for some of the threads;
// one of that size suffices, and its guard page shows that no more is written.
struct WorkspaceCase {
    size_t m, n, group;  // of k = 1040, enough for four threads
};
const WorkspaceCase workspace_cases[] = {{1, 600, 32},   {4, 130, 520}, {5, 130, 128}, {24, 70, 32},
                                         {25, 70, 1040}, {240, 40, 32}, {300, 40, 128}};

void check_workspace_of(const Random &random, const Product &product, const char *kernel, size_t threads) {
    now(kernel, "workspace m=%zu threads=%zu", product.operands.m, threads);
    da8w4_call sizing = {};  // only what da8w4_workspace_bytes reads
    sizing.m = product.operands.m;
    sizing.weight = &product.weight.packed;
    sizing.kernel = kernel;
    sizing.threads = threads;
    const size_t bytes = da8w4_workspace_bytes(&sizing);
    const Guarded workspace(bytes, true), out(product.operands.out_bytes, true);
    da8w4_call call = product.call();
    call.kernel = kernel;
    call.threads = threads;
    call.workspace = workspace.as();
    call.workspace_bytes = bytes;
    call.out = out.as();
    expect(da8w4_workspace_bytes(&call) == bytes, "workspace_bytes reads more than m, weight, kernel and threads");
    for (size_t less : {size_t{1}, size_t{63}, size_t{64}, size_t{65}}) expect_too_small(product, call, bytes - less);
    Random sizes = random.child("sizes");
    for (size_t part = 0; part < threads; part++) {
        expect_too_small(product, call, bytes / threads * part);
        expect_too_small(product, call, sizes.below(bytes));
    }
    expect(workspace.untouched() && out.untouched(), "a call that is refused writes");
    expect(product.status(call) == DA8W4_OK, "a workspace of %zu bytes does not suffice", bytes);
    call.workspace_bytes += 1000;
    expect(product.status(call) == DA8W4_OK, "a larger workspace is refused");
}

void check_workspace(const Trial &trial) {
    const WorkspaceCase &shape = workspace_cases[trial.index];
    const Weight weight = random_weight(trial.random, {shape.n, 1040, shape.group});
    Random draws = trial.random.child("operands");
    const Operands operands = random_operands(draws, weight.matrix, shape.m, draws.one_in(2));
    const Product product(operands, weight);
    for (const std::string &kernel : kernels_and_scalar())
        for (size_t threads = 1; threads <= 4; threads++)
            check_workspace_of(trial.random.child(uint64_t{threads}), product, kernel.c_str(), threads);
}

}  // namespace

std::vector<Test> edge_tests() {
    return {
        {"long_groups", "sums at the edge of int32 and float32", std::size(long_groups), 1, true, check_long_group},
        {"low_zps", "zero points about -112, in all columns or in some", 2 * std::size(low_zps) * std::size(low_places),
         1, true, check_low_zps},
        {"workspace", "workspaces of every size", std::size(workspace_cases), 1, false, check_workspace},
    };
}

}  // namespace check
