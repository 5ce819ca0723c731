// What da8w4_explain says of calls whose plan docs/architecture.md, docs/kernels.md and docs/amx.md give in advance,
// and that the loops behind the limits touch nothing but their memory.
#include <algorithm>
#include <iterator>
#include <string>

#include "guarded.h"
#include "harness.h"
#include "pyda8w4/pyda8w4.h"

namespace check {
namespace {

constexpr da8w4_status bad = DA8W4_BAD_ARGUMENT;

// A path that is wanted: part of its reason, or "" where there is none, and its codes.
struct Path {
    const char *kernel;
    bool fast;
    const char *reason;
    size_t codes;
};

struct Plan {
    bool unpacked;
    size_t act_rows, tile_rows, row_block, k_block;
    Path paths[2];
};

// Weights are of 40 columns, so that the last block is not whole.
constexpr size_t kN = 40;

struct Case {
    const char *kernel;
    size_t m, k, group;
    int zp;
    da8w4_scheme scheme;
    Plan want;
};

const char no_multiple[] = "no multiple of 16", longer[] = "longer than 256", shorter[] = "last group of k is shorter";
const char zps[] = "no room in a byte", few[] = "few rows", below[] = "below 20 k", one[] = "one path";
constexpr da8w4_scheme u8 = DA8W4_ACT_UINT8, s16 = DA8W4_ACT_INT16;

// From how many rows on panels are unpacked depends on the CPU: from 25 to 97.
const Case cases[] = {
    {"avx512vnni", 1, 1024, 128, 8, u8, {false, 1, 1, 1, 1024, {{"avx512vnni", true, "", kN * 1024}}}},
    {"avx512vnni", 7, 8192, 32, 8, u8, {false, 7, 4, 7, 4096, {{"avx512vnni", true, "", kN * 8192}}}},
    {"avx512vnni", 24, 4096, 32, -128, u8, {false, 24, 6, 24, 4096, {{"avx512vnni", true, "", kN * 4096}}}},
    {"avx512vnni", 49, 4096, 32, 8, u8, {true, 49, 6, 49, 2048, {{"avx512vnni", true, "", kN * 4096}}}},
    {"avx512vnni", 49, 4096, 32, -128, u8, {true, 49, 6, 49, 2048, {{"avx512vnni", false, zps, kN * 4096}}}},
    {"avx512vnni", 300, 4096, 128, 8, u8, {true, 300, 6, 150, 2048, {{"avx512vnni", true, "", kN * 4096}}}},
    {"avx512vnni", 12, 1024, 64, 8, s16, {false, 24, 3, 12, 1024, {{"avx512vnni", true, "", kN * 1024}}}},
    {"avx512vnni", 25, 1024, 64, 8, s16, {true, 50, 3, 25, 1024, {{"avx512vnni", true, "", kN * 1024}}}},
    {"avx512vnni", 1, 1024, 20, 8, u8, {false, 1, 1, 1, 1024, {{"avx512vnni", false, no_multiple, kN * 1024}}}},
    {"avx512vnni", 1, 4096, 4096, 8, u8, {false, 1, 1, 1, 4096, {{"avx512vnni", false, longer, kN * 4096}}}},
    {"avx512vnni",
     1,
     4112,
     128,
     8,
     u8,
     {false, 1, 1, 1, 4096, {{"avx512vnni", true, "", kN * 4096}, {"avx512vnni", false, shorter, kN * 16}}}},
    {"avxvnni", 25, 512, 64, -112, u8, {true, 25, 5, 25, 512, {{"avxvnni", true, "", kN * 512}}}},
    {"avxvnni", 25, 512, 64, -113, u8, {true, 25, 5, 25, 512, {{"avxvnni", false, zps, kN * 512}}}},
    {"avx2", 25, 512, 64, -113, u8, {true, 25, 4, 25, 512, {{"avx2", true, "", kN * 512}}}},
    {"avx2", 5, 512, 8, 0, u8, {false, 5, 3, 5, 512, {{"avx2", false, no_multiple, kN * 512}}}},
    {"amx", 16, 1024, 128, 8, u8, {false, 16, 6, 16, 1024, {{"avx512vnni", true, few, kN * 1024}}}},
    {"amx", 17, 1024, 128, 8, u8, {true, 17, 9, 17, 256, {{"amx", true, "", kN * 1024}}}},
    {"amx", 17, 1040, 128, 8, u8, {true, 17, 9, 17, 256, {{"amx", true, "", kN * 1040}}}},
    {"amx", 24, 1024, 32, 8, u8, {false, 24, 6, 24, 1024, {{"avx512vnni", true, few, kN * 1024}}}},
    {"amx", 25, 1024, 16, 8, u8, {true, 25, 13, 25, 256, {{"avx512vnni", true, below, kN * 1024}}}},
    {"amx", 17, 1024, 128, -128, u8, {true, 17, 9, 17, 256, {{"avx512vnni", false, zps, kN * 1024}}}},
    {"scalar", 300, 1024, 128, 8, u8, {false, 300, 2, 150, 1024, {{"scalar", false, one, kN * 1024}}}},
};

// A weight of which only sizes and zero points can be read.
da8w4_packed weight_of(size_t k, size_t group, int zp, const Guarded &nothing) {
    da8w4_packed weight = {};
    weight.n = kN;
    weight.k = k;
    weight.group = group;
    weight.zp = zp;
    weight.codes = nothing.as();
    weight.scales = nothing.as();
    weight.sums = nothing.as<float>();
    return weight;
}

da8w4_call call_of(const da8w4_packed *weight, size_t m, const char *kernel) {
    da8w4_call call = {};
    call.m = m;
    call.act_type = DA8W4_F32;
    call.weight = weight;
    call.kernel = kernel;
    call.threads = 1;
    return call;
}

bool runs(const char *kernel) {
    const std::vector<std::string> all = kernels_and_scalar();
    return std::find(all.begin(), all.end(), kernel) != all.end();
}

void expect_paths(const da8w4_explanation &found, const Path (&want)[2]) {
    size_t count = 0;
    while (count < std::size(want) && want[count].kernel) count++;
    expect(found.path_count == count, "%zu paths", found.path_count);
    for (size_t i = 0; i < count && i < found.path_count; i++) {
        const da8w4_path &path = found.paths[i];
        const std::string reason = path.reason ? path.reason : "";
        expect(path.kernel == std::string(want[i].kernel) && !path.fast == !want[i].fast &&
                   reason.empty() == !*want[i].reason && reason.find(want[i].reason) != std::string::npos &&
                   path.codes == want[i].codes,
               "path %zu: %s, fast %d, %zu codes: %s", i, path.kernel, path.fast, path.codes, reason.c_str());
    }
}

void check_case(const Trial &trial) {
    const Case &test = cases[trial.index];
    if (!runs(test.kernel)) return;
    now(test.kernel, "explain %zu rows, k %zu, groups of %zu, zero point %d", test.m, test.k, test.group, test.zp);
    const Guarded nothing(0, true);
    const da8w4_packed weight = weight_of(test.k, test.group, test.zp, nothing);
    da8w4_call call = call_of(&weight, test.m, test.kernel);
    call.scheme = test.scheme;
    da8w4_explanation found;
    const da8w4_status status = da8w4_explain(&call, &found);
    expect(status == DA8W4_OK, "%s", da8w4_status_text(status));
    if (status != DA8W4_OK) return;
    expect(found.kernel == std::string(test.kernel) && found.threads == 1, "%s, %zu threads", found.kernel,
           found.threads);
    expect(!found.unpacked == !test.want.unpacked && !found.unpacked == (test.m <= found.packed_max),
           "unpacked %d, packed up to %zu rows", found.unpacked, found.packed_max);
    expect(found.act_rows == test.want.act_rows && found.tile_rows == test.want.tile_rows &&
               found.row_block == test.want.row_block && found.k_block == test.want.k_block,
           "rows %zu, of a tile %zu, of a block %zu, K block %zu", found.act_rows, found.tile_rows, found.row_block,
           found.k_block);
    expect_paths(found, test.want.paths);
}

// One zero point of the last column block takes one panel off the fast path.
void check_one_zp(const Trial &) {
    if (!runs("avx512vnni")) return;
    now("avx512vnni", "explain one zero point of -128");
    std::vector<int8_t> each(2 * 32 * 32, 8);  // [column blocks][groups][32]
    each[32 * 32 + 5 * 32 + 7] = -128;
    const Guarded nothing(0, true), guarded(each, true);
    da8w4_packed weight = weight_of(4096, 128, 0, nothing);
    weight.zps = guarded.as<int8_t>();
    const da8w4_call call = call_of(&weight, 97, "avx512vnni");
    da8w4_explanation found;
    expect(da8w4_explain(&call, &found) == DA8W4_OK, "refused");
    expect_paths(found, {{"avx512vnni", true, "", kN * 4096 - 8 * 2048}, {"avx512vnni", false, zps, 8 * 2048}});
}

// 131072 products are worth a thread.
void check_useful_threads(const Trial &) {
    const Guarded nothing(0, true);
    const da8w4_packed weight = weight_of(4096, 128, 8, nothing);
    const struct {
        size_t m, threads, want;
    } tests[] = {{1, 8, 2}, {4, 8, 6}, {4, 3, 3}, {64, 8, 8}};
    for (const auto &test : tests) {
        now(nullptr, "explain %zu rows with %zu threads", test.m, test.threads);
        da8w4_call call = call_of(&weight, test.m, nullptr);
        call.threads = test.threads;
        da8w4_explanation found;
        expect(da8w4_explain(&call, &found) == DA8W4_OK && found.threads == test.want, "%zu threads", found.threads);
    }
}

void check_refusals(const Trial &) {
    const Guarded nothing(0, true);
    const da8w4_packed weight = weight_of(1024, 128, 8, nothing);
    da8w4_explanation found;
    da8w4_call call = call_of(&weight, 1, nullptr);
    expect(da8w4_explain(&call, nullptr) == bad && da8w4_explain(nullptr, &found) == bad, "a null pointer is taken");
    call.m = 0;
    expect(da8w4_explain(&call, &found) == bad, "no rows are explained");
    call = call_of(nullptr, 1, nullptr);
    expect(da8w4_explain(&call, &found) == bad, "no weight is explained");
    call = call_of(&weight, 1, "abacus");
    expect(da8w4_explain(&call, &found) == DA8W4_UNKNOWN_KERNEL, "an unknown kernel is explained");
    const Guarded memory(256, true);
    uint64_t time, made;
    expect(da8w4_time_read("abacus", memory.as(), 256, 1, 1, 1, &time) == DA8W4_UNKNOWN_KERNEL, "an unknown kernel");
    expect(da8w4_time_read(nullptr, nullptr, 256, 1, 1, 1, &time) == bad, "no memory");
    expect(da8w4_time_read(nullptr, memory.as(), 256, 1, 3, 1, &time) == bad, "3 streams");
    expect(da8w4_time_read(nullptr, memory.as(), 256, 1, 1, 1, nullptr) == bad, "no place for the time");
    expect(da8w4_time_dots("abacus", 1, 1, &made, &time) == DA8W4_UNKNOWN_KERNEL, "an unknown kernel");
    expect(da8w4_time_dots(nullptr, 1, 1, nullptr, &time) == bad, "no place for the number of products");
    expect(da8w4_time_dots(nullptr, 1, 1, &made, nullptr) == bad, "no place for the time");
}

// Multiplications of a round of da8w4_time_dots: 12 registers of bytes, 12 squares of two by two, or 4 products of
// tiles.
size_t products_of_round(const std::string &kernel) {
    if (kernel == "amx") return size_t{4} * 16 * 16 * 64;
    if (kernel == "scalar") return 4;
    return size_t{12} * (kernel == "avx512vnni" ? 64 : kernel == "neondot" ? 16 : 32);
}

void check_loops(const Trial &) {
    for (const std::string &kernel : kernels_and_scalar()) {
        for (size_t threads : {1, 3}) {
            now(kernel.c_str(), "the loops of the limits with %zu threads", threads);
            uint64_t time = 0, made = 0;
            expect(da8w4_time_dots(kernel.c_str(), 5, threads, &made, &time) == DA8W4_OK &&
                       made == 5 * threads * products_of_round(kernel) && time > 0,
                   "%llu products", static_cast<unsigned long long>(made));
            for (size_t bytes : {0, 100, 256, 6 * 256, 6 * 256 + 1, 7 * 256 + 255})
                for (int streams : {1, 2})
                    for (bool at_end : {false, true}) {
                        const Guarded memory(bytes, at_end);
                        const da8w4_status status =
                            da8w4_time_read(kernel.c_str(), memory.as(), bytes, 2, streams, threads, &time);
                        expect(status == DA8W4_OK && memory.untouched(), "%zu bytes: %s", bytes,
                               da8w4_status_text(status));
                    }
        }
    }
}

}  // namespace

std::vector<Test> explain_tests() {
    return {
        {"explain", "the plan of calls, known in advance", std::size(cases), 1, false, check_case},
        {"explain_zp", "one panel that leaves the fast path", 1, 1, false, check_one_zp},
        {"explain_threads", "the threads that calls are worth", 1, 1, false, check_useful_threads},
        {"bad_explain", "what explain and the limits refuse", 1, 1, false, check_refusals},
        {"limits", "reading memory and multiplying registers", 1, 1, false, check_loops},
    };
}

}  // namespace check
