/* pyda8w4: linear layers with 4-bit weights and 8-bit activations.
 *
 *     y[m, n] = dequant(act[m, :]) . dequant(weight[n, :]) + bias[n]
 *
 * The C interface. Every function is thread-safe, none throws, and da8w4_gemm, da8w4_linear and
 * da8w4_quantize_rows allocate nothing but, once, the threads that they share: what they need beside their
 * operands is a workspace that the caller provides. Sizes are in elements and strides in bytes; arrays and
 * their rows are aligned to their type. The arithmetic, which fixes every bit of the result, is
 * docs/numbers.md; the packed layout is docs/packed-format.md.
 */
#ifndef PYDA8W4_H
#define PYDA8W4_H

#include <stddef.h>
#include <stdint.h>

/* The library's own build defines DA8W4_BUILD; whoever includes this header does not. */
#if defined(_WIN32) && defined(DA8W4_BUILD)
#define DA8W4_API __declspec(dllexport)
#elif defined(_WIN32)
#define DA8W4_API __declspec(dllimport)
#else
#define DA8W4_API __attribute__((visibility("default")))
#endif

/* The version of this header, which Meson and Python take from here, too. da8w4_version() is that of the library. */
#define DA8W4_VERSION_MAJOR 0
#define DA8W4_VERSION_MINOR 1
#define DA8W4_VERSION_PATCH 0
#define DA8W4_QUOTE_(x) #x
#define DA8W4_JOIN_(x, y, z) DA8W4_QUOTE_(x) "." DA8W4_QUOTE_(y) "." DA8W4_QUOTE_(z)
#define DA8W4_VERSION DA8W4_JOIN_(DA8W4_VERSION_MAJOR, DA8W4_VERSION_MINOR, DA8W4_VERSION_PATCH)

/* Unknown values of the enumerations are refused with a status. C++ lets them be passed only where
 * the underlying type is fixed; C always does. */
