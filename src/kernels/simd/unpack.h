// From packed weights to what micro-kernels read: panels of codes, float32 scales, terms for zero points.
#pragma once

#include "kernels/kernel.h"
#include "kernels/simd/codes.h"
#include "kernels/simd/vec.h"

namespace da8w4 {
namespace {

constexpr size_t kStepQuads = 8;       // quads of a micro-kernel's K step
constexpr size_t kShortStepQuads = 4;  // where groups are no multiple of that; a multiple of every unit of codes
constexpr size_t kLeastGroup = 4;      // the shortest group that is not all of k

// The chunk sums that go with each encoding. Those of plain bytes are int16 in a lane whose upper half is zero, so that
// a 16-bit multiplication by a zero point, whatever the upper half of its lane is, is their product.
constexpr int32_t sum_for(Encoding encoding, int32_t sum) {
    return encoding == Encoding::biased ? -128 * sum : encoding == Encoding::plain ? sum & 0xffff : sum;
}

// Zero points of some groups of a column block.
struct ZeroPoints {
    const int8_t *each;  // [groups][kBlock]; null: all are the same
    int all;

    template <class V>
    typename V::Int load(size_t at) const {
        return each ? V::load_s8(each + at) : V::broadcast(all);
    }
    int8_t at(size_t i) const { return each ? each[i] : static_cast<int8_t>(all); }
};

inline ZeroPoints zero_points(const PanelJob &job) {
    return {.each = job.block.zps_at(job.k.group), .all = job.block.zp};
}

inline size_t groups_touched(const PanelJob &job) {
    return job.k.whole_groups ? job.k.whole_groups
                              : ceil_div(job.k.end - job.k.group * job.grouping.group, job.grouping.group);
}

// How many zero points there are to look at.
inline size_t zps_touched(const PanelJob &job) { return job.block.zps ? groups_touched(job) * kBlock : 1; }

// Zero points with which every value - zp fits int8: what bytes of the last two encodings hold. Elsewhere the byte is
// made with the nearest of these, and the panel's zp_terms have what is missing. Of codes below 8 bits such weights are
// rare, so that path may be slow.
struct ZpRange {
    int least, most;
};
constexpr ZpRange zps_of_bytes(const CodeLayout &layout) {
    const int least_value = -layout.bias, most_value = most_byte(layout) - layout.bias;
    return {.least = most_value - INT8_MAX, .most = least_value - INT8_MIN};
}

inline bool fit_bytes(const PanelJob &job) {
    const ZpRange range = zps_of_bytes(layout_of(job.block.kind));
    const ZeroPoints zps = zero_points(job);
    int least = zps.at(0), most = least;
    for (size_t i = 1, count = zps_touched(job); i < count; i++) {
        least = zps.each[i] < least ? zps.each[i] : least;
        most = zps.each[i] > most ? zps.each[i] : most;
    }
    return least >= range.least && most <= range.most;
}

// From quads of packed codes to lines of a panel. Groups are filled up with zeros: of so many quads to filled(quads).
template <class V, class Packed, Encoding kEncoding, class Filled>
void unpack_codes(const PanelJob &job, const ZeroPoints &zps, Filled filled) {
    using Int = typename V::Int;
    constexpr size_t kUnit = Packed::kUnitQuads;
    constexpr int kBias = Packed::kBias, kShift = kEncoding == Encoding::biased ? 128 - kBias : -kBias;
    const Packed codes(job.block.table);
    const size_t group = job.grouping.group;
    const uint8_t *from = job.block.codes_at(job.k.begin);
    uint8_t *to = job.buffer.codes;
    size_t first = job.k.begin / kQuad % kUnit;  // from the unit at `from` on
    for (size_t g = 0, begin = job.k.begin, end; begin < job.k.end; g++, begin = end) {
        end = lesser((job.k.group + g + 1) * group, job.k.end);
        const size_t quads = quads_of(end - begin), all_quads = filled(quads);
        for (size_t n = 0; n < kHalf; n += V::kLanes) {
            Int shift[2];
            for (size_t v = 0; v < 2; v++) {
                const Int zp = zps.load<V>(g * kBlock + n + v * kHalf);
                shift[v] = V::replicate_byte(V::sub(V::broadcast(kShift), zp));
            }
            uint8_t *line = to + n * kQuad;
            const auto unpack_quad = [&](const uint8_t *unit, size_t quad) {
                Int bytes[2];
                codes.unpack(unit + n * kQuad, quad, &bytes[0], &bytes[1]);
                for (size_t v = 0; v < 2; v++)
                    V::store(line + v * kHalf * kQuad,
                             kEncoding == Encoding::plain ? bytes[v] : V::add_bytes(bytes[v], shift[v]));
                line += kPanelLineBytes;
            };
            const uint8_t *unit = from;
            size_t quad = first, left = quads;
            for (; left && quad % kUnit; quad++, left--) unpack_quad(unit, quad);
            if (quad == kUnit) unit += Packed::kUnitBytes;
            for (; left >= kUnit; left -= kUnit, unit += Packed::kUnitBytes)
#pragma GCC unroll 4
                for (size_t i = 0; i < kUnit; i++) unpack_quad(unit, i);
            for (size_t i = quad % kUnit; left; i++, left--) unpack_quad(unit, i);
        }
        memset(to + quads * kPanelLineBytes, 0, (all_quads - quads) * kPanelLineBytes);
        from += (first + quads) / kUnit * Packed::kUnitBytes;
        first = (first + quads) % kUnit;
        to += all_quads * kPanelLineBytes;
    }
}

// Always inlined: GCC takes a function that only prefetches for one without effect, and drops calls of it.
DA8W4_INLINE void prefetch_bytes(const void *from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char *>(from) + i);
}

// What the next panel needs beside its codes is prefetched in two parts, with the work of this preparation between
// them: where groups are short, one burst would hold up the loads behind it.
DA8W4_INLINE void prefetch_next_floats(const PanelJob &job) {
    if (!job.next_block) return;
    const PackedBlock &next = *job.next_block;
    const size_t groups = groups_touched(job), group = job.next_k->group;
    const size_t rows = next.super ? next.row_of(group + groups - 1) + 1 - next.row_of(group) : groups;
    const size_t bytes = rows * kBlock * size_of(next.scale_type);
    prefetch_bytes(next.scales_at(group), bytes);
    if (next.offsets) prefetch_bytes(next.offsets_at(group), bytes);
}

// The codes of the next panel, which micro-tiles of at most mr rows prefetch.
inline Prefetch prefetch_codes(const PanelJob &job, size_t mr, size_t step_quads) {
    const PackedBlock &next = *job.next_block;
    const CodeLayout layout = layout_of(next.kind);
    return {
        .codes = next.codes_at(job.next_k->begin),
        .end = next.codes + layout.lines(quads_of(job.next_k->end)) * kLineBytes,
        .lines = ceil_div(layout.lines(step_quads) * kLineBytes / 64, ceil_div(job.rows, mr)),
        .to_scales = 0,
        .to_zps = 0,
        .near = false,
    };
}

// One or two rows are multiplied faster than memory is read. On some CPUs prefetches of the next panel then take the
// places in which loads wait for memory, and bring less than the CPU's own prefetcher does; those of what comes some k
// later help it. At the end of a column block, that is mostly the next one.
inline Prefetch prefetch_near(const PanelJob &job, const Panel &panel) {
    const CodeLayout layout = layout_of(panel.kind);
    const uint8_t *const from = panel.codes + layout.lines(job.near_k / kQuad) * kLineBytes;
    const size_t groups = ceil_div(job.near_k, job.grouping.group);
    return {
        .codes = from,
        .end = from + layout.lines(quads_of(job.k.length())) * kLineBytes,
        .lines = layout.lines(kStepQuads) * kLineBytes / 64,
        .to_scales = job.block.super ? 0 : static_cast<ptrdiff_t>(groups * kBlock * size_of(panel.scale_type)),
        .to_zps = static_cast<ptrdiff_t>(groups * panel.zp_stride),
        .near = true,
    };
}

// Whether what is multiplied next lies behind this panel, as a prefetch that is near takes it to; gates and ups
// alternate between two places.
inline bool next_follows(const PanelJob &job, const Panel &panel) {
    if (!job.next_block) return true;
    const CodeLayout layout = layout_of(panel.kind);
    const size_t bytes = layout.lines(panel.first_quad + quads_of(job.k.length())) * kLineBytes;
    const auto here = reinterpret_cast<uintptr_t>(panel.codes);
    const auto next = reinterpret_cast<uintptr_t>(job.next_block->codes_at(job.next_k->begin));
    return next > here && next - here <= bytes;
}

// The second part, and the codes.
DA8W4_INLINE Prefetch prefetch_next(const PanelJob &job, size_t mr, size_t step_quads) {
    if (!job.next_block) return {};
    const PackedBlock &next = *job.next_block;
    if (next.zps) prefetch_bytes(next.zps + job.next_k->group * kBlock, groups_touched(job) * kBlock);
    return prefetch_codes(job, mr, step_quads);
}

inline ptrdiff_t bytes_between(const void *from, const void *to) {
    return static_cast<ptrdiff_t>(reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(from));
}

// Scales, or offsets, of one level, as float32.
template <class V>
const void *floats_of(const void *from, da8w4_type type, size_t count, float *buffer) {
    if (type == DA8W4_F32) return from;
    for (size_t i = 0; i < count; i += V::kLanes) V::store_f32(buffer + i, load_floats<V>(from, type, i));
    return buffer;
}

// Numbers of two levels: those of super-groups, times the integers of groups from `group` on. The integers of the next
// panel are prefetched one by one: in a burst, those of short groups took 6 % of the time of one row.
struct TwoLevels {
    const void *supers;
    da8w4_type type;
    const void *subs;
    da8w4_type sub_type;
    const void *next_subs;  // of the next panel, to be prefetched; null for nothing
};

template <class V, da8w4_type kSubType>
const void *multiply_levels_of(const TwoLevels &from, size_t super, size_t group, size_t groups, float *buffer) {
    constexpr size_t kRegisters = kBlock / V::kLanes;
    const void *supers = from.supers;
    const uint8_t *subs = static_cast<const uint8_t *>(from.subs) + group * kBlock;
    const ptrdiff_t ahead = from.next_subs ? static_cast<const uint8_t *>(from.next_subs) - subs : 0;
    float *to = buffer;
    for (size_t left = groups, in_super = super - group % super; left; in_super = super) {
        typename V::Float factors[kRegisters];
        for (size_t i = 0; i < kRegisters; i++) factors[i] = load_floats<V>(supers, from.type, i * V::kLanes);
        const size_t count = lesser(left, in_super);
        const uint8_t *end = subs + count * kBlock;
        for (; subs < end; subs += kBlock, to += kBlock) {
            __builtin_prefetch(subs + ahead);
#pragma GCC unroll 4
            for (size_t i = 0; i < kRegisters; i++) {
                const uint8_t *at = subs + i * V::kLanes;
                const typename V::Int sub =
                    kSubType == DA8W4_U8 ? V::load_u8(at) : V::load_s8(reinterpret_cast<const int8_t *>(at));
                V::store_f32(to + i * V::kLanes, V::mul(factors[i], V::to_float(sub)));
            }
        }
        supers = element(supers, from.type, kBlock);
        left -= count;
    }
    return buffer;
}

template <class V>
const void *multiply_levels(const TwoLevels &from, size_t super, size_t group, size_t groups, float *buffer) {
    return from.sub_type == DA8W4_U8 ? multiply_levels_of<V, DA8W4_U8>(from, super, group, groups, buffer)
                                     : multiply_levels_of<V, DA8W4_S8>(from, super, group, groups, buffer);
}

// Scales and offsets of two levels, multiplied out, which are never read in place.
template <class V>
void multiply_floats(const PanelJob &job, Panel *panel) {
    const PackedBlock &block = job.block, *next = job.next_block;
    const size_t group = job.k.group, groups = groups_touched(job);
    const size_t next_at = next ? job.next_k->group * kBlock : 0;
    panel->scale_type = DA8W4_F32;
    panel->scales = multiply_levels<V>(
        {
            .supers = block.scales_at(group),
            .type = block.scale_type,
            .subs = block.sub_scales,
            .sub_type = block.sub_scale_type,
            .next_subs = next ? element(next->sub_scales, next->sub_scale_type, next_at) : nullptr,
        },
        block.super, group, groups, job.buffer.scales);
    if (!block.offsets) return;
    panel->offsets = multiply_levels<V>(
        {
            .supers = block.offsets_at(group),
            .type = block.scale_type,
            .subs = block.sub_offsets,
            .sub_type = block.sub_offset_type,
            .next_subs = next ? element(next->sub_offsets, next->sub_offset_type, next_at) : nullptr,
        },
        block.super, group, groups, job.buffer.offsets);
}

// All of a panel but its codes and zp_terms.
template <class V>
Panel prepare_floats(const PanelJob &job) {
    const PackedBlock &block = job.block;
    const size_t group = job.k.group, count = groups_touched(job) * kBlock;
    prefetch_next_floats(job);
    Panel panel = {};
    panel.kind = block.kind;
    panel.table = block.table;
    if (block.super) {
        multiply_floats<V>(job, &panel);
        return panel;
    }
    const void *scales = block.scales_at(group), *offsets = block.offsets_at(group);
    panel.scale_type = DA8W4_F32;
    panel.scales = floats_of<V>(scales, block.scale_type, count, job.buffer.scales);
    if (offsets) panel.offsets = floats_of<V>(offsets, block.scale_type, count, job.buffer.offsets);
    return panel;
}

// Zero points of plain bytes: what a chunk sum is multiplied by.
template <class V>
typename V::Int zp_term(typename V::Int zps, int bias) {
    return V::sub(V::broadcast(-bias), zps);
}

template <class V>
void prepare_zp_terms(const PanelJob &job, Panel *panel) {
    const ZeroPoints zps = zero_points(job);
    const int bias = layout_of(job.block.kind).bias;
    const size_t count = zps.each ? groups_touched(job) * kBlock : kBlock;
    int32_t *const terms = job.buffer.zp_terms;  // which the stores could otherwise have changed
    for (size_t i = 0; i < count; i += V::kLanes) V::store(terms + i, zp_term<V>(zps.load<V>(i), bias));
    panel->zp_terms = terms;
    panel->zp_stride = zps.each ? kBlock : 0;
}

// Micro-kernels read packed codes, and with them zero points and scales of one level, where they are: a panel of few
// rows is read once or twice, so that converting any of it first would cost more than it saves.
template <class V>
Panel prepare_packed(const PanelJob &job) {
    const PackedBlock &block = job.block, *next = job.next_block;
    const size_t group = job.k.group;
    Panel panel = {};
    panel.kind = block.kind;
    panel.table = block.table;
    panel.codes = block.codes_at(job.k.begin);
    panel.first_quad = layout_of(block.kind).in_unit(job.k.begin / kQuad);
    panel.zps = block.zps_at(group);
    panel.zp_stride = kBlock;
    if (!panel.zps) {
        int8_t *const zps = reinterpret_cast<int8_t *>(job.buffer.zp_terms);
        memset(zps, block.zp, kBlock);
        panel.zps = zps;
        panel.zp_stride = 0;
    }
    if (block.super) {
        prefetch_next_floats(job);
        multiply_floats<V>(job, &panel);
    } else {
        panel.scale_type = block.scale_type;
        panel.scales = block.scales_at(group);
        panel.offsets = block.offsets_at(group);
    }
    if (job.rows <= V::kNearRows && job.near_k && next_follows(job, panel)) {
        panel.prefetch = prefetch_near(job, panel);
    } else if (next) {
        panel.prefetch = prefetch_codes(job, V::kRows, kStepQuads);
        const size_t next_group = job.next_k->group;
        if (!block.super) panel.prefetch.to_scales = bytes_between(panel.scales, next->scales_at(next_group));
        if (block.zps) panel.prefetch.to_zps = bytes_between(panel.zps, next->zps_at(next_group));
    }
    return panel;
}

// Where zero points do not fit bytes: the nearest that do, to `held`, and what they miss, to the panel.
inline ZeroPoints hold_zps(const PanelJob &job, int8_t *held, Panel *panel) {
    const ZpRange range = zps_of_bytes(layout_of(job.block.kind));
    const ZeroPoints zps = zero_points(job);
    for (size_t i = 0, count = zps.each ? zps_touched(job) : kBlock; i < count; i++) {
        const int zp = zps.at(i), nearest = zp < range.least ? range.least : zp > range.most ? range.most : zp;
        held[i] = static_cast<int8_t>(nearest);
        job.buffer.zp_terms[i] = static_cast<uint16_t>(nearest - zp);
    }
    panel->zp_terms = job.buffer.zp_terms;
    panel->zp_stride = zps.each ? kBlock : 0;
    return {.each = zps.each ? held : nullptr, .all = held[0]};
}

// Packed codes of 8 bits are a panel as they are: a plain one, or a biased one, for that holds a zero point of 0 only.
template <class V, size_t kKc>
Panel prepare_panel(const PanelJob &job) {
    constexpr Encoding kEncoding = V::kPanelEncoding;
    Panel panel = prepare_floats<V>(job);
    panel.codes = job.buffer.codes;
    ZeroPoints zps = zero_points(job);
    int8_t held[kKc / kLeastGroup * kBlock];
    if (kEncoding == Encoding::plain)
        prepare_zp_terms<V>(job, &panel);
    else if (!fit_bytes(job))
        zps = hold_zps(job, held, &panel);
    with_kind(job.block.kind, [&](auto kind) {
        if constexpr (kind.kKind == DA8W4_INT8 && kEncoding != Encoding::signed_)
            panel.codes = job.block.codes_at(job.k.begin);
        else
            unpack_codes<V, PackedCodes<V, kind.kKind>, kEncoding>(job, zps, [](size_t quads) { return quads; });
    });
    panel.prefetch = prefetch_next(job, V::kRows, kStepQuads);
    return panel;
}

inline size_t no_panel(size_t, size_t) { return 0; }

// Bytes of the panel of a K block.
inline size_t panel_bytes(size_t length, size_t group) {
    return ceil_div(length, group) * quads_of(lesser(length, group)) * kPanelLineBytes;
}

}  // namespace
}  // namespace da8w4
