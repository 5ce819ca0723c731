#include <windows.h>

#include <cstdlib>
#include <cstring>

#include "system.h"

namespace check {

size_t page_bytes() {
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return info.dwPageSize;
}

uint8_t *take_guarded_pages(size_t bytes) {
    const size_t page = page_bytes();
    void *memory = VirtualAlloc(nullptr, bytes + 2 * page, MEM_RESERVE, PAGE_NOACCESS);
    if (!memory) abort();
    uint8_t *begin = static_cast<uint8_t *>(memory) + page;
    if (!VirtualAlloc(begin, bytes, MEM_COMMIT, PAGE_READWRITE)) abort();
    return begin;
}

void write_now(const char *text) {
    DWORD written;
    WriteFile(GetStdHandle(STD_OUTPUT_HANDLE), text, static_cast<DWORD>(strlen(text)), &written, nullptr);
}

}  // namespace check
