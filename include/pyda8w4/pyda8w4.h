/* pyda8w4: linear layers with weights of 4 to 8 bits and activations that are quantized at run time.
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
    DA8W4_BAD_ARGUMENT,           /* a null pointer, a size of 0, an unknown type, a stride too short */
    DA8W4_BAD_GROUP,              /* the group is neither a multiple of 4 nor all of k */
    DA8W4_BAD_CODE,               /* a weight code is out of the range of its kind */
    DA8W4_BAD_SCALE,              /* a weight scale is NaN or infinite */
    DA8W4_BAD_OFFSET,             /* a weight offset is NaN or infinite */
    DA8W4_BAD_WEIGHT_ZP,          /* a weight zero point leaves -128..127 once codes are as they are stored */
    DA8W4_INEXACT_SCALE,          /* a scale or offset of two levels is not exact in float32 */
    DA8W4_INT32_OVERFLOW,         /* group * 128 * max|value of a code - zp| does not fit int32 */
    DA8W4_BAD_ACT_ZP,             /* an activation zero point is outside the activation's type */
    DA8W4_BAD_EXPERT,             /* an expert's id is neither -1 nor below the number of experts, or rows_of_expert
                                     does not add up to m */
    DA8W4_TRANSFORM_NEEDS_FLOATS, /* da8w4_gemm with a weight that has factors or a rotation */
    DA8W4_UNKNOWN_KERNEL,         /* no kernel has this name */
    DA8W4_KERNEL_UNAVAILABLE,     /* this CPU or build cannot run the kernel; da8w4_kernel_reason says why */
    DA8W4_WORKSPACE_TOO_SMALL,    /* less than da8w4_workspace_bytes */
    DA8W4_NOT_FINITE,             /* a float weight that is to be quantized is NaN or infinite */
    DA8W4_NO_MEMORY               /* there is none for what da8w4_quantize_weight needs */
} da8w4_status;

/* A sentence for a status; never NULL. */
DA8W4_API const char *da8w4_status_text(da8w4_status status);

typedef enum da8w4_type DA8W4_INT { DA8W4_F32 = 0, DA8W4_F16, DA8W4_BF16, DA8W4_U8, DA8W4_S8 } da8w4_type;

/* ---- weights ------------------------------------------------------------------------------- */

/* What the codes of a weight are, and how many bits each takes when it is packed. */
typedef enum da8w4_kind DA8W4_INT {
    DA8W4_INT4 = 0, /* 0..15 */
    DA8W4_INT5,     /* 0..31 */
    DA8W4_INT6,     /* 0..63 */
    DA8W4_INT8,     /* -128..127 */
    DA8W4_TABLE4    /* 0..15, which stand for the 16 int8 values of a table */
} da8w4_kind;

typedef enum da8w4_codes DA8W4_INT {
    DA8W4_CODES_UNSIGNED = 0, /* one byte a code, in the range of its kind; not for DA8W4_INT8 */
    DA8W4_CODES_SIGNED,       /* one byte a code, from -8, -16, -32 or -128 on; not for DA8W4_TABLE4 */
    DA8W4_CODES_LOW_FIRST,    /* two codes a byte, 0..15, the even k in the low nibble */
    DA8W4_CODES_HIGH_FIRST    /* two codes a byte, 0..15, the even k in the high nibble */
} da8w4_codes;

/* A weight matrix as its quantizer left it:
 *
 *     value[n, k] = (code[n, k] - zp[n, g]) * scale[n, g] + offset[n, g]      table[code] in the place of code
 *
 * Scales, and offsets with them, may have two levels: supers = ceil(groups / super) numbers for each n, each for
 * `super` consecutive groups, times small integers for each group. */
typedef struct da8w4_weight {
    size_t n, k;
    size_t group; /* consecutive k that share a scale; a multiple of 4, or k. The last may be shorter. */
    size_t super; /* groups of a super-group; 0: one level */
    da8w4_kind kind;
    da8w4_codes format;
    const void *codes;          /* n rows of k codes */
    size_t codes_stride;        /* bytes from one row to the next */
    const int8_t *table;        /* [16]; DA8W4_TABLE4 only */
    const float *scales;        /* [n][groups], groups = ceil(k / group); of two levels [n][supers] */
    const void *sub_scales;     /* [n][groups]; of two levels only */
    da8w4_type sub_scale_type;  /* U8 or S8 */
    const int8_t *zps;          /* [n][groups], or NULL. Those of a table are 0. */
    int zp;                     /* every zero point, where zps is NULL */
    const float *offsets;       /* as scales, or NULL: none */
    const void *sub_offsets;    /* [n][groups]; of two levels only */
    da8w4_type sub_offset_type; /* U8 or S8 */
} da8w4_weight;

