#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "system.h"

namespace check {

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

uint8_t *take_guarded_pages(size_t bytes) {
    const size_t page = page_bytes();
    void *memory = mmap(nullptr, bytes + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) abort();
    uint8_t *begin = static_cast<uint8_t *>(memory) + page;
    if (mprotect(begin, bytes, PROT_READ | PROT_WRITE) != 0) abort();
    return begin;
}

void write_now(const char *text) { (void)!write(STDOUT_FILENO, text, strlen(text)); }

}  // namespace check
