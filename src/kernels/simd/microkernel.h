// The micro-kernel: rows of activations by a pair of column vectors (see codes.h) over one K block, and the loop that
// cuts rows into micro-tiles.
//
// Exactness. D = sum a' * (value + bias) - (zp + bias) * sum a', or in a biased panel
// sum a' * (value - zp + 128) - 128 * sum a', or in a signed one sum a' * (value - zp): all sums modulo 2^32, and D in
// range (prepacking sees to that). Each chunk's sum starts from the term that is subtracted, and dot products are added
// in any order. The float chain is one fma per group, or two where there are offsets, groups ascending. Where each
// group has a scale of activations, that multiplies the weights' first; of 16-bit activations, another fma joins the
// sums of two rows first.
#pragma once

#include "kernels/kernel.h"
#include "kernels/simd/codes.h"
#include "kernels/simd/unpack.h"
#include "kernels/simd/vec.h"

namespace da8w4 {
namespace {

// Independent accumulators of each output: with few rows, one chain of dependent dot products would wait for its own
// latency. Integer sums may be split; the float chain may not.
template <class V>
constexpr size_t sets_for(size_t rows) {
    return rows == 1 ? V::kSetsOneRow : rows == 2 ? V::kSetsTwoRows : 1;
}

// What the float step of a group multiplies by.
enum class Scaling {
    weight,   // the scale of the weight
    group,    // that times the row's scale for this group
    two_rows  // the scale of the weight: 256 times the sum of one row, and the sum of the next
};

// What one micro-tile reads and writes, from the first k of its K block.
struct TilePointers {
    const int8_t *act;
    size_t act_stride;
    const int32_t *chunk_sums;  // [chunk][row]
    const float *group_sums;    // [group][row]
    const float *group_scales;  // [group][row]
    size_t sums_stride;
    Scaling scaling;
    const uint8_t *codes;
    size_t first_quad;  // of the unit at `codes`
    const int8_t *table;
    da8w4_type scale_type;
    const void *scales, *offsets;  // [group][kBlock]; offsets may be null
    const int8_t *zps;             // of packed codes: [group][kBlock], or [kBlock]
    const int32_t *zp_terms;       // of others: the same, or null
    size_t zp_stride;
    const float *acc_from;  // [row][kBlock]
    float *acc;             // [row][kBlock]
    int32_t *carried;       // [row][kBlock]
    const uint8_t *prefetch;
    size_t prefetch_lines;        // at each K step
    ptrdiff_t to_scales, to_zps;  // see Prefetch
    bool prefetches_near;

    // The pair of column vectors that begins at this column, in so many K steps. Each pair of a tile prefetches its
    // part: memory that waits while another pair is multiplied cannot make up for it.
    template <size_t kLanes>
    TilePointers columns_from(size_t n, size_t steps) const {
        constexpr size_t kPairs = kHalf / kLanes;
        const size_t pair = n / kLanes, first = prefetch_lines * pair / kPairs;
        TilePointers at = *this;
        at.codes += n * 4;
        at.scales = element(scales, scale_type, n);
        if (offsets) at.offsets = element(offsets, scale_type, n);
        if (zps) at.zps += n;
        if (zp_terms) at.zp_terms += n;
        at.acc_from += n;
        at.acc += n;
        at.carried += n;
        at.prefetch += steps * first * 64;
        at.prefetch_lines = prefetch_lines * (pair + 1) / kPairs - first;
        return at;
    }
};

// The accumulators of one micro-tile. The general and the fast path are loops over the same verbs.
template <class V, size_t kRows, class Codes>
class MicroTile {
    using Int = typename V::Int;
    static constexpr size_t kSets = sets_for<V>(kRows);
    static constexpr size_t kUnitQuads = Codes::kUnitQuads;

    // Two products of a byte and an activation go into one sum of a Part. Where that does not hold them, nibbles are
    // multiplied one after the other.
    static constexpr size_t kNibbles = V::kMostPart < 256 * Codes::kMost ? 2 : 1;
    static constexpr size_t kMostQuads = V::kMostPart / (256 * (kNibbles == 2 ? 15 : Codes::kMost));

public:
    static constexpr bool kHoldsZps = !Codes::kPacked && V::kPanelEncoding != Encoding::plain;

    explicit DA8W4_INLINE MicroTile(const TilePointers &at) : at_(at), codes_(at.table) {
        for (size_t r = 0; r < kRows; r++)
            for (size_t v = 0; v < 2; v++) acc_[r][v] = V::load_f32(at.acc_from + r * kBlock + v * kHalf);
    }

