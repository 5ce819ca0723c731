// The rotation of a row of floats, a few registers at a time: within each of them, and between them. Every float is the
// same sums and differences as in packing/rotation.h, in whatever order blocks and registers come.
#pragma once

#include "kernels/kernel.h"
#include "kernels/simd/vec.h"
#include "packing/rotation.h"

namespace da8w4 {
namespace {

// Strides from kStride on within a register, of blocks of at most all lanes.
template <class V, size_t kStride = 1>
DA8W4_INLINE typename V::Float rotate_lanes(typename V::Float value, size_t block) {
    if constexpr (kStride < V::kLanes)
        if (kStride < block) return rotate_lanes<V, 2 * kStride>(V::template butterfly<kStride>(value), block);
    return value;
}

// Strides of `step`, 2 * step .. kCount / 2 * step floats, after those within registers.
template <class V, size_t kCount>
void rotate_registers(float *x, size_t count, size_t step, size_t lanes) {
    for (size_t first = 0; first < count; first += kCount * step)
        for (size_t at = first; at < first + step; at += V::kLanes) {
            typename V::Float values[kCount];
            for (size_t i = 0; i < kCount; i++) values[i] = rotate_lanes<V>(V::load_f32(x + at + i * step), lanes);
            for (size_t stride = 1; stride < kCount; stride *= 2)
                for (size_t i = 0; i < kCount; i++) {
                    if (i & stride) continue;
                    const typename V::Float sum = V::add_float(values[i], values[i + stride]);
                    values[i + stride] = V::sub_float(values[i], values[i + stride]);
                    values[i] = sum;
                }
            for (size_t i = 0; i < kCount; i++) V::store_f32(x + at + i * step, values[i]);
        }
}

// Blocks of one size, each of at least one register: three strides at a time, for which registers suffice.
template <class V>
void rotate_blocks(float *x, size_t count, size_t block, size_t lanes) {
    for (size_t step = V::kLanes, registers = block / V::kLanes, some;; step *= some, lanes = 1) {
        some = lesser(registers, 8);
        if (some == 8)
            rotate_registers<V, 8>(x, count, step, lanes);
        else if (some == 4)
            rotate_registers<V, 4>(x, count, step, lanes);
        else if (some == 2)
            rotate_registers<V, 2>(x, count, step, lanes);
        else
            rotate_registers<V, 1>(x, count, step, lanes);
        registers /= some;
        if (registers == 1) return;
    }
}

// Blocks that are shorter than a register divide it. What is left behind the last whole register is blocks of its own.
template <class V>
void rotate_row(float *x, size_t k, size_t rotation) {
    const size_t whole = k / V::kLanes * V::kLanes, lanes = lesser(rotation, V::kLanes);
    for (size_t begin = 0, count; begin < whole; begin += count) {
        const size_t block = rotation_block(rotation > V::kLanes ? rotation : V::kLanes, whole - begin);
        count = lesser(kMostRotation, whole - begin) / block * block;  // which stays in L1
        rotate_blocks<V>(x + begin, count, block, lanes);
    }
    float *rest = x + whole;
    rotate([rest](size_t i) -> float & { return rest[i]; }, k - whole, rotation);
}

}  // namespace
}  // namespace da8w4
