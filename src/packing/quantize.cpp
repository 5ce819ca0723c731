#include "packing/quantize.h"

#include <atomic>
#include <cmath>
#include <limits>

#include "packing/pack.h"
#include "runtime/parallel.h"
#include "types.h"

// The search: a grid of scales, some of them so small that the ends of the group are clipped, and for each of them
// places of the grid of codes; of the codes that such a pair gives, the scale and offset of least squared error in
// closed form. From the best pair on, codes are fitted to the scale, and that to the codes. The idea is that of ggml's
// k-quants.
//
// Operations are those of IEEE 754 in a fixed order, on rows side by side, so every CPU finds the same codes.

namespace da8w4 {
namespace {

constexpr size_t kRows = 4;
using Rows = float __attribute__((vector_size(kRows * sizeof(float))));  // a number of each row
using Ints = int32_t __attribute__((vector_size(kRows * sizeof(int32_t))));

constexpr float kSteps[] = {14.0f, 15.6f, 17.2f, 18.8f, 20.4f, 22.0f};  // of codes, in the range of a group
constexpr int kRefits = 3;
constexpr float kMost = 15, kMiddle = 7.5f;  // codes
constexpr float kLargestBf16 = 0x1.fep127f, kLeastNormal = 0x1p-126f;

Rows all(float value) { return Rows{} + value; }
Rows least(Rows a, Rows b) { return a < b ? a : b; }
Rows most(Rows a, Rows b) { return a > b ? a : b; }
Rows magnitude(Rows a) { return most(a, -a); }
// To nearest even, of numbers below 2^22: those above are far beyond all codes, and stay so.
Rows nearest(Rows a) { return (a + 0x1.8p23f) - 0x1.8p23f; }
Rows clip(Rows codes) { return least(most(codes, all(0)), all(kMost)); }
bool are_finite(Rows a) {
    const Ints good = magnitude(a) <= std::numeric_limits<float>::max();
    return good[0] && good[1] && good[2] && good[3];
}
Rows inverse_of(Rows a) { return a != 0.0f ? 1.0f / (a != 0.0f ? a : all(1)) : all(0); }

template <class Function>
Rows each(Rows a, Function function) {
    for (size_t i = 0; i < kRows; i++) a[i] = function(a[i]);
    return a;
}

Rows as_bf16(Rows a) {
    return each(least(most(a, all(-kLargestBf16)), all(kLargestBf16)),
                [](float value) { return bf16_to_f32(f32_to_bf16(value)); });
}

// The scale as it is stored: zero, or so large that its inverse is finite.
Rows as_scale(Rows scale) {
    return as_bf16(each(scale, [](float value) {
        return value != 0 && std::fabs(value) < kLeastNormal ? std::copysign(kLeastNormal, value) : value;
    }));
}

// What a group is: scale * (code - zero) in each row, or with offsets scale * (code - kMiddle) + center.
struct Fit {
    Rows scale, zero, center;
};

template <da8w4_zeros kZeros, bool kWeighted>
class Search {
public:
    // `x` may be overwritten.
    Search(Rows *x, size_t count, const float *importance) : x_(x), count_(count), importance_(importance) {}

    Fit run() {
        measure();
        for (const float steps : kSteps) {
            const Rows inverse = steps * inverse_of(high_ - low_);
            if constexpr (kZeros == DA8W4_ZEROS_NONE) {
                const Rows inverses[] = {inverse, -inverse}, zeros[] = {all(8), all(8)};
                consider(inverses, zeros);
            } else {
                const Rows inverses[] = {inverse, inverse, inverse};
                Rows zeros[] = {-low_ * inverse, kMost - high_ * inverse, kMiddle - 0.5f * (low_ + high_) * inverse};
                if constexpr (kZeros == DA8W4_ZEROS_INTEGER)
                    for (Rows &zero : zeros) zero = clip(nearest(zero));
                consider(inverses, zeros);
            }
        }
        for (int i = 0; i < kRefits; i++) {
            const Rows inverses[] = {inverse_of(best_.scale)};
            const Rows zeros[] = {kHasOffsets ? kMiddle - best_.center * inverses[0] : best_.zero};
            consider(inverses, zeros);
        }
        return {.scale = best_.scale * unit_, .zero = best_.zero, .center = best_.center * unit_ + middle_};
    }

private:
    static constexpr bool kHasOffsets = kZeros == DA8W4_ZEROS_FLOAT;

