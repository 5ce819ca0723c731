# include/pyda8w4/pyda8w4.h as Cython sees it. Arrays are void pointers, which C converts.
from libc.stdint cimport uint64_t

cdef extern from "pyda8w4/pyda8w4.h" nogil:
    ctypedef enum da8w4_status:
        DA8W4_OK
        DA8W4_BAD_CODE
        DA8W4_BAD_SCALE
        DA8W4_INEXACT_SCALE
        DA8W4_INT32_OVERFLOW
        DA8W4_BAD_ACT_ZP
        DA8W4_BAD_EXPERT
        DA8W4_TRANSFORM_NEEDS_FLOATS
        DA8W4_UNKNOWN_KERNEL
        DA8W4_KERNEL_UNAVAILABLE
        DA8W4_WORKSPACE_TOO_SMALL
        DA8W4_NOT_FINITE
        DA8W4_NO_MEMORY

    ctypedef enum da8w4_type:
        DA8W4_F32
        DA8W4_F16
        DA8W4_BF16
        DA8W4_U8
        DA8W4_S8

    ctypedef enum da8w4_kind:
        pass

    ctypedef enum da8w4_codes:
        pass

    ctypedef enum da8w4_scheme:
        pass

    ctypedef enum da8w4_activation:
        pass

    ctypedef struct da8w4_weight:
        size_t n
        size_t k
        size_t group
        size_t super
        da8w4_kind kind
        da8w4_codes format
        const void *codes
        size_t codes_stride
        const void *table
        const void *scales
        const void *sub_scales
        da8w4_type sub_scale_type
        const void *zps
        int zp
        const void *offsets
        const void *sub_offsets
        da8w4_type sub_offset_type

    ctypedef struct da8w4_packed:
        size_t n
        size_t k
        size_t group
        size_t super
        da8w4_kind kind
        da8w4_type scale_type
        da8w4_type sub_scale_type
        da8w4_type sub_offset_type
        int zp
        const void *codes
        const void *table
        const void *scales
        const void *sub_scales
        const void *zps
        const void *offsets
        const void *sub_offsets
        const void *sums
        const void *perm
        const void *factors
        size_t rotation

    ctypedef struct da8w4_packed_bytes:
        size_t zps

    ctypedef struct da8w4_packed_arrays:
        void *codes
        void *scales
        void *sub_scales
        void *zps
        void *offsets
        void *sub_offsets
        void *sums

    ctypedef enum da8w4_zeros:
        pass

    ctypedef struct da8w4_quantization:
        size_t n
        size_t k
        size_t group
        size_t super
        const void *values
        da8w4_type values_type
        size_t values_stride
        const void *importance
        da8w4_zeros zeros
        void *codes
        void *scales
        void *zps
        void *offsets
        void *sub_scales
        void *sub_offsets

    ctypedef struct da8w4_gating:
        da8w4_activation activation
        int interleaved
        float alpha
        float limit

    ctypedef struct da8w4_call:
        size_t m
        const void *act
        da8w4_type act_type
        size_t act_stride
        const void *act_scales
        const void *act_zps
        da8w4_scheme scheme
        const da8w4_packed *weight
        const void *bias
        const da8w4_gating *gating
        void *out
        da8w4_type out_type
        size_t out_stride
        const char *kernel
        size_t threads
        void *workspace
        size_t workspace_bytes

    ctypedef struct da8w4_path:
        const char *kernel
        int fast
        const char *reason
        size_t codes

    ctypedef struct da8w4_explanation:
        const char *kernel
        int unpacked
        size_t packed_max
        size_t act_rows
        size_t tile_rows
        size_t row_block
        size_t k_block
        size_t threads
        size_t path_count
        da8w4_path paths[4]

    ctypedef struct da8w4_grouped_call:
        size_t experts
        const da8w4_packed *weights
        const void *bias
        const void *rows_of_expert
        size_t m
        const void *act
        da8w4_type act_type
        size_t act_stride
        da8w4_scheme scheme
        const da8w4_gating *gating
        void *out
        da8w4_type out_type
        size_t out_stride
        const char *kernel
        size_t threads
        void *workspace
        size_t workspace_bytes

    ctypedef struct da8w4_moe_call:
        size_t experts
        const da8w4_packed *gate_up
        const da8w4_packed *down
        const void *gate_up_bias
        const void *down_bias
        const da8w4_gating *gating
        size_t m
        size_t slots
        const void *act
        da8w4_type act_type
        size_t act_stride
        da8w4_scheme scheme
        const void *ids
        const void *weights
        float scaling
        void *out
        da8w4_type out_type
        size_t out_stride
        const char *kernel
        size_t threads
        void *workspace
        size_t workspace_bytes

    const char *da8w4_status_text(da8w4_status status)
    const char *da8w4_version()
    da8w4_status da8w4_plan_pack(const da8w4_weight *weight, da8w4_packed *packed, da8w4_packed_bytes *sizes)
    da8w4_status da8w4_pack(const da8w4_weight *weight, const da8w4_packed *plan, const da8w4_packed_arrays *to)
    da8w4_status da8w4_quantize_weight(const da8w4_quantization *quantization)
    da8w4_status da8w4_unpack(const da8w4_packed *packed, void *codes, void *scales, void *zps, void *offsets)
    da8w4_status da8w4_dequantize(const da8w4_packed *packed, const size_t *columns, size_t count, void *out,
                                  size_t out_stride)
    void *da8w4_alloc(size_t size)
    void da8w4_free(void *memory)
    da8w4_status da8w4_quantize_rows(const char *kernel, const void *x, da8w4_type x_type, size_t x_stride, size_t m,
                                     size_t k, da8w4_scheme scheme, void *act, size_t act_stride, void *act_scales,
                                     void *act_zps)
    size_t da8w4_workspace_bytes(const da8w4_call *call)
    da8w4_status da8w4_gemm(const da8w4_call *call)
    da8w4_status da8w4_linear(const da8w4_call *call)
    da8w4_status da8w4_explain(const da8w4_call *call, da8w4_explanation *explanation)
    da8w4_status da8w4_time_read(const char *kernel, const void *memory, size_t size, size_t passes, int streams,
                                 size_t threads, uint64_t *nanoseconds)
    da8w4_status da8w4_time_dots(const char *kernel, size_t rounds, size_t threads, uint64_t *multiplications,
                                 uint64_t *nanoseconds)
    size_t da8w4_grouped_workspace_bytes(const da8w4_grouped_call *call)
    da8w4_status da8w4_grouped_linear(const da8w4_grouped_call *call)
    size_t da8w4_moe_workspace_bytes(const da8w4_moe_call *call)
    da8w4_status da8w4_moe(const da8w4_moe_call *call)
    size_t da8w4_kernel_count()
    const char *da8w4_kernel_name(size_t index)
    const char *da8w4_kernel_description(size_t index)
    const char *da8w4_kernel_reason(size_t index)
    da8w4_status da8w4_default_kernel(size_t *index)
    const char *da8w4_cpu_feature(size_t index, int *present)
    void da8w4_set_num_threads(size_t threads)
    size_t da8w4_get_num_threads()
    const char *da8w4_thread_runtime()

cdef extern from "_library_path.h":
    object path_of_library(const void *function)
