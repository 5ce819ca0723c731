// CPUs of which nothing needs to be known: the kernel scalar runs on all.
#include "runtime/cpu.h"

namespace da8w4 {

uint64_t detect_cpu_bits() { return 0; }

CpuModel cpu_model() { return {}; }

}  // namespace da8w4
