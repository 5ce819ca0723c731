// From packed weights to what micro-kernels read: panels of codes, float32 scales, terms for zero points.
//
// Column vectors. A register of L lanes loaded at byte 4*L*h of a packed line holds columns h*L.. in its low nibbles
// and 16 + h*L.. in its high ones. So a micro-kernel works on that pair of column vectors, for h = 0 .. 16/L - 1 in
// turn; a panel line, of 128 bytes, is read as the same pairs.
#pragma once

#include "kernels/kernel.h"
#include "kernels/simd/vec.h"

namespace da8w4 {
namespace {

constexpr size_t kPanelLineBytes = 128;  // a packed line with one code a byte
constexpr size_t kStepQuads = 8;         // quads of a micro-kernel's K step
constexpr size_t kLeastGroup = 4;        // the shortest group that is not all of k

// What a byte of a panel is.
enum class Encoding {
    plain,   // the code. A row starts a chunk with -zp * sum of a' for each column.
    biased,  // code - zp + 128, unsigned. A row starts a chunk with -128 * sum of a' for all columns.
    signed_  // code - zp, signed. Nothing is left to compensate.
};

// The bytes of the second and third hold zero points down to this one only. Below, the byte is made with the zero point
// -112, and the panel's zp_terms have what is missing. Such weights are rare, so that path may be slow.
constexpr int kLeastZp = -112;

// The factor of the chunk sums that go with each encoding.
constexpr int32_t sums_factor(Encoding encoding) { return encoding == Encoding::biased ? -128 : 1; }

template <class V>
constexpr Encoding panel_encoding = V::kBiasedPanels ? Encoding::biased : Encoding::plain;

template <class V>
inline void unpack_line(const uint8_t *line, typename V::Int *low, typename V::Int *high) {
    const typename V::Int both = V::load(line);
    *low = V::low_nibbles(both);
    *high = V::high_nibbles(both);
}

// Zero points of some groups of a column block.
struct ZeroPoints {
    const int8_t *each;  // [groups][kBlock]; null: all are the same
    int all;

