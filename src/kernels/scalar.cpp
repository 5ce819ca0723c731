// Kernel scalar: plain C++ for any CPU, and the reference that the tests compare the others with.
// It reads packed codes for any number of rows: unpacking a nibble costs it nothing beside the multiplication.
// Exact because D is summed in int64 and std::fma rounds once.
#include <math.h>

#include "kernels/kernel.h"

namespace da8w4 {
namespace {

float clamp(float value, float low, float high) { return fminf(fmaxf(value, low), high); }

void quantize_row(const void *x, da8w4_type x_type, size_t k, bool symmetric, uint8_t flip, void *act, float *scale,
                  int32_t *zp) {
    uint8_t *bytes = static_cast<uint8_t *>(act);
    float low = 0, high = 0;
    bool finite = true;
    for (size_t i = 0; i < k; i++) {
        float value = load_float(x, x_type, i);
        finite = finite && __builtin_isfinite(value);
        low = fminf(low, value);
        high = fmaxf(high, value);
    }
    float s = symmetric ? fmaxf(-low, high) / 127.0f : (high - low) / 255.0f;
    if (!finite || !__builtin_isfinite(s)) {
        memset(bytes, flip, k);
        *scale = float_of(kNanF32);
        *zp = 0;
        return;
    }
    s = fmaxf(s, kLeastActScale);
    float z = symmetric ? 0.0f : clamp(-nearbyintf(low / s), 0.0f, 255.0f);
    float c = symmetric ? 0.0f : 128.0f, a_low = symmetric ? -127.0f : 0.0f, a_high = symmetric ? 127.0f : 255.0f;
    float inverse = 1.0f / s;
    for (size_t i = 0; i < k; i++) {
        float a = clamp(nearbyintf(load_float(x, x_type, i) * inverse) + z, a_low, a_high);
        bytes[i] = static_cast<uint8_t>(static_cast<int8_t>(a - c)) ^ flip;
    }
    *scale = s;
    *zp = static_cast<int32_t>(z - c);
}

void sum_row(const int8_t *act, const Grouping &grouping, int32_t *chunk_sums, float *group_sums, size_t stride) {
    for (size_t g = 0, chunk = 0; g < grouping.groups(); g++) {
        const size_t group_end = lesser((g + 1) * grouping.group, grouping.k);
        int64_t group_sum = 0;
        for (size_t begin = g * grouping.group; begin < group_end; begin += kChunk, chunk++) {
            int32_t sum = 0;
            for (size_t k = begin; k < lesser(begin + kChunk, group_end); k++) sum += act[k];
            chunk_sums[chunk * stride] = sum;
            group_sum += sum;
        }
        if (group_sums) group_sums[g * stride] = static_cast<float>(group_sum);
    }
}

// Its zp_terms are the zero points themselves.
Panel prepare(const PanelJob &job) {
    const PackedBlock &block = job.block;
    const size_t group = job.k.group;
    const size_t groups = ceil_div(job.k.end - group * job.grouping.group, job.grouping.group);
    for (size_t i = 0; i < groups * kBlock; i++) job.buffer.zp_terms[i] = block.zps ? block.zps_at(group)[i] : block.zp;
    Panel panel = {};
    panel.codes = block.codes_at(job.k.begin);
    panel.scale_type = block.scale_type;
    panel.scales = block.scales_at(group);
    panel.offsets = block.offsets_at(group);
    panel.zp_terms = job.buffer.zp_terms;
    panel.zp_stride = kBlock;
    return panel;
}

// Sum of a' * (code - zp) of one column from k = begin to end of the K block; act is at its first k.
int64_t dot(const int8_t *act, const uint8_t *codes, size_t n, int zp, size_t begin, size_t end) {
    int64_t sum = 0;
    for (size_t k = begin; k < end; k++) sum += int64_t{act[k]} * ((codes[code_byte(n, k)] >> code_shift(n) & 15) - zp);
    return sum;
}

// One output: row `row` of the tiles, column n.
void run_one(const MicroTiles &tiles, const Panel &panel, size_t row, size_t n) {
    const KBlock &block = tiles.k;
    const Grouping &grouping = tiles.grouping;
    float *acc = tiles.acc + row * kBlock + n;
    int32_t *carried = tiles.carried + row * kBlock + n;
    float total = block.begin == 0 ? 0.0f : *acc;
    for (size_t g = 0, begin = block.begin, end; begin < block.end; g++, begin = end) {
        const size_t group_begin = (block.group + g) * grouping.group, group_end = group_begin + grouping.group;
        end = lesser(group_end, block.end);
        int64_t sum = dot(tiles.act.rows + row * tiles.act.stride, panel.codes, n,
                          panel.zp_terms[g * panel.zp_stride + n], begin - block.begin, end - block.begin);
        if (begin != group_begin) sum += *carried;
        if (end != group_end && end != grouping.k) {
            *carried = static_cast<int32_t>(sum);
            continue;
        }
        total = fmaf(static_cast<float>(sum), load_float(panel.scales, panel.scale_type, g * kBlock + n), total);
        if (!panel.offsets) continue;
        const float group_sum = tiles.act.group_sums[g * tiles.act.sums_stride + row];
        total = fmaf(group_sum, load_float(panel.offsets, panel.scale_type, g * kBlock + n), total);
    }
    *acc = total;
}

void run(const MicroTiles &tiles, Panel &panel) {
    for (size_t row = 0; row < tiles.rows; row++)
        for (size_t n = 0; n < kBlock; n++) run_one(tiles, panel, row, n);
}

void epilogue(const Epilogue &epilogue) {
    for (size_t row = 0; row < epilogue.rows; row++)
        for (size_t n = 0; n < epilogue.cols; n++) {
            const float zp = epilogue.act_zps[row], scale = epilogue.act_scales[row];
            const float acc = epilogue.acc[row * kBlock + n];
            const float t = zp == 0 ? acc : fmaf(-zp, epilogue.column_sums[n], acc);
            const float y = epilogue.bias ? fmaf(t, scale, epilogue.bias[n]) : t * scale;
            char *out = static_cast<char *>(epilogue.out) + row * epilogue.out_stride;
            store_float(out, epilogue.out_type, n, y != y ? float_of(kNanF32) : y);
        }
}

size_t no_panel(size_t, size_t) { return 0; }

constexpr WeightForm kForm = {
    .mr = 1,
    .mc = 256,
    .kc = 1024,
    .pass_blocks = 1,
    .panel_bytes = no_panel,
    .sum_row = sum_row,
    .prepare = prepare,
    .run = run,
};

}  // namespace

extern constexpr Kernel kernel_scalar = {
    .name = "scalar",
    .description = "portable C++",
    .needs = 0,
    .packed_max = SIZE_MAX,
    .packed = kForm,
    .unpacked = kForm,
    .quantize_row = quantize_row,
    .epilogue = epilogue,
    .release = nullptr,
};

}  // namespace da8w4
