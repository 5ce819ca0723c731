// What an instruction set gives to the SIMD kernels: a class `V` of vector operations. docs/kernels.md lists them with
// their meaning; `VectorOps` below checks that none is missing.
//
// Everything in kernels/simd/ is internal to the file that includes it: a shared inline function would let the linker
// put the code of one instruction set into another's place. So: C headers and anonymous namespaces only.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "types.h"

namespace da8w4 {
namespace {

template <class A, class B>
constexpr bool is_same = false;
template <class A>
constexpr bool is_same<A, A> = true;

template <class Found, class Wanted>
concept Is = is_same<Found, Wanted>;

// What a byte of a panel is. The dot products of an instruction set take bytes of one sign, and its packed codes become
// such bytes, too: value + bias where they are unsigned, the value where they are signed.
enum class Encoding {
    plain,  // value + bias, as packed codes become. A row starts a chunk with -(zp + bias) * sum of a' for each column.
    biased,  // value - zp + 128, unsigned. A row starts a chunk with -128 * sum of a' for all columns.
    signed_  // value - zp, signed. Nothing is left to compensate.
};

template <class V>
concept VectorOps = requires(typename V::Int i, typename V::Float f, typename V::Part part, void *to, const void *from,
                             const int8_t *s8, const uint16_t *halves, uint8_t *bytes, const float *floats,
                             int32_t number, float value) {
    // Constants: 32-bit lanes of a register; rows of a micro-tile; how panels encode codes; quads of activations that
    // dot products take from one register; independent accumulators of a micro-tile of one and of two rows; micro-tiles
    // that take as long as reading their weights; the largest sum that a Part holds.
    {
        V::kLanes + V::kRows + V::kActQuads + V::kSetsOneRow + V::kSetsTwoRows + V::kTilesOfReading + V::kNearRows +
            V::kMostPart
    } -> Is<size_t>;
    { V::kPanelEncoding } -> Is<const Encoding &>;

    // Integers of 32 bits, and registers of bytes.
    { V::zero() } -> Is<typename V::Int>;
    { V::broadcast(number) } -> Is<typename V::Int>;
    { V::broadcast_quad(s8) } -> Is<typename V::Int>;
    { V::load(from) } -> Is<typename V::Int>;
    { V::store(to, i) } -> Is<void>;
    { V::load_s8(s8) } -> Is<typename V::Int>;
    { V::load_u8(bytes) } -> Is<typename V::Int>;
    { V::load_table(s8) } -> Is<typename V::Int>;
    { V::look_up(i, i) } -> Is<typename V::Int>;
    { V::low_nibbles(i) } -> Is<typename V::Int>;
    { V::high_nibbles(i) } -> Is<typename V::Int>;
    { V::shift_left(i, 1) } -> Is<typename V::Int>;
    { V::shift_right(i, 1) } -> Is<typename V::Int>;
    { V::shift_right_signed(i, 1) } -> Is<typename V::Int>;
    { V::insert_bits(i, i, i) } -> Is<typename V::Int>;
    { V::add(i, i) } -> Is<typename V::Int>;
    { V::sub(i, i) } -> Is<typename V::Int>;
    { V::min_unsigned(i, i) } -> Is<typename V::Int>;
    { V::add_bytes(i, i) } -> Is<typename V::Int>;
    { V::replicate_byte(i) } -> Is<typename V::Int>;
    { V::add_product(i, i, i) } -> Is<typename V::Int>;
    { V::add_s8(i, i) } -> Is<typename V::Int>;
    { V::total(i) } -> Is<int32_t>;
    { V::opaque(i) } -> Is<typename V::Int>;

    // Dot products of quads: codes by int8 activations.
    { V::open(i) } -> Is<typename V::Part>;
    { V::dot(part, i, i) } -> Is<typename V::Part>;
    { V::flush(i, part, 1) } -> Is<typename V::Int>;

    // Floats.
    { V::zero_float() } -> Is<typename V::Float>;
    { V::broadcast_float(value) } -> Is<typename V::Float>;
    { V::load_f32(from) } -> Is<typename V::Float>;
    { V::load_f16(halves) } -> Is<typename V::Float>;
    { V::load_bf16(halves) } -> Is<typename V::Float>;
    { V::load_pairs(floats, f, f) } -> Is<void>;
    { V::pick(floats, i) } -> Is<typename V::Float>;
    { V::to_float(i) } -> Is<typename V::Float>;
    { V::bits_of(f) } -> Is<typename V::Int>;
    { V::float_of(i) } -> Is<typename V::Float>;
    { V::add_float(f, f) } -> Is<typename V::Float>;
    { V::sub_float(f, f) } -> Is<typename V::Float>;
    { V::div(f, f) } -> Is<typename V::Float>;
    { V::mul(f, f) } -> Is<typename V::Float>;
    { V::fma(f, f, f) } -> Is<typename V::Float>;
    { V::fms(f, f, f) } -> Is<typename V::Float>;
    { V::magnitude(f) } -> Is<typename V::Float>;
    { V::template butterfly<1>(f) } -> Is<typename V::Float>;
    { V::min(f, f) } -> Is<typename V::Float>;
    { V::max(f, f) } -> Is<typename V::Float>;
    { V::max_magnitude(i, f) } -> Is<typename V::Int>;
    { V::highest(f) } -> Is<float>;
    { V::lowest(f) } -> Is<float>;
    { V::highest_magnitude(i) } -> Is<uint32_t>;
    { V::nearest(value) } -> Is<int32_t>;
    { V::to_nearest(f) } -> Is<typename V::Int>;
    { V::one_nan(f) } -> Is<typename V::Float>;

    // Stores of other types.
    { V::store_s8_saturated(bytes, i, *bytes) } -> Is<void>;
    { V::store_f32(to, f) } -> Is<void>;
    { V::store_f16(to, f) } -> Is<void>;
    { V::store_bf16(to, f) } -> Is<void>;
};

// A register of floats from element `i` on. Every use of a type of scales, offsets or activations comes through here.
template <class V>
DA8W4_INLINE typename V::Float load_floats(const void *values, da8w4_type type, size_t i) {
    if (type == DA8W4_F32) return V::load_f32(static_cast<const float *>(values) + i);
    const uint16_t *halves = static_cast<const uint16_t *>(values) + i;
    return type == DA8W4_F16 ? V::load_f16(halves) : V::load_bf16(halves);
}

template <class V>
DA8W4_INLINE void store_floats(void *to, da8w4_type type, typename V::Float value) {
    if (type == DA8W4_F32)
        V::store_f32(to, value);
    else if (type == DA8W4_F16)
        V::store_f16(to, value);
    else
        V::store_bf16(to, value);
}

}  // namespace
}  // namespace da8w4
