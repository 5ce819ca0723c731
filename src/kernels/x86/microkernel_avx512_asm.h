// The fast path of 512-bit vpdpbusd in inline assembly. From the version in C++, GCC moves the sums from register to
// register around the loops and keeps six row pointers, which takes as long as the float arithmetic of a group.
//
// Beside its 12 dot products, a quad of a 6-row tile takes 8 loads, so that the two ports that multiply are the limit:
// 6 cycles on Intel's cores. A group adds 12 conversions and 12 fma to them, with offsets 24: of the peak remain 94 %
// in groups of 128, 80 % in groups of 32, with offsets 91 % and 73 %. The branches of a step and of a group (prefetch,
// scale type, offsets) always go the same way and fit beside that work, so they cost no copies of the code.
//
// Packed codes of 4 bits are low + 16 * high as they are: only the low nibbles are cut out, and at the end of a group
// the high sum is (both - low) / 16, exactly: a chunk is short enough for int32. Two instructions less for each quad of
// a tile, two more for each output of a group.
//
// Up to three rows wait for the latency of their sums, not for a port: they have second ones for every other quad.
//
// zmm24, 25: codes, or scales; zmm26, 27: a quad of a row, upper bits of codes, zero points, or offsets; zmm28: nibble
// mask; zmm29: the table, or the mask of upper bits; zmm30: a line of upper bits; zmm31: minus the bias. The others:
//
//    row    sums      second sums    acc       activations
//    0      0,  1     6,  7          12, 13    act
//    1      2,  3     8,  9          14, 15    act + stride
//    2      4,  5     10, 11         16, 17    act + stride * 2
//    3      6,  7                    18, 19    act + stride * 3
//    4      8,  9                    20, 21    act + stride * 4
//    5      10, 11                   22, 23    act + stride * 5
#pragma once

#include "kernels/simd/microkernel.h"
#include "kernels/x86/vec512.h"

