#include "platform/openmp.h"

// None is used. What OpenMp needs of a runtime is GOMP_parallel, which takes a function and its argument. On Windows no
// runtime has it: neither vcomp140.dll nor LLVM's (libomp140.x86_64.dll, libiomp5md.dll), and their own entries are for
// compilers, which know more of the caller than a library does. So the library's own pool does the work; beside another
// pool it spins for a millisecond, and then sleeps.
namespace da8w4 {

const OpenMp *loaded_openmp() { return nullptr; }

const OpenMp *usable_openmp() { return nullptr; }

}  // namespace da8w4
