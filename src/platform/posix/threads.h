// platform/threads.h, by POSIX threads.
#pragma once

#include <pthread.h>

namespace da8w4 {

class Mutex {
public:
    void lock() { pthread_mutex_lock(&mutex_); }
    void unlock() { pthread_mutex_unlock(&mutex_); }

private:
    friend class Condition;
    pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
};

class Condition {
public:
    void wait(Mutex &mutex) { pthread_cond_wait(&condition_, &mutex.mutex_); }
    void signal() { pthread_cond_signal(&condition_); }

private:
    pthread_cond_t condition_ = PTHREAD_COND_INITIALIZER;
};

class Thread {
public:
    template <void (*kMain)(void *)>
    bool start(void *argument) {
        const auto main = [](void *given) -> void * {
            kMain(given);
            return nullptr;
        };
        return start(main, argument);
    }
    void join() { pthread_join(thread_, nullptr); }
    void detach() { pthread_detach(thread_); }

private:
    bool start(void *(*main)(void *), void *argument);

    pthread_t thread_;
};

class ThreadSlot {
public:
    bool make() { return pthread_key_create(&key_, nullptr) == 0; }
    void *get() const { return pthread_getspecific(key_); }
    void set(void *value) const { pthread_setspecific(key_, value); }

private:
    pthread_key_t key_;
};

}  // namespace da8w4
