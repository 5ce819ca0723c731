"""The C interface on numpy arrays: addresses in, status codes out.

Private and unchecked: callers pass C-contiguous arrays of the right types and shapes, or their addresses.
"""
import threading

from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS, PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from libc.stdint cimport int8_t, int32_t, uint8_t

from pyda8w4._api cimport *

cdef extern from "<dlfcn.h>" nogil:
    ctypedef struct Dl_info:
        const char *dli_fname
    int dladdr(const void *address, Dl_info *info)


# Statuses that depend on values, which callers cannot check beforehand without reading all of them.
_NAMES = {
    DA8W4_BAD_CODE: "BAD_CODE",
    DA8W4_INT32_OVERFLOW: "INT32_OVERFLOW",
    DA8W4_BAD_ACT_ZP: "BAD_ACT_ZP",
    DA8W4_UNKNOWN_KERNEL: "UNKNOWN_KERNEL",
    DA8W4_KERNEL_UNAVAILABLE: "KERNEL_UNAVAILABLE",
}


class CoreError(Exception):
    """A status other than OK: ``args`` are its name (of those above, else None) and its text."""


cdef int check(da8w4_status status) except -1:
    if status != DA8W4_OK:
        raise CoreError(_NAMES.get(status), da8w4_status_text(status).decode())
    return 0


cdef void *address(object array, int flags) except? NULL:
    """Of an array that the caller keeps alive, or that is given as its address; NULL for None."""
    if array is None:
        return NULL
    if isinstance(array, int):
        return <void *><size_t>array
    cdef Py_buffer view
    PyObject_GetBuffer(array, &view, PyBUF_C_CONTIGUOUS | flags)
    cdef void *start = view.buf
    PyBuffer_Release(&view)
    return start


cdef const char *name_or_null(bytes kernel):
    if kernel is None:
        return NULL
    return kernel


cdef class Memory:
    """Bytes from da8w4_alloc, as a writable buffer."""

    cdef void *start
    cdef Py_ssize_t size

    def __cinit__(self, Py_ssize_t size):
        self.size = size
        self.start = da8w4_alloc(<size_t>size)
        if self.start == NULL:
            raise MemoryError(f"cannot allocate {size} bytes")

    def __dealloc__(self):
        da8w4_free(self.start)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.start, self.size, 0, flags)


cdef class Source:
    """A weight matrix to pack; keeps its arrays alive."""

    cdef da8w4_weight weight
    cdef da8w4_packed plan
    cdef tuple arrays

    def __init__(self, size_t n, size_t k, size_t group, int format, codes, size_t codes_stride, scales, zps, int zp,
                 offsets):
        self.arrays = (codes, scales, zps, offsets)
        cdef Py_buffer view
        PyObject_GetBuffer(codes, &view, PyBUF_STRIDES)  # rows may lie apart
        self.weight.codes = view.buf
        PyBuffer_Release(&view)
        self.weight.n, self.weight.k, self.weight.group = n, k, group
        self.weight.format = <da8w4_codes>format
        self.weight.codes_stride = codes_stride
        self.weight.scales = <const float *>address(scales, 0)
        self.weight.zps = <const int8_t *>address(zps, 0)
        self.weight.zp = zp
        self.weight.offsets = <const float *>address(offsets, 0)

    def plan_pack(self):
        """-> scale type, common zero point, bytes of zps."""
        cdef da8w4_packed_bytes sizes
        cdef da8w4_status status
        with nogil:
            status = da8w4_plan_pack(&self.weight, &self.plan, &sizes)
        check(status)
        return <int>self.plan.scale_type, self.plan.zp, sizes.zps

    def pack(self, codes, scales, zps, offsets, sums):
        cdef uint8_t *to_codes = <uint8_t *>address(codes, PyBUF_WRITABLE)
        cdef void *to_scales = address(scales, PyBUF_WRITABLE)
        cdef int8_t *to_zps = <int8_t *>address(zps, PyBUF_WRITABLE)
        cdef void *to_offsets = address(offsets, PyBUF_WRITABLE)
        cdef float *to_sums = <float *>address(sums, PyBUF_WRITABLE)
        cdef da8w4_status status
        with nogil:
            status = da8w4_pack(&self.weight, &self.plan, to_codes, to_scales, to_zps, to_offsets, to_sums)
        check(status)


