// The micro-kernel of the kernel amx: up to 16 rows by 32 columns, in two tile registers of sums. Two such pairs
// alternate: one multiplies, while the other is stored and scaled as 512-bit floats.
//
// All is inlined, so that what describes a part of a group stays in registers: a CPU looks only so many instructions
// ahead. kRows is 1, or 2 of 16-bit activations.
#pragma once

#include "kernels/kernel.h"
#include "kernels/simd/unpack.h"
#include "kernels/x86/amx_tile.h"
#include "kernels/x86/vec512.h"

namespace da8w4 {
namespace {

constexpr size_t kTileRows = 16, kTileQuads = 16;
constexpr size_t kSumsOfTile = kTileRows * kBlock;  // of a micro-tile and a group

// Shorter K blocks than avx512vnni has: what decides is how much comes from L2. A panel and the activations of some
// micro-tiles stay in L1.
constexpr size_t kAmxKc = 256;

// Quads of a tile: those of a group, or of the part of one that a K block may have, in tiles of equal length.
size_t tile_quads(size_t group) {
    const size_t quads = quads_of(lesser(group, kAmxKc));
    return ceil_div(quads, ceil_div(quads, kTileQuads));
}

// The thread's state is the number of rows and of k that its configuration is for; 0 if it has none. Other code of the
// process may use tiles in between, so they are released at the end of each thread's part.
void configure(size_t rows, size_t quads, size_t *state) {
    const size_t wanted = quads * 256 + rows;
    if (wanted == *state) return;
    TileConfig config = {};
    config.palette = 1;
    for (int sums = 0; sums < 4; sums++) config.set(sums, rows, kTileRows * sizeof(int32_t));
    config.set(4, rows, quads * kQuad);
    for (int weights = 5; weights < 7; weights++) config.set(weights, quads, kTileRows * kQuad);
    load_config(config);
    *state = wanted;
}

void prefetch_step(Prefetch &prefetch) {
    if (prefetch.codes >= prefetch.end) return;
    for (size_t i = 0; i < prefetch.lines; i++, prefetch.codes += 64) __builtin_prefetch(prefetch.codes, 0, 2);
}

// The rows of a call as micro-tiles. They have equal heights, for another one takes another configuration: the last one
// may begin in the one before, and leaves those rows alone.
template <size_t kRows>
struct Heights {
    size_t rows, height;

    explicit DA8W4_INLINE Heights(size_t of_call)
        : rows(of_call), height(round_up(ceil_div(rows, ceil_div(rows, kTileRows)), kRows)) {}
    DA8W4_INLINE size_t rows_at(size_t row) const { return lesser(height, rows - row); }
    DA8W4_INLINE size_t skip_at(size_t row) const { return height - rows_at(row); }
};

// Products of up to 64 k, added to two tiles.
template <int kSums>
DA8W4_INLINE void multiply_add(const int8_t *act, size_t act_stride, const uint8_t *codes) {
    load_tile<4>(act, act_stride);
    load_tile<5>(codes, kPanelLineBytes);
    multiply_tiles<kSums, 4, 5>();
    load_tile<6>(codes + kHalf * kQuad, kPanelLineBytes);
    multiply_tiles<kSums + 1, 4, 6>();
}

template <int kSums>
DA8W4_INLINE void zero_sums() {
    zero_tile<kSums>();
    zero_tile<kSums + 1>();
}

template <int kSums>
DA8W4_INLINE void store_sums(int32_t *sums) {
    store_tile<kSums>(sums, kBlock * sizeof(int32_t));
    store_tile<kSums + 1>(sums + kHalf, kBlock * sizeof(int32_t));
}

// What the sums of groups are multiplied by, from some row and group on.
template <bool kOffsets, bool kGroupScales>
struct GroupValues {
    const float *scales, *offsets;           // [group][kBlock]
    const float *group_sums, *group_scales;  // [group][row]
    size_t sums_stride;

