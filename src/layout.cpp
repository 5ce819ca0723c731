// The packed layout: plan, pack, unpack. Described in docs/packed-format.md.
#include <cmath>
#include <cstring>

#include <atomic>

#include "half.h"
#include "kernel.h"
#include "runtime/parallel.h"

namespace da8w4 {
namespace {

constexpr size_t kSegment = 1024;  // codes of one row handled at a time: long reads, and their 16 KiB of lines fit L1
constexpr size_t kMinCodesPerThread = 1 << 16;

size_t threads_for(size_t codes) {
    const size_t useful = codes / kMinCodesPerThread + 1, most = da8w4_get_num_threads();
    return useful < most ? useful : most;
}

bool fits_f16(float scale) { return bits_of(f16_to_f32(f32_to_f16(scale))) == bits_of(scale); }
bool fits_bf16(float scale) { return (bits_of(scale) & 0xffff) == 0; }

// Codes are stored as 0..15; -8..7 move up by 8, and their zero points with them.
int code_offset(da8w4_codes format) { return format == DA8W4_CODES_S4 ? 8 : 0; }

// Writes `count` codes of a row from k on (an even position) as 0..15; what is out of range keeps
// bits above the nibble.
void read_codes(const da8w4_weight &weight, size_t n, size_t k, size_t count, uint8_t *codes) {
    const uint8_t *row = static_cast<const uint8_t *>(weight.codes) + n * weight.codes_stride;
    switch (weight.format) {
        case DA8W4_CODES_U4: memcpy(codes, row + k, count); break;
        case DA8W4_CODES_S4:
            for (size_t i = 0; i < count; i++) codes[i] = static_cast<uint8_t>(row[k + i] + 8);
            break;
        case DA8W4_CODES_LOW_FIRST:
        case DA8W4_CODES_HIGH_FIRST: {
            const int even = weight.format == DA8W4_CODES_LOW_FIRST ? 0 : 4;
            for (size_t i = 0; i < count; i++) codes[i] = row[(k + i) / 2] >> (i % 2 == 0 ? even : 4 - even) & 15;
            break;
        }
    }
}

void store_float(void *array, da8w4_type type, size_t at, float value) {
    if (type == DA8W4_F32)
        static_cast<float *>(array)[at] = value;
    else
        static_cast<uint16_t *>(array)[at] = type == DA8W4_F16 ? f32_to_f16(value) : f32_to_bf16(value);
}

float load_float(const void *array, da8w4_type type, size_t at) {
    if (type == DA8W4_F32) return static_cast<const float *>(array)[at];
    const uint16_t half = static_cast<const uint16_t *>(array)[at];
    return type == DA8W4_F16 ? f16_to_f32(half) : bf16_to_f32(half);
}

// What one column of a block carries from segment to segment.
struct Column {
    int32_t sum = 0;  // of code - zp, within the current group
    float total = 0;  // C[n] of docs/numbers.md
};

class Packer {
public:
    Packer(const da8w4_weight &weight, const da8w4_packed &plan, uint8_t *codes, void *scales, int8_t *zps,
           void *offsets, float *sums)
        : weight_(weight),
          plan_(plan),
          groups_(ceil_div(plan.k, plan.group)),
          codes_(codes),
          scales_(scales),
          zps_(zps),
          offsets_(offsets),
          sums_(sums) {}

    // False if a code is out of range.
    bool pack_block(size_t block) const {
        Column columns[kBlock];
        uint8_t excess = 0;
        const size_t quads = ceil_div(plan_.k, kQuad);
        uint8_t *lines = codes_ + block * quads * kLineBytes;
        for (size_t k = 0; k < plan_.k; k += kSegment) {
            const size_t count = plan_.k - k < kSegment ? plan_.k - k : kSegment;
            for (size_t n = 0; n < kBlock / 2; n++) {
                uint8_t low[kSegment] = {}, high[kSegment] = {};
                excess |= read_column(block * kBlock + n, k, count, low, &columns[n]);
                excess |= read_column(block * kBlock + n + 16, k, count, high, &columns[n + 16]);
                uint8_t *to = lines + k / kQuad * kLineBytes + n * kQuad;
                for (size_t i = 0; i < count; i += kQuad, to += kLineBytes) {
                    uint32_t a, b;
                    memcpy(&a, low + i, kQuad);
                    memcpy(&b, high + i, kQuad);
                    a |= b << 4;
                    memcpy(to, &a, kQuad);
                }
            }
        }
        for (size_t n = 0; n < kBlock; n++) sums_[block * kBlock + n] = columns[n].total;
        for (size_t g = 0; g < groups_; g++)
            for (size_t n = 0; n < kBlock; n++) store_group(block, g, n);
        return (excess & 0xf0) == 0;
    }

private:
    // Reads a segment of column n and adds it to the column's sums; returns the union of its codes.
    uint8_t read_column(size_t n, size_t k, size_t count, uint8_t *codes, Column *column) const {
        if (n >= plan_.n) return 0;
        read_codes(weight_, n, k, count, codes);
        uint8_t all = 0;
        for (size_t i = 0; i < count; i++) all |= codes[i];
        for (size_t i = 0; i < count;) {
            const size_t g = (k + i) / plan_.group, group_end = (g + 1) * plan_.group;
            const size_t end = group_end - k < count ? group_end - k : count;
            const int32_t length = static_cast<int32_t>(end - i);
            int32_t sum = 0;
            for (; i < end; i++) sum += codes[i];
            column->sum += sum - length * zp(n, g);
            if (k + end == group_end || k + end == plan_.k) {
                column->total = std::fma(static_cast<float>(column->sum), scale(n, g), column->total);
                if (weight_.offsets) {
                    const float group_length = static_cast<float>(k + end - g * plan_.group);
                    column->total = std::fma(group_length, weight_.offsets[n * groups_ + g], column->total);
                }
                column->sum = 0;
            }
        }
        return all;
    }

