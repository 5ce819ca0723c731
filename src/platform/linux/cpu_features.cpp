#include "platform/cpu_features.h"

#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace da8w4 {

// Linux refuses where signal stacks are too small for the state (sigaltstack of some older faulthandlers), and
// sandboxes refuse the call.
bool may_use_state(int state) {
#ifdef SYS_arch_prctl
    const long kGetPermission = 0x1022, kRequestPermission = 0x1023;
    unsigned long granted = 0;
    auto has_it = [&] { return syscall(SYS_arch_prctl, kGetPermission, &granted) == 0 && (granted >> state & 1) != 0; };
    if (has_it()) return true;
    return syscall(SYS_arch_prctl, kRequestPermission, static_cast<long>(state)) == 0 && has_it();
#else
    (void)state;
    return false;
#endif
}

bool has_arm_feature(const ArmFeature &feature) {
    return (getauxval(feature.word == ArmFeature::kHwcap ? AT_HWCAP : AT_HWCAP2) & feature.mask) != 0;
}

}  // namespace da8w4
