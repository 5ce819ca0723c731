/* Linked with -Ofast and -ffast-math, as from LDFLAGS: subnormal numbers must be kept, here and by the library. */
#include <stdio.h>

#include "pyda8w4/pyda8w4.h"

int main(void) {
    volatile float subnormal = 0x1p-140f, one = 1;
    const int kept = subnormal * one != 0;
    printf("%s: subnormal numbers are %s\n", da8w4_version(), kept ? "kept" : "flushed to zero");
    return !kept;
}
