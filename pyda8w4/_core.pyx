"""The C interface on numpy arrays: addresses in, status codes out.

Private and unchecked: callers pass C-contiguous arrays of the right types and shapes, or their addresses.
"""
import threading

import numpy as np

from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_FillInfo
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from pyda8w4._api cimport *
from pyda8w4._buffers cimport Extent, address, extent, letter_of, overlaps, target, type_bytes

# Statuses that depend on values that callers cannot check without reading them all.
_NAMES = {
    DA8W4_BAD_CODE: "BAD_CODE",
    DA8W4_BAD_SCALE: "BAD_SCALE",
    DA8W4_INEXACT_SCALE: "INEXACT_SCALE",
    DA8W4_INT32_OVERFLOW: "INT32_OVERFLOW",
    DA8W4_BAD_ACT_ZP: "BAD_ACT_ZP",
    DA8W4_BAD_EXPERT: "BAD_EXPERT",
    DA8W4_TRANSFORM_NEEDS_FLOATS: "TRANSFORM_NEEDS_FLOATS",
    DA8W4_UNKNOWN_KERNEL: "UNKNOWN_KERNEL",
    DA8W4_KERNEL_UNAVAILABLE: "KERNEL_UNAVAILABLE",
    DA8W4_NOT_FINITE: "NOT_FINITE",
    DA8W4_NO_MEMORY: "NO_MEMORY",
}


class CoreError(Exception):
    """A status other than OK: ``args`` are its name (of those above, else None) and its text."""


cdef int check(da8w4_status status) except -1 nogil:
    if status != DA8W4_OK:
        with gil:
            raise CoreError(_NAMES.get(status), text(da8w4_status_text(status)))
    return 0


cdef const char *name_of(bytes kernel):
    return NULL if kernel is None else <const char *>kernel


cdef text(const char *chars):
    return None if chars == NULL else chars.decode()


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

    def __init__(self, size_t n, size_t k, size_t group, size_t super, int kind, int format, codes, size_t codes_stride,
                 table, scales, sub_scales, int sub_scale_type, zps, int zp, offsets, sub_offsets, int sub_offset_type):
        self.arrays = codes, table, scales, sub_scales, zps, offsets, sub_offsets
        self.weight = da8w4_weight(
            n=n, k=k, group=group, super=super, kind=<da8w4_kind>kind, format=<da8w4_codes>format,
            codes=extent(codes, PyBUF_STRIDES).start, codes_stride=codes_stride, table=extent(table).start,
            scales=extent(scales).start,
            sub_scales=extent(sub_scales).start, sub_scale_type=<da8w4_type>sub_scale_type,
            zps=extent(zps).start, zp=zp,
            offsets=extent(offsets).start,
            sub_offsets=extent(sub_offsets).start, sub_offset_type=<da8w4_type>sub_offset_type)

    def plan_pack(self):
        """-> scale type, and the zero point of all groups or None."""
        cdef da8w4_packed_bytes sizes
        with nogil:
            check(da8w4_plan_pack(&self.weight, &self.plan, &sizes))
        return <int>self.plan.scale_type, None if sizes.zps else self.plan.zp

    def pack(self, codes, scales, sums, zps=None, offsets=None, sub_scales=None, sub_offsets=None):
        cdef da8w4_packed_arrays to = da8w4_packed_arrays(
            codes=target(codes), scales=target(scales), sub_scales=target(sub_scales), zps=target(zps),
            offsets=target(offsets), sub_offsets=target(sub_offsets), sums=target(sums))
        with nogil:
            check(da8w4_pack(&self.weight, &self.plan, &to))


# Looked up once: a small product waits for them.
cdef object _ndarray = np.ndarray, _empty = np.empty
cdef object _float32 = np.dtype(np.float32), _float16 = np.dtype(np.float16)


cdef bint is_plain(object array, char letter, tuple shape, Extent *found):
    """Whether it is None, or an array of this type and shape that C can read as it is."""
    found[0] = Extent(NULL, NULL)
    return array is None or (
        type(array) is _ndarray and letter_of(array, found) == letter and array.shape == shape)


cdef da8w4_type type_of(char letter):
    return DA8W4_F32 if letter == c"f" else DA8W4_F16 if letter == c"e" else DA8W4_U8 if letter == c"B" else DA8W4_S8


