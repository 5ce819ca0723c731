// What da8w4_gemm, da8w4_linear, da8w4_workspace_bytes and da8w4_quantize_rows refuse, and the tables of kernels,
// features and statuses.
#include <cstdlib>
#include <iterator>
#include <string>

#include "example.h"
#include "guarded.h"
#include "harness.h"

namespace check {
namespace {

constexpr da8w4_status bad = DA8W4_BAD_ARGUMENT;

struct CallTest {
    const char *what;
    da8w4_status want;
    void (*damage)(Example &);
};

const CallTest calls[] = {
    {"nothing", DA8W4_OK, [](Example &) {}},
    {"no weight", bad, [](Example &e) { e.call.weight = nullptr; }},
    {"weight n 0", bad, [](Example &e) { e.packed.n = 0; }},
    {"weight k 0", bad, [](Example &e) { e.packed.k = 0; }},
    {"weight group 0", bad, [](Example &e) { e.packed.group = 0; }},
    {"weight group 6", bad, [](Example &e) { e.packed.group = 6; }},
    {"weight group beyond k", bad, [](Example &e) { e.packed.group = 12; }},
    {"weight scales u8", bad, [](Example &e) { e.packed.scale_type = DA8W4_U8; }},
    {"weight scales of no type", bad, [](Example &e) { e.packed.scale_type = static_cast<da8w4_type>(9); }},
    {"no codes", bad, [](Example &e) { e.packed.codes = nullptr; }},
    {"no scales", bad, [](Example &e) { e.packed.scales = nullptr; }},
    {"no offsets", DA8W4_OK, [](Example &e) { e.packed.offsets = nullptr; }},
    {"weight of no kind", bad, [](Example &e) { e.packed.kind = static_cast<da8w4_kind>(5); }},
    {"5 bits", DA8W4_OK, [](Example &e) { e.set_kind(DA8W4_INT5); }},
    {"6 bits", DA8W4_OK, [](Example &e) { e.set_kind(DA8W4_INT6); }},
    {"8 bits", DA8W4_OK, [](Example &e) { e.set_kind(DA8W4_INT8); }},
    {"a table", DA8W4_OK, [](Example &e) { e.use_table(); }},
    {"no table", bad, [](Example &e) { e.use_table(), e.packed.table = nullptr; }},
    {"a table of 4 bits", bad, [](Example &e) { e.packed.table = e.table; }},
    {"two levels", DA8W4_OK, [](Example &e) { e.use_two_levels(); }},
    {"two levels without sub-scales", bad, [](Example &e) { e.use_two_levels(), e.packed.sub_scales = nullptr; }},
    {"two levels without sub-offsets", bad, [](Example &e) { e.use_two_levels(), e.packed.sub_offsets = nullptr; }},
    {"two levels without offsets", DA8W4_OK,
     [](Example &e) { e.use_two_levels(), e.packed.offsets = nullptr, e.packed.sub_offsets = nullptr; }},
    {"sub-scales f32", bad, [](Example &e) { e.use_two_levels(), e.packed.sub_scale_type = DA8W4_F32; }},
    {"sub-offsets bf16", bad, [](Example &e) { e.use_two_levels(), e.packed.sub_offset_type = DA8W4_BF16; }},
    {"sub-offsets of no type", bad,
     [](Example &e) { e.use_two_levels(), e.packed.sub_offset_type = static_cast<da8w4_type>(9); }},
    {"a permutation", DA8W4_OK, [](Example &e) { e.packed.perm = e.perm; }},
    {"a rotation of 1", bad, [](Example &e) { e.packed.rotation = 1; }},
    {"a rotation of 12", bad, [](Example &e) { e.packed.rotation = 12; }},
    {"a rotation of 2048", bad, [](Example &e) { e.packed.rotation = 2048; }},
    {"an unknown scheme", bad, [](Example &e) { e.call.scheme = static_cast<da8w4_scheme>(4); }},
    {"no scheme", bad, [](Example &e) { e.call.scheme = static_cast<da8w4_scheme>(-1); }},
    {"no sums", bad, [](Example &e) { e.packed.sums = nullptr; }},
    {"out u8", bad, [](Example &e) { e.call.out_type = DA8W4_U8; }},
    {"out of no type", bad, [](Example &e) { e.call.out_type = static_cast<da8w4_type>(9); }},
    {"act of no type", bad, [](Example &e) { e.call.act_type = static_cast<da8w4_type>(9); }},
    {"act of the other function", bad,
     [](Example &e) { e.call.act_type = e.call.act_type == DA8W4_F32 ? DA8W4_U8 : DA8W4_F32; }},
    {"no act", bad, [](Example &e) { e.call.act = nullptr; }},
    {"no out", bad, [](Example &e) { e.call.out = nullptr; }},
    {"no workspace", bad, [](Example &e) { e.call.workspace = nullptr; }},
    {"workspace misaligned", bad, [](Example &e) { e.call.workspace = e.workspace + 32; }},
    {"act stride short", bad, [](Example &e) { e.call.act_stride--; }},
    {"out stride short", bad, [](Example &e) { e.call.out_stride--; }},
    {"workspace 0", DA8W4_WORKSPACE_TOO_SMALL, [](Example &e) { e.call.workspace_bytes = 0; }},
    {"unknown kernel", DA8W4_UNKNOWN_KERNEL, [](Example &e) { e.call.kernel = "abacus"; }},
    {"kernel of no name", DA8W4_UNKNOWN_KERNEL, [](Example &e) { e.call.kernel = ""; }},
    {"one row, strides 0", DA8W4_OK, [](Example &e) { e.call.m = 1, e.call.act_stride = e.call.out_stride = 0; }},
    {"no rows, no pointers", DA8W4_OK,
     [](Example &e) { e.call.m = 0, e.call.act = e.call.out = e.call.workspace = nullptr; }},
};

// Only da8w4_gemm has zero points, and neither factors nor a rotation.
const CallTest gemms[] = {
    {"u8 zero point -1", DA8W4_BAD_ACT_ZP, [](Example &e) { e.act_zps[1] = -1; }},
    {"u8 zero point 256", DA8W4_BAD_ACT_ZP, [](Example &e) { e.act_zps[1] = 256; }},
    {"u8 zero point 255", DA8W4_OK, [](Example &e) { e.act_zps[1] = 255; }},
    {"s8 zero point -129", DA8W4_BAD_ACT_ZP, [](Example &e) { e.call.act_type = DA8W4_S8, e.act_zps[0] = -129; }},
    {"s8 zero point 128", DA8W4_BAD_ACT_ZP, [](Example &e) { e.call.act_type = DA8W4_S8, e.act_zps[0] = 128; }},
    {"s8 zero point -128", DA8W4_OK, [](Example &e) { e.call.act_type = DA8W4_S8, e.act_zps[0] = -128; }},
    {"factors", DA8W4_TRANSFORM_NEEDS_FLOATS, [](Example &e) { e.packed.factors = e.factors; }},
    {"factors and a permutation", DA8W4_TRANSFORM_NEEDS_FLOATS,
     [](Example &e) { e.packed.factors = e.factors, e.packed.perm = e.perm; }},
    {"a rotation", DA8W4_TRANSFORM_NEEDS_FLOATS, [](Example &e) { e.packed.rotation = 2; }},
};

const CallTest linears[] = {
    {"int8", DA8W4_OK, [](Example &e) { e.call.scheme = DA8W4_ACT_INT8; }},
    {"int8_group", DA8W4_OK, [](Example &e) { e.call.scheme = DA8W4_ACT_INT8_GROUP; }},
    {"int16", DA8W4_OK, [](Example &e) { e.call.scheme = DA8W4_ACT_INT16; }},
    {"factors", DA8W4_OK, [](Example &e) { e.packed.factors = e.factors; }},
    {"a rotation", DA8W4_OK, [](Example &e) { e.packed.rotation = 1024; }},
};

void check_call(const CallTest &test, bool linear) {
    now(nullptr, "%s with %s", linear ? "linear" : "gemm", test.what);
    Example example(linear);
    test.damage(example);
    const da8w4_status status = linear ? da8w4_linear(&example.call) : da8w4_gemm(&example.call);
    const bool written = test.want == DA8W4_OK && example.call.m > 0;
    expect(status == test.want && example.untouched() == !written, "status: %s", da8w4_status_text(status));
}

void check_calls(const Trial &trial) {
    size_t index = trial.index;
    if (index < std::size(linears)) return check_call(linears[index], true);
    index -= std::size(linears);
    if (index < std::size(gemms)) return check_call(gemms[index], false);
    for (bool linear : {false, true}) check_call(calls[index - std::size(gemms)], linear);
}

// One zero point that is out of range is found in every row, and nothing is written.
void check_zps_of_rows(const Trial &) {
    constexpr size_t kRows = 730;  // several row blocks
    const Example example(false);
    const std::vector<uint8_t> act(kRows * Example::kK);
    std::vector<int32_t> zps(kRows);
    da8w4_call call = example.call;
    call.m = kRows;
    call.act = act.data();
    call.act_scales = nullptr;
    call.act_zps = zps.data();
    const Guarded workspace(da8w4_workspace_bytes(&call), true), out(kRows * call.out_stride, true);
    call.workspace = workspace.as();
    call.workspace_bytes = workspace.bytes();
    call.out = out.as();
    for (size_t row = 0; row < kRows; row++) {
        zps[row] = row % 2 ? 256 : -1;
        const da8w4_status status = da8w4_gemm(&call);
        expect(status == DA8W4_BAD_ACT_ZP, "zero point %d of row %zu: %s", zps[row], row, da8w4_status_text(status));
        zps[row] = 255;
    }
    expect(out.untouched(), "a call that is refused writes to out");
    expect(da8w4_gemm(&call) == DA8W4_OK, "zero points 255 are refused");
}

void check_sizes(const Trial &) {
    const struct {
        const char *what;
        void (*damage)(Example &);
    } tests[] = {
        {"no weight", [](Example &e) { e.call.weight = nullptr; }},
        {"a bad weight", [](Example &e) { e.packed.k = 0; }},
        {"an unknown kernel", [](Example &e) { e.call.kernel = "abacus"; }},
        {"an unknown scheme", [](Example &e) { e.call.scheme = static_cast<da8w4_scheme>(4); }},
        {"a weight without sums", [](Example &e) { e.packed.sums = nullptr; }},
    };
    for (const auto &test : tests) {
        now(nullptr, "workspace_bytes with %s", test.what);
        Example example(true);
        expect(da8w4_workspace_bytes(&example.call) > 0, "0 for a valid call");
        test.damage(example);
        expect(da8w4_workspace_bytes(&example.call) == 0, "not 0");
    }
    expect(da8w4_workspace_bytes(nullptr) == 0, "not 0 for a null call");
    expect(da8w4_gemm(nullptr) == bad && da8w4_linear(nullptr) == bad, "a null call is taken");
}

void check_rows(const Trial &) {
    const float x[6] = {};
    uint8_t act[6];
    float scales[2];
    int32_t zps[2];
    const auto by_scheme = [&](da8w4_scheme scheme) {
        return da8w4_quantize_rows(nullptr, x, DA8W4_F32, 12, 2, 3, scheme, act, 3, scales, zps);
    };
    expect(by_scheme(DA8W4_ACT_INT8) == DA8W4_OK, "int8");
    expect(by_scheme(DA8W4_ACT_INT8_GROUP) == bad, "int8_group, of which it knows no groups");
    expect(by_scheme(DA8W4_ACT_INT16) == bad, "int16");
    expect(by_scheme(static_cast<da8w4_scheme>(4)) == bad, "an unknown scheme");
    const auto rows = [&](const void *from, da8w4_type type, size_t stride, size_t m, size_t k, void *to,
                          size_t to_stride, float *s, int32_t *z) {
        return da8w4_quantize_rows(nullptr, from, type, stride, m, k, DA8W4_ACT_UINT8, to, to_stride, s, z);
    };
    expect(rows(x, DA8W4_F32, 12, 2, 3, act, 3, scales, zps) == DA8W4_OK, "refused");
    expect(rows(x, DA8W4_F32, 0, 1, 3, act, 0, scales, zps) == DA8W4_OK, "one row, strides 0");
    expect(rows(nullptr, DA8W4_F32, 0, 0, 3, nullptr, 0, nullptr, nullptr) == DA8W4_OK, "no rows");
    expect(rows(nullptr, DA8W4_F32, 12, 2, 3, act, 3, scales, zps) == bad, "no x");
    expect(rows(x, DA8W4_F32, 12, 2, 3, nullptr, 3, scales, zps) == bad, "no act");
    expect(rows(x, DA8W4_F32, 12, 2, 3, act, 3, nullptr, zps) == bad, "no scales");
    expect(rows(x, DA8W4_F32, 12, 2, 3, act, 3, scales, nullptr) == bad, "no zero points");
    expect(rows(x, DA8W4_F32, 11, 2, 3, act, 3, scales, zps) == bad, "a short stride of x");
    expect(rows(x, DA8W4_F32, 12, 2, 3, act, 2, scales, zps) == bad, "a short stride of act");
    expect(rows(x, DA8W4_S8, 12, 2, 3, act, 3, scales, zps) == bad, "x of int8");
    expect(rows(x, DA8W4_F32, 12, 2, 0, act, 3, scales, zps) == bad, "k 0");
    expect(da8w4_quantize_rows("abacus", x, DA8W4_F32, 12, 2, 3, DA8W4_ACT_UINT8, act, 3, scales, zps) ==
               DA8W4_UNKNOWN_KERNEL,
           "an unknown kernel");
}

void check_kernel_table(const Trial &) {
    const size_t count = da8w4_kernel_count();
    expect(count > 0 && std::string(da8w4_kernel_name(count - 1)) == "scalar" && !da8w4_kernel_reason(count - 1),
           "scalar is not the last kernel");
    expect(!da8w4_kernel_name(count) && !da8w4_kernel_description(count) && da8w4_kernel_reason(count),
           "there is a kernel past the last");
    size_t best = count, index = count;
    for (size_t i = count; i-- > 0;) {
        Example example(true);
        example.call.kernel = da8w4_kernel_name(i);
        const da8w4_status want = da8w4_kernel_reason(i) ? DA8W4_KERNEL_UNAVAILABLE : DA8W4_OK;
        expect(da8w4_linear(&example.call) == want && da8w4_kernel_description(i), "kernel %s", example.call.kernel);
        if (want == DA8W4_OK) best = i;
    }
    if (const char *forced = getenv("PYDA8W4_KERNEL"); !forced || !*forced)
        expect(da8w4_default_kernel(&index) == DA8W4_OK && index == best, "the default is not the best kernel");
    expect(da8w4_default_kernel(nullptr) == bad, "default_kernel takes a null pointer");
}

void check_texts(const Trial &) {
    for (int status = DA8W4_OK; status <= DA8W4_WORKSPACE_TOO_SMALL + 1; status++)
        expect(strlen(da8w4_status_text(static_cast<da8w4_status>(status))) > 5, "status %d: no text", status);
    size_t features = 0;
    int present = -1;
    while (da8w4_cpu_feature(features, features % 2 ? &present : nullptr)) features++;
    expect(features < 64 && (features < 2 || present == 0 || present == 1), "%zu features", features);
}

}  // namespace

std::vector<Test> interface_tests() {
    return {
        {"kernel_table", "names, reasons and choice of kernels", 1, 1, false, check_kernel_table},
        {"texts", "texts of statuses, names of features", 1, 1, false, check_texts},
        {"bad_calls", "products with one thing damaged", std::size(calls) + std::size(gemms) + std::size(linears), 1,
         false, check_calls},
        {"bad_zps", "zero points of activations in every row", 1, 1, false, check_zps_of_rows},
        {"bad_sizes", "sizes of workspaces, and null calls", 1, 1, false, check_sizes},
        {"bad_rows", "quantize_rows with one thing damaged", 1, 1, false, check_rows},
    };
}

}  // namespace check
