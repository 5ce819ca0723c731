// Vector operations of AVX-512 with VNNI: 512-bit registers and vpdpbusd (u8 x s8 quads to int32). See
// kernels/simd/vec.h.
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/simd/vec.h"
#include "types.h"

namespace da8w4 {
namespace {

struct Vec512 {
    using Int = __m512i;
    using Float = __m512;
    using Part = Int;
    using Lanes = uint32_t __attribute__((vector_size(64)));
    static constexpr size_t kLanes = 16;
    static constexpr Encoding kPanelEncoding = Encoding::biased;
    static constexpr size_t kActQuads = 1;
    static constexpr size_t kRows = 6, kSetsOneRow = 4, kSetsTwoRows = 2;
    static constexpr size_t kTilesOfReading = 3;
    static constexpr size_t kNearRows = 2;
    static constexpr size_t kMostPart = SIZE_MAX;  // sums modulo 2^32 do for any number of products

    static Int zero() { return _mm512_setzero_si512(); }
    static Int broadcast(int32_t value) { return _mm512_set1_epi32(value); }
    static Int broadcast_quad(const int8_t *quad) {
        int32_t bits;
        memcpy(&bits, quad, sizeof bits);
        return _mm512_set1_epi32(bits);
    }
    static Int load(const void *p) { return _mm512_loadu_si512(p); }
    static void store(void *p, Int value) { _mm512_storeu_si512(p, value); }
    static Int load_s8(const int8_t *p) {
        return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    }
    static Int load_u8(const uint8_t *p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    }
    static Int load_table(const int8_t *p) {  // 16 int8 + 128
        const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
        return _mm512_broadcast_i32x4(_mm_xor_si128(table, _mm_set1_epi8(-128)));
    }
    static Int look_up(Int table, Int nibbles) { return _mm512_shuffle_epi8(table, nibbles); }
    static Int low_nibbles(Int line) { return _mm512_and_si512(line, _mm512_set1_epi8(15)); }
    static Int high_nibbles(Int line) { return low_nibbles(_mm512_srli_epi32(line, 4)); }
    static Int shift_left(Int value, int bits) { return reinterpret_cast<Int>(reinterpret_cast<Lanes>(value) << bits); }
    static Int shift_right(Int value, int bits) {
        return reinterpret_cast<Int>(reinterpret_cast<Lanes>(value) >> bits);
    }
    static Int shift_right_signed(Int value, int bits) { return _mm512_sra_epi32(value, _mm_cvtsi32_si128(bits)); }
    static Int insert_bits(Int value, Int bits, Int mask) {  // value | (bits & mask)
        return _mm512_ternarylogic_epi32(value, bits, mask, 0xf8);
    }
    static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
    static Int sub(Int a, Int b) { return _mm512_sub_epi32(a, b); }
    static Int min_unsigned(Int a, Int b) { return _mm512_min_epu32(a, b); }

    static Part open(Int sum) { return sum; }
    // In inline assembly, because GCC would copy the sums that it passes to the intrinsic from register to register.
    static Part dot(Part part, Int unsigned_bytes, Int signed_bytes) {
        __asm__("vpdpbusd %2, %1, %0" : "+v"(part) : "v"(unsigned_bytes), "v"(signed_bytes));
        return part;
    }
    static Int flush(Int, Part part, int) { return part; }

    // sum + a * b of int16, where the upper half of each lane of a is zero.
    static Int add_product(Int sum, Int a, Int b) { return _mm512_dpwssd_epi32(sum, a, b); }

