// Threads, memory, and several callers at once.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <thread>

#include "child.h"
#include "harness.h"
#include "product.h"

namespace check {
namespace {

void check_threads(const Trial &) {
    da8w4_set_num_threads(5);
    expect(da8w4_get_num_threads() == 5, "set_num_threads(5) gives %zu", da8w4_get_num_threads());
    da8w4_set_num_threads(0);
    expect(da8w4_get_num_threads() >= 1 && da8w4_thread_runtime()[0], "no threads");
}

// Ten products by one caller; whether each was what it should be.
bool multiply_repeatedly(const Product &product, const char *kernel, const std::vector<uint8_t> &want) {
    da8w4_call call = product.call();
    call.kernel = kernel;
    call.workspace_bytes = da8w4_workspace_bytes(&call);
    call.workspace = da8w4_alloc(call.workspace_bytes);
    bool same = true;
    for (int i = 0; i < 10; i++) {
        std::vector<uint8_t> out(want.size());
        for (size_t at = 0; at < out.size(); at++) out[at] = Guarded::garbage(at);
        call.out = out.data();
        same = same && product.status(call) == DA8W4_OK && out == want;
    }
    da8w4_free(call.workspace);
    return same;
}

// Several threads call at the same time, with one weight and one pool.
void check_callers(const Trial &trial) {
    const Weight weight = random_weight(trial.random, {95, 600, 128});
    Random draws = trial.random.child("operands");
    const Operands operands = random_operands(draws, weight.matrix, 20, draws.one_in(2));
    const Product product(operands, weight);
    const std::vector<uint8_t> want = product.run(trial.random.child("scalar"), "scalar");
    for (const std::string &kernel : kernels_and_scalar()) {
        now(kernel.c_str(), "four callers at once");
        da8w4_set_num_threads(3);
        bool same[4] = {};
        std::vector<std::thread> callers;
        for (bool &mine : same)
            callers.emplace_back([&] { mine = multiply_repeatedly(product, kernel.c_str(), want); });
        for (std::thread &caller : callers) caller.join();
        expect(same[0] && same[1] && same[2] && same[3], "calls at the same time disturb each other");
    }
}

// Each size is taken while the smaller ones are held, so that it cannot be aligned by being the first of its pool.
void check_alignment(const Trial &) {
    std::vector<void *> held;
    for (size_t bytes : {size_t{0}, size_t{1}, size_t{1000}, size_t{100000}, size_t{2} << 20, size_t{3} << 20}) {
        void *memory = da8w4_alloc(bytes);
        const size_t alignment = bytes >= size_t{2} << 20 ? size_t{2} << 20 : 64;
        expect(memory && reinterpret_cast<uintptr_t>(memory) % alignment == 0, "alloc(%zu)", bytes);
        if (memory) memset(memory, 1, bytes);
        held.push_back(memory);
    }
    for (void *memory : held) da8w4_free(memory);
    da8w4_free(nullptr);
}

// One allocation, marked at every page and at the end: a neighbour's marks would be others.
class Piece {
public:
    bool taken() const { return memory_; }
    // False where there is no memory, or none that is aligned.
    bool take(size_t bytes, uint8_t mark) {
        bytes_ = bytes;
        mark_ = mark;
        memory_ = static_cast<uint8_t *>(da8w4_alloc(bytes));
        if (!memory_) return false;
        for (size_t at = 0; at < bytes_; at += 4096) memory_[at] = mark_;
        memory_[bytes_ - 1] = mark_;
        return reinterpret_cast<uintptr_t>(memory_) % 64 == 0;
    }
    // False if it does not hold its marks any more.
    bool give_back() {
        bool kept = memory_[bytes_ - 1] == mark_;
        for (size_t at = 0; at < bytes_; at += 4096) kept = kept && memory_[at] == mark_;
        da8w4_free(memory_);
        memory_ = nullptr;
        return kept;
    }

private:
    uint8_t *memory_ = nullptr;
    size_t bytes_ = 0;
    uint8_t mark_ = 0;
};

// Takes and gives back memory of all sizes in any order; how often something was wrong.
size_t juggle_memory(Random random) {
    constexpr size_t kPieces = 40, kSteps = 3000;
    Piece pieces[kPieces];
    size_t bad = 0;
    for (size_t step = 0; step < kSteps; step++) {
        Piece &piece = pieces[random.below(kPieces)];
        if (piece.taken()) {
            bad += !piece.give_back();
        } else {
            const size_t order = 10 + random.below(12), bytes = (size_t{1} << order) + random.below(size_t{1} << order);
            bad += !piece.take(bytes, static_cast<uint8_t>(1 + random.below(255)));
        }
    }
    for (Piece &piece : pieces)
        if (piece.taken()) bad += !piece.give_back();
    return bad;
}

void check_memory(const Trial &trial) {
    std::atomic<size_t> bad{0};
    std::vector<std::thread> threads;
    for (size_t thread = 0; thread < 3; thread++)
        threads.emplace_back([&, thread] { bad += juggle_memory(trial.random.child(uint64_t{thread})); });
    for (std::thread &thread : threads) thread.join();
    expect(bad == 0, "%zu pieces do not hold what was written", bad.load());
    void *const memory = da8w4_alloc(100000);
    da8w4_free(memory);
    for (size_t i = 0; i < 3; i++) {
        void *const again = da8w4_alloc(100000);
        expect(again == memory, "memory that was given back is not taken again");
        da8w4_free(again);
    }
}

// A fork while another thread takes memory: the child can take some, too.
void check_memory_of_children(const Trial &) {
    if (!can_fork) {
        printf("forks is not checked: this system has none\n");
        return;
    }
    std::atomic<bool> stop{false};
    std::thread other([&] {
        while (!stop) da8w4_free(da8w4_alloc(100000));
    });
    bool good = true;
    for (size_t i = 0; i < 100 && good; i++) {
        good = in_child([] {
            void *memory = da8w4_alloc(100000);
            return memory && memset(memory, 1, 100000);
        });
        expect(good, "forked child %zu hangs, or gets no memory", i);
    }
    stop = true;
    other.join();
}

}  // namespace

std::vector<Test> runtime_tests() {
    return {
        {"threads", "the number of threads", 1, 1, false, check_threads},
        {"callers", "several callers at once", 1, 1, false, check_callers},
        {"alignment", "memory is aligned", 1, 1, false, check_alignment},
        {"memory", "memory taken and given back by several threads", 1, 1, false, check_memory},
        {"forks", "memory in forked children", 1, 1, false, check_memory_of_children},
    };
}

}  // namespace check
