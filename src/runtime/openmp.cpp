#include "runtime/openmp.h"

#include <dlfcn.h>
#include <limits.h>
#include <link.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "runtime/mutex.h"

namespace da8w4 {
namespace {

// ---- finding it ------------------------------------------------------------------------------

// Held while the loader's list of libraries is read. dl_iterate_phdr locks that list, and fork does not make the lock
// anew: in the child of a fork that fell into it, the next dlopen would wait for ever. So a fork waits until no thread
// of ours is in there. The dlopen below is not covered: a library's constructor may fork, and it holds the loader.
Mutex reading_libraries;

struct Search {
    unsigned long long adds = 0;  // libraries loaded so far
    bool count_only = true;
    size_t skip = 0;  // of the libraries that are named like a runtime
    bool found = false;
    char path[PATH_MAX];

    void take(const char *name) {
        found = std::strlen(name) < sizeof path;
        if (found) std::memcpy(path, name, std::strlen(name) + 1);
    }
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
        search.take(info->dlpi_name);
        return 1;
    }
    return 0;
}

void read_libraries(Search &search) {
    const Lock lock(reading_libraries);
    dl_iterate_phdr(visit_library, &search);
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
    pthread_atfork([] { reading_libraries.lock(); }, [] { reading_libraries.unlock(); },
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
    Search search;
    read_libraries(search);
    const unsigned long long adds = search.adds;
    if (adds == searched.load(std::memory_order_acquire)) return runtime.load(std::memory_order_acquire);
    find_global(search);
    OpenMp *found = search.found ? open_runtime(search.path) : nullptr;
    if (found) found->global = true;
    for (size_t skip = 0; !found && !known; skip++) {
        search.count_only = search.found = false;
        search.skip = skip;
        read_libraries(search);
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

// The largest team that was granted to this thread, of a runtime that is global and of one that is not: each thread has
// a team of its own. Not a thread_local, whose memory the loader allocates at its first use; where there is none, it
// ends the process.
pthread_key_t granted_teams[2];
bool has_granted_teams = false;
__attribute__((constructor)) void make_keys() {
    has_granted_teams =
        pthread_key_create(granted_teams, nullptr) == 0 && pthread_key_create(granted_teams + 1, nullptr) == 0;
}

// GNU's and LLVM's runtimes end the process when the system refuses them a thread. So the system is asked first,
// once for a thread's team of each size.
bool grants_team(const OpenMp &runtime, size_t team) {
    const pthread_key_t key = granted_teams[runtime.global];
    const void *const known = has_granted_teams ? pthread_getspecific(key) : nullptr;
    if (team <= reinterpret_cast<uintptr_t>(known)) return true;
    if (!grants_threads(team - 1)) return false;
    // The key's value is the number itself, as a pointer that nothing follows.
    // NOLINTNEXTLINE(performance-no-int-to-ptr)
    if (has_granted_teams) pthread_setspecific(key, reinterpret_cast<void *>(team));
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
    if (!runtime.in_parallel() && !grants_team(runtime, team)) return false;
    Region region{.runtime = runtime, .wanted = wanted, .work = work, .context = context};
    runtime.parallel(region_main, &region, static_cast<unsigned>(team), 0);
    return true;
}

}  // namespace da8w4
