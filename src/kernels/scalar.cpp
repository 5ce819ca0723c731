// Kernel scalar: plain C++ for any CPU, and the reference that the tests compare the others with.
// It reads packed codes for any number of rows: unpacking them costs it nothing beside the multiplication.
// Exact because D is summed in int64 and std::fma rounds once.
#include <math.h>

#include "kernels/gate_constants.h"
#include "kernels/kernel.h"
#include "packing/rotation.h"

namespace da8w4 {
namespace {

float clamp(float value, float low, float high) { return fminf(fmaxf(value, low), high); }

// The least and the greatest of a row and 0; false if one is NaN or infinite.
bool range_of(const void *x, da8w4_type x_type, size_t k, float *low, float *high) {
    bool finite = true;
    *low = *high = 0;
    for (size_t i = 0; i < k; i++) {
        const float value = load_float(x, x_type, i);
        finite = finite && __builtin_isfinite(value);
        *low = fminf(*low, value);
        *high = fmaxf(*high, value);
    }
    return finite;
}

void quantize_row(const void *x, da8w4_type x_type, size_t k, bool symmetric, uint8_t flip, void *act, float *scale,
                  int32_t *zp) {
    uint8_t *bytes = static_cast<uint8_t *>(act);
    float low, high;
    const bool finite = range_of(x, x_type, k, &low, &high);
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

void quantize_groups(const void *x, da8w4_type x_type, const Grouping &grouping, int8_t *act, float *scales,
                     size_t stride) {
    for (size_t g = 0, begin = 0; begin < grouping.k; g++, begin += grouping.group) {
        int32_t zp;
        quantize_row(element(x, x_type, begin), x_type, lesser(grouping.group, grouping.k - begin), true, 0,
                     act + begin, scales + g * stride, &zp);
    }
}

void quantize_int16(const void *x, da8w4_type x_type, size_t k, int8_t *upper, int8_t *lower, float *scale) {
    float low, high;
    if (!range_of(x, x_type, k, &low, &high)) {
        memset(upper, 0, k);
        memset(lower, 0, k);
        *scale = float_of(kNanF32);
        return;
    }
    const float s = fmaxf(fmaxf(-low, high) / 32512.0f, kLeastActScale), inverse = 1.0f / s;
    for (size_t i = 0; i < k; i++) {
        const int q = static_cast<int>(nearbyintf(load_float(x, x_type, i) * inverse));
        const int rounded = (q + 128) >> 8;
        upper[i] = static_cast<int8_t>(rounded);
        lower[i] = static_cast<int8_t>(q - 256 * rounded);
    }
    *scale = s;
}

void transform_row(const void *x, da8w4_type x_type, size_t k, const int32_t *perm, const float *factors, float *to) {
    for (size_t i = 0; i < k; i++) {
        const float value = load_float(x, x_type, perm ? static_cast<size_t>(perm[i]) : i);
        to[i] = factors ? value * factors[i] : value;
    }
}

void rotate_row(float *x, size_t k, size_t rotation) {
    rotate([x](size_t i) -> float & { return x[i]; }, k, rotation);
}

void sum_row(const int8_t *act, const Grouping &grouping, int32_t *chunk_sums, size_t stride, int32_t *group_sums) {
    for (size_t g = 0, chunk = 0; g < grouping.groups(); g++) {
        const size_t group_end = lesser((g + 1) * grouping.group, grouping.k);
        int32_t group_sum = 0;
        for (size_t begin = g * grouping.group; begin < group_end; begin += kChunk, chunk++) {
            int32_t sum = 0;
            for (size_t k = begin; k < lesser(begin + kChunk, group_end); k++) sum += act[k];
            chunk_sums[chunk * stride] = sum;
            group_sum += sum;
        }
        if (group_sums) group_sums[g] = group_sum;
    }
}

// Scales and offsets are float32 in the buffer. Its zp_terms are the zero points themselves.
Panel prepare(const PanelJob &job) {
    const PackedBlock &block = job.block;
    const PanelBuffer &buffer = job.buffer;
    const size_t first = job.k.group, groups = ceil_div(job.k.end - first * job.grouping.group, job.grouping.group);
    for (size_t g = 0; g < groups; g++)
        for (size_t n = 0; n < kBlock; n++) {
            buffer.zp_terms[g * kBlock + n] = zp_of(block, first + g, n);
            buffer.scales[g * kBlock + n] = scale_of(block, first + g, n);
            if (block.offsets) buffer.offsets[g * kBlock + n] = offset_of(block, first + g, n);
        }
    Panel panel = {};
    panel.kind = block.kind;
    panel.codes = block.codes_at(job.k.begin);
    panel.first_quad = layout_of(block.kind).in_unit(job.k.begin / kQuad);
    panel.table = block.table;
    panel.scale_type = DA8W4_F32;
    panel.scales = buffer.scales;
    panel.offsets = block.offsets ? buffer.offsets : nullptr;
    panel.zp_terms = buffer.zp_terms;
    panel.zp_stride = kBlock;
    return panel;
}

// Sum of a' * (value - zp) of column n from k = begin to end of the K block; act is at its first k.
int64_t dot(const int8_t *act, const Panel &panel, size_t n, int zp, size_t begin, size_t end) {
    const CodeLayout layout = layout_of(panel.kind);
    int64_t sum = 0;
    for (size_t k = begin; k < end; k += kQuad) {
        const uint32_t word = quad_codes(layout, panel.codes, n, panel.first_quad + k / kQuad);
        uint8_t codes[kQuad];
        memcpy(codes, &word, sizeof codes);
        for (size_t j = 0; j < lesser(kQuad, end - k); j++)
            sum += int64_t{act[k + j]} * (value_of(layout, panel.table, codes[j]) - zp);
    }
    return sum;
}

// One output: row `row` of the tiles, column n. Of 16-bit activations, `row` is that of the upper bytes.
void run_one(const MicroTiles &tiles, const Panel &panel, size_t row, size_t n) {
    const KBlock &block = tiles.k;
    const Grouping &grouping = tiles.grouping;
    const ActRows &rows = tiles.act;
    const size_t parts = rows.is_int16 ? 2 : 1;
    float *acc = tiles.acc + row * kBlock + n;
    float total = block.begin == 0 ? 0.0f : *acc;
    for (size_t g = 0, begin = block.begin, end; begin < block.end; g++, begin = end) {
        const size_t group_begin = (block.group + g) * grouping.group, group_end = group_begin + grouping.group;
        const bool goes_on = group_end > block.end && block.end != grouping.k;
        end = lesser(group_end, block.end);
        float sums[2];
        for (size_t part = 0; part < parts; part++) {
            int32_t *carried = tiles.carried + (row + part) * kBlock + n;
            int64_t sum = dot(rows.rows + (row + part) * rows.stride, panel, n, panel.zp_terms[g * panel.zp_stride + n],
                              begin - block.begin, end - block.begin);
            if (begin != group_begin) sum += *carried;
            if (goes_on) *carried = static_cast<int32_t>(sum);
            sums[part] = static_cast<float>(sum);
        }
        if (goes_on) continue;
        float scale = static_cast<const float *>(panel.scales)[g * kBlock + n];
        if (rows.group_scales) scale *= rows.group_scales[g * rows.sums_stride + row];
        total = fmaf(rows.is_int16 ? fmaf(256.0f, sums[0], sums[1]) : sums[0], scale, total);
        if (!panel.offsets) continue;
        const float offset = static_cast<const float *>(panel.offsets)[g * kBlock + n];
        total = fmaf(rows.group_sums[g * rows.sums_stride + row], offset, total);
    }
    *acc = total;
}

void run(const MicroTiles &tiles, Panel &panel) {
    for (size_t row = 0; row < tiles.rows; row += tiles.act.is_int16 ? 2 : 1)
        for (size_t n = 0; n < kBlock; n++) run_one(tiles, panel, row, n);
}

void epilogue(const Epilogue &epilogue) {
    for (size_t row = 0; row < epilogue.rows; row++)
        for (size_t n = 0; n < epilogue.cols; n++) {
            const float zp = epilogue.act_zps[row], scale = epilogue.act_scales[row];
            const float acc = epilogue.acc[row * epilogue.acc_stride + n];
            const float t = zp == 0 ? acc : fmaf(-zp, epilogue.column_sums[n], acc);
            const float y = epilogue.bias ? fmaf(t, scale, epilogue.bias[n]) : t * scale;
            char *out = static_cast<char *>(epilogue.out) + row * epilogue.out_stride;
            store_float(out, epilogue.out_type, n, y != y ? float_of(kNanF32) : y);
        }
}

// The second where one is NaN, as vector instructions have it.
float least(float a, float b) { return a < b ? a : b; }
float most(float a, float b) { return a > b ? a : b; }

// The integer next to -z / ln 2.
struct Power {
    float n;
    uint32_t shifted;  // n << 23: added to the bits of a float, it multiplies by 2^n
};

Power power_of(float z) {
    const float rounded = fmaf(z, kMinusLog2E, kRound);
    return {.n = rounded - kRound, .shifted = bits_of(rounded) << 23};
}

// z + low = r - n * ln 2
struct Reduced {
    float r;
    uint32_t shifted;
};

Reduced reduced(float z) {
    const Power power = power_of(z);
    return {.r = fmaf(power.n, kLn2Low, fmaf(power.n, kLn2, z)), .shifted = power.shifted};
}

Reduced reduced(float z, float low) {
    const Power power = power_of(z);
    return {.r = fmaf(power.n, kLn2, z) + fmaf(power.n, kLn2Low, low), .shifted = power.shifted};
}

// exp(-r) - 1
float fraction(float r) {
    float sum = kExp[0];
    for (size_t i = 1; i < kExpTerms; i++) sum = fmaf(r, sum, kExp[i]);
    return fmaf(r * r, sum, -r);
}

// x * sigmoid(z)
float times_sigmoid(float x, const Reduced &z) {
    const uint32_t sum = z.shifted + kOneBits, bits = sum < kMostBits ? sum : kMostBits;
    const float power = float_of(bits), scale = float_of(bits - z.shifted);
    return x * scale / (power + fmaf(fraction(z.r), power, scale));
}

float silu(float gate) {
    const float x = most(kLowestZ, gate);
    return times_sigmoid(x, reduced(least(x, kHighestZ)));
}

// max(x, 0) - |x| * erfc(|x| / sqrt(2)) / 2
float gelu(float gate) {
    const float t = least(fabsf(gate), kMostT);
    const uint32_t piece = bits_of(t + 1) >> 22 & 7;
    const float d = t - kGeluCenters[piece];
    float m = kGelu[0][piece];
    for (size_t i = 1; i < kGeluTerms; i++) m = fmaf(d, m, kGelu[i][piece]);
    const float kt = t * kGeluK[piece], z = t * kt;
    const Reduced reduced_z = reduced(z, fmaf(t, kt, -z));
    m = m * float_of(reduced_z.shifted + kMinus64Bits) * 0x1p-64f;
    return fmaf(m, fraction(reduced_z.r), most(-0.0f, gate) + m);
}

float gelu_tanh(float gate) {
    const float x = most(kLowestTanhX, gate), y = least(x, kHighestTanhX);
    const float square = y * y, factor = fmaf(square, kTanhD, kTanhC), z = y * factor;
    float low = fmaf(square, kTanhDLow, kTanhCLow);
    low = fmaf(fmaf(y, y, -square), kTanhD, low);
    low = fmaf(square, kTanhD, kTanhC - factor) + low;
    return times_sigmoid(x, reduced(z, fmaf(y, low, fmaf(y, factor, -z))));
}

// gate * sigmoid(alpha * gate), the gate clamped.
float swish(float gate, float alpha, float limit) {
    const float g = most(kLowestGate, least(limit, gate)), product = g * alpha;
    const float low = most(least(fmaf(g, alpha, -product), kMostLow), -kMostLow);
    return times_sigmoid(g, reduced(least(most(product, kLowestZ), kHighestZ), low));
}

float gated(const da8w4_gating &gating, float gate, float up) {
    switch (gating.activation) {
        case DA8W4_SILU: return silu(gate) * up;
        case DA8W4_GELU: return gelu(gate) * up;
        case DA8W4_GELU_TANH: return gelu_tanh(gate) * up;
        case DA8W4_SWIGLUOAI: break;
    }
    const float u = most(-gating.limit, least(gating.limit, up));
    return swish(gate, gating.alpha, gating.limit) * (u + 1);
}

void gate(const GateJob &job) {
    const size_t step = job.gating.interleaved ? 2 : 1;
    for (size_t row = 0; row < job.rows; row++)
        for (size_t n = 0; n < job.cols; n++) {
            const size_t at = row * job.stride + n * step;
            const float y = gated(job.gating, job.gates[at], job.ups[at]);
            char *out = static_cast<char *>(job.out) + row * job.out_stride;
            store_float(out, job.out_type, n, y != y ? float_of(kNanF32) : y);
        }
}

void sum_slots(const SlotSum &sum) {
    for (size_t n = 0; n < sum.cols; n++) {
        float acc = 0;
        for (size_t slot = 0; slot < sum.slots; slot++) {
            if (sum.rows[slot] < 0) continue;
            const float result = sum.results[static_cast<size_t>(sum.rows[slot]) * sum.stride + n];
            acc = fmaf(result, sum.weights[slot] * sum.scaling, acc);
        }
        store_float(sum.out, sum.out_type, n, acc != acc ? float_of(kNanF32) : acc);
    }
}

PanelPath path(const PanelJob &) {
    return {.left_to = nullptr, .fast = false, .reason = "scalar has one path for all weights"};
}

void read(const char *first, const char *second, size_t step, size_t rounds) {
    uint64_t sum = 0;
    for (size_t i = 0; i < rounds; i++, first += step, second += step) {
        uint64_t words[32];
        memcpy(words, first, 128);
        memcpy(words + 16, second, 128);
        for (const uint64_t word : words) sum += word;
    }
    __asm__ volatile("" : : "m"(sum));
}

size_t multiply(size_t rounds) {
    constexpr size_t kSums = 4;
    int a = 3;
    int sums[kSums] = {};
    for (size_t i = 0; i < rounds; i++)
        for (int &sum : sums) {
            __asm__ volatile("" : "+r"(a));  // or the compiler would multiply once
            sum += a * 5;
        }
    for (int &sum : sums) __asm__ volatile("" : "+r"(sum));
    return rounds * kSums;
}

size_t no_panel(size_t, size_t) { return 0; }
size_t packed_max(size_t, const Tuning &) { return SIZE_MAX; }

constexpr WeightForm kForm = {
    .mr = 2,
    .mc = 256,
    .kc = 1024,
    .pass_blocks = 1,
    .tiles_of_reading = 1,
    .panel_bytes = no_panel,
    .sum_row = sum_row,
    .prepare = prepare,
    .run = run,
    .path = path,
};

}  // namespace

extern constexpr Kernel kernel_scalar = {
    .name = "scalar",
    .description = "portable C++",
    .needs = 0,
    .packed_max = packed_max,
    .packed = kForm,
    .unpacked = kForm,
    .quantize_row = quantize_row,
    .quantize_groups = quantize_groups,
    .quantize_int16 = quantize_int16,
    .transform_row = transform_row,
    .rotate_row = rotate_row,
    .epilogue = epilogue,
    .gate = gate,
    .sum_slots = sum_slots,
    .release = nullptr,
    .read = read,
    .multiply = multiply,
};

}  // namespace da8w4
