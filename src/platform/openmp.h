// An OpenMP runtime that the process has already loaded, such as torch's.
#pragma once

namespace da8w4 {

struct OpenMp {
    const char *path;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    int (*max_threads)();
    int (*num_threads)();
    int (*thread_num)();
    int (*in_parallel)();
    bool global = false;  // whether its names are, so that libraries loaded later use it
};

// The runtime, if one is loaded by now; else null.
const OpenMp *loaded_openmp();

// The same, but null where its threads may not be used. GNU's runtime hangs in the child of a process that has used
// it. The number of threads that the application has set in it still counts there.
const OpenMp *usable_openmp();

}  // namespace da8w4
