#include "platform/cpus.h"

#include <sched.h>

#include "platform/linux/cgroup.h"

namespace da8w4 {
namespace {

size_t affinity_cpus() {
    cpu_set_t sets[16] = {};  // room for 16384 CPUs; the kernel refuses a mask shorter than its own
    if (sched_getaffinity(0, sizeof sets, sets) != 0) return 1;
    return static_cast<size_t>(CPU_COUNT_S(sizeof sets, sets));
}

}  // namespace

size_t usable_cpus() {
    const size_t quota = cgroup_cpus(""), cpus = affinity_cpus();
    return quota && quota < cpus ? quota : cpus;
}

}  // namespace da8w4
