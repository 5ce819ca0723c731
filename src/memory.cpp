// Memory for packed weights: aligned, and in huge pages where it is large.
#include <cstdlib>

#include "kernel.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace da8w4 {
namespace {
constexpr size_t kHugePage = size_t{2} << 20;
}
}  // namespace da8w4

void *da8w4_alloc(size_t bytes) {
    using namespace da8w4;
    const bool huge = bytes >= kHugePage;
    void *memory = nullptr;
    if (posix_memalign(&memory, huge ? kHugePage : 64, bytes ? bytes : 1) != 0) return nullptr;
#if defined(__linux__)
    // Only whole pages: the tail shares its page with other allocations. Refusal costs only speed.
    if (huge) (void)madvise(memory, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
    return memory;
}

void da8w4_free(void *memory) { std::free(memory); }
