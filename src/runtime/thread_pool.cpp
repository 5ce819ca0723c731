#include "runtime/thread_pool.h"

#include <cstdlib>
#include <new>
#include <type_traits>

#include "platform/threads.h"
#include "runtime/spin.h"

namespace da8w4 {
namespace {

struct Job {
    Work work;
    void *context;
    size_t threads;
    std::atomic<size_t> *unfinished;
};

}  // namespace

// A worker's part of a job. Whoever takes it from waiting to idle does it: the worker, or the caller, if the
// worker has not begun when the caller is done with its own.
class Worker {
public:
    explicit Worker(size_t thread) : thread(thread) {}

    void post(const Job &job) {
        {
            const Lock lock(mutex_);
            job_ = job;
            waiting_.store(true, std::memory_order_release);
        }
        posted_.signal();
    }

    // Does what is waiting, if the other has not.
    void work() {
        bool waiting = true;
        if (!waiting_.compare_exchange_strong(waiting, false, std::memory_order_acquire)) return;
        const Job job = job_;
        job.work(job.context, thread, job.threads);
        job.unfinished->fetch_sub(1, std::memory_order_release);
    }

    static void work_forever(void *self) {
        for (;;) static_cast<Worker *>(self)->wait_and_work();
    }

    const size_t thread;  // its number in a job
    Worker *next = nullptr, *before = nullptr;

private:
    void wait_and_work() {
        auto posted = [&] { return waiting_.load(std::memory_order_relaxed); };
        if (!spin(posted)) {
            const Lock lock(mutex_);
            while (!posted()) posted_.wait(mutex_);
        }
        work();
    }

    Mutex mutex_;
    Condition posted_;
    std::atomic<bool> waiting_{false};
    Job job_ = {};
};

void ThreadPool::run(size_t wanted, Work work, void *context) {
    if (busy_.exchange(true, std::memory_order_acquire)) return work(context, 0, 1);
    const size_t helpers = start_workers(wanted - 1);
    std::atomic<size_t> unfinished{helpers};
    Worker *last = nullptr;
    for (Worker *worker = first_; worker && worker->thread <= helpers; worker = worker->next)
        (last = worker)->post({.work = work, .context = context, .threads = helpers + 1, .unfinished = &unfinished});
    work(context, 0, helpers + 1);
    // A thread that sleeps, or whose CPU is busy with something else, may take longer to begin than all the rest.
    for (Worker *worker = last; worker; worker = worker->before) worker->work();
    auto finished = [&] { return unfinished.load(std::memory_order_acquire) == 0; };
    while (!spin(finished)) {
    }
    busy_.store(false, std::memory_order_release);
}

// Up to `count` workers; fewer where the system refuses threads.
size_t ThreadPool::start_workers(size_t count) {
    while (started_ < count) {
        void *const place = std::malloc(sizeof(Worker));
        if (!place) break;
        Worker *const worker = new (place) Worker(started_ + 1);
        Thread thread;
        if (!thread.start<Worker::work_forever>(worker)) {
            std::free(place);
            break;
        }
        thread.detach();
        worker->before = last_;
        (last_ ? last_->next : first_) = worker;
        last_ = worker;
        started_++;
    }
    return started_ < count ? started_ : count;
}

namespace {

// Never destroyed: its workers may outlive the exit of main.
ThreadPool pool;
static_assert(std::is_trivially_destructible<ThreadPool>::value, "the end of the process does not touch the pool");

// A forked child has none of the workers, so it starts over, whatever state the parent's pool was in.
__attribute__((constructor)) void watch_forks() {
    on_fork(nullptr, nullptr, [] { new (&pool) ThreadPool; });
}

}  // namespace

ThreadPool &thread_pool() { return pool; }

}  // namespace da8w4
