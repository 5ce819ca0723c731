// Memory for packed weights: aligned, and in huge pages. Weights are read from DRAM, and in pages of 4 KiB each 64
// lines cost a walk through the page tables. What is smaller than a huge page shares some: the layers of a small
// model do, and the scales of a large one.
#include <pthread.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include "types.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace da8w4 {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kShared = size_t{64} << 10;  // from here on: below, a few pages of 4 KiB do
constexpr size_t kUnit = 4096;                // of what shares
constexpr size_t kUnits = 8 * kHugePage / kUnit;

// Whole pages only: a tail shares its page with other allocations. Refusal costs only speed.
void ask_for_huge_pages(void *memory, size_t bytes) {
#if defined(__linux__)
    (void)madvise(memory, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

void *allocate(size_t bytes) {
    void *memory = nullptr;
    if (posix_memalign(&memory, bytes < kHugePage ? 64 : kHugePage, bytes ? bytes : 1) != 0) return nullptr;
    if (bytes >= kHugePage) ask_for_huge_pages(memory, bytes);
    return memory;
}

// Huge pages that are shared, cut into units: first fit. Pages that nothing has touched take no memory.
class Shelf {
public:
    explicit Shelf(void *memory) : memory_(static_cast<char *>(memory)) {}
    ~Shelf() { std::free(memory_); }
    Shelf(const Shelf &) = delete;
    Shelf &operator=(const Shelf &) = delete;

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

    void give_back(const void *memory) {
        size_t unit = static_cast<size_t>(static_cast<const char *>(memory) - memory_) / kUnit;
        for (bool last = false; !last; taken_--) {
            last = use_[unit] == kLast;
            use_[unit++] = kFree;
        }
    }

    bool empty() const { return taken_ == 0; }

    Shelf *next = nullptr;

private:
    enum : char { kFree, kTaken, kLast };  // of an allocation
    char *memory_;
    size_t taken_ = 0;
    char use_[kUnits] = {};
};

class Shelves {
public:
    void *take(size_t bytes) {
        const size_t units = ceil_div(bytes, kUnit);
        std::lock_guard<std::mutex> lock(mutex);
        for (Shelf *shelf = first_; shelf; shelf = shelf->next)
            if (void *memory = shelf->take(units)) return memory;
        void *memory = allocate(kUnits * kUnit);
        Shelf *shelf = memory ? new (std::nothrow) Shelf(memory) : nullptr;
        if (!shelf) return std::free(memory), nullptr;
        shelf->next = first_;
        first_ = shelf;
        return shelf->take(units);
    }

    // False if it is not from here.
    bool give_back(void *memory) {
        std::lock_guard<std::mutex> lock(mutex);
        for (Shelf **at = &first_; *at; at = &(*at)->next) {
            Shelf *shelf = *at;
            if (!shelf->holds(memory)) continue;
            shelf->give_back(memory);
            // The last one stays, for the next weight: asking the system for pages takes longer than packing one.
            if (shelf->empty() && (shelf != first_ || shelf->next)) {
                *at = shelf->next;
                delete shelf;
            }
            return true;
        }
        return false;
    }

    std::mutex mutex;

private:
    Shelf *first_ = nullptr;
};

// Never destroyed: weights may be freed while the process exits. A fork waits until no thread is in here, so that
// the child's are whole.
Shelves &shelves = *[] {
    static Shelves *all = new Shelves;
    pthread_atfork([] { all->mutex.lock(); }, [] { all->mutex.unlock(); }, [] { all->mutex.unlock(); });
    return all;
}();

}  // namespace
}  // namespace da8w4

void *da8w4_alloc(size_t bytes) {
    using namespace da8w4;
    if (bytes >= kShared && bytes < kHugePage)
        if (void *memory = shelves.take(bytes)) return memory;
    return allocate(bytes);
}

void da8w4_free(void *memory) {
    if (memory && !da8w4::shelves.give_back(memory)) std::free(memory);
}
