#include "harness.h"

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "pyda8w4/pyda8w4.h"
#include "system.h"

namespace check {
namespace {

struct Counts {
    size_t passed = 0, failed = 0;
};

constexpr size_t kFailuresShown = 20;  // of one test

const char *program;
Options options;
std::vector<std::string> checked_kernels;
bool check_scalar;

const Test *test;
size_t case_index;
std::string kernel;
Counts counts;                            // of the test
std::map<std::string, Counts> of_kernel;  // of all tests

// Written before each call, because a handler of signals can only copy it out.
char current[640], replay[512];

void say_replay() {
    char seed[32] = "", of_one_kernel[80] = "";
    if (options.seed != Options().seed)
        snprintf(seed, sizeof seed, " --seed %llu", static_cast<unsigned long long>(options.seed));
    if (!kernel.empty()) snprintf(of_one_kernel, sizeof of_one_kernel, " --kernel %s", kernel.c_str());
    snprintf(replay, sizeof replay, "%s%s%s --test %s/%zu", program, seed, of_one_kernel, test->name, case_index);
}

void crashed(int signal) {
    write_now("CRASHED in ");
    write_now(current);
    write_now("\n    again: ");
    write_now(replay);
    write_now("\n");
    std::signal(signal, SIG_DFL);  // the instruction is run again, and ends the process
}

void report_crashes() {
    for (int signal : {SIGSEGV, SIGILL, SIGFPE}) std::signal(signal, crashed);
#ifdef SIGBUS
    std::signal(SIGBUS, crashed);
#endif
}

// Chooses kernels: 0, or the exit status of a program that has no kernel to check: 77, by which Meson knows a test that
// is skipped, where the CPU lacks what the kernel needs.
int choose_kernels() {
    constexpr int kUnknown = 2, kSkipped = 77;
    check_scalar = options.kernel.empty() || options.kernel == "scalar";
    int status = check_scalar ? 0 : kUnknown;
    for (size_t i = 0; i < da8w4_kernel_count(); i++) {
        const std::string name = da8w4_kernel_name(i);
        if (name == "scalar" || (!options.kernel.empty() && name != options.kernel)) continue;
        if (const char *reason = da8w4_kernel_reason(i)) {
            printf("%s is not checked: %s\n", name.c_str(), reason);
            if (status == kUnknown) status = kSkipped;
        } else {
            checked_kernels.push_back(name);
            status = 0;
        }
    }
    return status;
}

// Whether the options choose this case of the test.
bool chosen(const Test &candidate, const Trial &trial) {
    const std::string name = candidate.name, one = name + "/" + std::to_string(trial.index);
    if (!options.test.empty() && options.test == one) return true;
    if (!options.test.empty() && options.test != name) return false;
    return !options.quick || candidate.quick == 1 || trial.random.child("quick").one_in(candidate.quick);
}

// Runs the chosen cases of a test, and returns how many there were.
size_t run_test(const Test &next) {
    test = &next;
    counts = {};
    const auto begin = std::chrono::steady_clock::now();
    const Random random = Random(options.seed).child(next.name);
    size_t cases = 0;
    for (case_index = 0; case_index < next.cases; case_index++) {
        const Trial trial = {case_index, random.child(uint64_t{case_index}), options.quick};
        if (!chosen(next, trial)) continue;
        cases++;
        now(nullptr, "%s", next.about);
        next.run(trial);
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    if (cases && !options.bench)
        printf("%-16s %4zu cases %7zu passed, %zu failed %6.1f s\n", next.name, cases, counts.passed, counts.failed,
               seconds.count());
    return cases;
}

}  // namespace

const std::vector<std::string> &kernels() { return checked_kernels; }

bool scalar_wanted() { return check_scalar; }

std::vector<std::string> kernels_and_scalar() {
    std::vector<std::string> all = checked_kernels;
    if (check_scalar) all.push_back("scalar");
    return all;
}

void now(const char *of, const char *format, ...) {
    kernel = of ? of : "";
    const int length = snprintf(current, sizeof current, "%s/%zu: ", test->name, case_index);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(current + length, sizeof current - static_cast<size_t>(length), format, arguments);
    va_end(arguments);
    say_replay();
}

void expect(bool good, const char *format, ...) {
    Counts &mine = of_kernel[kernel];
    if (good) {
        counts.passed++;
        mine.passed++;
        return;
    }
    mine.failed++;
    if (counts.failed++ == kFailuresShown) printf("FAILED %s: more, which are not shown\n", test->name);
    if (counts.failed > kFailuresShown) return;
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    printf("FAILED %s\n    in %s\n    again: %s\n", text, current, replay);
}

bool timing() { return options.bench; }

void time_call(const std::function<void()> &call) {
    constexpr size_t kRepeats = 9;
    constexpr double kLeastNanoseconds = 20000;  // of one repeat, far above the clock's own time
    const auto nanoseconds = [&](size_t calls) {
        const auto begin = std::chrono::steady_clock::now();
        for (size_t i = 0; i < calls; i++) call();
        return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - begin).count();
    };
    call();
    size_t calls = 1;
    while (nanoseconds(calls) < kLeastNanoseconds) calls *= 2;
    double times[kRepeats];
    for (double &time : times) time = nanoseconds(calls) / static_cast<double>(calls);
    std::nth_element(times, times + kRepeats / 2, times + kRepeats);
    printf("%12.0f ns  %-12s %s\n", times[kRepeats / 2], kernel.empty() ? "-" : kernel.c_str(), current);
    counts.passed++;
}

int run_tests(const std::vector<Test> &tests, const Options &asked, const char *name) {
    program = name;
    options = asked;
    setvbuf(stdout, nullptr, _IOLBF, 0);
    if (const int status = choose_kernels()) {
        fprintf(stderr, "no kernel %s that can run here\n", options.kernel.c_str());
        return status;
    }
    report_crashes();

    printf("seed %llu\n", static_cast<unsigned long long>(options.seed));
    size_t cases = 0;
    Counts all;
    for (const Test &next : tests) {
        if (options.bench && !next.timed) continue;
        cases += run_test(next);
        all.passed += counts.passed;
        all.failed += counts.failed;
    }
    if (!cases) {
        fprintf(stderr, "no test or case %s%s; --list names them\n", options.test.c_str(),
                options.bench ? " that can be timed" : "");
        return 2;
    }
    if (options.bench) return 0;
    for (const auto &of : of_kernel)
        printf("%-16s %18zu passed, %zu failed\n", of.first.empty() ? "no kernel" : of.first.c_str(), of.second.passed,
               of.second.failed);
    printf("%zu passed, %zu failed\n", all.passed, all.failed);
    return all.failed != 0 || all.passed == 0;
}

}  // namespace check
