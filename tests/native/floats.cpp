#include "floats.h"

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <limits>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace check {
namespace {

struct Half {
    int mantissa, least_exponent;
    uint16_t infinity, nan;
};

Half half_of(da8w4_type type) {
    return type == DA8W4_F16 ? Half{10, -14, 0x7c00, 0x7e00} : Half{7, -126, 0x7f80, 0x7fc0};
}

uint16_t to_half(float value, da8w4_type type) {
    const Half half = half_of(type);
    if (std::isnan(value)) return half.nan;
    const int sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isinf(value)) return static_cast<uint16_t>(sign | half.infinity);
    const double magnitude = std::fabs(static_cast<double>(value));
    const int exponent = magnitude == 0 ? half.least_exponent : std::max(std::ilogb(magnitude), half.least_exponent);
    // Adding the units to the exponent's bits lets a carry raise the exponent, up to infinity.
    const double units = std::nearbyint(std::ldexp(magnitude, half.mantissa - exponent));
    const double bits = std::ldexp(exponent - half.least_exponent, half.mantissa) + units;
    return static_cast<uint16_t>(sign | std::min(static_cast<int>(bits), static_cast<int>(half.infinity)));
}

float from_half(uint16_t bits, da8w4_type type) {
    const Half half = half_of(type);
    const int magnitude = bits & 0x7fff, exponent = magnitude >> half.mantissa;
    const int mantissa = magnitude & ((1 << half.mantissa) - 1);
    double value;
    if (magnitude > half.infinity)
        value = std::numeric_limits<double>::quiet_NaN();
    else if (magnitude == half.infinity)
        value = std::numeric_limits<double>::infinity();
    else if (exponent == 0)
        value = std::ldexp(mantissa, half.least_exponent - half.mantissa);
    else
        value = std::ldexp(mantissa + (1 << half.mantissa), exponent - 1 + half.least_exponent - half.mantissa);
    return static_cast<float>(bits & 0x8000 ? -value : value);
}

}  // namespace

size_t size_of(da8w4_type type) { return type == DA8W4_F32 ? 4 : type == DA8W4_F16 || type == DA8W4_BF16 ? 2 : 1; }

const char *name_of(da8w4_type type) {
    const char *const names[] = {"f32", "f16", "bf16", "u8", "s8"};
    return names[type];
}

float as_type(float value, da8w4_type type) {
    return type == DA8W4_F32 ? value : from_half(to_half(value, type), type);
}

float any_finite(Random &random, da8w4_type type) {
    for (;;) {
        const uint64_t bits = random.bits();
        const float value =
            type == DA8W4_F32 ? float_of(static_cast<uint32_t>(bits)) : from_half(static_cast<uint16_t>(bits), type);
        if (std::isfinite(value)) return value;
    }
}

void put(void *to, float value, da8w4_type type) {
    const uint16_t half = type == DA8W4_F32 ? 0 : to_half(value, type);
    memcpy(to, type == DA8W4_F32 ? static_cast<const void *>(&value) : &half, size_of(type));
}

float get(const void *from, da8w4_type type) {
    float value;
    uint16_t half;
    memcpy(type == DA8W4_F32 ? static_cast<void *>(&value) : &half, from, size_of(type));
    return type == DA8W4_F32 ? value : from_half(half, type);
}

FloatMode::FloatMode(bool hostile) : hostile_(hostile) {
    if (!hostile) return;
    std::fegetenv(&before_);
    std::fesetround(FE_UPWARD);
#if defined(__SSE__)
    _mm_setcsr(_mm_getcsr() | 0x8040);
    csr_ = _mm_getcsr();
#endif
}

bool FloatMode::restore() {
    if (!hostile_) return true;
    bool kept = std::fegetround() == FE_UPWARD;
#if defined(__SSE__)
    kept = kept && _mm_getcsr() == csr_;
#endif
    std::fesetenv(&before_);
    return kept;
}

}  // namespace check