    // Moves the middle of a group with an offset to zero and its size to 1 to 4, so that nothing overflows or vanishes;
    // sums what does not depend on codes.
    void measure() {
        Rows low = x_[0], high = x_[0];
        for (size_t i = 1; i < count_; i++) {
            low = least(low, x_[i]);
            high = most(high, x_[i]);
        }
        middle_ = kHasOffsets ? 0.5f * low + 0.5f * high : all(0);
        low -= middle_;
        high -= middle_;
        unit_ = each(most(high, -low), [](float size) {
            const uint32_t exponent = bits_of(size) & 0x7f800000, lowest = 1u << 23, highest = 253u << 23;
            return float_of(exponent < lowest ? lowest : exponent > highest ? highest : exponent);
        });
        const Rows inverse = 1.0f / unit_;  // exact
        low_ = low * inverse;
        high_ = high * inverse;
        for (size_t i = 0; i < count_; i++) {
            x_[i] = (x_[i] - middle_) * inverse;
            const Rows weighted = kWeighted ? x_[i] * importance_[i] : x_[i];
            sum_ += weighted;
            squares_ += weighted * x_[i];
            total_ += kWeighted ? all(importance_[i]) : all(1);
        }
        if constexpr (kZeros == DA8W4_ZEROS_INTEGER) {  // which has a code for zero
            low_ = least(low_, all(0));
            high_ = most(high_, all(0));
        } else if constexpr (kZeros == DA8W4_ZEROS_NONE) {
            high_ = most(high_, -low_);
            low_ = -high_;
        }
        best_.scale = (high_ - low_) / kMost;
        best_.zero = kZeros == DA8W4_ZEROS_INTEGER ? clip(nearest(-low_ * inverse_of(best_.scale))) : all(8);
        best_.center = all(0);
        error_ = all(INFINITY);
    }

    // Codes by inverse scales and zeros, and what fits them best.
    template <size_t kCount>
    void consider(const Rows (&inverses)[kCount], const Rows (&zeros)[kCount]) {
        Rows codes[kCount] = {}, squares[kCount] = {}, products[kCount] = {};
        for (size_t i = 0; i < count_; i++)
            for (size_t j = 0; j < kCount; j++) {
                const Rows x = x_[i], code = clip(nearest(x * inverses[j] + zeros[j])) - pivot(zeros[j]);
                const Rows weighted = kWeighted ? code * importance_[i] : code;
                codes[j] += weighted;
                squares[j] += weighted * code;
                products[j] += weighted * x;
            }
        for (size_t j = 0; j < kCount; j++) {
            Rows scale, center, error;
            Ints good;
            if constexpr (kHasOffsets) {
                const Rows size = total_ * squares[j], spread = size - codes[j] * codes[j];
                good = spread > 1e-5f * size;  // else the codes are alike, and the rest is rounding errors
                scale = (total_ * products[j] - sum_ * codes[j]) / spread;
                center = (sum_ - scale * codes[j]) / total_;
                error = squares_ - center * sum_ - scale * products[j];
            } else {
                good = squares[j] > 0.0f;
                scale = products[j] / squares[j];
                center = all(0);
                error = squares_ - scale * products[j];
            }
            good &= error < error_;
            error_ = good ? error : error_;
            best_.scale = good ? scale : best_.scale;
            best_.center = good ? center : best_.center;
            best_.zero = good ? pivot(zeros[j]) : best_.zero;
        }
    }

    static Rows pivot(Rows zero) { return kHasOffsets ? all(kMiddle) : zero; }

