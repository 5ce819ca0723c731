"""Signals, faults, the end of the process, limits. test_runtime.py has forks, threads and OpenMP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from test_runtime import PRODUCT, linux, run

FAULTS = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE")


def killed(code: str) -> tuple[int, str]:
    """-> exit status and errors of a fresh interpreter that need not end well."""
    environment = {name: value for name, value in os.environ.items() if name != "PYDA8W4_KERNEL"}
    process = subprocess.run(
        [sys.executable, "-c", PRODUCT + textwrap.dedent(code)],
        env=environment,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return process.returncode, process.stderr


# ---- signals -----------------------------------------------------------------------------------


@linux
def test_workers_leave_signals_to_the_application_except_their_own_faults():
    code = """
    import re, time
    before = set(os.listdir("/proc/self/task"))
    pyda8w4.set_num_threads(3)
    product()
    for task in set(os.listdir("/proc/self/task")) - before:
        while "(sleeping)" not in (status := open(f"/proc/self/task/{task}/status").read()):
            time.sleep(0.01)  # it has not begun yet, and has its creator's mask
        print(re.search(r"SigBlk:\\s*(\\w+)", status)[1])
    print(re.search(r"SigBlk:\\s*(\\w+)", open("/proc/self/status").read())[1])
    """
    *workers, main = run(code, product=True)
    assert workers
    assert int(main, 16) == 0
    for mask in workers:
        blocked = {number for number in range(1, 32) if int(mask, 16) >> (number - 1) & 1}
        # The system lets nobody block these two.
        assert blocked == set(range(1, 32)) - {getattr(signal, name) for name in FAULTS} - {
            signal.SIGKILL,
            signal.SIGSTOP,
        }


@linux
def test_a_fault_in_a_worker_reaches_faulthandler(tmp_path):
    # The file of the codes is cut off under its map. This thread's blocks come first and are still there.
    code = f"""
    import faulthandler, mmap
    faulthandler.enable()
    wide = pyda8w4.prepack(np.zeros((4096, 1024), np.uint8), np.ones(4096, np.float32))
    parts = dict(wide._arrays)
    parts["codes"].tofile({str(tmp_path / "codes")!r})
    parts["codes"] = np.memmap({str(tmp_path / "codes")!r}, np.uint8, "r", shape=parts["codes"].shape)
    mapped = type(wide)._from_arrays(wide._format, parts)
    os.truncate({str(tmp_path / "codes")!r}, parts["codes"].nbytes * 3 // 4 // mmap.PAGESIZE * mmap.PAGESIZE)
    x = np.ones((500, 1024), np.float32)
    pyda8w4.set_num_threads(1)
    pyda8w4.linear(x, mapped[: 4096 // 2])
    pyda8w4.set_num_threads(2)
    pyda8w4.linear(x, mapped)
    """
    # Where the worker has not begun when this thread is done, this one does its blocks, and its frames are called
    # those of the current thread.
    errors = "Current thread"
    for _ in range(20):
        if "Current thread" not in errors:
            break
        status, errors = killed(code)
        assert status == -signal.SIGBUS
        assert "Fatal Python error: Bus error" in errors and 'File "' in errors
    assert "Current thread" not in errors


INTERRUPTED = """
import signal, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
def interrupted(call):
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        while True:  # most of the time is inside the call, so that is where the signal comes
            call()
    except KeyboardInterrupt:
        return True
"""


@linux
def test_ctrl_c_ends_a_product_when_it_is_done():
    code = """
    wide = pyda8w4.prepack(np.full((1024, 1024), 9, np.uint8), np.ones(1024, np.float32))
    many, out = np.ones((64, 1024), np.int8), np.empty((64, 1024), np.float32)
    with pyda8w4.use_kernel("scalar"):
        def call():
            out.fill(0)
            pyda8w4.gemm(many, wide, out=out)
        print(interrupted(call), np.unique(out).tolist() in ([1024.0], [0.0]))  # 0: the signal came before the product
    """
    assert run(INTERRUPTED + textwrap.dedent(code), product=True) == ["True True"]


@linux
def test_ctrl_c_ends_prepack_when_it_is_done():
    code = """
    y = product()
    codes, scales = np.full((4096, 4096), 9, np.uint8), np.ones(4096, np.float32)
    print(interrupted(lambda: pyda8w4.prepack(codes, scales)))
    print(product() == y, bool((pyda8w4.prepack(codes[:64], scales[:64]).unpack()[0] == 9).all()))
    """
    assert run(INTERRUPTED + textwrap.dedent(code), product=True) == ["True", "True True"]


# ---- the end -----------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("leave", ["pass", "sys.exit(0)", "raise SystemExit"])
def test_exit_with_work_in_flight_in_daemon_threads(leave):
    code = f"""
    import threading, time
    pyda8w4.set_num_threads(3)
    def work():
        while True:
            product()
            pyda8w4.prepack(*packed.unpack(), group_size=100)
    for _ in range(4):
        threading.Thread(target=work, daemon=True).start()
    time.sleep(0.2)
    print("done")
    {leave}
    """
    for _ in range(3):
        assert run(code, product=True, timeout=30) == ["done"]


# ---- limits ------------------------------------------------------------------------------------


@linux
def test_a_system_that_refuses_threads():
    code = """
    import resource, threading
    y = alone()
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**22, -1))  # less than the stack of one thread
    try:
        threading.Thread(target=int).start()
    except RuntimeError:
        print("refused")
    before = len(os.listdir("/proc/self/task"))
    print(product() == y, len(os.listdir("/proc/self/task")) - before)
    """
    assert run(code, product=True) == ["refused", "True 0"]


def test_subinterpreters_are_refused_by_an_exception():
    # numpy can be loaded once per process; what counts is that nothing crashes and the first interpreter goes on.
    pytest.importorskip("_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters")
    code = """
    y = product()
    if sys.version_info >= (3, 13):
        import _interpreters as interpreters
        other = interpreters.create("legacy")
    else:
        import _xxsubinterpreters as interpreters
        other = interpreters.create(isolated=False)
    try:
        print(interpreters.run_string(other, "import pyda8w4"))
    except Exception as error:
        print(error)
    interpreters.destroy(other)
    print(product() == y)
    """
    refusal, same = run(code, product=True)
    assert "ImportError" in refusal and same == "True"
