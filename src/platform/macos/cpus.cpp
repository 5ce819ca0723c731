#include "platform/cpus.h"

#include <sys/sysctl.h>

#include <initializer_list>

namespace da8w4 {

// Only the fast cores of Apple's chips, which are level 0: a product is divided evenly, and the slow ones would make it
// end later. Macs with Intel CPUs have no levels. A process cannot be bound to some of the cores.
size_t usable_cpus() {
    for (const char *name : {"hw.perflevel0.logicalcpu", "hw.logicalcpu"}) {
        int count = 0;
        size_t bytes = sizeof count;
        if (sysctlbyname(name, &count, &bytes, nullptr, 0) == 0 && count > 0) return static_cast<size_t>(count);
    }
    return 1;
}

}  // namespace da8w4
