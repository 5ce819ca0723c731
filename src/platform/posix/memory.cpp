#include "platform/memory.h"

#include <sys/mman.h>

#include <cstdlib>

namespace da8w4 {

void *allocate_aligned(size_t alignment, size_t bytes) {
    void *memory = nullptr;
    return posix_memalign(&memory, alignment, bytes) == 0 ? memory : nullptr;
}

void free_aligned(void *memory) { std::free(memory); }

void ask_for_huge_pages(void *memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
    (void)madvise(memory, bytes, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;  // macOS has none that a program can ask for
#endif
}

}  // namespace da8w4
