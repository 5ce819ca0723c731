#include "runtime/barrier.h"

#include "runtime/spin.h"

namespace da8w4 {

// The last one to arrive begins the next round; its count is reset before, so that nobody arrives in an old one.
void Barrier::wait(size_t threads) {
    const size_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
        arrived_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    const auto begun = [&] { return round_.load(std::memory_order_acquire) != round; };
    while (!spin(begun)) {
    }
}

}  // namespace da8w4