    static Int replicate_byte(Int value) {  // the low byte of each lane, four times
        return _mm512_shuffle_epi8(value, _mm512_broadcast_i32x4(_mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0)));
    }
    static Int add_bytes(Int a, Int b) { return _mm512_add_epi8(a, b); }
    static Int add_s8(Int sum, Int bytes) { return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), bytes); }
    static int32_t total(Int value) { return _mm512_reduce_add_epi32(value); }

    static Int opaque(Int value) {
        __asm__ volatile("" : "+v"(value));
        return value;
    }

    static Float zero_float() { return _mm512_setzero_ps(); }
    static Float broadcast_float(float value) { return _mm512_set1_ps(value); }
    static Float load_f32(const void *p) { return _mm512_loadu_ps(p); }
    static Float load_f16(const uint16_t *p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    }
    static Float load_bf16(const uint16_t *p) {
        Int wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static void load_pairs(const float *p, Float &even, Float &odd) {
        const Int evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        const Float low = load_f32(p), high = load_f32(p + kLanes);
        even = _mm512_permutex2var_ps(low, evens, high);
        odd = _mm512_permutex2var_ps(low, add(evens, broadcast(1)), high);
    }
    static Float pick(const float *table, Int index) {  // of 8 floats
        return _mm512_permutexvar_ps(index, _mm512_broadcast_f32x8(_mm256_loadu_ps(table)));
    }
    static Float to_float(Int value) { return _mm512_cvtepi32_ps(value); }
    static Int bits_of(Float value) { return _mm512_castps_si512(value); }
    static Float float_of(Int bits) { return _mm512_castsi512_ps(bits); }
    static Float add_float(Float a, Float b) { return _mm512_add_ps(a, b); }
    static Float sub_float(Float a, Float b) { return _mm512_sub_ps(a, b); }
    static Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
    static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    static Float fms(Float a, Float b, Float c) { return _mm512_fmsub_ps(a, b, c); }
    static Float magnitude(Float value) { return float_of(_mm512_and_si512(bits_of(value), broadcast(0x7fffffff))); }
    template <size_t kStride>
    static Float butterfly(Float value) {  // sums in the lower lane of each pair, differences in the upper one
        const Float one = broadcast_float(1), minus_one = broadcast_float(-1);
        if constexpr (kStride == 1)
            return fma(value, _mm512_mask_blend_ps(0xaaaa, one, minus_one), _mm512_permute_ps(value, 0xb1));
        else if constexpr (kStride == 2)
            return fma(value, _mm512_mask_blend_ps(0xcccc, one, minus_one), _mm512_permute_ps(value, 0x4e));
        else if constexpr (kStride == 4)
            return fma(value, _mm512_mask_blend_ps(0xf0f0, one, minus_one), _mm512_shuffle_f32x4(value, value, 0xb1));
        else
            return fma(value, _mm512_mask_blend_ps(0xff00, one, minus_one), _mm512_shuffle_f32x4(value, value, 0x4e));
    }
    static Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
    static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
    static Int max_magnitude(Int most, Float value) {
        return _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(value), broadcast(0x7fffffff)));
    }
    static float highest(Float value) { return _mm512_reduce_max_ps(value); }
    static float lowest(Float value) { return _mm512_reduce_min_ps(value); }
    static uint32_t highest_magnitude(Int value) { return static_cast<uint32_t>(_mm512_reduce_max_epi32(value)); }
    static int32_t nearest(float value) { return _mm_cvtss_si32(_mm_set_ss(value)); }
    static Int to_nearest(Float value) { return _mm512_cvtps_epi32(value); }

    static void store_s8_saturated(uint8_t *p, Int value, uint8_t flip) {
        __m128i bytes = _mm_xor_si128(_mm512_cvtsepi32_epi8(value), _mm_set1_epi8(static_cast<char>(flip)));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p), bytes);
    }
    static Float one_nan(Float value) {
        Float nan = _mm512_castsi512_ps(broadcast(static_cast<int32_t>(kNanF32)));
        return _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), nan);
    }
    static void store_f32(void *p, Float value) { _mm512_storeu_ps(p, value); }
    static void store_f16(void *p, Float value) {
        _mm256_storeu_si256(static_cast<__m256i *>(p), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    }
    static void store_bf16(void *p, Float value) {  // ties to even; kNanF32 stays a NaN
        Int bits = _mm512_castps_si512(value);
        Int odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), broadcast(1));
        bits = _mm512_srli_epi32(add(add(bits, broadcast(0x7fff)), odd), 16);
        _mm256_storeu_si256(static_cast<__m256i *>(p), _mm512_cvtepi32_epi16(bits));
    }
};

}  // namespace
}  // namespace da8w4
