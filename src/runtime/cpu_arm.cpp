// What the system says of a 64-bit Arm CPU.
#include "platform/cpu_features.h"
#include "runtime/cpu.h"

namespace da8w4 {
namespace {

struct Requirement {
    uint64_t bit;
    ArmFeature feature;
};

constexpr Requirement requirements[] = {
#define DA8W4_X86_BIT(...)
#define DA8W4_ARM_BIT(bit, name, ...) {bit, {__VA_ARGS__}},
#include "runtime/cpu_bits.inc"
#undef DA8W4_X86_BIT
#undef DA8W4_ARM_BIT
};

}  // namespace

uint64_t detect_cpu_bits() {
    uint64_t bits = 0;
    for (const Requirement &row : requirements)
        if (has_arm_feature(row.feature)) bits |= row.bit;
    return bits;
}

CpuModel cpu_model() { return {}; }

}  // namespace da8w4
