// CHECK(condition): says where it failed, and the program ends with 1 (check_result).
#pragma once

#include <cstdio>

static int failed_checks = 0;

#define CHECK(condition)                                                                       \
    do {                                                                                       \
        if (!(condition)) {                                                                    \
            std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
            failed_checks++;                                                                   \
        }                                                                                      \
    } while (0)

static inline int check_result() { return failed_checks ? 1 : 0; }