# One workspace for each Python thread, grown to the largest call so far and freed with the thread.
_workspaces = threading.local()


ctypedef fused Call:
    da8w4_call
    da8w4_grouped_call
    da8w4_moe_call


cdef int run(Call *call) except -1:
    cdef da8w4_status status = DA8W4_WORKSPACE_TOO_SMALL
    cdef Memory workspace = getattr(_workspaces, "memory", None)
    cdef size_t size
    while status == DA8W4_WORKSPACE_TOO_SMALL:
        if workspace is None:
            if Call is da8w4_call:
                size = da8w4_workspace_bytes(call)
            elif Call is da8w4_grouped_call:
                size = da8w4_grouped_workspace_bytes(call)
            else:
                size = da8w4_moe_workspace_bytes(call)
            workspace = _workspaces.memory = Memory(<Py_ssize_t>size)
        call.workspace, call.workspace_bytes = workspace.start, <size_t>workspace.size
        with nogil:
            if Call is da8w4_call:
                status = da8w4_linear(call) if call.act_type <= DA8W4_BF16 else da8w4_gemm(call)
            elif Call is da8w4_grouped_call:
                status = da8w4_grouped_linear(call)
            else:
                status = da8w4_moe(call)
        workspace = None
    return check(status)


cdef Extent output_of(out, Extent *inputs, int count) except *:
    cdef Extent output = extent(out, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE)
    if overlaps(output, inputs, count):
        raise ValueError("out must not overlap the inputs, got memory that does")
    return output


cdef class Gating:
    """The function of gates, and where gates and ups are."""

    cdef da8w4_gating gating

    def __init__(self, int activation, bint interleaved, float alpha, float limit):
        self.gating = da8w4_gating(<da8w4_activation>activation, interleaved, alpha, limit)


cdef const da8w4_gating *gating_of(Gating gating):
    return NULL if gating is None else &gating.gating


