#include "oracle.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "floats.h"

namespace check {

Row quantized(const std::vector<float> &x, bool symmetric) {
    float low = 0, high = 0;
    bool finite = true;
    for (float value : x) {
        finite = finite && std::isfinite(value);
        if (value < low) low = value;
        if (value > high) high = value;
    }
    float s = symmetric ? std::max(-low, high) / 127.0f : (high - low) / 255.0f;
    const int neutral = symmetric ? 0 : 128;
    if (!finite || !std::isfinite(s)) return {std::vector<int>(x.size(), neutral), float_of(0x7fc00000), neutral};
    s = std::max(s, 0x1p-126f);
    const float z = symmetric ? 0.0f : std::clamp(-std::nearbyint(low / s), 0.0f, 255.0f);
    const float inverse = 1.0f / s;
    Row row = {{}, s, static_cast<int>(z)};
    for (float value : x)
        row.act.push_back(static_cast<int>(
            std::clamp(std::nearbyint(value * inverse) + z, symmetric ? -127.0f : 0.0f, symmetric ? 127.0f : 255.0f)));
    return row;
}

float product(const Matrix &w, const Row &row, int c, size_t n, const float *bias) {
    float acc = 0, column = 0;
    for (size_t g = 0; g < w.groups; g++) {
        int64_t dot = 0, sum = 0, act = 0;
        const size_t begin = g * w.group, end = std::min(w.k, begin + w.group);
        for (size_t k = begin; k < end; k++) {
            const int value = w.codes[n * w.k + k] - w.zps[n * w.groups + g];
            dot += (row.act[k] - c) * value;
            sum += value;
            act += row.act[k] - c;
        }
        acc = std::fma(static_cast<float>(dot), w.scales[n * w.groups + g], acc);
        column = std::fma(static_cast<float>(sum), w.scales[n * w.groups + g], column);
        if (w.offsets.empty()) continue;
        acc = std::fma(static_cast<float>(act), w.offsets[n * w.groups + g], acc);
        column = std::fma(static_cast<float>(end - begin), w.offsets[n * w.groups + g], column);
    }
    const int zp = row.zp - c;
    const float t = zp == 0 ? acc : std::fma(-static_cast<float>(zp), column, acc);
    return bias ? std::fma(t, row.scale, bias[n]) : t * row.scale;
}

}  // namespace check
