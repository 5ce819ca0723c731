#include "platform/clock.h"

#include <windows.h>

namespace da8w4 {

// Seconds and the rest of a second apart: ticks times a thousand million leave 64 bits after some days.
int64_t nanoseconds() {
    LARGE_INTEGER now, frequency;
    QueryPerformanceCounter(&now);
    QueryPerformanceFrequency(&frequency);
    const int64_t seconds = now.QuadPart / frequency.QuadPart, rest = now.QuadPart % frequency.QuadPart;
    return seconds * 1'000'000'000 + rest * 1'000'000'000 / frequency.QuadPart;
}

}  // namespace da8w4
