// Where the threads of a parallel region wait for each other.
#pragma once

#include <atomic>
#include <cstddef>

namespace da8w4 {

// Made by the caller of a region, and used by all of its threads; a new one for each region.
class Barrier {
public:
    // Returns when all `threads` threads of the region have called it as often as this one.
    void wait(size_t threads);

private:
    std::atomic<size_t> arrived_{0};
    std::atomic<size_t> round_{0};
};

}  // namespace da8w4