    template <class V>
    typename V::Int load(size_t at) const {
        return each ? V::load_s8(each + at) : V::broadcast(all);
    }
};

inline size_t groups_touched(const PanelJob &job) {
    return job.k.whole_groups ? job.k.whole_groups
                              : ceil_div(job.k.end - job.k.group * job.grouping.group, job.grouping.group);
}

// Groups are filled up with zeros to multiples of kMultiple quads.
template <class V, Encoding kEncoding, size_t kMultiple>
void unpack_codes(const PanelJob &job, const ZeroPoints &zps) {
    constexpr size_t kPairs = kHalf / V::kLanes;
    constexpr int kBias = kEncoding == Encoding::biased ? 128 : 0;
    const size_t group = job.grouping.group;
    const uint8_t *from = job.block.codes_at(job.k.begin);
    uint8_t *to = job.buffer.codes;
    for (size_t g = 0, begin = job.k.begin, end; begin < job.k.end; g++, begin = end) {
        end = lesser((job.k.group + g + 1) * group, job.k.end);
        const size_t quads = quads_of(end - begin), all_quads = round_up(quads, kMultiple);
        for (size_t h = 0; h < kPairs; h++) {
            typename V::Int shift[2];
            for (size_t v = 0; v < 2; v++) {
                const typename V::Int zp = zps.load<V>(g * kBlock + h * V::kLanes + v * kHalf);
                shift[v] = V::replicate_byte(V::sub(V::broadcast(kBias), zp));
            }
            for (size_t quad = 0; quad < quads; quad++) {
                typename V::Int codes[2];
                unpack_line<V>(from + quad * kLineBytes + h * V::kLanes * 4, &codes[0], &codes[1]);
                for (size_t v = 0; v < 2; v++)
                    V::store(to + quad * kPanelLineBytes + (h * V::kLanes + v * kHalf) * 4,
                             kEncoding == Encoding::plain ? codes[v] : V::add_bytes(codes[v], shift[v]));
            }
        }
        memset(to + quads * kPanelLineBytes, 0, (all_quads - quads) * kPanelLineBytes);
        from += quads * kLineBytes;
        to += all_quads * kPanelLineBytes;
    }
}

// (int16(value), 0) in each lane: so a 16-bit multiplication by a chunk sum is their product.
template <class V>
void store_zp_terms(const ZeroPoints &zps, size_t count, int32_t *to) {
    for (size_t i = 0; i < count; i += V::kLanes) V::store(to + i, V::low_int16(V::sub(V::zero(), zps.load<V>(i))));
}

// Always inlined: GCC takes a function that only prefetches for one without effect, and drops calls of it.
DA8W4_INLINE void prefetch_bytes(const void *from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char *>(from) + i);
}

// Scales, or offsets, as float32, or where they are.
template <class V>
const void *floats_of(const void *from, da8w4_type type, size_t count, float *buffer, bool in_place) {
    if (in_place) return from;
    for (size_t i = 0; i < count; i += V::kLanes) V::store_f32(buffer + i, load_floats<V>(from, type, i));
    return buffer;
}

// What the next panel needs beside its codes is prefetched in two parts, with the work of this preparation between
// them: where groups are short, one burst would hold up the loads behind it.
DA8W4_INLINE void prefetch_next_floats(const PanelJob &job) {
    if (!job.next_block) return;
    const PackedBlock &next = *job.next_block;
    const size_t bytes = groups_touched(job) * kBlock * size_of(next.scale_type);
    prefetch_bytes(next.scales_at(job.next_k->group), bytes);
    if (next.offsets) prefetch_bytes(next.offsets_at(job.next_k->group), bytes);
}

// The second part, and the codes, which micro-tiles of at most mr rows prefetch.
inline Prefetch prefetch_next(const PanelJob &job, size_t mr, size_t step_quads) {
    if (!job.next_block) return {};
    const PackedBlock &next = *job.next_block;
    if (next.zps) prefetch_bytes(next.zps_at(job.next_k->group), groups_touched(job) * kBlock);
    return {
        .codes = next.codes_at(job.next_k->begin),
        .end = next.codes_at(job.next_k->end),
        .lines = ceil_div(step_quads * kLineBytes / 64, ceil_div(job.rows, mr)),
    };
}

// All of a panel but its codes and zp_terms.
template <class V>
Panel prepare_floats(const PanelJob &job, bool in_place) {
    const PackedBlock &block = job.block;
    const size_t count = groups_touched(job) * kBlock, group = job.k.group;
    prefetch_next_floats(job);
    in_place = in_place || block.scale_type == DA8W4_F32;
    Panel panel = {};
    panel.scale_type = in_place ? block.scale_type : DA8W4_F32;
    panel.scales = floats_of<V>(block.scales_at(group), block.scale_type, count, job.buffer.scales, in_place);
    if (block.offsets)
        panel.offsets = floats_of<V>(block.offsets_at(group), block.scale_type, count, job.buffer.offsets, in_place);
    return panel;
}

inline ZeroPoints zero_points(const PanelJob &job) {
    return {.each = job.block.zps_at(job.k.group), .all = job.block.zp};
}

// Micro-kernels read the packed codes. One micro-tile alone also converts scales where it uses them.
template <class V>
Panel prepare_packed(const PanelJob &job) {
    Panel panel = prepare_floats<V>(job, job.rows <= V::kRows);
    const ZeroPoints zps = zero_points(job);
    panel.codes = job.block.codes_at(job.k.begin);
    panel.zp_terms = job.buffer.zp_terms;
    panel.zp_stride = zps.each ? kBlock : 0;
    store_zp_terms<V>(zps, zps.each ? groups_touched(job) * kBlock : kBlock, job.buffer.zp_terms);
    panel.prefetch = prefetch_next(job, V::kRows, kStepQuads);
    return panel;
}

inline bool fit_a_byte(const ZeroPoints &zps, size_t count) {
    int8_t least = zps.each ? zps.each[0] : static_cast<int8_t>(zps.all);
    for (size_t i = 0; zps.each && i < count; i++) least = zps.each[i] < least ? zps.each[i] : least;
    return least >= kLeastZp;
}

// The panel of codes where some zero point is below kLeastZp.
template <class V, Encoding kEncoding, size_t kMultiple, size_t kKc>
void unpack_low_zps(const PanelJob &job, const ZeroPoints &zps, Panel *panel) {
    int8_t raised[kKc / kLeastGroup * kBlock];
    const size_t count = zps.each ? groups_touched(job) * kBlock : kBlock;
    for (size_t i = 0; i < count; i++) {
        const int zp = zps.each ? zps.each[i] : zps.all;
        raised[i] = static_cast<int8_t>(zp < kLeastZp ? kLeastZp : zp);
        job.buffer.zp_terms[i] = raised[i] - zp;
    }
    panel->zp_terms = job.buffer.zp_terms;
    panel->zp_stride = zps.each ? kBlock : 0;
    unpack_codes<V, kEncoding, kMultiple>(job, {.each = zps.each ? raised : nullptr, .all = raised[0]});
}

template <class V, size_t kKc>
Panel prepare_panel(const PanelJob &job) {
    constexpr Encoding kEncoding = panel_encoding<V>;
    Panel panel = prepare_floats<V>(job, false);
    panel.codes = job.buffer.codes;
    const ZeroPoints zps = zero_points(job);
    const size_t count = groups_touched(job) * kBlock;
    if (kEncoding == Encoding::plain) {
        panel.zp_terms = job.buffer.zp_terms;
        panel.zp_stride = zps.each ? kBlock : 0;
        store_zp_terms<V>(zps, zps.each ? count : kBlock, job.buffer.zp_terms);
    }
    if (kEncoding == Encoding::plain || fit_a_byte(zps, count))
        unpack_codes<V, kEncoding, 1>(job, zps);
    else
        unpack_low_zps<V, kEncoding, 1, kKc>(job, zps, &panel);
    panel.prefetch = prefetch_next(job, V::kRows, kStepQuads);
    return panel;
}

inline size_t no_panel(size_t, size_t) { return 0; }

// Bytes of the panel of a K block, whose groups are filled up to multiples of kMultiple quads.
template <size_t kMultiple>
size_t panel_bytes(size_t length, size_t group) {
    return ceil_div(length, group) * round_up(quads_of(lesser(length, group)), kMultiple) * kPanelLineBytes;
}

}  // namespace
}  // namespace da8w4
