// The contract between the driver and the kernels. docs/kernels.md explains it with a picture.
//
// A kernel is one table of functions and constants for an instruction set. The driver, the plan and the tests know
// kernels only through this table; src/meson.build lists them.
//
// A product of rows (m) by weights (n) over k is cut like this: row blocks of at most mc rows; for each, column blocks
// of 32; for each, K blocks of at most kc. One column block over one K block is prepared once, as a panel, and then all
// rows of the row block pass over it in micro-tiles of mr rows by 32 columns. Quantized rows, panels and accumulators
// live in scratch memory that the plan sizes and the driver hands out.
//
// Included by every ISA unit, so: C headers only, and nothing here that emits a shared symbol.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "packing/layout.h"
#include "pyda8w4/pyda8w4.h"
#include "runtime/tuning.h"

namespace da8w4 {

// A chunk is a piece of a group whose sum of activations always fits int16, so that one 16-bit multiplication by a
// zero point compensates for it: 256 * -128 = -32768.
constexpr size_t kChunk = 256;

// Of a row of activations: the least normal number, because the inverse of a subnormal one may be infinite.
constexpr float kLeastActScale = 0x1p-126f;

// How k is cut into groups, and those into chunks.
struct Grouping {
    size_t k, group;

    DA8W4_INLINE constexpr size_t groups() const { return ceil_div(k, group); }
    DA8W4_INLINE constexpr size_t chunks_of_group() const { return ceil_div(group, kChunk); }
    DA8W4_INLINE constexpr size_t chunks() const { return k / group * chunks_of_group() + ceil_div(k % group, kChunk); }
};

// A range of k. Groups count from k = 0, so a K block may begin or end inside one.
struct KBlock {
    size_t begin, end;    // chunk borders, or k
    size_t group, chunk;  // the ones it begins in
    size_t whole_groups;  // how many, if it is made of whole groups, else 0

    DA8W4_INLINE constexpr size_t length() const { return end - begin; }
};

// Rows of quantized activations a' (int8), row-major, each padded with zeros to a multiple of kQuad. Activations of 16
// bits are two rows: their upper bytes, and in the next row their lower ones. Accumulators have as many rows; those of
// lower bytes are not used.
struct ActRows {
    const int8_t *rows;
    size_t stride;  // bytes
    bool is_int16;  // two rows are one of activations: the sum is 256 * that of the first + that of the second
    const int32_t *chunk_sums;  // [chunk][row], in the units of the weight form
    const float *group_sums;    // [group][row]: what is multiplied by offsets; only where weights have some
    const float *group_scales;  // [group][row]: scales of activations, of each group; or null
    size_t sums_stride;         // elements from group to group and from chunk to chunk
};

// Where the kernel prepares a panel. Every array is aligned to 64 bytes.
struct PanelBuffer {
    uint8_t *codes;           // panel_bytes of the weight form
    float *scales, *offsets;  // [groups of a K block][kBlock]
    int32_t *zp_terms;        // [groups of a K block][kBlock]
};

// The panel to prepare: one column block over one K block.
struct PanelJob {
    const PackedBlock &block;
    const KBlock &k;
    const Grouping &grouping;
    const PanelBuffer &buffer;
    size_t rows;                    // that will pass over it
    size_t near_k;                  // of Tuning
    const PackedBlock *next_block;  // what the thread prepares after this, to be prefetched; null for nothing
    const KBlock *next_k;
};

// The next panel, prefetched a little at each K step and group of a micro-tile so that it arrives while this panel is
// multiplied; or what is `near`, a little ahead in this one and then in what follows it. Only the kernel reads or
// advances it.
struct Prefetch {
    const uint8_t *codes, *end;
    size_t lines;  // cache lines for each K step
    // Of packed codes, whose scales and zero points are read where they are: so many bytes after those of a group are
    // those to prefetch.
    ptrdiff_t to_scales, to_zps;
    bool near;
};

// Weights in the form that micro-kernels read. Arrays that the packed weight already holds in that form are referenced
// in place; the others were converted into the PanelBuffer.
struct Panel {
    const uint8_t *codes;   // of packed codes: the unit in which the K block begins
    da8w4_kind kind;        // of the weight
    size_t first_quad;      // of packed codes: how many quads of that unit are before the K block
    const int8_t *table;    // of the weight: see PackedBlock
    da8w4_type scale_type;  // of scales and offsets
    const void *scales;     // [groups][kBlock]
    const void *offsets;    // [groups][kBlock], or null
    const int8_t *zps;      // of packed codes
    // Of others: what zero points add to integer sums, in the kernel's own encoding; null where the codes hold all of
    // it.
    const int32_t *zp_terms;
    size_t zp_stride;  // elements of either from group to group: kBlock, or 0 where every group has the same
    Prefetch prefetch;
};

// How a panel is multiplied, and why not faster: what da8w4_explain says.
struct PanelPath {
    const char *left_to;  // the kernel whose micro-kernels multiply it; null: this one's own
    bool fast;            // the fast path; else the general one
    const char *reason;   // why not this kernel's own fast path; null where it is
};

// Rows that pass over a panel: an even number of those of 16-bit activations. The accumulators start from zero where
// the K block begins at 0, else they go on. `carried` has the int32 sums of a group that the K block does not finish.
struct MicroTiles {
    size_t rows;
    ActRows act;  // of the first row, at the first k, group and chunk of the K block
    const Grouping &grouping;
    const KBlock &k;
    float *acc;        // [rows][kBlock]
    int32_t *carried;  // [rows][kBlock]
    size_t *state;     // the thread's, for the kernel to keep from call to call; 0 at first
};

// The last step of some rows of one column block: zero point, scale, bias, conversion.
struct Epilogue {
    size_t rows, cols;         // cols: 1..kBlock
    const float *acc;          // kBlock of each row
    size_t acc_stride;         // elements
    const float *column_sums;  // [kBlock]: C[n] of docs/numbers.md
    const float *bias;         // [cols], or null
    const float *act_scales;   // [rows]
    const float *act_zps;      // [rows]: z_a - c
    void *out;
    size_t out_stride;  // bytes
    da8w4_type out_type;
};

// Gates and ups of some rows become half as many outputs: activation(gate) * up.
struct GateJob {
    da8w4_gating gating;
    size_t rows, cols;         // cols: outputs of each row, 1..kBlock
    const float *gates, *ups;  // of the first row; where gating.interleaved, every second float
    size_t stride;             // elements from row to row, of both
    void *out;
    size_t out_stride;  // bytes
    da8w4_type out_type;
};

// What experts gave for one token becomes its output: acc = 0; for each slot acc = fma(results[rows[slot]], weight,
// acc).
struct SlotSum {
    size_t slots, cols;
    const float *results;  // [row][stride]
    size_t stride;         // elements
    const int32_t *rows;   // [slots]; negative: the slot adds nothing
    const float *weights;  // [slots], each of which is multiplied by `scaling` first, with one rounding
    float scaling;
    void *out;
    da8w4_type out_type;
};

// One way in which micro-kernels read weights, with the blocking that suits it.
struct WeightForm {
    size_t mr;                // most rows of a micro-tile; even
    size_t mc;                // most rows of a row block
    size_t kc;                // longest K block; a multiple of kChunk
    size_t pass_blocks;       // column blocks that alternate over one K block, so that its activations stay in L2
    size_t tiles_of_reading;  // micro-tiles that take about as long as reading their weights from memory; at least 1

