#include "platform/openmp.h"

#include <dlfcn.h>
#include <limits.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "platform/posix/libraries.h"
#include "platform/threads.h"

namespace da8w4 {
namespace {

// Held while the loader's list of libraries is read. dl_iterate_phdr locks that list, and fork does not make the lock
// anew: in the child of a fork that fell into it, the next dlopen would wait for ever. So a fork waits until no thread
// of ours is in there. The dlopen below is not covered: a library's constructor may fork, and it holds the loader.
Mutex reading_libraries;

struct Search {
    size_t skip = 0;  // of the libraries that are named like a runtime
    bool found = false;
    char path[PATH_MAX];

    void take(const char *name) {
        found = std::strlen(name) < sizeof path;
        if (found) std::memcpy(path, name, std::strlen(name) + 1);
    }
};

bool take_named_like_runtime(const char *path, void *context) {
    Search &search = *static_cast<Search *>(context);
    const char *slash = std::strrchr(path, '/');
    const char *name = slash ? slash + 1 : path;
    for (const char *known : {"libgomp", "libiomp5", "libomp"}) {
        if (std::strncmp(name, known, std::strlen(known)) != 0) continue;
        if (search.skip-- > 0) break;
        search.take(path);
        return true;
    }
    return false;
}

void find_named(Search &search) {
    const Lock lock(reading_libraries);
    visit_libraries(take_named_like_runtime, &search);
}

unsigned long long count_loaded() {
    const Lock lock(reading_libraries);
    return libraries_loaded();
}

// The runtime whose names are global, which every library that is loaded from then on gets: torch makes its own global,
// and a runtime that came with another package is not.
void find_global(Search &search) {
    const Lock lock(reading_libraries);
    void *function = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    Dl_info library;
    if (function && dladdr(function, &library) != 0) search.take(library.dli_fname);
}

template <class Function>
bool resolve(void *library, const char *name, Function *function) {
    *function = reinterpret_cast<Function>(dlsym(library, name));
    return *function != nullptr;
}

// Null if it is none: libomptarget and others only begin like one.
OpenMp *open_runtime(const char *path) {
    // RTLD_NOLOAD finds it without loading, and the reference keeps it from being unloaded.
    void *library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    if (!library) return nullptr;
    OpenMp runtime = {};
    Dl_info where;
    if (resolve(library, "GOMP_parallel", &runtime.parallel) &&
        resolve(library, "omp_get_max_threads", &runtime.max_threads) &&
        resolve(library, "omp_get_num_threads", &runtime.num_threads) &&
        resolve(library, "omp_get_thread_num", &runtime.thread_num) &&
        resolve(library, "omp_in_parallel", &runtime.in_parallel) &&
        dladdr(reinterpret_cast<void *>(runtime.parallel), &where) != 0) {
        runtime.path = where.dli_fname;
        if (void *found = std::malloc(sizeof runtime))
            return static_cast<OpenMp *>(std::memcpy(found, &runtime, sizeof runtime));
    }
    dlclose(library);
    return nullptr;
}

std::atomic<bool> forked{false};

__attribute__((constructor)) void watch_forks() {
    on_fork([] { reading_libraries.lock(); }, [] { reading_libraries.unlock(); },
            [] {
                reading_libraries.unlock();
                forked.store(true, std::memory_order_relaxed);
            });
}

}  // namespace

// A library may be loaded at any time, so each call compares the loader's count of libraries (tens of nanoseconds)
// and searches again when it has grown, until it finds a runtime whose names are global. Such a one takes the place of
// one whose names are not, because it is the one that the application's products use. Not the one with the lowest limit
// is taken: asking LLVM's runtime for its limit starts it, and beside another copy of it that ends the process.
const OpenMp *loaded_openmp() {
    static std::atomic<const OpenMp *> runtime{nullptr};
    static std::atomic<unsigned long long> searched{0};
    const OpenMp *known = runtime.load(std::memory_order_acquire);
    if ((known && known->global) || forked.load(std::memory_order_relaxed)) return known;
    const unsigned long long adds = count_loaded();
    if (adds == searched.load(std::memory_order_acquire)) return runtime.load(std::memory_order_acquire);
    Search search;
    find_global(search);
    OpenMp *found = search.found ? open_runtime(search.path) : nullptr;
    if (found) found->global = true;
    for (size_t skip = 0; !found && !known; skip++) {
        search.found = false;
        search.skip = skip;
        find_named(search);
        if (!search.found) break;
        found = open_runtime(search.path);
    }
    if (found && !runtime.compare_exchange_strong(known, found, std::memory_order_acq_rel)) {
        std::free(found);  // another thread was faster
        return known;
    }
    searched.store(adds, std::memory_order_release);
    return found ? found : known;  // kept for good
}

const OpenMp *usable_openmp() { return forked.load(std::memory_order_relaxed) ? nullptr : loaded_openmp(); }

}  // namespace da8w4
