#include "weight.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "floats.h"
#include "harness.h"
#include "oracle.h"

namespace check {
namespace {

// Those of NF4 and MXFP4, which people have; any; only the two extremes, one of them.
void draw_table(Random &random, Matrix *w) {
    const int iq4_nl[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    const size_t style = random.below(4);
    const int extreme = random.one_in(2) ? INT8_MIN : INT8_MAX;
    for (int value : iq4_nl)
        w->table.push_back(style == 0   ? value
                           : style == 1 ? (random.one_in(2) ? INT8_MIN : INT8_MAX)
                           : style == 2 ? extreme
                                        : random.between(INT8_MIN, INT8_MAX));
}

da8w4_codes random_format(Random &random, da8w4_kind kind) {
    switch (kind) {
        case DA8W4_INT4: return static_cast<da8w4_codes>(random.below(4));
        case DA8W4_INT8: return DA8W4_CODES_SIGNED;
        case DA8W4_TABLE4: {
            const da8w4_codes formats[] = {DA8W4_CODES_UNSIGNED, DA8W4_CODES_LOW_FIRST, DA8W4_CODES_HIGH_FIRST};
            return formats[random.below(3)];
        }
        default: return random.one_in(2) ? DA8W4_CODES_SIGNED : DA8W4_CODES_UNSIGNED;
    }
}

void draw_codes(Random &random, Matrix *w) {
    const int lowest = lowest_code(*w), highest = highest_code(*w), code = random.one_in(2) ? lowest : highest;
    const bool constant = random.one_in(8);
    w->codes.resize(w->n * w->k);
    for (int &value : w->codes) value = constant ? code : random.between(lowest, highest);
}

// One zero point, which may be 0; ordinary ones; any; only the two extremes. A table has none.
void draw_zps(Random &random, Matrix *w) {
    const size_t style = w->has_table() ? 0 : random.below(4);
    const int least = lowest_code(*w), most = highest_code(*w), highest = INT8_MAX - code_offset(*w);
    const bool none = w->has_table() || (w->kind == DA8W4_INT8 && random.one_in(2));
    const int one = none ? 0 : random.between(INT8_MIN, highest);
    w->one_zp = style == 0;
    w->zps.resize(w->n * w->groups);
    for (int &value : w->zps)
        value = style == 0   ? one
                : style == 1 ? random.between(least, most)
                : style == 2 ? random.between(INT8_MIN, highest)
                             : (random.one_in(2) ? INT8_MIN : highest);
}

// A float of the type. Where there are two levels, one whose products with any 8 bits are exact and finite.
float draw_float(Random &random, const Matrix &w, da8w4_type type, bool any_size, float range) {
    const float value = any_size ? any_finite(random, type) : as_type(random.uniform(-range, range), type);
    if (!w.super) return value;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const float shorter = float_of(bits & ~uint32_t{255});
    return std::fabs(shorter) > 1e36f ? shorter / 256 : shorter;
}

// Values of one type, or, in a few matrices, one of them of a wider one.
std::vector<float> draw_floats(Random &random, const Matrix &w, da8w4_type type, bool any_size, float range) {
    std::vector<float> values(w.n * w.rows);
    for (float &value : values) value = draw_float(random, w, type, any_size, range);
    if (random.one_in(8)) values[random.below(values.size())] = draw_float(random, w, DA8W4_F32, false, range);
    return values;
}

std::vector<int> draw_sub(Random &random, const Matrix &w, da8w4_type *type) {
    if (!w.super) return {};
    *type = random.one_in(2) ? DA8W4_U8 : DA8W4_S8;
    const int low = *type == DA8W4_U8 ? 0 : INT8_MIN;
    const bool extremes = random.one_in(4);
    std::vector<int> values(w.n * w.groups);
    for (int &value : values) value = extremes ? low + (random.one_in(2) ? 255 : 0) : random.between(low, low + 255);
    return values;
}

void draw_levels(Random &random, Matrix *w) {
    if (random.one_in(3)) w->super = random.one_in(2) ? 8 * (1 + random.below(2)) : 1 + random.below(w->groups + 1);
    w->rows = w->super ? (w->groups + w->super - 1) / w->super : w->groups;
    w->scale_type = static_cast<da8w4_type>(random.below(3));
    const bool any_size = random.one_in(4);
    w->scales = draw_floats(random, *w, w->scale_type, any_size, 0.1f);
    w->sub_scales = draw_sub(random, *w, &w->sub_scale_type);
    if (random.one_in(2)) return;
    const da8w4_type type = random.one_in(4) ? static_cast<da8w4_type>(random.below(3)) : w->scale_type;
    w->offsets = draw_floats(random, *w, type, any_size, 1);
    w->sub_offsets = draw_sub(random, *w, &w->sub_offset_type);
}

// The reverse of k, blocks of k in another order, or any.
void draw_perm(Random &random, Matrix *w) {
    const size_t style = random.below(3), block = size_t{1} << random.below(6);
    for (size_t k = 0; k < w->k; k++) w->perm.push_back(static_cast<int32_t>(k));
    if (style == 0) std::reverse(w->perm.begin(), w->perm.end());
    if (style == 1) std::rotate(w->perm.begin(), w->perm.begin() + static_cast<ptrdiff_t>(block % w->k), w->perm.end());
    for (size_t k = w->k; style == 2 && k > 1; k--) std::swap(w->perm[k - 1], w->perm[random.below(k)]);
}

// Ordinary ones of both signs; of any size, whose products overflow and underflow; a zero or a NaN among them.
void draw_factors(Random &random, Matrix *w) {
    const size_t style = random.below(12);
    for (size_t k = 0; k < w->k; k++)
        w->factors.push_back(style == 0   ? any_finite(random, DA8W4_F32)
                             : style == 1 ? random.uniform(0, 1) * 1e-38f
                                          : random.uniform(-2, 2));
    if (style == 2) w->factors[random.below(w->k)] = 0;
    if (style == 3) w->factors[random.below(w->k)] = float_of(0xffc00000);
}

// Where docs/packed-format.md puts the code of a column and k: the lines of a block, and the bits of a code there.
struct Layout {
    size_t bits, quads, lines;

    explicit Layout(const Matrix &w) : Layout(w.kind, w.k) {}
    Layout(da8w4_kind kind, size_t k)
        : bits(static_cast<size_t>(bits_of(kind))),
          quads((k + 3) / 4),
          lines(bits == 4   ? quads
                : bits == 5 ? (quads + 3) / 4 * 5
                : bits == 6 ? (quads + 1) / 2 * 3
                            : quads * 2) {}
    // How many k the lines have room for.
    size_t room() const { return (bits == 5 ? (quads + 3) / 4 * 4 : bits == 6 ? (quads + 1) / 2 * 2 : quads) * 4; }

    void put(uint8_t *codes, size_t column, size_t k, unsigned code) const {
        const size_t n = column % 16, half = column / 16 % 2, quad = k / 4, byte = n * 4 + k % 4;
        uint8_t *const block = codes + column / 32 * lines * 64;
        const auto add = [&](size_t line, unsigned value) {
            block[line * 64 + byte] = static_cast<uint8_t>(block[line * 64 + byte] | value);
        };
        const unsigned low = (code & 15) << (4 * half), high = code >> 4;
        switch (bits) {
            case 4: add(quad, low); break;
            case 5:
                add(quad / 4 * 5 + quad % 4, low);
                add(quad / 4 * 5 + 4, high << (quad % 4 * 2 + half));
                break;
            case 6:
                add(quad / 2 * 3 + quad % 2, low);
                add(quad / 2 * 3 + 2, high << 2 * (quad % 2 * 2 + half));
                break;
            default: add(quad * 2 + half, code);
        }
    }
};

// [columns][rows] in blocks of 32 columns, [blocks][rows][32]; beyond the columns zeros.
template <class T, class Put>
void append_blocks(const std::vector<T> &values, size_t n, size_t rows, size_t size, Put put_one,
                   std::vector<uint8_t> *to) {
    if (values.empty()) return;
    const size_t begin = to->size();
    to->resize(begin + (n + 31) / 32 * 32 * rows * size);
    for (size_t column = 0; column < n; column++)
        for (size_t row = 0; row < rows; row++)
            put_one(&(*to)[begin + ((column / 32 * rows + row) * 32 + column % 32) * size],
                    values[column * rows + row]);
}

}  // namespace

const std::vector<Shape> &edge_shapes() {
    static const std::vector<Shape> shapes = [] {
        std::vector<Shape> all;
        const size_t groups[] = {4, 32, 64, 128, 256, 300, 516, 600, 1024, 8, 12, 16, 20, 24, 48, 320, 512};
        size_t turn = 0;
        for (size_t n : {1, 31, 32, 33, 64, 95})
            for (size_t k : {1, 3, 4, 5, 31, 64, 65, 130, 260, 600, 1100}) {
                // Two of three groups, not the same for each n.
                for (size_t group : groups)
                    if (group < k && turn++ % 3) all.push_back({n, k, group});
                all.push_back({n, k, k});
                all.push_back({n, k, k / 4 * 4 + 4});  // longer than k
            }
        return all;
    }();
    return shapes;
}

int bits_of(da8w4_kind kind) { return kind == DA8W4_INT5 ? 5 : kind == DA8W4_INT6 ? 6 : kind == DA8W4_INT8 ? 8 : 4; }

int lowest_code(const Matrix &w) { return w.format == DA8W4_CODES_SIGNED ? -(1 << (bits_of(w.kind) - 1)) : 0; }
int highest_code(const Matrix &w) { return lowest_code(w) + (1 << bits_of(w.kind)) - 1; }
int code_offset(const Matrix &w) { return w.kind == DA8W4_INT8 ? 0 : -lowest_code(w); }

bool same_zps(const Matrix &w) {
    return std::all_of(w.zps.begin(), w.zps.end(), [&](int zp) { return zp == w.zps[0]; });
}

Matrix random_matrix(Random &random, const Shape &shape) {
    return random_matrix(random, shape, random.one_in(4) ? DA8W4_INT4 : all_kinds[random.below(std::size(all_kinds))]);
}

Matrix random_matrix(Random &random, const Shape &shape, da8w4_kind kind) {
    Matrix w = {};
    w.n = shape.n;
    w.k = shape.k;
    w.group = shape.group;
    w.groups = (shape.k + shape.group - 1) / shape.group;
    w.kind = kind;
    w.format = random_format(random, kind);
    if (w.has_table()) draw_table(random, &w);
    draw_codes(random, &w);
    draw_zps(random, &w);
    draw_levels(random, &w);
    if (random.one_in(4)) draw_perm(random, &w);
    if (random.one_in(4)) draw_factors(random, &w);
    if (random.one_in(4)) w.rotation = size_t{2} << random.below(10);
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
    const auto bytes = [&](const std::vector<int> &values) {
        return Guarded(std::vector<uint8_t>(values.begin(), values.end()), at_end);
    };
    RawWeight raw = {Guarded(codes, at_end),
                     bytes(w.table),
                     Guarded(w.scales, at_end),
                     bytes(w.sub_scales),
                     bytes(w.zps),
                     Guarded(w.offsets, at_end),
                     bytes(w.sub_offsets),
                     {}};
    const bool give_zps = !w.one_zp || random.one_in(2), offsets = !w.offsets.empty();
    raw.view = {
        .n = w.n,
        .k = w.k,
        .group = w.group,
        .super = w.super,
        .kind = w.kind,
        .format = w.format,
        .codes = raw.codes.as(),
        .codes_stride = stride,
        .table = w.has_table() ? raw.table.as<int8_t>() : nullptr,
        .scales = raw.scales.as<float>(),
        .sub_scales = w.super ? raw.sub_scales.as() : nullptr,
        .sub_scale_type = w.sub_scale_type,
        .zps = give_zps ? raw.zps.as<int8_t>() : nullptr,
        .zp = give_zps ? 99 : w.zps[0],
        .offsets = offsets ? raw.offsets.as<float>() : nullptr,
        .sub_offsets = w.super && offsets ? raw.sub_offsets.as() : nullptr,
        .sub_offset_type = w.sub_offset_type,
    };
    return raw;
}

PackedArrays::PackedArrays(const da8w4_packed_bytes &bytes, bool at_end)
    : codes(bytes.codes, at_end),
      scales(bytes.scales, at_end),
      sub_scales(bytes.sub_scales, at_end),
      zps(bytes.zps, at_end),
      offsets(bytes.offsets, at_end),
      sub_offsets(bytes.sub_offsets, at_end),
      sums(bytes.sums, at_end) {}

da8w4_packed PackedArrays::view(const da8w4_packed &plan, const Guarded &table) const {
    const auto given = [](const Guarded &array) { return array.bytes() ? array.as() : nullptr; };
    da8w4_packed packed = plan;
    packed.codes = codes.as();
    packed.table = table.bytes() ? table.as<int8_t>() : nullptr;
    packed.scales = scales.as();
    packed.sub_scales = given(sub_scales);
    packed.zps = zps.bytes() ? zps.as<int8_t>() : nullptr;
    packed.offsets = given(offsets);
    packed.sub_offsets = given(sub_offsets);
    packed.sums = sums.as<float>();
    packed.perm = nullptr;
    packed.factors = nullptr;
    packed.rotation = 0;
    return packed;
}

// Arrays of no bytes have a pointer, too, mostly one that faults.
da8w4_status PackedArrays::pack(const RawWeight &raw, const da8w4_packed &plan) const {
    const da8w4_packed_arrays to = {
        .codes = codes.as(),
        .scales = scales.as(),
        .sub_scales = sub_scales.as(),
        .zps = zps.as<int8_t>(),
        .offsets = offsets.as(),
        .sub_offsets = sub_offsets.as(),
        .sums = sums.as<float>(),
    };
    return da8w4_pack(&raw.view, &plan, &to);
}

void PackedArrays::dirty_padding(const da8w4_packed &plan) const {
    const Layout layout(plan.kind, plan.k);
    const size_t groups = (plan.k + plan.group - 1) / plan.group;
    const size_t rows = plan.super ? (groups + plan.super - 1) / plan.super : groups;
    const unsigned all_bits = (1U << layout.bits) - 1;
    for (size_t column = 0; column < (plan.n + 31) / 32 * 32; column++) {
        for (size_t k = column < plan.n ? plan.k : 0; k < layout.room(); k++)
            layout.put(codes.as(), column, k, all_bits);
        if (column < plan.n) continue;
        const auto dirty = [&](const Guarded &array, size_t length, size_t size, int byte) {
            for (size_t row = 0; array.bytes() && row < length; row++)
                memset(array.as() + ((column / 32 * length + row) * 32 + column % 32) * size, byte, size);
        };
        dirty(scales, rows, size_of(plan.scale_type), 0xff);
        dirty(offsets, rows, size_of(plan.scale_type), 0xff);
        dirty(sub_scales, groups, 1, 0xff);
        dirty(sub_offsets, groups, 1, 0xff);
        dirty(zps, groups, 1, 1);
        dirty(sums, 1, sizeof(float), 0xff);
    }
}

std::vector<uint8_t> PackedArrays::contents() const {
    std::vector<uint8_t> all;
    for (const Guarded *array : {&codes, &scales, &sub_scales, &zps, &offsets, &sub_offsets, &sums})
        all.insert(all.end(), array->as(), array->as() + array->bytes());
    return all;
}

std::vector<uint8_t> packed_contents(const Matrix &w) {
    const Layout layout(w);
    const int offset = w.kind == DA8W4_INT8 ? 128 : code_offset(w);
    std::vector<uint8_t> all((w.n + 31) / 32 * layout.lines * 64);
    for (size_t n = 0; n < w.n; n++)
        for (size_t k = 0; k < w.k; k++)
            layout.put(all.data(), n, k, static_cast<unsigned>(w.codes[n * w.k + k] + offset));
    const da8w4_type type = narrowest(w);
    const auto put_float = [&](uint8_t *to, float value) { put(to, value, type); };
    const auto put_byte = [](uint8_t *to, int value) { *to = static_cast<uint8_t>(value); };
    const auto put_zp = [&](uint8_t *to, int value) { put_byte(to, value + code_offset(w)); };
    std::vector<float> sums;
    for (size_t n = 0; n < w.n; n++) sums.push_back(column_sum(w, n));
    append_blocks(w.scales, w.n, w.rows, size_of(type), put_float, &all);
    append_blocks(w.sub_scales, w.n, w.groups, 1, put_byte, &all);
    if (!same_zps(w)) append_blocks(w.zps, w.n, w.groups, 1, put_zp, &all);
    append_blocks(w.offsets, w.n, w.rows, size_of(type), put_float, &all);
    append_blocks(w.sub_offsets, w.n, w.groups, 1, put_byte, &all);
    append_blocks(sums, w.n, 1, sizeof(float), [](uint8_t *to, float value) { put(to, value, DA8W4_F32); }, &all);
    return all;
}

Weight packed_weight(const Random &random, Matrix matrix) {
    Random draws = random.child("packing");
    const bool at_end = !draws.one_in(4);
    RawWeight raw = raw_weight(draws, matrix, at_end);
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
    Guarded perm(matrix.perm, at_end), factors(matrix.factors, at_end);
    da8w4_packed view = arrays.view(plan, raw.table);
    if (perm.bytes()) view.perm = perm.as<int32_t>();
    if (factors.bytes()) view.factors = factors.as<float>();
    view.rotation = matrix.rotation;
    return {std::move(matrix), std::move(arrays), std::move(raw.table), std::move(perm), std::move(factors), view};
}

Weight random_weight(const Random &random, const Shape &shape) {
    Random draws = random.child("weight");
    return packed_weight(random, random_matrix(draws, shape));
}

}  // namespace check
