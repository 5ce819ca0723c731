// The last step of a product: zero points of activations, scale, bias, and the type of the output.
#pragma once

#include "kernels/kernel.h"
#include "kernels/simd/vec.h"

namespace da8w4 {
namespace {

template <class V, da8w4_type kOutType>
void epilogue_to(const Epilogue &epilogue) {
    constexpr size_t kBytes = size_of(kOutType);
    const bool whole = epilogue.cols == kBlock;
    alignas(64) float bias[kBlock];
    alignas(64) char rest[kBlock * kBytes];
    if (epilogue.bias) {
        memset(bias, 0, sizeof bias);
        memcpy(bias, epilogue.bias, epilogue.cols * sizeof(float));
    }
    const float *acc = epilogue.acc;
    char *out = static_cast<char *>(epilogue.out);
    for (size_t row = 0; row < epilogue.rows; row++, acc += epilogue.acc_stride, out += epilogue.out_stride) {
        const typename V::Float scale = V::broadcast_float(epilogue.act_scales[row]);
        const typename V::Float minus_zp = V::broadcast_float(-epilogue.act_zps[row]);
        for (size_t n = 0; n < kBlock; n += V::kLanes) {
            typename V::Float t = V::load_f32(acc + n);
            if (epilogue.act_zps[row] != 0) t = V::fma(minus_zp, V::load_f32(epilogue.column_sums + n), t);
            t = epilogue.bias ? V::fma(t, scale, V::load_f32(bias + n)) : V::mul(t, scale);
            store_floats<V>((whole ? out : rest) + n * kBytes, kOutType, V::one_nan(t));
        }
        if (!whole) memcpy(out, rest, epilogue.cols * kBytes);
    }
}

template <class V>
void epilogue(const Epilogue &epilogue) {
    if (epilogue.out_type == DA8W4_F32)
        epilogue_to<V, DA8W4_F32>(epilogue);
    else if (epilogue.out_type == DA8W4_F16)
        epilogue_to<V, DA8W4_F16>(epilogue);
    else
        epilogue_to<V, DA8W4_BF16>(epilogue);
}

}  // namespace
}  // namespace da8w4