cdef class View:
    """A da8w4_packed over arrays that it keeps alive, or over addresses, which it does not."""

    cdef da8w4_packed packed
    cdef tuple arrays
    cdef Extent extents[10]  # of those arrays

    def __init__(self, size_t n, size_t k, size_t group, size_t super, int kind, int scale_type, int sub_scale_type,
                 int sub_offset_type, int zp, size_t rotation, codes, scales, sums, zps, offsets, sub_scales,
                 sub_offsets, table, perm, factors):
        self.arrays = codes, scales, sums, zps, offsets, sub_scales, sub_offsets, table, perm, factors
        for i, array in enumerate(self.arrays):
            self.extents[i] = extent(array)
        self.packed = da8w4_packed(
            n=n, k=k, group=group, super=super, kind=<da8w4_kind>kind, scale_type=<da8w4_type>scale_type,
            sub_scale_type=<da8w4_type>sub_scale_type, sub_offset_type=<da8w4_type>sub_offset_type, zp=zp,
            codes=self.extents[0].start, scales=self.extents[1].start, sums=self.extents[2].start,
            zps=self.extents[3].start, offsets=self.extents[4].start,
            sub_scales=self.extents[5].start, sub_offsets=self.extents[6].start,
            table=self.extents[7].start, perm=self.extents[8].start, factors=self.extents[9].start,
            rotation=rotation)

    def linear(self, size_t m, x, int x_type, int scheme, bias, out, int out_type, bytes kernel, Gating gating=None,
               size_t threads=0):
        """Multiply rows of floats."""
        self.multiply(m, x, x_type, None, None, scheme, bias, gating, out, out_type, kernel, threads)

    def explain(self, size_t m, int scheme, bytes kernel, size_t threads):
        """-> what `linear` would do: the fields of da8w4_explanation, with paths as tuples."""
        cdef da8w4_call call = da8w4_call(
            m=m, weight=&self.packed, scheme=<da8w4_scheme>scheme, threads=threads, kernel=name_of(kernel),
            act=NULL, act_type=DA8W4_F32, act_stride=0, act_scales=NULL, act_zps=NULL, bias=NULL, gating=NULL,
            out=NULL, out_type=DA8W4_F32, out_stride=0, workspace=NULL, workspace_bytes=0)
        cdef da8w4_explanation found
        with nogil:
            check(da8w4_explain(&call, &found))
        paths = [(text(path.kernel), bool(path.fast), text(path.reason), path.codes)
                 for path in found.paths[:found.path_count]]
        return {
            "kernel": text(found.kernel), "unpacked": bool(found.unpacked), "packed_max": found.packed_max,
            "act_rows": found.act_rows, "tile_rows": found.tile_rows, "row_block": found.row_block,
            "k_block": found.k_block, "threads": found.threads, "paths": paths}

    def try_plain(self, act, act_scales, act_zps, int scheme, bias, Gating gating, out, size_t threads, bytes kernel):
        """The product, where C can read and write all operands as they are; else None, without having done anything.

        Looking at operands otherwise takes longer than a small product. A new output has the type of floats, else
        float32. `scheme` is below 0 for activations that are quantized already.
        """
        cdef Extent[4] inputs
        cdef Extent output
        cdef size_t m = 1
        if type(act) is not _ndarray:
            return None
        cdef char letter = letter_of(act, &inputs[0]), out_letter = letter if scheme >= 0 else c"f"
        if letter not in ((c"f", c"e") if scheme >= 0 else (c"B", c"b")):
            return None
        cdef tuple shape = act.shape
        if not shape or shape[-1] != self.packed.k:
            return None
        cdef size_t n = self.packed.n, columns = n if gating is None else n // 2
        cdef tuple rows = shape[:-1], wanted = (*rows, columns)
        if gating is not None and n % 2:
            return None
        for size in rows:
            m *= <size_t>size
        if not (is_plain(act_scales, c"f", rows, &inputs[1]) and is_plain(act_zps, c"i", rows, &inputs[2])
                and is_plain(bias, c"f", (n,), &inputs[3])):
            return None
        if out is None:
            out = _empty(wanted, _float32 if out_letter == c"f" else _float16)
            output = extent(out)
        else:
            if type(out) is not _ndarray or out.shape != wanted:
                return None
            out_letter = letter_of(out, &output, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE)
            if out_letter not in (c"f", c"e"):
                return None
            if overlaps(output, inputs, 4) or overlaps(output, self.extents, 10):
                return None
        self.call(m, inputs, type_of(letter), scheme if scheme >= 0 else 0, gating, output, type_of(out_letter), kernel,
                  threads)
        return out

    def gemm(self, size_t m, a, int a_type, a_scales, a_zps, bias, out, int out_type, bytes kernel):
        """Multiply rows that are quantized already."""
        self.multiply(m, a, a_type, a_scales, a_zps, 0, bias, None, out, out_type, kernel, 0)

    cdef int multiply(self, size_t m, act, int act_type, act_scales, act_zps, int scheme, bias, Gating gating, out,
                      int out_type, bytes kernel, size_t threads) except -1:
        cdef Extent[4] inputs = [extent(act), extent(act_scales), extent(act_zps), extent(bias)]
        cdef Extent output = output_of(out, inputs, 4)
        self.check_apart(output)
        return self.call(m, inputs, <da8w4_type>act_type, scheme, gating, output, <da8w4_type>out_type, kernel, threads)

    cdef int call(self, size_t m, Extent *inputs, da8w4_type act_type, int scheme, Gating gating, Extent output,
                  da8w4_type out_type, bytes kernel, size_t threads) except -1:
        """`inputs` are activations, their scales and zero points, and the bias."""
        cdef size_t columns = self.packed.n if gating is None else self.packed.n // 2
        cdef da8w4_call call = da8w4_call(
            m=m, weight=&self.packed, scheme=<da8w4_scheme>scheme, threads=threads, kernel=name_of(kernel),
            act=inputs[0].start, act_type=act_type, act_stride=self.packed.k * type_bytes(act_type),
            act_scales=inputs[1].start, act_zps=inputs[2].start,
            bias=inputs[3].start, gating=gating_of(gating),
            out=output.start, out_type=out_type, out_stride=columns * type_bytes(out_type),
            workspace=NULL, workspace_bytes=0)
        return run(&call)

    cdef int check_apart(self, Extent output) except -1:
        if overlaps(output, self.extents, 10):
            raise ValueError("out must not overlap the inputs, got memory that does")
        return 0

    def unpack(self, codes, scales, zps, offsets):
        cdef address to_codes = target(codes), to_scales = target(scales)
        cdef address to_zps = target(zps), to_offsets = target(offsets)
        with nogil:
            check(da8w4_unpack(&self.packed, to_codes, to_scales, to_zps, to_offsets))

    def dequantize(self, columns, out):
        """Rows of `out`, for each of the columns."""
        cdef address wanted = extent(columns).start, to = target(out)
        cdef size_t count = len(columns), stride = self.packed.k * type_bytes(DA8W4_F32)
        with nogil:
            check(da8w4_dequantize(&self.packed, <const size_t *>wanted, count, to, stride))


