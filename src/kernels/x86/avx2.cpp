// Kernel avx2: 256-bit registers, vpmaddubsw (u8 x s8 pairs to int16) and vpaddw.
// Two products of codes 0..15 and a' are at most 2 * 15 * 128 = 3840, so nothing saturates and eight
// quads add up to 30720 before they are widened to int32 by vpmaddwd. Of codes up to 31 that are four
// quads, up to 63 two; bytes up to 255 are multiplied by halves, first their low and then their high
// nibbles, whose sums vpmaddwd multiplies by 16.
// Registers of a 4-row tile: 8 int16 sums, 2 codes, 1 activation; int32 and float sums wait in L1
// and are touched every eighth step.
#include "kernels/simd/table.h"
#include "kernels/x86/vec256.h"
#include "runtime/cpu.h"

namespace da8w4 {
namespace {

struct VecAvx2 : Vec256 {
    using Part = Int;
    static constexpr Encoding kPanelEncoding = Encoding::plain;
    static constexpr size_t kRows = 4, kSetsOneRow = 1, kSetsTwoRows = 1;
    static constexpr size_t kTilesOfReading = 1;
    static constexpr size_t kMostPart = INT16_MAX;

    static Part open(Int) { return zero(); }
    static Part dot(Part part, Int codes, Int act) {
        part = _mm256_add_epi16(part, _mm256_maddubs_epi16(codes, act));
        // Without this, GCC does the products of all eight steps first, in memory, and adds them later.
        __asm__ volatile("" : "+x"(part));
        return part;
    }
    static Int flush(Int sum, Part part, int weight) {
        return add(sum, _mm256_madd_epi16(part, _mm256_set1_epi16(static_cast<int16_t>(weight))));
    }
};

}  // namespace

extern constexpr Kernel kernel_avx2 = simd_kernel<VecAvx2>("avx2", "AVX2, FMA, F16C: 256-bit vpmaddubsw", kAvx2);

}  // namespace da8w4
