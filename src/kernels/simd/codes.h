// How codes become bytes that are multiplied: one class for each kind of packed codes, and one for those of panels.
// Micro-kernels and the unpacking of panels read codes through them only.
//
// Column vectors. A register of L lanes loaded at byte 4*L*h of a packed line holds columns h*L.. in its low nibbles
// and 16 + h*L.. in its high ones. So a micro-kernel works on that pair of column vectors, for h = 0 .. 16/L - 1 in
// turn; a line of upper bits, a pair of lines of 8 bits, and a panel line are read as the same pairs.
#pragma once

#include "kernels/kernel.h"
#include "kernels/simd/vec.h"

namespace da8w4 {
namespace {

constexpr size_t kPanelLineBytes = 128;  // a quad with one code a byte

// What packed codes become where dot products take unsigned bytes: bytes 0..kMost, which are values + bias.
constexpr int most_byte(const CodeLayout &layout) { return layout.bias ? 255 : layout.most; }

template <class V, da8w4_kind kValue>
class PackedCodes {
    using Int = typename V::Int;
    static constexpr CodeLayout kLayout = layout_of(kValue);
    static constexpr bool kSigned = V::kPanelEncoding == Encoding::signed_;

public:
    static constexpr da8w4_kind kKind = kValue;
    static constexpr bool kPacked = true;
    static constexpr int kMost = most_byte(kLayout);
    static constexpr int kBias = kSigned ? 0 : kLayout.bias;
    static constexpr size_t kUnitQuads = kLayout.unit_quads();
    static constexpr size_t kUnitBytes = kLayout.unit_lines * kLineBytes;

    explicit DA8W4_INLINE PackedCodes(const int8_t *table) {
        if constexpr (kKind == DA8W4_TABLE4)
            table_ = V::load_table(table);
        else
            table_ = V::zero();
    }

    // The pair of column vectors of a quad, which the unit at `unit` counts from 0.
    DA8W4_INLINE void unpack(const uint8_t *unit, size_t quad, Int *low, Int *high) const {
        if constexpr (kKind == DA8W4_INT8) {
            const Int minus_bias = V::broadcast(kSigned ? static_cast<int32_t>(0x80808080) : 0);
            *low = V::load(unit);
            *high = V::load(unit + kLineBytes);
            if (kSigned) {
                *low = V::add_bytes(*low, minus_bias);
                *high = V::add_bytes(*high, minus_bias);
            }
            return;
        }
        const Int both = V::load(unit + quad * kLineBytes);
        *low = V::low_nibbles(both);
        *high = V::high_nibbles(both);
        if constexpr (kKind == DA8W4_TABLE4) {
            *low = V::look_up(table_, *low);
            *high = V::look_up(table_, *high);
        } else if constexpr (kLayout.high_bits() > 0) {
            const Int upper = V::load(unit + kUnitQuads * kLineBytes);
            *low = insert(*low, upper, quad * 2);
            *high = insert(*high, upper, quad * 2 + 1);
        }
    }

private:
    // Bit field `field` of each byte of `upper`, above the four bits of a nibble.
    static DA8W4_INLINE Int insert(Int nibbles, Int upper, size_t field) {
        const int at = static_cast<int>(field) * kLayout.high_bits();
        const Int bits = at <= 4 ? V::shift_left(upper, 4 - at) : V::shift_right(upper, at - 4);
        return V::insert_bits(nibbles, bits, V::broadcast((kMost & 0xf0) * 0x01010101));
    }

    Int table_;
};

template <class V, int kMostByte>
struct PanelCodes {
    static constexpr da8w4_kind kKind = DA8W4_INT8;  // lines lie as theirs do
    static constexpr bool kPacked = false;
    static constexpr int kMost = kMostByte;
    static constexpr size_t kUnitQuads = 1, kUnitBytes = kPanelLineBytes;

    explicit DA8W4_INLINE PanelCodes(const int8_t *) {}

    DA8W4_INLINE void unpack(const uint8_t *line, size_t, typename V::Int *low, typename V::Int *high) const {
        *low = V::load(line);
        *high = V::load(line + kHalf * kQuad);
    }
};

// A panel that holds zero points has bytes up to 255 whatever its kind.
template <class V, da8w4_kind kKind>
using PanelCodesOf = PanelCodes<V, V::kPanelEncoding == Encoding::plain ? PackedCodes<V, kKind>::kMost : 255>;

template <da8w4_kind kValue>
struct Kind {
    static constexpr da8w4_kind kKind = kValue;
};

// use(Kind<kind>()): from a kind at run time to code made for it.
template <class Use>
DA8W4_INLINE void with_kind(da8w4_kind kind, Use use) {
    switch (kind) {
        case DA8W4_INT4: return use(Kind<DA8W4_INT4>());
        case DA8W4_INT5: return use(Kind<DA8W4_INT5>());
        case DA8W4_INT6: return use(Kind<DA8W4_INT6>());
        case DA8W4_INT8: return use(Kind<DA8W4_INT8>());
        case DA8W4_TABLE4: return use(Kind<DA8W4_TABLE4>());
    }
}

}  // namespace
}  // namespace da8w4
