"""Kernels, CPU and threads of this process."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from pyda8w4 import _core

_forced: ContextVar[bytes | None] = ContextVar("pyda8w4_kernel", default=None)


# Name for the C interface: of use_kernel, or None for the process's default.
forced_kernel = _forced.get


def kernels(runnable: bool = True) -> list[str]:
    """Return the names of the kernels, best first.

    Parameters
    ----------
    runnable : bool
        Only those that this CPU can run; otherwise all that were built.

    Returns
    -------
    list of str
        What `use_kernel` and ``PYDA8W4_KERNEL`` take.

    Examples
    --------
    >>> import pyda8w4
    >>> "scalar" in pyda8w4.kernels()
    True
    """
    return [name for name, _, reason in _core.kernel_table() if not (runnable and reason)]


def _describe(kernel: str, origin: str) -> str:
    reasons = {name: reason for name, _, reason in _core.kernel_table()}
    takes = ", ".join(kernels())
    if kernel not in reasons:
        return f"{origin} {kernel!r} is not a kernel of this build; this CPU runs: {takes}"
    return f"{origin} {kernel!r} cannot run here: {reasons[kernel]}; this CPU runs: {takes}"


def translate(error: _core.CoreError) -> ValueError | RuntimeError:
    """-> what to raise for an error of the C interface that is not about a value that the caller knows."""
    status, text = error.args
    if status in ("UNKNOWN_KERNEL", "KERNEL_UNAVAILABLE"):  # `use_kernel` lets none through
        return ValueError(_describe(os.environ.get("PYDA8W4_KERNEL", ""), "PYDA8W4_KERNEL"))
    return RuntimeError(text)


def default_kernel() -> str:
    """Return the name of the kernel that calls use when none is forced.

    Returns
    -------
    str
        One of `kernels`.

    Raises
    ------
    ValueError
        If the environment variable ``PYDA8W4_KERNEL`` names no kernel that can run.
    """
    try:
        return _core.default_kernel()
    except _core.CoreError as error:
        raise translate(error) from None


def use_kernel(name: str) -> AbstractContextManager[None]:
    """Use one kernel inside a ``with`` block, in this thread (or asyncio task) only.

    The environment variable ``PYDA8W4_KERNEL`` chooses for a whole process. Results do not depend
    on the kernel; speed does.

    Parameters
    ----------
    name : str
        One of `kernels`.

    Returns
    -------
    context manager
        Which chooses the kernel when it is entered: ``with pyda8w4.use_kernel(name):``.

    Raises
    ------
    TypeError
        If `name` is not a string.
    ValueError
        If there is no such kernel, or this CPU cannot run it; the message says why.

    Examples
    --------
    >>> import numpy as np
    >>> import pyda8w4
    >>> packed = pyda8w4.prepack(np.full((2, 8), 9, np.uint8), np.ones(2, np.float32))
    >>> with pyda8w4.use_kernel("scalar"):
    ...     pyda8w4.gemm(np.ones((1, 8), np.int8), packed)
    array([[8., 8.]], dtype=float32)
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    if name not in kernels():
        raise ValueError(_describe(name, "kernel"))
    return _forcing(name.encode())


@contextmanager
def _forcing(name: bytes) -> Iterator[None]:
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def set_num_threads(threads: int | None) -> None:
    """Set how many threads a call may use, for the whole process.

    Parameters
    ----------
    threads : int or None
        At least 1. None goes back to the default: ``OMP_NUM_THREADS``, else the CPUs that affinity
        and cgroup quota leave to this process; in either case no more than the limit of an OpenMP
        runtime that is loaded (``torch.set_num_threads`` sets it).

    Raises
    ------
    TypeError
        If `threads` is neither an int nor None.
    ValueError
        If it is less than 1 or more than 65536.

    Examples
    --------
    >>> import pyda8w4
    >>> pyda8w4.set_num_threads(1)
    >>> pyda8w4.get_num_threads()
    1
    >>> pyda8w4.set_num_threads(None)
    """
    _core.set_num_threads(check_threads(threads))


