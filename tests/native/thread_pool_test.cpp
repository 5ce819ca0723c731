// The pool and what is over it: every part of a job is done once, whoever calls at the same time, in whichever
// process, and where the system refuses threads. Linked with --wrap=pthread_create.
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "check.h"
#include "child.h"
#include "runtime/openmp.h"
#include "runtime/parallel.h"

using namespace da8w4;

namespace {

std::atomic<int> threads_left{INT32_MAX};  // that the system grants

}  // namespace

extern "C" int __real_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
extern "C" int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*main)(void *),
                                     void *argument) {
    if (threads_left.fetch_sub(1) <= 0) return EAGAIN;
    return __real_pthread_create(thread, attributes, main, argument);
}

namespace {

constexpr size_t kMost = 16;

// ThreadSanitizer cannot follow threads that the child of a process with threads starts.
#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadsInChildren = false;
#elif defined(__has_feature)
constexpr bool kThreadsInChildren = !__has_feature(thread_sanitizer);
#else
constexpr bool kThreadsInChildren = true;
#endif

// Counts how often each part was done; `threads` is the number of parts.
struct Parts {
    std::atomic<int> done[kMost] = {};
    std::atomic<size_t> threads{0};

    void operator()(size_t thread, size_t count) {
        threads = count;
        done[thread]++;
    }

    bool each_once(size_t most) const {
        bool right = threads >= 1 && threads <= most;
        for (size_t i = 0; i < kMost; i++) right = right && done[i] == (i < threads ? 1 : 0);
        return right;
    }
};

bool once_each(size_t wanted) {
    Parts parts;
    parallel(wanted, parts);
    return parts.each_once(wanted ? wanted : 1);
}

void check_parts_of() {
    for (size_t count : {0, 1, 2, 7, 100})
        for (size_t parts = 1; parts < 12; parts++) {
            size_t next = 0, least = SIZE_MAX, most = 0;
            for (size_t part = 0; part < parts; part++) {
                const Range range = part_of(count, part, parts);
                CHECK(range.begin == next && range.end >= range.begin);
                const size_t size = range.end - range.begin;
                least = size < least ? size : least;
                most = size > most ? size : most;
                next = range.end;
            }
            CHECK(next == count && most - least <= 1);
        }
}

// First of all, while the pool has no threads.
void check_refused_threads() {
    for (const int granted : {0, 1, 2}) {
        threads_left = granted;
        Parts parts;
        parallel(8, parts);
        CHECK(parts.each_once(8));
        CHECK(parts.threads <= static_cast<size_t>(granted) * (granted + 1) / 2 + 1);
        threads_left = 0;
        CHECK(once_each(8));
    }
    threads_left = INT32_MAX;
    Parts parts;
    parallel(8, parts);
    CHECK(parts.each_once(8) && parts.threads == 8);
}

void check_every_part_once() {
    for (int repeat = 0; repeat < 200; repeat++)
        for (size_t wanted = 0; wanted <= kMost; wanted++) CHECK(once_each(wanted));
}

void check_nested_calls() {
    std::atomic<int> wrong{0};
    std::atomic<size_t> outer{0};
    for (int repeat = 0; repeat < 50; repeat++)
        parallel(4, [&](size_t, size_t threads) {
            outer = threads;
            Parts parts;
            parallel(4, parts);
            wrong += !parts.each_once(1);
        });
    CHECK(outer == 4 && wrong == 0);
}

void check_concurrent_callers() {
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; caller++)
        callers.emplace_back([&] {
            for (size_t repeat = 0; repeat < 500; repeat++) wrong += !once_each(1 + repeat % 5);
        });
    for (std::thread &caller : callers) caller.join();
    CHECK(wrong == 0);
}

// While other threads have the pool or look for a runtime. The child loads a library, too: its loader must not be
// locked by a thread that it does not have.
bool works_in_child() {
    if (!kThreadsInChildren) threads_left = 0;
    Parts parts;
    parallel(4, parts);
    return parts.each_once(4) && parts.threads == (kThreadsInChildren ? 4 : 1) && once_each(4) &&
           dlopen("libpthread.so.0", RTLD_LAZY);
}

void check_forks() {
    std::atomic<bool> stop{false};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 2; caller++)
        callers.emplace_back([&] {
            while (!stop) (void)once_each(1 + num_threads());
        });
    for (int repeat = 0; repeat < 200; repeat++) {
        CHECK(in_child(works_in_child));
        CHECK(once_each(4));
    }
    stop = true;
    for (std::thread &caller : callers) caller.join();
    CHECK(in_child([] { return in_child(works_in_child); }));
}

// A runtime that ends the process where it is refused a thread, as GNU's does.
int team_threads, team_thread;
void fake_parallel(void (*main)(void *), void *argument, unsigned team, unsigned) {
    for (unsigned i = 1; i < team; i++)
        if (threads_left <= 0) _exit(3);
    team_threads = static_cast<int>(team);
    for (team_thread = 0; team_thread < team_threads; team_thread++) main(argument);
}

void check_openmp_that_is_refused_threads() {
    const OpenMp runtime{
        "fake",          fake_parallel, [] { return 6; }, [] { return team_threads; }, [] { return team_thread; },
        [] { return 0; }};
    auto run = [&](Parts &parts) {
        return run_on_openmp(
            runtime, 4,
            [](void *context, size_t thread, size_t threads) { (*static_cast<Parts *>(context))(thread, threads); },
            &parts);
    };
    threads_left = 0;
    Parts none;
    CHECK(!run(none) && none.threads == 0);
    threads_left = 4;  // a team of 6 needs one more
    CHECK(!run(none) && none.threads == 0);
    threads_left = INT32_MAX;
    for (int repeat = 0; repeat < 2; repeat++) {
        Parts parts;
        CHECK(run(parts) && parts.each_once(4) && parts.threads == 4);
    }
    CHECK(threads_left == INT32_MAX - 5);  // the system was asked once
}

}  // namespace

int main() {
    check_parts_of();
    check_refused_threads();
    check_every_part_once();
    check_nested_calls();
    check_concurrent_callers();
    check_forks();
    check_openmp_that_is_refused_threads();
    return check_result();
}