#ifdef __cplusplus
#define DA8W4_INT : int
extern "C" {
#else
#define DA8W4_INT
#endif

/* DA8W4_VERSION of the header that the library was built with. */
DA8W4_API const char *da8w4_version(void);

typedef enum da8w4_status DA8W4_INT {
    DA8W4_OK = 0,
    DA8W4_BAD_ARGUMENT,       /* a null pointer, a size of 0, an unknown type, a stride too short */
    DA8W4_BAD_GROUP,          /* the group is neither a multiple of 4 nor all of k */
    DA8W4_BAD_CODE,           /* a weight code is outside 0..15 (or -8..7) */
    DA8W4_BAD_SCALE,          /* a weight scale is NaN or infinite */
    DA8W4_BAD_OFFSET,         /* a weight offset is NaN or infinite */
    DA8W4_BAD_WEIGHT_ZP,      /* a weight zero point leaves -128..127 once codes are 0..15 */
    DA8W4_INT32_OVERFLOW,     /* group * 128 * max|code - zp| does not fit int32 */
    DA8W4_BAD_ACT_ZP,         /* an activation zero point is outside the activation's type */
    DA8W4_UNKNOWN_KERNEL,     /* no kernel has this name */
    DA8W4_KERNEL_UNAVAILABLE, /* this CPU or build cannot run the kernel; da8w4_kernel_reason says why */
    DA8W4_WORKSPACE_TOO_SMALL /* less than da8w4_workspace_bytes */
} da8w4_status;

/* A sentence for a status; never NULL. */
DA8W4_API const char *da8w4_status_text(da8w4_status status);

typedef enum da8w4_type DA8W4_INT { DA8W4_F32 = 0, DA8W4_F16, DA8W4_BF16, DA8W4_U8, DA8W4_S8 } da8w4_type;

/* ---- weights ------------------------------------------------------------------------------- */

typedef enum da8w4_codes DA8W4_INT {
    DA8W4_CODES_U4 = 0,    /* one byte a weight, 0..15 */
    DA8W4_CODES_S4,        /* one byte a weight, -8..7 */
    DA8W4_CODES_LOW_FIRST, /* two weights a byte, 0..15, the even k in the low nibble */
    DA8W4_CODES_HIGH_FIRST /* two weights a byte, 0..15, the even k in the high nibble */
} da8w4_codes;

/* A weight matrix as its quantizer left it:
 *     value[n, k] = (code[n, k] - zp[n, g]) * scale[n, g] + offset[n, g] */
typedef struct da8w4_weight {
    size_t n, k;
    size_t group; /* consecutive k that share a scale; a multiple of 4, or k. The last may be shorter. */
    da8w4_codes format;
    const void *codes;    /* n rows of k codes */
    size_t codes_stride;  /* bytes from one row to the next */
    const float *scales;  /* [n][groups], groups = ceil(k / group) */
    const int8_t *zps;    /* [n][groups], or NULL */
    int zp;               /* every zero point, where zps is NULL */
    const float *offsets; /* [n][groups], or NULL: none */
} da8w4_weight;

/* A packed weight: a view, which owns nothing. The arrays are in blocks of 32 columns (n). */
typedef struct da8w4_packed {
    size_t n, k, group;
    da8w4_type scale_type; /* of offsets, too */
    int zp;                /* every zero point, where zps is NULL */
    const uint8_t *codes;  /* [blocks][ceil(k / 4)][64] */
    const void *scales;    /* [blocks][groups][32] of scale_type */
    const int8_t *zps;     /* [blocks][groups][32], or NULL */
    const void *offsets;   /* [blocks][groups][32] of scale_type, or NULL */
    const float *sums;     /* [blocks][32]: the sum over k of the dequantized column */
} da8w4_packed;

/* Bytes of the arrays of a packed weight: zps is 0 where every zero point is the same, offsets where there are none. */
typedef struct da8w4_packed_bytes {
    size_t codes, scales, zps, offsets, sums;
} da8w4_packed_bytes;

/* Looks at sizes, scales, zero points and offsets, and decides how they will be stored: fills `packed` but
 * for its pointers, and the sizes of the arrays that da8w4_pack will write. */
DA8W4_API da8w4_status da8w4_plan_pack(const da8w4_weight *weight, da8w4_packed *packed, da8w4_packed_bytes *bytes);

/* Packs into the arrays that the caller allocated by the plan, with several threads. `zps` and `offsets`
 * are looked at only if the plan gave them a size. The input is not changed. DA8W4_BAD_CODE: what the arrays
 * hold is then of no use. */
DA8W4_API da8w4_status da8w4_pack(const da8w4_weight *weight, const da8w4_packed *plan, uint8_t *codes, void *scales,
                                  int8_t *zps, void *offsets, float *sums);

/* Gives back what was packed: codes [n][k] as 0..15, scales, zps and offsets [n][groups]; `offsets` is
 * looked at only if the weight has some. Weights that came as -8..7 come back as 0..15 with zero points 8
 * higher. */
DA8W4_API da8w4_status da8w4_unpack(const da8w4_packed *packed, uint8_t *codes, float *scales, int8_t *zps,
                                    float *offsets);

/* Memory aligned to 64 bytes, and from 2 MiB upward to 2 MiB, from 64 KiB on in huge pages where the system
 * grants them (allocations below 2 MiB share some): reading weights is bound by DRAM, and huge pages read
 * faster. NULL where there is none. */
DA8W4_API void *da8w4_alloc(size_t bytes);
DA8W4_API void da8w4_free(void *memory);

/* ---- activations --------------------------------------------------------------------------- */

/* Quantizes m rows of k floats (x_type F32, F16 or BF16), each row by itself, to uint8 with a zero
 * point or, if symmetric, to int8. A row with NaN, with Inf, or of a range beyond float32 gets the
 * scale NaN, the zero point 128 (symmetric: 0), and values that all equal it. No scale is below 2^-126.
 * `kernel` NULL is the default. */
DA8W4_API da8w4_status da8w4_quantize_rows(const char *kernel, const void *x, da8w4_type x_type, size_t x_stride,
                                           size_t m, size_t k, int symmetric, void *act, size_t act_stride,
                                           float *act_scales, int32_t *act_zps);

/* ---- the product --------------------------------------------------------------------------- */

typedef struct da8w4_call {
    size_t m;
    const void *act; /* [m][k]: U8 or S8 for da8w4_gemm; F32, F16 or BF16 for da8w4_linear */
    da8w4_type act_type;
    size_t act_stride;
    const float *act_scales; /* [m], gemm only; NULL: 1 */
    const int32_t *act_zps;  /* [m], gemm only; NULL: 0 */
    int symmetric;           /* linear only: quantize to int8 instead of uint8 */
    const da8w4_packed *weight;
    const float *bias; /* [n], or NULL */
    void *out;         /* [m][n] */
    da8w4_type out_type;
    size_t out_stride;
    const char *kernel; /* NULL: the default one */
    size_t threads;     /* at most so many; 0: da8w4_get_num_threads() */
    void *workspace;    /* aligned to 64 bytes */
    size_t workspace_bytes;
} da8w4_call;

/* Bytes of workspace that this call needs with the number of threads that it would use now. Reads m, weight, kernel
 * and threads; 0 where one of them is not valid. A call with fewer returns DA8W4_WORKSPACE_TOO_SMALL, so a caller may
 * keep one workspace, and ask only then how large a new one must be. */
DA8W4_API size_t da8w4_workspace_bytes(const da8w4_call *call);

/* Activations that are already quantized. Nothing is written to out unless DA8W4_OK is returned. */
DA8W4_API da8w4_status da8w4_gemm(const da8w4_call *call);

/* Quantizes each row and multiplies: the bits of da8w4_quantize_rows followed by da8w4_gemm. */
DA8W4_API da8w4_status da8w4_linear(const da8w4_call *call);

/* ---- kernels, CPU, threads ------------------------------------------------------------------ */

/* Kernels of this build, best first. */
DA8W4_API size_t da8w4_kernel_count(void);
DA8W4_API const char *da8w4_kernel_name(size_t index);
DA8W4_API const char *da8w4_kernel_description(size_t index);

/* Why kernel `index` cannot run here; NULL where it can. */
DA8W4_API const char *da8w4_kernel_reason(size_t index);

/* The kernel that calls without a name use: PYDA8W4_KERNEL, or the first that can run. Decided once,
 * at the first call. */
DA8W4_API da8w4_status da8w4_default_kernel(size_t *index);

/* Instruction sets that the kernels ask about: name of bit `index` (NULL past the last), and whether
 * CPU and operating system have it. */
DA8W4_API const char *da8w4_cpu_feature(size_t index, int *present);

/* Threads of this process: those set here, else OMP_NUM_THREADS, else the CPUs that affinity and cgroup
 * quota leave; but, unless set here, no more than the limit of an OpenMP runtime that is loaded. 0 unsets. */
DA8W4_API void da8w4_set_num_threads(size_t threads);
DA8W4_API size_t da8w4_get_num_threads(void);

/* Whose threads do the work: "own", or the path of the OpenMP runtime found in the process. */
DA8W4_API const char *da8w4_thread_runtime(void);

#ifdef __cplusplus
}
#endif

#endif
