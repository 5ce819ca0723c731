// What da8w4_plan_pack, da8w4_pack and da8w4_unpack refuse.
#include <cmath>
#include <iterator>
#include <vector>

#include "example.h"
#include "harness.h"

namespace check {
namespace {

constexpr da8w4_status bad = DA8W4_BAD_ARGUMENT;

struct PackTest {
    const char *what;
    da8w4_status plan, pack;
    void (*damage)(Example &);
};

const PackTest packs[] = {
    {"nothing", DA8W4_OK, DA8W4_OK, [](Example &) {}},
    {"n 0", bad, bad, [](Example &e) { e.raw.n = 0; }},
    {"k 0", bad, bad, [](Example &e) { e.raw.k = 0; }},
    {"group 0", bad, bad, [](Example &e) { e.raw.group = 0; }},
    {"no scales", bad, bad, [](Example &e) { e.raw.scales = nullptr; }},
    {"an unknown format", bad, bad, [](Example &e) { e.raw.format = static_cast<da8w4_codes>(4); }},
    {"group 6", DA8W4_BAD_GROUP, DA8W4_BAD_GROUP, [](Example &e) { e.raw.group = 6; }},
    {"group 10, more than k", DA8W4_BAD_GROUP, DA8W4_BAD_GROUP, [](Example &e) { e.raw.group = 10; }},
    {"a NaN scale", DA8W4_BAD_SCALE, DA8W4_BAD_SCALE, [](Example &e) { e.scales[9] = NAN; }},
    {"an infinite scale", DA8W4_BAD_SCALE, DA8W4_BAD_SCALE, [](Example &e) { e.scales[0] = -INFINITY; }},
    {"a NaN offset", DA8W4_BAD_OFFSET, DA8W4_BAD_OFFSET, [](Example &e) { e.offsets[9] = NAN; }},
    {"an infinite offset", DA8W4_BAD_OFFSET, DA8W4_BAD_OFFSET, [](Example &e) { e.offsets[0] = INFINITY; }},
    {"no offsets", DA8W4_OK, DA8W4_OK, [](Example &e) { e.raw.offsets = nullptr; }},
    {"zero point 128", DA8W4_BAD_WEIGHT_ZP, DA8W4_BAD_WEIGHT_ZP,
     [](Example &e) { e.raw.zps = nullptr, e.raw.zp = 128; }},
    {"zero point -129", DA8W4_BAD_WEIGHT_ZP, DA8W4_BAD_WEIGHT_ZP,
     [](Example &e) { e.raw.zps = nullptr, e.raw.zp = -129; }},
    {"signed zero point 120", DA8W4_BAD_WEIGHT_ZP, DA8W4_BAD_WEIGHT_ZP,
     [](Example &e) { e.raw.format = DA8W4_CODES_SIGNED, e.zps[7] = 120; }},
    {"signed zero point 119", DA8W4_OK, DA8W4_OK,
     [](Example &e) { e.raw.format = DA8W4_CODES_SIGNED, e.zps[7] = 119; }},
    {"signed zero point 112 of 5 bits", DA8W4_BAD_WEIGHT_ZP, DA8W4_BAD_WEIGHT_ZP,
     [](Example &e) { e.raw.kind = DA8W4_INT5, e.raw.format = DA8W4_CODES_SIGNED, e.zps[7] = 112; }},
    {"signed zero point 111 of 5 bits", DA8W4_OK, DA8W4_OK,
     [](Example &e) { e.raw.kind = DA8W4_INT5, e.raw.format = DA8W4_CODES_SIGNED, e.zps[7] = 111; }},
    {"signed zero point 96 of 6 bits", DA8W4_BAD_WEIGHT_ZP, DA8W4_BAD_WEIGHT_ZP,
     [](Example &e) { e.raw.kind = DA8W4_INT6, e.raw.format = DA8W4_CODES_SIGNED, e.zps[7] = 96; }},
    {"signed zero point 95 of 6 bits", DA8W4_OK, DA8W4_OK,
     [](Example &e) { e.raw.kind = DA8W4_INT6, e.raw.format = DA8W4_CODES_SIGNED, e.zps[7] = 95; }},
    {"zero point 127 of 8 bits", DA8W4_OK, DA8W4_OK, [](Example &e) { e.set_kind(DA8W4_INT8), e.zps[7] = 127; }},
    {"a table with a zero point", DA8W4_BAD_WEIGHT_ZP, DA8W4_BAD_WEIGHT_ZP,
     [](Example &e) { e.use_table(), e.raw.zp = 1; }},
    {"a table with zero points", DA8W4_BAD_WEIGHT_ZP, DA8W4_BAD_WEIGHT_ZP,
     [](Example &e) { e.use_table(), e.raw.zps = e.zps; }},
    {"a table with zero points 0", DA8W4_OK, DA8W4_OK,
     [](Example &e) { e.use_table(), e.raw.zps = e.zps, e.zps[0] = 0; }},
    {"code 16", DA8W4_OK, DA8W4_BAD_CODE, [](Example &e) { e.codes[39] = 16; }},
    {"code 255", DA8W4_OK, DA8W4_BAD_CODE, [](Example &e) { e.codes[0] = 255; }},
    {"signed code 8", DA8W4_OK, DA8W4_BAD_CODE, [](Example &e) { e.raw.format = DA8W4_CODES_SIGNED, e.codes[39] = 8; }},
    {"signed code -9", DA8W4_OK, DA8W4_BAD_CODE,
     [](Example &e) { e.raw.format = DA8W4_CODES_SIGNED, e.codes[39] = static_cast<uint8_t>(-9); }},
    {"code 32 of 5 bits", DA8W4_OK, DA8W4_BAD_CODE, [](Example &e) { e.set_kind(DA8W4_INT5), e.codes[39] = 32; }},
    {"code 31 of 5 bits", DA8W4_OK, DA8W4_OK, [](Example &e) { e.set_kind(DA8W4_INT5), e.codes[39] = 31; }},
    {"code 64 of 6 bits", DA8W4_OK, DA8W4_BAD_CODE, [](Example &e) { e.set_kind(DA8W4_INT6), e.codes[39] = 64; }},
    {"code 63 of 6 bits", DA8W4_OK, DA8W4_OK, [](Example &e) { e.set_kind(DA8W4_INT6), e.codes[39] = 63; }},
    {"signed code 16 of 5 bits", DA8W4_OK, DA8W4_BAD_CODE,
     [](Example &e) { e.set_kind(DA8W4_INT5), e.raw.format = DA8W4_CODES_SIGNED, e.codes[39] = 16; }},
    {"signed code 32 of 6 bits", DA8W4_OK, DA8W4_BAD_CODE,
     [](Example &e) { e.set_kind(DA8W4_INT6), e.raw.format = DA8W4_CODES_SIGNED, e.codes[39] = 32; }},
    {"code 128 of 8 bits", DA8W4_OK, DA8W4_OK, [](Example &e) { e.set_kind(DA8W4_INT8), e.codes[39] = 128; }},
    {"index 16 of a table", DA8W4_OK, DA8W4_BAD_CODE, [](Example &e) { e.use_table(), e.codes[39] = 16; }},
    {"an unknown kind", bad, bad, [](Example &e) { e.raw.kind = static_cast<da8w4_kind>(5); }},
    {"no kind", bad, bad, [](Example &e) { e.raw.kind = static_cast<da8w4_kind>(-1); }},
    {"unsigned codes of 8 bits", bad, bad,
     [](Example &e) { e.set_kind(DA8W4_INT8), e.raw.format = DA8W4_CODES_UNSIGNED; }},
    {"nibbles of 8 bits", bad, bad, [](Example &e) { e.set_kind(DA8W4_INT8), e.raw.format = DA8W4_CODES_LOW_FIRST; }},
    {"nibbles of 5 bits", bad, bad, [](Example &e) { e.set_kind(DA8W4_INT5), e.raw.format = DA8W4_CODES_HIGH_FIRST; }},
    {"nibbles of 6 bits", bad, bad, [](Example &e) { e.set_kind(DA8W4_INT6), e.raw.format = DA8W4_CODES_LOW_FIRST; }},
    {"nibbles of a table", DA8W4_OK, DA8W4_OK,
     [](Example &e) { e.use_table(), e.raw.format = DA8W4_CODES_HIGH_FIRST; }},
    {"signed indices of a table", bad, bad, [](Example &e) { e.use_table(), e.raw.format = DA8W4_CODES_SIGNED; }},
    {"no table", bad, bad, [](Example &e) { e.use_table(), e.raw.table = nullptr; }},
    {"a table of 4 bits", bad, bad, [](Example &e) { e.raw.table = e.table; }},
    {"two levels", DA8W4_OK, DA8W4_OK, [](Example &e) { e.use_two_levels(); }},
    {"a super-group of more groups than there are", DA8W4_OK, DA8W4_OK,
     [](Example &e) { e.use_two_levels(), e.raw.super = 9; }},
    {"two levels without sub-scales", bad, bad, [](Example &e) { e.use_two_levels(), e.raw.sub_scales = nullptr; }},
    {"two levels without sub-offsets", bad, bad, [](Example &e) { e.use_two_levels(), e.raw.sub_offsets = nullptr; }},
    {"two levels without offsets", DA8W4_OK, DA8W4_OK,
     [](Example &e) {
         e.use_two_levels(), e.raw.offsets = nullptr, e.raw.sub_offsets = nullptr, e.raw.sub_offset_type = DA8W4_F32;
     }},
    {"sub-scales f16", bad, bad, [](Example &e) { e.use_two_levels(), e.raw.sub_scale_type = DA8W4_F16; }},
    {"sub-offsets f32", bad, bad, [](Example &e) { e.use_two_levels(), e.raw.sub_offset_type = DA8W4_F32; }},
    {"sub-scales of no type", bad, bad,
     [](Example &e) { e.use_two_levels(), e.raw.sub_scale_type = static_cast<da8w4_type>(9); }},
    {"a scale that is not exact", DA8W4_INEXACT_SCALE, DA8W4_INEXACT_SCALE,
     [](Example &e) { e.use_two_levels(), e.scales[4] = 1 + 0x1p-23f; }},
    {"a scale that overflows", DA8W4_INEXACT_SCALE, DA8W4_INEXACT_SCALE,
     [](Example &e) { e.use_two_levels(), e.scales[4] = 0x1p127f; }},
    {"a scale of two levels that underflows", DA8W4_OK, DA8W4_OK,
     [](Example &e) { e.use_two_levels(), e.scales[4] = 0x1p-149f; }},
    {"an offset that is not exact", DA8W4_INEXACT_SCALE, DA8W4_INEXACT_SCALE,
     [](Example &e) { e.use_two_levels(), e.offsets[4] = 1 + 0x1p-23f, e.sub_offsets[9] = -3; }},
    {"an offset that is exact by one sub-offset", DA8W4_OK, DA8W4_OK,
     [](Example &e) { e.use_two_levels(), e.offsets[4] = 1 + 0x1p-23f, e.sub_offsets[9] = -128; }},
    // The byte 0xff is 255, with which 1 + 2^-17 needs 25 bits, or -1.
    {"a sub-scale 255", DA8W4_INEXACT_SCALE, DA8W4_INEXACT_SCALE,
     [](Example &e) { e.use_two_levels(), e.scales[4] = 1 + 0x1p-17f, e.sub_scales[9] = -1; }},
    {"a sub-scale -1", DA8W4_OK, DA8W4_OK,
     [](Example &e) {
         e.use_two_levels(), e.raw.sub_scale_type = DA8W4_S8, e.scales[4] = 1 + 0x1p-17f, e.sub_scales[9] = -1;
     }},
    {"a NaN scale of two levels", DA8W4_BAD_SCALE, DA8W4_BAD_SCALE,
     [](Example &e) { e.use_two_levels(), e.scales[4] = NAN; }},
    {"an infinite offset of two levels", DA8W4_BAD_OFFSET, DA8W4_BAD_OFFSET,
     [](Example &e) { e.use_two_levels(), e.offsets[4] = INFINITY; }},
    {"a NaN beyond the scales of two levels", DA8W4_OK, DA8W4_OK,
     [](Example &e) { e.use_two_levels(), e.scales[5] = NAN, e.offsets[5] = NAN; }},
    {"no codes", DA8W4_OK, bad, [](Example &e) { e.raw.codes = nullptr; }},
    {"a short stride", DA8W4_OK, bad, [](Example &e) { e.raw.codes_stride--; }},
    {"a short stride of nibbles", DA8W4_OK, bad,
     [](Example &e) { e.raw.format = DA8W4_CODES_LOW_FIRST, e.raw.codes_stride = 3; }},
};

void check_weight(const Trial &trial) {
    const PackTest &test = packs[trial.index];
    now(nullptr, "pack with %s", test.what);
    Example e(true);
    test.damage(e);
    da8w4_packed plan = e.packed;
    da8w4_packed_bytes bytes;
    const da8w4_status planned = da8w4_plan_pack(&e.raw, &plan, &bytes);
    const da8w4_status packed = da8w4_pack(&e.raw, &plan, &e.arrays);
    expect(planned == test.plan && packed == test.pack, "plan: %s; pack: %s", da8w4_status_text(planned),
           da8w4_status_text(packed));
}

void check_null_pointers(const Trial &) {
    Example e(true);
    e.use_two_levels();
    da8w4_packed plan;
    da8w4_packed_bytes bytes;
    expect(da8w4_plan_pack(nullptr, &plan, &bytes) == bad, "plan_pack without a weight");
    expect(da8w4_plan_pack(&e.raw, nullptr, &bytes) == bad, "plan_pack without a plan");
    expect(da8w4_plan_pack(&e.raw, &plan, nullptr) == bad, "plan_pack without sizes");
    da8w4_plan_pack(&e.raw, &plan, &bytes);

    expect(da8w4_pack(nullptr, &plan, &e.arrays) == bad, "pack without a weight");
    expect(da8w4_pack(&e.raw, nullptr, &e.arrays) == bad, "pack without a plan");
    expect(da8w4_pack(&e.raw, &plan, nullptr) == bad, "pack without arrays");
    const struct {
        const char *what;
        void (*forget)(da8w4_packed_arrays &);
    } arrays[] = {
        {"codes", [](da8w4_packed_arrays &to) { to.codes = nullptr; }},
        {"scales", [](da8w4_packed_arrays &to) { to.scales = nullptr; }},
        {"sub-scales", [](da8w4_packed_arrays &to) { to.sub_scales = nullptr; }},
        {"zero points", [](da8w4_packed_arrays &to) { to.zps = nullptr; }},
        {"offsets", [](da8w4_packed_arrays &to) { to.offsets = nullptr; }},
        {"sub-offsets", [](da8w4_packed_arrays &to) { to.sub_offsets = nullptr; }},
        {"sums", [](da8w4_packed_arrays &to) { to.sums = nullptr; }},
    };
    for (const auto &array : arrays) {
        da8w4_packed_arrays to = e.arrays;
        array.forget(to);
        expect(da8w4_pack(&e.raw, &plan, &to) == bad, "pack without %s", array.what);
    }
    expect(da8w4_pack(&e.raw, &plan, &e.arrays) == DA8W4_OK, "pack with everything");

    const auto unpack = [](const da8w4_packed *from, uint8_t *c, float *s, int8_t *z, float *o) {
        return da8w4_unpack(from, c, s, z, o);
    };
    da8w4_packed no_codes = e.packed;
    no_codes.codes = nullptr;
    expect(unpack(nullptr, e.codes, e.scales, e.zps, e.offsets) == bad, "unpack without a weight");
    expect(unpack(&no_codes, e.codes, e.scales, e.zps, e.offsets) == bad, "unpack of a weight without codes");
    expect(unpack(&e.packed, nullptr, e.scales, e.zps, e.offsets) == bad, "unpack without codes");
    expect(unpack(&e.packed, e.codes, nullptr, e.zps, e.offsets) == bad, "unpack without scales");
    expect(unpack(&e.packed, e.codes, e.scales, nullptr, e.offsets) == bad, "unpack without zero points");
    expect(unpack(&e.packed, e.codes, e.scales, e.zps, nullptr) == bad, "unpack without offsets");

    float sums[32];
    expect(da8w4_sum_columns(nullptr, sums) == bad, "sum_columns without a weight");
    expect(da8w4_sum_columns(&no_codes, sums) == bad, "sum_columns of a weight without codes");
    expect(da8w4_sum_columns(&e.packed, nullptr) == bad, "sum_columns without sums");
}

void check_bad_columns(const Trial &) {
    constexpr size_t n = Example::kN, row = Example::kK * sizeof(float);
    const Example e(true);
    da8w4_packed no_sums = e.packed, no_codes = e.packed;
    no_sums.sums = nullptr;
    no_codes.codes = nullptr;
    float out[(n + 1) * Example::kK];
    const size_t last[] = {n - 1, 0}, beyond[] = {0, n}, most[] = {SIZE_MAX};
    expect(da8w4_dequantize(&e.packed, nullptr, n, out, row) == DA8W4_OK, "all columns");
    expect(da8w4_dequantize(&no_sums, last, 2, out, row) == DA8W4_OK, "a weight without sums");
    expect(da8w4_dequantize(&e.packed, last, 1, out, 0) == DA8W4_OK, "one column, stride 0");
    expect(da8w4_dequantize(&e.packed, nullptr, 0, nullptr, 0) == DA8W4_OK, "no columns");
    expect(da8w4_dequantize(nullptr, nullptr, 1, out, row) == bad, "no weight");
    expect(da8w4_dequantize(&no_codes, nullptr, 1, out, row) == bad, "a weight without codes");
    expect(da8w4_dequantize(&e.packed, nullptr, n + 1, out, row) == bad, "more columns than there are");
    expect(da8w4_dequantize(&e.packed, beyond, 2, out, row) == bad, "column n");
    expect(da8w4_dequantize(&e.packed, most, 1, out, row) == bad, "the highest number as a column");
    expect(da8w4_dequantize(&e.packed, nullptr, 2, nullptr, row) == bad, "no output");
    expect(da8w4_dequantize(&e.packed, nullptr, 2, out, row - 1) == bad, "a short stride");
}

// A plan that is not that of the weight.
void check_other_plans(const Trial &) {
    Example e(true);
    const struct {
        const char *what;
        void (*change)(da8w4_packed &);
    } changes[] = {
        {"n", [](da8w4_packed &p) { p.n++; }},
        {"k", [](da8w4_packed &p) { p.k++; }},
        {"group", [](da8w4_packed &p) { p.group = 8; }},
        {"super-group", [](da8w4_packed &p) { p.super = 1; }},
        {"kind", [](da8w4_packed &p) { p.kind = DA8W4_INT6; }},
        {"type of scales", [](da8w4_packed &p) { p.scale_type = DA8W4_F32; }},
    };
    for (const auto &change : changes) {
        da8w4_packed other = e.packed;
        change.change(other);
        expect(da8w4_pack(&e.raw, &other, &e.arrays) == bad, "a plan of another %s is taken", change.what);
    }
}

// The longest group with the largest |value - zp| that a kind has, and a longer one.
struct LongestGroup {
    da8w4_kind kind;
    da8w4_codes format;
    int8_t most;  // of a table
    int zp;
    size_t group;
};
const LongestGroup longest_groups[] = {
    {DA8W4_INT4, DA8W4_CODES_UNSIGNED, 0, -128, 117323},   {DA8W4_INT4, DA8W4_CODES_SIGNED, 0, -128, 124275},
    {DA8W4_INT4, DA8W4_CODES_UNSIGNED, 0, 127, 132104},    {DA8W4_INT5, DA8W4_CODES_UNSIGNED, 0, -128, 105517},
    {DA8W4_INT5, DA8W4_CODES_SIGNED, 0, 111, 132104},      {DA8W4_INT6, DA8W4_CODES_UNSIGNED, 0, -128, 87838},
    {DA8W4_INT8, DA8W4_CODES_SIGNED, 0, 0, 131071},        {DA8W4_INT8, DA8W4_CODES_SIGNED, 0, 127, 65793},
    {DA8W4_INT8, DA8W4_CODES_SIGNED, 0, -128, 65793},      {DA8W4_TABLE4, DA8W4_CODES_UNSIGNED, 127, 0, 132104},
    {DA8W4_TABLE4, DA8W4_CODES_LOW_FIRST, 1, 0, 16777215},
};

void check_longest_group(const Trial &trial) {
    const LongestGroup &edge = longest_groups[trial.index];
    now(nullptr, "kind %d format %d zp %d, groups of %zu", edge.kind, edge.format, edge.zp, edge.group);
    const uint8_t code = 0;
    const float scale = 1;
    const int8_t table[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, edge.most};
    da8w4_weight weight = {};
    weight.n = 1;
    weight.k = weight.group = edge.group;
    weight.kind = edge.kind;
    weight.format = edge.format;
    weight.codes = &code;
    weight.codes_stride = edge.group;
    weight.table = edge.kind == DA8W4_TABLE4 ? table : nullptr;
    weight.scales = &scale;
    weight.zp = edge.zp;
    da8w4_packed plan;
    da8w4_packed_bytes bytes;
    expect(da8w4_plan_pack(&weight, &plan, &bytes) == DA8W4_OK, "the longest group is refused");
    weight.k = ++weight.group;
    expect(da8w4_plan_pack(&weight, &plan, &bytes) == DA8W4_INT32_OVERFLOW, "a longer group is taken");
}

}  // namespace

std::vector<Test> bad_weight_tests() {
    return {
        {"bad_weights", "weights with one thing damaged", std::size(packs), 1, false, check_weight},
        {"bad_pointers", "null pointers to plan, pack and unpack", 1, 1, false, check_null_pointers},
        {"bad_columns", "dequantize with one thing damaged", 1, 1, false, check_bad_columns},
        {"bad_plans", "plans of another weight", 1, 1, false, check_other_plans},
        {"longest_group", "groups whose sums fit int32, and do not", std::size(longest_groups), 1, false,
         check_longest_group},
    };
}

}  // namespace check
