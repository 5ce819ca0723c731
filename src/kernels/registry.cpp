#include "kernels/registry.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "runtime/cpu.h"

namespace da8w4 {

// kernel_list.inc is written by Meson: one DA8W4_KERNEL(name) for each kernel built, best first.
#define DA8W4_KERNEL(name) extern const Kernel kernel_##name;
#include "kernel_list.inc"
#undef DA8W4_KERNEL

namespace {

const Kernel *const kernels[] = {
#define DA8W4_KERNEL(name) &kernel_##name,
#include "kernel_list.inc"
#undef DA8W4_KERNEL
};
constexpr size_t kCount = sizeof kernels / sizeof *kernels;

// CPU bits that a kernel needs and this machine lacks.
uint64_t lacking(const Kernel &kernel) { return kernel.needs & ~cpu_bits(); }

// One text for each kernel, written when the library is loaded, so that any thread may read them.
class Reasons {
public:
    Reasons() {
        for (size_t i = 0; i < kCount; i++)
            for (size_t f = 0; f < cpu_feature_count; f++)
                if (lacking(*kernels[i]) & cpu_features[f].bit) {
                    add(texts_[i], texts_[i][0] ? ", " : "the CPU or its operating system lacks ");
                    add(texts_[i], cpu_features[f].name);
                }
    }
    const char *of(size_t index) const { return texts_[index][0] ? texts_[index] : nullptr; }

private:
    static constexpr size_t kBytes = 256;

    static void add(char *text, const char *more) { std::strncat(text, more, kBytes - 1 - std::strlen(text)); }

    char texts_[kCount][kBytes] = {};
};

const Reasons reasons;

KernelChoice choose(const char *name) {
    size_t index = 0;
    while (index < kCount && std::strcmp(kernels[index]->name, name) != 0) index++;
    if (index == kCount) return {.status = DA8W4_UNKNOWN_KERNEL, .index = index};
    return {.status = lacking(*kernels[index]) ? DA8W4_KERNEL_UNAVAILABLE : DA8W4_OK, .index = index};
}

KernelChoice choose_default() {
    const char *name = std::getenv("PYDA8W4_KERNEL");
    if (name && *name) return choose(name);
    size_t index = 0;
    while (lacking(*kernels[index])) index++;  // the last one, scalar, always is
    return {.status = DA8W4_OK, .index = index};
}

}  // namespace

size_t kernel_count() { return kCount; }
const Kernel &kernel_at(size_t index) { return *kernels[index]; }
const char *reason_not_runnable(size_t index) { return reasons.of(index); }

KernelChoice default_kernel() {
    // Every thread that asks at the same time finds the same. A guard of the compiler's would stay taken in the child
    // of a process that forks meanwhile.
    static std::atomic<bool> known{false};
    static std::atomic<size_t> index;
    static std::atomic<da8w4_status> status;
    if (!known.load(std::memory_order_acquire)) {
        const KernelChoice choice = choose_default();
        index.store(choice.index, std::memory_order_relaxed);
        status.store(choice.status, std::memory_order_relaxed);
        known.store(true, std::memory_order_release);
    }
    return {
        .status = status.load(std::memory_order_relaxed),
        .index = index.load(std::memory_order_relaxed),
    };
}

da8w4_status find_kernel(const char *name, const Kernel **kernel) {
    const KernelChoice choice = name ? choose(name) : default_kernel();
    if (choice.status == DA8W4_OK) *kernel = kernels[choice.index];
    return choice.status;
}

}  // namespace da8w4
