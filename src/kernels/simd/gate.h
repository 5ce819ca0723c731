// Gates, and the sum of what experts gave. docs/numbers.md has the formulas.
#pragma once

#include "kernels/gate_constants.h"
#include "kernels/kernel.h"
#include "kernels/simd/vec.h"

namespace da8w4 {
namespace {

// exp(-(z + low)) = (1 + r * slope) * 2^n
template <class V>
struct Exponential {
    typename V::Float r, slope;
    typename V::Int shifted;  // n << 23: what is added to the bits of a float to multiply it by 2^n
};

template <class V>
DA8W4_INLINE Exponential<V> exponential(typename V::Float z) {
    using Float = typename V::Float;
    const Float rounded = V::fma(z, V::broadcast_float(kMinusLog2E), V::broadcast_float(kRound));
    const Float n = V::sub_float(rounded, V::broadcast_float(kRound));
    Float r = V::fma(n, V::broadcast_float(kLn2), z);
    r = V::fma(n, V::broadcast_float(kLn2Low), r);
    Float slope = V::fma(r, V::broadcast_float(kExp[4]), V::broadcast_float(kExp[3]));
    slope = V::fma(r, slope, V::broadcast_float(kExp[2]));
    slope = V::fma(r, slope, V::broadcast_float(kExp[1]));
    slope = V::fma(r, slope, V::broadcast_float(kExp[0]));
    slope = V::fma(r, slope, V::broadcast_float(-1));
    return {r, slope, V::shift_left(V::bits_of(rounded), 23)};
}

// x * sigmoid(z). Numerator and denominator are scaled by a power of two where the latter would overflow, so that
// subnormal results are rounded once.
template <class V>
DA8W4_INLINE typename V::Float times_sigmoid(typename V::Float x, typename V::Float z) {
    const Exponential<V> e = exponential<V>(V::min(z, V::broadcast_float(kHighestZ)));
    const typename V::Int power = V::min_unsigned(V::add(e.shifted, V::broadcast(kOneBits)), V::broadcast(kMostBits));
    const typename V::Float scale = V::float_of(V::sub(power, e.shifted));
    const typename V::Float whole = V::float_of(power), rest = V::fma(V::mul(e.r, e.slope), whole, scale);
    return V::div(V::mul(x, scale), V::add_float(whole, rest));
}

template <class V>
struct Silu {
    explicit Silu(const da8w4_gating &) {}
    typename V::Float operator()(typename V::Float gate, typename V::Float up) const {
        const typename V::Float x = V::max(V::broadcast_float(kLowestZ), gate);
        return V::mul(times_sigmoid<V>(x, x), up);
    }
};

template <class V, class Gate>
void gate_rows(const GateJob &job) {
    const Gate gate(job.gating);
    const size_t bytes = size_of(job.out_type), cols = job.cols;
    const bool interleaved = job.gating.interleaved, whole = cols % V::kLanes == 0;
    const float *gates = job.gates, *ups = job.ups;
    char *out = static_cast<char *>(job.out);
    alignas(64) float copy[2 * kBlock] = {};
    alignas(64) char rest[kBlock * sizeof(float)];
    for (size_t row = 0; row < job.rows; row++, gates += job.stride, ups += job.stride, out += job.out_stride) {
        const float *from = gates, *ups_from = ups;
        char *to = out;
        if (!whole) {
            from = copy, ups_from = copy + kBlock, to = rest;
            memcpy(copy, gates, (interleaved ? 2 * cols : cols) * sizeof(float));
            if (!interleaved) memcpy(copy + kBlock, ups, cols * sizeof(float));
        }
        for (size_t n = 0; n < cols; n += V::kLanes) {
            typename V::Float g, u;
            if (interleaved) {
                V::load_pairs(from + 2 * n, g, u);
            } else {
                g = V::load_f32(from + n);
                u = V::load_f32(ups_from + n);
            }
            store_floats<V>(to + n * bytes, job.out_type, V::one_nan(gate(g, u)));
        }
        if (!whole) memcpy(out, rest, cols * bytes);
    }
}

template <class V>
void gate(const GateJob &job) {
    gate_rows<V, Silu<V>>(job);
}

// As many registers of columns, from column n on.
template <class V, size_t kRegisters>
DA8W4_INLINE void sum_registers(const SlotSum &sum, size_t n, char *to) {
    typename V::Float acc[kRegisters];
    for (size_t i = 0; i < kRegisters; i++) acc[i] = V::zero_float();
    for (size_t slot = 0; slot < sum.slots; slot++) {
        if (sum.rows[slot] < 0) continue;
        const float *row = sum.results + static_cast<size_t>(sum.rows[slot]) * sum.stride + n;
        const typename V::Float weight = V::broadcast_float(sum.weights[slot] * sum.scaling);
        for (size_t i = 0; i < kRegisters; i++) acc[i] = V::fma(V::load_f32(row + i * V::kLanes), weight, acc[i]);
    }
    for (size_t i = 0; i < kRegisters; i++)
        store_floats<V>(to + i * V::kLanes * size_of(sum.out_type), sum.out_type, V::one_nan(acc[i]));
}

template <class V>
void sum_slots(const SlotSum &sum) {
    constexpr size_t kRegisters = 4;
    const size_t bytes = size_of(sum.out_type);
    char *const out = static_cast<char *>(sum.out);
    size_t n = 0;
    for (; n + kRegisters * V::kLanes <= sum.cols; n += kRegisters * V::kLanes)
        sum_registers<V, kRegisters>(sum, n, out + n * bytes);
    for (; n + V::kLanes <= sum.cols; n += V::kLanes) sum_registers<V, 1>(sum, n, out + n * bytes);
    for (; n < sum.cols; n++) {
        float acc = 0;
        for (size_t slot = 0; slot < sum.slots; slot++)
            if (sum.rows[slot] >= 0)
                acc = __builtin_fmaf(sum.results[static_cast<size_t>(sum.rows[slot]) * sum.stride + n],
                                     sum.weights[slot] * sum.scaling, acc);
        store_float(out, sum.out_type, n, acc != acc ? float_of(kNanF32) : acc);
    }
}

}  // namespace
}  // namespace da8w4
