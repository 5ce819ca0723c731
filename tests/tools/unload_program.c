/* Uses the library that argv[1] names from several threads, unloads it, and waits for what its threads do. */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>

#include "pyda8w4/pyda8w4.h"

#ifdef _WIN32
#include <windows.h>
static void *load(const char *path) { return LoadLibraryA(path); }
static void *find(void *library, const char *name) { return (void *)GetProcAddress(library, name); }
static int unload(void *library) { return FreeLibrary(library); }
static void wait_a_little(void) { Sleep(100); }
#else
#include <dlfcn.h>
#include <time.h>
static void *load(const char *path) { return dlopen(path, RTLD_NOW | RTLD_LOCAL); }
static void *find(void *library, const char *name) { return dlsym(library, name); }
static int unload(void *library) { return dlclose(library) == 0; }
static void wait_a_little(void) { nanosleep(&(struct timespec){0, 100000000}, NULL); }
#endif

enum { ROWS = 64, K = 16384 };
static float x[ROWS * K], scales[ROWS];
static signed char act[ROWS * K];
static int32_t zps[ROWS];

int main(int count, char **arguments) {
    void *library = count == 2 ? load(arguments[1]) : NULL;
    if (!library) return 2;
    void (*set_num_threads)(size_t);
    da8w4_status (*quantize_rows)(const char *, const void *, da8w4_type, size_t, size_t, size_t, int, void *, size_t,
                                  float *, int32_t *);
    *(void **)&set_num_threads = find(library, "da8w4_set_num_threads");
    *(void **)&quantize_rows = find(library, "da8w4_quantize_rows");
    set_num_threads(4);
    if (quantize_rows(NULL, x, DA8W4_F32, K * sizeof *x, ROWS, K, 1, act, K, scales, zps) != DA8W4_OK) return 3;
    if (!unload(library)) return 4;
    wait_a_little();
    puts("alive");
    return 0;
}