    DA8W4_INLINE void begin_group() {
        for (size_t s = 0; s < kSets; s++)
            for (size_t r = 0; r < kRows; r++)
                for (size_t v = 0; v < 2; v++) sum_[s][r][v] = V::zero();
    }

    DA8W4_INLINE void begin_carried_group() {
        begin_group();
        for (size_t r = 0; r < kRows; r++)
            for (size_t v = 0; v < 2; v++) sum_[0][r][v] = V::load(at_.carried + r * kBlock + v * kHalf);
    }

    // What a chunk adds to integer sums beside its dot products.
    DA8W4_INLINE void begin_chunk() {
        for (size_t r = 0; r < kRows; r++) {
            const int32_t chunk_sum = at_.chunk_sums[r];
            for (size_t v = 0; v < 2; v++) {
                Int start = kHoldsZps && V::kPanelEncoding == Encoding::biased ? V::broadcast(chunk_sum) : V::zero();
                if constexpr (Codes::kPacked)
                    start = V::add_product(start, V::broadcast(chunk_sum),
                                           zp_term<V>(V::load_s8(at_.zps + v * kHalf), Codes::kBias));
                else if (!kHoldsZps)
                    start = V::add_product(start, V::broadcast(chunk_sum), V::load(at_.zp_terms + v * kHalf));
                else if (at_.zp_terms)
                    start = V::add_product(start, V::load(at_.zp_terms + v * kHalf),
                                           V::broadcast(chunk_sum / sum_for(V::kPanelEncoding, 1)));
                sum_[0][r][v] = V::add(sum_[0][r][v], start);
            }
        }
        at_.chunk_sums += at_.sums_stride;
    }

    // The dot products of one quad.
    DA8W4_INLINE void add_quad() {
        add_quads<1>(at_.first_quad);
        if (kUnitQuads > 1) at_.first_quad = (at_.first_quad + 1) % kUnitQuads;
        if (kUnitQuads == 1 || at_.first_quad == 0) at_.codes += Codes::kUnitBytes;
    }

    // Those of kQuads quads of whole units.
    template <size_t kQuads>
    DA8W4_INLINE void add_step() {
        static_assert(kQuads % kUnitQuads == 0);
        prefetch_step<kQuads>();
        add_quads<kQuads>(0);
        at_.codes += kQuads / kUnitQuads * Codes::kUnitBytes;
    }

    // The float steps at the end of a group: one, or with offsets two.
    DA8W4_INLINE void end_group() {
        join_sets();
        const da8w4_type type = Codes::kPacked ? at_.scale_type : DA8W4_F32;  // a panel's are float32
        for (size_t v = 0; v < 2; v++) {
            const typename V::Float scale = load_floats<V>(at_.scales, type, v * kHalf);
            if (__builtin_expect(at_.scaling == Scaling::weight, 1))
                for (size_t r = 0; r < kRows; r++) acc_[r][v] = V::fma(V::to_float(sum_[0][r][v]), scale, acc_[r][v]);
            else
                scale_otherwise(v, scale);
        }
        if (at_.scaling == Scaling::group) at_.group_scales += at_.sums_stride;
        if (Codes::kPacked) {
            __builtin_prefetch(static_cast<const char *>(at_.scales) + at_.to_scales, 0, 2);
            __builtin_prefetch(at_.zps + at_.to_zps, 0, 2);
            if (at_.offsets) __builtin_prefetch(static_cast<const char *>(at_.offsets) + at_.to_scales, 0, 2);
            at_.zps += at_.zp_stride;
        }
        at_.scales = element(at_.scales, type, kBlock);
        if (at_.zp_terms) at_.zp_terms += at_.zp_stride;
        if (!at_.offsets) return;
        for (size_t v = 0; v < 2; v++) {
            const typename V::Float offset = load_floats<V>(at_.offsets, type, v * kHalf);
            for (size_t r = 0; r < kRows; r++)
                if (kRows % 2 || r % 2 == 0 || at_.scaling != Scaling::two_rows)
                    acc_[r][v] = V::fma(V::broadcast_float(at_.group_sums[r]), offset, acc_[r][v]);
        }
        at_.offsets = element(at_.offsets, type, kBlock);
        at_.group_sums += at_.sums_stride;
    }

    DA8W4_INLINE void carry_group() {
        join_sets();
        for (size_t r = 0; r < kRows; r++)
            for (size_t v = 0; v < 2; v++) V::store(at_.carried + r * kBlock + v * kHalf, sum_[0][r][v]);
    }

