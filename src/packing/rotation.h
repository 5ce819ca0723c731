// The rotation of docs/numbers.md: into which blocks it cuts a row, and what it does in each.
// Included by ISA units too, so everything has internal linkage.
#pragma once

#include "types.h"

namespace da8w4 {

constexpr size_t kMostRotation = 1024;

static inline constexpr bool is_rotation(size_t size) {
    return size >= 2 && size <= kMostRotation && !(size & (size - 1));
}

// The block that begins where so many of k are left: the largest power of two that fits.
static inline constexpr size_t rotation_block(size_t rotation, size_t left) {
    while (rotation > left) rotation /= 2;
    return rotation;
}

// Rotates a row of k floats; at(i) is a reference to float i.
template <class At>
static inline void rotate(At at, size_t k, size_t rotation) {
    for (size_t begin = 0, block; begin < k; begin += block) {
        block = rotation_block(rotation, k - begin);
        for (size_t stride = 1; stride < block; stride *= 2)
            for (size_t pairs = begin; pairs < begin + block; pairs += 2 * stride)
                for (size_t i = pairs; i < pairs + stride; i++) {
                    float &first = at(i), &second = at(i + stride);
                    const float sum = first + second, difference = first - second;
                    first = sum;
                    second = difference;
                }
    }
}

}  // namespace da8w4
