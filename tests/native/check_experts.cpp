// Gates and experts: each kernel gives the bits of the same product in parts. That gates are what docs/numbers.md says,
// check_gates.cpp sees to.
#include <cmath>
#include <iterator>
#include <memory>

#include "activations.h"
#include "floats.h"
#include "harness.h"
#include "weight.h"

namespace check {
namespace {

// A workspace of its own for each call.
template <class Call>
void run(Call call, size_t (*bytes)(const Call *), da8w4_status (*function)(const Call *), Random random) {
    call.threads = 1 + random.below(5);
    da8w4_set_num_threads(call.threads);
    call.workspace_bytes = bytes(&call);
    const Guarded workspace(call.workspace_bytes, true);
    call.workspace = workspace.as();
    if (call.m && random.one_in(4)) {
        call.workspace_bytes--;
        expect(function(&call) == DA8W4_WORKSPACE_TOO_SMALL, "a workspace of one byte less is taken");
        call.workspace_bytes++;
    }
    FloatMode mode(random.one_in(4));
    const da8w4_status done = function(&call);
    expect(mode.restore(), "the caller's floating-point mode was changed");
    expect(done == DA8W4_OK, "%s", da8w4_status_text(done));
}

da8w4_gating random_gating(Random &random) {
    return {.activation = static_cast<da8w4_activation>(random.below(4)),
            .interleaved = static_cast<int>(random.below(2)),
            .alpha = random.uniform(0.5f, 3),
            .limit = random.uniform(0.1f, 10)};
}

// Weights of one kind, and what of them a call needs.
struct Experts {
    std::vector<Weight> weights;
    std::vector<da8w4_packed> packed;
    Guarded bias;
    bool has_bias;

    const float *bias_of(size_t expert) const {
        return has_bias ? bias.as<float>() + expert * packed[expert].n : nullptr;
    }
    const float *all_biases() const { return has_bias ? bias.as<float>() : nullptr; }
};

Experts random_experts(const Random &random, size_t count, const Shape &shape) {
    Experts experts;
    Random draws = random.child("first");
    const Matrix first = random_matrix(draws, shape);
    const auto is_like = [&](const Matrix &matrix) {
        return matrix.offsets.empty() == first.offsets.empty() && matrix.perm.empty() == first.perm.empty() &&
               matrix.factors.empty() == first.factors.empty();
    };
    for (size_t expert = 0; expert < count; expert++) {
        Random more = random.child(uint64_t{expert});
        Matrix matrix = random_matrix(more, shape, first.kind);
        while (!is_like(matrix)) matrix = random_matrix(more, shape, first.kind);
        matrix.rotation = first.rotation;
        experts.weights.push_back(packed_weight(more, std::move(matrix)));
        experts.packed.push_back(experts.weights.back().packed);
    }
    std::vector<float> biases;
    for (size_t i = 0; i < count * shape.n; i++) biases.push_back(draws.uniform(-2, 2));
    experts.has_bias = draws.one_in(2);
    experts.bias = Guarded(biases, true);
    return experts;
}

// Rows of activations or of outputs.
struct Floats {
    Guarded memory;
    da8w4_type type;
    size_t stride;

