// Element types of operands: their sizes, and float16 and bfloat16 in portable integer arithmetic.
// Included by ISA units too, so everything has internal linkage.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "pyda8w4/pyda8w4.h"

namespace da8w4 {

// For member functions in headers that ISA units include: no unit may emit a copy that the linker could choose for all.
#define DA8W4_INLINE __attribute__((always_inline)) inline

static inline constexpr size_t ceil_div(size_t a, size_t b) { return a / b + (a % b != 0); }
static inline constexpr size_t round_up(size_t a, size_t b) { return ceil_div(a, b) * b; }
static inline constexpr size_t lesser(size_t a, size_t b) { return a < b ? a : b; }

static inline constexpr bool is_float(da8w4_type type) {
    return type == DA8W4_F32 || type == DA8W4_F16 || type == DA8W4_BF16;
}
static inline constexpr size_t size_of(da8w4_type type) { return type == DA8W4_F32 ? 4 : is_float(type) ? 2 : 1; }

// An array of floats of any type from element `i` on.
static inline const void *element(const void *array, da8w4_type type, size_t i) {
    return static_cast<const char *>(array) + i * size_of(type);
}

constexpr uint32_t kNanF32 = 0x7fc00000;  // the one NaN that this library produces, in each type
constexpr uint16_t kNanF16 = 0x7e00;
constexpr uint16_t kNanBf16 = 0x7fc0;

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float bf16_to_f32(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

static inline uint16_t f32_to_bf16(float value) {
    if (value != value) return kNanBf16;
    uint32_t bits = bits_of(value);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // ties to even
}

static inline float f16_to_f32(uint16_t half) {
    uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    uint32_t exponent = (half >> 10) & 31, mantissa = half & 0x3ff;
    if (exponent == 31) return float_of(sign | 0x7f800000 | mantissa << 13);
    if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
    // A subnormal is mantissa * 2^-24, which float32 holds exactly.
    return float_of(sign | bits_of(static_cast<float>(mantissa) * 0x1p-24f));
}

static inline uint16_t f32_to_f16(float value) {
    if (value != value) return kNanF16;
    uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude >= 0x47800000) {  // 2^16 and up: beyond the largest float16 however it rounds
        half = 0x7c00;
    } else if (magnitude >= 0x38800000) {  // normal: rebias, then round 13 bits off; a carry may reach Inf
        half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    } else if (magnitude >= 0x33000000) {  // subnormal: shift the full mantissa to units of 2^-24
        uint32_t mantissa = (magnitude & 0x7fffff) | 0x800000, shift = 126 - (magnitude >> 23);
        uint32_t rest = mantissa & ((1u << shift) - 1), tie = 1u << (shift - 1);
        half = mantissa >> shift;
        half += rest > tie || (rest == tie && (half & 1));
    } else {
        half = 0;
    }
    return static_cast<uint16_t>(sign | half);
}

static inline float load_float(const void *array, da8w4_type type, size_t i) {
    if (type == DA8W4_F32) return static_cast<const float *>(array)[i];
    const uint16_t half = static_cast<const uint16_t *>(array)[i];
    return type == DA8W4_F16 ? f16_to_f32(half) : bf16_to_f32(half);
}

static inline void store_float(void *array, da8w4_type type, size_t i, float value) {
    if (type == DA8W4_F32)
        static_cast<float *>(array)[i] = value;
    else
        static_cast<uint16_t *>(array)[i] = type == DA8W4_F16 ? f32_to_f16(value) : f32_to_bf16(value);
}

// Whether the type holds this value exactly, its sign and subnormals included.
static inline bool holds_exactly(da8w4_type type, float value) {
    float stored;
    store_float(&stored, type, 0, value);
    return bits_of(load_float(&stored, type, 0)) == bits_of(value);
}

}  // namespace da8w4
