// Holds every kernel of the library against the kernel "scalar", bit for bit, and "scalar" against a
// plain evaluation of docs/numbers.md. Uses the C interface only.
//
//     checkkernels [--kernel NAME] [--seed N] [--quick] [--list]
//
// Every operand ends exactly at a page that cannot be touched, or starts right after one. Outputs and
// workspaces start out full of garbage, and what lies between the rows of an output must stay. Each
// call has its own number of threads, size of workspace and floating-point mode, drawn from the seed.
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "pyda8w4/pyda8w4.h"

namespace {

// ---- randomness, memory ----------------------------------------------------------------------

// splitmix64: the same numbers on every machine, which the distributions of <random> do not promise.
class Random {
public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t bits() {
        uint64_t z = state_ += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    size_t below(size_t count) { return static_cast<size_t>(bits() % count); }
    bool one_in(size_t count) { return below(count) == 0; }
    int between(int low, int high) { return low + static_cast<int>(below(static_cast<size_t>(high - low) + 1)); }
    float uniform(float low, float high) { return low + (high - low) * (static_cast<float>(bits() >> 40) * 0x1p-24f); }

private:
    uint64_t state_;
};

// One operand between two pages that fault. Each take() gives it anew, full of garbage, and ends the last.
class Guarded {
public:
    template <class T>
    T *take(size_t count, bool at_end) {
        static const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        const size_t bytes = count * sizeof(T);
        if (bytes > room_) {
            if (begin_) munmap(begin_ - page, room_ + 2 * page);
            room_ = (2 * bytes + page - 1) / page * page;
            void *memory = mmap(nullptr, room_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (memory == MAP_FAILED) abort();
            begin_ = static_cast<uint8_t *>(memory) + page;
            if (mprotect(begin_, room_, PROT_READ | PROT_WRITE) != 0) abort();
        }
        uint8_t *at = at_end ? begin_ + room_ - bytes : begin_;
        for (size_t i = 0; i < bytes; i++) at[i] = garbage(i);
        return reinterpret_cast<T *>(at);
    }
    template <class T>
    T *take(const std::vector<T> &values, bool at_end) {
        T *to = take<T>(values.size(), at_end);
        if (!values.empty()) memcpy(to, values.data(), values.size() * sizeof(T));
        return to;
    }
    // As floats: NaN and large ones.
    static uint8_t garbage(size_t i) { return static_cast<uint8_t>(0xff - (i / 4 & 3)); }

private:
    uint8_t *begin_ = nullptr;
    size_t room_ = 0;
};

Guarded raw_codes, raw_scales, raw_zps, raw_offsets, packed_codes, packed_scales, packed_zps, packed_offsets,
    packed_sums, unpacked_codes, unpacked_scales, unpacked_zps, unpacked_offsets, inputs, input_scales, input_zps,
    biases, outputs, workspaces, quantized, quantized_scales, quantized_zps;

// ---- results ---------------------------------------------------------------------------------

struct Tally {
    std::string name;
    size_t passed = 0, failed = 0;
};

char current[512];  // what runs now, for a crash

void expect(Tally &tally, bool good, const char *format, ...) {
    if (good) {
        tally.passed++;
        return;
    }
    if (tally.failed++ == 20) printf("FAILED %s: more of them, not shown\n", tally.name.c_str());
    if (tally.failed > 20) return;
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    printf("FAILED %s: %s\n    in %s\n", tally.name.c_str(), text, current);
}

void crashed(int signal) {
    const char text[] = "CRASHED in ";
    (void)!write(STDOUT_FILENO, text, sizeof text - 1);
    (void)!write(STDOUT_FILENO, current, strlen(current));
    (void)!write(STDOUT_FILENO, "\n", 1);
    struct sigaction standard = {};
    standard.sa_handler = SIG_DFL;
    sigaction(signal, &standard, nullptr);  // the instruction is run again, and ends the process
}

// ---- floating point --------------------------------------------------------------------------

// A mode in which a library that trusts its caller's would compute other bits.
class FloatMode {
public:
    explicit FloatMode(bool hostile) : hostile_(hostile) {
        if (!hostile) return;
        std::fesetround(FE_UPWARD);
#if defined(__SSE__)
        _mm_setcsr(_mm_getcsr() | 0x8040);  // subnormals are flushed and read as zero
        csr_ = _mm_getcsr();
#endif
    }
    // Back to normal; false if a call has changed the mode.
    bool restore() {
        if (!hostile_) return true;
        bool kept = std::fegetround() == FE_UPWARD;
#if defined(__SSE__)
        kept = kept && _mm_getcsr() == csr_;
#endif
        std::fesetenv(FE_DFL_ENV);
        return kept;
    }

private:
    bool hostile_;
    uint32_t csr_ = 0;
};

struct Half {
    int mantissa, least_exponent;
    uint16_t infinity, nan;
};
Half half_of(da8w4_type type) {
    return type == DA8W4_F16 ? Half{10, -14, 0x7c00, 0x7e00} : Half{7, -126, 0x7f80, 0x7fc0};
}

uint16_t to_half(float value, da8w4_type type) {
    const Half half = half_of(type);
    if (std::isnan(value)) return half.nan;
    const int sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isinf(value)) return static_cast<uint16_t>(sign | half.infinity);
    const double magnitude = std::fabs(static_cast<double>(value));
    const int exponent = magnitude == 0 ? half.least_exponent : std::max(std::ilogb(magnitude), half.least_exponent);
    // Adding the units to the exponent's bits lets a carry raise the exponent, up to infinity.
    const double units = std::nearbyint(std::ldexp(magnitude, half.mantissa - exponent));
    const double bits = std::ldexp(exponent - half.least_exponent, half.mantissa) + units;
    return static_cast<uint16_t>(sign | std::min(static_cast<int>(bits), static_cast<int>(half.infinity)));
}

float from_half(uint16_t bits, da8w4_type type) {
    const Half half = half_of(type);
    const int magnitude = bits & 0x7fff, exponent = magnitude >> half.mantissa;
    const int mantissa = magnitude & ((1 << half.mantissa) - 1);
    double value;
    if (magnitude > half.infinity)
        value = std::numeric_limits<double>::quiet_NaN();
    else if (magnitude == half.infinity)
        value = std::numeric_limits<double>::infinity();
    else if (exponent == 0)
        value = std::ldexp(mantissa, half.least_exponent - half.mantissa);
    else
        value = std::ldexp(mantissa + (1 << half.mantissa), exponent - 1 + half.least_exponent - half.mantissa);
    return static_cast<float>(bits & 0x8000 ? -value : value);
}

float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
bool same_bits(float a, float b) { return memcmp(&a, &b, sizeof a) == 0; }

size_t size_of(da8w4_type type) { return type == DA8W4_F32 ? 4 : type == DA8W4_F16 || type == DA8W4_BF16 ? 2 : 1; }
const char *name_of(da8w4_type type) {
    const char *const names[] = {"f32", "f16", "bf16", "u8", "s8"};
    return names[type];
}

// A finite float of any size, exactly representable in the type.
float any_finite(Random &random, da8w4_type type) {
    for (;;) {
        const uint64_t bits = random.bits();
        const float value =
            type == DA8W4_F32 ? float_of(static_cast<uint32_t>(bits)) : from_half(static_cast<uint16_t>(bits), type);
        if (std::isfinite(value)) return value;
    }
}

float as_type(float value, da8w4_type type) {
    return type == DA8W4_F32 ? value : from_half(to_half(value, type), type);
}

// Writes a float as F32, F16 or BF16; reads one back.
void put(std::vector<uint8_t> &bytes, size_t at, float value, da8w4_type type) {
    const uint16_t half = type == DA8W4_F32 ? 0 : to_half(value, type);
    memcpy(&bytes[at], type == DA8W4_F32 ? static_cast<const void *>(&value) : &half, size_of(type));
}
float get(const uint8_t *at, da8w4_type type) {
    float value;
    uint16_t half;
    memcpy(type == DA8W4_F32 ? static_cast<void *>(&value) : &half, at, size_of(type));
    return type == DA8W4_F32 ? value : from_half(half, type);
}

// ---- weights ---------------------------------------------------------------------------------

// A weight as a plain matrix: code[n][k] and zp[n][g] are those of the caller's format.
struct Matrix {
    size_t n, k, group, groups;
    da8w4_codes format;
    da8w4_type scale_type;
    std::vector<int> codes, zps;
    std::vector<float> scales, offsets;  // offsets empty: none
    bool one_zp;
};

Matrix random_matrix(Random &random, size_t n, size_t k, size_t group) {
    Matrix w = {};
    w.n = n;
    w.k = k;
    w.group = group;
    w.groups = (k + group - 1) / group;
    w.format = static_cast<da8w4_codes>(random.below(4));
    const bool s4 = w.format == DA8W4_CODES_S4;
    const int lowest = s4 ? -8 : 0, highest = lowest + 15, zp_highest = s4 ? 119 : 127;

    const bool constant = random.one_in(8);
    const int code = random.one_in(2) ? lowest : highest;
    w.codes.resize(n * k);
    for (int &value : w.codes) value = constant ? code : random.between(lowest, highest);

    // One zero point; ordinary ones; any; only the two extremes.
    const size_t zp_kind = random.below(4);
    w.one_zp = zp_kind == 0;
    const int zp = random.between(-128, zp_highest);
    w.zps.resize(n * w.groups);
    for (int &value : w.zps)
        value = zp_kind == 0   ? zp
                : zp_kind == 1 ? random.between(lowest, highest)
                : zp_kind == 2 ? random.between(-128, zp_highest)
                               : (random.one_in(2) ? -128 : zp_highest);

    w.scale_type = static_cast<da8w4_type>(random.below(3));
    const bool any_size = random.one_in(4);
    w.scales.resize(n * w.groups);
    for (float &value : w.scales)
        value = any_size ? any_finite(random, w.scale_type) : as_type(random.uniform(-0.1f, 0.1f), w.scale_type);

    if (random.one_in(2)) return w;
    const da8w4_type offset_type = random.one_in(4) ? static_cast<da8w4_type>(random.below(3)) : w.scale_type;
    w.offsets.resize(n * w.groups);
    for (float &value : w.offsets)
        value = any_size ? any_finite(random, offset_type) : as_type(random.uniform(-1, 1), offset_type);
    return w;
}

struct Weight {
    Matrix matrix;
    da8w4_packed packed;
};

// The type in which the plan has to keep scales and offsets.
da8w4_type narrowest(const Matrix &w) {
    for (da8w4_type type : {DA8W4_F16, DA8W4_BF16}) {
        bool exact = true;
        for (const std::vector<float> *values : {&w.scales, &w.offsets})
            for (float value : *values) exact = exact && same_bits(value, as_type(value, type));
        if (exact) return type;
    }
    return DA8W4_F32;
}

Weight pack(Random &random, Tally &tally, const Matrix &w) {
    snprintf(current, sizeof current, "pack n=%zu k=%zu group=%zu format=%d scales=%s", w.n, w.k, w.group, w.format,
             name_of(w.scale_type));
    const bool at_end = !random.one_in(4), nibbles = w.format >= DA8W4_CODES_LOW_FIRST;
    const size_t row_bytes = nibbles ? (w.k + 1) / 2 : w.k, stride = row_bytes + random.below(2) * random.below(9);
    std::vector<uint8_t> codes((w.n - 1) * stride + row_bytes, 0xff);
    for (size_t n = 0; n < w.n; n++)
        for (size_t k = 0; k < w.k; k++) {
            uint8_t &byte = codes[n * stride + (nibbles ? k / 2 : k)];
            const int code = w.codes[n * w.k + k], shift = (k % 2 != 0) == (w.format == DA8W4_CODES_LOW_FIRST) ? 4 : 0;
            byte = static_cast<uint8_t>(nibbles ? (byte & ~(15 << shift)) | code << shift : code);
        }
    const std::vector<int8_t> zps(w.zps.begin(), w.zps.end());
    const bool give_zps = !w.one_zp || random.one_in(2);
    const da8w4_weight weight = {w.n,
                                 w.k,
                                 w.group,
                                 w.format,
                                 raw_codes.take(codes, at_end),
                                 stride,
                                 raw_scales.take(w.scales, at_end),
                                 give_zps ? raw_zps.take(zps, at_end) : nullptr,
                                 give_zps ? 99 : w.zps[0],
                                 w.offsets.empty() ? nullptr : raw_offsets.take(w.offsets, at_end)};

    Weight result = {w, {}};
    da8w4_packed &packed = result.packed;
    da8w4_packed_bytes bytes;
    const int offset = w.format == DA8W4_CODES_S4 ? 8 : 0;
    da8w4_set_num_threads(1 + random.below(3));
    FloatMode mode(random.one_in(4));
    const da8w4_status planned = da8w4_plan_pack(&weight, &packed, &bytes);
    uint8_t *const to_codes = packed_codes.take<uint8_t>(bytes.codes, at_end);
    uint8_t *const to_scales = packed_scales.take<uint8_t>(bytes.scales, at_end);
    int8_t *const to_zps = bytes.zps ? packed_zps.take<int8_t>(bytes.zps, at_end) : nullptr;
    uint8_t *const to_offsets = bytes.offsets ? packed_offsets.take<uint8_t>(bytes.offsets, at_end) : nullptr;
    float *const to_sums = packed_sums.take<float>(bytes.sums / sizeof(float), at_end);
    const auto pack_again = [&] {
        return da8w4_pack(&weight, &packed, to_codes, to_scales, to_zps, to_offsets, to_sums);
    };
    const da8w4_status done = pack_again();
    expect(tally, mode.restore(), "the caller's floating-point mode was changed");
    expect(tally, planned == DA8W4_OK && done == DA8W4_OK, "plan: %s; pack: %s", da8w4_status_text(planned),
           da8w4_status_text(done));
    const size_t padded = (w.n + 31) / 32 * 32;
    const bool one_zp = std::count(w.zps.begin(), w.zps.end(), w.zps[0]) == static_cast<ptrdiff_t>(w.zps.size());
    expect(tally,
           packed.scale_type == narrowest(w) && packed.group == std::min(w.group, w.k) &&
               packed.zp == (one_zp ? w.zps[0] + offset : 0) && bytes.codes == padded / 2 * ((w.k + 3) / 4 * 4) &&
               bytes.scales == padded * w.groups * size_of(packed.scale_type) &&
               bytes.zps == (one_zp ? 0 : padded * w.groups) &&
               bytes.offsets == (w.offsets.empty() ? 0 : bytes.scales) && bytes.sums == padded * sizeof(float),
           "the plan has scales %s, group %zu, zp %d", name_of(packed.scale_type), packed.group, packed.zp);

    // Packed bytes may be hashed: padding must not depend on what lay in the arrays, nor on threads.
    const std::vector<uint8_t> first(to_codes, to_codes + bytes.codes);
    std::vector<uint8_t> rest(to_scales, to_scales + bytes.scales);
    rest.insert(rest.end(), reinterpret_cast<uint8_t *>(to_zps), reinterpret_cast<uint8_t *>(to_zps) + bytes.zps);
    rest.insert(rest.end(), to_offsets, to_offsets + bytes.offsets);
    rest.insert(rest.end(), reinterpret_cast<uint8_t *>(to_sums), reinterpret_cast<uint8_t *>(to_sums) + bytes.sums);
    memset(to_codes, 0, bytes.codes);
    memset(to_scales, 0, bytes.scales);
    if (to_zps) memset(to_zps, 0, bytes.zps);
    if (to_offsets) memset(to_offsets, 0, bytes.offsets);
    memset(to_sums, 0, bytes.sums);
    da8w4_set_num_threads(1 + random.below(3));
    if (!nibbles) {  // one code out of range, wherever it is
        const size_t n = random.below(w.n), k = random.below(w.k);
        uint8_t &code = const_cast<uint8_t *>(static_cast<const uint8_t *>(weight.codes))[n * stride + k];
        const uint8_t good = code;
        code = w.format == DA8W4_CODES_S4 ? 8 + random.below(240) : 16 + random.below(240);
        const da8w4_status refused = pack_again();
        expect(tally, refused == DA8W4_BAD_CODE, "code %d at [%zu][%zu]: %s", code, n, k, da8w4_status_text(refused));
        code = good;
    }
    (void)pack_again();
    const uint8_t *again = rest.data(), *again_offsets = again + bytes.scales + bytes.zps;
    expect(tally,
           memcmp(first.data(), to_codes, bytes.codes) == 0 && memcmp(again, to_scales, bytes.scales) == 0 &&
               (!to_zps || memcmp(again + bytes.scales, to_zps, bytes.zps) == 0) &&
               (!to_offsets || memcmp(again_offsets, to_offsets, bytes.offsets) == 0) &&
               memcmp(again_offsets + bytes.offsets, to_sums, bytes.sums) == 0,
           "packing twice gives different bytes");
    packed.codes = to_codes;
    packed.scales = to_scales;
    packed.zps = to_zps;
    packed.offsets = to_offsets;
    packed.sums = to_sums;

    uint8_t *const back_codes = unpacked_codes.take<uint8_t>(w.n * w.k, at_end);
    float *const back_scales = unpacked_scales.take<float>(w.n * w.groups, at_end);
    int8_t *const back_zps = unpacked_zps.take<int8_t>(w.n * w.groups, at_end);
    float *const back_offsets = to_offsets ? unpacked_offsets.take<float>(w.offsets.size(), at_end) : nullptr;
    FloatMode unpack_mode(random.one_in(4));
    const da8w4_status unpacked = da8w4_unpack(&packed, back_codes, back_scales, back_zps, back_offsets);
    expect(tally, unpack_mode.restore(), "unpack changed the caller's floating-point mode");
    bool same = unpacked == DA8W4_OK && memcmp(back_scales, w.scales.data(), w.scales.size() * sizeof(float)) == 0;
    same = same && (!to_offsets || memcmp(back_offsets, w.offsets.data(), w.offsets.size() * sizeof(float)) == 0);
    for (size_t i = 0; i < w.codes.size(); i++) same = same && back_codes[i] == w.codes[i] + offset;
    for (size_t i = 0; i < w.zps.size(); i++) same = same && back_zps[i] == w.zps[i] + offset;
    expect(tally, same, "unpacking does not give back what was packed");

    // A weight read from a file may have anything in its padding.
    const size_t quads = (w.k + 3) / 4;
    for (size_t column = 0; column < padded; column++) {
        const size_t block = column / 32, n = column % 32;
        const uint8_t nibble = n < 16 ? 0x0f : 0xf0;
        for (size_t k = column < w.n ? w.k : 0; k < quads * 4; k++)
            to_codes[(block * quads + k / 4) * 64 + n % 16 * 4 + k % 4] |= nibble;
        if (column < w.n) continue;
        for (size_t g = 0; g < w.groups; g++) {
            const size_t at = (block * w.groups + g) * 32 + n, size = size_of(packed.scale_type);
            memset(to_scales + at * size, 0xff, size);
            if (to_offsets) memset(to_offsets + at * size, 0xff, size);
            if (to_zps) to_zps[at] = 1;
        }
        memset(to_sums + column, 0xff, sizeof(float));
    }
    return result;
}

// ---- the oracle ------------------------------------------------------------------------------

struct Row {
    std::vector<int> act;  // as the type has them: 0..255 or -128..127
    float scale;
    int zp;
};

Row quantize(const std::vector<float> &x, bool symmetric) {
    float low = 0, high = 0;
    bool finite = true;
    for (float value : x) {
        finite = finite && std::isfinite(value);
        if (value < low) low = value;
        if (value > high) high = value;
    }
    float s = symmetric ? std::max(-low, high) / 127.0f : (high - low) / 255.0f;
    const int neutral = symmetric ? 0 : 128;
    if (!finite || !std::isfinite(s)) return {std::vector<int>(x.size(), neutral), float_of(0x7fc00000), neutral};
    s = std::max(s, 0x1p-23f);
    const float z = symmetric ? 0.0f : std::clamp(-std::nearbyint(low / s), 0.0f, 255.0f);
    const float inverse = 1.0f / s;
    Row row = {{}, s, static_cast<int>(z)};
    for (float value : x)
        row.act.push_back(static_cast<int>(
            std::clamp(std::nearbyint(value * inverse) + z, symmetric ? -127.0f : 0.0f, symmetric ? 127.0f : 255.0f)));
    return row;
}

// One output as float32; c is 128 for uint8, 0 for int8.
float product(const Matrix &w, const Row &row, int c, size_t n, const float *bias) {
    float acc = 0, column = 0;
    for (size_t g = 0; g < w.groups; g++) {
        int64_t dot = 0, sum = 0, act = 0;
        const size_t begin = g * w.group, end = std::min(w.k, begin + w.group);
        for (size_t k = begin; k < end; k++) {
            const int value = w.codes[n * w.k + k] - w.zps[n * w.groups + g];
            dot += (row.act[k] - c) * value;
            sum += value;
            act += row.act[k] - c;
        }
        acc = std::fma(static_cast<float>(dot), w.scales[n * w.groups + g], acc);
        column = std::fma(static_cast<float>(sum), w.scales[n * w.groups + g], column);
        if (w.offsets.empty()) continue;
        acc = std::fma(static_cast<float>(act), w.offsets[n * w.groups + g], acc);
        column = std::fma(static_cast<float>(end - begin), w.offsets[n * w.groups + g], column);
    }
    const int zp = row.zp - c;
    const float t = zp == 0 ? acc : std::fma(-static_cast<float>(zp), column, acc);
    return bias ? std::fma(t, row.scale, bias[n]) : t * row.scale;
}

// ---- calls -----------------------------------------------------------------------------------

struct Case {
    size_t m;
    bool linear;
    bool symmetric;
    bool at_end;
    da8w4_type act_type, out_type;
    std::vector<uint8_t> act;
    size_t act_stride, out_stride, out_bytes;
    std::vector<float> scales, bias;  // empty: none
    std::vector<int32_t> zps;
};

std::vector<float> random_row(Random &random, size_t k) {
    std::vector<float> row(k);
    const size_t kind = random.below(20);
    const float constant = random.uniform(-3, 3), step = std::ldexp(1.0f, random.between(-12, 12));
    for (float &value : row) {
        const float ordinary = random.uniform(-2, 3);
        switch (kind) {
            case 0: value = 0; break;
            case 1: value = constant; break;
            case 2: value = std::fabs(ordinary); break;
            case 3: value = -std::fabs(ordinary); break;
            case 4: value = ordinary * 1e-40f; break;
            case 5: value = ordinary * 1e38f; break;                                          // the range may overflow
            case 6: value = step * static_cast<float>(random.between(-255, 255)) / 2; break;  // ties of rounding
            case 7: value = ordinary * 1e-6f; break;                                          // about the least scale
            case 8: value = any_finite(random, DA8W4_F32); break;
            default: value = ordinary;
        }
    }
    if (kind == 6) row[0] = step * 127, row[k - 1] = -step * (k > 1 ? 128 : 0);
    const float odd[] = {float_of(0x7fc00000), float_of(0xffffffff), INFINITY, -INFINITY};
    if (kind == 9) row[random.below(k)] = odd[random.below(4)];
    if (kind == 10) row[random.below(k)] = constant * 1000;
    return row;
}

Case random_case(Random &random, const Matrix &w, size_t m) {
    Case c = {};
    c.m = m;
    c.linear = random.one_in(2);
    c.symmetric = random.one_in(2);
    c.at_end = !random.one_in(4);
    c.out_type = static_cast<da8w4_type>(random.below(3));
    c.act_type = c.linear ? static_cast<da8w4_type>(random.below(3)) : c.symmetric ? DA8W4_S8 : DA8W4_U8;
    const size_t act_size = size_of(c.act_type), out_size = size_of(c.out_type);
    c.act_stride = (w.k + random.below(2) * random.below(40)) * act_size;
    c.out_stride = (w.n + random.below(2) * random.below(40)) * out_size;
    if (m) {
        c.act.assign((m - 1) * c.act_stride + w.k * act_size, 0xff);
        c.out_bytes = (m - 1) * c.out_stride + w.n * out_size;
    }
    for (size_t row = 0; row < m; row++) {
        if (c.linear) {
            const std::vector<float> x = random_row(random, w.k);
            for (size_t k = 0; k < w.k; k++) put(c.act, row * c.act_stride + k * act_size, x[k], c.act_type);
        } else {
            const size_t kind = random.below(8);  // all lowest, all highest, any
            const uint8_t extreme = static_cast<uint8_t>((kind == 0 ? 0 : 255) ^ (c.symmetric ? 0x80 : 0));
            for (size_t k = 0; k < w.k; k++)
                c.act[row * c.act_stride + k] = kind < 2 ? extreme : static_cast<uint8_t>(random.bits());
        }
    }
    if (!c.linear && !random.one_in(4))
        for (size_t row = 0; row < m; row++) {
            const size_t kind = random.below(24);
            c.scales.push_back(kind == 0   ? NAN
                               : kind == 1 ? -INFINITY
                               : kind == 2 ? any_finite(random, DA8W4_F32)
                                           : random.uniform(-0.1f, 0.1f));
        }
    if (!c.linear && !random.one_in(4)) {
        const int low = c.symmetric ? -128 : 0, neutral = c.symmetric ? 0 : 128;
        for (size_t row = 0; row < m; row++) {
            const size_t kind = random.below(6);
            c.zps.push_back(kind == 0   ? low
                            : kind == 1 ? low + 255
                            : kind == 2 ? neutral
                                        : random.between(low, low + 255));
        }
    }
    if (random.one_in(2))
        for (size_t n = 0; n < w.n; n++)
            c.bias.push_back(random.one_in(40) ? any_finite(random, DA8W4_F32) : random.uniform(-9, 9));
    return c;
}

// The call with its operands in guarded memory, but for output and workspace.
da8w4_call prepare(const Case &c, const da8w4_packed &packed) {
    da8w4_call call = {};
    call.m = c.m;
    call.act = inputs.take(c.act, c.at_end);
    call.act_type = c.act_type;
    call.act_stride = c.act_stride;
    call.act_scales = c.scales.empty() ? nullptr : input_scales.take(c.scales, c.at_end);
    call.act_zps = c.zps.empty() ? nullptr : input_zps.take(c.zps, c.at_end);
    call.symmetric = c.symmetric;
    call.weight = &packed;
    call.bias = c.bias.empty() ? nullptr : biases.take(c.bias, c.at_end);
    call.out_type = c.out_type;
    call.out_stride = c.out_stride;
    return call;
}

void describe(const char *what, const char *kernel, const Case &c, const Weight &weight, size_t threads, size_t room,
              bool hostile) {
    const Matrix &w = weight.matrix;
    snprintf(current, sizeof current,
             "%s %s m=%zu n=%zu k=%zu group=%zu act=%s%s scales=%s zps=%d offsets=%d out=%s bias=%d act_stride=%zu "
             "out_stride=%zu "
             "threads=%zu workspace for %zu%s%s",
             what, kernel, c.m, w.n, w.k, w.group, name_of(c.act_type), c.linear && c.symmetric ? " symmetric" : "",
             name_of(weight.packed.scale_type), weight.packed.zps != nullptr, weight.packed.offsets != nullptr,
             name_of(c.out_type), !c.bias.empty(), c.act_stride, c.out_stride, threads, room,
             c.at_end ? "" : ", operands at the start of a page", hostile ? ", rounding upward" : "");
}

// Runs the call with random threads, workspace and mode; returns the output, gaps included.
std::vector<uint8_t> run(Random &random, Tally &tally, const char *kernel, const Case &c, const Weight &weight,
                         da8w4_call call, bool linear) {
    const auto function = linear ? da8w4_linear : da8w4_gemm;
    const size_t threads = 1 + random.below(3), room = 1 + random.below(threads);
    const bool hostile = random.one_in(4);
    describe(linear ? "linear" : "gemm", kernel, c, weight, threads, room, hostile);
    call.kernel = kernel;
    // The limit comes from the call or from the process.
    da8w4_set_num_threads(threads);
    call.threads = room < threads ? room : 0;
    call.workspace_bytes = da8w4_workspace_bytes(&call);
    call.workspace = workspaces.take<uint8_t>(call.workspace_bytes, c.at_end);
    uint8_t *out = outputs.take<uint8_t>(c.out_bytes, c.at_end);
    call.out = out;
    if (c.m && random.one_in(8)) {
        const size_t whole = call.workspace_bytes;
        call.workspace_bytes = da8w4_workspace_bytes(&call) - 1;
        const da8w4_status status = function(&call);
        bool untouched = true;
        for (size_t i = 0; i < c.out_bytes; i++) untouched = untouched && out[i] == Guarded::garbage(i);
        expect(tally, status == DA8W4_WORKSPACE_TOO_SMALL && untouched, "a workspace too small by one byte: %s",
               da8w4_status_text(status));
        call.workspace_bytes = whole;
    }
    FloatMode mode(hostile);
    const da8w4_status status = function(&call);
    expect(tally, mode.restore(), "the caller's floating-point mode was changed");
    expect(tally, status == DA8W4_OK, "%s", da8w4_status_text(status));
    return std::vector<uint8_t>(out, out + c.out_bytes);
}

struct Quantized {
    std::vector<uint8_t> act;  // rows with a stride, gaps included
    std::vector<float> scales;
    std::vector<int32_t> zps;
};

Quantized run_quantize(Random &random, Tally &tally, const char *kernel, const Case &c, const Weight &weight,
                       const da8w4_call &call, size_t stride) {
    const size_t k = weight.matrix.k, threads = 1 + random.below(3);
    const bool hostile = random.one_in(4);
    describe("quantize_rows", kernel, c, weight, threads, 0, hostile);
    da8w4_set_num_threads(threads);
    const size_t bytes = c.m ? (c.m - 1) * stride + k : 0;
    uint8_t *act = quantized.take<uint8_t>(bytes, c.at_end);
    float *scales = quantized_scales.take<float>(c.m, c.at_end);
    int32_t *zps = quantized_zps.take<int32_t>(c.m, c.at_end);
    FloatMode mode(hostile);
    const da8w4_status status =
        da8w4_quantize_rows(kernel, call.act, c.act_type, c.act_stride, c.m, k, c.symmetric, act, stride, scales, zps);
    expect(tally, mode.restore(), "the caller's floating-point mode was changed");
    expect(tally, status == DA8W4_OK, "%s", da8w4_status_text(status));
    return {std::vector<uint8_t>(act, act + bytes), std::vector<float>(scales, scales + c.m),
            std::vector<int32_t>(zps, zps + c.m)};
}

void expect_equal(Tally &tally, const std::vector<uint8_t> &have, const std::vector<uint8_t> &want, const Case &c,
                  const char *of) {
    size_t at = 0;
    while (at < want.size() && have[at] == want[at]) at++;
    const size_t row = c.out_stride ? at / c.out_stride : 0, byte = c.out_stride ? at % c.out_stride : 0;
    expect(tally, have == want, "row %zu, byte %zu (column %zu) is not that of %s", row, byte,
           byte / size_of(c.out_type), of);
}

// Scalar's output against the oracle, in some rows if there are many; and the gaps in all.
void check_output(Random &random, Tally &tally, const Case &c, const Matrix &w, const std::vector<Row> &rows,
                  const std::vector<uint8_t> &out) {
    const size_t size = size_of(c.out_type);
    for (size_t r = 0; r < c.m; r++) {
        if (r + 1 < c.m) {
            bool kept = true;
            for (size_t i = r * c.out_stride + w.n * size; i < (r + 1) * c.out_stride; i++)
                kept = kept && out[i] == Guarded::garbage(i);
            expect(tally, kept, "row %zu writes beyond its end", r);
        }
        if (c.m > 20 && r != 0 && r + 1 != c.m && !random.one_in(60)) continue;
        size_t wrong = w.n;
        for (size_t n = 0; n < w.n; n++) {
            float y = product(w, rows[r], c.symmetric ? 0 : 128, n, c.bias.empty() ? nullptr : c.bias.data());
            if (std::isnan(y)) y = float_of(0x7fc00000);
            const uint16_t half = c.out_type == DA8W4_F32 ? 0 : to_half(y, c.out_type);
            const void *want = c.out_type == DA8W4_F32 ? static_cast<const void *>(&y) : &half;
            if (memcmp(&out[r * c.out_stride + n * size], want, size) != 0) wrong = n;
        }
        expect(tally, wrong == w.n, "row %zu, column %zu is not what docs/numbers.md says", r, wrong);
    }
}

// ---- one case, every kernel ------------------------------------------------------------------

struct Checked {
    std::vector<Tally> kernels;  // without scalar
    Tally scalar{"scalar"}, packing{"packing"}, interface{"interface"};
    bool want_scalar = true;
};

void check_case(Random &random, Checked &checked, const Weight &weight, size_t m) {
    const Matrix &w = weight.matrix;
    const Case c = random_case(random, w, m);
    da8w4_call call = prepare(c, weight.packed);
    const std::vector<uint8_t> want = run(random, checked.scalar, "scalar", c, weight, call, c.linear);

    // What da8w4_linear does, as two calls.
    Quantized rows;
    Case second = c;
    const size_t stride = w.k + random.below(2) * random.below(40);
    if (c.linear && m) {
        rows = run_quantize(random, checked.scalar, "scalar", c, weight, call, stride);
        second.act = rows.act;
        second.act_type = c.symmetric ? DA8W4_S8 : DA8W4_U8;
        second.act_stride = stride;
        second.scales = rows.scales;
        second.zps = rows.zps;
    }

    if (checked.want_scalar) {
        std::vector<Row> oracle(m);
        size_t wrong = m;
        for (size_t r = 0; r < m; r++) {
            if (!c.linear) {
                for (size_t k = 0; k < w.k; k++) {
                    const uint8_t byte = c.act[r * c.act_stride + k];
                    oracle[r].act.push_back(c.symmetric ? static_cast<int8_t>(byte) : byte);
                }
                oracle[r].scale = c.scales.empty() ? 1.0f : c.scales[r];
                oracle[r].zp = c.zps.empty() ? 0 : c.zps[r];
                continue;
            }
            std::vector<float> x(w.k);
            for (size_t k = 0; k < w.k; k++) x[k] = get(&c.act[r * c.act_stride + k * size_of(c.act_type)], c.act_type);
            oracle[r] = quantize(x, c.symmetric);
            bool same = same_bits(rows.scales[r], oracle[r].scale) && rows.zps[r] == oracle[r].zp;
            for (size_t k = 0; k < w.k; k++)
                same = same && rows.act[r * stride + k] == static_cast<uint8_t>(oracle[r].act[k]);
            for (size_t i = r * stride + w.k; r + 1 < m && i < (r + 1) * stride; i++)
                same = same && rows.act[i] == Guarded::garbage(i);
            if (!same) wrong = r;
        }
        if (c.linear) expect(checked.scalar, wrong == m, "row %zu is not quantized as docs/numbers.md says", wrong);
        check_output(random, checked.scalar, c, w, oracle, want);
        if (c.linear && m && m < 20) {
            const da8w4_call gemm = prepare(second, weight.packed);
            expect_equal(checked.scalar, run(random, checked.scalar, "scalar", second, weight, gemm, false), want, c,
                         "da8w4_linear");
            call = prepare(c, weight.packed);
        }
    }

    for (Tally &tally : checked.kernels) {
        const char *kernel = tally.name.c_str();
        expect_equal(tally, run(random, tally, kernel, c, weight, call, c.linear), want, c, "scalar");
        if (!c.linear || !m) continue;
        const Quantized mine = run_quantize(random, tally, kernel, c, weight, call, stride);
        expect(tally,
               mine.act == rows.act && mine.zps == rows.zps &&
                   memcmp(mine.scales.data(), rows.scales.data(), m * sizeof(float)) == 0,
               "rows are not quantized as scalar does");
        const da8w4_call gemm = prepare(second, weight.packed);
        expect_equal(tally, run(random, tally, kernel, second, weight, gemm, false), want, c, "da8w4_linear of scalar");
        call = prepare(c, weight.packed);
    }
}

void check_shapes(Random &random, Checked &checked, bool quick) {
    const size_t ns[] = {1, 31, 32, 33, 64, 95}, ks[] = {1, 3, 4, 5, 31, 64, 65, 130, 260, 600, 1100};
    const size_t groups[] = {4, 32, 64, 128, 256, 300, 516, 600, 1024};
    for (size_t n : ns)
        for (size_t k : ks) {
            std::vector<size_t> fitting(std::begin(groups), std::lower_bound(std::begin(groups), std::end(groups), k));
            fitting.push_back(k);
            fitting.push_back(k / 4 * 4 + 4);  // longer than k
            for (size_t group : fitting) {
                if (quick && !random.one_in(12)) continue;
                const Weight weight = pack(random, checked.packing, random_matrix(random, n, k, group));
                for (size_t m = 0; m <= 14; m++)
                    if (!quick || random.one_in(2)) check_case(random, checked, weight, m);
                if (random.one_in(3)) check_case(random, checked, weight, 239 + random.below(3));
            }
        }
    // Whole groups of whole steps, which most weights have: tiles of every height, packed and unpacked.
    for (size_t group : {32, 64, 128, 256, 32, 64, 128, 256}) {
        const Weight weight = pack(random, checked.packing, random_matrix(random, 40, 768, group));
        for (size_t m = 1; m <= 36; m++)
            if (!quick || random.one_in(3)) check_case(random, checked, weight, m);
    }
    // A single tile reads scales and offsets as they are stored: each type of them, at every height.
    for (da8w4_type type : {DA8W4_F32, DA8W4_F16, DA8W4_BF16})
        for (bool offsets : {false, true}) {
            Matrix w;
            do w = random_matrix(random, 33, 352, 32);
            while (narrowest(w) != type || w.offsets.empty() == offsets);
            const Weight weight = pack(random, checked.packing, w);
            for (size_t m = 1; m <= 6; m++) check_case(random, checked, weight, m);
        }
    // More rows than two row blocks; more column blocks than threads.
    for (size_t n : {40, 330}) {
        const Weight weight = pack(random, checked.packing, random_matrix(random, n, 70, 32));
        for (size_t m : {1, 6, 60, 490}) check_case(random, checked, weight, m);
    }
    // Tiles of different heights, whose sums are carried over several spans of k: a row too many would count twice.
    const Weight weight = pack(random, checked.packing, random_matrix(random, 33, 2100, 2100));
    for (size_t m : {17, 33, 49, 69, 81}) check_case(random, checked, weight, m);
}

// Sums of a group at the edge of what int32 and float32 hold.
void check_long_groups(Random &random, Checked &checked, bool quick) {
    struct Edge {
        size_t k;
        int code, zp;
    };
    // The longest groups that are allowed: k * 128 * |code - zp| just below 2^31.
    const Edge edges[] = {{117323, 15, -128}, {132104, 0, 127}, {1118481, 15, 0}};
    for (const Edge &edge : edges) {
        if (quick && edge.k > 200000) continue;
        Matrix w = {};
        w.n = 3;
        w.k = w.group = edge.k;
        w.groups = 1;
        w.codes.assign(w.n * w.k, edge.code);
        w.zps.assign(w.n, edge.zp);
        w.scales = {1, -0.5f, 0.375f};
        w.offsets = {0.3f, -1, 1000};
        w.one_zp = true;
        const Weight weight = pack(random, checked.packing, w);
        for (size_t m : {1, 3, 9}) {
            if (m > 1 && edge.k > 200000) continue;
            Case c = random_case(random, w, m);
            c.linear = false;
            c.symmetric = m == 3;
            c.act_type = c.symmetric ? DA8W4_S8 : DA8W4_U8;
            c.act_stride = w.k;
            c.act.assign(m * w.k, c.symmetric ? 0x80 : 0);
            c.act[0] = 1;
            c.scales.clear();
            c.zps.assign(m, c.symmetric ? 127 : 0);
            const da8w4_call call = prepare(c, weight.packed);
            const std::vector<uint8_t> want = run(random, checked.scalar, "scalar", c, weight, call, false);
            Row row = {std::vector<int>(w.k, c.symmetric ? -128 : 0), 1.0f, c.zps[0]};
            std::vector<Row> rows(m, row);
            rows[0].act[0] = 1;
            if (checked.want_scalar) check_output(random, checked.scalar, c, w, rows, want);
            for (Tally &tally : checked.kernels)
                expect_equal(tally, run(random, tally, tally.name.c_str(), c, weight, call, false), want, c, "scalar");
        }
    }
}

// Several threads call at the same time, with one weight and one pool.
void check_concurrent_calls(Random &random, Checked &checked) {
    const Weight weight = pack(random, checked.packing, random_matrix(random, 95, 600, 128));
    Case c = random_case(random, weight.matrix, 20);
    const da8w4_call prepared = prepare(c, weight.packed);
    const std::vector<uint8_t> want = run(random, checked.scalar, "scalar", c, weight, prepared, c.linear);
    std::vector<Tally *> tallies;
    for (Tally &tally : checked.kernels) tallies.push_back(&tally);
    if (checked.want_scalar) tallies.push_back(&checked.scalar);
    for (Tally *tally : tallies) {
        snprintf(current, sizeof current, "four callers at once of %s", tally->name.c_str());
        da8w4_set_num_threads(3);
        bool same[4] = {};
        std::vector<std::thread> callers;
        for (bool &mine : same)
            callers.emplace_back([&, tally] {
                da8w4_call call = prepared;
                call.kernel = tally->name.c_str();
                call.workspace_bytes = da8w4_workspace_bytes(&call);
                call.workspace = da8w4_alloc(call.workspace_bytes);
                mine = true;
                for (int i = 0; i < 10; i++) {
                    std::vector<uint8_t> out(c.out_bytes);
                    for (size_t at = 0; at < out.size(); at++) out[at] = Guarded::garbage(at);
                    call.out = out.data();
                    const da8w4_status status = c.linear ? da8w4_linear(&call) : da8w4_gemm(&call);
                    mine = mine && status == DA8W4_OK && out == want;
                }
                da8w4_free(call.workspace);
            });
        for (std::thread &caller : callers) caller.join();
        expect(*tally, same[0] && same[1] && same[2] && same[3], "calls at the same time disturb each other");
    }
}

// ---- what the interface refuses --------------------------------------------------------------

// A small valid call; each test damages one thing.
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

void check_refusals(Checked &checked) {
    Tally &tally = checked.interface;
    const da8w4_status bad = DA8W4_BAD_ARGUMENT;

    struct CallTest {
        const char *what;
        da8w4_status want;
        void (*damage)(Example &);
    };
    const CallTest calls[] = {
        {"nothing", DA8W4_OK, [](Example &) {}},
        {"no weight", bad, [](Example &e) { e.call.weight = nullptr; }},
        {"weight n 0", bad, [](Example &e) { e.packed.n = 0; }},
        {"weight k 0", bad, [](Example &e) { e.packed.k = 0; }},
        {"weight group 0", bad, [](Example &e) { e.packed.group = 0; }},
        {"weight group 6", bad, [](Example &e) { e.packed.group = 6; }},
        {"weight group beyond k", bad, [](Example &e) { e.packed.group = 12; }},
        {"weight scales u8", bad, [](Example &e) { e.packed.scale_type = DA8W4_U8; }},
        {"weight scales of no type", bad, [](Example &e) { e.packed.scale_type = static_cast<da8w4_type>(9); }},
        {"no codes", bad, [](Example &e) { e.packed.codes = nullptr; }},
        {"no scales", bad, [](Example &e) { e.packed.scales = nullptr; }},
        {"no offsets", DA8W4_OK, [](Example &e) { e.packed.offsets = nullptr; }},
        {"no sums", bad, [](Example &e) { e.packed.sums = nullptr; }},
        {"out u8", bad, [](Example &e) { e.call.out_type = DA8W4_U8; }},
        {"out of no type", bad, [](Example &e) { e.call.out_type = static_cast<da8w4_type>(9); }},
        {"act of no type", bad, [](Example &e) { e.call.act_type = static_cast<da8w4_type>(9); }},
        {"act of the other function", bad,
         [](Example &e) { e.call.act_type = e.call.act_type == DA8W4_F32 ? DA8W4_U8 : DA8W4_F32; }},
        {"no act", bad, [](Example &e) { e.call.act = nullptr; }},
        {"no out", bad, [](Example &e) { e.call.out = nullptr; }},
        {"no workspace", bad, [](Example &e) { e.call.workspace = nullptr; }},
        {"workspace misaligned", bad, [](Example &e) { e.call.workspace = e.workspace + 32; }},
        {"act stride short", bad, [](Example &e) { e.call.act_stride--; }},
        {"out stride short", bad, [](Example &e) { e.call.out_stride--; }},
        {"workspace 0", DA8W4_WORKSPACE_TOO_SMALL, [](Example &e) { e.call.workspace_bytes = 0; }},
        {"unknown kernel", DA8W4_UNKNOWN_KERNEL, [](Example &e) { e.call.kernel = "abacus"; }},
        {"kernel of no name", DA8W4_UNKNOWN_KERNEL, [](Example &e) { e.call.kernel = ""; }},
        {"one row, strides 0", DA8W4_OK, [](Example &e) { e.call.m = 1, e.call.act_stride = e.call.out_stride = 0; }},
        {"no rows, no pointers", DA8W4_OK,
         [](Example &e) { e.call.m = 0, e.call.act = e.call.out = e.call.workspace = nullptr; }},
    };
    const CallTest gemms[] = {
        {"u8 zero point -1", DA8W4_BAD_ACT_ZP, [](Example &e) { e.act_zps[1] = -1; }},
        {"u8 zero point 256", DA8W4_BAD_ACT_ZP, [](Example &e) { e.act_zps[1] = 256; }},
        {"u8 zero point 255", DA8W4_OK, [](Example &e) { e.act_zps[1] = 255; }},
        {"s8 zero point -129", DA8W4_BAD_ACT_ZP, [](Example &e) { e.call.act_type = DA8W4_S8, e.act_zps[0] = -129; }},
        {"s8 zero point 128", DA8W4_BAD_ACT_ZP, [](Example &e) { e.call.act_type = DA8W4_S8, e.act_zps[0] = 128; }},
        {"s8 zero point -128", DA8W4_OK, [](Example &e) { e.call.act_type = DA8W4_S8, e.act_zps[0] = -128; }},
    };
    const auto call_test = [&](const CallTest &test, bool linear) {
        snprintf(current, sizeof current, "%s with %s", linear ? "linear" : "gemm", test.what);
        Example example(linear);
        test.damage(example);
        const da8w4_status status = linear ? da8w4_linear(&example.call) : da8w4_gemm(&example.call);
        const bool written = test.want == DA8W4_OK && example.call.m > 0;
        expect(tally, status == test.want && example.untouched() == !written, "status: %s", da8w4_status_text(status));
    };
    for (const CallTest &test : calls)
        for (bool linear : {false, true}) call_test(test, linear);
    for (const CallTest &test : gemms) call_test(test, false);
    expect(tally, da8w4_gemm(nullptr) == bad && da8w4_linear(nullptr) == bad, "a null call is taken");

    struct SizeTest {
        const char *what;
        void (*damage)(Example &);
    };
    const SizeTest sizes[] = {
        {"no weight", [](Example &e) { e.call.weight = nullptr; }},
        {"a bad weight", [](Example &e) { e.packed.k = 0; }},
        {"an unknown kernel", [](Example &e) { e.call.kernel = "abacus"; }},
    };
    for (const SizeTest &test : sizes) {
        snprintf(current, sizeof current, "workspace_bytes with %s", test.what);
        Example example(true);
        expect(tally, da8w4_workspace_bytes(&example.call) > 0, "0 for a valid call");
        test.damage(example);
        expect(tally, da8w4_workspace_bytes(&example.call) == 0, "not 0");
    }
    expect(tally, da8w4_workspace_bytes(nullptr) == 0, "not 0 for a null call");

    struct PackTest {
        const char *what;
        da8w4_status plan, pack;
        void (*damage)(Example &);
    };
    const PackTest packs[] = {
        {"nothing", DA8W4_OK, DA8W4_OK, [](Example &) {}},
        {"n 0", bad, bad, [](Example &e) { e.raw.n = 0; }},
        {"k 0", bad, bad, [](Example &e) { e.raw.k = 0; }},
        {"group 0", bad, bad, [](Example &e) { e.raw.group = 0; }},
        {"no scales", bad, bad, [](Example &e) { e.raw.scales = nullptr; }},
        {"an unknown format", bad, bad, [](Example &e) { e.raw.format = static_cast<da8w4_codes>(4); }},
        {"group 6", DA8W4_BAD_GROUP, DA8W4_BAD_GROUP, [](Example &e) { e.raw.group = 6; }},
        {"group 10, more than k", DA8W4_BAD_GROUP, DA8W4_BAD_GROUP, [](Example &e) { e.raw.group = 10; }},
        {"a NaN scale", DA8W4_BAD_SCALE, DA8W4_BAD_SCALE, [](Example &e) { e.scales[9] = NAN; }},
        {"an infinite scale", DA8W4_BAD_SCALE, DA8W4_BAD_SCALE, [](Example &e) { e.scales[0] = -INFINITY; }},
        {"a NaN offset", DA8W4_BAD_OFFSET, DA8W4_BAD_OFFSET, [](Example &e) { e.offsets[9] = NAN; }},
        {"an infinite offset", DA8W4_BAD_OFFSET, DA8W4_BAD_OFFSET, [](Example &e) { e.offsets[0] = INFINITY; }},
        {"no offsets", DA8W4_OK, DA8W4_OK, [](Example &e) { e.raw.offsets = nullptr; }},
        {"zero point 128", DA8W4_BAD_WEIGHT_ZP, DA8W4_BAD_WEIGHT_ZP,
         [](Example &e) { e.raw.zps = nullptr, e.raw.zp = 128; }},
        {"zero point -129", DA8W4_BAD_WEIGHT_ZP, DA8W4_BAD_WEIGHT_ZP,
         [](Example &e) { e.raw.zps = nullptr, e.raw.zp = -129; }},
        {"s4 zero point 120", DA8W4_BAD_WEIGHT_ZP, DA8W4_BAD_WEIGHT_ZP,
         [](Example &e) { e.raw.format = DA8W4_CODES_S4, e.zps[7] = 120; }},
        {"code 16", DA8W4_OK, DA8W4_BAD_CODE, [](Example &e) { e.codes[39] = 16; }},
        {"code 255", DA8W4_OK, DA8W4_BAD_CODE, [](Example &e) { e.codes[0] = 255; }},
        {"s4 code 8", DA8W4_OK, DA8W4_BAD_CODE, [](Example &e) { e.raw.format = DA8W4_CODES_S4, e.codes[39] = 8; }},
        {"s4 code -9", DA8W4_OK, DA8W4_BAD_CODE,
         [](Example &e) { e.raw.format = DA8W4_CODES_S4, e.codes[39] = static_cast<uint8_t>(-9); }},
        {"no codes", DA8W4_OK, bad, [](Example &e) { e.raw.codes = nullptr; }},
        {"a short stride", DA8W4_OK, bad, [](Example &e) { e.raw.codes_stride--; }},
        {"a short stride of nibbles", DA8W4_OK, bad,
         [](Example &e) { e.raw.format = DA8W4_CODES_LOW_FIRST, e.raw.codes_stride = 3; }},
    };
    for (const PackTest &test : packs) {
        snprintf(current, sizeof current, "pack with %s", test.what);
        Example example(true);
        test.damage(example);
        da8w4_packed plan = example.packed;
        da8w4_packed_bytes bytes;
        const da8w4_status planned = da8w4_plan_pack(&example.raw, &plan, &bytes);
        const da8w4_status packed = da8w4_pack(&example.raw, &plan, example.packed_codes, example.packed_scales,
                                               example.packed_zps, example.packed_offsets, example.packed_sums);
        expect(tally, planned == test.plan && packed == test.pack, "plan: %s; pack: %s", da8w4_status_text(planned),
               da8w4_status_text(packed));
    }
    snprintf(current, sizeof current, "null pointers and plans of another weight");
    Example e(true);
    da8w4_packed plan, other;
    da8w4_packed_bytes bytes;
    expect(tally,
           da8w4_plan_pack(nullptr, &plan, &bytes) == bad && da8w4_plan_pack(&e.raw, nullptr, &bytes) == bad &&
               da8w4_plan_pack(&e.raw, &plan, nullptr) == bad,
           "plan_pack takes a null pointer");
    da8w4_plan_pack(&e.raw, &plan, &bytes);
    const auto pack_into = [&](const da8w4_packed *by, uint8_t *codes, void *scales, int8_t *zps, void *offsets,
                               float *sums) { return da8w4_pack(&e.raw, by, codes, scales, zps, offsets, sums); };
    expect(tally,
           pack_into(nullptr, e.packed_codes, e.packed_scales, e.packed_zps, e.packed_offsets, e.packed_sums) == bad &&
               pack_into(&plan, nullptr, e.packed_scales, e.packed_zps, e.packed_offsets, e.packed_sums) == bad &&
               pack_into(&plan, e.packed_codes, nullptr, e.packed_zps, e.packed_offsets, e.packed_sums) == bad &&
               pack_into(&plan, e.packed_codes, e.packed_scales, nullptr, e.packed_offsets, e.packed_sums) == bad &&
               pack_into(&plan, e.packed_codes, e.packed_scales, e.packed_zps, nullptr, e.packed_sums) == bad &&
               pack_into(&plan, e.packed_codes, e.packed_scales, e.packed_zps, e.packed_offsets, nullptr) == bad,
           "pack takes a null pointer");
    const struct {
        const char *what;
        void (*change)(da8w4_packed &);
    } changes[] = {
        {"n", [](da8w4_packed &p) { p.n++; }},
        {"k", [](da8w4_packed &p) { p.k++; }},
        {"group", [](da8w4_packed &p) { p.group = 8; }},
        {"type of scales", [](da8w4_packed &p) { p.scale_type = DA8W4_F32; }},
    };
    for (const auto &change : changes) {
        other = plan;
        change.change(other);
        expect(tally,
               pack_into(&other, e.packed_codes, e.packed_scales, e.packed_zps, e.packed_offsets, e.packed_sums) == bad,
               "a plan of another %s is taken", change.what);
    }
    uint8_t codes[40];
    float scales[10], offsets[10];
    int8_t zps[10];
    other = e.packed, other.codes = nullptr;
    expect(tally,
           da8w4_unpack(nullptr, codes, scales, zps, offsets) == bad &&
               da8w4_unpack(&e.packed, nullptr, scales, zps, offsets) == bad &&
               da8w4_unpack(&e.packed, codes, nullptr, zps, offsets) == bad &&
               da8w4_unpack(&e.packed, codes, scales, nullptr, offsets) == bad &&
               da8w4_unpack(&e.packed, codes, scales, zps, nullptr) == bad &&
               da8w4_unpack(&other, codes, scales, zps, offsets) == bad,
           "unpack takes a null pointer");

    // The longest group with |code - zp| up to 143, and one step more.
    std::vector<float> one_scale{1};
    da8w4_weight lengthy = {1, 117323, 117323, DA8W4_CODES_U4, codes, 117323, one_scale.data(), nullptr, -128, nullptr};
    expect(tally, da8w4_plan_pack(&lengthy, &plan, &bytes) == DA8W4_OK, "the longest group is refused");
    lengthy.k = lengthy.group = 117324;
    expect(tally, da8w4_plan_pack(&lengthy, &plan, &bytes) == DA8W4_INT32_OVERFLOW, "a longer group is taken");

    snprintf(current, sizeof current, "quantize_rows");
    const float x[6] = {};
    uint8_t act[6];
    float act_scales[2];
    int32_t act_zps[2];
    const auto rows = [&](const char *kernel, const void *from, da8w4_type type, size_t stride, size_t m, size_t k,
                          void *to, size_t to_stride, float *s, int32_t *z) {
        return da8w4_quantize_rows(kernel, from, type, stride, m, k, 0, to, to_stride, s, z);
    };
    expect(tally, rows(nullptr, x, DA8W4_F32, 12, 2, 3, act, 3, act_scales, act_zps) == DA8W4_OK, "refused");
    expect(tally, rows(nullptr, x, DA8W4_F32, 0, 1, 3, act, 0, act_scales, act_zps) == DA8W4_OK, "one row, strides 0");
    expect(tally, rows(nullptr, nullptr, DA8W4_F32, 0, 0, 3, nullptr, 0, nullptr, nullptr) == DA8W4_OK, "no rows");
    expect(tally,
           rows(nullptr, nullptr, DA8W4_F32, 12, 2, 3, act, 3, act_scales, act_zps) == bad &&
               rows(nullptr, x, DA8W4_F32, 12, 2, 3, nullptr, 3, act_scales, act_zps) == bad &&
               rows(nullptr, x, DA8W4_F32, 12, 2, 3, act, 3, nullptr, act_zps) == bad &&
               rows(nullptr, x, DA8W4_F32, 12, 2, 3, act, 3, act_scales, nullptr) == bad,
           "a null pointer is taken");
    expect(tally,
           rows(nullptr, x, DA8W4_F32, 11, 2, 3, act, 3, act_scales, act_zps) == bad &&
               rows(nullptr, x, DA8W4_F32, 12, 2, 3, act, 2, act_scales, act_zps) == bad,
           "a short stride is taken");
    expect(tally,
           rows(nullptr, x, DA8W4_S8, 12, 2, 3, act, 3, act_scales, act_zps) == bad &&
               rows(nullptr, x, DA8W4_F32, 12, 2, 0, act, 3, act_scales, act_zps) == bad,
           "int8 input, or k 0, is taken");
    expect(tally, rows("abacus", x, DA8W4_F32, 12, 2, 3, act, 3, act_scales, act_zps) == DA8W4_UNKNOWN_KERNEL,
           "an unknown kernel is taken");
}

void check_tables(Checked &checked) {
    Tally &tally = checked.interface;
    snprintf(current, sizeof current, "the tables of kernels, features and statuses");
    const size_t count = da8w4_kernel_count();
    expect(tally, count > 0 && std::string(da8w4_kernel_name(count - 1)) == "scalar" && !da8w4_kernel_reason(count - 1),
           "scalar is not the last kernel");
    expect(tally, !da8w4_kernel_name(count) && !da8w4_kernel_description(count) && da8w4_kernel_reason(count),
           "there is a kernel past the last");
    size_t best = count, index = count;
    for (size_t i = count; i-- > 0;) {
        Example example(true);
        example.call.kernel = da8w4_kernel_name(i);
        const da8w4_status want = da8w4_kernel_reason(i) ? DA8W4_KERNEL_UNAVAILABLE : DA8W4_OK;
        expect(tally, da8w4_linear(&example.call) == want && da8w4_kernel_description(i), "kernel %s",
               example.call.kernel);
        if (want == DA8W4_OK) best = i;
    }
    if (const char *forced = getenv("PYDA8W4_KERNEL"); !forced || !*forced)
        expect(tally, da8w4_default_kernel(&index) == DA8W4_OK && index == best, "the default is not the best kernel");
    expect(tally, da8w4_default_kernel(nullptr) == DA8W4_BAD_ARGUMENT, "default_kernel takes a null pointer");
    for (int status = DA8W4_OK; status <= DA8W4_WORKSPACE_TOO_SMALL + 1; status++)
        expect(tally, strlen(da8w4_status_text(static_cast<da8w4_status>(status))) > 5, "status %d: no text", status);
    size_t features = 0;
    int present = -1;
    while (da8w4_cpu_feature(features, features % 2 ? &present : nullptr)) features++;
    expect(tally, features < 64 && (features < 2 || present == 0 || present == 1), "%zu features", features);
    da8w4_set_num_threads(5);
    expect(tally, da8w4_get_num_threads() == 5, "set_num_threads(5) gives %zu", da8w4_get_num_threads());
    da8w4_set_num_threads(0);
    expect(tally, da8w4_get_num_threads() >= 1 && da8w4_thread_runtime()[0], "no threads");
    for (size_t bytes : {size_t{0}, size_t{1}, size_t{1000}, size_t{100000}, size_t{3} << 20}) {
        void *memory = da8w4_alloc(bytes);
        const size_t alignment = bytes >= size_t{2} << 20 ? size_t{2} << 20 : 64;
        expect(tally, memory && reinterpret_cast<uintptr_t>(memory) % alignment == 0, "alloc(%zu)", bytes);
        if (memory) memset(memory, 1, bytes);
        da8w4_free(memory);
    }
    da8w4_free(nullptr);
}

// Memory of all sizes, taken and given back in any order by several threads: each finds what it wrote.
void check_memory(Random &random, Tally &tally) {
    constexpr size_t kThreads = 3, kPieces = 40, kSteps = 3000;
    const uint64_t seed = random.below(1000000);
    std::atomic<size_t> bad{0};
    auto work = [&](size_t thread) {
        struct Piece {
            unsigned char *memory = nullptr;
            size_t bytes = 0;
            unsigned char mark = 0;
        } pieces[kPieces];
        Random own(seed + thread);
        for (size_t step = 0; step < kSteps + kPieces; step++) {
            Piece &piece = pieces[step < kSteps ? own.below(kPieces) : step - kSteps];
            if (piece.memory) {
                // Marks at every page and at the end; a neighbour's would be another.
                for (size_t at = 0; at < piece.bytes; at += 4096) bad += piece.memory[at] != piece.mark;
                bad += piece.memory[piece.bytes - 1] != piece.mark;
                da8w4_free(piece.memory);
                piece.memory = nullptr;
            } else if (step < kSteps) {
                const size_t order = 10 + own.below(12);
                piece.bytes = (size_t{1} << order) + own.below(size_t{1} << order);
                piece.mark = static_cast<unsigned char>(1 + own.below(255));
                piece.memory = static_cast<unsigned char *>(da8w4_alloc(piece.bytes));
                if (!piece.memory || reinterpret_cast<uintptr_t>(piece.memory) % 64) bad++;
                if (!piece.memory) continue;
                for (size_t at = 0; at < piece.bytes; at += 4096) piece.memory[at] = piece.mark;
                piece.memory[piece.bytes - 1] = piece.mark;
            }
        }
    };
    std::vector<std::thread> threads;
    for (size_t thread = 0; thread < kThreads; thread++) threads.emplace_back(work, thread);
    for (std::thread &thread : threads) thread.join();
    expect(tally, bad == 0, "memory: %zu marks are not what was written", bad.load());
    void *const memory = da8w4_alloc(100000);
    da8w4_free(memory);
    for (size_t i = 0; i < 3; i++) {
        void *const again = da8w4_alloc(100000);
        expect(tally, again == memory, "memory that was given back is not taken again");
        da8w4_free(again);
    }
}

// A fork while another thread takes memory: the child can take some, too.
void check_memory_of_children(Tally &tally) {
    std::atomic<bool> stop{false};
    std::thread other([&] {
        while (!stop) da8w4_free(da8w4_alloc(100000));
    });
    for (size_t i = 0; i < 100; i++) {
        const pid_t child = fork();
        if (child == 0) {
            alarm(20);  // kills a child that hangs
            void *memory = da8w4_alloc(100000);
            _exit(memory ? (memset(memory, 1, 100000), 0) : 1);
        }
        int status = -1;
        waitpid(child, &status, 0);
        expect(tally, child > 0 && status == 0, "memory: a forked child ended with %d", status);
        if (status != 0) break;
    }
    stop = true;
    other.join();
}

void list() {
    for (size_t i = 0; i < da8w4_kernel_count(); i++) {
        const char *reason = da8w4_kernel_reason(i);
        printf("%-12s %s%s%s\n", da8w4_kernel_name(i), da8w4_kernel_description(i), reason ? "; cannot run: " : "",
               reason ? reason : "");
    }
}

}  // namespace

int main(int count, char **arguments) {
    uint64_t seed = 20250101;
    bool quick = false;
    std::string only;
    for (int i = 1; i < count; i++) {
        const std::string option = arguments[i];
        if (option == "--list") return list(), 0;
        if (option == "--quick") {
            quick = true;
        } else if (option == "--seed" && i + 1 < count) {
            seed = strtoull(arguments[++i], nullptr, 0);
        } else if (option == "--kernel" && i + 1 < count) {
            only = arguments[++i];
        } else {
            fprintf(stderr, "usage: %s [--kernel NAME] [--seed N] [--quick] [--list]\n", arguments[0]);
            return 2;
        }
    }

    Checked checked;
    checked.want_scalar = only.empty() || only == "scalar";
    bool found = checked.want_scalar;
    for (size_t i = 0; i < da8w4_kernel_count(); i++) {
        const std::string name = da8w4_kernel_name(i);
        if (name == "scalar" || (!only.empty() && name != only)) continue;
        if (const char *reason = da8w4_kernel_reason(i)) {
            printf("%s is not checked: %s\n", name.c_str(), reason);
        } else {
            checked.kernels.push_back({name});
            found = true;
        }
    }
    if (!found) {
        fprintf(stderr, "no kernel %s that can run here\n", only.c_str());
        return 2;
    }

    struct sigaction action = {};
    action.sa_handler = crashed;
    for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) sigaction(signal, &action, nullptr);
    setvbuf(stdout, nullptr, _IOLBF, 0);
    printf("seed %llu\n", static_cast<unsigned long long>(seed));

    Random random(seed);
    check_tables(checked);
    check_refusals(checked);
    check_shapes(random, checked, quick);
    check_long_groups(random, checked, quick);
    check_concurrent_calls(random, checked);
    check_memory(random, checked.packing);
    check_memory_of_children(checked.packing);

    std::vector<Tally> tallies = checked.kernels;
    if (checked.want_scalar) tallies.push_back(checked.scalar);
    tallies.push_back(checked.packing);
    tallies.push_back(checked.interface);
    size_t passed = 0, failed = 0;
    for (const Tally &tally : tallies) {
        printf("%-12s %zu passed, %zu failed\n", tally.name.c_str(), tally.passed, tally.failed);
        passed += tally.passed;
        failed += tally.failed;
    }
    printf("%zu passed, %zu failed\n", passed, failed);
    return failed != 0 || passed == 0;
}
