#include "platform/threads.h"

#include <windows.h>

namespace da8w4 {
namespace {

static_assert(sizeof(SRWLOCK) == sizeof(void *) && sizeof(CONDITION_VARIABLE) == sizeof(void *), "one pointer each");

// Both begin as a null pointer, which is what their initializers say.
SRWLOCK *native_lock(void **lock) { return reinterpret_cast<SRWLOCK *>(lock); }
CONDITION_VARIABLE *native_condition(void **condition) { return reinterpret_cast<CONDITION_VARIABLE *>(condition); }

}  // namespace

void Mutex::lock() { AcquireSRWLockExclusive(native_lock(&lock_)); }
void Mutex::unlock() { ReleaseSRWLockExclusive(native_lock(&lock_)); }

void Condition::wait(Mutex &mutex) {
    SleepConditionVariableSRW(native_condition(&condition_), native_lock(&mutex.lock_), INFINITE, 0);
}
void Condition::signal() { WakeConditionVariable(native_condition(&condition_)); }

bool Thread::start(unsigned long(__stdcall *main)(void *), void *argument) {
    handle_ = CreateThread(nullptr, 0, main, argument, 0, nullptr);
    return handle_ != nullptr;
}
void Thread::join() {
    WaitForSingleObject(handle_, INFINITE);
    CloseHandle(handle_);
}
void Thread::detach() { CloseHandle(handle_); }

bool ThreadSlot::make() {
    index_ = TlsAlloc();
    return index_ != TLS_OUT_OF_INDEXES;
}
void *ThreadSlot::get() const { return TlsGetValue(index_); }
void ThreadSlot::set(void *value) const { TlsSetValue(index_, value); }

void yield() { SwitchToThread(); }

void on_fork(void (*)(), void (*)(), void (*)()) {}

}  // namespace da8w4
