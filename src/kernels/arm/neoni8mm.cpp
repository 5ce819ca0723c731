// Kernel neoni8mm: smmla, which makes twice as many products as sdot, from panels; and the sdot of neondot for packed
// codes, which few rows read.
// Registers of a 6-row tile: 12 squares of int32 sums, 6 of activations, 4 of codes; float sums wait in L1 and are
// touched once a group. With 8 rows, compilers spill. Exact: int32 sums of int8 products, and the same chain of fma as
// everywhere.
#include "kernels/arm/microkernel_i8mm.h"
#include "kernels/simd/table.h"
#include "runtime/cpu.h"

namespace da8w4 {
namespace {

// By counting vector instructions for 16 k of 8 columns: packed codes take 8 for each row and 8 for unpacking in each
// micro-tile of up to 6 rows, a panel takes 10 for each two rows and 32 for being made.
size_t matrix_packed_max(size_t, const Tuning &) { return VecNeon::kRows; }

Panel prepare_matrix_panel(const PanelJob &job) {
    const Panel panel = prepare_panel<VecNeon, kPanelKc<VecNeon>>(job);
    if (is_zipped(job.grouping, job.k, panel)) zip_lines(job.buffer.codes, job.k.length() / kQuad);
    return panel;
}

// 12 independent squares hide the latency of the instruction.
size_t multiply_squares(size_t rounds) {
    constexpr size_t kSquares = 12;
    int32x4_t codes = VecNeon::broadcast(0x05050505), act = VecNeon::broadcast(0x03030303);
    int32x4_t squares[kSquares];
    for (auto &square : squares) square = VecNeon::zero();
    for (size_t i = 0; i < rounds; i++) {
#pragma GCC unroll 12
        for (auto &square : squares) {
            codes = VecNeon::opaque(codes);
            square = vmmlaq_s32(square, vreinterpretq_s8_s32(act), vreinterpretq_s8_s32(codes));
        }
    }
    for (auto &square : squares) square = VecNeon::opaque(square);
    return rounds * kSquares * 32;
}

constexpr Kernel matrix_kernel() {
    Kernel kernel = simd_kernel<VecNeon, MatrixFastPath>("neoni8mm", "NEON: 128-bit smmla, and sdot for few rows",
                                                         kNeonDot | kNeonI8mm);
    kernel.packed_max = matrix_packed_max;
    kernel.unpacked.prepare = prepare_matrix_panel;
    kernel.multiply = multiply_squares;
    return kernel;
}

}  // namespace

extern constexpr Kernel kernel_neoni8mm = matrix_kernel();

}  // namespace da8w4
