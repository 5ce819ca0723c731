/* Uses the library that argv[1] names from several threads, unloads it, and waits for what its threads do. */
#define _POSIX_C_SOURCE 200809L
#include <dlfcn.h>
#include <stdio.h>
#include <time.h>

#include "pyda8w4/pyda8w4.h"

enum { ROWS = 64, K = 16384 };
static float x[ROWS * K], scales[ROWS];
static signed char act[ROWS * K];
static int32_t zps[ROWS];

int main(int count, char **arguments) {
    void *library = count == 2 ? dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL) : NULL;
    if (!library) return 2;
    void (*set_num_threads)(size_t);
    da8w4_status (*quantize_rows)(const char *, const void *, da8w4_type, size_t, size_t, size_t, int, void *, size_t,
                                  float *, int32_t *);
    *(void **)&set_num_threads = dlsym(library, "da8w4_set_num_threads");
    *(void **)&quantize_rows = dlsym(library, "da8w4_quantize_rows");
    set_num_threads(4);
    if (quantize_rows(NULL, x, DA8W4_F32, K * sizeof *x, ROWS, K, 1, act, K, scales, zps) != DA8W4_OK) return 3;
    if (dlclose(library) != 0) return 4;
    nanosleep(&(struct timespec){0, 100000000}, NULL);
    puts("alive");
    return 0;
}
