// What a CPU does not tell a program itself.
#pragma once

#include <stdint.h>

namespace da8w4 {

// Whether this process may use a state of registers of x86, by its number in XCR0, that systems save only for processes
// which have asked. Asks.
bool may_use_state(int state);

// How systems name what a 64-bit Arm CPU has: a bit of HWCAP or HWCAP2, a name of sysctl, and a number.
struct ArmFeature {
    enum Word { kHwcap, kHwcap2 } word;
    uint32_t mask;
    const char *apple;
    unsigned windows;
};
bool has_arm_feature(const ArmFeature &feature);

}  // namespace da8w4