/* A packed weight: a view, which owns nothing. The arrays are in blocks of 32 columns (n). */
typedef struct da8w4_packed {
    size_t n, k, group;
    size_t super; /* groups of a super-group; 0: one level */
    da8w4_kind kind;
    da8w4_type scale_type;      /* of offsets, too */
    da8w4_type sub_scale_type;  /* U8 or S8, where there are two levels */
    da8w4_type sub_offset_type; /* U8 or S8, where there are two levels and offsets */
    int zp;                     /* every zero point, where zps is NULL */
    const uint8_t *codes;       /* [blocks][lines][64], with so many lines: da8w4_packed_bytes */
    const int8_t *table;        /* [16], or NULL: codes stand for themselves */
    const void *scales;         /* [blocks][groups or supers][32] of scale_type */
    const void *sub_scales;     /* [blocks][groups][32] of sub_scale_type, or NULL: one level */
    const int8_t *zps;          /* [blocks][groups][32], or NULL */
    const void *offsets;        /* as scales, or NULL */
    const void *sub_offsets;    /* [blocks][groups][32] of sub_offset_type, or NULL */
    const float *sums;          /* [blocks][32]: the sum over k of the dequantized column */
    const int32_t *perm;        /* [k], or NULL: position k of the weight multiplies act[perm[k]]; a permutation */
    const float *factors;       /* [k], or NULL: position k multiplies act[perm[k]] * factors[k] */
    size_t rotation;            /* positions of a block of the Hadamard transform that these numbers go through, a power
                                   of two from 2 to 1024; 0: none */
} da8w4_packed;

/* Bytes of the arrays of a packed weight that da8w4_pack writes; 0 where it has none. zps: where not all are the same.
 */
typedef struct da8w4_packed_bytes {
    size_t codes, scales, sub_scales, zps, offsets, sub_offsets, sums;
} da8w4_packed_bytes;

/* Where they are to be written. Those of no bytes are not looked at. */
typedef struct da8w4_packed_arrays {
    uint8_t *codes;
    void *scales, *sub_scales;
    int8_t *zps;
    void *offsets, *sub_offsets;
    float *sums;
} da8w4_packed_arrays;

/* Looks at sizes, scales, zero points and offsets, and decides how they will be stored: fills `packed` but
 * for its pointers, and the sizes of the arrays that da8w4_pack will write. A permutation, factors and a rotation
 * are no business of packing: the codes are those of the transformed inputs, and who packs adds the fields. */
DA8W4_API da8w4_status da8w4_plan_pack(const da8w4_weight *weight, da8w4_packed *packed, da8w4_packed_bytes *bytes);

/* Packs into the arrays that the caller allocated by the plan, with several threads. The input is not changed.
 * DA8W4_BAD_CODE: what the arrays hold is then of no use. */
DA8W4_API da8w4_status da8w4_pack(const da8w4_weight *weight, const da8w4_packed *plan, const da8w4_packed_arrays *to);

/* Gives back what was packed: codes [n][k], one byte each, in the range of their kind; scales, zps and offsets
 * [n][groups], two levels multiplied out. `offsets` is looked at only if the weight has some. Codes of 4 to 6 bits
 * that came signed come back unsigned, with zero points higher by half their range. Reads neither perm nor factors
 * nor rotation. */
DA8W4_API da8w4_status da8w4_unpack(const da8w4_packed *packed, uint8_t *codes, float *scales, int8_t *zps,
                                    float *offsets);

/* Values of `count` columns (NULL: of the first `count`), each below n: out[i] is k floats in the order of act,
 *     out[i][perm[k]] = rotated((value of code - zp) * scale + offset) * factors[k],
 *
 * each operation rounded to float32. */