    // Bytes of panel codes for a K block of this length; 0 where packed codes are read in place.
    size_t (*panel_bytes)(size_t length, size_t group);
    // Sums of one row of a' over each chunk, to chunk_sums[chunk * stride], and, unless group_sums is null, over each
    // group.
    void (*sum_row)(const int8_t *act, const Grouping &grouping, int32_t *chunk_sums, size_t stride,
                    int32_t *group_sums);
    Panel (*prepare)(const PanelJob &job);
    void (*run)(const MicroTiles &tiles, Panel &panel);
    // How `run` multiplies the panel that `prepare` makes of this; reads the job's block, K block and grouping.
    PanelPath (*path)(const PanelJob &job);
};

struct Kernel {
    const char *name;
    const char *description;
    uint64_t needs;  // CPU bits of runtime/cpu.h, all of them

    // Up to packed_max rows, micro-kernels read packed codes and unpack them in registers. Beyond, each panel is
    // unpacked once for all rows.
    size_t (*packed_max)(size_t group, const Tuning &tuning);
    WeightForm packed, unpacked;

    // One row of floats to a' ^ flip (k bytes), its scale and z_a - c, as docs/numbers.md defines them. A flip of 0x80
    // turns the a' of an asymmetric row into uint8.
    void (*quantize_row)(const void *x, da8w4_type x_type, size_t k, bool symmetric, uint8_t flip, void *act,
                         float *scale, int32_t *zp);
    // One row to int8 with a scale for each group, to scales[group * stride].
    void (*quantize_groups)(const void *x, da8w4_type x_type, const Grouping &grouping, int8_t *act, float *scales,
                            size_t stride);
    // One row to int16: its upper and its lower bytes, and its scale.
    void (*quantize_int16)(const void *x, da8w4_type x_type, size_t k, int8_t *upper, int8_t *lower, float *scale);
    // to[i] = x[perm[i]] * factors[i], for k of them. Either may be null: no permutation, no multiplication.
    void (*transform_row)(const void *x, da8w4_type x_type, size_t k, const int32_t *perm, const float *factors,
                          float *to);
    // Rotates k floats in blocks of `rotation`, in place: sums and differences, each rounded once.
    void (*rotate_row)(float *x, size_t k, size_t rotation);
    void (*epilogue)(const Epilogue &epilogue);
    void (*gate)(const GateJob &job);
    void (*sum_slots)(const SlotSum &sum);
    // Gives back what a thread's state says that it holds, at the end of its part of a product; or null.
    void (*release)(size_t state);

    // What the instruction set can do at best, for kernels/limits.h. Reads 128 bytes at each of two places, `rounds`
    // times, both places `step` further each time.
    void (*read)(const char *first, const char *second, size_t step, size_t rounds);
    // Makes dot products of 8 bits with all operands in registers. Returns how many multiplications these are.
    size_t (*multiply)(size_t rounds);
};

}  // namespace da8w4
