#include "runtime/thread_pool.h"

#include <signal.h>

#include <cstdlib>
#include <new>
#include <type_traits>

#include "runtime/mutex.h"
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
        pthread_cond_signal(&posted_);
    }

    // Does what is waiting, if the other has not.
    void work() {
        bool waiting = true;
        if (!waiting_.compare_exchange_strong(waiting, false, std::memory_order_acquire)) return;
        const Job job = job_;
        job.work(job.context, thread, job.threads);
        job.unfinished->fetch_sub(1, std::memory_order_release);
    }

    void work_forever() {
        for (;;) {
            auto posted = [&] { return waiting_.load(std::memory_order_relaxed); };
            if (!spin(posted)) {
                const Lock lock(mutex_);
                while (!posted()) pthread_cond_wait(&posted_, mutex_.get());
            }
            work();
        }
    }

    const size_t thread;  // its number in a job
    Worker *next = nullptr, *before = nullptr;

private:
    Mutex mutex_;
    pthread_cond_t posted_ = PTHREAD_COND_INITIALIZER;
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
        auto main = [](void *self) -> void * {
            static_cast<Worker *>(self)->work_forever();
            return nullptr;
        };
        pthread_t thread;
        if (!start_thread(&thread, main, worker)) {
            std::free(place);
            break;
        }
        pthread_detach(thread);
        worker->before = last_;
        (last_ ? last_->next : first_) = worker;
        last_ = worker;
        started_++;
    }
    return started_ < count ? started_ : count;
}

bool start_thread(pthread_t *thread, void *(*main)(void *), void *argument) {
    // Not the signals of a fault of the thread itself, such as reading a mapped file that has been cut off: blocked,
    // they end the process past every handler.
    sigset_t foreign, before;
    sigfillset(&foreign);
    for (const int fault : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) sigdelset(&foreign, fault);
    pthread_sigmask(SIG_BLOCK, &foreign, &before);
    const bool started = pthread_create(thread, nullptr, main, argument) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return started;
}

namespace {

// Never destroyed: its workers may outlive the exit of main.
ThreadPool pool;
static_assert(std::is_trivially_destructible<ThreadPool>::value, "the end of the process does not touch the pool");

// A forked child has none of the workers, so it starts over, whatever state the parent's pool was in.
__attribute__((constructor)) void watch_forks() {
    pthread_atfork(nullptr, nullptr, [] { new (&pool) ThreadPool; });
}

}  // namespace

ThreadPool &thread_pool() { return pool; }

}  // namespace da8w4
