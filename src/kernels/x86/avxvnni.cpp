// Kernel avxvnni: 256-bit registers and the VEX-coded vpdpbusd (u8 x s8 quads to int32), which
// processors without AVX-512 have (Alder Lake and later client parts).
// Registers of a 6-row tile: 12 int32 sums, 2 codes, 1 activation; float sums wait in L1 and are
// touched once a group.
#include "kernels/simd/table.h"
#include "kernels/x86/vec256.h"
#include "runtime/cpu.h"

namespace da8w4 {
namespace {

struct VecAvxVnni : Vec256 {
    using Part = Int;
    static constexpr Encoding kPanelEncoding = Encoding::biased;
    static constexpr size_t kRows = 6, kSetsOneRow = 4, kSetsTwoRows = 2;
    static constexpr size_t kTilesOfReading = 2;
    static constexpr size_t kMostPart = SIZE_MAX;  // sums modulo 2^32 do for any number of products

    static Part open(Int sum) { return sum; }
    // In inline assembly, because GCC would copy the sums that it passes to the intrinsic from register to register.
    static Part dot(Part part, Int codes, Int act) {
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(part) : "x"(codes), "x"(act));
        return part;
    }
    static Int flush(Int, Part part, int) { return part; }
};

}  // namespace

extern constexpr Kernel kernel_avxvnni = simd_kernel<VecAvxVnni>("avxvnni", "AVX-VNNI: 256-bit vpdpbusd", kAvxVnni);

}  // namespace da8w4
