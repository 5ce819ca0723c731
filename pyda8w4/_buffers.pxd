# Where the memory of arrays lies, and how large their elements are.
from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from pyda8w4._api cimport DA8W4_BF16, DA8W4_F16, DA8W4_F32

ctypedef void *address

cdef struct Extent:
    address start
    address end


cdef inline Extent extent(object array, int flags=PyBUF_C_CONTIGUOUS) except *:
    """Where a buffer lies. An address, given as an int, has no end that is known; None gives NULL."""
    cdef Extent found = Extent(NULL, NULL)
    cdef Py_buffer view
    if isinstance(array, int):
        found.start = found.end = <void *><size_t>array
    elif array is not None:
        PyObject_GetBuffer(array, &view, flags)
        found = Extent(view.buf, <char *>view.buf + view.len)
        PyBuffer_Release(&view)
    return found


cdef inline address target(object array) except? NULL:
    return extent(array, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE).start


cdef inline bint overlaps(Extent one, const Extent *others, int count):
    for i in range(count):
        if one.start < others[i].end and others[i].start < one.end:
            return True
    return False


cdef inline size_t type_bytes(int type):
    return 4 if type == DA8W4_F32 else 2 if type in (DA8W4_F16, DA8W4_BF16) else 1
