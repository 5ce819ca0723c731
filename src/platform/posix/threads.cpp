#include "platform/threads.h"

#include <sched.h>
#include <signal.h>

#include <initializer_list>

namespace da8w4 {

// As pthread_create, and signals are left to the application's threads.
bool Thread::start(void *(*main)(void *), void *argument) {
    // Not the signals of a fault of the thread itself, such as reading a mapped file that has been cut off: blocked,
    // they end the process past every handler.
    sigset_t foreign, before;
    sigfillset(&foreign);
    for (const int fault : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) sigdelset(&foreign, fault);
    pthread_sigmask(SIG_BLOCK, &foreign, &before);
    const bool started = pthread_create(&thread_, nullptr, main, argument) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return started;
}

void yield() { sched_yield(); }

void on_fork(void (*before)(), void (*in_parent)(), void (*in_child)()) { pthread_atfork(before, in_parent, in_child); }

}  // namespace da8w4
