#include "runtime/openmp.h"

#include <dlfcn.h>
#include <limits.h>
#include <link.h>

#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>

namespace da8w4 {
namespace {

// ---- finding it ------------------------------------------------------------------------------

// Held while the loader's list of libraries is read. dl_iterate_phdr locks that list, and fork does not make the lock
// anew: in the child of a fork that fell into it, the next dlopen would wait for ever. So a fork waits until no thread
// of ours is in there. The dlopen below is not covered: a library's constructor may fork, and it holds the loader.
std::mutex reading_libraries;

struct Search {
    unsigned long long adds = 0;  // libraries loaded so far
    bool count_only = true;
    size_t skip = 0;  // of the libraries that are named like a runtime
    bool found = false;
    char path[PATH_MAX];
};

int visit_library(dl_phdr_info *info, size_t, void *data) {
    Search &search = *static_cast<Search *>(data);
    search.adds = info->dlpi_adds;
    if (search.count_only) return 1;
    const char *slash = std::strrchr(info->dlpi_name, '/');
    const char *name = slash ? slash + 1 : info->dlpi_name;
    for (const char *known : {"libgomp", "libiomp5", "libomp"}) {
        if (std::strncmp(name, known, std::strlen(known)) != 0) continue;
        if (search.skip-- > 0) break;
        search.found = std::strlen(info->dlpi_name) < sizeof search.path;
        if (search.found) std::memcpy(search.path, info->dlpi_name, std::strlen(info->dlpi_name) + 1);
        return 1;
    }
    return 0;
}

void read_libraries(Search &search) {
    const std::lock_guard<std::mutex> lock(reading_libraries);
    dl_iterate_phdr(visit_library, &search);
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
    OpenMp runtime;
    link_map *map = nullptr;
    if (resolve(library, "GOMP_parallel", &runtime.parallel) &&
        resolve(library, "omp_get_max_threads", &runtime.max_threads) &&
        resolve(library, "omp_get_num_threads", &runtime.num_threads) &&
        resolve(library, "omp_get_thread_num", &runtime.thread_num) &&
        resolve(library, "omp_in_parallel", &runtime.in_parallel) &&
        dlinfo(library, RTLD_DI_LINKMAP, static_cast<void *>(&map)) == 0) {
        runtime.path = map->l_name;
        if (OpenMp *found = new (std::nothrow) OpenMp(runtime)) return found;
    }
    dlclose(library);
    return nullptr;
}

std::atomic<bool> forked{false};

__attribute__((constructor)) void watch_forks() {
    pthread_atfork([] { reading_libraries.lock(); }, [] { reading_libraries.unlock(); },
                   [] {
                       reading_libraries.unlock();
                       forked.store(true, std::memory_order_relaxed);
                   });
}

}  // namespace

// A library may be loaded at any time, so each call compares the loader's count of libraries (tens of nanoseconds)
// and searches again when it has grown.
const OpenMp *loaded_openmp() {
    static std::atomic<const OpenMp *> runtime{nullptr};
    static std::atomic<unsigned long long> searched{0};
    const OpenMp *found = runtime.load(std::memory_order_acquire);
    if (found || forked.load(std::memory_order_relaxed)) return found;
    Search search;
    read_libraries(search);
    const unsigned long long adds = search.adds;
    if (adds == searched.load(std::memory_order_relaxed)) return nullptr;
    for (size_t skip = 0;; skip++) {
        search.count_only = search.found = false;
        search.skip = skip;
        read_libraries(search);
        if (!search.found) break;
        OpenMp *opened = open_runtime(search.path);
        if (!opened) continue;
        if (runtime.compare_exchange_strong(found, opened, std::memory_order_acq_rel)) return opened;  // kept for good
        delete opened;
        return found;
    }
    searched.store(adds, std::memory_order_relaxed);
    return nullptr;
}

const OpenMp *usable_openmp() { return forked.load(std::memory_order_relaxed) ? nullptr : loaded_openmp(); }

// ---- using it --------------------------------------------------------------------------------

namespace {

// Whether the system grants this many threads at once. Each starts the next and waits for its end.
bool grants_threads(size_t count) {
    if (count == 0) return true;
    struct Rest {
        size_t count;
        bool granted;
    } rest{.count = count - 1, .granted = false};
    auto main = [](void *argument) -> void * {
        Rest &rest = *static_cast<Rest *>(argument);
        rest.granted = grants_threads(rest.count);
        return nullptr;
    };
    pthread_t thread;
    if (!start_thread(&thread, main, &rest)) return false;
    pthread_join(thread, nullptr);
    return rest.granted;
}

// The largest team that was granted to this thread: each thread has a team of its own. Not a thread_local, whose
// memory the loader allocates at its first use; where there is none, it ends the process.
pthread_key_t granted_team;
bool has_granted_team = false;
__attribute__((constructor)) void make_key() { has_granted_team = pthread_key_create(&granted_team, nullptr) == 0; }

// GNU's and LLVM's runtimes end the process when the system refuses them a thread. So the system is asked first,
// once for a thread's team of each size.
bool grants_team(size_t team) {
    const void *const known = has_granted_team ? pthread_getspecific(granted_team) : nullptr;
    if (team <= reinterpret_cast<uintptr_t>(known)) return true;
    if (!grants_threads(team - 1)) return false;
    // The key's value is the number itself, as a pointer that nothing follows.
    // NOLINTNEXTLINE(performance-no-int-to-ptr)
    if (has_granted_team) pthread_setspecific(granted_team, reinterpret_cast<void *>(team));
    return true;
}

struct Region {
    const OpenMp &runtime;
    size_t wanted;
    Work work;
    void *context;
};

void region_main(void *argument) {
    const Region &region = *static_cast<Region *>(argument);
    const size_t thread = static_cast<size_t>(region.runtime.thread_num());
    const size_t team = static_cast<size_t>(region.runtime.num_threads());
    const size_t threads = team < region.wanted ? team : region.wanted;
    if (thread < threads) region.work(region.context, thread, threads);
}

}  // namespace

bool run_on_openmp(const OpenMp &runtime, size_t wanted, Work work, void *context) {
    // Always the application's whole team, of which some may have nothing to do: GNU's runtime ends the
    // threads that a smaller team leaves out and starts new ones for the next team of full size.
    const size_t usual = static_cast<size_t>(runtime.max_threads());
    const size_t team = usual > wanted ? usual : wanted;
    // Inside a region of the application the runtime decides, and usually starts no threads.
    if (!runtime.in_parallel() && !grants_team(team)) return false;
    Region region{.runtime = runtime, .wanted = wanted, .work = work, .context = context};
    runtime.parallel(region_main, &region, static_cast<unsigned>(team), 0);
    return true;
}

}  // namespace da8w4
