#include "runtime/cpu_count.h"

#include <atomic>

#include "platform/cpus.h"
#include "platform/threads.h"

namespace da8w4 {
namespace {

std::atomic<size_t> known_cpus{0};

// A child may have been given other CPUs than its parent.
__attribute__((constructor)) void watch_forks() {
    on_fork(nullptr, nullptr, [] { known_cpus.store(0, std::memory_order_relaxed); });
}

}  // namespace

size_t allowed_cpus() {
    size_t cpus = known_cpus.load(std::memory_order_relaxed);
    if (!cpus) known_cpus.store(cpus = usable_cpus(), std::memory_order_relaxed);
    return cpus;
}

}  // namespace da8w4
