// The loops that show what an instruction set can do at best: one only reads, one only multiplies.
#pragma once

#include "kernels/kernel.h"
#include "kernels/simd/vec.h"

namespace da8w4 {
namespace {

template <VectorOps V>
void read_memory(const char *first, const char *second, size_t step, size_t rounds) {
    using Int = typename V::Int;
    constexpr size_t kBytes = V::kLanes * sizeof(int32_t);
    Int sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    for (size_t i = 0; i < rounds; i++, first += step, second += step) {
#pragma GCC unroll 2
        for (size_t at = 0; at < 128; at += 2 * kBytes) {
            sums[0] = V::add(sums[0], V::load(first + at));
            sums[1] = V::add(sums[1], V::load(first + at + kBytes));
            sums[2] = V::add(sums[2], V::load(second + at));
            sums[3] = V::add(sums[3], V::load(second + at + kBytes));
        }
    }
    for (Int &sum : sums) sum = V::opaque(sum);
}

// 12 independent sums hide the latency of the dot product.
template <VectorOps V>
size_t multiply_registers(size_t rounds) {
    constexpr size_t kSums = 12;
    typename V::Int codes = V::broadcast(0x05050505), act = V::broadcast(0x03030303);
    typename V::Part sums[kSums];
    for (auto &sum : sums) sum = V::open(V::zero());
    for (size_t i = 0; i < rounds; i++) {
#pragma GCC unroll 12
        for (auto &sum : sums) {
            codes = V::opaque(codes);
            sum = V::dot(sum, codes, act);
        }
    }
    for (auto &sum : sums) sum = V::opaque(sum);
    return rounds * kSums * V::kLanes * kQuad;
}

}  // namespace
}  // namespace da8w4