    Rows *const x_;
    const size_t count_;
    const float *const importance_;
    Rows middle_, unit_, low_, high_;
    Rows total_ = {}, sum_ = {}, squares_ = {};  // of importance, x, and x * x
    Fit best_;
    Rows error_;
};

Fit search(da8w4_zeros zeros, Rows *x, size_t count, const float *importance) {
    switch (zeros) {
        case DA8W4_ZEROS_NONE:
            return importance ? Search<DA8W4_ZEROS_NONE, true>(x, count, importance).run()
                              : Search<DA8W4_ZEROS_NONE, false>(x, count, importance).run();
        case DA8W4_ZEROS_INTEGER:
            return importance ? Search<DA8W4_ZEROS_INTEGER, true>(x, count, importance).run()
                              : Search<DA8W4_ZEROS_INTEGER, false>(x, count, importance).run();
        case DA8W4_ZEROS_FLOAT: break;
    }
    return importance ? Search<DA8W4_ZEROS_FLOAT, true>(x, count, importance).run()
                      : Search<DA8W4_ZEROS_FLOAT, false>(x, count, importance).run();
}

// Numbers of two levels: a float for all of them, which a small integer multiplies.
template <class Integer>
Rows second_level(Rows *numbers, size_t count, Integer *const (&to)[kRows]) {
    constexpr float kLargest = sizeof(Integer) && Integer(-1) < 0 ? 127 : 255;
    Rows largest = {};
    for (size_t g = 0; g < count; g++) largest = most(largest, magnitude(numbers[g]));
    const Rows unit = as_scale(largest / kLargest), inverse = inverse_of(unit);
    for (size_t g = 0; g < count; g++) {
        const Rows integer = most(least(nearest(numbers[g] * inverse), all(kLargest)), all(-kLargest));
        for (size_t i = 0; i < kRows; i++)
            if (to[i]) to[i][g] = static_cast<Integer>(integer[i]);
        numbers[g] = unit * integer;
    }
    return unit;
}

// Rows that are quantized together, a super-group at a time.
class Quantizer {
public:
    // `memory` has room for bytes_for(weight).
    Quantizer(const da8w4_quantization &weight, void *memory)
        : weight_(weight),
          groups_(ceil_div(weight.k, weight.group)),
          span_(weight.super ? weight.super : 1),
          x_(static_cast<Rows *>(memory)),
          scratch_(x_ + span_ * weight.group),
          scales_(scratch_ + weight.group),
          offsets_(scales_ + span_),
          zeros_(offsets_ + span_) {}

    static size_t bytes_for(const da8w4_quantization &weight) {
        const size_t span = weight.super ? weight.super : 1;
        return (span * weight.group + weight.group + 3 * span) * sizeof(Rows);
    }

    // `first` is the first of up to kRows rows.
    da8w4_status quantize_rows(size_t first) {
        da8w4_status status = DA8W4_OK;
        for (size_t row = 0; row * span_ < groups_ && status == DA8W4_OK; row++) status = quantize_super(first, row);
        return status;
    }

private:
    // Super-group `row` of these rows, or their group where there is one level.
    da8w4_status quantize_super(size_t first, size_t row) {
        const size_t begin = row * span_, count = lesser(span_, groups_ - begin);
        const size_t k = begin * weight_.group, length = lesser(count * weight_.group, weight_.k - k);
        if (!load(first, k, length)) return DA8W4_NOT_FINITE;
        const bool has_offsets = weight_.zeros == DA8W4_ZEROS_FLOAT;
        for (size_t g = 0; g < count; g++) {
            const size_t at = g * weight_.group, size = lesser(weight_.group, length - at);
            for (size_t i = 0; i < size; i++) scratch_[i] = x_[at + i];
            const Fit fit =
                search(weight_.zeros, scratch_, size, weight_.importance ? weight_.importance + k + at : nullptr);
            scales_[g] = fit.scale;
            offsets_[g] = fit.center;
            zeros_[g] = fit.zero;
        }
        round_scales(first, row, begin, count);
        for (size_t g = 0; g < count; g++)
            if (!are_finite(kMost * scales_[g])) return DA8W4_BAD_SCALE;
        if (has_offsets) {
            for (size_t g = 0; g < count; g++) offsets_[g] -= kMiddle * scales_[g];
            round_offsets(first, row, begin, count);
        }
        for (size_t g = 0; g < count; g++) {
            const size_t at = g * weight_.group;
            store_codes(first, k + at, x_ + at, lesser(weight_.group, length - at), g);
            if (weight_.zeros == DA8W4_ZEROS_INTEGER)
                for (size_t i = 0; i < rows_from(first); i++)
                    weight_.zps[(first + i) * groups_ + begin + g] = static_cast<int8_t>(zeros_[g][i]);
        }
        return DA8W4_OK;
    }

    size_t rows_from(size_t first) const { return lesser(kRows, weight_.n - first); }

