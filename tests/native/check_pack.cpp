// da8w4_plan_pack, da8w4_pack, da8w4_unpack, da8w4_dequantize, da8w4_sum_columns: what they store, whatever lay in the
// arrays and however many threads there are, and what they refuse wherever it is.
#include <algorithm>
#include <cmath>

#include "floats.h"
#include "harness.h"
#include "oracle.h"
#include "weight.h"

namespace check {
namespace {

bool plan_is_right(const Matrix &w, const da8w4_packed &plan, const da8w4_packed_bytes &bytes) {
    const size_t padded = (w.n + 31) / 32 * 32, size = size_of(plan.scale_type), floats = padded * w.rows * size;
    const bool offsets = !w.offsets.empty();
    const da8w4_type none = DA8W4_U8;
    return plan.n == w.n && plan.k == w.k && plan.group == std::min(w.group, w.k) &&
           plan.super == std::min(w.super, w.groups) && plan.kind == w.kind && plan.scale_type == narrowest(w) &&
           plan.sub_scale_type == (w.super ? w.sub_scale_type : none) &&
           plan.sub_offset_type == (w.super && offsets ? w.sub_offset_type : none) &&
           plan.zp == (same_zps(w) ? w.zps[0] + code_offset(w) : 0) && !plan.perm && !plan.factors && !plan.rotation &&
           bytes.scales == floats && bytes.sub_scales == (w.super ? padded * w.groups : 0) &&
           bytes.zps == (same_zps(w) ? 0 : padded * w.groups) && bytes.offsets == (offsets ? floats : 0) &&
           bytes.sub_offsets == (w.super && offsets ? padded * w.groups : 0) && bytes.sums == padded * sizeof(float);
}

// One code out of range is found wherever it is.
void check_bad_code(Random &random, const Matrix &w, const RawWeight &raw, const da8w4_packed &plan,
                    const PackedArrays &arrays) {
    if (w.format >= DA8W4_CODES_LOW_FIRST || w.kind == DA8W4_INT8) return;
    const size_t n = random.below(w.n), k = random.below(w.k);
    uint8_t &code = raw.codes.as()[n * raw.view.codes_stride + k];
    const uint8_t good = code;
    const int above = highest_code(w) + 1, count = 256 - (above - lowest_code(w));
    code = static_cast<uint8_t>(above + random.between(0, count - 1));
    const da8w4_status refused = arrays.pack(raw, plan);
    expect(refused == DA8W4_BAD_CODE, "code %d at [%zu][%zu]: %s", code, n, k, da8w4_status_text(refused));
    code = good;
}

da8w4_status planned(const RawWeight &raw) {
    da8w4_packed plan;
    da8w4_packed_bytes bytes;
    return da8w4_plan_pack(&raw.view, &plan, &bytes);
}

// So is one scale or offset that is not finite, and one whose product with one of its super-group is not exact.
void check_bad_float(Random &random, const Matrix &w, const RawWeight &raw, size_t at, bool offset) {
    float &value = (offset ? raw.offsets : raw.scales).as<float>()[at];
    const float good = value, bad = random.one_in(2) ? NAN : -INFINITY;
    value = bad;
    expect(planned(raw) == (offset ? DA8W4_BAD_OFFSET : DA8W4_BAD_SCALE), "%f at %zu", bad, at);
    if (w.super) {
        const size_t first = at % w.rows * w.super, groups = std::min(w.super, w.groups - first);
        uint8_t &sub =
            (offset ? raw.sub_offsets : raw.sub_scales).as()[at / w.rows * w.groups + first + random.below(groups)];
        const uint8_t good_sub = sub;
        sub = 125;  // so that every type of it holds it
        value = random.one_in(2) ? 1 + 0x1p-23f : 0x1p122f;
        expect(planned(raw) == DA8W4_INEXACT_SCALE, "%a * 125 at %zu", value, at);
        sub = good_sub;
    }
    value = good;
}

// So is one zero point that is too high, or is not 0 beside a table.
void check_bad_zp(Random &random, const Matrix &w, const RawWeight &raw, size_t at) {
    const int highest = w.has_table() ? 0 : INT8_MAX - code_offset(w);
    if (!raw.view.zps || highest == INT8_MAX) return;
    int8_t &zp = raw.zps.as<int8_t>()[at];
    const int8_t good = zp;
    zp = static_cast<int8_t>(random.between(highest + 1, INT8_MAX));
    expect(planned(raw) == DA8W4_BAD_WEIGHT_ZP, "zero point %d at %zu", zp, at);
    zp = good;
}

void check_bad_values(Random &random, const Matrix &w, const RawWeight &raw, size_t row, size_t group) {
    check_bad_float(random, w, raw, row, false);
    if (raw.view.offsets) check_bad_float(random, w, raw, row, true);
    check_bad_zp(random, w, raw, group);
}

// Packed bytes may be hashed: they must not depend on what lay in the arrays, nor on threads.
void check_same_again(Random &random, const RawWeight &raw, const da8w4_packed &plan, const PackedArrays &arrays,
                      const std::vector<uint8_t> &want) {
    for (const Guarded *array : {&arrays.codes, &arrays.scales, &arrays.sub_scales, &arrays.zps, &arrays.offsets,
                                 &arrays.sub_offsets, &arrays.sums})
        memset(array->as(), 0, array->bytes());
    da8w4_set_num_threads(1 + random.below(3));
    (void)arrays.pack(raw, plan);
    expect(arrays.contents() == want, "packing twice gives different bytes");
}

void check_unpacking(Random &random, const Matrix &w, const da8w4_packed &packed, bool at_end) {
    const Guarded codes(w.n * w.k, at_end), scales(w.zps.size() * sizeof(float), at_end), zps(w.zps.size(), at_end),
        offsets(packed.offsets ? scales.bytes() : 0, at_end);
    FloatMode mode(random.one_in(4));
    const da8w4_status status = da8w4_unpack(&packed, codes.as(), scales.as<float>(), zps.as<int8_t>(),
                                             packed.offsets ? offsets.as<float>() : nullptr);
    expect(mode.restore(), "unpack changed the caller's floating-point mode");
    bool same = status == DA8W4_OK;
    for (size_t i = 0; i < w.codes.size(); i++)
        same = same && codes.as()[i] == static_cast<uint8_t>(w.codes[i] + code_offset(w));
    for (size_t n = 0, at = 0; n < w.n; n++)
        for (size_t g = 0; g < w.groups; g++, at++) {
            same = same && same_bits(scales.as<float>()[at], w.scale(n, g));
            same = same && zps.as<int8_t>()[at] == w.zps[at] + code_offset(w);
            same = same && (!packed.offsets || same_bits(offsets.as<float>()[at], w.offset(n, g)));
        }
    expect(same, "unpacking does not give back what was packed");
}

// The first columns, or any, of a weight whose perm and factors are in guarded arrays, too, and with its rotation.
void check_dequantizing(Random &random, const Matrix &w, da8w4_packed packed, bool at_end) {
    const Guarded perm(w.perm, at_end), factors(w.factors, at_end);
    if (perm.bytes()) packed.perm = perm.as<int32_t>();
    if (factors.bytes()) packed.factors = factors.as<float>();
    packed.rotation = w.rotation;
    const bool first = random.one_in(3);
    std::vector<size_t> columns(first ? 1 + random.below(std::min(w.n, size_t{40})) : random.below(5));
    for (size_t i = 0; i < columns.size(); i++) columns[i] = first ? i : random.below(w.n);
    const size_t row = w.k * sizeof(float), stride = row + random.below(3) * sizeof(float);
    const Guarded given(columns, at_end), out(columns.empty() ? 0 : (columns.size() - 1) * stride + row, at_end);
    FloatMode mode(random.one_in(4));
    const da8w4_status status =
        da8w4_dequantize(&packed, first ? nullptr : given.as<size_t>(), columns.size(), out.as<float>(), stride);
    expect(mode.restore(), "dequantize changed the caller's floating-point mode");
    expect(status == DA8W4_OK, "dequantize: %s", da8w4_status_text(status));
    for (size_t i = 0; i < columns.size(); i++) {
        const std::vector<float> want = dequantized(w, columns[i]);
        size_t k = 0;
        for (float have; k < w.k; k++) {
            have = get(out.as() + i * stride + k * sizeof(float), DA8W4_F32);
            if (!same_bits(want[k], have) && !(std::isnan(want[k]) && std::isnan(have))) break;
        }
        expect(k == w.k, "column %zu, k %zu is not what docs/numbers.md says", columns[i], k);
        bool kept = true;
        for (size_t at = i * stride + row; at < std::min(out.bytes(), (i + 1) * stride); at++)
            kept = kept && out.as()[at] == Guarded::garbage(at);
        expect(kept, "dequantize writes beyond the end of a column");
    }
}

void check_summing(Random &random, da8w4_packed packed, const Guarded &want, bool at_end) {
    const Guarded sums(want.bytes(), at_end);
    packed.sums = nullptr;
    da8w4_set_num_threads(1 + random.below(3));
    FloatMode mode(random.one_in(4));
    const da8w4_status status = da8w4_sum_columns(&packed, sums.as<float>());
    expect(mode.restore(), "sum_columns changed the caller's floating-point mode");
    expect(status == DA8W4_OK && sums.copy() == want.copy(), "sum_columns does not give the sums that were packed");
}

// The first packing is done by at least `threads` threads, and at most three.
void check_pack(const Trial &trial, const Shape &shape, size_t threads) {
    Random random = trial.random;
    const Matrix w = random_matrix(random, shape);
    const bool at_end = !random.one_in(4);
    now(nullptr, "pack n=%zu k=%zu group=%zu super=%zu kind=%d format=%d scales=%s offsets=%d", w.n, w.k, w.group,
        w.super, w.kind, w.format, name_of(w.scale_type), !w.offsets.empty());
    const RawWeight raw = raw_weight(random, w, at_end);
    da8w4_packed plan = {};
    da8w4_packed_bytes bytes = {};
    da8w4_set_num_threads(timing() ? 1 : threads + random.below(4 - threads));
    FloatMode mode(random.one_in(4));
    const da8w4_status planned = da8w4_plan_pack(&raw.view, &plan, &bytes);
    const PackedArrays arrays(bytes, at_end);
    const da8w4_status packed = arrays.pack(raw, plan);
    const bool kept = mode.restore();
    if (timing()) return time_call([&] { (void)arrays.pack(raw, plan); });
    expect(kept, "the caller's floating-point mode was changed");
    expect(planned == DA8W4_OK && packed == DA8W4_OK, "plan: %s; pack: %s", da8w4_status_text(planned),
           da8w4_status_text(packed));
    expect(plan_is_right(w, plan, bytes), "the plan has scales %s, group %zu, super %zu, zp %d",
           name_of(plan.scale_type), plan.group, plan.super, plan.zp);
    const std::vector<uint8_t> first = arrays.contents();
    expect(first == packed_contents(w), "the packed bytes are not what docs/packed-format.md says");
    check_bad_code(random, w, raw, plan, arrays);
    for (bool last : {false, true})
        check_bad_values(random, w, raw, last ? w.scales.size() - 1 : random.below(w.scales.size()),
                         last ? w.zps.size() - 1 : random.below(w.zps.size()));
    check_same_again(random, raw, plan, arrays, first);
    const da8w4_packed view = arrays.view(plan, raw.table);
    check_summing(random, view, arrays.sums, at_end);
    arrays.dirty_padding(plan);
    check_unpacking(random, w, view, at_end);
    check_dequantizing(random, w, view, at_end);
}

// Large enough that several threads share the scales, the codes and the rows.
const Shape large_shapes[] = {{330, 1100, 4}, {330, 1030, 1030}, {33, 4100, 128}, {1100, 130, 32}};

}  // namespace

std::vector<Test> pack_tests() {
    return {
        {"pack", "plan, pack, unpack and dequantize weights of every edge", edge_shapes().size(), 9, true,
         [](const Trial &trial) { check_pack(trial, edge_shapes()[trial.index], 1); }},
        {"pack_large", "the same with three threads", 4 * std::size(large_shapes), 1, true,
         [](const Trial &trial) { check_pack(trial, large_shapes[trial.index % std::size(large_shapes)], 3); }},
    };
}

}  // namespace check
