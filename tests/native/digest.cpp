// Prints a hash of what each kernel computes that can run here, or one of them: the same number for every kernel, CPU,
// system and compiler.
//
//     digest [KERNEL]
#include <cstdio>
#include <cstring>

#include "product.h"
#include "pyda8w4/pyda8w4.h"

namespace check {
namespace {

constexpr size_t kProducts = 400;

// FNV-1a.
void add(uint64_t *hash, const void *bytes, size_t count) {
    for (size_t i = 0; i < count; i++) *hash = (*hash ^ static_cast<const uint8_t *>(bytes)[i]) * 0x100000001b3;
}

void add_product(uint64_t *hash, const char *kernel, const Random &random, const Shape &shape) {
    const Weight weight = random_weight(random, shape);
    Random draws = random.child("operands");
    const size_t m = 1 + draws.below(40);
    const bool linear = draws.one_in(2), gated = draws.one_in(4);
    const Operands operands = random_operands(draws, weight.matrix, m, linear);
    const Product product(operands, weight);
    const da8w4_gating gating = {static_cast<da8w4_activation>(draws.below(4)), 0, 1.702f, 7};
    da8w4_call call = product.call();
    if (linear && gated && shape.n % 2 == 0) call.gating = &gating;
    call.kernel = kernel;
    call.threads = 1 + draws.below(3);
    call.workspace_bytes = da8w4_workspace_bytes(&call);
    const Guarded workspace(call.workspace_bytes, true), out(operands.out_bytes, true);
    call.workspace = workspace.as();
    call.out = out.as();
    const da8w4_status status = product.status(call);
    add(hash, &status, sizeof status);
    add(hash, out.as(), out.bytes());
}

uint64_t digest(const char *kernel) {
    uint64_t hash = 0xcbf29ce484222325;
    for (size_t i = 0; i < kProducts; i++) {
        const Random random = Random(20250101).child(uint64_t{i});
        add_product(&hash, kernel, random, edge_shapes()[i * edge_shapes().size() / kProducts]);
    }
    return hash;
}

}  // namespace
}  // namespace check

int main(int count, char **arguments) {
    int found = 0;
    da8w4_set_num_threads(3);
    for (size_t i = 0; i < da8w4_kernel_count(); i++) {
        const char *const kernel = da8w4_kernel_name(i);
        if (da8w4_kernel_reason(i) || (count > 1 && strcmp(arguments[1], kernel) != 0)) continue;
        printf("%-12s %016llx\n", kernel, static_cast<unsigned long long>(check::digest(kernel)));
        found++;
    }
    return found ? 0 : 1;
}
