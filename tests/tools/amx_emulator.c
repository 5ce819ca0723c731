/* Executes the tile instructions of Intel AMX (AMX-TILE, AMX-INT8) in a handler of SIGILL, so that tests run the
   machine code of a kernel for AMX on any x86-64 CPU. Linked into a program or preloaded, it needs no call; on a
   CPU that has AMX no instruction gets here.

   Semantics and faults are those of the Intel SDM. What an instruction does wrong is said in one line on stderr,
   and the signal that it leads to on a CPU with AMX goes to the program's own handler, or ends the process: #UD is
   SIGILL, #GP is SIGSEGV. Memory is read and written where the instruction would, so an unmapped page does what it
   always does. Not emulated: the permission of the operating system, prefixes before VEX, restarts at start_row
   after a page fault. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <emmintrin.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64, QUADS = ROW_BYTES / 4 };

struct config {  // as LDTILECFG reads it
    uint8_t palette, start_row, reserved[14];
    uint16_t colsb[16];
    uint8_t rows[16];
};

// Each thread's own, and static: a signal handler must not allocate. Bytes outside the shape of a tile are zero at
// all times, so that no instruction has to clear them.
static __thread __attribute__((tls_model("initial-exec"))) struct {
    struct config config;
    uint8_t tile[TILES][ROWS][ROW_BYTES];
} state;

// Threads whose tiles are configured. Nothing else notices where a program leaves them so: they cost the system time at
// each switch of threads, and the next library finds a configuration that is not its own.
static int configured;
int amx_emulator_configured(void) { return __atomic_load_n(&configured, __ATOMIC_SEQ_CST); }

static void configure(const struct config *config) {
    __atomic_fetch_add(&configured, (config->palette != 0) - (state.config.palette != 0), __ATOMIC_SEQ_CST);
    memset(&state, 0, sizeof state);
    if (config->palette) state.config = *config;
}

// ---- decoding --------------------------------------------------------------------------------

// VEX.pp, and what the emulator knows an instruction by.
enum { NP, P66, PF3, PF2 };
#define KEY(opcode, memory, pp) ((opcode) << 3 | (memory) << 2 | (pp))

static const char *name_of(unsigned key) {
    switch (key) {
        case KEY(0x49, 1, NP): return "ldtilecfg";
        case KEY(0x49, 1, P66): return "sttilecfg";
        case KEY(0x49, 0, NP): return "tilerelease";
        case KEY(0x49, 0, PF2): return "tilezero";
        case KEY(0x4b, 1, PF2): return "tileloadd";
        case KEY(0x4b, 1, P66): return "tileloaddt1";
        case KEY(0x4b, 1, PF3): return "tilestored";
        case KEY(0x5e, 0, PF2): return "tdpbssd";
        case KEY(0x5e, 0, PF3): return "tdpbsud";
        case KEY(0x5e, 0, P66): return "tdpbusd";
        case KEY(0x5e, 0, NP): return "tdpbuud";
        default: return NULL;
    }
}

struct operands {
    unsigned reg, rm, vvvv;  // extended by VEX
    int has_sib;
    uint64_t start, step;  // the address is their sum, but for tiles `step` is the stride
};

// The general registers as instructions number them.
static uint64_t general(const greg_t *regs, unsigned number) {
    static const uint8_t at[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                   REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return (uint64_t)regs[at[number]];
}

// A memory operand from its ModRM byte on; returns where the next instruction begins.
static const uint8_t *decode_memory(const uint8_t *at, const greg_t *regs, unsigned x, unsigned b, struct operands *o) {
    const unsigned mod = *at >> 6, rm = *at++ & 7;
    unsigned base = rm;
    o->has_sib = rm == 4;
    o->start = o->step = 0;
    if (o->has_sib) {
        const unsigned sib = *at++, index = x | (sib >> 3 & 7);
        base = sib & 7;
        if (index != 4) o->step = general(regs, index) << (sib >> 6);
    }
    const int no_base = mod == 0 && base == 5;
    if (!no_base) o->start = general(regs, b | base);
    if (mod == 1) o->start += (uint64_t)(int8_t)*at++;
    if (mod == 2 || no_base) {
        int32_t displacement;
        memcpy(&displacement, at, 4);
        at += 4;
        o->start += (uint64_t)displacement;
    }
    if (no_base && !o->has_sib) o->start += (uint64_t)at;
    return at;
}

// The key of the instruction at `at`, or 0 if it is none of ours; `at` moves to the next one.
static unsigned decode(const uint8_t **code, const greg_t *regs, struct operands *o) {
    const uint8_t *at = *code;
    if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || (at[2] & 0x84) != 0) return 0;  // VEX.128.0F38.W0
    const unsigned vex = ~at[1], r = vex >> 4 & 8, x = vex >> 3 & 8, b = vex >> 2 & 8;
    const unsigned opcode = at[3], modrm = at[4], memory = modrm < 0xc0;
    const unsigned key = KEY(opcode, memory, at[2] & 3u);
    *o = (struct operands){.reg = r | (modrm >> 3 & 7), .rm = b | (modrm & 7), .vvvv = (~at[2] & 0x78u) >> 3};
    if (!name_of(key)) return 0;
    if (opcode != 0x5e && o->vvvv != 0) return 0;
    if (opcode == 0x49 && (memory ? modrm >> 3 & 7 : modrm & 7) != 0) return 0;
    if (key == KEY(0x49, 0, NP) && modrm != 0xc0) return 0;
    *code = memory ? decode_memory(at + 4, regs, x, b, o) : at + 5;
    return key;
}

// ---- what faults -----------------------------------------------------------------------------

// Each returns what is wrong, or null.
static const char *config_fault(const struct config *config) {
    static const uint8_t zero[16];
    if (config->palette > 1) return "the palette is neither 0 nor 1";
    if (config->palette == 0) return NULL;
    if (memcmp(config->reserved, zero, sizeof config->reserved) != 0 || memcmp(config->colsb + TILES, zero, 16) != 0 ||
        memcmp(config->rows + TILES, zero, 8) != 0)
        return "a reserved byte is not zero";
    for (int tile = 0; tile < TILES; tile++) {
        if (config->rows[tile] > ROWS) return "a tile has more than 16 rows";
        if (config->colsb[tile] > ROW_BYTES) return "a tile has more than 64 bytes per row";
        if (!config->rows[tile] != !config->colsb[tile]) return "a tile has rows without bytes or bytes without rows";
    }
    return NULL;
}

static const char *tile_fault(unsigned tile) {
    if (!state.config.palette) return "tiles are not configured";
    if (tile >= TILES) return "there is no such tile";
    if (!state.config.rows[tile]) return "the tile is not configured";
    return NULL;
}

static const char *move_fault(const struct operands *o) {
    const char *why = tile_fault(o->reg);
    if (why) return why;
    if (!o->has_sib) return "the address has no SIB byte";
    if (state.config.colsb[o->reg] % 4) return "the bytes per row are no multiple of 4";
    if (state.config.start_row >= state.config.rows[o->reg]) return "start_row is not a row of the tile";
    return NULL;
}

static const char *product_fault(unsigned c, unsigned a, unsigned b) {
    const uint16_t *const colsb = state.config.colsb;
    const uint8_t *const rows = state.config.rows;
    if (c == a || c == b || a == b) return "the same tile twice";
    for (int i = 0; i < 3; i++) {
        const unsigned tile = i == 0 ? c : i == 1 ? a : b;
        const char *why = tile_fault(tile);
        if (why) return why;
        if (colsb[tile] % 4) return "the bytes per row are no multiple of 4";
    }
    if (rows[a] != rows[c]) return "the first factor has not as many rows as the sum";
    if (colsb[b] != colsb[c]) return "the second factor has not as many bytes per row as the sum";
    if (colsb[a] / 4 != rows[b]) return "the second factor has not as many rows as the first has quads";
    return NULL;
}

// ---- execution -------------------------------------------------------------------------------

static void widen(int16_t *to, const uint8_t *from, int is_signed) {
    const int sign = is_signed ? 0x80 : 0;
    for (int i = 0; i < ROW_BYTES; i++) to[i] = (int16_t)((from[i] ^ sign) - sign);
}

// c += a * b, as SSE2 has it: 16-bit products, added in pairs to 32-bit sums that wrap around.
static void multiply(unsigned c, unsigned a, unsigned b, int a_signed, int b_signed) {
    enum { VECTORS = ROW_BYTES * 2 / sizeof(__m128i) };
    const int rows = state.config.rows[c], quads = state.config.rows[b];
    int16_t wide_b[ROWS][ROW_BYTES] __attribute__((aligned(16)));
    for (int quad = 0; quad < quads; quad++) widen(wide_b[quad], state.tile[b][quad], b_signed);
    for (int row = 0; row < rows; row++) {
        int16_t wide_a[ROW_BYTES];
        widen(wide_a, state.tile[a][row], a_signed);
        __m128i sums[VECTORS] = {0};
        for (int quad = 0; quad < quads; quad++) {
            const __m128i factors = _mm_loadl_epi64((const __m128i *)(const void *)(wide_a + 4 * quad));
            const __m128i twice = _mm_unpacklo_epi64(factors, factors);
            const __m128i *const others = (const __m128i *)(const void *)wide_b[quad];
            for (int i = 0; i < VECTORS; i++) sums[i] = _mm_add_epi32(sums[i], _mm_madd_epi16(twice, others[i]));
        }
        uint32_t pairs[QUADS][2], out[QUADS];
        memcpy(pairs, sums, sizeof pairs);
        memcpy(out, state.tile[c][row], sizeof out);
        for (int i = 0; i < QUADS; i++) out[i] += pairs[i][0] + pairs[i][1];
        memcpy(state.tile[c][row], out, sizeof out);
    }
}

static const char *execute(unsigned key, const struct operands *o) {
    const char *why = NULL;
    const unsigned tile = o->reg;
    switch (key) {
        case KEY(0x49, 1, NP): {
            struct config config;
            memcpy(&config, (const void *)(o->start + o->step), sizeof config);
            if ((why = config_fault(&config))) return why;
            configure(&config);
            return NULL;
        }
        case KEY(0x49, 1, P66): memcpy((void *)(o->start + o->step), &state.config, sizeof state.config); return NULL;
        case KEY(0x49, 0, NP): configure(&(struct config){0}); return NULL;
        case KEY(0x49, 0, PF2):
            if ((why = tile_fault(tile))) return why;
            memset(state.tile[tile], 0, sizeof state.tile[tile]);
            break;
        case KEY(0x4b, 1, PF2):
        case KEY(0x4b, 1, P66):
            if ((why = move_fault(o))) return why;
            for (unsigned row = state.config.start_row; row < state.config.rows[tile]; row++)
                memcpy(state.tile[tile][row], (const void *)(o->start + row * o->step), state.config.colsb[tile]);
            break;
        case KEY(0x4b, 1, PF3):
            if ((why = move_fault(o))) return why;
            for (unsigned row = state.config.start_row; row < state.config.rows[tile]; row++)
                memcpy((void *)(o->start + row * o->step), state.tile[tile][row], state.config.colsb[tile]);
            break;
        default:
            if ((why = product_fault(o->reg, o->rm, o->vvvv))) return why;
            multiply(o->reg, o->rm, o->vvvv, key >> 1 & 1, key & 1);  // pp is the signs
    }
    state.config.start_row = 0;
    return NULL;
}

// ---- signals ---------------------------------------------------------------------------------

typedef int sigaction_function(int, const struct sigaction *, struct sigaction *);
typedef int sigmask_function(int, const sigset_t *, sigset_t *);

static struct sigaction of_program;  // what the program wants to do on SIGILL

static int real_sigaction(int number, const struct sigaction *action, struct sigaction *old) {
    sigaction_function *real;
    *(void **)&real = dlsym(RTLD_NEXT, "sigaction");
    return real(number, action, old);
}

static void pass_on(int number, siginfo_t *info, void *context) {
    const int sent = info->si_code <= 0;  // by a process, not by an instruction
    if (of_program.sa_flags & SA_SIGINFO) {
        of_program.sa_sigaction(number, info, context);
    } else if (of_program.sa_handler != SIG_DFL && of_program.sa_handler != SIG_IGN) {
        of_program.sa_handler(number);
    } else if (of_program.sa_handler == SIG_DFL || !sent) {
        const struct sigaction standard = {.sa_handler = SIG_DFL};
        real_sigaction(number, &standard, NULL);
        if (sent) raise(number);  // an instruction is run again, and ends the process
    }
}

static void on_sigill(int number, siginfo_t *info, void *context) {
    greg_t *const regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *code = (const uint8_t *)regs[REG_RIP];
    struct operands operands;
    const unsigned key = info->si_code > 0 ? decode(&code, regs, &operands) : 0;
    const char *const why = key ? execute(key, &operands) : NULL;
    if (key && !why) {
        regs[REG_RIP] = (greg_t)code;
        return;
    }
    if (why) {
        char line[128];
        char *end = stpcpy(stpcpy(stpcpy(line, "amx_emulator: "), name_of(key)), ": ");
        end = stpcpy(stpcpy(end, why), "\n");
        if (write(STDERR_FILENO, line, (size_t)(end - line)) < 0) _exit(127);
    }
    if (why && key == KEY(0x49, 1, NP))
        raise(SIGSEGV);
    else
        pass_on(number, info, context);
}

// A later handler of the program must not take the place of ours, and a thread that blocks SIGILL would be killed by
// its first tile instruction. signal() and sigprocmask() are left alone.
int sigaction(int number, const struct sigaction *action, struct sigaction *old) {
    if (number != SIGILL) return real_sigaction(number, action, old);
    const struct sigaction before = of_program;
    if (action) of_program = *action;
    if (old) *old = before;
    return 0;
}

int pthread_sigmask(int how, const sigset_t *set, sigset_t *old) {
    sigmask_function *real;
    *(void **)&real = dlsym(RTLD_NEXT, "pthread_sigmask");
    sigset_t most;
    if (set && how != SIG_UNBLOCK) {
        most = *set;
        sigdelset(&most, SIGILL);
        sigdelset(&most, SIGSEGV);
        set = &most;
    }
    return real(how, set, old);
}

// On the stack of the thread: an alternate one may be too small for a frame with AVX-512 registers in it.
__attribute__((constructor)) static void install(void) {
    const struct sigaction ours = {.sa_sigaction = on_sigill, .sa_flags = SA_SIGINFO | SA_NODEFER};
    struct sigaction before;
    real_sigaction(SIGILL, &ours, &before);
    if (before.sa_handler != SIG_DFL) of_program = before;
}
