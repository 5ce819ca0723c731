// From the packed layout back to the weight matrix: its parts, or its values.
#include <cstring>

#include "packing/layout.h"
#include "packing/pack.h"
#include "packing/rotation.h"
#include "runtime/parallel.h"

namespace da8w4 {
namespace {

// One column of a packed weight.
class Column {
public:
    Column(const da8w4_packed &packed, size_t column)
        : block_(PackedBlocks(packed)[column / kBlock]), layout_(layout_of(packed.kind)), n_(column % kBlock) {}

    // Calls use(k, code, as it is stored) for each k.
    template <class Use>
    void for_each_code(size_t begin, size_t end, Use use) const {
        for (size_t k = begin; k < end; k += kQuad) {
            const uint32_t word = quad_codes(layout_, block_.codes, n_, k / kQuad);
            uint8_t codes[kQuad];
            std::memcpy(codes, &word, sizeof codes);
            for (size_t j = 0; j < lesser(kQuad, end - k); j++) use(k + j, codes[j]);
        }
    }

    int value(uint8_t code) const { return value_of(layout_, block_.table, code); }
    float scale(size_t group) const { return scale_of(block_, group, n_); }
    bool has_offsets() const { return block_.offsets != nullptr; }
    float offset(size_t group) const { return offset_of(block_, group, n_); }
    int zp(size_t group) const { return zp_of(block_, group, n_); }

private:
    const PackedBlock block_;
    const CodeLayout layout_;
    const size_t n_;
};

// `out` is in the order of act, in which the positions of a rotation may be anywhere.
void dequantize_column(const da8w4_packed &packed, const Column &column, float *out) {
    const auto at = [&](size_t k) -> float & { return out[packed.perm ? static_cast<size_t>(packed.perm[k]) : k]; };
    for (size_t begin = 0, g = 0; begin < packed.k; begin += packed.group, g++) {
        const float scale = column.scale(g), offset = column.has_offsets() ? column.offset(g) : 0.0f;
        const int zp = column.zp(g);
        column.for_each_code(begin, lesser(begin + packed.group, packed.k), [&](size_t k, uint8_t code) {
            float value = static_cast<float>(column.value(code) - zp) * scale;
            if (column.has_offsets()) value += offset;
            at(k) = value;
        });
    }
    if (packed.rotation && packed.perm)
        rotate(at, packed.k, packed.rotation);
    else if (packed.rotation)  // for which the compiler makes vector instructions
        rotate([out](size_t k) -> float & { return out[k]; }, packed.k, packed.rotation);
    if (packed.factors)
        for (size_t k = 0; k < packed.k; k++) at(k) *= packed.factors[k];
}

}  // namespace

void unpack(const da8w4_packed &packed, uint8_t *codes, float *scales, int8_t *zps, float *offsets) {
    const size_t groups = ceil_div(packed.k, packed.group);
    const uint8_t flip = packed.kind == DA8W4_INT8 ? 0x80 : 0;  // from value + 128 to int8
    parallel(threads_for_packing(packed.n * packed.k), [&](size_t thread, size_t threads) {
        const Range range = part_of(packed.n, thread, threads);
        for (size_t n = range.begin; n < range.end; n++) {
            const Column column(packed, n);
            column.for_each_code(0, packed.k, [&](size_t k, uint8_t code) { codes[n * packed.k + k] = code ^ flip; });
            for (size_t g = 0, at = n * groups; g < groups; g++, at++) {
                scales[at] = column.scale(g);
                zps[at] = static_cast<int8_t>(column.zp(g));
                if (column.has_offsets()) offsets[at] = column.offset(g);
            }
        }
    });
}

void dequantize(const da8w4_packed &packed, const size_t *columns, size_t count, float *out, size_t out_stride) {
    parallel(threads_for_packing(count * packed.k), [&](size_t thread, size_t threads) {
        const Range range = part_of(count, thread, threads);
        for (size_t i = range.begin; i < range.end; i++)
            dequantize_column(packed, Column(packed, columns ? columns[i] : i),
                              reinterpret_cast<float *>(reinterpret_cast<char *>(out) + i * out_stride));
    });
}

}  // namespace da8w4
