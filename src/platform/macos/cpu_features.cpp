#include "platform/cpu_features.h"

#include <sys/sysctl.h>

namespace da8w4 {

bool may_use_state(int) { return false; }

bool has_arm_feature(const ArmFeature &feature) {
    int value = 0;
    size_t bytes = sizeof value;
    return sysctlbyname(feature.apple, &value, &bytes, nullptr, 0) == 0 && value != 0;
}

}  // namespace da8w4
