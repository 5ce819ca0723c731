// The quota of CPU time that cgroups set.
#pragma once

#include <stddef.h>

namespace da8w4 {

// The tightest quota, in whole CPUs, from this process's cgroup up to the root, in version 2 or 1; 0 for none. The
// paths /proc/self/cgroup and /sys/fs/cgroup are taken to lie under the folder `root`, which is "" but in tests.
size_t cgroup_cpus(const char *root);

}  // namespace da8w4
