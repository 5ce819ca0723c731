// A small valid product, packed by the library, in which a test damages one thing.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "pyda8w4/pyda8w4.h"

namespace check {

struct Example {
    static constexpr size_t kM = 2, kN = 5, kK = 8, kGroups = 2;
    uint8_t codes[kN * kK];
    int8_t table[16] = {-1, 2, 3, -4};
    float scales[kN * kGroups] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, offsets[kN * kGroups] = {};
    int8_t sub_scales[kN * kGroups] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, sub_offsets[kN * kGroups] = {};
    int8_t zps[kN * kGroups] = {};
    da8w4_weight raw = {};
    da8w4_packed packed = {};
    da8w4_packed_bytes bytes = {};
    uint8_t packed_codes[5 * 64];
    float packed_scales[kGroups * 32], packed_offsets[kGroups * 32], packed_sums[32];
    int8_t packed_zps[kGroups * 32], packed_sub_scales[kGroups * 32], packed_sub_offsets[kGroups * 32];
    da8w4_packed_arrays arrays = {packed_codes,   packed_scales,      packed_sub_scales, packed_zps,
                                  packed_offsets, packed_sub_offsets, packed_sums};
    int32_t perm[kK] = {7, 6, 5, 4, 3, 2, 1, 0};
    float factors[kK] = {1, 2, 3, 4, 5, 6, 7, 8};
    alignas(64) uint8_t workspace[4096];
    float x[kM * kK] = {}, act_scales[kM] = {1, 1}, out[kM * kN];
    int32_t act_zps[kM] = {};
    da8w4_call call = {};

    explicit Example(bool linear) {
        memset(codes, 3, sizeof codes);
        zps[0] = 1;
        for (float &value : out) value = -77;
        raw.n = kN;
        raw.k = kK;
        raw.group = 4;
        raw.codes = codes;
        raw.codes_stride = kK;
        raw.scales = scales;
        raw.zps = zps;
        raw.offsets = offsets;
        raw.sub_scale_type = raw.sub_offset_type = static_cast<da8w4_type>(9);  // which one level does not look at
        pack();
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
    void pack() {
        da8w4_plan_pack(&raw, &packed, &bytes);
        da8w4_pack(&raw, &packed, &arrays);
        packed.codes = packed_codes;
        packed.table = raw.table;
        packed.scales = packed_scales;
        packed.sub_scales = bytes.sub_scales ? packed_sub_scales : nullptr;
        packed.zps = bytes.zps ? packed_zps : nullptr;
        packed.offsets = bytes.offsets ? packed_offsets : nullptr;
        packed.sub_offsets = bytes.sub_offsets ? packed_sub_offsets : nullptr;
        packed.sums = packed_sums;
    }
    // These make a valid example of another kind.
    void set_kind(da8w4_kind kind) {
        raw.kind = kind;
        raw.format = kind == DA8W4_INT8 ? DA8W4_CODES_SIGNED : DA8W4_CODES_UNSIGNED;
        raw.table = nullptr;
        pack();
    }
    void use_table() {
        raw.kind = DA8W4_TABLE4;
        raw.table = table;
        raw.zps = nullptr;
        pack();
    }
    void use_two_levels() {
        raw.super = 2;
        raw.sub_scales = sub_scales;
        raw.sub_offsets = sub_offsets;
        raw.sub_scale_type = DA8W4_U8;
        raw.sub_offset_type = DA8W4_S8;
        pack();
    }
    bool untouched() const {
        return std::all_of(out, out + kM * kN, [](float value) { return value == -77; });
    }
};

}  // namespace check
