#include "weight.h"

#include <algorithm>
#include <iterator>

#include "floats.h"
#include "harness.h"

namespace check {
namespace {

void draw_codes(Random &random, int lowest, Matrix *w) {
    const bool constant = random.one_in(8);
    const int code = random.one_in(2) ? lowest : lowest + 15;
    w->codes.resize(w->n * w->k);
    for (int &value : w->codes) value = constant ? code : random.between(lowest, lowest + 15);
}

// One zero point; ordinary ones; any; only the two extremes.
void draw_zps(Random &random, int lowest, Matrix *w) {
    const size_t kind = random.below(4);
    const int highest = INT8_MAX - code_offset(*w), one = random.between(INT8_MIN, highest);
    w->one_zp = kind == 0;
    w->zps.resize(w->n * w->groups);
    for (int &value : w->zps)
        value = kind == 0   ? one
                : kind == 1 ? random.between(lowest, lowest + 15)
                : kind == 2 ? random.between(INT8_MIN, highest)
                            : (random.one_in(2) ? INT8_MIN : highest);
}

// Scales, and perhaps offsets, of one type; one value in a few matrices needs a wider type.
void draw_floats(Random &random, Matrix *w) {
    w->scale_type = static_cast<da8w4_type>(random.below(3));
    const bool any_size = random.one_in(4);
    w->scales.resize(w->n * w->groups);
    for (float &value : w->scales)
        value = any_size ? any_finite(random, w->scale_type) : as_type(random.uniform(-0.1f, 0.1f), w->scale_type);
    if (random.one_in(8)) w->scales[random.below(w->scales.size())] = random.uniform(-0.1f, 0.1f);

    if (random.one_in(2)) return;
    const da8w4_type type = random.one_in(4) ? static_cast<da8w4_type>(random.below(3)) : w->scale_type;
    w->offsets.resize(w->n * w->groups);
    for (float &value : w->offsets) value = any_size ? any_finite(random, type) : as_type(random.uniform(-1, 1), type);
    if (random.one_in(8)) w->offsets[random.below(w->offsets.size())] = random.uniform(-1, 1);
}

}  // namespace

const std::vector<Shape> &edge_shapes() {
    static const std::vector<Shape> shapes = [] {
        std::vector<Shape> all;
        const size_t groups[] = {4, 32, 64, 128, 256, 300, 516, 600, 1024};
        for (size_t n : {1, 31, 32, 33, 64, 95})
            for (size_t k : {1, 3, 4, 5, 31, 64, 65, 130, 260, 600, 1100}) {
                for (size_t group : groups)
                    if (group < k) all.push_back({n, k, group});
                all.push_back({n, k, k});
                all.push_back({n, k, k / 4 * 4 + 4});  // longer than k
            }
        return all;
    }();
    return shapes;
}

Matrix random_matrix(Random &random, const Shape &shape) {
    Matrix w = {};
    w.n = shape.n;
    w.k = shape.k;
    w.group = shape.group;
    w.groups = (shape.k + shape.group - 1) / shape.group;
    w.format = static_cast<da8w4_codes>(random.below(4));
    const int lowest = -code_offset(w);
    draw_codes(random, lowest, &w);
    draw_zps(random, lowest, &w);
    draw_floats(random, &w);
    return w;
}

da8w4_type narrowest(const Matrix &w) {
    for (da8w4_type type : {DA8W4_F16, DA8W4_BF16}) {
        bool exact = true;
        for (const std::vector<float> *values : {&w.scales, &w.offsets})
            for (float value : *values) exact = exact && same_bits(value, as_type(value, type));
        if (exact) return type;
    }
    return DA8W4_F32;
}

RawWeight raw_weight(Random &random, const Matrix &w, bool at_end) {
    const bool nibbles = w.format >= DA8W4_CODES_LOW_FIRST;
    const size_t row_bytes = nibbles ? (w.k + 1) / 2 : w.k, stride = row_bytes + random.below(2) * random.below(9);
    std::vector<uint8_t> codes((w.n - 1) * stride + row_bytes, 0xff);
    for (size_t n = 0; n < w.n; n++)
        for (size_t k = 0; k < w.k; k++) {
            uint8_t &byte = codes[n * stride + (nibbles ? k / 2 : k)];
            const int code = w.codes[n * w.k + k], shift = (k % 2 != 0) == (w.format == DA8W4_CODES_LOW_FIRST) ? 4 : 0;
            byte = static_cast<uint8_t>(nibbles ? (byte & ~(15 << shift)) | code << shift : code);
        }
    RawWeight raw = {Guarded(codes, at_end),
                     Guarded(w.scales, at_end),
                     Guarded(std::vector<int8_t>(w.zps.begin(), w.zps.end()), at_end),
                     Guarded(w.offsets, at_end),
                     {}};
    const bool give_zps = !w.one_zp || random.one_in(2);
    raw.view = {w.n,
                w.k,
                w.group,
                w.format,
                raw.codes.as(),
                stride,
                raw.scales.as<float>(),
                give_zps ? raw.zps.as<int8_t>() : nullptr,
                give_zps ? 99 : w.zps[0],
                w.offsets.empty() ? nullptr : raw.offsets.as<float>()};
    return raw;
}

PackedArrays::PackedArrays(const da8w4_packed_bytes &bytes, bool at_end)
    : codes(bytes.codes, at_end),
      scales(bytes.scales, at_end),
      zps(bytes.zps, at_end),
      offsets(bytes.offsets, at_end),
      sums(bytes.sums, at_end) {}

da8w4_packed PackedArrays::view(const da8w4_packed &plan) const {
    da8w4_packed packed = plan;
    packed.codes = codes.as();
    packed.scales = scales.as();
    packed.zps = zps.bytes() ? zps.as<int8_t>() : nullptr;
    packed.offsets = offsets.bytes() ? offsets.as() : nullptr;
    packed.sums = sums.as<float>();
    return packed;
}

da8w4_status PackedArrays::pack(const RawWeight &raw, const da8w4_packed &plan) const {
    return da8w4_pack(&raw.view, &plan, codes.as(), scales.as(), zps.bytes() ? zps.as<int8_t>() : nullptr,
                      offsets.bytes() ? offsets.as() : nullptr, sums.as<float>());
}

void PackedArrays::dirty_padding(const da8w4_packed &plan) const {
    const size_t quads = (plan.k + 3) / 4, groups = (plan.k + plan.group - 1) / plan.group;
    for (size_t column = 0; column < (plan.n + 31) / 32 * 32; column++) {
        const size_t block = column / 32, n = column % 32;
        const uint8_t nibble = n < 16 ? 0x0f : 0xf0;
        for (size_t k = column < plan.n ? plan.k : 0; k < quads * 4; k++)
            codes.as()[(block * quads + k / 4) * 64 + n % 16 * 4 + k % 4] |= nibble;
        if (column < plan.n) continue;
        for (size_t g = 0; g < groups; g++) {
            const size_t at = (block * groups + g) * 32 + n, size = size_of(plan.scale_type);
            memset(scales.as() + at * size, 0xff, size);
            if (offsets.bytes()) memset(offsets.as() + at * size, 0xff, size);
            if (zps.bytes()) zps.as()[at] = 1;
        }
        memset(sums.as<float>() + column, 0xff, sizeof(float));
    }
}

Weight packed_weight(const Random &random, Matrix matrix) {
    Random draws = random.child("packing");
    const bool at_end = !draws.one_in(4);
    const RawWeight raw = raw_weight(draws, matrix, at_end);
    da8w4_packed plan = {};
    da8w4_packed_bytes bytes = {};
    da8w4_set_num_threads(1 + draws.below(3));
    const da8w4_status planned = da8w4_plan_pack(&raw.view, &plan, &bytes);
    PackedArrays arrays(bytes, at_end);
    const da8w4_status packed = arrays.pack(raw, plan);
    if (planned != DA8W4_OK || packed != DA8W4_OK)
        expect(false, "plan: %s; pack: %s", da8w4_status_text(planned), da8w4_status_text(packed));
    else
        arrays.dirty_padding(plan);
    const da8w4_packed view = arrays.view(plan);
    return {std::move(matrix), std::move(arrays), view};
}

Weight random_weight(const Random &random, const Shape &shape) {
    Random draws = random.child("weight");
    return packed_weight(random, random_matrix(draws, shape));
}

}  // namespace check
