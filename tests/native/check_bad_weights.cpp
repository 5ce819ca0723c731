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
    {"s4 zero point 120", DA8W4_BAD_WEIGHT_ZP, DA8W4_BAD_WEIGHT_ZP,
     [](Example &e) { e.raw.format = DA8W4_CODES_S4, e.zps[7] = 120; }},
    {"code 16", DA8W4_OK, DA8W4_BAD_CODE, [](Example &e) { e.codes[39] = 16; }},
    {"code 255", DA8W4_OK, DA8W4_BAD_CODE, [](Example &e) { e.codes[0] = 255; }},
    {"s4 code 8", DA8W4_OK, DA8W4_BAD_CODE, [](Example &e) { e.raw.format = DA8W4_CODES_S4, e.codes[39] = 8; }},
    {"s4 code -9", DA8W4_OK, DA8W4_BAD_CODE,
     [](Example &e) { e.raw.format = DA8W4_CODES_S4, e.codes[39] = static_cast<uint8_t>(-9); }},
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
    const da8w4_status packed =
        da8w4_pack(&e.raw, &plan, e.packed_codes, e.packed_scales, e.packed_zps, e.packed_offsets, e.packed_sums);
    expect(planned == test.plan && packed == test.pack, "plan: %s; pack: %s", da8w4_status_text(planned),
           da8w4_status_text(packed));
}

void check_null_pointers(const Trial &) {
    Example e(true);
    da8w4_packed plan;
    da8w4_packed_bytes bytes;
    expect(da8w4_plan_pack(nullptr, &plan, &bytes) == bad, "plan_pack without a weight");
    expect(da8w4_plan_pack(&e.raw, nullptr, &bytes) == bad, "plan_pack without a plan");
    expect(da8w4_plan_pack(&e.raw, &plan, nullptr) == bad, "plan_pack without sizes");
    da8w4_plan_pack(&e.raw, &plan, &bytes);

    const auto pack = [&](const da8w4_packed *by, uint8_t *codes, void *scales, int8_t *zps, void *offsets,
                          float *sums) { return da8w4_pack(&e.raw, by, codes, scales, zps, offsets, sums); };
    uint8_t *const codes = e.packed_codes;
    float *const scales = e.packed_scales, *const offsets = e.packed_offsets, *const sums = e.packed_sums;
    int8_t *const zps = e.packed_zps;
    expect(da8w4_pack(nullptr, &plan, codes, scales, zps, offsets, sums) == bad, "pack without a weight");
    expect(pack(nullptr, codes, scales, zps, offsets, sums) == bad, "pack without a plan");
    expect(pack(&plan, nullptr, scales, zps, offsets, sums) == bad, "pack without codes");
    expect(pack(&plan, codes, nullptr, zps, offsets, sums) == bad, "pack without scales");
    expect(pack(&plan, codes, scales, nullptr, offsets, sums) == bad, "pack without zero points");
    expect(pack(&plan, codes, scales, zps, nullptr, sums) == bad, "pack without offsets");
    expect(pack(&plan, codes, scales, zps, offsets, nullptr) == bad, "pack without sums");

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
        {"type of scales", [](da8w4_packed &p) { p.scale_type = DA8W4_F32; }},
    };
    for (const auto &change : changes) {
        da8w4_packed other = e.packed;
        change.change(other);
        expect(da8w4_pack(&e.raw, &other, e.packed_codes, e.packed_scales, e.packed_zps, e.packed_offsets,
                          e.packed_sums) == bad,
               "a plan of another %s is taken", change.what);
    }
}

// The longest group with |code - zp| up to 143, and one step more.
void check_longest_group(const Trial &) {
    const uint8_t code = 0;
    const float scale = 1;
    da8w4_weight weight = {1, 117323, 117323, DA8W4_CODES_U4, &code, 117323, &scale, nullptr, -128, nullptr};
    da8w4_packed plan;
    da8w4_packed_bytes bytes;
    expect(da8w4_plan_pack(&weight, &plan, &bytes) == DA8W4_OK, "the longest group is refused");
    weight.k = weight.group = 117324;
    expect(da8w4_plan_pack(&weight, &plan, &bytes) == DA8W4_INT32_OVERFLOW, "a longer group is taken");
}

}  // namespace

std::vector<Test> bad_weight_tests() {
    return {
        {"bad_weights", "weights with one thing damaged", std::size(packs), 1, false, check_weight},
        {"bad_pointers", "null pointers to plan, pack and unpack", 1, 1, false, check_null_pointers},
        {"bad_plans", "plans of another weight", 1, 1, false, check_other_plans},
        {"longest_group", "groups whose sums fit int32, and do not", 1, 1, false, check_longest_group},
    };
}

}  // namespace check
