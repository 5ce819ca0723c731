// What a kernel is: one table of functions and constants per instruction set. Drivers, packing and
// tests know kernels only through this table; src/meson.build lists them.
//
// Included by every ISA unit, so: C headers only, and nothing here that emits a shared symbol.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "pyda8w4/pyda8w4.h"

namespace da8w4 {

constexpr size_t kBlock = 32;            // columns of one packed block
constexpr size_t kQuad = 4;              // consecutive k of one packed line
constexpr size_t kLineBytes = 64;        // one line: kQuad k of kBlock columns, two codes a byte
constexpr size_t kPanelLineBytes = 128;  // the same line unpacked: one code a byte, column-major quads

// A chunk is a piece of a group whose activation sum always fits int16, so that one 16-bit multiply
// by the zero point corrects it: 256 * -128 = -32768.
constexpr size_t kChunk = 256;

static inline constexpr size_t ceil_div(size_t a, size_t b) { return a / b + (a % b != 0); }
static inline constexpr size_t round_up(size_t a, size_t b) { return ceil_div(a, b) * b; }

// Chunks of k weights in groups of `group`, and how many lie before position `at` (a chunk border).
static inline constexpr size_t chunks_before(size_t at, size_t group) {
    return at / group * ceil_div(group, kChunk) + ceil_div(at % group, kChunk);
}

// Rows of shifted activations a' (int8), zero-padded to a multiple of kQuad, with their chunk sums.
struct ActRows {
    const int8_t *rows;
    size_t stride;        // bytes
    const int32_t *sums;  // [row][chunk]: sum of a' over the chunk
    size_t sums_stride;   // elements
};

// One column block as it is stored.
struct Block {
    const uint8_t *codes;  // [quads][kLineBytes]
    const void *scales;    // [groups][kBlock]
    da8w4_type scale_type;
    const int8_t *zps;  // [groups][kBlock], or null
    int zp;             // every zero point, where zps is null
};

// One column block over some range of k, unpacked for many rows: a byte for each code, and for each
// group the scales as float32 and what its integer sums start from. Two kinds, see Kernel.
struct Panel {
    uint8_t *codes;   // [quads][kPanelLineBytes]: code, or code - zp if signed
    float *scales;    // [groups][kBlock]
    int32_t *starts;  // [groups][kBlock]: (int16(-zp), 0) pairs, or -128 * sum(code - zp) if signed
};

// A tile: some rows by one column block over k_begin..k_end. Group boundaries count from 0, so a
// range may begin or end inside a group; `partial` then carries the int32 sums across.
struct Tile {
    ActRows act;  // the tile's first row, at k = 0
    size_t k, group;
    size_t k_begin, k_end;  // chunk borders, or k
    float *acc;             // [rows][kBlock]: set if k_begin is 0, else carried on
    int32_t *partial;       // [rows][kBlock]
};

// Last step of one row of one block: zero point, scale, bias, conversion.
struct Finish {
    const float *acc;   // [kBlock]
    const float *sums;  // [kBlock]
    const float *bias;  // [cols], or null
    float act_scale;
    float act_zp;  // z_a - c
    void *out;     // [cols]
    da8w4_type out_type;
    size_t cols;  // 1..kBlock
};

struct Kernel {
    const char *name;
    const char *description;
    uint64_t needs;  // CPU bits of cpu.h, all of them

    // Up to direct_max rows the tiles read packed codes and unpack in registers; beyond, each block
    // is unpacked once into a panel that all rows share.
    size_t direct_max;
    size_t direct_rows, panel_rows;  // most rows of one tile

    // Panels of signed codes - zp meet activations as uint8, a' + 128, and need no sums of a' but a
    // start of each sum: -128 * sum(code - zp). Others hold raw codes for a' as it is.
    bool signed_panel;

    // One row of floats to a' ^ flip (k bytes), its scale and z_a - c, as docs/numbers.md defines
    // them. flip 0x80 turns the a' of an asymmetric row into uint8.
    void (*quantize_row)(const void *x, da8w4_type x_type, size_t k, bool symmetric, uint8_t flip, void *act,
                         float *scale, int32_t *zp);
    // sums[c] of a row of a'.
    void (*sum_row)(const int8_t *act, size_t k, size_t group, int32_t *sums);
    void (*direct_tile)(const Tile &tile, size_t rows, const Block &block);
    void (*unpack_panel)(const Block &block, size_t k, size_t group, size_t k_begin, size_t k_end, const Panel &panel);
    void (*panel_tile)(const Tile &tile, size_t rows, const Panel &panel);
    void (*finish_row)(const Finish &finish);
};

}  // namespace da8w4