    DA8W4_INLINE void store() const {
        for (size_t r = 0; r < kRows; r++)
            for (size_t v = 0; v < 2; v++) V::store_f32(at_.acc + r * kBlock + v * kHalf, acc_[r][v]);
    }

protected:
    // What comes later, at each K step. Into L2, for L1 is full. A tile that is alone prefetches as many lines as it
    // reads, without a loop: where they are in cache already, that would cost as much as multiplying them.
    template <size_t kQuads>
    DA8W4_INLINE void prefetch_step() {
        constexpr size_t kLines =
            (Codes::kPacked ? kQuads / kUnitQuads * Codes::kUnitBytes / 64 : kQuads) * V::kLanes / kHalf;
        if (at_.prefetch_lines == kLines) {
#pragma GCC unroll 16
            for (size_t i = 0; i < kLines; i++) __builtin_prefetch(at_.prefetch + i * 64, 0, 2);
            at_.prefetch += kLines * 64;
        } else {
            for (size_t i = 0; i < at_.prefetch_lines; i++, at_.prefetch += 64) __builtin_prefetch(at_.prefetch, 0, 2);
        }
    }

    TilePointers at_;
    Int sum_[kSets][kRows][2];

private:
    // The dot products of kQuads quads, the first of which is quad `first` of the unit at `codes`.
    template <size_t kQuads>
    DA8W4_INLINE void add_quads(size_t first) {
        constexpr size_t kRun = lesser(kQuads, kMostQuads);
#pragma GCC unroll 16
        for (size_t from = 0; from < kQuads; from += kRun)
#pragma GCC unroll 16
            for (size_t nibble = 0; nibble < kNibbles; nibble++) add_run<kRun>(first, from, nibble);
        at_.act += kQuads * kQuad;
    }

    // As many of them as a Part holds, from quad `from` on.
    template <size_t kQuads>
    DA8W4_INLINE void add_run(size_t first, size_t from, size_t nibble) {
        constexpr bool kByNumber = V::kActQuads > 1 && kQuads % V::kActQuads == 0;
        [[maybe_unused]] Int acts[kRows];  // of kActQuads quads
        typename V::Part part[kSets][kRows][2];
        for (size_t s = 0; s < kSets; s++)
            for (size_t r = 0; r < kRows; r++)
                for (size_t v = 0; v < 2; v++) part[s][r][v] = V::open(sum_[s][r][v]);
#pragma GCC unroll 16
        for (size_t i = 0; i < kQuads; i++) {
            Int low, high;
            const size_t quad = first + from + i;
            codes_.unpack(at_.codes + quad / kUnitQuads * Codes::kUnitBytes, quad % kUnitQuads, &low, &high);
            if (kNibbles == 2) {
                low = nibble ? V::high_nibbles(low) : V::low_nibbles(low);
                high = nibble ? V::high_nibbles(high) : V::low_nibbles(high);
            }
            if constexpr (kByNumber)
                if (i % V::kActQuads == 0)
                    for (size_t r = 0; r < kRows; r++)
                        acts[r] = V::load(at_.act + r * at_.act_stride + (from + i) * kQuad);
#pragma GCC unroll 16
            for (size_t r = 0; r < kRows; r++) {
                typename V::Part *to = part[i % kSets][r];
                if constexpr (kByNumber) {
                    to[0] = V::dot_quad(to[0], low, acts[r], i % V::kActQuads);
                    to[1] = V::dot_quad(to[1], high, acts[r], i % V::kActQuads);
                } else {
                    const Int a = V::broadcast_quad(at_.act + r * at_.act_stride + (from + i) * kQuad);
                    to[0] = V::dot(to[0], low, a);
                    to[1] = V::dot(to[1], high, a);
                }
            }
        }
        for (size_t s = 0; s < kSets; s++)
            for (size_t r = 0; r < kRows; r++)
                for (size_t v = 0; v < 2; v++) sum_[s][r][v] = V::flush(sum_[s][r][v], part[s][r][v], nibble ? 16 : 1);
    }

    DA8W4_INLINE void scale_otherwise(size_t v, typename V::Float scale) {
        if (at_.scaling == Scaling::group) {
            for (size_t r = 0; r < kRows; r++) {
                const typename V::Float product = V::mul(scale, V::broadcast_float(at_.group_scales[r]));
                acc_[r][v] = V::fma(V::to_float(sum_[0][r][v]), product, acc_[r][v]);
            }
        } else if (kRows % 2 == 0) {
            for (size_t r = 0; r + 1 < kRows; r += 2) {
                const typename V::Float upper = V::to_float(sum_[0][r][v]), lower = V::to_float(sum_[0][r + 1][v]);
                acc_[r][v] = V::fma(V::fma(V::broadcast_float(256), upper, lower), scale, acc_[r][v]);
            }
        }
    }

