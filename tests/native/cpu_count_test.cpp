// CPUs by cgroup quota, read from files under a folder of the test, and by affinity.
#include "runtime/cpu_count.h"

#include <sched.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "check.h"
#include "child.h"
#include "platform/linux/cgroup.h"

using da8w4::allowed_cpus;
using da8w4::cgroup_cpus;

namespace {

struct File {
    std::string path, text;
};

size_t cpus_with(const std::string &cgroup, const std::vector<File> &files) {
    char root[] = "/tmp/cpu_count_test.XXXXXX";
    if (!mkdtemp(root)) return SIZE_MAX;
    auto write = [&](const std::string &path, const std::string &text) {
        const std::filesystem::path full = root + path;
        std::filesystem::create_directories(full.parent_path());
        std::ofstream(full) << text;
    };
    write("/proc/self/cgroup", cgroup);
    for (const File &file : files) write("/sys/fs/cgroup/" + file.path, file.text);
    const size_t cpus = cgroup_cpus(root);
    std::filesystem::remove_all(root);
    return cpus;
}

void check_version_2() {
    CHECK(cpus_with("0::/\n", {{"cpu.max", "100000 100000\n"}}) == 1);
    CHECK(cpus_with("0::/\n", {{"cpu.max", "250000 100000\n"}}) == 3);  // rounded up
    CHECK(cpus_with("0::/\n", {{"cpu.max", "1000 100000\n"}}) == 1);
    CHECK(cpus_with("0::/\n", {{"cpu.max", "max 100000\n"}}) == 0);
    CHECK(cpus_with("0::/a/b\n", {{"a/b/cpu.max", "max 100000\n"}, {"a/cpu.max", "50000 100000\n"}}) == 1);
    CHECK(cpus_with("0::/a/b\n", {{"a/b/cpu.max", "400000 100000\n"}, {"cpu.max", "200000 100000\n"}}) == 2);
    CHECK(cpus_with("0::/a/b\n", {{"a/b/cpu.max", "200000 100000\n"}, {"cpu.max", "400000 100000\n"}}) == 2);
    // The path is the host's, of which the container sees the end.
    CHECK(cpus_with("0::/docker/1\n", {{"cpu.max", "100000 100000\n"}}) == 1);
    CHECK(cpus_with("0::/a", {{"a/cpu.max", "100000 100000"}}) == 1);  // without an end of line
}

void check_version_1() {
    auto quota = [](const std::string &folder, const char *us, const char *period) -> std::vector<File> {
        return {{folder + "/cpu.cfs_quota_us", us}, {folder + "/cpu.cfs_period_us", period}};
    };
    CHECK(cpus_with("4:cpu,cpuacct:/docker/1\n", quota("cpu", "100000\n", "100000\n")) == 1);
    CHECK(cpus_with("4:cpuacct,cpu:/a\n", quota("cpu/a", "300000\n", "100000\n")) == 3);
    CHECK(cpus_with("1:cpu:/a\n", quota("cpu/a", "100000\n", "50000\n")) == 2);
    CHECK(cpus_with("1:cpu:/a\n", quota("cpu/a", "-1\n", "100000\n")) == 0);
    CHECK(cpus_with("1:cpuset:/a\n", quota("cpu/a", "100000\n", "100000\n")) == 0);  // another controller
    CHECK(cpus_with("1:cpu:/a\n", {{"cpu/a/cpu.cfs_quota_us", "100000\n"}}) == 0);
    // Both versions: the tighter one counts, whichever line comes first.
    std::vector<File> both = quota("cpu/a", "200000\n", "100000\n");
    both.push_back({"b/cpu.max", "300000 100000\n"});
    CHECK(cpus_with("9:memory:/m\n1:cpu:/a\n0::/b\n", both) == 2);
    CHECK(cpus_with("0::/b\n1:cpu:/a\n", both) == 2);
}

void check_other_text() {
    for (const char *text : {"", "max", "100000", "0 0", "100000 0", "-1 100000", "x y", "100000 x"})
        CHECK(cpus_with("0::/\n", {{"cpu.max", text}}) == 0);
    for (const char *cgroup : {"", "\n", "0", "0:", ":::", "0::", "cpu\n\n", "1:cpu"})
        CHECK(cpus_with(cgroup, {{"a/cpu.max", "100000 100000\n"}}) == 0);
    CHECK(cpus_with("0::/" + std::string(5000, 'a') + "\n", {{"cpu.max", "100000 100000\n"}}) == 0);  // no such path
    CHECK(cgroup_cpus("/nowhere") == 0);
}

// A child may be given other CPUs.
void check_fork() {
    cpu_set_t set;
    CHECK(sched_getaffinity(0, sizeof set, &set) == 0);
    CHECK(allowed_cpus() >= 1 && allowed_cpus() <= static_cast<size_t>(CPU_COUNT(&set)));
    if (allowed_cpus() == 1) std::puts("there is only one CPU: the child's cannot be fewer");
    CHECK(in_child([&] {
        int first = 0;
        while (!CPU_ISSET(first, &set)) first++;
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(first, &one);
        return sched_setaffinity(0, sizeof one, &one) == 0 && allowed_cpus() == 1;
    }));
}

}  // namespace

int main() {
    check_version_2();
    check_version_1();
    check_other_text();
    check_fork();
    return check_result();
}