cdef inline const void *after(const void *array, size_t size):
    return NULL if array == NULL else <const char *>array + size


cdef class ExpertsView:
    """A da8w4_packed for each expert. `whole` has the arrays of all, and `sizes` their bytes for one expert."""

    cdef View whole
    cdef size_t count
    cdef da8w4_packed *packed

    def __cinit__(self, View whole, size_t count, tuple sizes):
        cdef size_t[10] bytes_of = sizes
        cdef da8w4_packed *each
        cdef size_t i
        self.whole, self.count = whole, count
        self.packed = <da8w4_packed *>PyMem_Calloc(count, sizeof(da8w4_packed))
        if self.packed == NULL:
            raise MemoryError(f"cannot allocate {count} descriptions of weights")
        for i in range(count):
            each = self.packed + i
            each[0] = whole.packed
            each.codes = after(each.codes, i * bytes_of[0])
            each.scales = after(each.scales, i * bytes_of[1])
            each.sums = after(each.sums, i * bytes_of[2])
            each.zps = after(each.zps, i * bytes_of[3])
            each.offsets = after(each.offsets, i * bytes_of[4])
            each.sub_scales = after(each.sub_scales, i * bytes_of[5])
            each.sub_offsets = after(each.sub_offsets, i * bytes_of[6])
            each.table = after(each.table, i * bytes_of[7])
            each.perm = after(each.perm, i * bytes_of[8])
            each.factors = after(each.factors, i * bytes_of[9])

    def __dealloc__(self):
        PyMem_Free(self.packed)

    def grouped_linear(self, size_t m, x, int x_type, int scheme, rows_of_expert, bias, out, int out_type,
                       bytes kernel, Gating gating=None):
        """Multiply rows of floats, which come expert by expert."""
        cdef Extent[3] inputs = [extent(x), extent(rows_of_expert), extent(bias)]
        cdef Extent output = output_of(out, inputs, 3)
        self.whole.check_apart(output)
        cdef da8w4_packed *first = self.packed
        cdef size_t columns = first.n if gating is None else first.n // 2
        cdef da8w4_grouped_call call = da8w4_grouped_call(
            experts=self.count, weights=first, bias=inputs[2].start, rows_of_expert=inputs[1].start, m=m,
            act=inputs[0].start, act_type=<da8w4_type>x_type, act_stride=first.k * type_bytes(x_type),
            scheme=<da8w4_scheme>scheme, gating=gating_of(gating),
            out=output.start, out_type=<da8w4_type>out_type, out_stride=columns * type_bytes(out_type),
            kernel=name_of(kernel), threads=0, workspace=NULL, workspace_bytes=0)
        run(&call)

    def moe(self, ExpertsView down, size_t m, size_t slots, x, int x_type, int scheme, ids, weights, float scaling,
            Gating gating, gate_up_bias, down_bias, out, int out_type, bytes kernel):
        """Multiply rows of floats by these, which are gates and ups, and by `down`, of as many experts."""
        cdef Extent[5] inputs = [extent(x), extent(ids), extent(weights), extent(gate_up_bias), extent(down_bias)]
        cdef Extent output = output_of(out, inputs, 5)
        self.whole.check_apart(output)
        down.whole.check_apart(output)
        cdef da8w4_moe_call call = da8w4_moe_call(
            experts=self.count, gate_up=self.packed, down=down.packed,
            gate_up_bias=inputs[3].start, down_bias=inputs[4].start, gating=gating_of(gating), m=m, slots=slots,
            act=inputs[0].start, act_type=<da8w4_type>x_type, act_stride=self.packed.k * type_bytes(x_type),
            scheme=<da8w4_scheme>scheme, ids=inputs[1].start, weights=inputs[2].start, scaling=scaling,
            out=output.start, out_type=<da8w4_type>out_type, out_stride=down.packed.n * type_bytes(out_type),
            kernel=name_of(kernel), threads=0, workspace=NULL, workspace_bytes=0)
        run(&call)


