#include "platform/posix/libraries.h"

#include <mach-o/dyld.h>

namespace da8w4 {

// How many there are: it misses one that takes the place of one that was unloaded, until the next.
unsigned long long libraries_loaded() { return _dyld_image_count(); }

void visit_libraries(bool (*visit)(const char *path, void *context), void *context) {
    for (uint32_t i = 0; i < _dyld_image_count(); i++) {
        const char *path = _dyld_get_image_name(i);
        if (path && visit(path, context)) return;
    }
}

}  // namespace da8w4
