// da8w4_gemm and da8w4_linear with shapes at which something begins or ends.
#include <iterator>

#include "floats.h"
#include "harness.h"
#include "product.h"

namespace check {
namespace {

// A weight of every edge, with few rows and sometimes with about a row block of them.
void check_edges(const Trial &trial, bool linear) {
    const Weight weight = random_weight(trial.random, edge_shapes()[trial.index]);
    for (size_t m = 0; m <= 14; m++) {
        const Random random = trial.random.child(uint64_t{m});
        if (random.child("some").one_in(trial.quick ? 4 : 2)) check_product(random, weight, m, linear);
    }
    Random many = trial.random.child("many");
    if (many.one_in(6))
        check_product(many.child("product"), weight, (many.one_in(2) ? 239 : 255) + many.below(3), linear);
}

// Whole groups of whole steps, which most weights have: tiles of every height, packed and unpacked, of every kind.
const size_t whole_groups[] = {16, 32, 64, 128, 256};

void check_tiles(const Trial &trial) {
    const da8w4_kind kind = all_kinds[trial.index % std::size(all_kinds)];
    const size_t group = whole_groups[trial.index / std::size(all_kinds)];
    Random random = trial.random;
    const Weight weight = packed_weight(random, random_matrix(random, {40, 768, group}, kind));
    for (size_t m = 1; m <= 36; m++)
        if (random.one_in(trial.quick ? 9 : 3)) check_either_product(trial.random.child(uint64_t{m}), weight, m);
}

// A single tile reads scales and offsets as they are stored: each type of them, of one level and of two, at every
// height.
void check_scale_types(const Trial &trial) {
    const da8w4_type type = static_cast<da8w4_type>(trial.index % 3);
    const bool offsets = trial.index / 3 % 2, two_levels = trial.index >= 6;
    Random random = trial.random;
    Matrix w;
    do w = random_matrix(random, {33, 352, 32});
    while (narrowest(w) != type || w.offsets.empty() == offsets || (w.super != 0) != two_levels);
    const Weight weight = packed_weight(random, w);
    for (size_t m = 1; m <= 6; m++) check_either_product(trial.random.child(uint64_t{m}), weight, m);
}

// Few rows by long groups and short ones, whose K blocks begin inside the units of 5 and 6 bits: each scheme of each
// kind.
const Shape phase_shapes[] = {{33, 2100, 12}, {33, 1100, 20}, {33, 1300, 300}, {33, 1111, 516}, {33, 2060, 600}};

void check_phases(const Trial &trial) {
    const da8w4_kind kind = all_kinds[trial.index % std::size(all_kinds)];
    Random random = trial.random;
    const Weight weight =
        packed_weight(random, random_matrix(random, phase_shapes[trial.index / std::size(all_kinds)], kind));
    for (size_t scheme = 0; scheme < 4; scheme++)
        for (bool many : {false, true}) {
            Random draws = trial.random.child(many ? "many" : "few").child(uint64_t{scheme});
            if (trial.quick && !draws.one_in(2)) continue;
            Operands operands = random_operands(draws, weight.matrix, 1 + draws.below(6) + (many ? 24 : 0), true);
            operands.scheme = static_cast<da8w4_scheme>(scheme);
            check_product(draws, weight, operands);
        }
}

// More rows than two row blocks; more column blocks than threads.
void check_row_blocks(const Trial &trial) {
    const Weight weight = random_weight(trial.random, {trial.index % 2 ? size_t{330} : size_t{40}, 70, 32});
    for (size_t m : {1, 6, 60, 257, 513}) check_either_product(trial.random.child(uint64_t{m}), weight, m);
}

// Tiles of different heights, whose sums are carried over several K blocks: a row too many would count twice.
void check_k_blocks(const Trial &trial) {
    Random draws = trial.random.child("weight");
    const Weight weight = packed_weight(trial.random, random_matrix(draws, {33, 2100, 2100}, all_kinds[trial.index]));
    for (size_t m : {17, 33, 49, 69, 81})
        if (!trial.quick || m % 5 == trial.index % 5 || m == 33)
            check_either_product(trial.random.child(uint64_t{m}), weight, m);
}

}  // namespace

std::vector<Test> gemm_tests() {
    return {
        {"gemm", "da8w4_gemm over weights of every edge", edge_shapes().size(), 12, true,
         [](const Trial &trial) { check_edges(trial, false); }},
        {"linear", "da8w4_linear over weights of every edge, and as two calls", edge_shapes().size(), 12, true,
         [](const Trial &trial) { check_edges(trial, true); }},
        {"tiles", "1 to 36 rows with whole groups", std::size(all_kinds) * std::size(whole_groups), 1, true,
         check_tiles},
        {"scale_types", "1 to 6 rows with each type of scales", 12, 1, true, check_scale_types},
        {"phases", "K blocks that begin anywhere", std::size(all_kinds) * std::size(phase_shapes), 1, true,
         check_phases},
        {"row_blocks", "up to 513 rows", 2, 1, true, check_row_blocks},
        {"k_blocks", "sums that are carried over several K blocks", std::size(all_kinds), 1, true, check_k_blocks},
    };
}

}  // namespace check
