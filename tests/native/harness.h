// What the checks are written with: cases that can be run alone, expectations, timing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "random.h"

namespace check {

// One case of a test.
struct Trial {
    size_t index;
    Random random;  // of the seed, the test's name and the index, so that --test NAME/INDEX draws the same again
    bool quick;
};

struct Test {
    const char *name;
    const char *about;
    size_t cases;
    size_t quick;  // --quick runs one case in so many
    bool timed;    // --bench times its calls
    void (*run)(const Trial &trial);
};

// The tests of one file; checkkernels.cpp runs them in this order.
std::vector<Test> interface_tests();
std::vector<Test> bad_weight_tests();
std::vector<Test> runtime_tests();  // they fork, which is cheap as long as the process is small
std::vector<Test> quantize_tests();
std::vector<Test> pack_tests();
std::vector<Test> search_tests();
std::vector<Test> gemm_tests();
std::vector<Test> edge_tests();
std::vector<Test> gate_tests();
std::vector<Test> expert_tests();
std::vector<Test> explain_tests();

struct Options {
    uint64_t seed = 20250101;
    bool quick = false, bench = false;
    std::string kernel;  // empty: all
    std::string test;    // empty: all
};

// Runs the tests that the options choose, and returns the exit status of the process.
int run_tests(const std::vector<Test> &tests, const Options &options, const char *program);

// The kernels whose results are compared with those of "scalar".
const std::vector<std::string> &kernels();
// Whether "scalar" itself is checked.
bool scalar_wanted();
// These kernels and, where it is wanted, "scalar".
std::vector<std::string> kernels_and_scalar();

// Says what runs from here on, for a failure or a crash; `kernel` is null where none is concerned.
__attribute__((format(printf, 2, 3))) void now(const char *kernel, const char *format, ...);

// Counts what holds, and says what does not. Only the main thread may call it.
__attribute__((format(printf, 2, 3))) void expect(bool good, const char *format, ...);

// Whether calls are timed instead of checked; prints the time of one call of what runs now.
bool timing();
void time_call(const std::function<void()> &call);

}  // namespace check
