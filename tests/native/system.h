// What the checks need of the operating system.
#pragma once

#include <cstddef>
#include <cstdint>

namespace check {

size_t page_bytes();

// Whole pages between two that cannot be touched. They are never given back.
uint8_t *take_guarded_pages(size_t bytes);

// Writes to standard output as a handler of signals may.
void write_now(const char *text);

}  // namespace check
