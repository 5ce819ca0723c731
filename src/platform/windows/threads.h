// platform/threads.h, by Windows. Its own header is in threads.cpp only: it defines macros with everyday names.
#pragma once

namespace da8w4 {

class Mutex {
public:
    void lock();
    void unlock();

private:
    friend class Condition;
    void *lock_ = nullptr;  // an SRWLOCK
};

class Condition {
public:
    void wait(Mutex &mutex);
    void signal();

private:
    void *condition_ = nullptr;  // a CONDITION_VARIABLE
};

class Thread {
public:
    template <void (*kMain)(void *)>
    bool start(void *argument) {
        const auto main = [](void *given) -> unsigned long {
            kMain(given);
            return 0;
        };
        return start(main, argument);
    }
    void join();
    void detach();

private:
    bool start(unsigned long(__stdcall *main)(void *), void *argument);

    void *handle_;
};

class ThreadSlot {
public:
    bool make();
    void *get() const;
    void set(void *value) const;

private:
    unsigned long index_;
};

}  // namespace da8w4
