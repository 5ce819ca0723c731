// The machine's own limits: how fast memory can be read and how many 8-bit products a core can make.
// limits.py compiles this and calls it; see there.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

// Runs work(thread) on `threads` threads that start together; seconds until the last has finished.
template <class Work>
double timed(int threads, Work work) {
    std::atomic<int> waiting{threads};
    std::atomic<bool> go{false};
    std::vector<std::thread> others;
    auto run = [&](int thread) {
        waiting--;
        while (!go) {
        }
        work(thread);
    };
    for (int thread = 1; thread < threads; thread++) others.emplace_back(run, thread);
    while (waiting > 1) {
    }
    const Clock::time_point start = Clock::now();
    go = true;
    run(0);
    for (std::thread &other : others) other.join();
    return std::chrono::duration<double>(Clock::now() - start).count();
}

// Reads 128 bytes at each of two places, `rounds` times, both places `step` further each time.
__attribute__((target("avx512f"))) void read_avx512(const char *first, const char *second, size_t step, size_t rounds) {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (size_t i = 0; i < rounds; i++, first += step, second += step) {
        a = _mm512_or_si512(a, _mm512_loadu_si512(first));
        b = _mm512_or_si512(b, _mm512_loadu_si512(first + 64));
        c = _mm512_or_si512(c, _mm512_loadu_si512(second));
        d = _mm512_or_si512(d, _mm512_loadu_si512(second + 64));
    }
    a = _mm512_or_si512(_mm512_or_si512(a, b), _mm512_or_si512(c, d));
    __asm__ volatile("" : : "v"(a));
}

__attribute__((target("avx2"))) void read_avx2(const char *first, const char *second, size_t step, size_t rounds) {
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (size_t i = 0; i < rounds; i++, first += step, second += step) {
        for (size_t at = 0; at < 128; at += 64) {
            a = _mm256_or_si256(a, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(first + at)));
            b = _mm256_or_si256(b, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(first + at + 32)));
            c = _mm256_or_si256(c, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(second + at)));
            d = _mm256_or_si256(d, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(second + at + 32)));
        }
    }
    a = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
    __asm__ volatile("" : : "x"(a));
}

// 12 independent sums hide the latency of the dot product; the barriers keep each one in the loop.
__attribute__((target("avx512f,avx512vnni"))) void dots_avx512vnni(size_t rounds) {
    __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
    __m512i s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a, s6 = a, s7 = a, s8 = a, s9 = a, s10 = a, s11 = a;
#define DOT(s) __asm__ volatile("vpdpbusd %1, %2, %0" : "+v"(s) : "v"(a), "v"(b))
    for (size_t i = 0; i < rounds; i++) {
        DOT(s0);
        DOT(s1);
        DOT(s2);
        DOT(s3);
        DOT(s4);
        DOT(s5);
        DOT(s6);
        DOT(s7);
        DOT(s8);
        DOT(s9);
        DOT(s10);
        DOT(s11);
    }
#undef DOT
}

__attribute__((target("avx2"))) void dots_avx2(size_t rounds) {
    __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5), t0, t1, t2, t3, t4, t5;
    __m256i s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a;
#define DOT(s, t) __asm__ volatile("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0" : "+x"(s), "=&x"(t) : "x"(a), "x"(b))
    for (size_t i = 0; i < rounds; i++) {
        DOT(s0, t0);
        DOT(s1, t1);
        DOT(s2, t2);
        DOT(s3, t3);
        DOT(s4, t4);
        DOT(s5, t5);
    }
#undef DOT
}

// 2 x 2 tiles of sums, which hide the latency of each other. False if the system does not let us use tiles.
bool dots_amx(size_t rounds) {
    const long kRequestPermission = 0x1023, kTileData = 18;
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return false;
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; tile++) {
        config[16 + 2 * tile] = 64;
        config[48 + tile] = 16;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
    for (size_t i = 0; i < rounds; i++)
        __asm__ volatile(
            "tdpbssd %%tmm6, %%tmm4, %%tmm0\n"
            "tdpbssd %%tmm7, %%tmm4, %%tmm1\n"
            "tdpbssd %%tmm6, %%tmm5, %%tmm2\n"
            "tdpbssd %%tmm7, %%tmm5, %%tmm3\n" ::
                : "memory");
    __asm__ volatile("tilerelease" ::: "memory");
    return true;
}

}  // namespace

extern "C" {

// Memory for reading, written once; huge: 2 MiB pages requested, else refused.
void *limits_alloc(size_t bytes, int huge) {
    void *memory = nullptr;
    if (posix_memalign(&memory, size_t{2} << 20, bytes) != 0) return nullptr;
    madvise(memory, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    for (size_t i = 0; i < bytes; i += 64) static_cast<volatile char *>(memory)[i] = 1;
    return memory;
}

void limits_free(void *memory) { free(memory); }

// Seconds for each of `threads` threads to read its part of the memory `passes` times: from one end to the
// other, or in two streams, its halves side by side. Some CPUs fetch ahead better with one, some with two.
double limits_read(const char *memory, size_t bytes, int threads, int passes, int streams) {
    const bool wide = __builtin_cpu_supports("avx512f");
    const size_t rounds = bytes / threads / 256, part = rounds * 256;
    const size_t apart = streams == 2 ? part / 2 : 128, step = streams == 2 ? 128 : 256;
    return timed(threads, [&](int thread) {
        const char *from = memory + thread * part;
        for (int pass = 0; pass < passes; pass++) (wide ? read_avx512 : read_avx2)(from, from + apart, step, rounds);
    });
}

// Billions of 8-bit operations (a product and an addition are two) a second with operands in registers.
// isa: 0 vpdpbusd on 512 bits, 1 vpmaddubsw and vpaddw on 256 bits, 2 tdpbssd, which is 0 where tiles are not
// allowed.
double limits_dots(int isa, int threads) {
    const size_t rounds = isa == 2 ? 100000 : 2000000;
    const double products = isa == 0 ? 12.0 * 64 : isa == 1 ? 6.0 * 32 : 4.0 * 16 * 16 * 64;
    std::atomic<bool> done{true};
    const double seconds = timed(threads, [&](int) {
        if (isa == 0)
            dots_avx512vnni(rounds);
        else if (isa == 1)
            dots_avx2(rounds);
        else if (!dots_amx(rounds))
            done = false;
    });
    return done ? threads * rounds * products * 2 / seconds / 1e9 : 0;
}
}
