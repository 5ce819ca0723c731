// From a weight matrix as its quantizer left it to the packed layout.
#include "packing/pack.h"

#include <atomic>
#include <cmath>
#include <cstring>

#include "packing/layout.h"
#include "runtime/parallel.h"

namespace da8w4 {
namespace {

constexpr size_t kMinCodesPerThread = 1 << 16;
constexpr size_t kSegment = 1024;  // codes of one row handled at a time: long reads, and their 16 KiB of lines fit L1

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

struct Extremes {
    int least, most;
};

// What one column of a block carries from segment to segment.
struct Column {
    int32_t sum = 0;  // of code - zp, within the current group
    float total = 0;  // C[n] of docs/numbers.md
};

class Packer {
public:
    Packer(const da8w4_weight &weight, const da8w4_packed &plan, const PackedArrays &to)
        : weight_(weight), plan_(plan), groups_(ceil_div(plan.k, plan.group)), to_(to) {}

    // False if a code is out of range.
    bool pack_block(size_t block) const {
        Column columns[kBlock];
        uint8_t excess = 0;
        const size_t quads = quads_of(plan_.k);
        uint8_t *lines = to_.codes + block * quads * kLineBytes;
        for (size_t k = 0; k < plan_.k; k += kSegment) {
            const size_t count = plan_.k - k < kSegment ? plan_.k - k : kSegment;
            for (size_t n = 0; n < kHalf; n++) {
                uint8_t low[kSegment] = {}, high[kSegment] = {};
                excess |= read_column(block * kBlock + n, k, count, low, &columns[n]);
                excess |= read_column(block * kBlock + n + kHalf, k, count, high, &columns[n + kHalf]);
                uint8_t *to = lines + code_byte(n, k);
                for (size_t i = 0; i < count; i += kQuad, to += kLineBytes) {
                    uint32_t a, b;
                    memcpy(&a, low + i, kQuad);
                    memcpy(&b, high + i, kQuad);
                    a |= b << 4;
                    memcpy(to, &a, kQuad);
                }
            }
        }
        for (size_t n = 0; n < kBlock; n++) to_.sums[block * kBlock + n] = columns[n].total;
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
        store_float(to_.scales, plan_.scale_type, at, real ? scale(column, g) : 0.0f);
        if (weight_.offsets)
            store_float(to_.offsets, plan_.scale_type, at, real ? weight_.offsets[column * groups_ + g] : 0.0f);
        if (to_.zps) to_.zps[at] = static_cast<int8_t>(real ? zp(column, g) : 0);
    }

    const da8w4_weight &weight_;
    const da8w4_packed &plan_;
    const size_t groups_;
    const PackedArrays &to_;
};

// The types in which scales and offsets are stored, the one to be preferred first; the last holds every value.
constexpr da8w4_type kScaleTypes[] = {DA8W4_F16, DA8W4_BF16, DA8W4_F32};
constexpr unsigned kLastScaleType = sizeof kScaleTypes / sizeof *kScaleTypes - 1;

// What all values of an array have in common.
struct Floats {
    bool finite;
    unsigned types;  // bit i: kScaleTypes[i] holds each of them exactly
};

Floats look_at(const float *values, size_t count) {
    std::atomic<bool> all_finite{true};
    std::atomic<unsigned> all_types{~0u};
    parallel(threads_for_packing(count), [&](size_t thread, size_t threads) {
        bool finite = true;
        unsigned types = ~0u;
        const Range range = part_of(count, thread, threads);
        for (size_t i = range.begin; i < range.end; i++) {
            finite = finite && std::isfinite(values[i]);
            for (unsigned type = 0; type < kLastScaleType; type++)
                if (types >> type & 1 && !holds_exactly(kScaleTypes[type], values[i])) types &= ~(1u << type);
        }
        if (!finite) all_finite = false;
        all_types &= types;
    });
    return {.finite = all_finite, .types = all_types};
}

// The least and the greatest zero point, of codes as the caller has them.
Extremes zero_points(const da8w4_weight &weight, size_t count) {
    if (!weight.zps) return {.least = weight.zp, .most = weight.zp};
    Extremes found = {.least = weight.zps[0], .most = weight.zps[0]};
    for (size_t i = 1; i < count; i++) {
        found.least = weight.zps[i] < found.least ? weight.zps[i] : found.least;
        found.most = weight.zps[i] > found.most ? weight.zps[i] : found.most;
    }
    return found;
}

}  // namespace

size_t threads_for_packing(size_t codes) { return lesser(codes / kMinCodesPerThread + 1, num_threads()); }

da8w4_status plan_pack(const da8w4_weight &weight, da8w4_packed *packed, da8w4_packed_bytes *bytes) {
    const size_t groups = ceil_div(weight.k, weight.group), count = weight.n * groups;
    Floats floats = look_at(weight.scales, count);
    if (!floats.finite) return DA8W4_BAD_SCALE;
    if (weight.offsets) {
        const Floats offsets = look_at(weight.offsets, count);
        if (!offsets.finite) return DA8W4_BAD_OFFSET;
        floats.types &= offsets.types;
    }
    size_t scale_type = 0;
    while (!(floats.types >> scale_type & 1)) scale_type++;

    Extremes zps = zero_points(weight, count);
    const int raised = code_offset(weight.format);
    if (zps.least < INT8_MIN - raised || zps.most > INT8_MAX - raised) return DA8W4_BAD_WEIGHT_ZP;
    zps.least += raised;
    zps.most += raised;
    const int above = 15 - zps.least, below = zps.most;  // code - zp lies in -below..above
    const size_t largest = static_cast<size_t>(above > below ? above : below);
    const size_t group = lesser(weight.group, weight.k);
    if (group > INT32_MAX / (128 * largest)) return DA8W4_INT32_OVERFLOW;

    const bool one_zp = zps.least == zps.most;
    const size_t blocks = blocks_of(weight.n), values = blocks * groups * kBlock;
    *packed = {};
    packed->n = weight.n;
    packed->k = weight.k;
    packed->group = group;
    packed->scale_type = kScaleTypes[scale_type];
    packed->zp = one_zp ? zps.least : 0;
    bytes->codes = blocks * quads_of(weight.k) * kLineBytes;
    bytes->scales = values * size_of(packed->scale_type);
    bytes->zps = one_zp ? 0 : values;
    bytes->offsets = weight.offsets ? bytes->scales : 0;
    bytes->sums = blocks * kBlock * sizeof(float);
    return DA8W4_OK;
}

bool pack(const da8w4_weight &weight, const da8w4_packed &plan, const PackedArrays &to) {
    const Packer packer(weight, plan, to);
    const size_t blocks = blocks_of(weight.n);
    std::atomic<bool> good{true};
    // The split of the product: each thread first touches the pages that it will read.
    parallel(threads_for_packing(weight.n * weight.k), [&](size_t thread, size_t threads) {
        const Range range = part_of(blocks, thread, threads);
        for (size_t block = range.begin; block < range.end && good.load(std::memory_order_relaxed); block++)
            if (!packer.pack_block(block)) good = false;
    });
    return good;
}

}  // namespace da8w4
