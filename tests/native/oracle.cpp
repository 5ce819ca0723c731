#include "oracle.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "floats.h"

namespace check {
namespace {

constexpr float kLeastScale = 0x1p-126f;

// The scale of values that are to reach `highest`, or NaN.
float symmetric_scale(const float *x, size_t count, float highest) {
    float magnitude = 0;
    for (size_t i = 0; i < count; i++) {
        if (!std::isfinite(x[i])) return float_of(0x7fc00000);
        magnitude = std::max(magnitude, std::fabs(x[i]));
    }
    return std::max(magnitude / highest, kLeastScale);
}

// Appends the values over the scale, or zeros where that is NaN.
void append_symmetric(const float *x, size_t count, float scale, float highest, std::vector<int> *to) {
    const float inverse = 1.0f / scale;
    for (size_t i = 0; i < count; i++)
        to->push_back(
            std::isnan(scale) ? 0 : static_cast<int>(std::clamp(std::nearbyint(x[i] * inverse), -highest, highest)));
}

Row quantized_uint8(const std::vector<float> &x) {
    float low = 0, high = 0;
    bool finite = true;
    for (float value : x) {
        finite = finite && std::isfinite(value);
        if (value < low) low = value;
        if (value > high) high = value;
    }
    float s = (high - low) / 255.0f;
    if (!finite || !std::isfinite(s)) return {std::vector<int>(x.size(), 128), float_of(0x7fc00000), 128, {}};
    s = std::max(s, kLeastScale);
    const float z = std::clamp(-std::nearbyint(low / s), 0.0f, 255.0f), inverse = 1.0f / s;
    Row row = {{}, s, static_cast<int>(z), {}};
    for (float value : x)
        row.act.push_back(static_cast<int>(std::clamp(std::nearbyint(value * inverse) + z, 0.0f, 255.0f)));
    return row;
}

// The integer sums of one group of a column.
struct GroupSums {
    int64_t dot, act;
    float dot_of_halves;  // 256 * that of the upper bytes + that of the lower ones, as float32 adds them
};

GroupSums sums_of(const Matrix &w, const Row &row, int c, size_t n, size_t g) {
    GroupSums sums = {};
    int64_t upper = 0, lower = 0;
    for (size_t k = g * w.group; k < std::min(w.k, (g + 1) * w.group); k++) {
        const int value = w.value(n, k) - w.zps[n * w.groups + g], act = row.act[k] - c;
        const int high = (act + 32768 + 128) / 256 - 128;
        sums.dot += act * value;
        sums.act += act;
        upper += high * value;
        lower += (act - 256 * high) * value;
    }
    sums.dot_of_halves = std::fma(256.0f, static_cast<float>(upper), static_cast<float>(lower));
    return sums;
}

// What a group adds to an output.
float add_group(float acc, const Matrix &w, const Row &row, da8w4_scheme scheme, size_t n, size_t g) {
    const GroupSums sums = sums_of(w, row, scheme == DA8W4_ACT_UINT8 ? 128 : 0, n, g);
    float dot = static_cast<float>(sums.dot), scale = w.scale(n, g), act = static_cast<float>(sums.act);
    if (scheme == DA8W4_ACT_INT16) dot = sums.dot_of_halves;
    if (scheme == DA8W4_ACT_INT8_GROUP) scale *= row.group_scales[g], act *= row.group_scales[g];
    acc = std::fma(dot, scale, acc);
    return w.offsets.empty() ? acc : std::fma(act, w.offset(n, g), acc);
}

// Each stage of a block makes a new row of the old one.
std::vector<float> rotated(std::vector<float> row, size_t rotation) {
    for (size_t begin = 0, block = rotation; begin < row.size() && rotation; begin += block) {
        while (begin + block > row.size()) block /= 2;
        for (size_t stride = 1; stride < block; stride *= 2) {
            const std::vector<float> old = row;
            for (size_t i = 0; i < block; i++) {
                const float *at = &old[begin + i];
                row[begin + i] = i & stride ? at[-static_cast<ptrdiff_t>(stride)] - at[0] : at[0] + at[stride];
            }
        }
    }
    return row;
}

}  // namespace

std::vector<float> transformed(const Matrix &w, const std::vector<float> &x) {
    std::vector<float> to;
    for (size_t k = 0; k < x.size(); k++) {
        const float value = w.perm.empty() ? x[k] : x[static_cast<size_t>(w.perm[k])];
        to.push_back(w.factors.empty() ? value : value * w.factors[k]);
    }
    return rotated(std::move(to), w.rotation);
}

Row quantized(const std::vector<float> &x, da8w4_scheme scheme, size_t group) {
    if (scheme == DA8W4_ACT_UINT8) return quantized_uint8(x);
    const bool by_group = scheme == DA8W4_ACT_INT8_GROUP;
    const float highest = scheme == DA8W4_ACT_INT16 ? 32512 : 127;
    Row row = {{}, 1, 0, {}};
    for (size_t k = 0, count; k < x.size(); k += count) {
        count = by_group ? std::min(group, x.size() - k) : x.size();
        row.scale = symmetric_scale(&x[k], count, highest);
        append_symmetric(&x[k], count, row.scale, highest, &row.act);
        if (by_group) row.group_scales.push_back(row.scale);
    }
    return row;
}

float product(const Matrix &w, const Row &row, da8w4_scheme scheme, size_t n, const float *bias) {
    float acc = 0;
    for (size_t g = 0; g < w.groups; g++) acc = add_group(acc, w, row, scheme, n, g);
    if (scheme == DA8W4_ACT_INT8_GROUP) return bias ? acc + bias[n] : acc;
    const int zp = row.zp - (scheme == DA8W4_ACT_UINT8 ? 128 : 0);
    if (zp) acc = std::fma(-static_cast<float>(zp), column_sum(w, n), acc);
    return bias ? std::fma(acc, row.scale, bias[n]) : acc * row.scale;
}

float column_sum(const Matrix &w, size_t n) {
    float column = 0;
    for (size_t g = 0; g < w.groups; g++) {
        const size_t begin = g * w.group, end = std::min(w.k, begin + w.group);
        int64_t sum = 0;
        for (size_t k = begin; k < end; k++) sum += w.value(n, k) - w.zps[n * w.groups + g];
        column = std::fma(static_cast<float>(sum), w.scale(n, g), column);
        if (!w.offsets.empty()) column = std::fma(static_cast<float>(end - begin), w.offset(n, g), column);
    }
    return column;
}

std::vector<float> dequantized(const Matrix &w, size_t n) {
    std::vector<float> values, to(w.k);
    for (size_t k = 0; k < w.k; k++) {
        const size_t g = k / w.group;
        values.push_back(static_cast<float>(w.value(n, k) - w.zps[n * w.groups + g]) * w.scale(n, g));
        if (!w.offsets.empty()) values[k] += w.offset(n, g);
    }
    values = rotated(std::move(values), w.rotation);
    for (size_t k = 0; k < w.k; k++)
        to[w.perm.empty() ? k : static_cast<size_t>(w.perm[k])] =
            w.factors.empty() ? values[k] : values[k] * w.factors[k];
    return to;
}

}  // namespace check