namespace da8w4 {
namespace {

// Operands beyond the general registers.
struct AsmArgs {
    const float *acc_from;
    float *acc;
    const char *scales_end;
    size_t to_offsets;     // from scales; 0: there are none
    size_t to_group_sums;  // from chunk_sums
    size_t sums_stride;    // the strides are in bytes
    size_t zp_stride;
    size_t scales_stride;
    size_t steps;  // of a group
    size_t prefetch_lines;
    uint32_t scale_type;
    uint32_t nibbles;
    size_t scaling;
    size_t to_group_scales;  // from chunk_sums
    float factor;            // of the upper bytes of 16-bit activations
    int32_t minus_bias;
    uint64_t table[2];  // of values + 128; or the mask of upper bits
    ptrdiff_t to_next_scales;
    ptrdiff_t to_next_zps;
};

static_assert(offsetof(AsmArgs, acc_from) == 0 && offsetof(AsmArgs, acc) == 8 && offsetof(AsmArgs, scales_end) == 16 &&
              offsetof(AsmArgs, to_offsets) == 24 && offsetof(AsmArgs, to_group_sums) == 32 &&
              offsetof(AsmArgs, sums_stride) == 40 && offsetof(AsmArgs, zp_stride) == 48 &&
              offsetof(AsmArgs, scales_stride) == 56 && offsetof(AsmArgs, steps) == 64 &&
              offsetof(AsmArgs, prefetch_lines) == 72 && offsetof(AsmArgs, scale_type) == 80 &&
              offsetof(AsmArgs, nibbles) == 84 && offsetof(AsmArgs, scaling) == 88 &&
              offsetof(AsmArgs, to_group_scales) == 96 && offsetof(AsmArgs, factor) == 104 &&
              offsetof(AsmArgs, minus_bias) == 108 && offsetof(AsmArgs, table) == 112 &&
              offsetof(AsmArgs, to_next_scales) == 128 && offsetof(AsmArgs, to_next_zps) == 136);

// clang-format off

// Operands of an asm statement are too few to pass each field's offsetof, so the offsets are written down, and checked.
#define ARG_acc_from "0"
#define ARG_acc "8"
#define ARG_scales_end "16"
#define ARG_to_offsets "24"
#define ARG_to_group_sums "32"
#define ARG_sums_stride "40"
#define ARG_zp_stride "48"
#define ARG_scales_stride "56"
#define ARG_steps "64"
#define ARG_prefetch_lines "72"
#define ARG_scale_type "80"
#define ARG_nibbles "84"
#define ARG_scaling "88"
#define ARG_to_group_scales "96"
#define ARG_factor "104"
#define ARG_minus_bias "108"
#define ARG_table "112"
#define ARG_to_next_scales "128"
#define ARG_to_next_zps "136"
#define ARG(name) ARG_##name "(%[args])"

#define LOW_0 "0"
#define HIGH_0 "1"
#define ACC_0 "12"
#define ACC2_0 "13"
#define SECOND_0 "6"
#define SECOND2_0 "7"
#define ACT_0 "(%[act])"
#define LOW_1 "2"
#define HIGH_1 "3"
#define ACC_1 "14"
#define ACC2_1 "15"
#define SECOND_1 "8"
#define SECOND2_1 "9"
#define ACT_1 "(%[act],%[s1])"
#define LOW_2 "4"
#define HIGH_2 "5"
#define ACC_2 "16"
#define ACC2_2 "17"
#define SECOND_2 "10"
#define SECOND2_2 "11"
#define ACT_2 "(%[act],%[s1],2)"
#define LOW_3 "6"
#define HIGH_3 "7"
#define ACC_3 "18"
#define ACC2_3 "19"
#define ACT_3 "(%[act],%[s3])"
#define LOW_4 "8"
#define HIGH_4 "9"
#define ACC_4 "20"
#define ACC2_4 "21"
#define ACT_4 "(%[act],%[s1],4)"
#define LOW_5 "10"
#define HIGH_5 "11"
#define ACC_5 "22"
#define ACC2_5 "23"
#define ACT_5 "(%[act],%[s5])"

#define ZMM(role, row) "%%zmm" role##_##row
#define XMM(role, row) "%%xmm" role##_##row

#define IF_ROW(row, text) ".if %c[rows] > " #row "\n" text ".endif\n"
#define EACH_ROW(USE) \
    IF_ROW(0, USE(0)) IF_ROW(1, USE(1)) IF_ROW(2, USE(2)) IF_ROW(3, USE(3)) IF_ROW(4, USE(4)) IF_ROW(5, USE(5))
#define EACH_ROW_OF_3(USE) ".if %c[rows] < 4\n" IF_ROW(0, USE(0)) IF_ROW(1, USE(1)) IF_ROW(2, USE(2)) ".endif\n"

#define LOAD(row)                                        \
    "vmovups 128*" #row "(%[n]), " ZMM(ACC, row) "\n"    \
    "vmovups 128*" #row "+64(%[n]), " ZMM(ACC2, row) "\n"

#define STORE(row)                                       \
    "vmovups " ZMM(ACC, row) ", 128*" #row "(%[n])\n"    \
    "vmovups " ZMM(ACC2, row) ", 128*" #row "+64(%[n])\n"

#define START(row)                                                                    \
    ".if %c[packed]\n"                                                                \
    "vpxord " XMM(LOW, row) ", " XMM(LOW, row) ", " XMM(LOW, row) "\n"                \
    "vpdpwssd 4*" #row "(%[chunk_sums])%{1to16%}, %%zmm26, " ZMM(LOW, row) "\n"       \
    ".if %c[both]\n"                                                                  \
    "vmovdqa64 " ZMM(LOW, row) ", " ZMM(HIGH, row) "\n"                               \
    ".else\n"                                                                        \
    "vpxord " XMM(HIGH, row) ", " XMM(HIGH, row) ", " XMM(HIGH, row) "\n"             \
    ".endif\n"                                                                       \
    "vpdpwssd 4*" #row "(%[chunk_sums])%{1to16%}, %%zmm27, " ZMM(HIGH, row) "\n"      \
    ".else\n"                                                                         \
    "vpbroadcastd 4*" #row "(%[chunk_sums]), " ZMM(LOW, row) "\n"                     \
    "vpbroadcastd 4*" #row "(%[chunk_sums]), " ZMM(HIGH, row) "\n"                    \
    ".endif\n"

#define START_SECOND(row)                                                   \
    "vpxord " XMM(SECOND, row) ", " XMM(SECOND, row) ", " XMM(SECOND, row) "\n"    \
    "vpxord " XMM(SECOND2, row) ", " XMM(SECOND2, row) ", " XMM(SECOND2, row) "\n"

#define JOIN_SECOND(row)                                                          \
    "vpaddd " ZMM(SECOND, row) ", " ZMM(LOW, row) ", " ZMM(LOW, row) "\n"         \
    "vpaddd " ZMM(SECOND2, row) ", " ZMM(HIGH, row) ", " ZMM(HIGH, row) "\n"

// A line is at `first` of its unit's, of which there are 16 * bits / 8 bytes for each k.
#define CODES(quad)                                                            \
    ".if %c[bits] == 8\n"                                                      \
    "vmovdqu64 128*" #quad "(%[codes]), %%zmm24\n"                             \
    "vmovdqu64 128*" #quad "+64(%[codes]), %%zmm25\n"                          \
    ".elseif %c[both]\n"                                                       \
    "vmovdqu64 64*" #quad "(%[codes]), %%zmm25\n"                              \
    "vpandd %%zmm28, %%zmm25, %%zmm24\n"                                       \
    ".else\n"                                                                  \
    ".if %c[bits] == 5\n"                                                      \
    "vmovdqu64 64*(" #quad "+(" #quad ">>2))(%[codes]), %%zmm25\n"             \
    UPPER_BITS("(" #quad "&3)", "64*(5*(" #quad ">>2)+4)(%[codes])", "1")      \
    ".elseif %c[bits] == 6\n"                                                  \
    "vmovdqu64 64*(" #quad "+(" #quad ">>1))(%[codes]), %%zmm25\n"             \
    UPPER_BITS("(" #quad "&1)", "64*(3*(" #quad ">>1)+2)(%[codes])", "2")      \
    ".else\n"                                                                  \
    "vmovdqu64 64*" #quad "(%[codes]), %%zmm25\n"                              \
    ".endif\n"                                                                 \
    "vpandd %%zmm28, %%zmm25, %%zmm24\n"                                       \
    "vpsrld $4, %%zmm25, %%zmm25\n"                                            \
    "vpandd %%zmm28, %%zmm25, %%zmm25\n"                                       \
    ".if %c[bits] == 4\n"                                                      \
    "vpshufb %%zmm24, %%zmm29, %%zmm24\n"                                      \
    "vpshufb %%zmm25, %%zmm29, %%zmm25\n"                                      \
    ".else\n"                                                                  \
    "vpternlogd $0xf8, %%zmm29, %%zmm26, %%zmm24\n"                            \
    "vpternlogd $0xf8, %%zmm29, %%zmm27, %%zmm25\n"                            \
    ".endif\n"                                                                 \
    ".endif\n"

// The upper bits of quad `quad` of a unit, of so many bits, to where they are in a byte: with others around them.
#define UPPER_BITS(quad, address, bits)                                        \
    ".if " quad " == 0\n"                                                      \
    "vmovdqu64 " address ", %%zmm30\n"                                         \
    ".endif\n"                                                                 \
    SHIFT("(2*" quad "*" bits ")", "%%zmm26")                                  \
    SHIFT("((2*" quad "+1)*" bits ")", "%%zmm27")

// Bit `from` of each byte to bit 4.
#define SHIFT(from, to)                                  \
    ".if " from " < 4\n"                                 \
    "vpslld $4-" from ", %%zmm30, " to "\n"              \
    ".elseif " from " > 4\n"                             \
    "vpsrld $" from "-4, %%zmm30, " to "\n"              \
    ".else\n"                                            \
    "vmovdqa64 %%zmm30, " to "\n"                        \
    ".endif\n"

// One activation quad of a row by the codes of both column vectors. From four rows on, loading it once saves a load.
#define DOT(row, quad, low, high)                                                      \
    ".if %c[rows] > 3\n"                                                               \
    "vpbroadcastd 4*" #quad ACT_##row ", %%zmm26\n"                                    \
    "vpdpbusd %%zmm26, %%zmm24, " low "\n"                                             \
    "vpdpbusd %%zmm26, %%zmm25, " high "\n"                                            \
    ".else\n"                                                                          \
    "vpdpbusd 4*" #quad ACT_##row "%{1to16%}, %%zmm24, " low "\n"                      \
    "vpdpbusd 4*" #quad ACT_##row "%{1to16%}, %%zmm25, " high "\n"                     \
    ".endif\n"
#define DOTS(row, quad) IF_ROW(row, DOT(row, quad, ZMM(LOW, row), ZMM(HIGH, row)))
#define SECOND_DOTS(row, quad) IF_ROW(row, DOT(row, quad, ZMM(SECOND, row), ZMM(SECOND2, row)))

#define EVEN(quad) \
    CODES(quad) DOTS(0, quad) DOTS(1, quad) DOTS(2, quad) DOTS(3, quad) DOTS(4, quad) DOTS(5, quad)
#define ODD(quad)                                                                  \
    CODES(quad)                                                                    \
    ".if %c[rows] < 4\n"                                                           \
    SECOND_DOTS(0, quad) SECOND_DOTS(1, quad) SECOND_DOTS(2, quad)                 \
    ".else\n"                                                                      \
    DOTS(0, quad) DOTS(1, quad) DOTS(2, quad) DOTS(3, quad) DOTS(4, quad) DOTS(5, quad) \
    ".endif\n"

#define CONVERT(row)                                                               \
    ".if %c[both]\n"                                                               \
    "vpsubd " ZMM(LOW, row) ", " ZMM(HIGH, row) ", " ZMM(HIGH, row) "\n"           \
    "vpsrad $4, " ZMM(HIGH, row) ", " ZMM(HIGH, row) "\n"                          \
    ".endif\n"                                                                     \
    "vcvtdq2ps " ZMM(LOW, row) ", " ZMM(LOW, row) "\n"                             \
    "vcvtdq2ps " ZMM(HIGH, row) ", " ZMM(HIGH, row) "\n"

#define SCALE(row)                                                                 \
    "vfmadd231ps %%zmm24, " ZMM(LOW, row) ", " ZMM(ACC, row) "\n"                  \
    "vfmadd231ps %%zmm25, " ZMM(HIGH, row) ", " ZMM(ACC2, row) "\n"

// Where each group has a scale of activations.
#define SCALE_BY_GROUP(row)                                                                \
    "vmulps 4*" #row "(%[chunk_sums],%[n])%{1to16%}, %%zmm24, %%zmm26\n"                   \
    "vmulps 4*" #row "(%[chunk_sums],%[n])%{1to16%}, %%zmm25, %%zmm27\n"                   \
    "vfmadd231ps %%zmm26, " ZMM(LOW, row) ", " ZMM(ACC, row) "\n"                          \
    "vfmadd231ps %%zmm27, " ZMM(HIGH, row) ", " ZMM(ACC2, row) "\n"

// Rows of upper and of lower bytes.
#define EACH_PAIR(USE) \
    ".if (%c[rows] & 1) == 0\n" IF_ROW(1, USE(0, 1)) IF_ROW(3, USE(2, 3)) IF_ROW(5, USE(4, 5)) ".endif\n"
#define SCALE_PAIR(row, next)                                                                    \
    "vfmadd132ps " ARG(factor) "%{1to16%}, " ZMM(LOW, next) ", " ZMM(LOW, row) "\n"              \
    "vfmadd132ps " ARG(factor) "%{1to16%}, " ZMM(HIGH, next) ", " ZMM(HIGH, row) "\n"            \
    SCALE(row)
#define OFFSET_PAIR(row, next) OFFSET(row)

#define OFFSET(row)                                                                        \
    "vfmadd231ps 4*" #row "(%[chunk_sums],%[n])%{1to16%}, %%zmm26, " ZMM(ACC, row) "\n"    \
    "vfmadd231ps 4*" #row "(%[chunk_sums],%[n])%{1to16%}, %%zmm27, " ZMM(ACC2, row) "\n"

// 32 scales or offsets: a panel's are float32. Where micro-kernels read packed codes, other types than float16 are
// converted out of line, so that the usual one passes no jump.
#define FLOATS(id, address, low, high)              \
    ".if %c[packed]\n"                             \
    "cmpl %[f16], " ARG(scale_type) "\n"           \
    "jne " id "0f\n"                               \
    "vcvtph2ps " address ", " low "\n"             \
    "vcvtph2ps 32" address ", " high "\n"          \
    id "1:\n"                                      \
    ".else\n"                                      \
    "vmovups " address ", " low "\n"               \
    "vmovups 64" address ", " high "\n"            \
    ".endif\n"
#define OTHER_FLOATS(id, address, low, high)        \
    ".if %c[packed]\n"                             \
    id "0:\n"                                      \
    "ja " id "2f\n"                                \
    "vmovups " address ", " low "\n"               \
    "vmovups 64" address ", " high "\n"            \
    "jmp " id "1b\n"                               \
    id "2:\n"                                      \
    "vpmovzxwd " address ", " low "\n"             \
    "vpmovzxwd 32" address ", " high "\n"          \
    "vpslld $16, " low ", " low "\n"               \
    "vpslld $16, " high ", " high "\n"             \
    "jmp " id "1b\n"                               \
    ".endif\n"
// Where the offsets of the next panel are, from those of this one, its scales are from the scales.
#define PREFETCH_OFFSETS                            \
    ".if %c[packed]\n"                             \
    "add " ARG(to_next_scales) ", %[n]\n"          \
    PREFETCH("(%[scales],%[n])")                    \
    ".endif\n"
#define SCALES(USE) USE("3", "(%[scales])", "%%zmm24", "%%zmm25")
#define OFFSETS(USE) USE("4", "(%[scales],%[n])", "%%zmm26", "%%zmm27")
#define OFFSETS_OF_PAIRS(USE) USE("13", "(%[scales],%[n])", "%%zmm26", "%%zmm27")

// A K step. AHEAD(quad) is what each quad prefetches.
#define STEP(AHEAD)                                                              \
    AHEAD(0) EVEN(0) AHEAD(1) ODD(1) AHEAD(2) EVEN(2) AHEAD(3) ODD(3)            \
    ".if %c[quads] == 8\n"                                                       \
    AHEAD(4) EVEN(4) AHEAD(5) ODD(5) AHEAD(6) EVEN(6) AHEAD(7) ODD(7)            \
    ".endif\n"                                                                   \
    "add $4*%c[quads], %[act]\n"                                                 \
    "add $16*%c[quads]*%c[bits], %[codes]\n"
#define NO_LINE(quad)
#define LINES(quad)                                          \
    ".if %c[bits] == 8\n"                                    \
    PREFETCH("128*" #quad "(%[prefetch])")                   \
    PREFETCH("128*" #quad "+64(%[prefetch])")                \
    ".else\n"                                                \
    PREFETCH("64*" #quad "(%[prefetch])")                    \
    ".if %c[bits] == 5 && (" #quad "&3) == 3\n"              \
    PREFETCH("64*(%c[quads]+(" #quad ">>2))(%[prefetch])")   \
    ".elseif %c[bits] == 6 && (" #quad "&1)\n"               \
    PREFETCH("64*(%c[quads]+(" #quad ">>1))(%[prefetch])")   \
    ".endif\n"                                               \
    ".endif\n"

#define PREFETCH(address)               \
    ".if %c[near]\n"                    \
    "prefetchnta " address "\n"         \
    ".else\n"                           \
    "prefetcht1 " address "\n"          \
    ".endif\n"

// Prefetches go into L2, for L1 is full. A micro-tile that is alone prefetches as many lines as it reads, those of a
// quad with each quad: in a burst they would wait for each other. Near ones go into L1, past L2.
#define LONE_STEPS                                  \
    "2:\n"                                          \
    STEP(LINES)                                     \
    "add $16*%c[quads]*%c[bits], %[prefetch]\n"             \
    "dec %[step]\n"                                 \
    "jnz 2b\n"

// Of several micro-tiles, each prefetches a few lines at a K step, or none.
#define STEPS                                       \
    "50:\n"                                         \
    "mov " ARG(prefetch_lines) ", %[n]\n"           \
    "test %[n], %[n]\n"                             \
    "jz 52f\n"                                      \
    "51:\n"                                         \
    "prefetcht1 (%[prefetch])\n"                    \
    "add $64, %[prefetch]\n"                        \
    "dec %[n]\n"                                    \
    "jnz 51b\n"                                     \
    "52:\n"                                         \
    STEP(NO_LINE)                                   \
    "dec %[step]\n"                                 \
    "jnz 50b\n"

struct AsmFastPath {
    template <class V, size_t kRows, class Codes, size_t kQuads>
    DA8W4_INLINE static void run(const TilePointers &at, size_t groups, size_t steps) {
        if constexpr (Codes::kPacked && kRows <= V::kNearRows)
            if (at.prefetches_near) return run_steps<V, kRows, Codes, kQuads, true>(at, groups, steps);
        run_steps<V, kRows, Codes, kQuads, false>(at, groups, steps);
    }

private:
    template <class V, size_t kRows, class Codes, size_t kQuads, bool kNear>
    DA8W4_INLINE static void run_steps(const TilePointers &at, size_t groups, size_t steps) {
        static_assert(is_same<V, Vec512> && kRows <= 6 && (kQuads == 8 || kQuads == 4) && kLineBytes == 64);
        constexpr da8w4_kind kKind = Codes::kKind;
        const int8_t *act = at.act;
        const uint8_t *codes = at.codes, *prefetch = at.prefetch;
        const int32_t *chunk_sums = at.chunk_sums;
        const int8_t *zps = at.zps;
        const char *scales = static_cast<const char *>(at.scales);
        const size_t scales_stride = kBlock * size_of(at.scale_type);
        // Offsets and group sums go forward with scales and chunk sums, at these distances from them.
        AsmArgs args = {
            .acc_from = at.acc_from,
            .acc = at.acc,
            .scales_end = scales + groups * scales_stride,
            .to_offsets = at.offsets ? reinterpret_cast<uintptr_t>(at.offsets) - reinterpret_cast<uintptr_t>(scales) : 0,
            .to_group_sums = reinterpret_cast<uintptr_t>(at.group_sums) - reinterpret_cast<uintptr_t>(chunk_sums),
            .sums_stride = at.sums_stride * sizeof(int32_t),
            .zp_stride = at.zp_stride,
            .scales_stride = scales_stride,
            .steps = steps,
            .prefetch_lines = at.prefetch_lines,
            .scale_type = static_cast<uint32_t>(at.scale_type),
            .nibbles = 0x0f0f0f0f,
            .scaling = static_cast<size_t>(at.scaling),
            .to_group_scales = reinterpret_cast<uintptr_t>(at.group_scales) - reinterpret_cast<uintptr_t>(chunk_sums),
            .factor = 256,
            .minus_bias = -layout_of(kKind).bias,
            .table = {},
            .to_next_scales = at.to_scales,
            .to_next_zps = at.to_zps,
        };
        if constexpr (kKind == DA8W4_TABLE4) {
            memcpy(args.table, at.table, sizeof args.table);
            for (uint64_t &values : args.table) values ^= 0x8080808080808080;
        } else {
            for (uint64_t &mask : args.table) mask = kKind == DA8W4_INT5 ? 0x1010101010101010 : 0x3030303030303030;
        }
        size_t step, n;
        __asm__ volatile(
            "mov " ARG(acc_from) ", %[n]\n"
            EACH_ROW(LOAD)
            ".if %c[bits] != 8\n"
            "vpbroadcastd " ARG(nibbles) ", %%zmm28\n"
            "vbroadcasti32x4 " ARG(table) ", %%zmm29\n"
            ".endif\n"
            ".if %c[packed]\n"
            "vpbroadcastd " ARG(minus_bias) ", %%zmm31\n"
            ".endif\n"
            "1:\n"  // a group
            ".if %c[packed]\n"
            "mov " ARG(to_next_zps) ", %[n]\n"
            "vpmovsxbd (%[zps]), %%zmm26\n"
            "vpmovsxbd 16(%[zps]), %%zmm27\n"
            "vpsubd %%zmm26, %%zmm31, %%zmm26\n"
            "vpsubd %%zmm27, %%zmm31, %%zmm27\n"
            ".if %c[both]\n"
            "vpsllw $4, %%zmm27, %%zmm27\n"
            ".endif\n"
            PREFETCH("(%[zps],%[n])")
            "add " ARG(zp_stride) ", %[zps]\n"
            "mov " ARG(to_next_scales) ", %[n]\n"
            PREFETCH("(%[scales],%[n])")
            ".endif\n"
            EACH_ROW(START)
            EACH_ROW_OF_3(START_SECOND)
            "mov " ARG(steps) ", %[step]\n"
            ".if %c[packed]\n"
            "cmpq $%c[quads]*%c[bits]/4, " ARG(prefetch_lines) "\n"
            "jne 5f\n"
            ".p2align 5\n"
            LONE_STEPS
            ".else\n"
            ".p2align 5\n"
            STEPS
            ".endif\n"
            "6:\n"
            SCALES(FLOATS)
            EACH_ROW_OF_3(JOIN_SECOND)
            EACH_ROW(CONVERT)
            "cmpq $0, " ARG(scaling) "\n"
            "jne 10f\n"
            EACH_ROW(SCALE)
            "11:\n"
            "mov " ARG(to_offsets) ", %[n]\n"
            "test %[n], %[n]\n"
            "jnz 8f\n"
            "7:\n"
            "add " ARG(sums_stride) ", %[chunk_sums]\n"
            "add " ARG(scales_stride) ", %[scales]\n"
            "cmp " ARG(scales_end) ", %[scales]\n"
            "jne 1b\n"
            "mov " ARG(acc) ", %[n]\n"
            EACH_ROW(STORE)
            "jmp 9f\n"
            "8:\n"  // the second float step of a group
            OFFSETS(FLOATS)
            PREFETCH_OFFSETS
            "mov " ARG(to_group_sums) ", %[n]\n"
            EACH_ROW(OFFSET)
            "jmp 7b\n"
            "10:\n"  // finer activations
            "cmpq %[by_group], " ARG(scaling) "\n"
            "jne 12f\n"
            "mov " ARG(to_group_scales) ", %[n]\n"
            EACH_ROW(SCALE_BY_GROUP)
            "jmp 11b\n"
            "12:\n"
            EACH_PAIR(SCALE_PAIR)
            "mov " ARG(to_offsets) ", %[n]\n"
            "test %[n], %[n]\n"
            "jz 7b\n"
            OFFSETS_OF_PAIRS(FLOATS)
            PREFETCH_OFFSETS
            "mov " ARG(to_group_sums) ", %[n]\n"
            EACH_PAIR(OFFSET_PAIR)
            "jmp 7b\n"
            SCALES(OTHER_FLOATS)
            OFFSETS(OTHER_FLOATS)
            OFFSETS_OF_PAIRS(OTHER_FLOATS)
            ".if %c[packed]\n"
            ".p2align 5\n"
            "5:\n"
            STEPS
            "jmp 6b\n"
            ".endif\n"
            "9:\n"
            : [act] "+r"(act), [codes] "+r"(codes), [chunk_sums] "+r"(chunk_sums), [scales] "+r"(scales),
              [zps] "+r"(zps), [prefetch] "+r"(prefetch), [step] "=&r"(step), [n] "=&r"(n)
            : [args] "r"(&args), [s1] "r"(at.act_stride), [s3] "r"(at.act_stride * 3), [s5] "r"(at.act_stride * 5),
              [rows] "i"(kRows), [packed] "i"(Codes::kPacked), [bits] "i"(layout_of(kKind).bits),
              [both] "i"(kKind == DA8W4_INT4), [quads] "i"(kQuads), [f16] "i"(DA8W4_F16), [by_group] "i"(Scaling::group),
              [near] "i"(kNear)
            : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
              "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21",
              "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31");
    }
};
static_assert(DA8W4_F32 < DA8W4_F16 && DA8W4_F16 < DA8W4_BF16);  // FLOATS compares

// clang-format on

#undef ARG
#undef ARG_acc_from
#undef ARG_acc
#undef ARG_scales_end
#undef ARG_to_offsets
#undef ARG_to_group_sums
#undef ARG_sums_stride
#undef ARG_zp_stride
#undef ARG_scales_stride
#undef ARG_steps
#undef ARG_prefetch_lines
#undef ARG_scale_type
#undef ARG_nibbles
#undef ARG_scaling
#undef ARG_to_group_scales
#undef ARG_factor
#undef ARG_minus_bias
#undef ARG_table
#undef ARG_to_next_scales
#undef ARG_to_next_zps
#undef LOW_0
#undef HIGH_0
#undef ACC_0
#undef ACC2_0
#undef SECOND_0
#undef SECOND2_0
#undef ACT_0
#undef LOW_1
#undef HIGH_1
#undef ACC_1
#undef ACC2_1
#undef SECOND_1
#undef SECOND2_1
#undef ACT_1
#undef LOW_2
#undef HIGH_2
#undef ACC_2
#undef ACC2_2
#undef SECOND_2
#undef SECOND2_2
#undef ACT_2
#undef LOW_3
#undef HIGH_3
#undef ACC_3
#undef ACC2_3
#undef ACT_3
#undef LOW_4
#undef HIGH_4
#undef ACC_4
#undef ACC2_4
#undef ACT_4
#undef LOW_5
#undef HIGH_5
#undef ACC_5
#undef ACC2_5
#undef ACT_5
#undef ZMM
#undef XMM
#undef IF_ROW
#undef EACH_ROW
#undef EACH_ROW_OF_3
#undef LOAD
#undef STORE
#undef START
#undef START_SECOND
#undef JOIN_SECOND
#undef CODES
#undef UPPER_BITS
#undef SHIFT
#undef DOT
#undef DOTS
#undef SECOND_DOTS
#undef EVEN
#undef ODD
#undef CONVERT
#undef SCALE
#undef EACH_PAIR
#undef SCALE_BY_GROUP
#undef SCALE_PAIR
#undef OFFSET_PAIR
#undef OFFSET
#undef FLOATS
#undef OTHER_FLOATS
#undef SCALES
#undef OFFSETS
#undef OFFSETS_OF_PAIRS
#undef PREFETCH_OFFSETS
#undef STEP
#undef NO_LINE
#undef LINES
#undef PREFETCH
#undef LONE_STEPS
#undef STEPS

}  // namespace
}  // namespace da8w4