    void *row(size_t i) const { return memory.as() + i * stride; }
};

Floats random_rows(Random &random, size_t rows, size_t k) {
    Floats floats;
    floats.type = static_cast<da8w4_type>(random.below(3));
    floats.stride = (k + random.below(2) * random.below(20)) * size_of(floats.type);
    floats.memory = Guarded(random_floats(random, rows, k, floats.stride, floats.type), true);
    return floats;
}

Floats empty_rows(size_t rows, size_t n, da8w4_type type) {
    Floats floats;
    floats.type = type;
    floats.stride = n * size_of(type);
    floats.memory = Guarded(rows * floats.stride, true);
    return floats;
}

da8w4_call linear_call(const char *kernel, const Experts &experts, size_t expert, size_t rows, const Floats &act,
                       size_t first, const da8w4_gating *gating, const Floats &out, da8w4_scheme scheme) {
    da8w4_call call = {};
    call.m = rows;
    call.act = act.row(first);
    call.act_type = act.type;
    call.act_stride = act.stride;
    call.scheme = scheme;
    call.weight = &experts.packed[expert];
    call.bias = experts.bias_of(expert);
    call.gating = gating;
    call.out = out.row(first);
    call.out_type = out.type;
    call.out_stride = out.stride;
    call.kernel = kernel;
    return call;
}

void linear(const da8w4_call &call, const Random &random) { run(call, da8w4_workspace_bytes, da8w4_linear, random); }

// n, k and group: outputs of gates that fill blocks, and that do not.
const Shape shapes[] = {{64, 64, 32}, {2, 12, 4},      {128, 100, 20},   {62, 72, 72},
                        {66, 40, 8},  {200, 600, 128}, {96, 2100, 1052}, {190, 1030, 32}};

const char *columns_of(const da8w4_gating *gating) {
    return !gating ? "outputs" : gating->interleaved ? "pairs" : "halves";
}

// ---- one weight with gates

void check_gated(const Trial &trial) {
    Random random = trial.random;
    const Shape shape = shapes[trial.index];
    const Experts experts = random_experts(random, 1, shape);
    for (size_t m : {1, 2, 5, 24, 25, 70, 260}) {
        if (m == 260 && shape.k > 1000) continue;
        Random draws = random.child(uint64_t{m});
        const da8w4_gating gating = random_gating(draws);
        const da8w4_scheme scheme = static_cast<da8w4_scheme>(draws.below(4));
        const Floats act = random_rows(draws, m, shape.k);
        const da8w4_type type = static_cast<da8w4_type>(draws.below(3));
        std::vector<uint8_t> want;
        for (const std::string &kernel : kernels_and_scalar()) {
            now(kernel.c_str(), "gates m=%zu n=%zu k=%zu activation=%d %s scheme=%d", m, shape.n, shape.k,
                static_cast<int>(gating.activation), columns_of(&gating), static_cast<int>(scheme));
            const Floats out = empty_rows(m, shape.n / 2, type);
            linear(linear_call(kernel.c_str(), experts, 0, m, act, 0, &gating, out, scheme), draws);
            if (want.empty()) want = out.memory.copy();
            expect(out.memory.copy() == want, "the bits of another kernel");
            // A row by itself.
            const size_t row = draws.below(m);
            const Floats alone = empty_rows(m, shape.n / 2, type);
            da8w4_call call = linear_call(kernel.c_str(), experts, 0, 1, act, row, &gating, alone, scheme);
            linear(call, draws);
            expect(memcmp(alone.row(row), out.row(row), out.stride) == 0, "row %zu alone differs", row);
        }
    }
}

// ---- rows of several weights

void check_grouped(const Trial &trial) {
    Random random = trial.random;
    const Shape shape = shapes[trial.index];
    const size_t count = 1 + random.below(7);
    const Experts experts = random_experts(random, count, shape);
    for (size_t turn = 0; turn < 3; turn++) {
        Random draws = random.child(uint64_t{turn});
        std::vector<size_t> rows;
        size_t m = 0;
        for (size_t expert = 0; expert < count; expert++) {
            rows.push_back(draws.one_in(3) ? 0 : draws.below(draws.one_in(4) && shape.k < 1000 ? 280 : 8));
            m += rows.back();
        }
        const da8w4_gating some = random_gating(draws), *gating = draws.one_in(2) ? &some : nullptr;
        const size_t outputs = gating ? shape.n / 2 : shape.n;
        const da8w4_scheme scheme = static_cast<da8w4_scheme>(draws.below(4));
        const Floats act = random_rows(draws, m, shape.k);
        const da8w4_type type = static_cast<da8w4_type>(draws.below(3));
        for (const std::string &kernel : kernels_and_scalar()) {
            now(kernel.c_str(), "experts=%zu m=%zu n=%zu k=%zu %s scheme=%d", count, m, shape.n, shape.k,
                columns_of(gating), static_cast<int>(scheme));
            const Floats want = empty_rows(m, outputs, type), out = empty_rows(m, outputs, type);
            for (size_t expert = 0, first = 0; expert < count; first += rows[expert++])
                linear(linear_call(kernel.c_str(), experts, expert, rows[expert], act, first, gating, want, scheme),
                       draws);
            da8w4_grouped_call call = {};
            call.experts = count;
            call.weights = experts.packed.data();
            call.bias = experts.all_biases();
            call.rows_of_expert = rows.data();
            call.m = m;
            call.act = act.row(0);
            call.act_type = act.type;
            call.act_stride = act.stride;
            call.scheme = scheme;
            call.gating = gating;
            call.out = out.row(0);
            call.out_type = type;
            call.out_stride = out.stride;
            call.kernel = kernel.c_str();
            run(call, da8w4_grouped_workspace_bytes, da8w4_grouped_linear, draws);
            expect(out.memory.copy() == want.memory.copy(), "the bits of the experts by themselves");
        }
    }
}

// ---- mixtures

enum class Routing { random, one, each };

std::vector<int32_t> random_ids(Random &random, size_t m, size_t slots, size_t experts, Routing routing) {
    std::vector<int32_t> ids;
    for (size_t i = 0; i < m * slots; i++) {
        const size_t id = routing == Routing::one    ? experts - 1
                          : routing == Routing::each ? i % experts
                                                     : random.below(experts);
        ids.push_back(random.one_in(9) ? -1 : static_cast<int32_t>(id));
    }
    return ids;
}

// What da8w4_moe promises, in calls of da8w4_linear.
Floats mixed(const char *kernel, const da8w4_moe_call &call, const Experts &gate_up, const Experts &down,
             const Floats &act, const Random &random) {
    const size_t inputs = down.packed[0].k, n = down.packed[0].n;
    Floats out = empty_rows(call.m, n, call.out_type);
    for (size_t token = 0; token < call.m; token++) {
        std::vector<float> sum(n, 0.0f);
        for (size_t slot = 0; slot < call.slots; slot++) {
            const int32_t id = call.ids[token * call.slots + slot];
            if (id < 0) continue;
            const size_t expert = static_cast<size_t>(id);
            const Floats hidden = empty_rows(1, inputs, DA8W4_F32), result = empty_rows(1, n, DA8W4_F32);
            da8w4_call first = linear_call(kernel, gate_up, expert, 1, act, token, call.gating, act, call.scheme);
            first.out = hidden.row(0);
            first.out_type = DA8W4_F32;
            first.out_stride = hidden.stride;
            linear(first, random);
            linear(linear_call(kernel, down, expert, 1, hidden, 0, nullptr, result, call.scheme), random);
            const float weight = call.weights[token * call.slots + slot] * call.scaling;
            for (size_t i = 0; i < n; i++) sum[i] = std::fmaf(result.memory.as<float>()[i], weight, sum[i]);
        }
        for (size_t i = 0; i < n; i++)
            put(static_cast<char *>(out.row(token)) + i * size_of(out.type),
                std::isnan(sum[i]) ? float_of(0x7fc00000) : sum[i], out.type);
    }
    return out;
}

// Of gate_up, and the outputs and the group of down.
struct Mixture {
    Shape gate_up;
    size_t n, group;
};
const Mixture mixtures[] = {{{64, 64, 32}, 64, 32},    {{66, 40, 8}, 33, 33},     {{2, 12, 12}, 5, 1},
                            {{130, 100, 20}, 100, 65}, {{192, 300, 32}, 290, 32}, {{640, 70, 70}, 70, 320},
                            {{32, 16, 16}, 1000, 16}};  // the last one's results are added in stripes

void check_mixture(const Trial &trial) {
    const Mixture &mixture = mixtures[trial.index % std::size(mixtures)];
    const Routing routing = static_cast<Routing>(trial.index / std::size(mixtures));
    const Shape down_shape = {mixture.n, mixture.gate_up.n / 2, mixture.group};
    Random random = trial.random;
    const size_t count = 1 + random.below(9);
    const Experts gate_up = random_experts(random.child("gate_up"), count, mixture.gate_up);
    const Experts down = random_experts(random.child("down"), count, down_shape);
    for (size_t m : {1, 2, 4, 5, 31, 300}) {
        Random draws = random.child(uint64_t{m});
        const size_t slots = m < 300 ? draws.below(9) : mixture.n == 1000 ? 8 : 1 + draws.below(2);
        const da8w4_gating gating = random_gating(draws);
        const Floats act = random_rows(draws, m, mixture.gate_up.k);
        const std::vector<int32_t> ids = random_ids(draws, m, slots, count, routing);
        std::vector<float> weights;
        for (size_t i = 0; i < m * slots; i++) weights.push_back(draws.uniform(-1, 1));
        const Guarded ids_memory(ids, true), weights_memory(weights, true);
        da8w4_moe_call call = {};
        call.experts = count;
        call.gate_up = gate_up.packed.data();
        call.down = down.packed.data();
        call.gate_up_bias = gate_up.all_biases();
        call.down_bias = down.all_biases();
        call.gating = &gating;
        call.m = m;
        call.slots = slots;
        call.act = act.row(0);
        call.act_type = act.type;
        call.act_stride = act.stride;
        call.scheme = static_cast<da8w4_scheme>(draws.below(4));
        call.ids = ids_memory.as<int32_t>();
        call.weights = weights_memory.as<float>();
        call.scaling = draws.one_in(2) ? 1 : draws.uniform(0.5f, 3);
        call.out_type = static_cast<da8w4_type>(draws.below(3));
        std::vector<uint8_t> want;
        for (const std::string &kernel : kernels_and_scalar()) {
            now(kernel.c_str(), "experts=%zu m=%zu slots=%zu k=%zu i=%zu n=%zu %s activation=%d scheme=%d", count, m,
                slots, mixture.gate_up.k, down_shape.k, mixture.n, columns_of(&gating),
                static_cast<int>(gating.activation), static_cast<int>(call.scheme));
            if (want.empty()) want = mixed(kernel.c_str(), call, gate_up, down, act, draws).memory.copy();
            const Floats out = empty_rows(m, mixture.n, call.out_type);
            call.out = out.row(0);
            call.out_stride = out.stride;
            call.kernel = kernel.c_str();
            run(call, da8w4_moe_workspace_bytes, da8w4_moe, draws);
            expect(out.memory.copy() == want, "the bits of its parts");
        }
    }
}

// ---- what is refused

void check_refusals(const Trial &trial) {
    Random random = trial.random;
    const Experts gate_up = random_experts(random.child("gate_up"), 3, {8, 12, 4});
    const Experts down = random_experts(random.child("down"), 3, {5, 4, 4});
    const da8w4_gating gating = {.activation = DA8W4_SILU, .interleaved = 0, .alpha = 0, .limit = 0};
    const float x[2 * 12] = {}, weights[2 * 2] = {};
    alignas(64) static uint8_t workspace[1 << 20];

    const auto moe = [&](auto damage, da8w4_status want, const char *what) {
        int32_t ids[4] = {0, 2, -1, 1};
        float out[2 * 5] = {7, 7, 7, 7, 7, 7, 7, 7, 7, 7};
        std::vector<da8w4_packed> first = gate_up.packed, second = down.packed;
        da8w4_gating gates = gating;
        da8w4_moe_call call = {};
        call.experts = 3;
        call.gate_up = first.data();
        call.down = second.data();
        call.gating = &gates;
        call.m = 2;
        call.slots = 2;
        call.act = x;
        call.act_stride = sizeof x / 2;
        call.ids = ids;
        call.weights = weights;
        call.scaling = 1;
        call.out = out;
        call.out_stride = sizeof out / 2;
        call.workspace = workspace;
        call.workspace_bytes = sizeof workspace;
        damage(call, first, second, gates, ids);
        now(nullptr, "moe with %s", what);
        const da8w4_status status = da8w4_moe(&call);
        expect(status == want, "%s", da8w4_status_text(status));
        if (want != DA8W4_OK)
            for (float value : out) expect(value == 7, "out was written");
    };
    using Weights = std::vector<da8w4_packed>;
#define DAMAGE                                                                                                    \
    [&]([[maybe_unused]] da8w4_moe_call &call, [[maybe_unused]] Weights &first, [[maybe_unused]] Weights &second, \
        [[maybe_unused]] da8w4_gating &gates, [[maybe_unused]] int32_t *ids)
    moe(DAMAGE{}, DA8W4_OK, "nothing");
    moe(DAMAGE { ids[1] = 3; }, DA8W4_BAD_EXPERT, "an id too high");
    moe(DAMAGE { ids[2] = -2; }, DA8W4_BAD_EXPERT, "an id too low");
    moe(DAMAGE { call.experts = 0; }, DA8W4_BAD_ARGUMENT, "no experts");
    moe(DAMAGE { call.gating = nullptr; }, DA8W4_BAD_ARGUMENT, "no gates");
    moe(DAMAGE { gates.activation = static_cast<da8w4_activation>(4); }, DA8W4_BAD_ARGUMENT, "an unknown activation");
    moe(DAMAGE { call.ids = nullptr; }, DA8W4_BAD_ARGUMENT, "no ids");
    moe(DAMAGE { call.weights = nullptr; }, DA8W4_BAD_ARGUMENT, "no weights");
    moe(DAMAGE { call.slots = 0, call.ids = nullptr; }, DA8W4_OK, "no slots");
    for (const size_t slots : {size_t{1} << 23, size_t{1} << 62, SIZE_MAX / 5, SIZE_MAX})
        moe(
            DAMAGE {
                call.slots = slots;
                expect(da8w4_moe_workspace_bytes(&call) == 0, "a workspace for more slots than can be counted");
            },
            DA8W4_BAD_ARGUMENT, "too many slots");
    moe(DAMAGE { call.m = 0, call.ids = nullptr; }, DA8W4_OK, "no tokens");
    moe(DAMAGE { call.act = nullptr; }, DA8W4_BAD_ARGUMENT, "no activations");
    moe(DAMAGE { call.out = nullptr; }, DA8W4_BAD_ARGUMENT, "no out");
    moe(DAMAGE { call.act_stride--; }, DA8W4_BAD_ARGUMENT, "rows too short");
    moe(DAMAGE { call.out_stride--; }, DA8W4_BAD_ARGUMENT, "outputs too short");
    moe(DAMAGE { call.workspace = workspace + 1; }, DA8W4_BAD_ARGUMENT, "a workspace that is not aligned");
    moe(DAMAGE { call.act_type = DA8W4_U8; }, DA8W4_BAD_ARGUMENT, "bytes");
    moe(DAMAGE { call.out_type = DA8W4_S8; }, DA8W4_BAD_ARGUMENT, "bytes as out");
    moe(DAMAGE { call.scheme = static_cast<da8w4_scheme>(4); }, DA8W4_BAD_ARGUMENT, "an unknown scheme");
    moe(DAMAGE { call.kernel = "mmx"; }, DA8W4_UNKNOWN_KERNEL, "an unknown kernel");
    moe(DAMAGE { first[0].n = 6; }, DA8W4_BAD_ARGUMENT, "gates that down does not take");
    moe(DAMAGE { first[2].n = 4; }, DA8W4_BAD_ARGUMENT, "an expert of another size");
    moe(DAMAGE { second[2].codes = nullptr; }, DA8W4_BAD_ARGUMENT, "an expert without codes");
    moe(DAMAGE { second[1].sums = nullptr, ids[3] = 2; }, DA8W4_OK, "an expert without sums that nobody chose");
#undef DAMAGE

    const auto grouped = [&](std::vector<size_t> rows, size_t count, const da8w4_gating *gates, da8w4_status want,
                             const char *what) {
        float out[2 * 8] = {7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7};
        da8w4_grouped_call call = {};
        call.experts = count;
        call.weights = count == 2 ? down.packed.data() : gate_up.packed.data();
        call.rows_of_expert = rows.empty() ? nullptr : rows.data();
        call.m = 2;
        call.act = x;
        call.act_stride = sizeof x / 2;
        call.gating = gates;
        call.out = out;
        call.out_stride = sizeof out / 2;
        call.workspace = workspace;
        call.workspace_bytes = sizeof workspace;
        now(nullptr, "grouped with %s", what);
        const da8w4_status status = da8w4_grouped_linear(&call);
        expect(status == want, "%s", da8w4_status_text(status));
        if (want != DA8W4_OK)
            for (float value : out) expect(value == 7, "out was written");
    };
    grouped({1, 0, 1}, 3, nullptr, DA8W4_OK, "nothing");
    grouped({}, 3, nullptr, DA8W4_BAD_ARGUMENT, "no rows of experts");
    grouped({1, 0, 0}, 3, nullptr, DA8W4_BAD_EXPERT, "too few rows");
    grouped({1, 2, 0}, 3, nullptr, DA8W4_BAD_EXPERT, "too many rows");
    grouped({SIZE_MAX, 1, 2}, 3, nullptr, DA8W4_BAD_EXPERT, "rows that add up beyond the last number");
    grouped({1}, 0, nullptr, DA8W4_BAD_ARGUMENT, "no experts");
    grouped({1, 1}, 2, &gating, DA8W4_BAD_ARGUMENT, "gates of an odd number of columns");
}

}  // namespace

std::vector<Test> expert_tests() {
    return {
        {"gated", "da8w4_linear with gates", std::size(shapes), 2, true, check_gated},
        {"grouped", "da8w4_grouped_linear, and its experts by themselves", std::size(shapes), 2, true, check_grouped},
        {"moe", "da8w4_moe, and its parts", std::size(mixtures) * 3, 5, true, check_mixture},
        {"expert_refusals", "what calls with gates and experts refuse", 1, 1, false, check_refusals},
    };
}

}  // namespace check