DA8W4_API da8w4_status da8w4_dequantize(const da8w4_packed *packed, const size_t *columns, size_t count, float *out,
                                        size_t out_stride);

/* The column sums of a packed weight, which does not need its own: to sums [blocks][32]. For parts of a weight
 * along k. */
DA8W4_API da8w4_status da8w4_sum_columns(const da8w4_packed *packed, float *sums);

/* What stands beside a code: value = (code - 8) * scale, (code - zp) * scale, or code * scale + offset. */
typedef enum da8w4_zeros DA8W4_INT {
    DA8W4_ZEROS_NONE = 0, /* nothing; scales have either sign */
    DA8W4_ZEROS_INTEGER,  /* a zero point of 0..15 for each group */
    DA8W4_ZEROS_FLOAT     /* an offset for each group */
} da8w4_zeros;

/* A float weight, and where its codes of 4 bits and all that they need are written, as da8w4_weight takes them. */
typedef struct da8w4_quantization {
    size_t n, k;
    size_t group;       /* as in da8w4_weight */
    size_t super;       /* the same: 0 is one level of scales */
    const void *values; /* [n][k] */
    da8w4_type values_type;
    size_t values_stride;    /* bytes from one row to the next */
    const float *importance; /* [k]: what a squared error counts, finite, none below 0; NULL: all the same */
    da8w4_zeros zeros;
    uint8_t *codes;      /* [n][k], 0..15 */
    float *scales;       /* [n][groups], of two levels [n][supers]; each is a bfloat16 */
    int8_t *zps;         /* [n][groups]; DA8W4_ZEROS_INTEGER only */
    float *offsets;      /* as scales; DA8W4_ZEROS_FLOAT only */
    void *sub_scales;    /* [n][groups], U8, or S8 with DA8W4_ZEROS_NONE; of two levels only */
    int8_t *sub_offsets; /* [n][groups]; of two levels and DA8W4_ZEROS_FLOAT only */
} da8w4_quantization;

/* Searches scales, zero points and offsets of little squared error, sum of importance * (value - weight)^2, for each
 * group of each row; the same ones on every CPU. Uses several threads, and memory for a super-group of four rows in
 * each. DA8W4_BAD_SCALE: the range of a group does not fit float32. Unless DA8W4_OK is returned, what the arrays hold
 * is of no use. */
DA8W4_API da8w4_status da8w4_quantize_weight(const da8w4_quantization *quantization);

/* Memory aligned to 64 bytes, and from 2 MiB upward to 2 MiB, from 64 KiB on in huge pages where the system
 * grants them (allocations below 2 MiB share some): reading weights is bound by DRAM, and huge pages read
 * faster. NULL where there is none. */
DA8W4_API void *da8w4_alloc(size_t bytes);
DA8W4_API void da8w4_free(void *memory);

/* ---- activations --------------------------------------------------------------------------- */

/* How da8w4_linear quantizes activations; docs/numbers.md has the formulas. */
typedef enum da8w4_scheme DA8W4_INT {
    DA8W4_ACT_UINT8 = 0,  /* uint8, a scale and a zero point for each row */
    DA8W4_ACT_INT8,       /* int8, a scale for each row */
    DA8W4_ACT_INT8_GROUP, /* int8, a scale for each row and group of the weight */
    DA8W4_ACT_INT16       /* int16, a scale for each row, multiplied as two rows of int8 */
} da8w4_scheme;

/* Quantizes m rows of k floats (x_type F32, F16 or BF16), each row by itself, by DA8W4_ACT_UINT8 or DA8W4_ACT_INT8.
 * A row with NaN, with Inf, or of a range beyond float32 gets the scale NaN, the zero point 128 (int8: 0), and values
 * that all equal it. No scale is below 2^-126. `kernel` NULL is the default. */
DA8W4_API da8w4_status da8w4_quantize_rows(const char *kernel, const void *x, da8w4_type x_type, size_t x_stride,
                                           size_t m, size_t k, da8w4_scheme scheme, void *act, size_t act_stride,
                                           float *act_scales, int32_t *act_zps);

/* ---- gates ----------------------------------------------------------------------------------- */

