#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>

#include "pyda8w4/pyda8w4.h"
#include "runtime/cpu.h"
#include "runtime/parallel.h"

namespace da8w4 {
namespace {

// ---- how many --------------------------------------------------------------------------------

// CPUs of the cgroup quota of `file` ("<quota> <period>", or "max ..."), 0 where there is none.
size_t quota_of(const std::string &quota_file, const std::string &period_file) {
    double quota = 0, period = 0;
    FILE *file = std::fopen(quota_file.c_str(), "r");
    if (!file) return 0;
    const int found = std::fscanf(file, "%lf %lf", &quota, &period);
    std::fclose(file);
    if (found < 1 || quota <= 0) return 0;
    if (found == 1) {
        file = std::fopen(period_file.c_str(), "r");
        if (!file) return 0;
        if (std::fscanf(file, "%lf", &period) != 1) period = 0;
        std::fclose(file);
    }
    if (period <= 0) return 0;
    const size_t cpus = static_cast<size_t>(quota / period);
    return cpus < quota / period ? cpus + 1 : cpus;
}

// The tightest quota from this process's cgroup up to the root, in version 2 or 1; 0 for none.
size_t cgroup_cpus() {
    FILE *file = std::fopen("/proc/self/cgroup", "r");
    if (!file) return 0;
    size_t least = 0;
    char line[4096];
    while (std::fgets(line, sizeof line, file)) {
        line[std::strcspn(line, "\n")] = 0;
        const char *controllers = std::strchr(line, ':');
        const char *path = controllers ? std::strchr(++controllers, ':') : nullptr;
        if (!path) continue;
        const std::string names(controllers, path++);
        const bool v2 = names.empty();
        if (!v2 && (',' + names + ',').find(",cpu,") == std::string::npos) continue;
        const std::string mount = v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu";
        for (std::string folder = path;;) {
            const std::string at = mount + folder + '/';
            const size_t cpus =
                v2 ? quota_of(at + "cpu.max", "") : quota_of(at + "cpu.cfs_quota_us", at + "cpu.cfs_period_us");
            if (cpus && (!least || cpus < least)) least = cpus;
            const size_t slash = folder.rfind('/');
            if (slash == std::string::npos) break;
            folder.resize(slash);
        }
    }
    std::fclose(file);
    return least;
}

size_t affinity_cpus() {
    cpu_set_t sets[16] = {};  // room for 16384 CPUs; the kernel refuses a mask shorter than its own
    if (sched_getaffinity(0, sizeof sets, sets) != 0) return 1;
    return static_cast<size_t>(CPU_COUNT_S(sizeof sets, sets));
}

std::atomic<size_t> known_cpus{0};  // asked at the first call, and again in a forked child

size_t allowed_cpus() {
    size_t cpus = known_cpus.load(std::memory_order_relaxed);
    if (!cpus) {
        const size_t quota = cgroup_cpus();
        cpus = affinity_cpus();
        if (quota && quota < cpus) cpus = quota;
        known_cpus.store(cpus, std::memory_order_relaxed);
    }
    return cpus;
}

size_t omp_num_threads() {
    static const size_t threads = [] {
        const char *text = std::getenv("OMP_NUM_THREADS");  // "4", or "4,2" for nested levels
        const long value = text ? std::strtol(text, nullptr, 10) : 0;
        return value > 0 && value <= 65536 ? static_cast<size_t>(value) : 0;
    }();
    return threads;
}

std::atomic<size_t> chosen_threads{0};

// ---- an OpenMP runtime of the process --------------------------------------------------------

struct OpenMp {
    std::string path;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    int (*max_threads)();
    int (*num_threads)();
    int (*thread_num)();
};

struct Search {
    unsigned long long adds = 0;
    bool adds_only = true;
    size_t count = 0;
    std::string paths[8];  // whose names begin like that of a runtime
};

int look_at(dl_phdr_info *info, size_t, void *data) {
    Search &search = *static_cast<Search *>(data);
    search.adds = info->dlpi_adds;
    if (search.adds_only) return 1;
    const char *slash = std::strrchr(info->dlpi_name, '/');
    const char *name = slash ? slash + 1 : info->dlpi_name;
    for (const char *known : {"libgomp", "libiomp5", "libomp"})
        if (search.count < 8 && std::strncmp(name, known, std::strlen(known)) == 0)
            search.paths[search.count++] = info->dlpi_name;
    return 0;
}

template <class Function>
bool resolve(void *library, const char *name, Function *function) {
    *function = reinterpret_cast<Function>(dlsym(library, name));
    return *function != nullptr;
}

std::unique_ptr<OpenMp> open_runtime(const std::string &path) {
    // RTLD_NOLOAD finds it without loading, and the reference keeps it from being unloaded.
    void *library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (!library) return nullptr;
    auto found = std::make_unique<OpenMp>();
    found->path = path;
    const bool complete = resolve(library, "GOMP_parallel", &found->parallel) &&
                          resolve(library, "omp_get_max_threads", &found->max_threads) &&
                          resolve(library, "omp_get_num_threads", &found->num_threads) &&
                          resolve(library, "omp_get_thread_num", &found->thread_num);
    return complete ? std::move(found) : nullptr;
}

// GNU's runtime hangs in the child of a process that has used it: there its threads are not used, but the
// number of them that the application has set still counts.
std::atomic<bool> forked{false};

// The runtime, if there is one by now. A library may be loaded at any time, so each call compares the
// loader's count of libraries (tens of nanoseconds) and searches again when it has grown.
const OpenMp *openmp() {
    static std::atomic<const OpenMp *> runtime{nullptr};
    static std::atomic<unsigned long long> searched{0};
    const OpenMp *found = runtime.load(std::memory_order_acquire);
    if (found || forked.load(std::memory_order_relaxed)) return found;
    Search search;
    dl_iterate_phdr(look_at, &search);
    if (search.adds == searched.load(std::memory_order_relaxed)) return nullptr;
    search.adds_only = false;
    dl_iterate_phdr(look_at, &search);
    searched.store(search.adds, std::memory_order_relaxed);
    std::unique_ptr<OpenMp> opened;  // the first that is one: libomptarget and others only begin like one
    for (size_t i = 0; i < search.count && !opened; i++) opened = open_runtime(search.paths[i]);
    if (opened && runtime.compare_exchange_strong(found, opened.get(), std::memory_order_acq_rel))
        found = opened.release();  // kept for the life of the process
    return found;
}

// ---- our own pool ----------------------------------------------------------------------------

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    sched_yield();
#endif
}

// Waits for a short while without sleeping: layers follow each other within microseconds, or some hundreds
// where attention lies between, and waking a sleeping thread takes longer than many layers do, on a virtual
// machine much longer. It yields now and then, because the thread that it waits for, or another, may be
// waiting for this very CPU.
template <class Done>
bool spin(Done done) {
    using Clock = std::chrono::steady_clock;
    const Clock::time_point end = Clock::now() + std::chrono::milliseconds(1);
    do {
        for (int i = 0; i < 32; i++) {
            if (done()) return true;
            pause();
        }
        sched_yield();
    } while (Clock::now() < end);
    return done();
}

struct Job {
    Work work;
    void *context;
    size_t threads;
    std::atomic<size_t> *left;
};

// A worker's part of a job. Whoever takes it from waiting to idle does it: the worker, or the caller, if the
// worker has not begun when the caller is done with its own.
class Worker {
public:
    explicit Worker(size_t thread) : thread(thread) {}

