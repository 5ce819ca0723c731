// Rows of activations: quantization to int8, and their sums. docs/numbers.md has the formulas.
#pragma once

#include "kernels/kernel.h"
#include "kernels/simd/unpack.h"
#include "kernels/simd/vec.h"

namespace da8w4 {
namespace {

// Calls use(floats, index) for each register of a row; the last one is filled up with zeros.
template <class V, class Use>
void for_each_register(const void *x, da8w4_type type, size_t k, Use use) {
    size_t i = 0;
    for (; i + V::kLanes <= k; i += V::kLanes) use(load_floats<V>(x, type, i), i);
    if (i < k) {
        alignas(64) char rest[V::kLanes * 4] = {};
        memcpy(rest, element(x, type, i), (k - i) * size_of(type));
        use(load_floats<V>(rest, type, 0), i);
    }
}

template <class V>
void quantize_row(const void *x, da8w4_type x_type, size_t k, bool symmetric, uint8_t flip, void *act, float *scale,
                  int32_t *zp) {
    uint8_t *bytes = static_cast<uint8_t *>(act);
    typename V::Float low = V::zero_float(), high = V::zero_float();
    typename V::Int magnitude = V::zero();
    for_each_register<V>(x, x_type, k, [&](typename V::Float value, size_t) {
        low = V::min(low, value);
        high = V::max(high, value);
        magnitude = V::max_magnitude(magnitude, value);
    });
    const float mn = V::lowest(low), mx = V::highest(high);
    const float range = symmetric ? (mx > -mn ? mx : -mn) / 127.0f : (mx - mn) / 255.0f;
    if (V::highest_magnitude(magnitude) >= 0x7f800000 || !(range <= 0x1.fffffep127f)) {
        memset(bytes, flip, k);
        *scale = float_of(kNanF32);
        *zp = 0;
        return;
    }
    const float s = range > kLeastActScale ? range : kLeastActScale;
    int32_t z = symmetric ? 0 : -V::nearest(mn / s);
    z = z > 255 ? 255 : z;
    // Clamping to 0..255 and subtracting c = 128 is subtracting first and saturating to int8. A symmetric row needs no
    // clamp at -127: |x / s| exceeds 127 only by rounding errors.
    const int32_t shifted = symmetric ? 0 : z - 128;
    const typename V::Float inverse = V::broadcast_float(1.0f / s);
    const typename V::Int offset = V::broadcast(shifted);
    for_each_register<V>(x, x_type, k, [&](typename V::Float value, size_t i) {
        const typename V::Int a = V::add(V::to_nearest(V::mul(value, inverse)), offset);
        if (i + V::kLanes <= k) {
            V::store_s8_saturated(bytes + i, a, flip);
        } else {
            uint8_t rest[V::kLanes];
            V::store_s8_saturated(rest, a, flip);
            memcpy(bytes + i, rest, k - i);
        }
    });
    *scale = s;
    *zp = shifted;
}

template <class V>
int32_t sum_of(const int8_t *act, size_t count) {
    constexpr size_t kBytes = V::kLanes * 4;
    typename V::Int sum = V::zero();
    size_t i = 0;
    for (; i + kBytes <= count; i += kBytes) sum = V::add_s8(sum, V::load(act + i));
    if (i < count) {
        alignas(64) int8_t rest[kBytes] = {};
        memcpy(rest, act + i, count - i);
        sum = V::add_s8(sum, V::load(rest));
    }
    return V::total(sum);
}

// Chunk sums are in the units of the encoding; group sums are plain.
template <class V, Encoding kEncoding>
void sum_row(const int8_t *act, const Grouping &grouping, int32_t *chunk_sums, float *group_sums, size_t stride) {
    for (size_t begin = 0, group_end = 0; begin < grouping.k;) {
        group_end = lesser(group_end + grouping.group, grouping.k);
        int64_t group_sum = 0;
        for (size_t end; begin < group_end; begin = end, chunk_sums += stride) {
            end = lesser(begin + kChunk, group_end);
            const int32_t sum = sum_of<V>(act + begin, end - begin);
            *chunk_sums = sum * sums_factor(kEncoding);
            group_sum += sum;
        }
        if (!group_sums) continue;
        *group_sums = static_cast<float>(group_sum);
        group_sums += stride;
    }
}

}  // namespace
}  // namespace da8w4