/* The function of a gate; docs/numbers.md has the operations, each rounded once. */
typedef enum da8w4_activation DA8W4_INT {
    DA8W4_SILU = 0,  /* gate / (1 + exp(-gate)) * up */
    DA8W4_GELU,      /* gate / 2 * (1 + erf(gate / sqrt(2))) * up */
    DA8W4_GELU_TANH, /* the same with its approximation by tanh */
    DA8W4_SWIGLUOAI  /* of gpt-oss: gate / (1 + exp(-alpha * gate)) * (up + 1), both clamped by limit */
} da8w4_activation;

/* How the columns of a product become half as many outputs: activation(gate) * up. n is then even. */
typedef struct da8w4_gating {
    da8w4_activation activation;
    int interleaved;    /* gates are the even columns and ups the odd ones; 0: gates are the first half */
    float alpha, limit; /* of DA8W4_SWIGLUOAI */
} da8w4_gating;

/* ---- the product --------------------------------------------------------------------------- */

typedef struct da8w4_call {
    size_t m;
    const void *act; /* [m][k]: U8 or S8 for da8w4_gemm; F32, F16 or BF16 for da8w4_linear */
    da8w4_type act_type;
    size_t act_stride;
    const float *act_scales; /* [m], gemm only; NULL: 1 */
    const int32_t *act_zps;  /* [m], gemm only; NULL: 0 */
    da8w4_scheme scheme;     /* linear only */
    const da8w4_packed *weight;
    const float *bias;          /* [n], or NULL */
    const da8w4_gating *gating; /* NULL: none */
    void *out;                  /* [m][n], or with gating [m][n / 2] */
    da8w4_type out_type;
    size_t out_stride;
    const char *kernel; /* NULL: the default one */
    size_t threads;     /* at most so many; 0: da8w4_get_num_threads() */
    void *workspace;    /* aligned to 64 bytes */
    size_t workspace_bytes;
} da8w4_call;

/* Bytes of workspace that this call needs with the number of threads that it would use now. Reads m, act_type, scheme,
 * weight, kernel and threads; 0 where one of them is not valid. A call with fewer returns DA8W4_WORKSPACE_TOO_SMALL, so
 * a caller may keep one workspace, and ask only then how large a new one must be. */
DA8W4_API size_t da8w4_workspace_bytes(const da8w4_call *call);

/* Activations that are already quantized. A weight with factors or a rotation is refused. Nothing is written
 * to out unless DA8W4_OK is returned. */
DA8W4_API da8w4_status da8w4_gemm(const da8w4_call *call);

/* Quantizes each row and multiplies: by DA8W4_ACT_UINT8 and DA8W4_ACT_INT8, and a weight without factors and
 * rotation, the bits of da8w4_quantize_rows followed by da8w4_gemm. */
DA8W4_API da8w4_status da8w4_linear(const da8w4_call *call);

/* ---- what a call would do, and what the machine can do --------------------------------------- */

/* How some of a weight is multiplied. */
typedef struct da8w4_path {
    const char *kernel; /* whose micro-kernels do it: amx leaves some to avx512vnni */
    int fast;           /* the fast path, for whole groups of whole K steps; 0: the general path, for all others */
    const char *reason; /* why not the fast path of the call's own kernel; NULL where it is that */
    size_t codes;       /* of the weight that go this way; those of all paths together are n * k */
} da8w4_path;

/* The plan of a call. The strings are the library's. */
typedef struct da8w4_explanation {
    const char *kernel; /* that the call chooses */
    int unpacked; /* each panel of the weight is prepared once for a row block; 0: packed codes are read in place */
    size_t packed_max; /* most rows that read packed codes in place */
    size_t act_rows;   /* rows of int8 that are multiplied: m, or of 16-bit activations 2 * m */
    size_t tile_rows;  /* most rows of act in a micro-tile */
    size_t row_block;  /* most rows of act that pass over a panel together: each row block reads the weight again */
    size_t k_block;    /* the longest K block */
    size_t threads;    /* that the call is worth, of those that it may use */
    size_t path_count;
    da8w4_path paths[4];
} da8w4_explanation;

/* What da8w4_linear or da8w4_gemm would do with this call. Reads what da8w4_workspace_bytes reads, and the weight's
 * zero points; DA8W4_BAD_ARGUMENT where there are no rows. */
