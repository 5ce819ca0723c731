// Kernel avxvnni: 256-bit registers and the VEX-coded vpdpbusd (u8 x s8 quads to int32), which
// processors without AVX-512 have (Alder Lake and later client parts).
// Registers of a 6-row tile: 12 int32 sums, 2 codes, 1 activation; float sums wait in L1 and are
// touched once a group.
#include "isa256.h"

namespace da8w4 {
namespace {

struct Isa : Isa256 {
    using Part = Int;
    static constexpr bool kShifted = true;
    static constexpr size_t kRows = 6, kSetsOneRow = 4, kSetsTwoRows = 2;

    static Part open(Int sum) { return sum; }
    static Part dot(Part part, Int codes, Int act) { return _mm256_dpbusd_avx_epi32(part, codes, act); }
    static Int flush(Int, Part part) { return part; }
};

}  // namespace
}  // namespace da8w4

#include "runtime/cpu.h"
#include "simd_kernel.h"

namespace da8w4 {

extern constexpr Kernel kernel_avxvnni = simd_kernel("avxvnni", "AVX-VNNI: 256-bit vpdpbusd", kAvxVnni);

}  // namespace da8w4
