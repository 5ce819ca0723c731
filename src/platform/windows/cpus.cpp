#include "platform/cpus.h"

#include <windows.h>

#include <bit>

namespace da8w4 {

// Of machines with more than 64 CPUs, Windows 11 gives a process all groups of 64, and an affinity is of one of them;
// older ones give it one group, unless it asks for more.
size_t usable_cpus() {
    const HANDLE process = GetCurrentProcess();
    USHORT groups[64], count = 64;
    if (GetProcessGroupAffinity(process, &count, groups) && count > 1) {
        size_t cpus = 0;
        for (USHORT i = 0; i < count; i++) cpus += GetActiveProcessorCount(groups[i]);
        return cpus;
    }
    DWORD_PTR allowed = 0, all = 0;
    if (!GetProcessAffinityMask(process, &allowed, &all) || allowed == 0) return 1;
    return static_cast<size_t>(std::popcount(allowed));
}

}  // namespace da8w4
