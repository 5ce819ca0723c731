// Forks a child that must end within 20 seconds.
#pragma once

#ifdef _WIN32

constexpr bool can_fork = false;

template <class Check>
bool in_child(Check) {
    return false;
}

#else

#include <sys/wait.h>
#include <unistd.h>

constexpr bool can_fork = true;

// Whether `check` was true in the child. A child that hangs is killed, and counts as false.
template <class Check>
bool in_child(Check check) {
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);
        _exit(check() ? 0 : 1);
    }
    int status = -1;
    return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

#endif
