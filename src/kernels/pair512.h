// simd_kernel.h's usual_pair as text: GCC moves the sums from register to register around the loops and keeps six
// row pointers, which takes as long as the float arithmetic of a group.
//
// Beside its 12 dot products, a quad of a 6-row tile takes 8 loads, so that the two ports that multiply are the
// limit: 6 cycles on Intel's cores. A group adds 12 conversions and 12 fma to them, with offsets 24: of the peak
// remain 94 % in groups of 128, 80 % in groups of 32, with offsets 91 % and 73 %.
//
// Packed codes are low + 16 * high as they are: only the low nibbles are cut out, and at the end of a group
// the high sum is (both - low) / 16, exactly: a chunk is short enough for int32. Two instructions less for each
// quad of a tile, two more for each output of a group.
//
// Up to three rows wait for the latency of their sums, not for a port: they have second ones for every other quad.
//
// zmm0..11: sums; zmm12..23: acc; zmm24, 25: codes, or scales; zmm26, 27: a quad of a row, zp_pairs, or offsets;
// zmm28: nibble mask.
#pragma once

#include "isa512.h"
#include "kernel.h"

namespace da8w4 {
namespace {

// What the text reads from memory.
struct Rest {
    const float *acc_from;
    float *acc;
    const char *scales_end;
    size_t to_offsets, to_group_sums, sums_bytes, zp_bytes, steps, lines;
};

// clang-format off

#define ACC_FROM "(%[rest])"
#define ACC "8(%[rest])"
#define SCALES_END "16(%[rest])"
#define TO_OFFSETS "24(%[rest])"
#define TO_GROUP_SUMS "32(%[rest])"
#define SUMS_BYTES "40(%[rest])"
#define ZP_BYTES "48(%[rest])"
#define STEPS "56(%[rest])"
#define LINES "64(%[rest])"

// Uses: a quad, a row, its sums, its acc, its address.
#define EACH_ROW(USE, quad)                                                         \
    ".if %c[rows] > 0\n" USE(quad, 0,  0,  1, 12, 13, "(%[act])")         ".endif\n" \
    ".if %c[rows] > 1\n" USE(quad, 1,  2,  3, 14, 15, "(%[act],%[s1])")   ".endif\n" \
    ".if %c[rows] > 2\n" USE(quad, 2,  4,  5, 16, 17, "(%[act],%[s1],2)") ".endif\n" \
    ".if %c[rows] > 3\n" USE(quad, 3,  6,  7, 18, 19, "(%[act],%[s3])")   ".endif\n" \
    ".if %c[rows] > 4\n" USE(quad, 4,  8,  9, 20, 21, "(%[act],%[s1],4)") ".endif\n" \
    ".if %c[rows] > 5\n" USE(quad, 5, 10, 11, 22, 23, "(%[act],%[s5])")   ".endif\n"

// The second sums of up to three rows.
#define EACH_ROW_AGAIN(USE, quad)                                                    \
    ".if %c[rows] > 0\n" USE(quad, 0,  6,  7, 12, 13, "(%[act])")         ".endif\n" \
    ".if %c[rows] > 1\n" USE(quad, 1,  8,  9, 14, 15, "(%[act],%[s1])")   ".endif\n" \
    ".if %c[rows] > 2\n" USE(quad, 2, 10, 11, 16, 17, "(%[act],%[s1],2)") ".endif\n"

#define LOAD(quad, row, low, high, acc_low, acc_high, address) \
    "vmovups 128*" #row "(%[n]), %%zmm" #acc_low "\n"          \
    "vmovups 128*" #row "+64(%[n]), %%zmm" #acc_high "\n"

#define START(quad, row, low, high, acc_low, acc_high, address)      \
    ".if %c[packed]\n"                                               \
    "vpxord %%xmm" #low ", %%xmm" #low ", %%xmm" #low "\n"           \
    "vpdpwssd 4*" #row "(%[sums])%{1to16%}, %%zmm26, %%zmm" #low "\n"  \
    "vmovdqa64 %%zmm" #low ", %%zmm" #high "\n"                       \
    "vpdpwssd 4*" #row "(%[sums])%{1to16%}, %%zmm27, %%zmm" #high "\n" \
    ".else\n"                                                        \
    "vpbroadcastd 4*" #row "(%[sums]), %%zmm" #low "\n"              \
    "vpbroadcastd 4*" #row "(%[sums]), %%zmm" #high "\n"             \
    ".endif\n"

#define CODES(quad)                                          \
    ".if %c[fetch] == 8\n"                                   \
    "prefetcht1 64*" #quad "(%[ahead])\n"                    \
    ".endif\n"                                               \
    ".if %c[packed]\n"                                       \
    "vmovdqu64 64*" #quad "(%[line]), %%zmm25\n"             \
    "vpandd %%zmm28, %%zmm25, %%zmm24\n"                     \
    ".else\n"                                                \
    "vmovdqu64 128*" #quad "(%[line]), %%zmm24\n"            \
    "vmovdqu64 128*" #quad "+64(%[line]), %%zmm25\n"         \
    ".endif\n"

#define DOTS(quad, row, low, high, acc_low, acc_high, address) \
    ".if %c[rows] > 3\n"                                       \
    "vpbroadcastd 4*" #quad address ", %%zmm26\n"              \
    "vpdpbusd %%zmm26, %%zmm24, %%zmm" #low "\n"               \
    "vpdpbusd %%zmm26, %%zmm25, %%zmm" #high "\n"              \
    ".else\n"                                                  \
    "vpdpbusd 4*" #quad address "%{1to16%}, %%zmm24, %%zmm" #low "\n"  \
    "vpdpbusd 4*" #quad address "%{1to16%}, %%zmm25, %%zmm" #high "\n" \
    ".endif\n"

#define EVEN(quad) CODES(quad) EACH_ROW(DOTS, quad)
#define ODD(quad)  \
    CODES(quad) \
    ".if %c[rows] > 3\n" EACH_ROW(DOTS, quad) ".else\n" EACH_ROW_AGAIN(DOTS, quad) ".endif\n"

#define ZERO(quad, row, low, high, acc_low, acc_high, address) \
    "vpxord %%xmm" #low ", %%xmm" #low ", %%xmm" #low "\n"     \
    "vpxord %%xmm" #high ", %%xmm" #high ", %%xmm" #high "\n"

#define CONVERT(quad, row, low, high, acc_low, acc_high, address) \
    ".if %c[packed]\n"                                            \
    "vpsubd %%zmm" #low ", %%zmm" #high ", %%zmm" #high "\n"      \
    "vpsrad $4, %%zmm" #high ", %%zmm" #high "\n"                 \
    ".endif\n"                                                    \
    "vcvtdq2ps %%zmm" #low ", %%zmm" #low "\n"                    \
    "vcvtdq2ps %%zmm" #high ", %%zmm" #high "\n"

// 32 scales or offsets; types: 0 float32, 1 float16, 2 bfloat16.
#define FLOATS(address, low, high)                             \
    ".if %c[scale_type] == 0\n"                                \
    "vmovups " address ", %%zmm" #low "\n"                     \
    "vmovups 64" address ", %%zmm" #high "\n"                  \
    ".elseif %c[scale_type] == 1\n"                            \
    "vcvtph2ps " address ", %%zmm" #low "\n"                   \
    "vcvtph2ps 32" address ", %%zmm" #high "\n"                \
    ".else\n"                                                  \
    "vpmovzxwd " address ", %%zmm" #low "\n"                   \
    "vpmovzxwd 32" address ", %%zmm" #high "\n"                \
    "vpslld $16, %%zmm" #low ", %%zmm" #low "\n"               \
    "vpslld $16, %%zmm" #high ", %%zmm" #high "\n"             \
    ".endif\n"

#define SCALE(quad, row, low, high, acc_low, acc_high, address) \
    "vfmadd231ps %%zmm24, %%zmm" #low ", %%zmm" #acc_low "\n"   \
    "vfmadd231ps %%zmm25, %%zmm" #high ", %%zmm" #acc_high "\n"

#define OFFSET(quad, row, low, high, acc_low, acc_high, address)                    \
    "vfmadd231ps 4*" #row "(%[sums],%[n])%{1to16%}, %%zmm26, %%zmm" #acc_low "\n"  \
    "vfmadd231ps 4*" #row "(%[sums],%[n])%{1to16%}, %%zmm27, %%zmm" #acc_high "\n"

#define STORE(quad, row, low, high, acc_low, acc_high, address) \
    "vmovups %%zmm" #acc_low ", 128*" #row "(%[n])\n"           \
    "vmovups %%zmm" #acc_high ", 128*" #row "+64(%[n])\n"

// kFetch: 0 asks for nothing ahead, 8 for a step's whole 8 lines, one with each quad; 1 for pair.ahead.lines of them.
template <size_t kRows, bool kPacked, bool kOffsets, da8w4_type kScale, size_t kFetch, class Pair>
__attribute__((always_inline)) inline void usual_pair_text(const Pair &pair, size_t groups, size_t steps) {
    static const uint32_t nibbles = 0x0f0f0f0f;
    constexpr size_t scale_bytes = kScale == DA8W4_F32 ? 4 : 2;
    const int8_t *act = pair.act;
    const uint8_t *line = pair.line, *ahead = pair.ahead.codes;
    const int32_t *sums = pair.sums, *zp_pairs = pair.zp_pairs;
    const char *scales = pair.scales;
    // Offsets and group sums go forward with scales and chunk sums, at these distances from them.
    const Rest rest = {
        pair.acc_from,
        pair.acc,
        scales + groups * kBlock * scale_bytes,
        reinterpret_cast<uintptr_t>(pair.offsets) - reinterpret_cast<uintptr_t>(scales),
        reinterpret_cast<uintptr_t>(pair.group_sums) - reinterpret_cast<uintptr_t>(sums),
        pair.sums_stride * sizeof(int32_t),
        pair.zp_step * sizeof(int32_t),
        steps,
        pair.ahead.lines,
    };
    size_t step, n;
    __asm__ volatile(
        "mov " ACC_FROM ", %[n]\n"
        EACH_ROW(LOAD, 0)
        "vpbroadcastd %[nibbles], %%zmm28\n"
        "1:\n"  // a group
        ".if %c[packed]\n"
        "vmovdqu64 (%[zp_pairs]), %%zmm26\n"
        "vpsllw $4, 64(%[zp_pairs]), %%zmm27\n"
        "add " ZP_BYTES ", %[zp_pairs]\n"
        ".endif\n"
        EACH_ROW(START, 0)
        ".if %c[rows] < 4\n"
        EACH_ROW_AGAIN(ZERO, 0)
        ".endif\n"
        "mov " STEPS ", %[step]\n"
        ".p2align 5\n"
        "2:\n"  // a step
        ".if %c[fetch] == 1\n"
        "mov " LINES ", %[n]\n"
        "3:\n"
        "prefetcht1 (%[ahead])\n"
        "add $64, %[ahead]\n"
        "dec %[n]\n"
        "jnz 3b\n"
        ".endif\n"
        EVEN(0)
        ODD(1)
        EVEN(2)
        ODD(3)
        EVEN(4)
        ODD(5)
        EVEN(6)
        ODD(7)
        ".if %c[fetch] == 8\n"
        "add $512, %[ahead]\n"
        ".endif\n"
        "add $32, %[act]\n"
        "add $8*128 >> %c[packed], %[line]\n"
        "dec %[step]\n"
        "jnz 2b\n"
        FLOATS("(%[scales])", 24, 25)
        ".if %c[rows] < 4\n"
        "vpaddd %%zmm6, %%zmm0, %%zmm0\n"
        "vpaddd %%zmm7, %%zmm1, %%zmm1\n"
        ".if %c[rows] > 1\n"
        "vpaddd %%zmm8, %%zmm2, %%zmm2\n"
        "vpaddd %%zmm9, %%zmm3, %%zmm3\n"
        ".endif\n"
        ".if %c[rows] > 2\n"
        "vpaddd %%zmm10, %%zmm4, %%zmm4\n"
        "vpaddd %%zmm11, %%zmm5, %%zmm5\n"
        ".endif\n"
        ".endif\n"
        EACH_ROW(CONVERT, 0)
        EACH_ROW(SCALE, 0)
        ".if %c[offset]\n"
        "mov " TO_OFFSETS ", %[n]\n"
        FLOATS("(%[scales],%[n])", 26, 27)
        "mov " TO_GROUP_SUMS ", %[n]\n"
        EACH_ROW(OFFSET, 0)
        ".endif\n"
        "add " SUMS_BYTES ", %[sums]\n"
        "add $32*%c[scale_bytes], %[scales]\n"
        "cmp " SCALES_END ", %[scales]\n"
        "jne 1b\n"
        "mov " ACC ", %[n]\n"
        EACH_ROW(STORE, 0)
        : [act] "+r"(act), [line] "+r"(line), [sums] "+r"(sums), [scales] "+r"(scales), [zp_pairs] "+r"(zp_pairs),
          [ahead] "+r"(ahead), [step] "=&r"(step), [n] "=&r"(n)
        : [rows] "i"(kRows), [packed] "i"(kPacked), [offset] "i"(kOffsets), [fetch] "i"(kFetch),
          [scale_type] "i"(kScale), [scale_bytes] "i"(scale_bytes), [rest] "r"(&rest), [nibbles] "m"(nibbles),
          [s1] "r"(pair.stride), [s3] "r"(pair.stride * 3), [s5] "r"(pair.stride * 5)
        : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
          "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22",
          "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28");
}

// clang-format on

#undef EACH_ROW
#undef LOAD
#undef START
#undef CODES
#undef DOTS
#undef CONVERT
#undef SCALE
#undef OFFSET
#undef STORE

template <size_t kRows, bool kPacked, bool kOffsets, da8w4_type kScale, class Pair>
void Isa512::usual_pair(const Pair &pair, size_t groups, size_t steps) {
    if (pair.ahead.lines == 8)
        usual_pair_text<kRows, kPacked, kOffsets, kScale, 8>(pair, groups, steps);
    else if (pair.ahead.lines)
        usual_pair_text<kRows, kPacked, kOffsets, kScale, 1>(pair, groups, steps);
    else
        usual_pair_text<kRows, kPacked, kOffsets, kScale, 0>(pair, groups, steps);
}

}  // namespace
}  // namespace da8w4
