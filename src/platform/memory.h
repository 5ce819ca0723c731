// Aligned memory, and huge pages.
#pragma once

#include <stddef.h>

namespace da8w4 {

// Null where there is none. The alignment is a power of two from 64 on.
void *allocate_aligned(size_t alignment, size_t bytes);
void free_aligned(void *memory);

// Asks for huge pages in a range of whole ones. Refusal costs only speed.
void ask_for_huge_pages(void *memory, size_t bytes);

}  // namespace da8w4