    float scale(size_t n, size_t g) const { return weight_.scales[n * groups_ + g]; }
    int zp(size_t n, size_t g) const {
        return (weight_.zps ? weight_.zps[n * groups_ + g] : weight_.zp) + code_offset(weight_.format);
    }

    void store_group(size_t block, size_t g, size_t n) const {
        const size_t at = (block * groups_ + g) * kBlock + n, column = block * kBlock + n;
        const bool real = column < plan_.n;
        store_float(scales_, plan_.scale_type, at, real ? scale(column, g) : 0.0f);
        if (weight_.offsets)
            store_float(offsets_, plan_.scale_type, at, real ? weight_.offsets[column * groups_ + g] : 0.0f);
        if (plan_.zps) zps_[at] = static_cast<int8_t>(real ? zp(column, g) : 0);
    }

    const da8w4_weight &weight_;
    const da8w4_packed &plan_;
    const size_t groups_;
    uint8_t *codes_;
    void *scales_;
    int8_t *zps_;
    void *offsets_;
    float *sums_;
};

// What is true of all values of an array: finite, and exactly representable in a type.
struct Floats {
    bool finite, f16, bf16;
};

Floats look_at(const float *values, size_t count) {
    std::atomic<bool> all_finite{true}, all_f16{true}, all_bf16{true};
    parallel(threads_for(count), [&](size_t thread, size_t threads) {
        Floats all = {true, true, true};
        const Range range = part_of(count, thread, threads);
        for (size_t i = range.begin; i < range.end; i++) {
            all.finite = all.finite && std::isfinite(values[i]);
            all.f16 = all.f16 && fits_f16(values[i]);
            all.bf16 = all.bf16 && fits_bf16(values[i]);
        }
        if (!all.finite) all_finite = false;
        if (!all.f16) all_f16 = false;
        if (!all.bf16) all_bf16 = false;
    });
    return {all_finite, all_f16, all_bf16};
}

void unpack_column(const da8w4_packed &packed, size_t column, uint8_t *codes, float *scales, int8_t *zps,
                   float *offsets) {
    const size_t block = column / kBlock, n = column % kBlock, groups = ceil_div(packed.k, packed.group);
    const uint8_t *lines = packed.codes + block * ceil_div(packed.k, kQuad) * kLineBytes + n % 16 * kQuad;
    const int shift = n < 16 ? 0 : 4;
    for (size_t k = 0; k < packed.k; k++) codes[k] = lines[k / kQuad * kLineBytes + k % kQuad] >> shift & 15;
    for (size_t g = 0; g < groups; g++) {
        const size_t at = (block * groups + g) * kBlock + n;
        scales[g] = load_float(packed.scales, packed.scale_type, at);
        if (packed.offsets) offsets[g] = load_float(packed.offsets, packed.scale_type, at);
        zps[g] = packed.zps ? packed.zps[at] : static_cast<int8_t>(packed.zp);
    }
}

}  // namespace
}  // namespace da8w4

using namespace da8w4;

