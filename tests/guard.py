"""Arrays whose neighbouring pages cannot be touched, and the float control register of x86."""

from __future__ import annotations

import ctypes
import mmap
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

PAGE = mmap.PAGESIZE


def _forbid(start: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    protect = libc.mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if protect(start, length, 0) != 0:  # PROT_NONE
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(array: np.ndarray, side: str) -> np.ndarray:
    """A copy that ends where a forbidden page begins (side "after"), or begins where one ends ("before")."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs mprotect")
    inner = -(-max(array.nbytes, 1) // PAGE) * PAGE
    memory = mmap.mmap(-1, inner + 2 * PAGE)
    whole = np.frombuffer(memory, np.uint8)
    start = whole.__array_interface__["data"][0]
    _forbid(start, PAGE)
    _forbid(start + PAGE + inner, PAGE)
    begin = PAGE if side == "before" else PAGE + inner - array.nbytes
    copy = whole[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


_code = None  # kept mapped for the life of the process


def _register() -> tuple:
    """-> functions (store, load) of the MXCSR register through a pointer."""
    global _code
    if platform.machine() not in ("x86_64", "AMD64") or not sys.platform.startswith("linux"):
        pytest.skip("needs x86-64 Linux")
    if _code is None:
        try:
            _code = mmap.mmap(-1, PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        except PermissionError:
            pytest.skip("this system maps no memory that is both writable and executable")
        _code[:4] = b"\x0f\xae\x1f\xc3"  # stmxcsr [rdi]; ret
        _code[16:20] = b"\x0f\xae\x17\xc3"  # ldmxcsr [rdi]; ret
    start = ctypes.addressof(ctypes.c_char.from_buffer(_code))
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    return function(start), function(start + 16)


def get_float_control() -> int:
    store, _ = _register()
    value = ctypes.c_uint32()
    store(ctypes.addressof(value))
    return value.value


@contextmanager
def float_control(bits: int) -> Iterator[None]:
    """These bits of MXCSR set in this thread; numpy and the interpreter feel them too."""
    _, load = _register()
    before = get_float_control()
    load(ctypes.addressof(ctypes.c_uint32(before | bits)))
    try:
        yield
    finally:
        load(ctypes.addressof(ctypes.c_uint32(before)))


FLUSH_TO_ZERO = 1 << 15
DENORMALS_ARE_ZERO = 1 << 6
ROUND_DOWN, ROUND_UP, TRUNCATE = 1 << 13, 2 << 13, 3 << 13
