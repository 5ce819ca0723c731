#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <string>

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
constexpr size_t kernel_count = sizeof kernels / sizeof *kernels;

bool runnable(const Kernel &kernel) { return (kernel.needs & ~cpu_bits()) == 0; }

struct Choice {
    da8w4_status status;
    size_t index;
};

Choice choose_default() {
    const char *name = std::getenv("PYDA8W4_KERNEL");
    const bool forced = name && *name;
    for (size_t i = 0; i < kernel_count; i++) {
        if (forced && std::strcmp(kernels[i]->name, name) != 0) continue;
        if (runnable(*kernels[i])) return {DA8W4_OK, i};
        if (forced) return {DA8W4_KERNEL_UNAVAILABLE, i};
    }
    return {DA8W4_UNKNOWN_KERNEL, kernel_count};
}

const Choice &default_choice() {
    static const Choice choice = choose_default();
    return choice;
}

}  // namespace

da8w4_status find_kernel(const char *name, const Kernel **kernel) {
    if (!name) {
        const Choice &choice = default_choice();
        if (choice.status == DA8W4_OK) *kernel = kernels[choice.index];
        return choice.status;
    }
    for (const Kernel *candidate : kernels)
        if (std::strcmp(candidate->name, name) == 0) {
            if (!runnable(*candidate)) return DA8W4_KERNEL_UNAVAILABLE;
            *kernel = candidate;
            return DA8W4_OK;
        }
    return DA8W4_UNKNOWN_KERNEL;
}

}  // namespace da8w4

using namespace da8w4;

size_t da8w4_kernel_count() { return kernel_count; }

const char *da8w4_kernel_name(size_t index) { return index < kernel_count ? kernels[index]->name : nullptr; }

const char *da8w4_kernel_description(size_t index) {
    return index < kernel_count ? kernels[index]->description : nullptr;
}

const char *da8w4_kernel_reason(size_t index) {
    static const struct Reasons {
        std::string text[kernel_count];
        Reasons() {
            for (size_t i = 0; i < kernel_count; i++)
                for (size_t f = 0; f < cpu_feature_count; f++)
                    if (kernels[i]->needs & ~cpu_bits() & cpu_features[f].bit)
                        text[i] += (text[i].empty() ? "the CPU or its operating system lacks " : ", ") +
                                   std::string(cpu_features[f].name);
        }
    } reasons;
    if (index >= kernel_count) return "no such kernel";
    return runnable(*kernels[index]) ? nullptr : reasons.text[index].c_str();
}

da8w4_status da8w4_default_kernel(size_t *index) {
    if (!index) return DA8W4_BAD_ARGUMENT;
    *index = default_choice().index;
    return default_choice().status;
}

const char *da8w4_cpu_feature(size_t index, int *present) {
    if (index >= cpu_feature_count) return nullptr;
    if (present) *present = (cpu_bits() & cpu_features[index].bit) != 0;
    return cpu_features[index].name;
}

const char *da8w4_status_text(da8w4_status status) {
    switch (status) {
        case DA8W4_OK: return "no error";
        case DA8W4_BAD_ARGUMENT: return "a null pointer, a size of 0, an unknown type, or a stride too short";
        case DA8W4_BAD_GROUP: return "the group size is neither a multiple of 4 nor all of k";
        case DA8W4_BAD_CODE: return "a weight code is out of range";
        case DA8W4_BAD_SCALE: return "a weight scale is NaN or infinite";
        case DA8W4_BAD_OFFSET: return "a weight offset is NaN or infinite";
        case DA8W4_BAD_WEIGHT_ZP: return "a weight zero point is out of range";
        case DA8W4_INT32_OVERFLOW: return "a group's dot product may not fit int32";
        case DA8W4_BAD_ACT_ZP: return "an activation zero point is out of range";
        case DA8W4_UNKNOWN_KERNEL: return "no kernel has this name";
        case DA8W4_KERNEL_UNAVAILABLE: return "this CPU cannot run the kernel";
        case DA8W4_WORKSPACE_TOO_SMALL: return "the workspace is too small";
    }
    return "unknown status";
}