    DA8W4_INLINE void join_sets() {
        for (size_t s = 1; s < kSets; s++)
            for (size_t r = 0; r < kRows; r++)
                for (size_t v = 0; v < 2; v++) sum_[0][r][v] = V::add(sum_[0][r][v], sum_[s][r][v]);
    }

    Codes codes_;
    typename V::Float acc_[kRows][2];
};

// Any groups and chunks; the first and the last group may lie in the neighbouring K blocks, too.
template <class V, size_t kRows, class Codes>
__attribute__((noinline)) void general_path(const TilePointers &at, const Grouping &grouping, const KBlock &block) {
    MicroTile<V, kRows, Codes> tile(at);
    size_t k = block.begin, group_end = (block.group + 1) * grouping.group;
    if (k == block.group * grouping.group)
        tile.begin_group();
    else
        tile.begin_carried_group();
    for (;;) {
        const size_t end = lesser(lesser(k + kChunk, group_end), grouping.k);
        tile.begin_chunk();
        size_t quads = quads_of(end - k);
        // Only kinds that are used with long groups are worth the code of whole steps here.
        if constexpr (Codes::kUnitQuads == 1)
            for (; quads >= kStepQuads; quads -= kStepQuads) tile.template add_step<kStepQuads>();
        for (; quads; quads--) tile.add_quad();
        k = end;
        const bool group_ends = k == group_end || k == grouping.k;
        if (group_ends) tile.end_group();
        if (k == block.end) {
            if (!group_ends) tile.carry_group();
            break;
        }
        if (!group_ends) continue;
        tile.begin_group();
        group_end += grouping.group;
    }
    tile.store();
}

// Whole groups, each of one chunk and some K steps. Where groups are short, what they cost beside their dot products
// decides, so this path keeps that small.
inline bool has_fast_path(const Grouping &grouping, const KBlock &block) {
    return block.whole_groups && grouping.group % (kShortStepQuads * kQuad) == 0 && grouping.group <= kChunk;
}

// Why there is none for them.
inline const char *why_general(const Grouping &grouping) {
    if (grouping.group % (kShortStepQuads * kQuad)) return "the group is no multiple of 16 k";
    return grouping.group > kChunk ? "the group is longer than 256 k" : "the last group of k is shorter";
}

template <class Tile, size_t kQuads>
DA8W4_INLINE void fast_path(TilePointers at, size_t groups, size_t steps) {
    if (Tile::kHoldsZps) at.zp_terms = nullptr;  // which the compiler does not know
    Tile tile(at);
    for (; groups; groups--) {
        tile.begin_group();
        tile.begin_chunk();
        for (size_t step = steps; step; step--) tile.template add_step<kQuads>();
        tile.end_group();
    }
    tile.store();
}

// The fast path in C++. An instruction set may have its own, with the same function.
struct FastPath {
    template <class V, size_t kRows, class Codes, size_t kQuads>
    static void run(const TilePointers &at, size_t groups, size_t steps) {
        fast_path<MicroTile<V, kRows, Codes>, kQuads>(at, groups, steps);
    }
};

constexpr char kZpsBeyondBytes[] = "zero points leave value - zp no room in a byte";

template <class V, bool kPacked>
PanelPath path_of(const PanelJob &job) {
    if (!has_fast_path(job.grouping, job.k))
        return {.left_to = nullptr, .fast = false, .reason = why_general(job.grouping)};
    if (!kPacked && V::kPanelEncoding != Encoding::plain && !fit_bytes(job))
        return {.left_to = nullptr, .fast = false, .reason = kZpsBeyondBytes};
    return {.left_to = nullptr, .fast = true, .reason = nullptr};
}

// That of short steps. Not inlined, so that it takes no registers from the other one.
template <class V, class Fast, size_t kRows, class Codes>
__attribute__((noinline)) void short_path(const TilePointers &from, size_t groups, size_t steps) {
    TilePointers at = from;
    at.prefetch_lines = ceil_div(at.prefetch_lines * kShortStepQuads, kStepQuads);
    Fast::template run<V, kRows, Codes, kShortStepQuads>(at, groups, steps);
}

inline size_t steps_of(const KBlock &block) { return block.length() / (kStepQuads * kQuad); }

template <class V, class Fast, class Codes, size_t kRows>
DA8W4_INLINE void run_tile(const TilePointers &at, const MicroTiles &tiles) {
    const Grouping &grouping = tiles.grouping;
    const size_t steps = steps_of(tiles.k);
    // Only the general path knows of zero points that a panel which should hold them does not.
    const bool held = Codes::kPacked || V::kPanelEncoding == Encoding::plain || !at.zp_terms;
    const bool fast = has_fast_path(grouping, tiles.k) && held;
    for (size_t n = 0; n < kHalf; n += V::kLanes) {
        const TilePointers from = at.columns_from<V::kLanes>(n, steps);
        if (!fast)
            general_path<V, kRows, Codes>(from, grouping, tiles.k);
        else if (grouping.group % (kStepQuads * kQuad) == 0)
            Fast::template run<V, kRows, Codes, kStepQuads>(from, tiles.k.whole_groups,
                                                            grouping.group / (kStepQuads * kQuad));
        else
            short_path<V, Fast, kRows, Codes>(from, tiles.k.whole_groups, grouping.group / (kShortStepQuads * kQuad));
    }
}

// run_tile for 1 to kMost rows. Inlined all the way, so that the pointers stay in registers.
template <class V, class Fast, class Codes, size_t kMost>
DA8W4_INLINE void run_tile_of(size_t rows, const TilePointers &at, const MicroTiles &tiles) {
    if constexpr (kMost > 1)
        if (rows < kMost) return run_tile_of<V, Fast, Codes, kMost - 1>(rows, at, tiles);
    run_tile<V, Fast, Codes, kMost>(at, tiles);
}

// Rows as micro-tiles of nearly equal height, the higher ones first. Two rows of 16-bit activations stay together.
template <class V, class Fast, class Codes>
void run_tiles_of(const MicroTiles &tiles, Panel &panel) {
    alignas(64) static const float zeros[V::kRows * kBlock] = {};
    const ActRows &act = tiles.act;
    const size_t together = act.is_int16 ? 2 : 1, all = tiles.rows / together;
    const size_t most = act.is_int16 ? V::kRows / 2 : V::kRows;
    size_t count = 1, height = all, higher = 0;
    if (all > most) {  // else without divisions, of which one takes as long as the dot products of a group
        count = ceil_div(all, most);
        height = all / count;
        higher = all % count;
    }
    const size_t steps = steps_of(tiles.k);
    const bool first_k = tiles.k.begin == 0;
    for (size_t tile = 0, row = 0, rows; tile < count; tile++, row += rows) {
        rows = (height + (tile < higher)) * together;
        Prefetch &prefetch = panel.prefetch;
        float *acc = tiles.acc + row * kBlock;
        const TilePointers at = {
            .act = act.rows + row * act.stride,
            .act_stride = act.stride,
            .chunk_sums = act.chunk_sums + row,
            .group_sums = act.group_sums + row,
            .group_scales = act.group_scales ? act.group_scales + row : nullptr,
            .sums_stride = act.sums_stride,
            .scaling = act.is_int16       ? Scaling::two_rows
                       : act.group_scales ? Scaling::group
                                          : Scaling::weight,
            .codes = panel.codes,
            .first_quad = panel.first_quad,
            .table = panel.table,
            .scale_type = panel.scale_type,
            .scales = panel.scales,
            .offsets = panel.offsets,
            .zps = panel.zps,
            .zp_terms = panel.zp_terms,
            .zp_stride = panel.zp_stride,
            .acc_from = first_k ? zeros : acc,
            .acc = acc,
            .carried = tiles.carried + row * kBlock,
            .prefetch = prefetch.codes,
            .prefetch_lines = prefetch.codes < prefetch.end ? prefetch.lines : 0,
            .to_scales = prefetch.to_scales,
            .to_zps = prefetch.to_zps,
            .prefetches_near = prefetch.near,
        };
        run_tile_of<V, Fast, Codes, V::kRows>(rows, at, tiles);
        prefetch.codes += steps * prefetch.lines * 64;
    }
}

template <class V, class Fast, bool kPacked>
void run_tiles(const MicroTiles &tiles, Panel &panel) {
    with_kind(panel.kind, [&](auto kind) {
        if constexpr (kPacked)
            run_tiles_of<V, Fast, PackedCodes<V, kind.kKind>>(tiles, panel);
        else
            run_tiles_of<V, Fast, PanelCodesOf<V, kind.kKind>>(tiles, panel);
    });
}

}  // namespace
}  // namespace da8w4