da8w4_status da8w4_plan_pack(const da8w4_weight *weight, da8w4_packed *packed, da8w4_packed_bytes *bytes) {
    if (!weight || !packed || !bytes || !weight->n || !weight->k || !weight->group || !weight->scales ||
        weight->format < DA8W4_CODES_U4 || weight->format > DA8W4_CODES_HIGH_FIRST)
        return DA8W4_BAD_ARGUMENT;
    if (weight->group % kQuad != 0 && weight->group != weight->k) return DA8W4_BAD_GROUP;
    const size_t groups = ceil_div(weight->k, weight->group), count = weight->n * groups;

    const Floats scales = look_at(weight->scales, count);
    if (!scales.finite) return DA8W4_BAD_SCALE;
    const Floats offsets = weight->offsets ? look_at(weight->offsets, count) : Floats{true, true, true};
    if (!offsets.finite) return DA8W4_BAD_OFFSET;
    const bool f16 = scales.f16 && offsets.f16, bf16 = scales.bf16 && offsets.bf16;

    int low = weight->zp, high = weight->zp;
    if (weight->zps) {
        low = high = weight->zps[0];
        for (size_t i = 1; i < count; i++) {
            low = weight->zps[i] < low ? weight->zps[i] : low;
            high = weight->zps[i] > high ? weight->zps[i] : high;
        }
    }
    const int offset = code_offset(weight->format);
    if (low < INT8_MIN - offset || high > INT8_MAX - offset) return DA8W4_BAD_WEIGHT_ZP;
    low += offset;
    high += offset;
    const int above = 15 - low, below = high;  // code - zp lies in -below..above
    const size_t largest = static_cast<size_t>(above > below ? above : below);
    const size_t length = weight->group < weight->k ? weight->group : weight->k;
    if (length > INT32_MAX / (128 * largest)) return DA8W4_INT32_OVERFLOW;

    const size_t blocks = ceil_div(weight->n, kBlock), values = blocks * groups * kBlock;
    *packed = {};
    packed->n = weight->n;
    packed->k = weight->k;
    packed->group = length;
    packed->scale_type = f16 ? DA8W4_F16 : bf16 ? DA8W4_BF16 : DA8W4_F32;
    packed->zp = low == high ? low : 0;
    bytes->codes = blocks * ceil_div(weight->k, kQuad) * kLineBytes;
    bytes->scales = values * (packed->scale_type == DA8W4_F32 ? 4 : 2);
    bytes->zps = low == high ? 0 : values;
    bytes->offsets = weight->offsets ? bytes->scales : 0;
    bytes->sums = blocks * kBlock * sizeof(float);
    return DA8W4_OK;
}

da8w4_status da8w4_pack(const da8w4_weight *weight, const da8w4_packed *plan, uint8_t *codes, void *scales, int8_t *zps,
                        void *offsets, float *sums) {
    da8w4_packed checked;
    da8w4_packed_bytes bytes;
    const da8w4_status status = da8w4_plan_pack(weight, &checked, &bytes);
    if (status != DA8W4_OK) return status;
    const size_t row_bytes = weight->format >= DA8W4_CODES_LOW_FIRST ? ceil_div(weight->k, 2) : weight->k;
    if (!plan || plan->n != checked.n || plan->k != checked.k || plan->group != checked.group ||
        plan->scale_type != checked.scale_type || !codes || !scales || (bytes.zps && !zps) ||
        (bytes.offsets && !offsets) || !sums || !weight->codes || weight->codes_stride < row_bytes)
        return DA8W4_BAD_ARGUMENT;
    checked.zps = bytes.zps ? zps : nullptr;
    const Packer packer(*weight, checked, codes, scales, zps, offsets, sums);
    const size_t blocks = ceil_div(weight->n, kBlock);
    std::atomic<bool> good{true};
    // The split of the product: each thread first touches the pages that it will read.
    parallel(threads_for(weight->n * weight->k), [&](size_t thread, size_t threads) {
        const Range range = part_of(blocks, thread, threads);
        for (size_t block = range.begin; block < range.end && good.load(std::memory_order_relaxed); block++)
            if (!packer.pack_block(block)) good = false;
    });
    return good ? DA8W4_OK : DA8W4_BAD_CODE;
}

da8w4_status da8w4_unpack(const da8w4_packed *packed, uint8_t *codes, float *scales, int8_t *zps, float *offsets) {
    if (!packed || !packed->codes || !packed->scales || !packed->n || !packed->k || !packed->group || !codes ||
        !scales || !zps || (packed->offsets && !offsets))
        return DA8W4_BAD_ARGUMENT;
    const size_t groups = ceil_div(packed->k, packed->group);
    parallel(threads_for(packed->n * packed->k), [&](size_t thread, size_t threads) {
        const Range range = part_of(packed->n, thread, threads);
        for (size_t n = range.begin; n < range.end; n++)
            unpack_column(*packed, n, codes + n * packed->k, scales + n * groups, zps + n * groups,
                          offsets ? offsets + n * groups : nullptr);
    });
    return DA8W4_OK;
}
