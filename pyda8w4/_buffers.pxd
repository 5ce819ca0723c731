# Where the memory of arrays lies, and how large their elements are.
from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer,
)
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


cdef inline char letter_of(object array, Extent *found, int flags=PyBUF_C_CONTIGUOUS):
    """The letter of struct for the elements of an array, and where it lies. 0 for one that C cannot read as it is."""
    cdef Py_buffer view
    cdef char letter = 0
    try:
        PyObject_GetBuffer(array, &view, flags | PyBUF_FORMAT)
    except (BufferError, ValueError):  # of other strides, read-only, or of a type that has no letter
        return 0
    if view.format[0] and not view.format[1] and <size_t>view.buf % <size_t>view.itemsize == 0:
        letter = view.format[0]
    found[0] = Extent(view.buf, <char *>view.buf + view.len)
    PyBuffer_Release(&view)
    return letter


cdef inline address target(object array) except? NULL:
    return extent(array, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE).start


cdef inline bint overlaps(Extent one, const Extent *others, int count):
    for i in range(count):
        if one.start < others[i].end and others[i].start < one.end:
            return True
    return False


cdef inline size_t type_bytes(int type):
    return 4 if type == DA8W4_F32 else 2 if type in (DA8W4_F16, DA8W4_BF16) else 1
