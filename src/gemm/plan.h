// How a call is blocked, what scratch memory it takes, and which thread multiplies what: numbers only, so that
// tests/native/plan_test.cpp can try millions of shapes. docs/architecture.md has the loop nest.
#pragma once

#include "kernels/kernel.h"
#include "runtime/parallel.h"

namespace da8w4 {

// What the columns of a product are: its outputs, or gates and ups, of which two make one output.
enum class Columns { outputs, halves, pairs };  // gates are the first half, or the even ones

// The column blocks that make one output block (32 outputs): its own; or that of its gates and those of its ups, of
// which there are two where the ups do not begin at a block; or two of pairs.
struct BlocksOfOutput {
    size_t count;
    size_t blocks[3];
};

// What all weights that one call multiplies by have in common.
struct Product {
    size_t n;
    Grouping grouping;
    bool has_offsets;
    bool transforms;  // activations are permuted, multiplied by factors or rotated before they are quantized
    da8w4_scheme scheme;
    Columns columns;

    // Rows of int8 for each row of activations.
    size_t act_parts() const { return scheme == DA8W4_ACT_INT16 ? 2 : 1; }
    size_t outputs() const { return columns == Columns::outputs ? n : n / 2; }
    size_t output_blocks() const { return blocks_of(outputs()); }
    size_t blocks_of_output() const;  // the most
    BlocksOfOutput blocks_at(size_t output_block) const;
};

// Cuts k into K blocks of at most kc: whole groups where they fit, else whole chunks of one group. A last group that is
// shorter has a K block of its own, because micro-kernels are faster where all groups are whole. Without a division for
// each, since a K block is a few kilobytes of weights, whose time a division would notice.
class KBlocks {
public:
    KBlocks(const Grouping &grouping, size_t kc);
    KBlock first() const { return at(0, 0, 0); }
    KBlock after(const KBlock &block) const;
    bool is_last(const KBlock &block) const { return block.end == grouping_.k; }
    size_t longest() const { return lesser(length_, grouping_.k); }
    size_t most_groups() const { return ceil_div(longest(), grouping_.group); }  // that a K block touches

private:
    KBlock at(size_t begin, size_t group, size_t chunk) const;

    Grouping grouping_;
    size_t length_;        // of every K block but the last ones of a group or of k
    size_t groups_;        // of a K block; 0 if it may end inside one
    size_t whole_groups_;  // of k
};

// One array in scratch memory.
template <class T>
struct Scratch {
    size_t offset = 0;
    T *in(void *memory) const { return reinterpret_cast<T *>(static_cast<char *>(memory) + offset); }
};

// Adds up the arrays of a piece of scratch memory. Each starts at a multiple of 64 bytes.
class ScratchLayout {
public:
    template <class T>
    Scratch<T> add(size_t count) {
        const Scratch<T> array = {bytes_};
        bytes_ += round_up(count * sizeof(T), 64);
        return array;
    }
    size_t bytes() const { return bytes_; }

private:
    size_t bytes_ = 0;
};

// Quantized rows: how they lie, and where in scratch memory. See ActRows.
struct RowsPlan {
    size_t parts, groups;
    size_t act_stride, sums_stride;
    Scratch<int8_t> act;
    Scratch<int32_t> chunk_sums;
    Scratch<float> group_sums, group_scales;
    Scratch<float> scales, zps;  // [row of activations]; zps: z_a - c
};
RowsPlan plan_rows(const Product &product, size_t rows, ScratchLayout &layout);

// What one thread quantizes a row in.
struct QuantizeScratch {
    Scratch<float> transformed;   // [k]
    Scratch<int32_t> group_sums;  // [act_parts][groups]
};
QuantizeScratch plan_quantize(const Product &product, ScratchLayout &layout);

// What one thread multiplies in.
struct TileScratch {
    Scratch<float> acc;        // [column blocks of a pass][rows][kBlock]
    Scratch<int32_t> carried;  // the same
    Scratch<uint8_t> codes;
    Scratch<float> scales, offsets;
    Scratch<int32_t> zp_terms;
};

// How a product is blocked where a problem has few rows, or many. Rows are those of activations, of each of which the
// kernel may see two: of int8.
struct Blocking {
    const WeightForm *form;
    size_t mr, mc;        // most rows of a micro-tile and of a row block
    size_t pass_outputs;  // output blocks of a pass
    KBlocks k_blocks;
    TileScratch tiles;
};

struct ProductPlan {
    Product product;
    size_t packed_max;  // rows
    Blocking packed, unpacked;

