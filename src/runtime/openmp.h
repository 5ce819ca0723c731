// Work on the threads of an OpenMP runtime.
#pragma once

#include "platform/openmp.h"
#include "runtime/thread_pool.h"

namespace da8w4 {

// ThreadPool::run with the threads of the runtime. False, and nothing is done, where the system refuses threads.
bool run_on_openmp(const OpenMp &runtime, size_t wanted, Work work, void *context);

}  // namespace da8w4
