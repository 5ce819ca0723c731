// Threads, and what they share. A system's header has these classes, all of which say what they do by their names:
//
//     Mutex       lock(), unlock()
//     Condition   wait(mutex), signal()
//     Thread      start<main>(argument), which is false where the system refuses threads; then join() or detach()
//     ThreadSlot  make(), which is false where the system has no more; then get() and set() a pointer of each thread
//
// All but ThreadSlot need no constructor to run, and none has a destructor: they may be used while the process exits.
// Those of the standard library would be all that ties the library to a version of libstdc++, and they throw.
#pragma once

#ifdef _WIN32
#include "platform/windows/threads.h"
#else
#include "platform/posix/threads.h"
#endif

namespace da8w4 {

// Lets another thread have this CPU, if one waits for it.
void yield();

// From here on, a fork calls the first in the parent before it, the second in the parent after it, and the third in the
// child; each may be null. Where there is no fork, it does nothing.
void on_fork(void (*before)(), void (*in_parent)(), void (*in_child)());

// Holds a mutex while it lives.
class Lock {
public:
    explicit Lock(Mutex &mutex) : mutex_(mutex) { mutex_.lock(); }
    ~Lock() { mutex_.unlock(); }
    Lock(const Lock &) = delete;
    Lock &operator=(const Lock &) = delete;

private:
    Mutex &mutex_;
};

}  // namespace da8w4