    const Blocking &of(size_t rows) const { return rows <= packed_max ? packed : unpacked; }
    // Rows of each row block of so many, but for the last: nearly equal, since each one reads all weights again.
    size_t row_block(size_t rows) const;
    // The largest row block of up to so many rows.
    size_t most_row_block(size_t rows) const { return lesser(rows, packed.mc > unpacked.mc ? packed.mc : unpacked.mc); }
};

// A plan for problems of up to so many rows, with the scratch memory of one thread that multiplies by it.
ProductPlan plan_product(const Product &product, const Kernel &kernel, size_t rows, ScratchLayout &own);

// Threads that a product of so many rows is worth, of those that it may use.
size_t useful_threads(const Product &product, size_t rows, size_t threads);

// Up to this many rows, every thread that needs them quantizes them for itself: cheaper than meeting first.
constexpr size_t kPrivateRows = 4;

// One weight and the rows that it multiplies: a row block, or less. A call is a list of problems.
struct Problem {
    const Blocking *blocking;
    size_t weight;
    size_t first, rows;  // of all that the list has
};

// Rows as micro-tiles of nearly equal height, the higher ones first: 7 rows by tiles of 6 are 4 and 3, not 6 and 1. A
// run of up to kEpilogueTiles of them, given to a kernel by itself, is cut at the same rows.
class RowTiles {
public:
    RowTiles(Range rows, size_t mr)
        : begin_(rows.begin),
          count_(ceil_div(rows.end - rows.begin, mr)),
          height_((rows.end - rows.begin) / count_),
          higher_((rows.end - rows.begin) % count_) {}
    size_t count() const { return count_; }
    size_t first_row(size_t tile) const { return begin_ + tile * height_ + lesser(tile, higher_); }

private:
    size_t begin_, count_;
    size_t height_, higher_;  // height_ + 1 for the first higher_ tiles
};

// Tiles whose rows go through the epilogue together: the lines of their outputs arrive while they are multiplied.
constexpr size_t kEpilogueTiles = 4;

// A part of one problem for one thread: these of its rows by these output blocks.
struct WorkItem {
    size_t problem;
    Range rows, outputs;
};

// What thread `thread` of `threads` multiplies of a list of problems by these output blocks: an even part of all work.
// Rows are split only where output blocks alone are too few.
class WorkItems {
public:
    WorkItems(const Problem *problems, size_t count, Range outputs, size_t thread, size_t threads);
    bool next(WorkItem *item);

private:
    // A unit is one output block by one part of the rows. A problem's units are numbered part by part; the first parts
    // may have one micro-tile more than the others.
    struct Units {
        size_t outputs, parts;
        size_t tiles, higher;        // of a part: one more in the first `higher` parts
        size_t low_cost, high_cost;  // of a unit of those parts, and of the first ones

        size_t count() const { return parts * outputs; }
        size_t cost() const { return (higher * high_cost + (parts - higher) * low_cost) * outputs; }
        size_t before(size_t cost) const;  // how many units begin before the cost of those before them is this
    };
    Units units_of(const Problem &problem) const;

    const Problem *problems_;
    size_t count_;
    Range outputs_;
    size_t most_parts_ = 1;
    size_t begin_ = 0, end_ = 0;  // the thread's costs, of all
    size_t problem_ = 0, unit_ = 0;
    size_t cost_before_ = 0;  // of the problems before
};

// The order in which a thread multiplies a run of output blocks: passes of a few; in a pass, for each K block, each
// column block of each output block in turn.
struct Step {
    size_t output;  // block
    size_t part;    // which of its column blocks
    size_t block;   // that column block
    size_t turn;    // of the column block within its pass
    KBlock k;
};

class Steps {
public:
    Steps(const Product &product, const Blocking &blocking, Range outputs);
    bool more() const { return now_.output < end_; }
    const Step &now() const { return now_; }
    const Step *next() const { return next_.output < end_ ? &next_ : nullptr; }
    void advance();

private:
    Step after(const Step &step);
    Step begin_of(size_t output, size_t turn, const KBlock &k);

    const Product &product_;
    const KBlocks &k_blocks_;
    size_t pass_outputs_, end_;
    size_t pass_;           // first output block of the pass that next_ is in
    BlocksOfOutput parts_;  // of next_
    Step now_, next_;
};

}  // namespace da8w4