    DA8W4_INLINE GroupValues(const MicroTiles &tiles, const Panel &panel, size_t row)
        : scales(static_cast<const float *>(panel.scales)),
          offsets(static_cast<const float *>(panel.offsets)),
          group_sums(kOffsets ? tiles.act.group_sums + row : nullptr),
          group_scales(kGroupScales ? tiles.act.group_scales + row : nullptr),
          sums_stride(tiles.act.sums_stride) {}

    DA8W4_INLINE void skip(size_t groups) {
        scales += groups * kBlock;
        if (kOffsets) offsets += groups * kBlock, group_sums += groups * sums_stride;
        if (kGroupScales) group_scales += groups * sums_stride;
    }
};

// The end of kGroups groups, the sums of each of them behind those of the one before: the float steps of some rows,
// with one load and one store of their accumulators. kUsual rows go without a loop.
template <size_t kGroups, size_t kUsual, size_t kRows, bool kOffsets, bool kGroupScales>
DA8W4_INLINE void scale_rows(const GroupValues<kOffsets, kGroupScales> &values, const int32_t *sums, float *acc,
                             size_t begin, size_t end) {
    Vec512::Float scale[kGroups][2], offset[kGroups][2];
    for (size_t g = 0; g < kGroups; g++)
        for (size_t v = 0; v < 2; v++) {
            scale[g][v] = Vec512::load_f32(values.scales + g * kBlock + v * kHalf);
            if (kOffsets) offset[g][v] = Vec512::load_f32(values.offsets + g * kBlock + v * kHalf);
        }
    const auto scale_row = [&](size_t row) {
        for (size_t v = 0; v < 2; v++) {
            const size_t at = row * kBlock + v * kHalf;
            Vec512::Float total = Vec512::load_f32(acc + at);
            for (size_t g = 0; g < kGroups; g++) {
                const int32_t *of_group = sums + g * kSumsOfTile + at;
                const size_t of_row = g * values.sums_stride + row;
                Vec512::Float sum = Vec512::to_float(Vec512::load(of_group)), factor = scale[g][v];
                if (kRows == 2)
                    sum = Vec512::fma(Vec512::broadcast_float(256), sum,
                                      Vec512::to_float(Vec512::load(of_group + kBlock)));
                if (kGroupScales) factor = Vec512::mul(factor, Vec512::broadcast_float(values.group_scales[of_row]));
                total = Vec512::fma(sum, factor, total);
                if (kOffsets)
                    total = Vec512::fma(Vec512::broadcast_float(values.group_sums[of_row]), offset[g][v], total);
            }
            Vec512::store_f32(acc + at, total);
        }
    };
    if (end - begin == kUsual) {
#pragma GCC unroll 16
        for (size_t row = 0; row < kUsual; row += kRows) scale_row(begin + row);
    } else {
        for (size_t row = begin; row < end; row += kRows) scale_row(row);
    }
}

// Any groups: the sums of each are scaled while the next one is multiplied.
template <bool kOffsets, bool kGroupScales, size_t kRows>
class AnyGroupsRun {
public:
    DA8W4_INLINE AnyGroupsRun(const MicroTiles &tiles, const Panel &panel, int32_t *sums)
        : tiles_(tiles),
          panel_(panel),
          prefetch_(panel.prefetch),
          quads_(tile_quads(tiles.grouping.group)),
          sums_(sums) {}

    DA8W4_INLINE Prefetch run() {
        const Heights<kRows> heights(tiles_.rows);
        configure(heights.height, quads_, tiles_.state);
        for (size_t row = 0; row < tiles_.rows; row += heights.height)
            run_tile({.row = row,
                      .rows = heights.rows_at(row),
                      .skip = heights.skip_at(row),
                      .group = 0,
                      .begins = false,
                      .ends = false});
        if (odd_)
            finish<0>();
        else
            finish<2>();
        return prefetch_;
    }

private:
    // What a K block has of one group, in one micro-tile.
    struct Part {
        size_t row, rows;   // whose sums are wanted
        size_t skip;        // rows of the tiles before these
        size_t group;       // from the first one of the K block
        bool begins, ends;  // the group, in this K block
    };

