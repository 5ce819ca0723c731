// Waiting without sleeping.
#pragma once

#include <cstdint>

#include "platform/clock.h"
#include "platform/threads.h"

namespace da8w4 {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    yield();
#endif
}

// Waits for a short while without sleeping: layers follow each other within microseconds, or some hundreds
// where attention lies between, and waking a sleeping thread takes longer than many layers do, on a virtual
// machine much longer. It yields now and then, because the thread that it waits for, or another, may be
// waiting for this very CPU.
template <class Done>
bool spin(Done done) {
    const int64_t end = nanoseconds() + 1'000'000;
    do {
        for (int i = 0; i < 32; i++) {
            if (done()) return true;
            pause();
        }
        yield();
    } while (nanoseconds() < end);
    return done();
}

}  // namespace da8w4
