// The pool's threads never end, so the library must stay where it is after dlclose. For Linux a flag of the linker says
// so.
#include <dlfcn.h>

namespace da8w4 {
namespace {

__attribute__((constructor)) void keep_loaded() {
    Dl_info library;
    if (dladdr(reinterpret_cast<void *>(keep_loaded), &library) != 0)
        dlopen(library.dli_fname, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE);
}

}  // namespace
}  // namespace da8w4
