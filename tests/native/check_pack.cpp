// da8w4_plan_pack, da8w4_pack, da8w4_unpack: what they store, whatever lay in the arrays and however many threads there
// are, and what they refuse wherever it is.
#include <algorithm>
#include <cmath>

#include "floats.h"
#include "harness.h"
#include "weight.h"

namespace check {
namespace {

bool plan_is_right(const Matrix &w, const da8w4_packed &plan, const da8w4_packed_bytes &bytes) {
    const size_t padded = (w.n + 31) / 32 * 32;
    const bool one_zp = std::count(w.zps.begin(), w.zps.end(), w.zps[0]) == static_cast<ptrdiff_t>(w.zps.size());
    return plan.n == w.n && plan.k == w.k && plan.scale_type == narrowest(w) && plan.group == std::min(w.group, w.k) &&
           plan.zp == (one_zp ? w.zps[0] + code_offset(w) : 0) && bytes.codes == padded / 2 * ((w.k + 3) / 4 * 4) &&
           bytes.scales == padded * w.groups * size_of(plan.scale_type) &&
           bytes.zps == (one_zp ? 0 : padded * w.groups) && bytes.offsets == (w.offsets.empty() ? 0 : bytes.scales) &&
           bytes.sums == padded * sizeof(float);
}

std::vector<const Guarded *> all_of(const PackedArrays &arrays) {
    return {&arrays.codes, &arrays.scales, &arrays.zps, &arrays.offsets, &arrays.sums};
}

std::vector<uint8_t> contents(const PackedArrays &arrays) {
    std::vector<uint8_t> all;
    for (const Guarded *array : all_of(arrays)) all.insert(all.end(), array->as(), array->as() + array->bytes());
    return all;
}

// One code out of range is found wherever it is.
void check_bad_code(Random &random, const Matrix &w, const RawWeight &raw, const da8w4_packed &plan,
                    const PackedArrays &arrays) {
    if (w.format >= DA8W4_CODES_LOW_FIRST) return;
    const size_t n = random.below(w.n), k = random.below(w.k);
    uint8_t &code = raw.codes.as()[n * raw.view.codes_stride + k];
    const uint8_t good = code;
    code = static_cast<uint8_t>((w.format == DA8W4_CODES_S4 ? 8 : 16) + random.below(240));
    const da8w4_status refused = arrays.pack(raw, plan);
    expect(refused == DA8W4_BAD_CODE, "code %d at [%zu][%zu]: %s", code, n, k, da8w4_status_text(refused));
    code = good;
}

// So is one value that is not finite, and one zero point that is too high.
void check_bad_values(Random &random, const Matrix &w, const RawWeight &raw, size_t at) {
    const size_t last = w.n * w.groups - 1;
    const auto status = [&] {
        da8w4_packed plan;
        da8w4_packed_bytes bytes;
        return da8w4_plan_pack(&raw.view, &plan, &bytes);
    };
    const auto refused = [&](float *value, float bad, da8w4_status want) {
        const float good = *value;
        *value = bad;
        const da8w4_status got = status();
        *value = good;
        return got == want;
    };
    const float bad = random.one_in(2) ? NAN : -INFINITY;
    expect(refused(raw.scales.as<float>() + at, bad, DA8W4_BAD_SCALE), "scale %f at %zu of %zu", bad, at, last);
    if (raw.view.offsets)
        expect(refused(raw.offsets.as<float>() + at, bad, DA8W4_BAD_OFFSET), "offset %f at %zu of %zu", bad, at, last);
    if (!raw.view.zps || w.format != DA8W4_CODES_S4) return;
    int8_t &zp = raw.zps.as<int8_t>()[at];
    const int8_t good = zp;
    zp = static_cast<int8_t>(random.between(120, 127));
    expect(status() == DA8W4_BAD_WEIGHT_ZP, "zero point %d of -8..7 at %zu of %zu", zp, at, last);
    zp = good;
}

// Packed bytes may be hashed: they must not depend on what lay in the arrays, nor on threads.
void check_same_again(Random &random, const RawWeight &raw, const da8w4_packed &plan, const PackedArrays &arrays,
                      const std::vector<uint8_t> &want) {
    for (const Guarded *array : all_of(arrays)) memset(array->as(), 0, array->bytes());
    da8w4_set_num_threads(1 + random.below(3));
    (void)arrays.pack(raw, plan);
    expect(contents(arrays) == want, "packing twice gives different bytes");
}

void check_unpacking(Random &random, const Matrix &w, const da8w4_packed &packed, bool at_end) {
    const Guarded codes(w.n * w.k, at_end), scales(w.scales.size() * sizeof(float), at_end), zps(w.zps.size(), at_end),
        offsets(w.offsets.size() * sizeof(float), at_end);
    FloatMode mode(random.one_in(4));
    const da8w4_status status = da8w4_unpack(&packed, codes.as(), scales.as<float>(), zps.as<int8_t>(),
                                             packed.offsets ? offsets.as<float>() : nullptr);
    expect(mode.restore(), "unpack changed the caller's floating-point mode");
    bool same = status == DA8W4_OK && memcmp(scales.as(), w.scales.data(), scales.bytes()) == 0;
    same = same && (w.offsets.empty() || memcmp(offsets.as(), w.offsets.data(), offsets.bytes()) == 0);
    for (size_t i = 0; i < w.codes.size(); i++) same = same && codes.as()[i] == w.codes[i] + code_offset(w);
    for (size_t i = 0; i < w.zps.size(); i++) same = same && zps.as<int8_t>()[i] == w.zps[i] + code_offset(w);
    expect(same, "unpacking does not give back what was packed");
}

// The first packing is done by at least `threads` threads, and at most three.
void check_pack(const Trial &trial, const Shape &shape, size_t threads) {
    Random random = trial.random;
    const Matrix w = random_matrix(random, shape);
    const bool at_end = !random.one_in(4);
    now(nullptr, "pack n=%zu k=%zu group=%zu format=%d scales=%s offsets=%d", w.n, w.k, w.group, w.format,
        name_of(w.scale_type), !w.offsets.empty());
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
    expect(plan_is_right(w, plan, bytes), "the plan has scales %s, group %zu, zp %d", name_of(plan.scale_type),
           plan.group, plan.zp);
    const std::vector<uint8_t> first = contents(arrays);
    check_bad_code(random, w, raw, plan, arrays);
    for (size_t at : {random.below(w.scales.size()), w.scales.size() - 1}) check_bad_values(random, w, raw, at);
    check_same_again(random, raw, plan, arrays, first);
    check_unpacking(random, w, arrays.view(plan), at_end);
}

// Large enough that several threads share the scales, the codes and the rows.
const Shape large_shapes[] = {{330, 1100, 4}, {330, 1030, 1030}, {33, 4100, 128}, {1100, 130, 32}};

}  // namespace

std::vector<Test> pack_tests() {
    return {
        {"pack", "plan, pack and unpack weights of every edge", edge_shapes().size(), 9, true,
         [](const Trial &trial) { check_pack(trial, edge_shapes()[trial.index], 1); }},
        {"pack_large", "the same with three threads", 4 * std::size(large_shapes), 1, true,
         [](const Trial &trial) { check_pack(trial, large_shapes[trial.index % std::size(large_shapes)], 3); }},
    };
}

}  // namespace check