    DA8W4_INLINE void run_tile(Part part) {
        const size_t group = tiles_.grouping.group, k_end = tiles_.k.end;
        const int8_t *act = tiles_.act.rows + (part.row - part.skip) * tiles_.act.stride;
        const uint8_t *codes = panel_.codes;
        size_t k = tiles_.k.begin, group_end = tiles_.k.group * group;
        part.begins = k == group_end;
        for (; k < k_end; part.group++, part.begins = true) {
            group_end = lesser(group_end + group, tiles_.grouping.k);
            const size_t end = lesser(group_end, k_end), quads = round_up(quads_of(end - k), quads_);
            part.ends = end == group_end;
            if (odd_)
                add<2, 0>(act, codes, quads);
            else
                add<0, 2>(act, codes, quads);
            odd_ = !odd_;
            last_ = part;
            act += end - k;
            codes += quads * kPanelLineBytes;
            k = end;
        }
    }

    // Sums to two tiles, and on with those of the part before.
    template <int kSums, int kLast>
    DA8W4_INLINE void add(const int8_t *act, const uint8_t *codes, size_t quads) {
        zero_sums<kSums>();
        const uint8_t *const end = codes + quads * kPanelLineBytes;
        for (; codes < end; codes += quads_ * kPanelLineBytes, act += quads_ * kQuad) {
            prefetch_step(prefetch_);
            multiply_add<kSums>(act, tiles_.act.stride, codes);
        }
        if (last_.rows) finish<kLast>();
    }

    template <int kSums>
    DA8W4_INLINE void finish() {
        store_sums<kSums>(sums_);
        if (!last_.begins || !last_.ends) carry();
        if (last_.ends) scale();
    }

    // From the K block before, and to the next one.
    DA8W4_INLINE void carry() {
        int32_t *sums = sums_ + last_.skip * kBlock, *carried = tiles_.carried + last_.row * kBlock;
        int32_t *to = last_.ends ? sums : carried;
        for (size_t i = 0; i < last_.rows * kBlock; i += Vec512::kLanes) {
            Vec512::Int sum = Vec512::load(sums + i);
            if (!last_.begins) sum = Vec512::add(sum, Vec512::load(carried + i));
            Vec512::store(to + i, sum);
        }
    }

    // The end of a group.
    DA8W4_INLINE void scale() {
        GroupValues<kOffsets, kGroupScales> values(tiles_, panel_, last_.row);
        values.skip(last_.group);
        scale_rows<1, kTileRows, kRows>(values, sums_ + last_.skip * kBlock, tiles_.acc + last_.row * kBlock, 0,
                                        last_.rows);
    }

    const MicroTiles &tiles_;
    const Panel &panel_;
    Prefetch prefetch_;
    const size_t quads_;  // of a tile
    int32_t *const sums_;
    Part last_ = {};  // whose sums are still in tiles; no rows: none
    bool odd_ = false;
};

// An even number of whole groups, of one tile each. There, stores are what the loop waits for, so two groups are scaled
// together, half of the rows during each of two products: those that follow the one during which the second's sums are
// stored, so that these have reached the cache.
inline bool go_in_pairs(const MicroTiles &tiles) {
    return tiles.k.whole_groups && tiles.k.whole_groups % 2 == 0 && tiles.grouping.group <= kTileQuads * kQuad;
}

template <bool kOffsets, size_t kRows>
class PairsRun {
public:
    static constexpr size_t kSums = 4 * kSumsOfTile;

    DA8W4_INLINE PairsRun(const MicroTiles &tiles, const Panel &panel, int32_t *sums)
        : tiles_(tiles),
          panel_(panel),
          prefetch_(panel.prefetch),
          heights_(tiles.rows),
          half_(round_up(ceil_div(heights_.height, 2), kRows)),
          act_stride_(tiles.act.stride),
          quads_(tile_quads(tiles.grouping.group)),
          last_(nothing(sums)),
          before_(nothing(sums + 2 * kSumsOfTile)) {}

