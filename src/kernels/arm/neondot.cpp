// Kernel neondot: 128-bit registers and sdot (s8 x s8 quads to int32), which takes the quad of activations by its
// number in a register. Registers of a 6-row tile: 12 int32 sums, 6 of activations, 2 codes, 1 line; float sums wait in
// L1 and are touched once a group. Exact: int32 sums of int8 products, and the same chain of fma as everywhere.
#include "kernels/arm/vec_neon.h"
#include "kernels/simd/table.h"
#include "runtime/cpu.h"

namespace da8w4 {

extern constexpr Kernel kernel_neondot = simd_kernel<VecNeon>("neondot", "NEON: 128-bit sdot", kNeonDot);

}  // namespace da8w4
