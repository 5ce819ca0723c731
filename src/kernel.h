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

constexpr size_t kStepQuads = 8;  // quads of a tile's step

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
    size_t stride;            // bytes
    const int32_t *sums;      // [chunk][row]: sum of a' over the chunk, times the driver's factor
    const float *group_sums;  // [group][row]: sum of a' over the group; only where weights have offsets
    size_t sums_stride;       // elements, of both
};

// One column block as it is stored.
struct Block {
    const uint8_t *codes;  // [quads][kLineBytes]
    const void *scales;    // [groups][kBlock]
    da8w4_type scale_type;
    const int8_t *zps;    // [groups][kBlock], or null
    int zp;               // every zero point, where zps is null
    const void *offsets;  // [groups][kBlock] of scale_type, or null
};

// A range of k. Groups count from k = 0, so it may begin or end inside one.
struct Span {
    size_t begin, end;    // chunk borders, or k
    size_t group, chunk;  // the ones it begins in
    size_t groups;        // how many, if it is made of whole groups, else 0
};

// One column block over a span, as tiles read it: what lies in the weight as it can be used stays there.
struct Panel {
    const uint8_t *codes;     // packed: [quads][kLineBytes]; unpacked: [quads][kPanelLineBytes], see Kernel
    da8w4_type scale_type;    // of scales and offsets
    const void *scales;       // [groups][kBlock]
    const void *offsets;      // [groups][kBlock], or null
    const int32_t *zp_pairs;  // [groups][kBlock], or where all are the same [kBlock]: (int16(-zp), 0)
    size_t zp_step;           // elements of zp_pairs from group to group: kBlock or 0
};

// Where the rest of a panel is unpacked to.
struct Room {
    uint8_t *codes;  // null: tiles read packed codes
    float *scales, *offsets;
    int32_t *zp_pairs;
};

// The next panel's memory, asked for a little at a time so that it arrives while this one is computed: unpacking
// asks for the next one's scales, zero points and offsets, each step of a tile for some lines of codes.
struct Ahead {
    const char *scales;
    const int8_t *zps;    // null as the block's
    const char *offsets;  // null as the block's
    const uint8_t *codes, *codes_end;
    size_t lines;  // for each step
};

// Tiles, each of `height` rows by one column block over a span. `partial` carries the int32 sums of a group
// that is not finished within it.
struct Tiles {
    size_t count, height;
    ActRows act;  // the first row, at the span
    size_t k, group;
    const Span &span;
    float *acc;        // [rows][kBlock]: set if the span begins at 0, else carried on
    int32_t *partial;  // [rows][kBlock]
    Ahead ahead;
};

// Last step of some rows of one block: zero point, scale, bias, conversion.
struct Finish {
    size_t rows, cols;        // cols: 1..kBlock
    const float *acc;         // [rows][kBlock]
    const float *sums;        // [kBlock]
    const float *bias;        // [cols], or null
    const float *act_scales;  // [rows]
    const float *act_zps;     // [rows]: z_a - c
    char *out;
    size_t out_stride;  // bytes
    da8w4_type out_type;
};

struct Kernel {
    const char *name;
    const char *description;
    uint64_t needs;  // CPU bits of cpu.h, all of them

    // Up to packed_max rows the tiles read packed codes and unpack in registers; beyond, each panel
    // is unpacked once for all of them.
    size_t packed_max;
    size_t packed_rows, unpacked_rows;  // most of one tile
    size_t panel_quads;                 // an unpacked panel holds whole multiples of so many for each group

    // A byte of an unpacked panel is its code, or if shifted code - zp + 128. Then the integer sums of a row
    // start from one number for all columns, -128 * sum a', else from -zp * sum a'.
    bool shifted;

    // One row of floats to a' ^ flip (k bytes), its scale and z_a - c, as docs/numbers.md defines
    // them. flip 0x80 turns the a' of an asymmetric row into uint8.
    void (*quantize_row)(const void *x, da8w4_type x_type, size_t k, bool symmetric, uint8_t flip, void *act,
                         float *scale, int32_t *zp);
    // sums[c * sums_stride] of a row of a', times factor.
    void (*sum_row)(const int8_t *act, size_t k, size_t group, int32_t factor, int32_t *sums, size_t sums_stride);
    // What `tiles` tiles need of a block.
    Panel (*unpack)(const Block &block, size_t group, const Span &span, const Room &room, size_t tiles,
                    const Ahead &ahead);
    void (*packed_tiles)(const Tiles &tiles, const Panel &panel);
    void (*unpacked_tiles)(const Tiles &tiles, const Panel &panel);
    void (*finish_rows)(const Finish &finish);
    void (*leave)();  // at the end of each thread's part of a product; or null
};

}  // namespace da8w4
