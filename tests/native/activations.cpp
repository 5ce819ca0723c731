#include "activations.h"

#include <algorithm>
#include <cmath>

#include "floats.h"

namespace check {
namespace {

std::vector<float> random_piece(Random &random, size_t k) {
    std::vector<float> row(k);
    const size_t kind = random.below(20);
    const float constant = random.uniform(-3, 3), step = std::ldexp(1.0f, random.between(-12, 12));
    for (float &value : row) {
        const float ordinary = random.uniform(-2, 3);
        switch (kind) {
            case 0: value = 0; break;
            case 1: value = constant; break;
            case 2: value = std::fabs(ordinary); break;
            case 3: value = -std::fabs(ordinary); break;
            case 4: value = ordinary * 1e-40f; break;
            case 5: value = ordinary * 1e38f; break;                                          // the range may overflow
            case 6: value = step * static_cast<float>(random.between(-255, 255)) / 2; break;  // ties of rounding
            case 7: value = ordinary * 0x1p-118f; break;                                      // about the least scale
            case 8: value = any_finite(random, DA8W4_F32); break;
            default: value = ordinary;
        }
    }
    if (kind == 6) row[0] = step * 127, row[k - 1] = -step * (k > 1 ? 128 : 0);
    const float odd[] = {float_of(0x7fc00000), float_of(0xffffffff), INFINITY, -INFINITY};
    if (kind == 9) row[random.below(k)] = odd[random.below(4)];
    if (kind == 10) row[random.below(k)] = constant * 1000;
    return row;
}

// A row of one kind, or of pieces of different kinds and sizes, so that groups differ.
std::vector<float> random_row(Random &random, size_t k) {
    if (!random.one_in(3)) return random_piece(random, k);
    const size_t piece = size_t{4} << random.below(7);
    std::vector<float> row;
    while (row.size() < k) {
        const float size = random.one_in(2) ? 1 : std::ldexp(1.0f, random.between(-20, 0));
        const std::vector<float> values = random_piece(random, std::min(piece, k - row.size()));
        for (float value : values) row.push_back(std::isfinite(value) && std::fabs(value) < 1000 ? value * size : 0);
    }
    if (random.one_in(20)) row[random.below(k)] = NAN;
    return row;
}

// m rows of `row_bytes` with the stride; what lies between them is 0xff.
std::vector<uint8_t> room_for(size_t m, size_t row_bytes, size_t stride) {
    return std::vector<uint8_t>(m ? (m - 1) * stride + row_bytes : 0, 0xff);
}

}  // namespace

std::vector<uint8_t> random_floats(Random &random, size_t m, size_t k, size_t stride, da8w4_type type) {
    const size_t size = size_of(type);
    std::vector<uint8_t> bytes = room_for(m, k * size, stride);
    for (size_t r = 0; r < m; r++) {
        const std::vector<float> row = random_row(random, k);
        for (size_t i = 0; i < k; i++) put(&bytes[r * stride + i * size], row[i], type);
    }
    return bytes;
}

std::vector<uint8_t> random_bytes(Random &random, size_t m, size_t k, size_t stride, bool is_signed) {
    std::vector<uint8_t> bytes = room_for(m, k, stride);
    for (size_t r = 0; r < m; r++) {
        const size_t kind = random.below(8);
        const uint8_t extreme = static_cast<uint8_t>((kind == 0 ? 0 : 255) ^ (is_signed ? 0x80 : 0));
        for (size_t i = 0; i < k; i++) bytes[r * stride + i] = kind < 2 ? extreme : static_cast<uint8_t>(random.bits());
    }
    return bytes;
}

std::vector<float> floats_at(const uint8_t *from, size_t count, da8w4_type type) {
    std::vector<float> values(count);
    for (size_t i = 0; i < count; i++) values[i] = get(from + i * size_of(type), type);
    return values;
}

}  // namespace check
