/* Compares tests/tools/amx_emulator.c, which is linked in, with plain C: what every instruction computes, how operands
   are encoded, and that each misuse ends in the right signal and says why. On a CPU with AMX the same program compares
   the hardware with both. Assembly, because the intrinsics of GCC 12 do not say that they read memory. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64, PAGE = 4096 };

struct config {
    uint8_t palette, start_row, reserved[14];
    uint16_t colsb[16];
    uint8_t rows[16];
};

static int emulated, failures;

static void expect(int holds, const char *what) {
    if (holds) return;
    printf("FAILED %s\n", what);
    failures++;
}

// Hardware does not count the threads whose tiles are configured; the emulator does.
int amx_emulator_configured(void);
static int configured(int threads) { return !emulated || amx_emulator_configured() == threads; }

// splitmix64
static uint64_t random_state = 1;
static uint64_t random_below(uint64_t bound) {
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (z ^ (z >> 31)) % bound;
}
static void random_fill(void *to, size_t size) {
    for (uint8_t *at = to; size--; at++) *at = (uint8_t)random_below(256);
}

// A page between two that cannot be touched.
static uint8_t *guarded_page(void) {
    uint8_t *pages = mmap(NULL, 3 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages + PAGE, PAGE, PROT_READ | PROT_WRITE) != 0) exit(2);
    return pages + PAGE;
}

// ---- instructions ----------------------------------------------------------------------------

static void load_config(const struct config *from) { __asm__ volatile("ldtilecfg (%0)" : : "r"(from) : "memory"); }
static void store_config(struct config *to) { __asm__ volatile("sttilecfg (%0)" : : "r"(to) : "memory"); }
static void release(void) { __asm__ volatile("tilerelease" : : : "memory"); }

// The tiles are part of an instruction.
#define ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile : : : "memory")
#define LOAD(tile, at, stride) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(at), "r"(stride) : "memory")
#define LOADT1(tile, at, stride) \
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm" #tile : : "r"(at), "r"(stride) : "memory")
#define STORE(tile, at, stride) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(at), "r"(stride) : "memory")
#define PRODUCT(name, c, a, b) __asm__ volatile(name " %%tmm" #b ", %%tmm" #a ", %%tmm" #c : : : "memory")

static struct config shaped(int rows, int colsb) {
    struct config config = {.palette = 1};
    for (int tile = 0; tile < TILES; tile++) {
        config.rows[tile] = (uint8_t)rows;
        config.colsb[tile] = (uint16_t)colsb;
    }
    return config;
}

// ---- products --------------------------------------------------------------------------------

// The rows of one tile in a page, ending at its end or starting at its start, upwards or downwards.
struct matrix {
    uint8_t *page, *at;
    long stride;
    int rows, colsb;
};

static void place(struct matrix *m, int rows, int colsb) {
    if (!m->page) m->page = guarded_page();
    random_fill(m->page, PAGE);
    m->rows = rows;
    m->colsb = colsb;
    m->stride = colsb + (long)random_below(60);
    const long extent = (rows - 1) * m->stride + colsb;
    m->at = random_below(2) ? m->page : m->page + PAGE - extent;
    if (random_below(2)) {
        m->at += (rows - 1) * m->stride;
        m->stride = -m->stride;
    }
}

static int factor(const struct matrix *m, int row, int at, int is_signed) {
    const uint8_t byte = m->at[row * m->stride + at];
    return is_signed ? (int8_t)byte : byte;
}

// What the page of c must hold: rows of sums, and between them what was there.
static void expected(uint8_t *page, const struct matrix *c, const struct matrix *a, const struct matrix *b,
                     int a_signed, int b_signed) {
    memcpy(page, c->page, PAGE);
    for (int row = 0; row < c->rows; row++) {
        for (int column = 0; column < c->colsb / 4; column++) {
            uint8_t *const at = page + (c->at - c->page) + row * c->stride + 4 * column;
            uint32_t sum;
            memcpy(&sum, at, 4);
            for (int k = 0; k < a->colsb; k++)
                sum += (uint32_t)(factor(a, row, k, a_signed) * factor(b, k / 4, 4 * column + k % 4, b_signed));
            memcpy(at, &sum, 4);
        }
    }
}

#define RUN(c, a, b)                                             \
    do {                                                         \
        LOAD(c, mc.at, mc.stride);                               \
        LOADT1(a, ma.at, ma.stride);                             \
        LOAD(b, mb.at, mb.stride);                               \
        if (!a_signed && !b_signed) PRODUCT("tdpbuud", c, a, b); \
        if (!a_signed && b_signed) PRODUCT("tdpbusd", c, a, b);  \
        if (a_signed && !b_signed) PRODUCT("tdpbsud", c, a, b);  \
        if (a_signed && b_signed) PRODUCT("tdpbssd", c, a, b);   \
        STORE(c, mc.at, mc.stride);                              \
    } while (0)

static void check_products(void) {
    static struct matrix ma, mb, mc;
    static uint8_t want[PAGE];
    static const int tiles[3][3] = {{0, 1, 2}, {7, 4, 3}, {5, 2, 6}};
    for (int round = 0; round < 600; round++) {
        const int full = random_below(8) == 0, a_signed = round >> 1 & 1, b_signed = round & 1;
        const int m = full ? 16 : 1 + (int)random_below(16), n = full ? 16 : 1 + (int)random_below(16);
        const int k = full ? 16 : 1 + (int)random_below(16);
        const int *const used = tiles[random_below(3)];
        struct config config = {.palette = 1}, got;
        for (int tile = 0; tile < TILES; tile++) {
            if (random_below(2)) continue;
            config.rows[tile] = (uint8_t)(1 + random_below(16));
            config.colsb[tile] = (uint16_t)(1 + random_below(64));
        }
        place(&mc, m, 4 * n);
        place(&ma, m, 4 * k);
        place(&mb, k, 4 * n);
        const struct matrix *const shapes[3] = {&mc, &ma, &mb};
        for (int i = 0; i < 3; i++) {
            config.rows[used[i]] = (uint8_t)shapes[i]->rows;
            config.colsb[used[i]] = (uint16_t)shapes[i]->colsb;
        }
        expected(want, &mc, &ma, &mb, a_signed, b_signed);
        load_config(&config);
        if (used == tiles[0]) RUN(0, 1, 2);
        if (used == tiles[1]) RUN(7, 4, 3);
        if (used == tiles[2]) RUN(5, 2, 6);
        store_config(&got);
        expect(memcmp(mc.page, want, PAGE) == 0, "a product");
        expect(memcmp(&got, &config, sizeof got) == 0, "sttilecfg after ldtilecfg");
    }
    release();
}

// ---- tiles and their configuration -----------------------------------------------------------

static void check_state(void) {
    static const struct config none;
    static const uint8_t zeros[ROWS][ROW_BYTES];
    static uint8_t in[ROWS][ROW_BYTES], out[ROWS][ROW_BYTES];
    struct config config = shaped(ROWS, ROW_BYTES), got = config;
    random_fill(in, sizeof in);

    store_config(&got);
    expect(memcmp(&got, &none, sizeof got) == 0, "sttilecfg before ldtilecfg");

    load_config(&config);
    LOAD(3, in, 64l);
    STORE(3, out, 64l);
    expect(memcmp(out, in, sizeof out) == 0, "tileloadd and tilestored");
    STORE(4, out, 64l);
    expect(memcmp(out, zeros, sizeof out) == 0, "a tile that was never written");
    LOAD(4, in, 64l);
    ZERO(3);
    STORE(3, out, 64l);
    expect(memcmp(out, zeros, sizeof out) == 0, "tilezero");
    STORE(4, out, 64l);
    expect(memcmp(out, in, sizeof out) == 0, "tilezero of another tile");
    load_config(&config);
    STORE(4, out, 64l);
    expect(memcmp(out, zeros, sizeof out) == 0, "ldtilecfg clears the tiles");

    config.start_row = 5;
    load_config(&config);
    LOAD(1, in, 64l);
    store_config(&got);
    expect(got.start_row == 0, "start_row after tileloadd");
    STORE(1, out, 64l);
    expect(memcmp(out, zeros, 5 * 64) == 0 && memcmp(out[5], in[5], 11 * 64) == 0, "tileloadd from start_row on");

    config.palette = 0;
    load_config(&config);
    store_config(&got);
    expect(memcmp(&got, &none, sizeof got) == 0, "ldtilecfg of palette 0");
    expect(configured(0), "no thread is configured after palette 0");
    config = shaped(1, 4);
    load_config(&config);
    load_config(&config);
    expect(configured(1), "one thread is configured");
    release();
    store_config(&got);
    expect(memcmp(&got, &none, sizeof got) == 0, "tilerelease");
    release();
    expect(configured(0), "no thread is configured after tilerelease");
}

// ---- addresses -------------------------------------------------------------------------------

#define EACH_REGISTER(X) \
    X("rax")             \
    X("rbx") X("rcx") X("rsi") X("rdi") X("rbp") X("r8") X("r9") X("r10") X("r11") X("r12") X("r13") X("r14") X("r15")

static uint8_t rows_in[ROWS][ROW_BYTES];

static void expect_loaded(const char *what) {
    uint8_t out[ROWS][ROW_BYTES];
    STORE(1, out, 64l);
    expect(memcmp(out, rows_in, sizeof out) == 0, what);
    ZERO(1);
}

static void check_addresses(void) {
    static struct config got;
    const struct config config = shaped(ROWS, ROW_BYTES);
    random_fill(rows_in, sizeof rows_in);
    load_config(&config);

#define BASE(name)                                                                                            \
    __asm__ volatile("xchg %%" name ", %%rax\n tileloadd -0x12340(%%" name ",%%rdx,2), %%tmm1\n xchg %%" name \
                     ", %%rax"                                                                                \
                     :                                                                                        \
                     : "a"((uintptr_t)rows_in + 0x12340), "d"(32l)                                            \
                     : "memory");                                                                             \
    expect_loaded("base " name);
    EACH_REGISTER(BASE)
#define INDEX(name)                                                                                                  \
    __asm__ volatile("xchg %%" name ", %%rax\n tileloadd -0x70(%%rdx,%%" name ",4), %%tmm1\n xchg %%" name ", %%rax" \
                     :                                                                                               \
                     : "a"(16l), "d"((uintptr_t)rows_in + 0x70)                                                      \
                     : "memory");                                                                                    \
    expect_loaded("index " name);
    EACH_REGISTER(INDEX)
    __asm__ volatile("tileloaddt1 0x70(%0,%1,8), %%tmm1" : : "r"((uintptr_t)rows_in - 0x70), "r"(8l) : "memory");
    expect_loaded("scale 8");

    uint8_t out[ROWS][ROW_BYTES];
    __asm__ volatile("tileloadd (%0), %%tmm1" : : "r"(rows_in) : "memory");
    STORE(1, out, 64l);
    for (int row = 0; row < ROWS; row++) expect(memcmp(out[row], rows_in[0], ROW_BYTES) == 0, "a tile without index");

#define GOT(what)                                                    \
    expect(memcmp(&got, &config, sizeof got) == 0, "address " what); \
    memset(&got, 0xee, sizeof got);
    __asm__ volatile("sttilecfg %0" : "=m"(got) : : "memory");
    GOT("relative to rip")
    __asm__ volatile("sttilecfg 0x40(,%0,2)" : : "r"(((uintptr_t)&got - 0x40) / 2) : "memory");
    GOT("without base")
    __asm__ volatile("mov %0, %%r12\n sttilecfg (%%r12)" : : "r"(&got) : "r12", "memory");
    GOT("r12")
    __asm__ volatile("mov %0, %%r13\n sttilecfg (%%r13)" : : "r"(&got) : "r13", "memory");
    GOT("r13")
    __asm__ volatile("mov %0, %%rcx\n sub %%rsp, %%rcx\n sttilecfg (%%rsp,%%rcx)" : : "r"(&got) : "rcx", "memory");
    GOT("rsp")
    got = config;
    __asm__ volatile("tilerelease\n ldtilecfg %0" : : "m"(got) : "memory");
    store_config(&got);
    GOT("of ldtilecfg, relative to rip")
    release();
}

// ---- threads and signals ---------------------------------------------------------------------

static pthread_barrier_t barrier;

// Keeps a shape and contents of its own while another thread does the same, with every signal blocked.
static void *keep(void *number) {
    static const uint8_t in[2] = {0x11, 0x22};
    const int id = *(int *)number;
    const struct config config = shaped(1 + 3 * id, 4 + 8 * id);
    struct config got;
    uint8_t rows[ROWS][ROW_BYTES], out[ROWS][ROW_BYTES] = {0};
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL);
    memset(rows, in[id], sizeof rows);
    load_config(&config);
    LOAD(6, rows, 64l);
    pthread_barrier_wait(&barrier);
    store_config(&got);
    STORE(6, out, 64l);
    const int both = configured(2);
    pthread_barrier_wait(&barrier);
    release();
    static int good = 1;
    for (int row = 0; row < ROWS; row++)
        for (int i = 0; i < ROW_BYTES; i++)
            if (out[row][i] != (row < 1 + 3 * id && i < 4 + 8 * id ? in[id] : 0)) return NULL;
    return both && memcmp(&got, &config, sizeof got) == 0 ? &good : NULL;
}

static void check_threads(void) {
    pthread_t threads[2];
    int ids[2] = {0, 1};
    pthread_barrier_init(&barrier, NULL, 2);
    for (int i = 0; i < 2; i++)
        if (pthread_create(&threads[i], NULL, keep, &ids[i]) != 0) exit(2);
    for (int i = 0; i < 2; i++) {
        void *good;
        pthread_join(threads[i], &good);
        expect(good != NULL, "tiles of two threads");
    }
    expect(configured(0), "no thread is configured after two");
}

static volatile sig_atomic_t handled;
static void skip_ud2(int number, siginfo_t *info, void *context) {
    (void)info;
    handled = number;
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] += 2;
}

static void check_signals(void) {
    const struct sigaction own = {.sa_sigaction = skip_ud2, .sa_flags = SA_SIGINFO};
    struct sigaction before, after;
    struct config config = shaped(2, 8), got;
    sigaction(SIGILL, &own, &before);
    errno = 1234;
    load_config(&config);
    store_config(&got);
    expect(memcmp(&got, &config, sizeof got) == 0 && handled == 0, "tiles beside the program's handler");
    expect(errno == 1234, "errno stays");
    __asm__ volatile("ud2" : : : "memory");
    expect(handled == SIGILL, "the program's handler gets other instructions");
    sigaction(SIGILL, &before, &after);
    expect(after.sa_sigaction == skip_ud2, "sigaction returns the program's handler");
    release();
}

// ---- faults ----------------------------------------------------------------------------------

static uint8_t *edge;  // the end of a page, the next cannot be touched
static uint8_t room[ROWS * ROW_BYTES];

static void nothing(void) {}
static void other(void) { __asm__ volatile("ud2"); }
static void zero(void) { ZERO(2); }
static void zero_tmm8(void) { __asm__ volatile(".byte 0xc4, 0x62, 0x7b, 0x49, 0xc0"); }
static void load(void) { LOAD(2, room, 64l); }
static void loadt1(void) { LOADT1(2, room, 64l); }
static void load_without_sib(void) { __asm__ volatile(".byte 0xc4, 0xe2, 0x7b, 0x4b, 0x10" : : "a"(room) : "memory"); }
static void store(void) { STORE(2, room, 64l); }
static void ssd(void) { PRODUCT("tdpbssd", 0, 1, 2); }
static void sud(void) { PRODUCT("tdpbsud", 0, 1, 2); }
static void usd(void) { PRODUCT("tdpbusd", 0, 1, 2); }
static void uud(void) { PRODUCT("tdpbuud", 0, 1, 2); }
static void usd_cab(void) { PRODUCT("tdpbusd", 2, 0, 1); }
static void usd_bca(void) { PRODUCT("tdpbusd", 1, 2, 0); }
// Assemblers refuse tdpbusd of equal tiles.
static void usd_aab(void) { __asm__ volatile(".byte 0xc4, 0xe2, 0x69, 0x5e, 0xc0"); }
static void usd_aba(void) { __asm__ volatile(".byte 0xc4, 0xe2, 0x79, 0x5e, 0xc2"); }
static void usd_abb(void) { __asm__ volatile(".byte 0xc4, 0xe2, 0x69, 0x5e, 0xc2"); }
static void load_over_edge(void) { LOAD(2, edge - sizeof room + 1, 64l); }
static void store_over_edge(void) { STORE(2, edge - sizeof room + 1, 64l); }
static void load_config_over_edge(void) { load_config((const struct config *)(const void *)(edge - 63)); }
static void store_config_over_edge(void) { store_config((struct config *)(void *)(edge - 63)); }

// All tiles are 16 rows of 64 bytes, but for up to two bytes of the configuration: {0, 1} is no change.
static const struct fault {
    struct {
        uint8_t at, value;
    } change[2];
    void (*run)(void);
    int signal;
    const char *text;
} faults[] = {
    {{{0, 2}}, nothing, SIGSEGV, "ldtilecfg: the palette is neither 0 nor 1"},
    {{{0, 1}, {2, 1}}, nothing, SIGSEGV, "ldtilecfg: a reserved byte is not zero"},
    {{{0, 1}, {15, 1}}, nothing, SIGSEGV, "ldtilecfg: a reserved byte is not zero"},
    {{{0, 1}, {32, 1}}, nothing, SIGSEGV, "ldtilecfg: a reserved byte is not zero"},
    {{{0, 1}, {47, 1}}, nothing, SIGSEGV, "ldtilecfg: a reserved byte is not zero"},
    {{{0, 1}, {56, 1}}, nothing, SIGSEGV, "ldtilecfg: a reserved byte is not zero"},
    {{{0, 1}, {63, 1}}, nothing, SIGSEGV, "ldtilecfg: a reserved byte is not zero"},
    {{{0, 1}, {55, 17}}, nothing, SIGSEGV, "ldtilecfg: a tile has more than 16 rows"},
    {{{0, 1}, {30, 65}}, nothing, SIGSEGV, "ldtilecfg: a tile has more than 64 bytes per row"},
    {{{0, 1}, {31, 1}}, nothing, SIGSEGV, "ldtilecfg: a tile has more than 64 bytes per row"},
    {{{0, 1}, {55, 0}}, nothing, SIGSEGV, "ldtilecfg: a tile has rows without bytes or bytes without rows"},
    {{{0, 1}, {16, 0}}, nothing, SIGSEGV, "ldtilecfg: a tile has rows without bytes or bytes without rows"},

    {{{0, 0}}, zero, SIGILL, "tilezero: tiles are not configured"},
    {{{0, 0}}, load, SIGILL, "tileloadd: tiles are not configured"},
    {{{0, 0}}, loadt1, SIGILL, "tileloaddt1: tiles are not configured"},
    {{{0, 0}}, store, SIGILL, "tilestored: tiles are not configured"},
    {{{0, 0}}, ssd, SIGILL, "tdpbssd: tiles are not configured"},
    {{{20, 0}, {50, 0}}, zero, SIGILL, "tilezero: the tile is not configured"},
    {{{20, 0}, {50, 0}}, load, SIGILL, "tileloadd: the tile is not configured"},
    {{{20, 0}, {50, 0}}, loadt1, SIGILL, "tileloaddt1: the tile is not configured"},
    {{{20, 0}, {50, 0}}, store, SIGILL, "tilestored: the tile is not configured"},
    {{{20, 0}, {50, 0}}, sud, SIGILL, "tdpbsud: the tile is not configured"},
    {{{20, 0}, {50, 0}}, usd_cab, SIGILL, "tdpbusd: the tile is not configured"},
    {{{20, 0}, {50, 0}}, usd_bca, SIGILL, "tdpbusd: the tile is not configured"},
    {{{0, 1}}, zero_tmm8, SIGILL, "tilezero: there is no such tile"},

    {{{0, 1}, {20, 62}}, load, SIGILL, "tileloadd: the bytes per row are no multiple of 4"},
    {{{0, 1}, {20, 62}}, store, SIGILL, "tilestored: the bytes per row are no multiple of 4"},
    {{{0, 1}, {20, 62}}, usd, SIGILL, "tdpbusd: the bytes per row are no multiple of 4"},
    {{{0, 1}, {20, 62}}, usd_bca, SIGILL, "tdpbusd: the bytes per row are no multiple of 4"},
    {{{1, 16}}, load, SIGILL, "tileloadd: start_row is not a row of the tile"},
    {{{1, 16}}, store, SIGILL, "tilestored: start_row is not a row of the tile"},
    {{{0, 1}}, load_without_sib, SIGILL, "tileloadd: the address has no SIB byte"},

    {{{0, 1}}, usd_aab, SIGILL, "tdpbusd: the same tile twice"},
    {{{0, 1}}, usd_aba, SIGILL, "tdpbusd: the same tile twice"},
    {{{0, 1}}, usd_abb, SIGILL, "tdpbusd: the same tile twice"},
    {{{48, 15}}, ssd, SIGILL, "tdpbssd: the first factor has not as many rows as the sum"},
    {{{48, 15}}, uud, SIGILL, "tdpbuud: the first factor has not as many rows as the sum"},
    {{{0, 1}, {16, 60}}, sud, SIGILL, "tdpbsud: the second factor has not as many bytes per row as the sum"},
    {{{0, 1}, {18, 60}}, usd, SIGILL, "tdpbusd: the second factor has not as many rows as the first has quads"},

    {{{0, 1}}, other, SIGILL, ""},
    {{{0, 1}}, load_over_edge, SIGSEGV, ""},
    {{{0, 1}}, store_over_edge, SIGSEGV, ""},
    {{{0, 1}}, load_config_over_edge, SIGSEGV, ""},
    {{{0, 1}}, store_config_over_edge, SIGSEGV, ""},
};

static void misuse(const struct fault *fault, int output) {
    struct config config = shaped(ROWS, ROW_BYTES);
    // No cores, and no reports of sanitizers.
    setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
    const struct sigaction standard = {.sa_handler = SIG_DFL};
    sigaction(SIGILL, &standard, NULL);
    sigaction(SIGSEGV, &standard, NULL);
    dup2(output, STDERR_FILENO);
    for (int i = 0; i < 2; i++)
        if (i == 0 || fault->change[i].at) ((uint8_t *)&config)[fault->change[i].at] = fault->change[i].value;
    load_config(&config);
    fault->run();
    _exit(0);
}

static void check_faults(void) {
    edge = guarded_page() + PAGE;
    for (const struct fault *fault = faults; fault < faults + sizeof faults / sizeof *faults; fault++) {
        char text[256], want[256] = "";
        int ends[2], status;
        size_t size = 0;
        if (pipe(ends) != 0) exit(2);
        const pid_t child = fork();
        if (child == 0) misuse(fault, ends[1]);
        close(ends[1]);
        for (ssize_t got; (got = read(ends[0], text + size, sizeof text - 1 - size)) > 0;) size += (size_t)got;
        text[size] = 0;
        close(ends[0]);
        if (child < 0 || waitpid(child, &status, 0) != child) exit(2);
        if (*fault->text) snprintf(want, sizeof want, "amx_emulator: %s\n", fault->text);
        // Of what hardware refuses, the emulator sees illegal instructions, but not how tiles are configured.
        const int said = !emulated || strcmp(text, want) == 0;
        if (WIFSIGNALED(status) && WTERMSIG(status) == fault->signal && said) continue;
        printf("FAILED fault %td: status 0x%x, not signal %d\n    said '%s'\n    not  '%s'\n", fault - faults,
               (unsigned)status, fault->signal, text, want);
        failures++;
    }
}

int main(void) {
    unsigned a, b, c, d;
    emulated = !(__get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 24 & 1);
    if (!emulated && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) != 0) {
        puts("skipped: the CPU has AMX, but the system does not let it be used");
        return 77;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    check_state();
    check_products();
    check_addresses();
    check_threads();
    check_signals();
    check_faults();
    printf("%s, %s\n", emulated ? "emulated" : "this CPU's AMX", failures ? "FAILED" : "passed");
    return failures != 0;
}
