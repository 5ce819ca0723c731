// One pool of threads in the process: that of an OpenMP runtime which is already loaded (torch brings
// one), else our own. Two pools would have their idle threads spin on each other's CPUs.
#pragma once

#include <type_traits>

#include "runtime/thread_pool.h"

namespace da8w4 {

// The number of threads that a call may use: see da8w4_set_num_threads.
size_t num_threads();

// Calls work(context, thread, threads) once for each thread = 0 .. threads-1, in parallel, and returns
// when all have. `threads` is at most `wanted`; it is 1 in a nested call or while another caller has
// our own pool. Floating point is in its default state inside.
void parallel(size_t wanted, Work work, void *context);

// The same for a callable.
template <class Callable>
void parallel(size_t wanted, Callable &&callable) {
    using Type = std::remove_reference_t<Callable>;
    parallel(
        wanted, [](void *context, size_t thread, size_t threads) { (*static_cast<Type *>(context))(thread, threads); },
        &callable);
}

// Part `part` of `parts` of 0..count, contiguous and as even as can be.
struct Range {
    size_t begin, end;
};
inline Range part_of(size_t count, size_t part, size_t parts) {
    const size_t each = count / parts, more = count % parts;
    const size_t begin = part * each + (part < more ? part : more);
    return {.begin = begin, .end = begin + each + (part < more)};
}

}  // namespace da8w4
