// Memory for packed weights: aligned, and in huge pages. Weights are read from DRAM, and in pages of 4 KiB each 64
// lines cost a walk through the page tables. Allocations smaller than a huge page share some: the layers of a small
// model do, and the scales of a large one.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "platform/memory.h"
#include "platform/threads.h"
#include "pyda8w4/pyda8w4.h"

namespace da8w4 {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLeastShared = size_t{64} << 10;  // a smaller allocation has a few pages of 4 KiB
constexpr size_t kUnit = 4096;                     // of the allocations that share
constexpr size_t kUnits = 8 * kHugePage / kUnit;   // of an arena

void *allocate(size_t bytes) {
    if (bytes < kHugePage) return allocate_aligned(64, bytes ? bytes : 1);
    void *memory = allocate_aligned(kHugePage, bytes);
    // Whole pages only: a tail shares its page with other allocations.
    if (memory) ask_for_huge_pages(memory, bytes / kHugePage * kHugePage);
    return memory;
}

// 16 MiB of huge pages for allocations of 64 KiB to 2 MiB, in units of 4 KiB, first fit. Untouched pages are not
// resident.
class HugePageArena {
public:
    explicit HugePageArena(void *memory) : memory_(static_cast<char *>(memory)) {}
    ~HugePageArena() { free_aligned(memory_); }
    HugePageArena(const HugePageArena &) = delete;
    HugePageArena &operator=(const HugePageArena &) = delete;

    void *take(size_t units) {
        for (size_t begin = 0, end = 0; kUnits - taken_ >= units && end < kUnits;) {
            if (use_[end++] != kFree) {
                begin = end;
            } else if (end - begin == units) {
                std::memset(use_ + begin, kTaken, units - 1);
                use_[end - 1] = kLast;
                taken_ += units;
                return memory_ + begin * kUnit;
            }
        }
        return nullptr;
    }

    bool holds(const void *memory) const {
        return reinterpret_cast<uintptr_t>(memory) - reinterpret_cast<uintptr_t>(memory_) < kUnits * kUnit;
    }

    void release(const void *memory) {
        size_t unit = static_cast<size_t>(static_cast<const char *>(memory) - memory_) / kUnit;
        for (bool last = false; !last; taken_--) {
            last = use_[unit] == kLast;
            use_[unit++] = kFree;
        }
    }

    bool empty() const { return taken_ == 0; }

    HugePageArena *next = nullptr;

private:
    enum : char { kFree, kTaken, kLast };  // of an allocation
    char *memory_;
    size_t taken_ = 0;
    char use_[kUnits] = {};
};

// Never destroyed: weights may be freed while the process exits.
Mutex arenas_mutex;
HugePageArena *first_arena = nullptr;

void *take(size_t bytes) {
    const size_t units = (bytes + kUnit - 1) / kUnit;
    const Lock lock(arenas_mutex);
    for (HugePageArena *arena = first_arena; arena; arena = arena->next)
        if (void *memory = arena->take(units)) return memory;
    void *memory = allocate(kUnits * kUnit);
    void *place = memory ? std::malloc(sizeof(HugePageArena)) : nullptr;
    if (!place) return free_aligned(memory), nullptr;
    HugePageArena *arena = new (place) HugePageArena(memory);
    arena->next = first_arena;
    first_arena = arena;
    return arena->take(units);
}

// False if no arena holds it.
bool release(void *memory) {
    const Lock lock(arenas_mutex);
    for (HugePageArena **link = &first_arena; *link; link = &(*link)->next) {
        HugePageArena *arena = *link;
        if (!arena->holds(memory)) continue;
        arena->release(memory);
        // The only arena stays, for the next weight: asking the system for pages takes longer than packing one.
        if (arena->empty() && (arena != first_arena || arena->next)) {
            *link = arena->next;
            arena->~HugePageArena();
            std::free(arena);
        }
        return true;
    }
    return false;
}

// A fork waits until no thread is in here, so that the child's arenas are whole.
__attribute__((constructor)) void watch_forks() {
    on_fork([] { arenas_mutex.lock(); }, [] { arenas_mutex.unlock(); }, [] { arenas_mutex.unlock(); });
}

}  // namespace
}  // namespace da8w4

void *da8w4_alloc(size_t bytes) {
    if (bytes >= da8w4::kLeastShared && bytes < da8w4::kHugePage)
        if (void *memory = da8w4::take(bytes)) return memory;
    return da8w4::allocate(bytes);
}

void da8w4_free(void *memory) {
    if (memory && !da8w4::release(memory)) da8w4::free_aligned(memory);
}
