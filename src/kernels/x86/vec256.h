// Vector operations that the 256-bit kernels share: AVX2, FMA and F16C. See kernels/simd/vec.h.
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "types.h"

namespace da8w4 {
namespace {

struct Vec256 {
    using Int = __m256i;
    using Float = __m256;
    using Lanes = uint32_t __attribute__((vector_size(32)));
    static constexpr size_t kLanes = 8;
    static constexpr size_t kActQuads = 1;
    static constexpr size_t kNearRows = 0;

    static Int zero() { return _mm256_setzero_si256(); }
    static Int broadcast(int32_t value) { return _mm256_set1_epi32(value); }
    static Int broadcast_quad(const int8_t *quad) {
        int32_t bits;
        memcpy(&bits, quad, sizeof bits);
        return _mm256_set1_epi32(bits);
    }
    static Int load(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
    static void store(void *p, Int value) { _mm256_storeu_si256(static_cast<__m256i *>(p), value); }
    static Int load_s8(const int8_t *p) {
        return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
    }
    static Int load_u8(const uint8_t *p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
    }
    static Int load_table(const int8_t *p) {  // 16 int8 + 128
        const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
        return _mm256_broadcastsi128_si256(_mm_xor_si128(table, _mm_set1_epi8(-128)));
    }
    static Int look_up(Int table, Int nibbles) { return _mm256_shuffle_epi8(table, nibbles); }
    static Int low_nibbles(Int line) { return _mm256_and_si256(line, _mm256_set1_epi8(15)); }
    static Int high_nibbles(Int line) { return low_nibbles(_mm256_srli_epi32(line, 4)); }
    static Int shift_left(Int value, int bits) { return reinterpret_cast<Int>(reinterpret_cast<Lanes>(value) << bits); }
    static Int shift_right(Int value, int bits) {
        return reinterpret_cast<Int>(reinterpret_cast<Lanes>(value) >> bits);
    }
    static Int shift_right_signed(Int value, int bits) { return _mm256_srai_epi32(value, bits); }
    static Int insert_bits(Int value, Int bits, Int mask) {  // value | (bits & mask)
        return _mm256_or_si256(value, _mm256_and_si256(bits, mask));
    }
    static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
    static Int sub(Int a, Int b) { return _mm256_sub_epi32(a, b); }
    static Int min_unsigned(Int a, Int b) { return _mm256_min_epu32(a, b); }

    // sum + a * b of int16, where the upper half of each lane of a is zero.
    static Int add_product(Int sum, Int a, Int b) { return add(sum, _mm256_madd_epi16(a, b)); }

    static Int replicate_byte(Int value) {  // the low byte of each lane, four times
        return _mm256_shuffle_epi8(
            value, _mm256_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0, 0x0c0c0c0c, 0x08080808, 0x04040404, 0));
    }
    static Int add_bytes(Int a, Int b) { return _mm256_add_epi8(a, b); }
    static Int add_s8(Int sum, Int bytes) {
        Int pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
        return add(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static int32_t total(Int value) {
        __m128i half = _mm_add_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
        half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
    }

    static Int opaque(Int value) {
        __asm__ volatile("" : "+x"(value));
        return value;
    }

    static Float zero_float() { return _mm256_setzero_ps(); }
    static Float broadcast_float(float value) { return _mm256_set1_ps(value); }
    static Float load_f32(const void *p) { return _mm256_loadu_ps(static_cast<const float *>(p)); }
    static Float load_f16(const uint16_t *p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    }
    static Float load_bf16(const uint16_t *p) {
        Int wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static void load_pairs(const float *p, Float &even, Float &odd) {
        const Float low = load_f32(p), high = load_f32(p + kLanes);
        const __m256d evens = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0x88));
        const __m256d odds = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0xdd));
        even = _mm256_castpd_ps(_mm256_permute4x64_pd(evens, 0xd8));
        odd = _mm256_castpd_ps(_mm256_permute4x64_pd(odds, 0xd8));
    }
    static Float pick(const float *table, Int index) {  // of 8 floats
        return _mm256_permutevar8x32_ps(load_f32(table), index);
    }
    static Float to_float(Int value) { return _mm256_cvtepi32_ps(value); }
    static Int bits_of(Float value) { return _mm256_castps_si256(value); }
    static Float float_of(Int bits) { return _mm256_castsi256_ps(bits); }
    static Float add_float(Float a, Float b) { return _mm256_add_ps(a, b); }
    static Float sub_float(Float a, Float b) { return _mm256_sub_ps(a, b); }
    static Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
    static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
    static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
    static Float fms(Float a, Float b, Float c) { return _mm256_fmsub_ps(a, b, c); }
    static Float magnitude(Float value) { return float_of(_mm256_and_si256(bits_of(value), broadcast(0x7fffffff))); }
    template <size_t kStride>
    static Float butterfly(Float value) {  // sums in the lower lane of each pair, differences in the upper one
        const Float one = broadcast_float(1), minus_one = broadcast_float(-1);
        if constexpr (kStride == 1)
            return fma(value, _mm256_blend_ps(one, minus_one, 0xaa), _mm256_permute_ps(value, 0xb1));
        else if constexpr (kStride == 2)
            return fma(value, _mm256_blend_ps(one, minus_one, 0xcc), _mm256_permute_ps(value, 0x4e));
        else
            return fma(value, _mm256_blend_ps(one, minus_one, 0xf0), _mm256_permute2f128_ps(value, value, 1));
    }
    static Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
    static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
    static Int max_magnitude(Int most, Float value) {
        return _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(value), broadcast(0x7fffffff)));
    }
    static float highest(Float value) {
        __m128 half = _mm_max_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
        half = _mm_max_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
    }
    static float lowest(Float value) { return -highest(_mm256_sub_ps(zero_float(), value)); }
    static uint32_t highest_magnitude(Int value) {
        __m128i half = _mm_max_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
        half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
        return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1))));
    }
    static int32_t nearest(float value) { return _mm_cvtss_si32(_mm_set_ss(value)); }
    static Int to_nearest(Float value) { return _mm256_cvtps_epi32(value); }

    static void store_s8_saturated(uint8_t *p, Int value, uint8_t flip) {
        __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
        __m128i bytes = _mm_xor_si128(_mm_packs_epi16(words, words), _mm_set1_epi8(static_cast<char>(flip)));
        _mm_storel_epi64(reinterpret_cast<__m128i *>(p), bytes);
    }
    static Float one_nan(Float value) {
        Float nan = _mm256_castsi256_ps(broadcast(static_cast<int32_t>(kNanF32)));
        return _mm256_blendv_ps(value, nan, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    }
    static void store_f32(void *p, Float value) { _mm256_storeu_ps(static_cast<float *>(p), value); }
    static void store_f16(void *p, Float value) {
        _mm_storeu_si128(static_cast<__m128i *>(p), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    }
    static void store_bf16(void *p, Float value) {  // ties to even; kNanF32 stays a NaN
        Int bits = _mm256_castps_si256(value);
        Int odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), broadcast(1));
        bits = _mm256_srli_epi32(add(add(bits, broadcast(0x7fff)), odd), 16);
        __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
        _mm_storeu_si128(static_cast<__m128i *>(p), words);
    }
};

}  // namespace
}  // namespace da8w4
