// Kernel scalar: plain C++ for any CPU, and the reference that the tests hold the others against.
// It has no panel: unpacking a nibble costs it nothing beside the multiplication.
// Exact because D is summed in int64 and std::fma rounds once.
#include <math.h>

#include "half.h"
#include "kernel.h"

namespace da8w4 {
namespace {

float load_float(const void *array, da8w4_type type, size_t i) {
    if (type == DA8W4_F32) return static_cast<const float *>(array)[i];
    uint16_t half = static_cast<const uint16_t *>(array)[i];
    return type == DA8W4_F16 ? f16_to_f32(half) : bf16_to_f32(half);
}

float clamp(float value, float low, float high) { return fminf(fmaxf(value, low), high); }

void quantize_row(const void *x, da8w4_type x_type, size_t k, bool symmetric, uint8_t flip, void *act, float *scale,
                  int32_t *zp) {
    uint8_t *bytes = static_cast<uint8_t *>(act);
    float low = 0, high = 0;
    bool finite = true;
    for (size_t i = 0; i < k; i++) {
        float value = load_float(x, x_type, i);
        finite = finite && isfinite(value);
        low = fminf(low, value);
        high = fmaxf(high, value);
    }
    const float epsilon = 0x1p-23f;
    float s = symmetric ? fmaxf(-low, high) / 127.0f : (high - low) / 255.0f;
    if (!finite || !isfinite(s)) {
        memset(bytes, flip, k);
        *scale = float_of(kNanF32);
        *zp = 0;
        return;
    }
    s = fmaxf(s, epsilon);
    float z = symmetric ? 0.0f : clamp(-nearbyintf(low / s), 0.0f, 255.0f);
    float c = symmetric ? 0.0f : 128.0f, a_low = symmetric ? -127.0f : 0.0f, a_high = symmetric ? 127.0f : 255.0f;
    float inverse = 1.0f / s;
    for (size_t i = 0; i < k; i++) {
        float a = clamp(nearbyintf(load_float(x, x_type, i) * inverse) + z, a_low, a_high);
        bytes[i] = static_cast<uint8_t>(static_cast<int8_t>(a - c)) ^ flip;
    }
    *scale = s;
    *zp = static_cast<int32_t>(z - c);
}

void sum_row(const int8_t *act, size_t k, size_t group, int32_t *sums) {
    for (size_t begin = 0; begin < k;) {
        size_t group_end = (begin / group + 1) * group, end = begin + kChunk;
        if (end > group_end) end = group_end;
        if (end > k) end = k;
        int32_t sum = 0;
        for (; begin < end; begin++) sum += act[begin];
        *sums++ = sum;
    }
}

void direct_tile(const Tile &tile, size_t, const Block &block) {
    size_t group_index = 0;
    for (size_t begin = 0; begin < tile.k; begin += tile.group, group_index++) {
        size_t end = begin + tile.group < tile.k ? begin + tile.group : tile.k;
        for (size_t n = 0; n < kBlock; n++) {
            size_t at = group_index * kBlock + n;
            int zp = block.zps ? block.zps[at] : block.zp;
            int64_t dot = 0;
            for (size_t k = begin; k < end; k++) {
                uint8_t pair = block.codes[k / kQuad * kLineBytes + n % 16 * kQuad + k % kQuad];
                int code = n < 16 ? pair & 15 : pair >> 4;
                dot += tile.act.rows[k] * (code - zp);
            }
            float acc = begin == 0 ? 0.0f : tile.acc[n];
            tile.acc[n] = fmaf(static_cast<float>(dot), load_float(block.scales, block.scale_type, at), acc);
        }
    }
}

void finish_row(const Finish &finish) {
    for (size_t n = 0; n < finish.cols; n++) {
        float t = finish.act_zp == 0 ? finish.acc[n] : fmaf(-finish.act_zp, finish.sums[n], finish.acc[n]);
        float y = finish.bias ? fmaf(t, finish.act_scale, finish.bias[n]) : t * finish.act_scale;
        if (finish.out_type == DA8W4_F32)
            static_cast<float *>(finish.out)[n] = y != y ? float_of(kNanF32) : y;
        else
            static_cast<uint16_t *>(finish.out)[n] = finish.out_type == DA8W4_F16 ? f32_to_f16(y) : f32_to_bf16(y);
    }
}

constexpr Kernel make_kernel() {
    Kernel kernel = {};
    kernel.name = "scalar";
    kernel.description = "portable C++";
    kernel.direct_max = SIZE_MAX;
    kernel.direct_rows = 1;
    kernel.quantize_row = quantize_row;
    kernel.sum_row = sum_row;
    kernel.direct_tile = direct_tile;
    kernel.finish_row = finish_row;
    return kernel;
}

}  // namespace

extern constexpr Kernel kernel_scalar = make_kernel();

}  // namespace da8w4