    void post(const Job &job) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = job;
            waiting_.store(true, std::memory_order_release);
        }
        posted_.notify_one();
    }

    // Does what is waiting, if the other has not.
    void work() {
        bool waiting = true;
        if (!waiting_.compare_exchange_strong(waiting, false, std::memory_order_acquire)) return;
        const Job job = job_;
        job.work(job.context, thread, job.threads);
        job.left->fetch_sub(1, std::memory_order_release);
    }

    void work_forever() {
        for (;;) {
            auto posted = [&] { return waiting_.load(std::memory_order_relaxed); };
            if (!spin(posted)) {
                std::unique_lock<std::mutex> lock(mutex_);
                posted_.wait(lock, posted);
            }
            work();
        }
    }

    const size_t thread;  // its number in a job
    Worker *next = nullptr, *before = nullptr;

private:
    std::mutex mutex_;
    std::condition_variable posted_;
    std::atomic<bool> waiting_{false};
    Job job_;
};

void *worker_main(void *worker) {
    static_cast<Worker *>(worker)->work_forever();
    return nullptr;
}

class Pool {
public:
    void run(size_t wanted, Work work, void *context) {
        std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
        const size_t helpers = busy ? start_workers(wanted - 1) : 0;
        std::atomic<size_t> left{helpers};
        Worker *last = nullptr;
        for (Worker *worker = first_; worker && worker->thread <= helpers; worker = worker->next)
            (last = worker)->post({work, context, helpers + 1, &left});
        work(context, 0, helpers + 1);
        // A thread that sleeps, or whose CPU is busy with something else, may take longer to begin than all the rest.
        for (Worker *worker = last; worker; worker = worker->before) worker->work();
        auto finished = [&] { return left.load(std::memory_order_acquire) == 0; };
        while (!spin(finished)) {
        }
    }

private:
    // Up to `count` workers; fewer where the system refuses threads.
    size_t start_workers(size_t count) {
        while (started_ < count) {
            std::unique_ptr<Worker> worker(new (std::nothrow) Worker(started_ + 1));
            if (!worker) break;
            worker->before = last_;
            pthread_t thread;
            // Signals are for the application's threads, but not those of a fault of the worker itself, such as
            // reading a mapped file that has been cut off: blocked, they end the process past every handler.
            sigset_t foreign, before;
            sigfillset(&foreign);
            for (const int fault : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) sigdelset(&foreign, fault);
            pthread_sigmask(SIG_BLOCK, &foreign, &before);
            const bool running = pthread_create(&thread, nullptr, worker_main, worker.get()) == 0;
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
            if (!running) break;
            pthread_detach(thread);
            (last_ ? last_->next : first_) = worker.get();
            last_ = worker.release();
            started_++;
        }
        return started_ < count ? started_ : count;
    }

