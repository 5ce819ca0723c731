// How a call is blocked, what scratch memory it takes, and which thread multiplies what: numbers only, so that
// tests/native/plan_test.cpp can try millions of shapes. docs/architecture.md has the loop nest.
#pragma once

#include "kernels/kernel.h"
#include "runtime/parallel.h"

namespace da8w4 {

// One weight and the rows that it multiplies. A call is a list of problems.
struct Problem {
    size_t m, n;
    Grouping grouping;
    bool has_offsets;
    bool transforms;  // activations are permuted or multiplied by factors before they are quantized
    da8w4_scheme scheme;

    // Rows of int8 for each row of activations.
    size_t act_parts() const { return scheme == DA8W4_ACT_INT16 ? 2 : 1; }
};

// Cuts k into K blocks of at most kc: whole groups where they fit, else whole chunks of one group. Without a division
// for each, since a K block is a few kilobytes of weights, whose time a division would notice.
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
    size_t length_;        // of every K block but the last of a group or of k
    size_t groups_;        // of a K block; 0 if it may end inside one
    size_t whole_groups_;  // of k; 0 if the last one is shorter
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

// Quantized rows of one row block: see ActRows.
struct RowScratch {
    Scratch<int8_t> act;
    Scratch<int32_t> chunk_sums;
    Scratch<float> group_sums, group_scales;
    Scratch<float> scales, zps;  // [row of activations]; zps: z_a - c
};

// What one thread quantizes a row in.
struct QuantizeScratch {
    Scratch<float> transformed;   // [k]
    Scratch<int32_t> group_sums;  // [act_parts][groups]
};

// What one thread multiplies in.
struct TileScratch {
    Scratch<float> acc;        // [pass_blocks][rows][kBlock]
    Scratch<int32_t> carried;  // the same
    Scratch<uint8_t> codes;
    Scratch<float> scales, offsets;
    Scratch<int32_t> zp_terms;
};

// The blocking of one problem. Its rows are those of activations, of each of which the kernel may see two: of int8.
struct ProblemPlan {
    Problem problem;
    const WeightForm *form;
    size_t mr, mc;      // rows of a micro-tile and of a row block; the last may have fewer
    bool private_rows;  // each thread quantizes the rows for itself: cheaper than meeting first
    KBlocks k_blocks;
    size_t act_stride, sums_stride;  // see ActRows
    RowScratch rows;                 // in the thread's memory if private, else in the shared one
    QuantizeScratch quantize;        // this and what follows: in the thread's memory
    TileScratch tiles;
    size_t shared_bytes, thread_bytes;

    size_t column_blocks() const { return blocks_of(problem.n); }
};

ProblemPlan plan_problem(const Problem &problem, const Kernel &kernel);

// Threads that a call is worth, of those that it may use.
size_t useful_threads(const Problem &problem, size_t threads);

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

// A part of one problem for one thread: these rows of the row block by these column blocks.
struct WorkItem {
    size_t problem;
    Range rows, blocks;
};

// What thread `thread` of `threads` multiplies of a list of problems, `rows` of whose rows are given: an even part of
// all micro-tiles, weighted by k. Rows are split only where column blocks alone are too few.
class WorkItems {
public:
    WorkItems(const ProblemPlan *plans, const size_t *rows, size_t count, size_t thread, size_t threads);
    bool next(WorkItem *item);

private:
    // A unit is one column block by one part of the rows. A problem's units are numbered part by part; the first parts
    // may have one micro-tile more than the others.
    struct Units {
        size_t blocks, parts, quads;
        size_t tiles, higher;  // of a part: one more in the first `higher` parts

        size_t count() const { return parts * blocks; }
        size_t cost() const { return (parts * tiles + higher) * blocks * quads; }
        size_t before(size_t cost) const;  // how many units begin before the cost of those before them is this
    };
    Units units_of(size_t problem) const;

    const ProblemPlan *plans_;
    const size_t *rows_;
    size_t count_;
    size_t most_parts_ = 1;
    size_t begin_ = 0, end_ = 0;  // the thread's costs, of all
    size_t problem_ = 0, unit_ = 0;
    size_t cost_before_ = 0;  // of the problems before
};

// The order in which a thread multiplies a run of column blocks: passes of a few; in a pass, for each K block, each
// column block in turn.
struct Step {
    size_t block;
    size_t turn;  // of the block within its pass
    KBlock k;
};

class Steps {
public:
    Steps(const ProblemPlan &plan, Range blocks);
    bool more() const { return now_.block < blocks_.end; }
    const Step &now() const { return now_; }
    const Step *next() const { return next_.block < blocks_.end ? &next_ : nullptr; }
    void advance();

private:
    Step after(const Step &step) const;

    const KBlocks &k_blocks_;
    Range blocks_;
    size_t pass_blocks_;
    Step now_, next_;
};

}  // namespace da8w4
