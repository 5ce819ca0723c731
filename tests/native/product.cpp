#include "product.h"

#include <cmath>

#include "activations.h"
#include "floats.h"
#include "harness.h"

// Threads whose tiles are configured: tests/tools/amx_emulator.c defines it, where that is linked in.
extern "C" __attribute__((weak)) int amx_emulator_configured(void) { return 0; }

namespace check {
namespace {

std::vector<float> random_scales(Random &random, size_t m) {
    std::vector<float> scales;
    for (size_t row = 0; row < m; row++) {
        const size_t kind = random.below(24);
        scales.push_back(kind == 0   ? NAN
                         : kind == 1 ? -INFINITY
                         : kind == 2 ? any_finite(random, DA8W4_F32)
                                     : random.uniform(-0.1f, 0.1f));
    }
    return scales;
}

std::vector<int32_t> random_zps(Random &random, size_t m, da8w4_scheme scheme) {
    const int low = scheme == DA8W4_ACT_INT8 ? -128 : 0, neutral = low + 128;
    std::vector<int32_t> zps;
    for (size_t row = 0; row < m; row++) {
        const size_t kind = random.below(6);
        zps.push_back(kind == 0 ? low : kind == 1 ? low + 255 : kind == 2 ? neutral : random.between(low, low + 255));
    }
    return zps;
}

void expect_equal(const std::vector<uint8_t> &have, const std::vector<uint8_t> &want, const Operands &operands,
                  const char *of) {
    size_t at = 0;
    while (at < want.size() && have[at] == want[at]) at++;
    const size_t stride = operands.out_stride, row = stride ? at / stride : 0, byte = stride ? at % stride : 0;
    expect(have == want, "row %zu, byte %zu (column %zu) is not that of %s", row, byte,
           byte / size_of(operands.out_type), of);
}

// One row of an output against docs/numbers.md; the number of a wrong column, or n.
size_t wrong_column(const Operands &operands, const Matrix &w, const Row &row, const uint8_t *out) {
    const size_t size = size_of(operands.out_type);
    for (size_t n = 0; n < w.n; n++) {
        const float *bias = operands.bias.empty() ? nullptr : operands.bias.data();
        float y = product(w, row, operands.scheme, n, bias);
        if (std::isnan(y)) y = float_of(0x7fc00000);
        uint8_t want[sizeof(float)];
        put(want, y, operands.out_type);
        if (memcmp(out + n * size, want, size) != 0) return n;
    }
    return w.n;
}

// The output of "scalar" against docs/numbers.md, in some rows if there are many; and the gaps in all.
void check_output(Random random, const Operands &operands, const Matrix &w, const std::vector<Row> &rows,
                  const std::vector<uint8_t> &out) {
    const size_t m = operands.m, row_bytes = w.n * size_of(operands.out_type);
    for (size_t r = 0; r < m; r++) {
        const size_t begin = r * operands.out_stride;
        if (r + 1 < m) {
            bool kept = true;
            for (size_t i = begin + row_bytes; i < begin + operands.out_stride; i++)
                kept = kept && out[i] == Guarded::garbage(i);
            expect(kept, "row %zu writes beyond its end", r);
        }
        if (m > 20 && r != 0 && r + 1 != m && !random.one_in(60)) continue;
        const size_t wrong = wrong_column(operands, w, rows[r], &out[begin]);
        expect(wrong == w.n, "row %zu, column %zu is not what docs/numbers.md says", r, wrong);
    }
}

// The da8w4_gemm that does the same as this da8w4_linear, by rows that are already quantized: in the order of
// activations, or, where factors or a rotation have to come first, in that of the weight.
Operands quantized_operands(const Operands &linear, const Matrix &w) {
    Operands gemm = linear;
    gemm.linear = false;
    gemm.in_order = !w.factors.empty() || w.rotation;
    gemm.act_type = linear.scheme == DA8W4_ACT_INT8 ? DA8W4_S8 : DA8W4_U8;
    gemm.act_stride = w.k;
    gemm.act.clear();
    for (size_t r = 0; r < linear.m; r++) {
        const std::vector<float> x = floats_at(&linear.act[r * linear.act_stride], w.k, linear.act_type);
        const Row row = quantized(gemm.in_order ? transformed(w, x) : x, linear.scheme, w.group);
        for (int value : row.act) gemm.act.push_back(static_cast<uint8_t>(value));
        gemm.scales.push_back(row.scale);
        gemm.zps.push_back(row.zp);
    }
    return gemm;
}

void expect_transform_refused(const Product &product) {
    da8w4_call call = product.call();
    const Guarded workspace(da8w4_workspace_bytes(&call), true), out(product.operands.out_bytes, true);
    call.weight = &product.weight.packed;
    call.workspace = workspace.as();
    call.workspace_bytes = workspace.bytes();
    call.out = out.as();
    const da8w4_status status = da8w4_gemm(&call);
    expect(status == DA8W4_TRANSFORM_NEEDS_FLOATS && out.untouched(), "gemm with a transform: %s",
           da8w4_status_text(status));
}

}  // namespace

Operands random_operands(Random &random, const Matrix &w, size_t m, bool linear) {
    Operands o = {};
    o.m = m;
    o.linear = linear;
    o.scheme = static_cast<da8w4_scheme>(random.below(linear ? 4 : 2));
    o.at_end = !random.one_in(4);
    o.out_type = static_cast<da8w4_type>(random.below(3));
    o.act_type = linear ? static_cast<da8w4_type>(random.below(3)) : o.scheme == DA8W4_ACT_INT8 ? DA8W4_S8 : DA8W4_U8;
    const size_t out_size = size_of(o.out_type);
    o.act_stride = (w.k + random.below(2) * random.below(40)) * size_of(o.act_type);
    o.out_stride = (w.n + random.below(2) * random.below(40)) * out_size;
    if (m) o.out_bytes = (m - 1) * o.out_stride + w.n * out_size;
    o.act = linear ? random_floats(random, m, w.k, o.act_stride, o.act_type)
                   : random_bytes(random, m, w.k, o.act_stride, o.act_type == DA8W4_S8);
    if (!linear && !random.one_in(4)) o.scales = random_scales(random, m);
    if (!linear && !random.one_in(4)) o.zps = random_zps(random, m, o.scheme);
    if (random.one_in(2))
        for (size_t n = 0; n < w.n; n++)
            o.bias.push_back(random.one_in(40) ? any_finite(random, DA8W4_F32) : random.uniform(-9, 9));
    return o;
}

std::vector<Row> rows_of(const Operands &o, const Matrix &w) {
    std::vector<Row> rows;
    for (size_t r = 0; r < o.m; r++) {
        const uint8_t *from = &o.act[r * o.act_stride];
        if (o.linear) {
            rows.push_back(quantized(transformed(w, floats_at(from, w.k, o.act_type)), o.scheme, w.group));
            continue;
        }
        Row row = {{}, o.scales.empty() ? 1.0f : o.scales[r], o.zps.empty() ? 0 : o.zps[r], {}};
        for (size_t k = 0; k < w.k; k++) {
            const uint8_t byte = from[w.perm.empty() || o.in_order ? k : static_cast<size_t>(w.perm[k])];
            row.act.push_back(o.act_type == DA8W4_S8 ? static_cast<int8_t>(byte) : byte);
        }
        rows.push_back(row);
    }
    return rows;
}

Product::Product(const Operands &o, const Weight &w)
    : operands(o),
      weight(w),
      act_(o.act, o.at_end),
      scales_(o.scales, o.at_end),
      zps_(o.zps, o.at_end),
      bias_(o.bias, o.at_end),
      packed_(w.packed) {
    if (!o.linear) packed_.factors = nullptr, packed_.rotation = 0;
    if (o.in_order) packed_.perm = nullptr;
    call_.m = o.m;
    call_.act = act_.as();
    call_.act_type = o.act_type;
    call_.act_stride = o.act_stride;
    call_.act_scales = o.scales.empty() ? nullptr : scales_.as<float>();
    call_.act_zps = o.zps.empty() ? nullptr : zps_.as<int32_t>();
    call_.scheme = o.scheme;
    call_.weight = &packed_;
    call_.bias = o.bias.empty() ? nullptr : bias_.as<float>();
    call_.out_type = o.out_type;
    call_.out_stride = o.out_stride;
}

void Product::describe(const char *kernel, size_t threads, const char *mode) const {
    const char *const kinds[] = {"int4", "int5", "int6", "int8", "table4"};
    const char *const schemes[] = {"uint8", "int8", "int8_group", "int16"};
    const Operands &o = operands;
    const Matrix &w = weight.matrix;
    now(kernel,
        "%s m=%zu n=%zu k=%zu group=%zu super=%zu %s act=%s %s scales=%s zps=%d offsets=%d perm=%d factors=%d "
        "rotation=%zu "
        "out=%s bias=%d act_stride=%zu out_stride=%zu threads=%zu%s%s",
        o.linear ? "linear" : "gemm", o.m, w.n, w.k, w.group, w.super, kinds[w.kind], name_of(o.act_type),
        schemes[o.scheme], name_of(packed_.scale_type), packed_.zps != nullptr, packed_.offsets != nullptr,
        packed_.perm != nullptr, packed_.factors != nullptr, packed_.rotation, name_of(o.out_type), !o.bias.empty(),
        o.act_stride, o.out_stride, threads, o.at_end ? "" : ", operands at the start of a page", mode);
}

std::vector<uint8_t> Product::run(Random random, const char *kernel) const {
    const size_t threads = 1 + random.below(3);
    const bool hostile = random.one_in(4), by_call = random.one_in(2);
    describe(kernel, threads, hostile ? ", rounding upward" : "");
    da8w4_call call = call_;
    call.kernel = kernel;
    // The limit comes from the call, which may be more than that of the process, or from the process.
    da8w4_set_num_threads(by_call ? 1 + random.below(4) : threads);
    call.threads = by_call ? threads : 0;
    // da8w4_gemm has no use for a scheme.
    if (!operands.linear) call.scheme = static_cast<da8w4_scheme>(random.below(4));
    call.workspace_bytes = da8w4_workspace_bytes(&call);
    const Guarded workspace(call.workspace_bytes, operands.at_end), out(operands.out_bytes, operands.at_end);
    call.workspace = workspace.as();
    call.out = out.as();
    if (call.m && random.one_in(8)) {
        expect_too_small(*this, call, call.workspace_bytes - 1);
        expect(out.untouched(), "a call that is refused writes to out");
    }
    FloatMode mode(hostile);
    const da8w4_status done = status(call);
    expect(mode.restore(), "the caller's floating-point mode was changed");
    expect(done == DA8W4_OK, "%s", da8w4_status_text(done));
    if (amx_emulator_configured() != 0)
        expect(false, "%d threads have left their tiles configured", amx_emulator_configured());
    return out.copy();
}

void Product::time(const char *kernel) const {
    describe(kernel, 1, "");
    da8w4_call call = call_;
    call.kernel = kernel;
    call.threads = 1;
    call.workspace_bytes = da8w4_workspace_bytes(&call);
    const Guarded workspace(call.workspace_bytes, true), out(operands.out_bytes, true);
    call.workspace = workspace.as();
    call.out = out.as();
    time_call([&] { (void)status(call); });
}

void expect_too_small(const Product &product, da8w4_call call, size_t bytes) {
    const size_t needed = call.workspace_bytes;
    call.workspace_bytes = bytes;
    const da8w4_status status = product.status(call);
    expect(status == DA8W4_WORKSPACE_TOO_SMALL, "a workspace of %zu bytes instead of %zu: %s", bytes, needed,
           da8w4_status_text(status));
}

void check_product(const Random &random, const Weight &weight, const Operands &operands) {
    const Matrix &w = weight.matrix;
    const Product product(operands, weight);
    if (timing()) {
        for (const std::string &kernel : kernels_and_scalar()) product.time(kernel.c_str());
        return;
    }
    const std::vector<uint8_t> want = product.run(random.child("scalar"), "scalar");
    if (scalar_wanted()) check_output(random.child("rows"), operands, w, rows_of(operands, w), want);
    for (const std::string &kernel : kernels())
        expect_equal(product.run(random.child(kernel.c_str()), kernel.c_str()), want, operands, "scalar");

    if (!operands.linear && (!w.factors.empty() || w.rotation)) expect_transform_refused(product);
    if (!operands.linear || operands.scheme > DA8W4_ACT_INT8) return;
    const Operands same = quantized_operands(operands, w);
    const Product gemm(same, weight);
    // Many rows are left out for "scalar", because they take it long.
    for (const std::string &kernel : operands.m < 20 ? kernels_and_scalar() : kernels())
        expect_equal(gemm.run(random.child("gemm").child(kernel.c_str()), kernel.c_str()), want, operands,
                     "da8w4_linear of scalar");
}

void check_product(const Random &random, const Weight &weight, size_t m, bool linear) {
    Random draws = random.child("operands");
    check_product(random, weight, random_operands(draws, weight.matrix, m, linear));
}

void check_either_product(const Random &random, const Weight &weight, size_t m) {
    check_product(random, weight, m, random.child("linear").one_in(2));
}

}  // namespace check
