// Kernel scalar: plain C++ for any CPU, and the reference that the tests hold the others against.
// It never unpacks panels: unpacking a nibble costs it nothing beside the multiplication.
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

void sum_row(const int8_t *act, size_t k, size_t group, int32_t factor, int32_t *sums, size_t sums_stride) {
    for (size_t begin = 0; begin < k; sums += sums_stride) {
        size_t group_end = (begin / group + 1) * group, end = begin + kChunk;
        if (end > group_end) end = group_end;
        if (end > k) end = k;
        int32_t sum = 0;
        for (; begin < end; begin++) sum += act[begin];
        *sums = sum * factor;
    }
}

Panel unpack(const Block &block, size_t group, const Span &span, const Room &room, size_t, const Ahead &) {
    const size_t first = span.group * kBlock, bytes = first * (block.scale_type == DA8W4_F32 ? 4 : 2);
    for (size_t i = 0; i < ceil_div(span.end - span.group * group, group) * kBlock; i++)
        room.zp_pairs[i] = -(block.zps ? block.zps[first + i] : block.zp) & 0xffff;
    Panel panel = {};
    panel.codes = block.codes + span.begin / kQuad * kLineBytes;
    panel.scale_type = block.scale_type;
    panel.scales = static_cast<const char *>(block.scales) + bytes;
    if (block.offsets) panel.offsets = static_cast<const char *>(block.offsets) + bytes;
    panel.zp_pairs = room.zp_pairs;
    panel.zp_step = kBlock;
    return panel;
}

// Sum of a' * (code - zp) of one column over begin..end.
int64_t dot(const int8_t *act, const Panel &panel, const Span &span, size_t n, int zp, size_t begin, size_t end) {
    int64_t sum = 0;
    for (size_t k = begin; k < end; k++) {
        uint8_t pair = panel.codes[(k - span.begin) / kQuad * kLineBytes + n % 16 * kQuad + k % kQuad];
        sum += act[k - span.begin] * ((n < 16 ? pair & 15 : pair >> 4) - zp);
    }
    return sum;
}

void packed_tiles(const Tiles &tiles, const Panel &panel) {
    const Span &span = tiles.span;
    for (size_t i = 0; i < tiles.count * kBlock; i++) {
        const size_t n = i % kBlock;
        float acc = span.begin == 0 ? 0.0f : tiles.acc[i];
        for (size_t g = span.group, begin = span.begin, end; begin < span.end; g++, begin = end) {
            const size_t at = (g - span.group) * kBlock + n;
            const bool inside = begin != g * tiles.group;
            end = (g + 1) * tiles.group < span.end ? (g + 1) * tiles.group : span.end;
            const int64_t sum = dot(tiles.act.rows + i / kBlock * tiles.act.stride, panel, span, n,
                                    -static_cast<int16_t>(panel.zp_pairs[at]), begin, end) +
                                (inside ? tiles.partial[i] : 0);
            if (end != (g + 1) * tiles.group && end != tiles.k) {
                tiles.partial[i] = static_cast<int32_t>(sum);
                continue;
            }
            acc = fmaf(static_cast<float>(sum), load_float(panel.scales, panel.scale_type, at), acc);
            const float *group_sums = tiles.act.group_sums + (g - span.group) * tiles.act.sums_stride;
            if (!panel.offsets) continue;
            acc = fmaf(group_sums[i / kBlock], load_float(panel.offsets, panel.scale_type, at), acc);
        }
        tiles.acc[i] = acc;
    }
}

void finish_rows(const Finish &finish) {
    for (size_t i = 0; i < finish.rows * kBlock; i++) {
        const size_t row = i / kBlock, n = i % kBlock;
        if (n >= finish.cols) continue;
        const float zp = finish.act_zps[row], scale = finish.act_scales[row];
        float t = zp == 0 ? finish.acc[i] : fmaf(-zp, finish.sums[n], finish.acc[i]);
        float y = finish.bias ? fmaf(t, scale, finish.bias[n]) : t * scale;
        char *out = finish.out + row * finish.out_stride;
        if (finish.out_type == DA8W4_F32)
            reinterpret_cast<float *>(out)[n] = y != y ? float_of(kNanF32) : y;
        else
            reinterpret_cast<uint16_t *>(out)[n] = finish.out_type == DA8W4_F16 ? f32_to_f16(y) : f32_to_bf16(y);
    }
}

constexpr Kernel make_kernel() {
    Kernel kernel = {};
    kernel.name = "scalar";
    kernel.description = "portable C++";
    kernel.packed_max = SIZE_MAX;
    kernel.packed_rows = 1;
    kernel.quantize_row = quantize_row;
    kernel.sum_row = sum_row;
    kernel.unpack = unpack;
    kernel.packed_tiles = packed_tiles;
    kernel.finish_rows = finish_rows;
    return kernel;
}

}  // namespace

extern constexpr Kernel kernel_scalar = make_kernel();

}  // namespace da8w4
