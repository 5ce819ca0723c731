#include "runtime/parallel.h"

#include <atomic>
#include <cstdlib>

#include "pyda8w4/pyda8w4.h"
#include "runtime/cpu.h"
#include "runtime/cpu_count.h"
#include "runtime/openmp.h"

namespace da8w4 {
namespace {

std::atomic<size_t> chosen_threads{0};

// 0 for none. Read at the first call. Two threads that read at the same time find the same, so that this needs no
// guard, which would stay taken in the child of a fork that fell into it.
size_t omp_num_threads() {
    constexpr size_t kMost = 65536, kUnread = kMost + 1;
    static std::atomic<size_t> known{kUnread};
    size_t threads = known.load(std::memory_order_relaxed);
    if (threads == kUnread) {
        const char *text = std::getenv("OMP_NUM_THREADS");  // "4", or "4,2" for nested levels
        const long value = text ? std::strtol(text, nullptr, 10) : 0;
        threads = value > 0 && static_cast<size_t>(value) <= kMost ? static_cast<size_t>(value) : 0;
        known.store(threads, std::memory_order_relaxed);
    }
    return threads;
}

struct Region {
    Work work;
    void *context;
};

void run_part(void *argument, size_t thread, size_t threads) {
    const Region &region = *static_cast<Region *>(argument);
    const DefaultRounding rounding;
    region.work(region.context, thread, threads);
}

}  // namespace

size_t num_threads() {
    if (const size_t chosen = chosen_threads.load(std::memory_order_relaxed)) return chosen;
    const size_t limit = omp_num_threads() ? omp_num_threads() : allowed_cpus();
    const OpenMp *runtime = loaded_openmp();
    const int most = runtime ? runtime->max_threads() : 0;  // set by torch.set_num_threads, too
    return most > 0 && static_cast<size_t>(most) < limit ? static_cast<size_t>(most) : limit;
}

void parallel(size_t wanted, Work work, void *context) {
    Region region{.work = work, .context = context};
    if (wanted <= 1) return run_part(&region, 0, 1);
    if (const OpenMp *runtime = usable_openmp()) {
        if (!run_on_openmp(*runtime, wanted, run_part, &region)) run_part(&region, 0, 1);
    } else {
        thread_pool().run(wanted, run_part, &region);
    }
}

}  // namespace da8w4

void da8w4_set_num_threads(size_t threads) { da8w4::chosen_threads.store(threads, std::memory_order_relaxed); }

size_t da8w4_get_num_threads() { return da8w4::num_threads(); }

const char *da8w4_thread_runtime() {
    const da8w4::OpenMp *runtime = da8w4::usable_openmp();
    return runtime ? runtime->path : "own";
}