    std::mutex busy_;  // held by the caller whose job runs
    size_t started_ = 0;
    Worker *first_ = nullptr, *last_ = nullptr;
};

// Never destroyed: its workers may outlive the exit of main. A forked child has none of them, so it
// starts over with a new pool and leaves the parent's, whatever state it was in, alone.
Pool *pool = [] {
    pthread_atfork(nullptr, nullptr, [] {
        forked.store(true, std::memory_order_relaxed);
        known_cpus.store(0, std::memory_order_relaxed);
        pool = new Pool;
    });
    return new Pool;
}();

thread_local bool inside = false;

struct Region {
    Work work;
    void *context;
    size_t wanted;
    const OpenMp *runtime;
};

void run_part(void *context, size_t thread, size_t threads) {
    const Region &region = *static_cast<Region *>(context);
    const DefaultRounding rounding;
    const bool outer = inside;
    inside = true;
    region.work(region.context, thread, threads);
    inside = outer;
}

void openmp_main(void *context) {
    const Region &region = *static_cast<Region *>(context);
    const size_t thread = static_cast<size_t>(region.runtime->thread_num());
    const size_t team = static_cast<size_t>(region.runtime->num_threads());
    const size_t threads = team < region.wanted ? team : region.wanted;
    if (thread < threads) run_part(context, thread, threads);
}

}  // namespace

void parallel(size_t wanted, Work work, void *context) {
    Region region{work, context, wanted, nullptr};
    if (wanted <= 1 || inside)
        run_part(&region, 0, 1);
    else if (!forked.load(std::memory_order_relaxed) && (region.runtime = openmp()) != nullptr) {
        // Always the application's whole team, of which some may have nothing to do: GNU's runtime ends the
        // threads that a smaller team leaves out and starts new ones for the next team of full size.
        const size_t usual = static_cast<size_t>(region.runtime->max_threads());
        region.runtime->parallel(openmp_main, &region, static_cast<unsigned>(usual > wanted ? usual : wanted), 0);
    } else {
        pool->run(wanted, run_part, &region);
    }
}

}  // namespace da8w4

using namespace da8w4;

void da8w4_set_num_threads(size_t threads) { chosen_threads.store(threads, std::memory_order_relaxed); }

size_t da8w4::num_threads() {
    if (const size_t chosen = chosen_threads.load(std::memory_order_relaxed)) return chosen;
    const size_t limit = omp_num_threads() ? omp_num_threads() : allowed_cpus();
    const OpenMp *runtime = openmp();
    const int most = runtime ? runtime->max_threads() : 0;  // set by torch.set_num_threads, too
    return most > 0 && static_cast<size_t>(most) < limit ? static_cast<size_t>(most) : limit;
}

size_t da8w4_get_num_threads() { return num_threads(); }

const char *da8w4_thread_runtime() {
    const OpenMp *runtime = forked.load(std::memory_order_relaxed) ? nullptr : openmp();
    return runtime ? runtime->path.c_str() : "own";
}
