#include "platform/memory.h"

#include <malloc.h>

namespace da8w4 {

void *allocate_aligned(size_t alignment, size_t bytes) { return _aligned_malloc(bytes, alignment); }

void free_aligned(void *memory) { _aligned_free(memory); }

// Its large pages are for users with a privilege that nobody has unless an administrator gives it, and they are never
// paged out.
void ask_for_huge_pages(void *, size_t) {}

}  // namespace da8w4
