// Our own pool of threads.
#pragma once

#include <stddef.h>

#include <atomic>

namespace da8w4 {

// One part of a job: the part's number, of how many.
using Work = void (*)(void *context, size_t thread, size_t threads);

class Worker;

class ThreadPool {
public:
    // Calls work(context, thread, threads) once for each thread = 0 .. threads-1 and returns when all have returned.
    // `threads` is at most `wanted`; fewer where the system refuses threads, and 1 while another caller has the pool,
    // which a nested call is, too.
    void run(size_t wanted, Work work, void *context);

private:
    size_t start_workers(size_t count);

    std::atomic<bool> busy_{false};  // from here on for the caller that has set it
    size_t started_ = 0;
    // A list of our own. A container of the standard library would end the process where memory has run out: this
    // library is built without exceptions.
    Worker *first_ = nullptr, *last_ = nullptr;
};

// The pool of the process.
ThreadPool &thread_pool();

}  // namespace da8w4
