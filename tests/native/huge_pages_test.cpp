// Memory for weights: alignment, sharing, what goes back to the system, forks. Linked with --wrap=posix_memalign and
// --wrap=free, which count arenas and can refuse memory.
#include <errno.h>
#include <stdlib.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "check.h"
#include "child.h"
#include "pyda8w4/pyda8w4.h"

namespace {

constexpr size_t kKiB = 1024, kMiB = 1024 * kKiB, kHugePage = 2 * kMiB, kArena = 16 * kMiB;
constexpr size_t kMostArenas = 64;

std::atomic<bool> refuse{false};
std::atomic<void *> arenas[kMostArenas];
std::atomic<size_t> last_bytes{0};

size_t count_arenas() {
    size_t count = 0;
    for (const std::atomic<void *> &arena : arenas) count += arena != nullptr;
    return count;
}

}  // namespace

extern "C" int __real_posix_memalign(void **, size_t, size_t);
extern "C" int __wrap_posix_memalign(void **memory, size_t alignment, size_t bytes) {
    last_bytes = bytes;
    if (refuse) return ENOMEM;
    const int error = __real_posix_memalign(memory, alignment, bytes);
    if (error || bytes != kArena) return error;
    for (std::atomic<void *> &arena : arenas) {
        void *none = nullptr;
        if (arena.compare_exchange_strong(none, *memory)) break;
    }
    return 0;
}
extern "C" void __real_free(void *);
extern "C" void __wrap_free(void *memory) {
    for (std::atomic<void *> &arena : arenas) {
        void *this_one = memory;
        if (memory && arena.compare_exchange_strong(this_one, nullptr)) break;
    }
    __real_free(memory);
}

namespace {

bool aligned(const void *memory, size_t alignment) { return reinterpret_cast<uintptr_t>(memory) % alignment == 0; }

void check_sizes() {
    void *const before = da8w4_alloc(64 * kKiB);  // so that the next place in its arena is no border of huge pages
    CHECK(count_arenas() == 1 && aligned(before, 4096));
    for (const size_t bytes : {size_t{0}, size_t{1}, 64 * kKiB - 1, kHugePage, kHugePage + 1, 5 * kHugePage}) {
        last_bytes = 0;
        char *memory = static_cast<char *>(da8w4_alloc(bytes));
        CHECK(memory && last_bytes == (bytes ? bytes : 1));  // not from an arena
        CHECK(aligned(memory, bytes >= kHugePage ? kHugePage : 64));
        std::memset(memory, 1, bytes);
        da8w4_free(memory);
    }
    for (const size_t bytes : {64 * kKiB, 64 * kKiB + 1, kMiB, kHugePage - 1}) {
        last_bytes = 0;
        char *memory = static_cast<char *>(da8w4_alloc(bytes));
        CHECK(memory && last_bytes == 0 && aligned(memory, 4096));  // from the arena that is there
        std::memset(memory, 1, bytes);
        da8w4_free(memory);
    }
    da8w4_free(before);
    da8w4_free(nullptr);
}

// Pieces do not overlap, and what was released is taken again.
void check_pieces() {
    struct Piece {
        unsigned char *memory;
        size_t bytes;
        unsigned char value;
    };
    std::vector<Piece> pieces(60, Piece{nullptr, 0, 0});
    uint32_t random = 1;
    for (int i = 0; i < 6000; i++) {
        random = random * 1664525u + 1013904223u;
        Piece &piece = pieces[(random >> 8) % pieces.size()];
        if (piece.memory) {
            bool same = true;
            for (size_t at = 0; at < piece.bytes; at += 1021) same = same && piece.memory[at] == piece.value;
            CHECK(same && piece.memory[piece.bytes - 1] == piece.value);
            da8w4_free(piece.memory);
            piece.memory = nullptr;
        } else {
            piece.bytes = 64 * kKiB + (random >> 4) % (kMiB / 2);
            piece.value = static_cast<unsigned char>(random >> 24);
            piece.memory = static_cast<unsigned char *>(da8w4_alloc(piece.bytes));
            CHECK(piece.memory != nullptr);
            for (size_t at = 0; at < piece.bytes; at += 1021) piece.memory[at] = piece.value;
            piece.memory[piece.bytes - 1] = piece.value;
        }
    }
    for (const Piece &piece : pieces) da8w4_free(piece.memory);
}

void check_empty_arenas_go_back() {
    for (const bool backwards : {false, true}) {
        std::vector<void *> pieces;
        for (int i = 0; i < 160; i++) pieces.push_back(da8w4_alloc(kMiB));
        CHECK(count_arenas() == 10);
        for (size_t i = 0; i < pieces.size(); i++) da8w4_free(pieces[backwards ? pieces.size() - 1 - i : i]);
        CHECK(count_arenas() == 1);  // for the next weight
    }
    void *const again = da8w4_alloc(kMiB);
    CHECK(count_arenas() == 1);
    da8w4_free(again);
}

void check_no_memory() {
    std::vector<void *> pieces;
    for (int i = 0; i < 16; i++) pieces.push_back(da8w4_alloc(kMiB));  // the arena is full
    refuse = true;
    for (const size_t bytes : {size_t{1}, kMiB, kHugePage}) CHECK(da8w4_alloc(bytes) == nullptr);
    refuse = false;
    for (void *piece : pieces) da8w4_free(piece);
}

void check_forks() {
    std::atomic<bool> stop{false};
    std::thread other([&] {
        while (!stop) da8w4_free(da8w4_alloc(100 * kKiB));
    });
    for (int repeat = 0; repeat < 100; repeat++)
        CHECK(in_child([] {
            void *memory = da8w4_alloc(100 * kKiB);
            if (memory) std::memset(memory, 1, 100 * kKiB);
            da8w4_free(memory);
            return memory != nullptr;
        }));
    stop = true;
    other.join();
}

}  // namespace

int main() {
    check_sizes();
    check_pieces();
    check_empty_arenas_go_back();
    check_no_memory();
    check_forks();
    return check_result();
}
