// Vector operations of NEON with dot products: 128-bit registers and sdot (s8 x s8 quads to int32). See
// kernels/simd/vec.h.
#pragma once

#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/simd/vec.h"
#include "types.h"

namespace da8w4 {
namespace {

struct VecNeon {
    using Int = int32x4_t;
    using Float = float32x4_t;
    using Part = Int;
    static constexpr size_t kLanes = 4;
    static constexpr Encoding kPanelEncoding = Encoding::signed_;
    static constexpr size_t kActQuads = 4;
    // An sdot that adds to the sum of the one before it need not wait for that one's end on cores from Neoverse N1 on,
    // so two chains for each of their two to four pipes are enough.
    static constexpr size_t kRows = 6, kSetsOneRow = 2, kSetsTwoRows = 1;
    static constexpr size_t kTilesOfReading = 2;
    static constexpr size_t kNearRows = 0;
    static constexpr size_t kMostPart = SIZE_MAX;  // sums modulo 2^32 do for any number of products

    static Int zero() { return vdupq_n_s32(0); }
    static Int broadcast(int32_t value) { return vdupq_n_s32(value); }
    static Int broadcast_quad(const int8_t *quad) {
        int32_t bits;
        memcpy(&bits, quad, sizeof bits);
        return vdupq_n_s32(bits);
    }
    static Int load(const void *p) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t *>(p))); }
    static void store(void *p, Int value) { vst1q_u8(static_cast<uint8_t *>(p), vreinterpretq_u8_s32(value)); }
    static Int load_s8(const int8_t *p) {
        return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(four_bytes(p)))));
    }
    static Int load_u8(const uint8_t *p) {
        const uint16x8_t words = vmovl_u8(vreinterpret_u8_s32(four_bytes(p)));
        return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(words)));
    }
    static Int load_table(const int8_t *p) { return vreinterpretq_s32_s8(vld1q_s8(p)); }
    static Int look_up(Int table, Int nibbles) {
        return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(table), vreinterpretq_u8_s32(nibbles)));
    }
    static Int low_nibbles(Int line) { return vandq_s32(line, vdupq_n_s32(0x0f0f0f0f)); }
    static Int high_nibbles(Int line) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(line), 4)); }
    static Int shift_left(Int value, int bits) {
        return reinterpret_cast<Int>(reinterpret_cast<uint32x4_t>(value) << bits);
    }
    static Int shift_right(Int value, int bits) {
        return reinterpret_cast<Int>(reinterpret_cast<uint32x4_t>(value) >> bits);
    }
    static Int shift_right_signed(Int value, int bits) { return value >> bits; }
    static Int insert_bits(Int value, Int bits, Int mask) {  // value | (bits & mask)
        return vorrq_s32(value, vandq_s32(bits, mask));
    }
    static Int add(Int a, Int b) { return vaddq_s32(a, b); }
    static Int sub(Int a, Int b) { return vsubq_s32(a, b); }
    static Int min_unsigned(Int a, Int b) {
        return vreinterpretq_s32_u32(vminq_u32(vreinterpretq_u32_s32(a), vreinterpretq_u32_s32(b)));
    }

    static Part open(Int sum) { return sum; }
    static Part dot(Part part, Int codes, Int act) {
        return vdotq_s32(part, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(act));
    }
    // The same with one of four quads, which the instruction takes by its number.
    DA8W4_INLINE static Part dot_quad(Part part, Int codes, Int acts, size_t quad) {
        const int8x16_t w = vreinterpretq_s8_s32(codes), a = vreinterpretq_s8_s32(acts);
        switch (quad) {
            case 0: return vdotq_laneq_s32(part, w, a, 0);
            case 1: return vdotq_laneq_s32(part, w, a, 1);
            case 2: return vdotq_laneq_s32(part, w, a, 2);
            default: return vdotq_laneq_s32(part, w, a, 3);
        }
    }
    static Int flush(Int, Part part, int) { return part; }

    // sum + a * b of int16, where the upper half of each lane of a is zero.
    static Int add_product(Int sum, Int a, Int b) { return vmlal_s16(sum, vmovn_s32(a), vmovn_s32(b)); }

    static Int replicate_byte(Int value) {  // the low byte of each lane, four times
        return vmulq_s32(vandq_s32(value, vdupq_n_s32(0xff)), vdupq_n_s32(0x01010101));
    }
    static Int add_bytes(Int a, Int b) {
        return vreinterpretq_s32_s8(vaddq_s8(vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b)));
    }
    static Int add_s8(Int sum, Int bytes) { return vdotq_s32(sum, vreinterpretq_s8_s32(bytes), vdupq_n_s8(1)); }
    static int32_t total(Int value) { return vaddvq_s32(value); }

    static Int opaque(Int value) {
        __asm__ volatile("" : "+w"(value));
        return value;
    }

    static Float zero_float() { return vdupq_n_f32(0); }
    static Float broadcast_float(float value) { return vdupq_n_f32(value); }
    static Float load_f32(const void *p) { return vreinterpretq_f32_s32(load(p)); }
    static Float load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u8(eight_bytes(p))); }
    static Float load_bf16(const uint16_t *p) {
        return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(eight_bytes(p)), 16));
    }
    static void load_pairs(const float *p, Float &even, Float &odd) {
        const Float low = load_f32(p), high = load_f32(p + kLanes);
        even = vuzp1q_f32(low, high);
        odd = vuzp2q_f32(low, high);
    }
    static Float pick(const float *table, Int index) {  // of 8 floats
        const uint8x16x2_t bytes = {{
            vld1q_u8(reinterpret_cast<const uint8_t *>(table)),
            vld1q_u8(reinterpret_cast<const uint8_t *>(table + kLanes)),
        }};
        const Int at = vmlaq_s32(vdupq_n_s32(0x03020100), vandq_s32(index, vdupq_n_s32(7)), vdupq_n_s32(0x04040404));
        return vreinterpretq_f32_u8(vqtbl2q_u8(bytes, vreinterpretq_u8_s32(at)));
    }
    static Float to_float(Int value) { return vcvtq_f32_s32(value); }
    static Int bits_of(Float value) { return vreinterpretq_s32_f32(value); }
    static Float float_of(Int bits) { return vreinterpretq_f32_s32(bits); }
    static Float add_float(Float a, Float b) { return vaddq_f32(a, b); }
    static Float sub_float(Float a, Float b) { return vsubq_f32(a, b); }
    static Float div(Float a, Float b) { return vdivq_f32(a, b); }
    static Float mul(Float a, Float b) { return vmulq_f32(a, b); }
    static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
    static Float fms(Float a, Float b, Float c) { return vfmaq_f32(vnegq_f32(c), a, b); }
    static Float magnitude(Float value) { return vabsq_f32(value); }
    template <size_t kStride>
    static Float butterfly(Float value) {  // sums in the lower lane of each pair, differences in the upper one
        if constexpr (kStride == 1)
            return vfmaq_f32(vrev64q_f32(value), value, Float{1, -1, 1, -1});
        else
            return vfmaq_f32(vextq_f32(value, value, 2), value, Float{1, 1, -1, -1});
    }
    // The instructions of these names keep a NaN, and order the zeros.
    static Float min(Float a, Float b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
    static Float max(Float a, Float b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
    static Int max_magnitude(Int most, Float value) { return vmaxq_s32(most, bits_of(magnitude(value))); }
    static float highest(Float value) { return vmaxvq_f32(value); }
    static float lowest(Float value) { return vminvq_f32(value); }
    static uint32_t highest_magnitude(Int value) { return static_cast<uint32_t>(vmaxvq_s32(value)); }
    static int32_t nearest(float value) { return vcvtns_s32_f32(value); }
    static Int to_nearest(Float value) { return vcvtnq_s32_f32(value); }

    static void store_s8_saturated(uint8_t *p, Int value, uint8_t flip) {
        const int16x4_t words = vqmovn_s32(value);
        const uint8x8_t bytes = vreinterpret_u8_s8(vqmovn_s16(vcombine_s16(words, words)));
        const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(veor_u8(bytes, vdup_n_u8(flip))), 0);
        memcpy(p, &four, sizeof four);
    }
    static Float one_nan(Float value) {
        return vbslq_f32(vceqq_f32(value, value), value, float_of(broadcast(static_cast<int32_t>(kNanF32))));
    }
    static void store_f32(void *p, Float value) { store(p, bits_of(value)); }
    static void store_f16(void *p, Float value) { store_words(p, vreinterpret_u16_f16(vcvt_f16_f32(value))); }
    static void store_bf16(void *p, Float value) {  // ties to even; kNanF32 stays a NaN
        const uint32x4_t bits = vreinterpretq_u32_f32(value);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        store_words(p, vshrn_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd), 16));
    }

private:
    static int32x2_t four_bytes(const void *p) {
        int32_t bits;
        memcpy(&bits, p, sizeof bits);
        return vdup_n_s32(bits);
    }
    static uint8x8_t eight_bytes(const void *p) { return vld1_u8(static_cast<const uint8_t *>(p)); }
    static void store_words(void *p, uint16x4_t words) {
        vst1_u8(static_cast<uint8_t *>(p), vreinterpret_u8_u16(words));
    }
};

}  // namespace
}  // namespace da8w4
