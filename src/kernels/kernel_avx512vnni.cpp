// Kernel avx512vnni: 512-bit registers and vpdpbusd (u8 x s8 quads to int32).
// Registers of a 6-row tile: 12 int32 sums, 12 float sums, 2 codes, 1 activation, and the nibble mask
// where codes come packed: 28 of 32.
#include "isa512.h"

namespace da8w4 {
namespace {
using Isa = Isa512;
}
}  // namespace da8w4

#include "runtime/cpu.h"
#include "pair512.h"
#include "simd_kernel.h"

namespace da8w4 {

extern constexpr Kernel kernel_avx512vnni = simd_kernel("avx512vnni", "AVX-512 VNNI: 512-bit vpdpbusd", kAvx512Vnni);

}  // namespace da8w4