    // Numbers of the rows side by side; rows beyond the last are zeros.
    bool load(size_t first, size_t k, size_t count) {
        const size_t rows = rows_from(first);
        for (size_t i = 0; i < count; i++) x_[i] = Rows{};
        for (size_t row = 0; row < rows; row++) {
            const void *const from =
                element(static_cast<const char *>(weight_.values) + (first + row) * weight_.values_stride,
                        weight_.values_type, k);
            for (size_t i = 0; i < count; i++) x_[i][row] = load_float(from, weight_.values_type, i);
        }
        Rows zero = {};  // or NaN
        for (size_t i = 0; i < count; i++) zero += 0 * x_[i];
        return are_finite(zero);
    }

    // To what is stored of them, and stores it.
    void round_scales(size_t first, size_t row, size_t begin, size_t count) {
        if (!weight_.super) {
            scales_[0] = as_scale(scales_[0]);
            store(weight_.scales, first, row, scales_[0]);
        } else if (weight_.zeros == DA8W4_ZEROS_NONE) {
            int8_t *to[kRows];
            pointers(to, weight_.sub_scales, first, begin);
            store(weight_.scales, first, row, second_level(scales_, count, to));
        } else {
            uint8_t *to[kRows];
            pointers(to, weight_.sub_scales, first, begin);
            store(weight_.scales, first, row, second_level(scales_, count, to));
        }
    }

    void round_offsets(size_t first, size_t row, size_t begin, size_t count) {
        if (!weight_.super) {
            offsets_[0] = as_bf16(offsets_[0]);
            store(weight_.offsets, first, row, offsets_[0]);
        } else {
            int8_t *to[kRows];
            pointers(to, weight_.sub_offsets, first, begin);
            store(weight_.offsets, first, row, second_level(offsets_, count, to));
        }
    }

    void store(float *to, size_t first, size_t row, Rows values) const {
        const size_t floats = ceil_div(groups_, span_);
        for (size_t i = 0; i < rows_from(first); i++) to[(first + i) * floats + row] = values[i];
    }

    // Of the second level of these rows, from a group on; null beyond the last row.
    template <class Integer>
    void pointers(Integer *(&to)[kRows], void *array, size_t first, size_t group) const {
        for (size_t i = 0; i < kRows; i++)
            to[i] = i < rows_from(first) ? static_cast<Integer *>(array) + (first + i) * groups_ + group : nullptr;
    }

    void store_codes(size_t first, size_t k, const Rows *x, size_t count, size_t g) const {
        const bool has_offsets = weight_.zeros == DA8W4_ZEROS_FLOAT;
        const Rows inverse = inverse_of(scales_[g]);
        const Rows offset = has_offsets ? offsets_[g] : all(0), zero = has_offsets ? all(0) : zeros_[g];
        uint8_t *to[kRows];
        for (size_t i = 0; i < kRows; i++) to[i] = weight_.codes + lesser(first + i, weight_.n - 1) * weight_.k + k;
        const size_t rows = rows_from(first);
        for (size_t i = 0; i < count; i++) {
            const Rows code = clip(nearest((x[i] - offset) * inverse) + zero);
            for (size_t row = 0; row < rows; row++) to[row][i] = static_cast<uint8_t>(code[row]);
        }
    }

    const da8w4_quantization &weight_;
    const size_t groups_, span_;
    Rows *const x_, *const scratch_, *const scales_, *const offsets_, *const zeros_;
};

}  // namespace

da8w4_status quantize_weight(const da8w4_quantization &given) {
    da8w4_quantization weight = given;
    weight.group = lesser(weight.group, weight.k);
    weight.super = lesser(weight.super, ceil_div(weight.k, weight.group));
    std::atomic<da8w4_status> status{DA8W4_OK};
    parallel(threads_for_packing(weight.n * weight.k), [&](size_t thread, size_t threads) {
        const Range range = part_of(ceil_div(weight.n, kRows), thread, threads);
        if (range.begin == range.end) return;
        void *const memory = da8w4_alloc(Quantizer::bytes_for(weight));
        if (!memory) {
            status = DA8W4_NO_MEMORY;
            return;
        }
        Quantizer quantizer(weight, memory);
        for (size_t rows = range.begin; rows < range.end && status.load(std::memory_order_relaxed) == DA8W4_OK;
             rows++) {
            const da8w4_status found = quantizer.quantize_rows(rows * kRows);
            if (found != DA8W4_OK) status = found;
        }
        da8w4_free(memory);
    });
    return status;
}

}  // namespace da8w4
