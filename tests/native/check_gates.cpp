// Gates: the activation of "scalar" against float64, and everything else against that activation, by equality. Rows of
// zeros make the results of the product its biases, which can be any floats.
#include <algorithm>
#include <cmath>
#include <iterator>

#include "floats.h"
#include "harness.h"
#include "weight.h"

namespace check {
namespace {

const char *const names[] = {"silu", "gelu", "gelu_tanh", "swigluoai"};
const size_t all_outputs[] = {1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 200, 1000};

struct Gates {
    da8w4_gating gating;
    std::vector<float> gates, ups;
    const Weight &weight;  // of twice as many columns
};

// The bits of floats of any size, or floats where activations are no straight lines.
float any_gate(Random &random) {
    const float special[] = {0, INFINITY, -INFINITY, NAN, 1e-45f, -1e-45f, 3.4e38f, -3.4e38f};
    if (random.one_in(8)) return special[random.below(std::size(special))];
    if (random.one_in(4)) return float_of(static_cast<uint32_t>(random.bits()));
    const float most = random.one_in(2) ? 110.0f : random.one_in(2) ? 15.0f : 2.0f;
    return random.uniform(-most, most);
}

double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

// Of a gate that is no NaN.
double exact_activation(const da8w4_gating &gating, float gate) {
    const double x = gating.activation == DA8W4_SWIGLUOAI ? std::min(gate, gating.limit) : gate;
    if (std::isinf(x)) return x < 0 ? 0 : x;
    switch (gating.activation) {
        case DA8W4_SILU: return x * sigmoid(x);
        case DA8W4_GELU: return x * 0.5 * std::erfc(-x * std::sqrt(0.5));
        case DA8W4_GELU_TANH: return x * sigmoid(std::sqrt(8 / std::acos(-1.0)) * (x + 0.044715 * x * x * x));
        default: return x * sigmoid(static_cast<double>(gating.alpha) * x);
    }
}

// In units of the last place of the exact value.
double error_of(float value, double exact) {
    const int exponent = exact == 0 ? -126 : std::max(std::ilogb(exact), -126);
    return std::fabs(static_cast<double>(value) - exact) / std::ldexp(1.0, exponent - 23);
}

std::vector<float> run(Random random, const char *kernel, const Gates &in, size_t m, da8w4_type type) {
    const size_t n = in.gates.size(), stride = (n + random.below(2) * random.below(20)) * size_of(type);
    da8w4_gating gating = in.gating;
    gating.interleaved = random.one_in(2);
    std::vector<float> both(2 * n);
    for (size_t i = 0; i < n; i++) {
        both[gating.interleaved ? 2 * i : i] = in.gates[i];
        both[gating.interleaved ? 2 * i + 1 : n + i] = in.ups[i];
    }
    const bool at_end = !random.one_in(4);
    const Guarded bias(both, at_end), zeros(std::vector<float>(m * in.weight.packed.k), at_end);
    const Guarded out((m - 1) * stride + n * size_of(type), at_end);
    now(kernel, "%s of %zu outputs, m=%zu %s %s alpha=%a limit=%a", names[gating.activation], n, m, name_of(type),
        gating.interleaved ? "interleaved" : "apart", static_cast<double>(gating.alpha),
        static_cast<double>(gating.limit));
    da8w4_call call = {};
    call.m = m;
    call.act = zeros.as();
    call.act_type = DA8W4_F32;
    call.act_stride = in.weight.packed.k * sizeof(float);
    call.scheme = DA8W4_ACT_INT8;  // zeros are zeros, without a zero point
    call.weight = &in.weight.packed;
    call.bias = bias.as<float>();
    call.gating = &gating;
    call.out = out.as();
    call.out_type = type;
    call.out_stride = stride;
    call.kernel = kernel;
    call.threads = 1 + random.below(3);
    call.workspace_bytes = da8w4_workspace_bytes(&call);
    const Guarded workspace(call.workspace_bytes, true);
    call.workspace = workspace.as();
    FloatMode mode(random.one_in(4));
    const da8w4_status status = da8w4_linear(&call);
    expect(mode.restore(), "the caller's floating-point mode was changed");
    expect(status == DA8W4_OK, "%s", da8w4_status_text(status));
    std::vector<float> outputs;
    for (size_t row = 0; row < m; row++)
        for (size_t i = 0; i < n; i++) outputs.push_back(get(out.as() + row * stride + i * size_of(type), type));
    return outputs;
}

void check_accuracy(const Gates &in, const std::vector<float> &activation) {
    size_t wrong = 0;
    const auto is_wrong = [&](size_t i) {
        if (std::isnan(in.gates[i])) return !same_bits(activation[i], float_of(0x7fc00000));
        const double exact = exact_activation(in.gating, in.gates[i]);
        return std::isinf(exact) ? activation[i] != exact : !(error_of(activation[i], exact) < 2);
    };
    while (wrong < in.gates.size() && !is_wrong(wrong)) wrong++;
    expect(wrong == in.gates.size(), "the activation of %a is 2 units in the last place off",
           static_cast<double>(in.gates[wrong % in.gates.size()]));
}

// What an activation and an up give; NaN is one NaN.
float gated(const da8w4_gating &gating, float activation, float up) {
    if (gating.activation == DA8W4_SWIGLUOAI && !std::isnan(up)) up = std::clamp(up, -gating.limit, gating.limit) + 1;
    const float y = activation * up;
    return std::isnan(y) ? float_of(0x7fc00000) : y;
}

void check_outputs(const Random &random, const Gates &in, const std::vector<float> &activation) {
    for (const std::string &kernel : kernels_and_scalar()) {
        Random draws = random.child(kernel.c_str());
        const da8w4_type type = static_cast<da8w4_type>(draws.below(3));
        const size_t m = 1 + draws.below(4), n = in.gates.size();
        const std::vector<float> got = run(draws.child("call"), kernel.c_str(), in, m, type);
        for (size_t i = 0; i < got.size(); i++) {
            const float want = as_type(gated(in.gating, activation[i % n], in.ups[i % n]), type);
            if (same_bits(got[i], want)) continue;
            expect(false, "output %zu of row %zu is %a, not %a", i % n, i / n, static_cast<double>(got[i]),
                   static_cast<double>(want));
            break;
        }
    }
}

// Each number of outputs with each activation.
void check_gates(const Trial &trial) {
    Random random = trial.random;
    const size_t n = all_outputs[trial.index / std::size(names)];
    const Weight weight = random_weight(random.child("weight"), {2 * n, 4, 4});
    for (size_t i = 0; i < (trial.quick ? 2 : 20); i++) {
        Gates in = {{}, {}, {}, weight};
        in.gating.activation = static_cast<da8w4_activation>(trial.index % std::size(names));
        in.gating.alpha = random.one_in(2) ? 1.702f : random.uniform(0.01f, 4);
        in.gating.limit = random.one_in(2) ? 7.0f : random.one_in(2) ? INFINITY : random.uniform(0.1f, 120);
        in.ups.assign(n, in.gating.activation == DA8W4_SWIGLUOAI ? 0 : 1);
        for (size_t j = 0; j < n; j++) in.gates.push_back(any_gate(random) + 0.0f);  // the product has no -0
        const std::vector<float> activation = run(random.child(uint64_t{i}), "scalar", in, 1, DA8W4_F32);
        if (scalar_wanted()) check_accuracy(in, activation);
        for (float &up : in.ups) up = any_gate(random) + 0.0f;
        check_outputs(random.child(uint64_t{i}), in, activation);
    }
}

}  // namespace

std::vector<Test> gate_tests() {
    return {{"gates", "activations of any floats, to the bit and against float64",
             std::size(all_outputs) * std::size(names), 3, false, check_gates}};
}

}  // namespace check
