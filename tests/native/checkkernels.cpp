// Compares every kernel of the library with the kernel "scalar", bit for bit, and "scalar" with a plain evaluation of
// docs/numbers.md, and checks what else the C interface promises. It uses the C interface only.
//
// Every operand ends exactly at a page that cannot be touched, or begins right after one. Outputs and workspaces start
// out full of garbage, and what lies between the rows of an output must stay. Each call has its own number of threads
// and floating-point mode, and a workspace of exactly the bytes that it needs.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "harness.h"
#include "pyda8w4/pyda8w4.h"

namespace check {
namespace {

const char usage[] =
    "usage: %s [--seed N] [--quick] [--kernel NAME] [--test NAME[/INDEX]] [--bench | --list]\n"
    "  --quick   some of the cases\n"
    "  --kernel  only this one, against scalar\n"
    "  --test    only this test, or this case of it\n"
    "  --bench   times the calls of the cases on one thread, in nanoseconds, and checks nothing\n"
    "  --list    names the kernels and the tests\n";

std::vector<Test> all_tests() {
    std::vector<Test> all;
    for (const auto &tests : {interface_tests, bad_weight_tests, runtime_tests, quantize_tests, search_tests,
                              pack_tests, gemm_tests, edge_tests, gate_tests, expert_tests, explain_tests})
        for (const Test &test : tests()) all.push_back(test);
    return all;
}

void list() {
    printf("kernels:\n");
    for (size_t i = 0; i < da8w4_kernel_count(); i++) {
        const char *reason = da8w4_kernel_reason(i);
        printf("  %-16s %s%s%s\n", da8w4_kernel_name(i), da8w4_kernel_description(i), reason ? "; cannot run: " : "",
               reason ? reason : "");
    }
    printf("tests:\n");
    for (const Test &test : all_tests())
        printf("  %-16s %4zu cases%s  %s\n", test.name, test.cases, test.timed ? ", timed" : "       ", test.about);
}

// False if the arguments are not of the usage.
bool read_options(int count, char **arguments, Options *options, bool *only_list) {
    for (int i = 1; i < count; i++) {
        const char *const option = arguments[i], *const value = i + 1 < count ? arguments[i + 1] : nullptr;
        if (strcmp(option, "--list") == 0) {
            *only_list = true;
        } else if (strcmp(option, "--quick") == 0) {
            options->quick = true;
        } else if (strcmp(option, "--bench") == 0) {
            options->bench = true;
        } else if (!value) {
            return false;
        } else if (strcmp(option, "--seed") == 0) {
            char *end;
            options->seed = strtoull(arguments[++i], &end, 0);
            if (end == value || *end) return false;
        } else if (strcmp(option, "--kernel") == 0) {
            options->kernel = arguments[++i];
        } else if (strcmp(option, "--test") == 0) {
            options->test = arguments[++i];
        } else {
            return false;
        }
    }
    return true;
}

}  // namespace
}  // namespace check

int main(int count, char **arguments) {
    using namespace check;
    Options options;
    bool only_list = false;
    if (!read_options(count, arguments, &options, &only_list)) {
        fprintf(stderr, usage, arguments[0]);
        return 2;
    }
    if (only_list) {
        list();
        return 0;
    }
    return run_tests(all_tests(), options, arguments[0]);
}