def check_threads(threads: int | None) -> int:
    """-> what the C interface takes: 0 for None."""
    if threads is None:
        return 0
    if isinstance(threads, bool) or not hasattr(threads, "__index__"):
        raise TypeError(f"threads must be an int or None, got {type(threads).__name__}")
    if not 1 <= threads <= 65536:
        raise ValueError(f"threads must be 1 to 65536, got {threads}")
    return int(threads)


def get_num_threads() -> int:
    """Return how many threads a call may use; small products use fewer.

    Returns
    -------
    int
        At least 1.

    Examples
    --------
    >>> import pyda8w4
    >>> pyda8w4.get_num_threads() >= 1
    True
    """
    return _core.get_num_threads()


def cpu_model() -> str:
    """As the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_info() -> dict[str, Any]:
    """Return what was found on this machine and what will be used.

    Returns
    -------
    dict
        ``cpu`` (model name), ``features`` (instruction sets that kernels ask for: present or not),
        ``kernel`` (the default one), ``kernels`` (every built kernel: None, or the reason why it
        cannot run), ``threads``, and ``thread_runtime`` (``own``, or the path of the OpenMP runtime
        that this process has loaded, whose threads are then used).

    Raises
    ------
    ValueError
        If ``PYDA8W4_KERNEL`` names no kernel that can run.

    Examples
    --------
    >>> import pyda8w4
    >>> pyda8w4.cpu_info()["kernels"]["scalar"] is None
    True
    """
    return {
        "cpu": cpu_model(),
        "features": _core.cpu_features(),
        "kernel": default_kernel(),
        "kernels": {name: reason for name, _, reason in _core.kernel_table()},
        "threads": get_num_threads(),
        "thread_runtime": _core.thread_runtime(),
    }


def get_include() -> str:
    """Return the folder to compile C and C++ programs against: ``#include <pyda8w4/pyda8w4.h>``.

    Returns
    -------
    str
        Its path.

    Examples
    --------
    >>> import os, pyda8w4
    >>> os.path.exists(os.path.join(pyda8w4.get_include(), "pyda8w4", "pyda8w4.h"))
    True
    """
    package = Path(__file__).parent
    installed = package / "include"
    return str(installed if installed.is_dir() else package.parent / "include")


def get_cmake_dir() -> str:
    """Return the folder of the CMake package: ``find_package(pyda8w4)``, and link with ``pyda8w4::pyda8w4``.

    Returns
    -------
    str
        Its path, for CMake's ``-Dpyda8w4_DIR=``.

    Raises
    ------
    RuntimeError
        In an editable install, which has none.

    Examples
    --------
    >>> pyda8w4.get_cmake_dir()  # doctest: +SKIP
    '/home/me/.venv/lib/python3.13/site-packages/pyda8w4/cmake'
    """
    return _installed("cmake")


def get_pkgconfig_dir() -> str:
    """Return the folder of ``pyda8w4.pc``, for ``PKG_CONFIG_PATH``.

    Returns
    -------
    str
        Its path.

    Raises
    ------
    RuntimeError
        In an editable install, which has none.

    Examples
    --------
    >>> pyda8w4.get_pkgconfig_dir()  # doctest: +SKIP
    '/home/me/.venv/lib/python3.13/site-packages/pyda8w4/pkgconfig'
    """
    return _installed("pkgconfig")


def _installed(name: str) -> str:
    folder = Path(__file__).parent / name
    if not folder.is_dir():
        raise RuntimeError(f"there is no {folder}: an editable install has no files for other build systems")
    return str(folder)


def get_library() -> str:
    """Return the path of the shared library to link C and C++ programs with.

    Returns
    -------
    str
        The path of the one that this process has loaded.

    Examples
    --------
    >>> import os, pyda8w4
    >>> os.path.exists(pyda8w4.get_library())
    True
    """
    return _core.library_path()
