#include "platform/cpu_features.h"

#include <windows.h>

namespace da8w4 {

bool may_use_state(int) { return false; }

bool has_arm_feature(const ArmFeature &feature) { return IsProcessorFeaturePresent(feature.windows) != 0; }

}  // namespace da8w4
