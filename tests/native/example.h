// A small valid product, packed by the library, in which a test damages one thing.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "pyda8w4/pyda8w4.h"

namespace check {

struct Example {
    static constexpr size_t kM = 2, kN = 5, kK = 8;
    uint8_t codes[kN * kK];
    float scales[kN * 2] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, offsets[kN * 2] = {};
    int8_t zps[kN * 2] = {};
    da8w4_weight raw = {kN, kK, 4, DA8W4_CODES_U4, codes, kK, scales, zps, 0, offsets};
    da8w4_packed packed = {};
    da8w4_packed_bytes bytes = {};
    uint8_t packed_codes[2 * 64];
    float packed_scales[2 * 32], packed_offsets[2 * 32], packed_sums[32];
    int8_t packed_zps[2 * 32];
    alignas(64) uint8_t workspace[4096];
    float x[kM * kK] = {}, act_scales[kM] = {1, 1}, out[kM * kN];
    int32_t act_zps[kM] = {};
    da8w4_call call = {};

    explicit Example(bool linear) {
        memset(codes, 3, sizeof codes);
        zps[0] = 1;
        for (float &value : out) value = -77;
        da8w4_plan_pack(&raw, &packed, &bytes);
        da8w4_pack(&raw, &packed, packed_codes, packed_scales, packed_zps, packed_offsets, packed_sums);
        packed.codes = packed_codes;
        packed.scales = packed_scales;
        packed.zps = packed_zps;
        packed.offsets = packed_offsets;
        packed.sums = packed_sums;
        call.m = kM;
        call.act = x;
        call.act_type = linear ? DA8W4_F32 : DA8W4_U8;
        call.act_stride = linear ? kK * sizeof(float) : kK;
        call.act_scales = act_scales;
        call.act_zps = act_zps;
        call.weight = &packed;
        call.out = out;
        call.out_type = DA8W4_F32;
        call.out_stride = kN * sizeof(float);
        call.workspace = workspace;
        call.workspace_bytes = sizeof workspace;
    }
    bool untouched() const {
        return std::all_of(out, out + kM * kN, [](float value) { return value == -77; });
    }
};

}  // namespace check
