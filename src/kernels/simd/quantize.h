// Rows of activations: permutation and factors, quantization to int8 and int16, and sums. docs/numbers.md has the
// formulas.
#pragma once

#include "kernels/kernel.h"
#include "kernels/simd/unpack.h"
#include "kernels/simd/vec.h"

namespace da8w4 {
namespace {

constexpr uint32_t kInfinity = 0x7f800000;  // the bits of a magnitude that is not finite are these or more

// Calls use(floats, index) for each register of a row; the last one is filled up with zeros.
template <class V, class Use>
DA8W4_INLINE void for_each_register(const void *x, da8w4_type type, size_t k, Use use) {
    size_t i = 0;
    for (; i + V::kLanes <= k; i += V::kLanes) use(load_floats<V>(x, type, i), i);
    if (i < k) {
        alignas(64) char rest[V::kLanes * 4] = {};
        memcpy(rest, element(x, type, i), (k - i) * size_of(type));
        use(load_floats<V>(rest, type, 0), i);
    }
}

// One such register of integers as bytes i.. of k; see V::store_s8_saturated.
template <class V>
DA8W4_INLINE void store_bytes(void *to, size_t i, size_t k, typename V::Int value, uint8_t flip) {
    uint8_t *bytes = static_cast<uint8_t *>(to);
    if (i + V::kLanes <= k) {
        V::store_s8_saturated(bytes + i, value, flip);
    } else {
        uint8_t rest[V::kLanes];
        V::store_s8_saturated(rest, value, flip);
        memcpy(bytes + i, rest, k - i);
    }
}

template <class V>
void quantize_row(const void *x, da8w4_type x_type, size_t k, bool symmetric, uint8_t flip, void *act, float *scale,
                  int32_t *zp) {
    typename V::Float low = V::zero_float(), high = V::zero_float();
    typename V::Int magnitude = V::zero();
    for_each_register<V>(x, x_type, k, [&](typename V::Float value, size_t) {
        low = V::min(low, value);
        high = V::max(high, value);
        magnitude = V::max_magnitude(magnitude, value);
    });
    const float mn = V::lowest(low), mx = V::highest(high);
    const float range = symmetric ? (mx > -mn ? mx : -mn) / 127.0f : (mx - mn) / 255.0f;
    if (V::highest_magnitude(magnitude) >= kInfinity || !(range <= 0x1.fffffep127f)) {
        memset(act, flip, k);
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
        store_bytes<V>(act, i, k, V::add(V::to_nearest(V::mul(value, inverse)), offset), flip);
    });
    *scale = s;
    *zp = shifted;
}

// The scale of symmetric integers up to `most`; NaN if one of the floats is not finite.
template <class V>
DA8W4_INLINE float symmetric_scale(const void *x, da8w4_type type, size_t count, float most) {
    typename V::Int magnitude = V::zero();
    for_each_register<V>(x, type, count,
                         [&](typename V::Float value, size_t) { magnitude = V::max_magnitude(magnitude, value); });
    const uint32_t largest = V::highest_magnitude(magnitude);
    if (__builtin_expect(largest >= kInfinity, 0)) return float_of(kNanF32);
    const float scale = float_of(largest) / most;
    return scale > kLeastActScale ? scale : kLeastActScale;
}

template <class V>
DA8W4_INLINE void quantize_group(const void *x, da8w4_type type, size_t count, int8_t *act, float *scale) {
    const float s = symmetric_scale<V>(x, type, count, 127.0f);
    *scale = s;
    if (__builtin_expect(s != s, 0)) {
        memset(act, 0, count);
        return;
    }
    const typename V::Float inverse = V::broadcast_float(1.0f / s);
    for_each_register<V>(x, type, count, [&](typename V::Float value, size_t i) {
        store_bytes<V>(act, i, count, V::to_nearest(V::mul(value, inverse)), 0);
    });
}

template <class V, da8w4_type kType>
void quantize_groups_of(const void *x, const Grouping &grouping, int8_t *act, float *scales, size_t stride) {
    const size_t group = grouping.group;
    for (size_t k = 0; k < grouping.k; k += group, scales += stride) {
        const size_t count = lesser(group, grouping.k - k);
        const void *from = element(x, kType, k);
        if (count == 32)  // for which there is code without loops
            quantize_group<V>(from, kType, 32, act + k, scales);
        else if (count == 128)
            quantize_group<V>(from, kType, 128, act + k, scales);
        else
            quantize_group<V>(from, kType, count, act + k, scales);
    }
}

template <class V>
void quantize_groups(const void *x, da8w4_type x_type, const Grouping &grouping, int8_t *act, float *scales,
                     size_t stride) {
    if (x_type == DA8W4_F32)
        quantize_groups_of<V, DA8W4_F32>(x, grouping, act, scales, stride);
    else if (x_type == DA8W4_F16)
        quantize_groups_of<V, DA8W4_F16>(x, grouping, act, scales, stride);
    else
        quantize_groups_of<V, DA8W4_BF16>(x, grouping, act, scales, stride);
}

template <class V>
void quantize_int16(const void *x, da8w4_type x_type, size_t k, int8_t *upper, int8_t *lower, float *scale) {
    const float s = symmetric_scale<V>(x, x_type, k, 32512.0f);
    *scale = s;
    if (s != s) {
        memset(upper, 0, k);
        memset(lower, 0, k);
        return;
    }
    const typename V::Float inverse = V::broadcast_float(1.0f / s);
    for_each_register<V>(x, x_type, k, [&](typename V::Float value, size_t i) {
        const typename V::Int q = V::to_nearest(V::mul(value, inverse));
        const typename V::Int high = V::shift_right_signed(V::add(q, V::broadcast(128)), 8);
        store_bytes<V>(upper, i, k, high, 0);
        store_bytes<V>(lower, i, k, V::sub(q, V::shift_left(high, 8)), 0);
    });
}

// Gathers a stretch of the row first, so that no vector load waits for the stores of its parts.
template <class V>
void transform_row(const void *x, da8w4_type x_type, size_t k, const int32_t *perm, const float *factors, float *to) {
    constexpr size_t kStretch = 256;
    const size_t bytes = size_of(x_type);
    alignas(64) char gathered[kStretch * 4];
    for (size_t begin = 0; begin < k; begin += kStretch) {
        const size_t count = lesser(kStretch, k - begin);
        const void *from = element(x, x_type, begin);
        if (perm) {
            for (size_t i = 0; i < count; i++) {
                const size_t at = static_cast<size_t>(perm[begin + i]);
                if (bytes == 4)
                    memcpy(gathered + i * 4, element(x, x_type, at), 4);
                else
                    memcpy(gathered + i * 2, element(x, x_type, at), 2);
            }
            from = gathered;
        }
        for_each_register<V>(from, x_type, count, [&](typename V::Float value, size_t i) {
            const size_t n = begin + i;
            if (i + V::kLanes <= count) {
                V::store_f32(to + n, factors ? V::mul(value, V::load_f32(factors + n)) : value);
            } else {
                alignas(64) float rest[V::kLanes] = {};
                if (factors) {
                    memcpy(rest, factors + n, (count - i) * sizeof(float));
                    value = V::mul(value, V::load_f32(rest));
                }
                V::store_f32(rest, value);
                memcpy(to + n, rest, (count - i) * sizeof(float));
            }
        });
    }
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
void sum_row(const int8_t *act, const Grouping &grouping, int32_t *chunk_sums, size_t stride, int32_t *group_sums) {
    for (size_t begin = 0, group_end = 0; begin < grouping.k;) {
        group_end = lesser(group_end + grouping.group, grouping.k);
        int32_t group_sum = 0;
        for (size_t end; begin < group_end; begin = end, chunk_sums += stride) {
            end = lesser(begin + kChunk, group_end);
            const int32_t sum = sum_of<V>(act + begin, end - begin);
            *chunk_sums = sum_for(kEncoding, sum);
            group_sum += sum;
        }
        if (group_sums) *group_sums++ = group_sum;
    }
}

}  // namespace
}  // namespace da8w4