    DA8W4_INLINE Prefetch run() {
        configure(heights_.height, quads_, tiles_.state);
        for (size_t row = 0; row < tiles_.rows; row += heights_.height) run_tile(row);
        store_sums<2>(last_.sums + kSumsOfTile);
        scale_second_half(before_);
        scale_first_half(last_);
        scale_second_half(last_);
        return prefetch_;
    }

private:
    // Two groups of one micro-tile that are to be scaled.
    struct Pair {
        GroupValues<kOffsets, false> values;
        float *acc;
        int32_t *sums;
        size_t rows, skip;
    };

    DA8W4_INLINE Pair nothing(int32_t *sums) const {
        return {.values = {tiles_, panel_, 0}, .acc = nullptr, .sums = sums, .rows = 0, .skip = 0};
    }

    DA8W4_INLINE void run_tile(size_t row) {
        Pair pair = {
            .values = {tiles_, panel_, row},
            .acc = tiles_.acc + row * kBlock,
            .sums = nullptr,
            .rows = heights_.rows_at(row),
            .skip = heights_.skip_at(row),
        };
        const size_t group = tiles_.grouping.group, code_bytes = quads_ * kPanelLineBytes;
        const int8_t *act = tiles_.act.rows + (row - pair.skip) * act_stride_;
        const uint8_t *codes = panel_.codes;
        for (size_t g = 0; g < tiles_.k.whole_groups; g += 2) {
            multiply<0>(act, codes);
            if (last_.rows) store_sums<2>(last_.sums + kSumsOfTile);
            scale_second_half(before_);
            pair.sums = before_.sums;
            multiply<2>(act + group, codes + code_bytes);
            store_sums<0>(pair.sums);
            scale_first_half(last_);
            before_ = last_;
            last_ = pair;
            pair.values.skip(2);
            act += 2 * group;
            codes += 2 * code_bytes;
        }
    }

    template <int kSums>
    DA8W4_INLINE void multiply(const int8_t *act, const uint8_t *codes) {
        zero_sums<kSums>();
        prefetch_step(prefetch_);
        multiply_add<kSums>(act, act_stride_, codes);
    }

    DA8W4_INLINE void scale_first_half(const Pair &pair) const {
        if (pair.rows) scale(pair, 0, lesser(half_, pair.rows));
    }
    DA8W4_INLINE void scale_second_half(const Pair &pair) const {
        if (pair.rows > half_) scale(pair, half_, pair.rows);
    }
    DA8W4_INLINE void scale(const Pair &pair, size_t begin, size_t end) const {
        scale_rows<2, kTileRows / 2, kRows>(pair.values, pair.sums + pair.skip * kBlock, pair.acc, begin, end);
    }

    const MicroTiles &tiles_;
    const Panel &panel_;
    Prefetch prefetch_;
    const Heights<kRows> heights_;
    const size_t half_, act_stride_;
    const size_t quads_;  // of a tile, and of a group
    Pair last_;           // The second group's sums are still in tiles.
    Pair before_;         // Half of the rows are scaled.
};

// A load waits for earlier stores whose addresses have the same lower 12 bits. So sums lie a row behind accumulators,
// modulo those of a micro-tile: the accumulator that a load of sums could be taken for was stored 15 or 31 rows before.
inline int32_t *sums_behind(const float *acc, int32_t *memory) {
    const auto behind = reinterpret_cast<uintptr_t>(acc + kBlock) - reinterpret_cast<uintptr_t>(memory);
    return memory + behind / sizeof(int32_t) % kSumsOfTile;
}

template <bool kOffsets, bool kGroupScales, size_t kRows>
void run_micro_tiles(const MicroTiles &tiles, Panel &panel) {
    using Pairs = PairsRun<kOffsets, kRows>;
    if (tiles.k.begin == 0) memset(tiles.acc, 0, tiles.rows * kBlock * sizeof(float));
    alignas(64) int32_t memory[kSumsOfTile + Pairs::kSums];
    int32_t *sums = sums_behind(tiles.acc, memory);
    if (!kGroupScales && go_in_pairs(tiles))
        panel.prefetch = Pairs(tiles, panel, sums).run();
    else
        panel.prefetch = AnyGroupsRun<kOffsets, kGroupScales, kRows>(tiles, panel, sums).run();
}

}  // namespace
}  // namespace da8w4