cdef class Places:
    """The tensors of a module, and the memory that some of them had."""

    cdef tuple all, tensors, addresses, sizes

    def __init__(self, all, tensors):
        self.all, self.tensors = tuple(all), tuple(tensors)
        self.addresses = tuple([tensor.data_ptr() for tensor in self.tensors])
        self.sizes = tuple([tensor.nbytes for tensor in self.tensors])

    def are(self, all):
        """Whether these are still the same, in the same memory. (In Python this takes longer than a small product.)"""
        for one, other in zip(self.all, all):
            if one is not other:
                return False
        for i, tensor in enumerate(self.tensors):
            if tensor.data_ptr() != self.addresses[i] or tensor.nbytes != self.sizes[i]:
                return False
        return True


def quantize_weight(size_t n, size_t k, size_t group, size_t super, values, int values_type, importance, int zeros,
                    codes, scales, zps=None, offsets=None, sub_scales=None, sub_offsets=None):
    """Search codes of 4 bits and what stands beside them, for rows of floats."""
    cdef da8w4_quantization quantization = da8w4_quantization(
        n=n, k=k, group=group, super=super, values=extent(values).start, values_type=<da8w4_type>values_type,
        values_stride=k * type_bytes(<da8w4_type>values_type), importance=extent(importance).start,
        zeros=<da8w4_zeros>zeros, codes=target(codes), scales=target(scales), zps=target(zps), offsets=target(offsets),
        sub_scales=target(sub_scales), sub_offsets=target(sub_offsets))
    with nogil:
        check(da8w4_quantize_weight(&quantization))


def quantize_rows(size_t m, size_t k, x, int x_type, int scheme, act, act_scales, act_zps, bytes kernel):
    cdef const char *name = name_of(kernel)
    cdef address at = extent(x).start, to_act = target(act)
    cdef address to_scales = target(act_scales), to_zps = target(act_zps)
    cdef size_t stride = k * type_bytes(x_type)
    with nogil:
        check(da8w4_quantize_rows(name, at, <da8w4_type>x_type, stride, m, k, <da8w4_scheme>scheme, to_act, k,
                                  to_scales, to_zps))


def kernel_table():
    """-> [(name, description, reason it cannot run or None)], best first."""
    return [(text(da8w4_kernel_name(i)), text(da8w4_kernel_description(i)), text(da8w4_kernel_reason(i)))
            for i in range(da8w4_kernel_count())]


def default_kernel():
    cdef size_t index = 0
    check(da8w4_default_kernel(&index))
    return text(da8w4_kernel_name(index))


def cpu_features():
    """-> {name: present}."""
    cdef int present = 0
    features = {}
    while (name := text(da8w4_cpu_feature(len(features), &present))) is not None:
        features[name] = bool(present)
    return features


def set_num_threads(size_t threads):
    da8w4_set_num_threads(threads)


def get_num_threads():
    return da8w4_get_num_threads()


def thread_runtime():
    return text(da8w4_thread_runtime())


def time_read(bytes kernel, memory, size_t passes, int streams, size_t threads):
    """-> nanoseconds."""
    cdef Extent found = extent(memory)
    cdef size_t size = <size_t>(<char *>found.end - <char *>found.start)
    cdef const char *name = name_of(kernel)
    cdef uint64_t nanoseconds = 0
    with nogil:
        check(da8w4_time_read(name, found.start, size, passes, streams, threads, &nanoseconds))
    return nanoseconds


def time_dots(bytes kernel, size_t rounds, size_t threads):
    """-> multiplications, nanoseconds."""
    cdef const char *name = name_of(kernel)
    cdef uint64_t multiplications = 0, nanoseconds = 0
    with nogil:
        check(da8w4_time_dots(name, rounds, threads, &multiplications, &nanoseconds))
    return multiplications, nanoseconds


def version():
    return da8w4_version().decode()


def library_path():
    """Of the shared library with the C interface."""
    return path_of_library(<const void *>&da8w4_alloc)
