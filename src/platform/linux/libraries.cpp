#include "platform/posix/libraries.h"

#include <link.h>

namespace da8w4 {
namespace {

struct Visit {
    bool (*visit)(const char *path, void *context);
    void *context;
};

}  // namespace

unsigned long long libraries_loaded() {
    unsigned long long adds = 0;
    dl_iterate_phdr(
        [](dl_phdr_info *info, size_t, void *data) {
            *static_cast<unsigned long long *>(data) = info->dlpi_adds;
            return 1;
        },
        &adds);
    return adds;
}

void visit_libraries(bool (*visit)(const char *path, void *context), void *context) {
    Visit wanted{.visit = visit, .context = context};
    dl_iterate_phdr(
        [](dl_phdr_info *info, size_t, void *data) {
            const Visit &given = *static_cast<Visit *>(data);
            return given.visit(info->dlpi_name, given.context) ? 1 : 0;
        },
        &wanted);
}

}  // namespace da8w4
