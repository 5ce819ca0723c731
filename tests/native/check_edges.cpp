// Products at the edge of what numbers hold: the longest groups, the lowest zero points, the smallest workspace.
#include <algorithm>
#include <cstring>
#include <iterator>

#include "harness.h"
#include "product.h"

namespace check {
namespace {

// The longest groups that are allowed: k * 128 * |value - zp| just below 2^31. One code is all of the weight's.
struct LongGroup {
    da8w4_kind kind;
    size_t k;
    int code, zp;  // of a table the code is the value
};
const LongGroup long_groups[] = {
    {DA8W4_INT4, 117323, 15, -128}, {DA8W4_INT4, 132104, 0, 127},    {DA8W4_INT5, 105517, 31, -128},
    {DA8W4_INT6, 87838, 63, -128},  {DA8W4_INT8, 65793, 127, -128},  {DA8W4_INT8, 65793, -128, 127},
    {DA8W4_INT8, 131071, -128, 0},  {DA8W4_TABLE4, 131071, -128, 0}, {DA8W4_INT4, 1118481, 15, 0},
};

Matrix long_group(const LongGroup &edge) {
    Matrix w = {};
    w.n = 3;
    w.k = w.group = edge.k;
    w.groups = w.rows = 1;
    w.kind = edge.kind;
    w.format = edge.kind == DA8W4_INT8 ? DA8W4_CODES_SIGNED : DA8W4_CODES_UNSIGNED;
    if (w.has_table()) w.table.assign(16, edge.code);
    w.codes.assign(w.n * w.k, w.has_table() ? 9 : edge.code);
    w.zps.assign(w.n, edge.zp);
    w.scales = {1, -0.5f, 0.375f};
    w.offsets = {0.3f, -1, 1000};
    w.one_zp = true;
    return w;
}

// All activations are the least, but one.
Operands long_bytes(Random &random, const Matrix &w, size_t m) {
    Operands o = random_operands(random, w, m, false);
    o.scheme = m == 3 ? DA8W4_ACT_INT8 : DA8W4_ACT_UINT8;
    o.act_type = m == 3 ? DA8W4_S8 : DA8W4_U8;
    o.act_stride = w.k;
    o.act.assign(m * w.k, m == 3 ? 0x80 : 0);
    o.act[0] = 1;
    o.scales.clear();
    o.zps.assign(m, m == 3 ? 127 : 0);
    return o;
}

// Of 16 bits, whose scale is 1: the upper bytes are all 127 and the lower ones all 0 or, but for one, -128.
Operands long_floats(Random &random, const Matrix &w, size_t m, da8w4_scheme scheme) {
    Operands o = random_operands(random, w, m, true);
    o.scheme = scheme;
    o.act_type = DA8W4_F32;
    o.act_stride = w.k * sizeof(float);
    std::vector<float> x(m * w.k, m == 1 ? -32384 : 32512);
    x[0] = 32512;
    o.act.resize(x.size() * sizeof(float));
    memcpy(o.act.data(), x.data(), o.act.size());
    return o;
}

void check_long_group(const Trial &trial) {
    const LongGroup &edge = long_groups[trial.index];
    if (trial.quick && edge.k > 200000) return;
    const Matrix w = long_group(edge);
    const Weight weight = packed_weight(trial.random, w);
    for (size_t m : {1, 3, 9}) {
        if (m > 1 && edge.k > 200000) continue;
        Random random = trial.random.child(uint64_t{m});
        check_product(random, weight, long_bytes(random, w, m));
    }
    for (da8w4_scheme scheme : {DA8W4_ACT_INT8_GROUP, DA8W4_ACT_INT16})
        for (size_t m : {1, 2}) {
            Random random = trial.random.child("floats").child(uint64_t{m + 9 * static_cast<size_t>(scheme)});
            check_product(random, weight, long_floats(random, w, m, scheme));
        }
}

// Kernels that unpack to bytes hold code - zp + 128 in them, which the highest code leaves below such a zero point.
struct LowZps {
    da8w4_kind kind;
    int zps[5];  // about the lowest that fits
};
const LowZps low_zps[] = {
    {DA8W4_INT4, {-111, -112, -113, -114, -128}},
    {DA8W4_INT5, {-95, -96, -97, -100, -128}},
    {DA8W4_INT6, {-63, -64, -65, -70, -128}},
    {DA8W4_INT8, {1, -1, 127, -127, -128}},
};
constexpr size_t kLowZps = std::size(low_zps) * std::size(low_zps[0].zps);
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
    const LowZps &kind = low_zps[trial.index % std::size(low_zps)];
    const int lowest = kind.zps[trial.index / std::size(low_zps) % std::size(kind.zps)];
    const auto is_low = low_places[trial.index / kLowZps];
    Random random = trial.random;
    const Shape &shape = low_shapes[random.one_in(2) ? 1 + random.below(3) : 0];
    Matrix w;
    do w = random_matrix(random, shape, kind.kind);
    while (code_offset(w) != 0);
    w.one_zp = false;
    const int least = lowest_code(w), most = highest_code(w);
    for (size_t n = 0; n < w.n; n++)
        for (size_t g = 0; g < w.groups; g++) {
            const bool low = is_low(w, n, g);
            w.zps[n * w.groups + g] = low ? lowest : kind.kind == DA8W4_INT8 ? 0 : random.between(least, most);
            const size_t begin = g * w.group, length = std::min(w.group, w.k - begin);
            if (low) w.codes[n * w.k + begin + random.below(length)] = lowest > 0 ? least : most;
        }
    const Weight weight = packed_weight(random, w);
    const size_t some[] = {3, 25, 60}, skipped = trial.quick ? random.below(3) : 3;
    for (size_t i = 0; i < 3; i++)
        if (i != skipped) check_either_product(trial.random.child(uint64_t{some[i]}), weight, some[i]);
}

// Codes and activations at the ends of their ranges, where sums of 16 bits overflow first: all the same, or the two
// ends by turns of one, two or four.
constexpr size_t kExtremePatterns = 5;
bool is_high(size_t pattern, size_t k) {
    switch (pattern) {
        case 0: return false;
        case 1: return true;
        default: return k >> (pattern - 2) & 1;
    }
}

void check_extremes(const Trial &trial) {
    const da8w4_kind kind = all_kinds[trial.index % std::size(all_kinds)];
    const size_t groups[] = {8, 16, 32, 48, 64, 128, 256, 300, 512};
    Random random = trial.random;
    Matrix w = random_matrix(random, {40, 1040, groups[trial.index / std::size(all_kinds) % std::size(groups)]}, kind);
    const size_t pattern = random.below(kExtremePatterns), zps = random.below(4);
    if (w.has_table()) w.table.assign({-128, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 127});
    const int least = lowest_code(w), most = highest_code(w), highest = INT8_MAX - code_offset(w);
    for (size_t i = 0; i < w.codes.size(); i++) w.codes[i] = is_high(pattern, i % w.k) ? most : least;
    if (!w.has_table())
        for (int &zp : w.zps)
            zp = zps == 0 ? INT8_MIN : zps == 1 ? highest : zps == 2 ? least + (1 << (bits_of(kind) - 1)) : zp;
    const Weight weight = packed_weight(random, w);
    for (size_t m : {1, 2, 3, 5, 30}) {
        Random draws = trial.random.child(uint64_t{m});
        Operands o = random_operands(draws, w, m, false);
        for (size_t r = 0; r < m; r++) {
            const size_t mine = r % kExtremePatterns == 0 ? pattern : draws.below(kExtremePatterns);
            for (size_t k = 0; k < w.k; k++) {
                const size_t from = w.perm.empty() ? k : static_cast<size_t>(w.perm[k]);
                o.act[r * o.act_stride + from] =
                    static_cast<uint8_t>((is_high(mine, k) ? 255 : 0) ^ (o.act_type == DA8W4_S8 ? 0x80 : 0));
            }
        }
        check_product(draws, weight, o);
    }
}

// Every workspace that is smaller than da8w4_workspace_bytes is refused, though it has room for some of the threads;
// one of that size suffices, and its guard page shows that no more is written.
struct WorkspaceCase {
    size_t m, n, group;  // of k = 1040, enough for four threads
};
const WorkspaceCase workspace_cases[] = {{1, 600, 32},   {4, 130, 520}, {5, 130, 128}, {24, 70, 32},
                                         {25, 70, 1040}, {240, 40, 32}, {300, 40, 128}};

void check_workspace_of(const Random &random, const Product &product, const char *kernel, size_t threads) {
    now(kernel, "workspace m=%zu scheme=%d threads=%zu", product.operands.m, product.operands.scheme, threads);
    da8w4_call sizing = {};  // only what da8w4_workspace_bytes reads
    sizing.m = product.operands.m;
    sizing.act_type = product.operands.act_type;
    sizing.scheme = product.operands.scheme;
    sizing.weight = product.call().weight;
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
    expect(da8w4_workspace_bytes(&call) == bytes, "workspace_bytes reads more than it says");
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
    for (bool linear : {false, true})
        for (size_t threads = 1; threads <= 4; threads++) {
            Random random = trial.random.child(linear ? "linear" : "gemm").child(uint64_t{threads});
            Operands operands = random_operands(random, weight.matrix, shape.m, linear);
            if (linear) operands.scheme = static_cast<da8w4_scheme>((threads + trial.index) % 4);
            const Product product(operands, weight);
            for (const std::string &kernel : kernels_and_scalar())
                check_workspace_of(random, product, kernel.c_str(), threads);
        }
}

}  // namespace

std::vector<Test> edge_tests() {
    return {
        {"long_groups", "sums at the edge of int32 and float32", std::size(long_groups), 1, true, check_long_group},
        {"low_zps", "zero points about the lowest of biased panels, in all columns or in some",
         kLowZps * std::size(low_places), 2, true, check_low_zps},
        {"extremes", "codes and activations at the ends of their ranges", 90, 2, true, check_extremes},
        {"workspace", "workspaces of every size", std::size(workspace_cases), 1, false, check_workspace},
    };
}

}  // namespace check
