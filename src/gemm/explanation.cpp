#include "gemm/explanation.h"

namespace da8w4 {
namespace {

// Adds the codes of a panel to the path that it takes.
void add(da8w4_explanation *explanation, const da8w4_path &path) {
    size_t i = 0;
    while (i < explanation->path_count &&
           (explanation->paths[i].reason != path.reason || explanation->paths[i].fast != path.fast))
        i++;
    if (i < explanation->path_count) {
        explanation->paths[i].codes += path.codes;
    } else if (i < sizeof explanation->paths / sizeof *explanation->paths) {
        explanation->paths[i] = path;
        explanation->path_count++;
    }
}

}  // namespace

da8w4_explanation explain(const da8w4_packed &weight, const Kernel &kernel, const GroupedPlan &plan, size_t rows) {
    const Product &product = plan.product.product;
    const Blocking &blocking = plan.product.of(rows);
    const size_t row_block = plan.product.row_block(rows);
    const RowTiles tiles({.begin = 0, .end = row_block}, blocking.mr);
    da8w4_explanation explanation = {
        .kernel = kernel.name,
        .unpacked = &blocking == &plan.product.unpacked,
        .packed_max = plan.product.packed_max,
        .act_rows = rows * product.act_parts(),
        .tile_rows = tiles.first_row(1),
        .row_block = row_block,
        .k_block = blocking.k_blocks.longest(),
        .threads = 0,
        .path_count = 0,
        .paths = {},
    };
    const PackedBlocks blocks(weight);
    const PanelBuffer nothing = {};
    for (size_t n = 0; n < product.n; n += kBlock) {
        const PackedBlock block = blocks[n / kBlock];
        for (KBlock k = blocking.k_blocks.first();; k = blocking.k_blocks.after(k)) {
            const PanelPath path = blocking.form->path({
                .block = block,
                .k = k,
                .grouping = product.grouping,
                .buffer = nothing,
                .rows = row_block * product.act_parts(),
                .near_k = 0,
                .next_block = nullptr,
                .next_k = nullptr,
            });
            add(&explanation, {.kernel = path.left_to ? path.left_to : kernel.name,
                               .fast = path.fast,
                               .reason = path.reason,
                               .codes = lesser(kBlock, product.n - n) * k.length()});
            if (blocking.k_blocks.is_last(k)) break;
        }
    }
    return explanation;
}

}  // namespace da8w4