DA8W4_API da8w4_status da8w4_explain(const da8w4_call *call, da8w4_explanation *explanation);

/* The time in which up to `threads` threads (0: da8w4_get_num_threads()) read `bytes` bytes at `memory` with the loads
 * of a kernel, `passes` times: each its part, from one end to the other (`streams` 1), or its halves side by side (2).
 * Some CPUs fetch ahead better with one, some with two. Of less than 256 bytes a thread, nothing is read. */
DA8W4_API da8w4_status da8w4_time_read(const char *kernel, const void *memory, size_t bytes, size_t passes, int streams,
                                       size_t threads, uint64_t *nanoseconds);

/* The time in which each of them makes `rounds` rounds of 8-bit dot products of a kernel, with all operands in
 * registers, and how many multiplications these are together. */
DA8W4_API da8w4_status da8w4_time_dots(const char *kernel, size_t rounds, size_t threads, uint64_t *multiplications,
                                       uint64_t *nanoseconds);

/* ---- experts --------------------------------------------------------------------------------- */

/* Products of rows by weights of one n, k, group, kind and rotation, in which offsets, permutations and factors are all
 * there or all missing. Those that the call has no rows for, but for the first one, are neither read nor checked. */
typedef struct da8w4_grouped_call {
    size_t experts;
    const da8w4_packed *weights;  /* [experts] */
    const float *bias;            /* [experts][n], or NULL */
    const size_t *rows_of_expert; /* [experts]: how many of the rows, which come expert by expert, are each one's */
    size_t m;                     /* the sum of these */
    const void *act;              /* [m][k]: F32, F16 or BF16 */
    da8w4_type act_type;
    size_t act_stride;
    da8w4_scheme scheme;
    const da8w4_gating *gating; /* NULL: none */
    void *out;                  /* [m][n], or with gating [m][n / 2] */
    da8w4_type out_type;
    size_t out_stride;
    const char *kernel; /* NULL: the default one */
    size_t threads;     /* at most so many; 0: da8w4_get_num_threads() */
    void *workspace;    /* aligned to 64 bytes */
    size_t workspace_bytes;
} da8w4_grouped_call;

/* Reads all but act, out and rows_of_expert; 0 where one of them is not valid. */
DA8W4_API size_t da8w4_grouped_workspace_bytes(const da8w4_grouped_call *call);

/* The bits of da8w4_linear for each expert and its rows. */
DA8W4_API da8w4_status da8w4_grouped_linear(const da8w4_grouped_call *call);

/* A mixture of experts, of whose `experts` each token takes `slots`:
 *
 *     out[t] = sum over s of (weights[t][s] * scaling) * down[ids[t][s]](gating(gate_up[ids[t][s]](act[t])))
 */
typedef struct da8w4_moe_call {
    size_t experts;
    const da8w4_packed *gate_up, *down;    /* [experts]: of 2 * i columns, and of i rows and n columns */
    const float *gate_up_bias, *down_bias; /* [experts][2 * i] and [experts][n], or NULL */
    const da8w4_gating *gating;            /* not NULL */
    size_t m, slots;                       /* slots: below 2^23 */
    const void *act;                       /* [m][k]: F32, F16 or BF16 */
    da8w4_type act_type;
    size_t act_stride;
    da8w4_scheme scheme;  /* of both products */
    const int32_t *ids;   /* [m][slots]; -1: the slot adds nothing */
    const float *weights; /* [m][slots] */
    float scaling;        /* of all weights */
    void *out;            /* [m][n] */
    da8w4_type out_type;
    size_t out_stride;
    const char *kernel; /* NULL: the default one */
    size_t threads;     /* at most so many; 0: da8w4_get_num_threads() */
    void *workspace;    /* aligned to 64 bytes */
    size_t workspace_bytes;
} da8w4_moe_call;

/* Reads all but act, ids, weights and out; 0 where one of them is not valid. */
DA8W4_API size_t da8w4_moe_workspace_bytes(const da8w4_moe_call *call);

/* Each row of act is quantized once where weights have neither a permutation nor factors. The results of a token are
 * added in the order of its slots, each by one fma in float32. Nothing is written to out unless DA8W4_OK is returned.
 */
DA8W4_API da8w4_status da8w4_moe(const da8w4_moe_call *call);

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
