#include "kernels/limits.h"

#include <atomic>

#include "platform/clock.h"
#include "runtime/barrier.h"
#include "runtime/parallel.h"

namespace da8w4 {
namespace {

// From when all threads are there until the last one has finished work(thread, threads).
template <class TimedWork>
uint64_t timed(size_t wanted, TimedWork work) {
    Barrier barrier;
    int64_t start = 0, end = 0;
    parallel(wanted, [&](size_t thread, size_t threads) {
        barrier.wait(threads);
        if (thread == 0) start = nanoseconds();
        work(thread, threads);
        barrier.wait(threads);
        if (thread == 0) end = nanoseconds();
    });
    return static_cast<uint64_t>(end - start);
}

}  // namespace

uint64_t time_read(const Kernel &kernel, const char *memory, size_t bytes, size_t passes, bool two_streams,
                   size_t threads) {
    return timed(threads, [&](size_t thread, size_t count) {
        const size_t rounds = bytes / count / 256, part = rounds * 256;
        const char *first = memory + thread * part, *second = first + (two_streams ? part / 2 : 128);
        for (size_t pass = 0; pass < passes; pass++) kernel.read(first, second, two_streams ? 128 : 256, rounds);
    });
}

uint64_t time_dots(const Kernel &kernel, size_t rounds, size_t threads, uint64_t *multiplications) {
    std::atomic<uint64_t> done{0};
    const uint64_t time = timed(threads, [&](size_t, size_t) { done += kernel.multiply(rounds); });
    *multiplications = done;
    return time;
}

}  // namespace da8w4
