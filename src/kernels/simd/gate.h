// Gates, and the sum of what experts gave. docs/numbers.md has the formulas.
#pragma once

#include "kernels/gate_constants.h"
#include "kernels/kernel.h"
#include "kernels/simd/vec.h"

namespace da8w4 {
namespace {

// The integer next to -z / ln 2.
template <class V>
struct Power {
    typename V::Float n;
    typename V::Int shifted;  // n << 23: added to the bits of a float, it multiplies by 2^n
};

template <class V>
DA8W4_INLINE Power<V> power_of(typename V::Float z) {
    const typename V::Float round = V::broadcast_float(kRound);
    const typename V::Float rounded = V::fma(z, V::broadcast_float(kMinusLog2E), round);
    return {V::sub_float(rounded, round), V::shift_left(V::bits_of(rounded), 23)};
}

// z + low = r - n * ln 2
template <class V>
struct Reduced {
    typename V::Float r;
    typename V::Int shifted;
};

template <class V>
DA8W4_INLINE Reduced<V> reduced(typename V::Float z) {
    const Power<V> power = power_of<V>(z);
    const typename V::Float exact = V::fma(power.n, V::broadcast_float(kLn2), z);
    return {V::fma(power.n, V::broadcast_float(kLn2Low), exact), power.shifted};
}

template <class V>
DA8W4_INLINE Reduced<V> reduced(typename V::Float z, typename V::Float low) {
    const Power<V> power = power_of<V>(z);
    const typename V::Float exact = V::fma(power.n, V::broadcast_float(kLn2), z);
    return {V::add_float(exact, V::fma(power.n, V::broadcast_float(kLn2Low), low)), power.shifted};
}

// exp(-r) - 1
template <class V>
DA8W4_INLINE typename V::Float fraction(typename V::Float r) {
    typename V::Float sum = V::broadcast_float(kExp[0]);
    for (size_t i = 1; i < kExpTerms; i++) sum = V::fma(r, sum, V::broadcast_float(kExp[i]));
    return V::fms(V::mul(r, r), sum, r);
}

// x * sigmoid(z)
template <class V>
DA8W4_INLINE typename V::Float times_sigmoid(typename V::Float x, const Reduced<V> &z) {
    const typename V::Int bits = V::min_unsigned(V::add(z.shifted, V::broadcast(kOneBits)), V::broadcast(kMostBits));
    const typename V::Float power = V::float_of(bits), scale = V::float_of(V::sub(bits, z.shifted));
    return V::div(V::mul(x, scale), V::add_float(power, V::fma(fraction<V>(z.r), power, scale)));
}

template <class V>
struct Silu {
    explicit Silu(const da8w4_gating &) {}
    typename V::Float operator()(typename V::Float gate, typename V::Float up) const {
        const typename V::Float x = V::max(V::broadcast_float(kLowestZ), gate);
        return V::mul(times_sigmoid<V>(x, reduced<V>(V::min(x, V::broadcast_float(kHighestZ)))), up);
    }
};

// max(x, 0) - |x| * erfc(|x| / sqrt(2)) / 2
template <class V>
struct Gelu {
    explicit Gelu(const da8w4_gating &) {}
    typename V::Float operator()(typename V::Float gate, typename V::Float up) const {
        using Float = typename V::Float;
        const Float t = V::min(V::magnitude(gate), V::broadcast_float(kMostT));
        const typename V::Int piece = V::shift_right(V::bits_of(V::add_float(t, V::broadcast_float(1))), 22);
        const Float d = V::sub_float(t, V::pick(kGeluCenters, piece));
        Float m = V::pick(kGelu[0], piece);
        for (size_t i = 1; i < kGeluTerms; i++) m = V::fma(d, m, V::pick(kGelu[i], piece));
        const Float kt = V::mul(t, V::pick(kGeluK, piece)), z = V::mul(t, kt);
        const Reduced<V> reduced_z = reduced<V>(z, V::fms(t, kt, z));
        const Float power = V::float_of(V::add(reduced_z.shifted, V::broadcast(static_cast<int32_t>(kMinus64Bits))));
        m = V::mul(V::mul(m, power), V::broadcast_float(0x1p-64f));
        const Float positive = V::max(V::broadcast_float(-0.0f), gate);
        return V::mul(V::fma(m, fraction<V>(reduced_z.r), V::add_float(positive, m)), up);
    }
};

template <class V>
struct GeluTanh {
    explicit GeluTanh(const da8w4_gating &) {}
    typename V::Float operator()(typename V::Float gate, typename V::Float up) const {
        using Float = typename V::Float;
        const Float c = V::broadcast_float(kTanhC), d = V::broadcast_float(kTanhD);
        const Float x = V::max(V::broadcast_float(kLowestTanhX), gate);
        const Float y = V::min(x, V::broadcast_float(kHighestTanhX));
        const Float square = V::mul(y, y), factor = V::fma(square, d, c), z = V::mul(y, factor);
        Float low = V::fma(square, V::broadcast_float(kTanhDLow), V::broadcast_float(kTanhCLow));
        low = V::fma(V::fms(y, y, square), d, low);
        low = V::add_float(V::fma(square, d, V::sub_float(c, factor)), low);
        return V::mul(times_sigmoid<V>(x, reduced<V>(z, V::fma(y, low, V::fms(y, factor, z)))), up);
    }
};

// gate * sigmoid(alpha * gate) * (up + 1), both clamped.
template <class V>
struct SwigluOai {
    typename V::Float alpha, limit, minus_limit;

    explicit SwigluOai(const da8w4_gating &gating)
        : alpha(V::broadcast_float(gating.alpha)),
          limit(V::broadcast_float(gating.limit)),
          minus_limit(V::broadcast_float(-gating.limit)) {}
    typename V::Float operator()(typename V::Float gate, typename V::Float up) const {
        using Float = typename V::Float;
        const Float g = V::max(V::broadcast_float(kLowestGate), V::min(limit, gate)), product = V::mul(g, alpha);
        const Float low =
            V::max(V::min(V::fms(g, alpha, product), V::broadcast_float(kMostLow)), V::broadcast_float(-kMostLow));
        const Float z = V::min(V::max(product, V::broadcast_float(kLowestZ)), V::broadcast_float(kHighestZ));
        const Float u = V::max(minus_limit, V::min(limit, up));
        return V::mul(times_sigmoid<V>(g, reduced<V>(z, low)), V::add_float(u, V::broadcast_float(1)));
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
    switch (job.gating.activation) {
        case DA8W4_SILU: return gate_rows<V, Silu<V>>(job);
        case DA8W4_GELU: return gate_rows<V, Gelu<V>>(job);
        case DA8W4_GELU_TANH: return gate_rows<V, GeluTanh<V>>(job);
        case DA8W4_SWIGLUOAI: return gate_rows<V, SwigluOai<V>>(job);
    }
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
