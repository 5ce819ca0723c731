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

// Whole groups of whole steps, which most weights have: tiles of every height, packed and unpacked.
void check_tiles(const Trial &trial) {
    const size_t groups[] = {32, 64, 128, 256};
    const Weight weight = random_weight(trial.random, {40, 768, groups[trial.index % std::size(groups)]});
    for (size_t m = 1; m <= 36; m++) {
        const Random random = trial.random.child(uint64_t{m});
        if (!trial.quick || random.child("quick").one_in(3)) check_either_product(random, weight, m);
    }
}

// A single tile reads scales and offsets as they are stored: each type of them, at every height.
void check_scale_types(const Trial &trial) {
    const da8w4_type type = static_cast<da8w4_type>(trial.index % 3);
    const bool offsets = trial.index >= 3;
    Random random = trial.random;
    Matrix w;
    do w = random_matrix(random, {33, 352, 32});
    while (narrowest(w) != type || w.offsets.empty() == offsets);
    const Weight weight = packed_weight(random, w);
    for (size_t m = 1; m <= 6; m++) check_either_product(trial.random.child(uint64_t{m}), weight, m);
}

// More rows than two row blocks; more column blocks than threads.
void check_row_blocks(const Trial &trial) {
    const Weight weight = random_weight(trial.random, {trial.index % 2 ? size_t{330} : size_t{40}, 70, 32});
    for (size_t m : {1, 6, 60, 257, 513}) check_either_product(trial.random.child(uint64_t{m}), weight, m);
}

// Tiles of different heights, whose sums are carried over several K blocks: a row too many would count twice.
void check_k_blocks(const Trial &trial) {
    const Weight weight = random_weight(trial.random, {33, 2100, 2100});
    for (size_t m : {17, 33, 49, 69, 81}) check_either_product(trial.random.child(uint64_t{m}), weight, m);
}

}  // namespace

std::vector<Test> gemm_tests() {
    return {
        {"gemm", "da8w4_gemm over weights of every edge", edge_shapes().size(), 12, true,
         [](const Trial &trial) { check_edges(trial, false); }},
        {"linear", "da8w4_linear over weights of every edge, and as two calls", edge_shapes().size(), 12, true,
         [](const Trial &trial) { check_edges(trial, true); }},
        {"tiles", "1 to 36 rows with whole groups", 8, 1, true, check_tiles},
        {"scale_types", "1 to 6 rows with each type of scales", 6, 1, true, check_scale_types},
        {"row_blocks", "up to 513 rows", 2, 1, true, check_row_blocks},
        {"k_blocks", "sums that are carried over several K blocks", 1, 1, true, check_k_blocks},
    };
}

}  // namespace check
