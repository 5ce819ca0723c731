// The micro-kernel of smmla, which multiplies two rows by two columns over 8 k: a register of 8 k of two rows, by one
// of 8 k of two columns, gives a register of four sums.
//
// Panels of its fast path have the same lines as those of sdot, but two lines of consecutive quads are zipped, so that
// the 8 k of a column lie side by side: what was the same 16 bytes, four columns, of both lines is two of those columns
// in the first, and two in the second. Rows are zipped when they are loaded.
#pragma once

#include "kernels/arm/vec_neon.h"
#include "kernels/simd/microkernel.h"

namespace da8w4 {
namespace {

// Zips the lines of so many quads, an even number.
inline void zip_lines(uint8_t *lines, size_t quads) {
    for (size_t quad = 0; quad < quads; quad += 2, lines += 2 * kPanelLineBytes)
        for (size_t i = 0; i < kPanelLineBytes; i += 16) {
            const int32x4_t first = VecNeon::load(lines + i), second = VecNeon::load(lines + kPanelLineBytes + i);
            VecNeon::store(lines + i, vzip1q_s32(first, second));
            VecNeon::store(lines + kPanelLineBytes + i, vzip2q_s32(first, second));
        }
}

// Where a panel is read as such.
inline bool is_zipped(const Grouping &grouping, const KBlock &k, const Panel &panel) {
    return has_fast_path(grouping, k) && !panel.zp_terms;
}

inline int32x4_t zip_low(int32x4_t a, int32x4_t b) {
    return vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}
inline int32x4_t zip_high(int32x4_t a, int32x4_t b) {
    return vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}

// A micro-tile whose sums of a group are gathered as squares of two rows by two columns.
template <size_t kRows, class Codes>
class MatrixTile : public MicroTile<VecNeon, kRows, Codes> {
    using Base = MicroTile<VecNeon, kRows, Codes>;
    static constexpr size_t kRowPairs = ceil_div(kRows, 2);

public:
    explicit DA8W4_INLINE MatrixTile(const TilePointers &at) : Base(at) {}

    DA8W4_INLINE void begin_group() {
        Base::begin_group();
        for (auto &pair : squares_)
            for (auto &columns : pair) columns[0] = columns[1] = VecNeon::zero();
    }

    DA8W4_INLINE void begin_chunk() {}  // signed bytes leave nothing to compensate

    template <size_t kQuads>
    DA8W4_INLINE void add_step() {
        Base::template prefetch_step<kQuads>();
#pragma GCC unroll 2
        for (size_t quad = 0; quad < kQuads; quad += 4) add_four_quads();
    }

    DA8W4_INLINE void end_group() {
        for (size_t r = 0; r < kRows; r++)
            for (size_t v = 0; v < 2; v++) {
                const int32x4_t *const columns = squares_[r / 2][v];
                this->sum_[0][r][v] = r % 2 ? zip_high(columns[0], columns[1]) : zip_low(columns[0], columns[1]);
            }
        Base::end_group();
    }

private:
    DA8W4_INLINE void add_four_quads() {
        int32x4_t acts[kRowPairs][2];  // 8 k of two rows each; the last of an odd number of rows is taken twice
        for (size_t p = 0; p < kRowPairs; p++) {
            const int32x4_t first = VecNeon::load(this->at_.act + 2 * p * this->at_.act_stride);
            const size_t second_row = lesser(2 * p + 1, kRows - 1);
            const int32x4_t second = VecNeon::load(this->at_.act + second_row * this->at_.act_stride);
            acts[p][0] = zip_low(first, second);
            acts[p][1] = zip_high(first, second);
        }
#pragma GCC unroll 2
        for (size_t half = 0; half < 2; half++, this->at_.codes += 2 * kPanelLineBytes)
#pragma GCC unroll 2
            for (size_t v = 0; v < 2; v++)
#pragma GCC unroll 2
                for (size_t c = 0; c < 2; c++) {
                    const uint8_t *const at = this->at_.codes + c * kPanelLineBytes + v * kHalf * kQuad;
                    const int8x16_t codes = vreinterpretq_s8_s32(VecNeon::load(at));
#pragma GCC unroll 4
                    for (size_t p = 0; p < kRowPairs; p++)
                        squares_[p][v][c] = vmmlaq_s32(squares_[p][v][c], vreinterpretq_s8_s32(acts[p][half]), codes);
                }
        this->at_.act += 4 * kQuad;
    }

    int32x4_t squares_[kRowPairs][2][2];  // [row pair][column vector][its first or second half]
};

// Packed codes have the fast path of sdot: few rows leave half of a square empty, and zipping costs as much as they
// gain.
struct MatrixFastPath {
    template <class V, size_t kRows, class Codes, size_t kQuads>
    static void run(const TilePointers &at, size_t groups, size_t steps) {
        static_assert(is_same<V, VecNeon> && kQuads % 4 == 0);
        if constexpr (Codes::kPacked)
            fast_path<MicroTile<V, kRows, Codes>, kQuads>(at, groups, steps);
        else
            fast_path<MatrixTile<kRows, Codes>, kQuads>(at, groups, steps);
    }
};

}  // namespace
}  // namespace da8w4