cdef class View:
    """A da8w4_packed over arrays that it keeps alive, or over addresses, which it does not."""

    cdef da8w4_packed packed
    cdef tuple arrays
    cdef size_t starts[5], ends[5]  # of those arrays

    def __init__(self, size_t n, size_t k, size_t group, int scale_type, int zp, codes, scales, zps,
                 offsets, sums):
        self.arrays = (codes, scales, zps, offsets, sums)
        self.packed.n, self.packed.k, self.packed.group = n, k, group
        self.packed.scale_type = <da8w4_type>scale_type
        self.packed.zp = zp
        self.packed.codes = <const uint8_t *>address(codes, 0)
        self.packed.scales = address(scales, 0)
        self.packed.zps = <const int8_t *>address(zps, 0)
        self.packed.offsets = address(offsets, 0)
        self.packed.sums = <const float *>address(sums, 0)
        cdef Py_buffer view
        for i, array in enumerate(self.arrays):
            self.starts[i] = self.ends[i] = 0
            if array is not None and not isinstance(array, int):
                PyObject_GetBuffer(array, &view, PyBUF_C_CONTIGUOUS)
                self.starts[i] = <size_t>view.buf
                self.ends[i] = self.starts[i] + <size_t>view.len
                PyBuffer_Release(&view)

    def overlaps(self, array):
        """Whether a C-contiguous array shares memory with this one's."""
        cdef Py_buffer view
        PyObject_GetBuffer(array, &view, PyBUF_C_CONTIGUOUS)
        cdef size_t start = <size_t>view.buf, end = start + <size_t>view.len
        PyBuffer_Release(&view)
        cdef int i
        for i in range(5):
            if start < self.ends[i] and self.starts[i] < end:
                return True
        return False

    def unpack(self, codes, scales, zps, offsets):
        cdef uint8_t *to_codes = <uint8_t *>address(codes, PyBUF_WRITABLE)
        cdef float *to_scales = <float *>address(scales, PyBUF_WRITABLE)
        cdef int8_t *to_zps = <int8_t *>address(zps, PyBUF_WRITABLE)
        cdef float *to_offsets = <float *>address(offsets, PyBUF_WRITABLE)
        cdef da8w4_status status
        with nogil:
            status = da8w4_unpack(&self.packed, to_codes, to_scales, to_zps, to_offsets)
        check(status)


def quantize_rows(x, int x_type, size_t m, size_t k, bint symmetric, act, scales, zps, bytes kernel):
    cdef const void *from_x = address(x, 0)
    cdef void *to_act = address(act, PyBUF_WRITABLE)
    cdef float *to_scales = <float *>address(scales, PyBUF_WRITABLE)
    cdef int32_t *to_zps = <int32_t *>address(zps, PyBUF_WRITABLE)
    cdef const char *name = name_or_null(kernel)
    cdef size_t x_stride = k * (4 if x_type == DA8W4_F32 else 2)
    cdef da8w4_status status
    with nogil:
        status = da8w4_quantize_rows(name, from_x, <da8w4_type>x_type, x_stride, m, k, symmetric, to_act, k,
                                     to_scales, to_zps)
    check(status)


# One workspace for each Python thread, grown to the largest call so far and freed with the thread.
_workspaces = threading.local()


def multiply(bint quantize, size_t m, act, int act_type, size_t act_stride, act_scales, act_zps, bint symmetric,
             View weight, bias, out, int out_type, size_t out_stride, bytes kernel):
    """da8w4_linear where ``quantize``, else da8w4_gemm."""
    cdef da8w4_call call
    call.m = m
    call.act = address(act, 0)
    call.act_type = <da8w4_type>act_type
    call.act_stride = act_stride
    call.act_scales = <const float *>address(act_scales, 0)
    call.act_zps = <const int32_t *>address(act_zps, 0)
    call.symmetric = symmetric
    call.weight = &weight.packed
    call.bias = <const float *>address(bias, 0)
    call.out = address(out, PyBUF_WRITABLE)
    call.out_type = <da8w4_type>out_type
    call.out_stride = out_stride
    call.kernel = name_or_null(kernel)

    call.threads = 0

    cdef Memory workspace = getattr(_workspaces, "memory", None)
    if workspace is None:
        workspace = _workspaces.memory = Memory(da8w4_workspace_bytes(&call))
    cdef da8w4_status status = DA8W4_WORKSPACE_TOO_SMALL
    while True:
        call.workspace = workspace.start
        call.workspace_bytes = <size_t>workspace.size
        with nogil:
            status = da8w4_linear(&call) if quantize else da8w4_gemm(&call)
        if status != DA8W4_WORKSPACE_TOO_SMALL:
            break
        workspace = _workspaces.memory = Memory(da8w4_workspace_bytes(&call))
    check(status)


def kernel_table():
    """-> [(name, description, reason it cannot run or None)], best first."""
    rows = []
    cdef const char *reason
    for i in range(da8w4_kernel_count()):
        reason = da8w4_kernel_reason(i)
        rows.append((da8w4_kernel_name(i).decode(), da8w4_kernel_description(i).decode(),
                     None if reason == NULL else reason.decode()))
    return rows


def default_kernel():
    cdef size_t index = 0
    check(da8w4_default_kernel(&index))
    return da8w4_kernel_name(index).decode()


def cpu_features():
    """-> {name: present}."""
    features = {}
    cdef int present = 0
    cdef size_t index = 0
    cdef const char *name = da8w4_cpu_feature(index, &present)
    while name != NULL:
        features[name.decode()] = bool(present)
        index += 1
        name = da8w4_cpu_feature(index, &present)
    return features


def set_num_threads(size_t threads):
    da8w4_set_num_threads(threads)


def get_num_threads():
    return da8w4_get_num_threads()


def thread_runtime():
    return da8w4_thread_runtime().decode()


def version():
    return da8w4_version().decode()


def library_path():
    """Of the shared library with the C interface."""
    cdef Dl_info info
    if not dladdr(<const void *>&da8w4_alloc, &info):
        raise OSError("the dynamic linker does not know where the library is")
    return info.dli_fname.decode()
