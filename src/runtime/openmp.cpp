#include "runtime/openmp.h"

#include <cstdint>

#include "platform/threads.h"

namespace da8w4 {
namespace {

bool grants_threads(size_t count);

struct Rest {
    size_t count;
    bool granted;
};

void start_rest(void *argument) {
    Rest &rest = *static_cast<Rest *>(argument);
    rest.granted = grants_threads(rest.count);
}

// Whether the system grants this many threads at once. Each starts the next and waits for its end.
bool grants_threads(size_t count) {
    if (count == 0) return true;
    Rest rest{.count = count - 1, .granted = false};
    Thread thread;
    if (!thread.start<start_rest>(&rest)) return false;
    thread.join();
    return rest.granted;
}

// The largest team that was granted to this thread, of a runtime that is global and of one that is not: each thread has
// a team of its own. Not a thread_local, whose memory the loader allocates at its first use; where there is none, it
// ends the process.
ThreadSlot granted_teams[2];
bool has_granted_teams = false;
__attribute__((constructor)) void make_slots() {
    has_granted_teams = granted_teams[0].make() && granted_teams[1].make();
}

// GNU's and LLVM's runtimes end the process when the system refuses them a thread. So the system is asked first,
// once for a thread's team of each size.
bool grants_team(const OpenMp &runtime, size_t team) {
    const ThreadSlot &slot = granted_teams[runtime.global];
    const void *const known = has_granted_teams ? slot.get() : nullptr;
    if (team <= reinterpret_cast<uintptr_t>(known)) return true;
    if (!grants_threads(team - 1)) return false;
    // The slot's value is the number itself, as a pointer that nothing follows.
    // NOLINTNEXTLINE(performance-no-int-to-ptr)
    if (has_granted_teams) slot.set(reinterpret_cast<void *>(team));
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
