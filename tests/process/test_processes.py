"""Several threads and processes, signals, faults, the end of the process, limits."""

import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from cases import (
    Weight,
    assert_same_bits,
    floats,
    pack,
)
from interpreters import FORK, PRODUCT, killed, linux, run

import pyda8w4

pytestmark = pytest.mark.process


# ---- several threads, several processes --------------------------------------------------------


@pytest.mark.pitfall("general", "one weight shared by free threads")
def test_several_python_threads_on_one_weight(threads):
    weight = Weight(257, 600, 100)
    expected = {rows: pyda8w4.linear(floats(600)[:rows], pack(weight)) for rows in (1, 4, 9, 30)}
    pyda8w4.set_num_threads(2)
    failures = []

    def work(kernel):
        try:
            with pyda8w4.use_kernel(kernel):
                for i in range(40):
                    rows = (1, 4, 9, 30)[i % 4]
                    assert_same_bits(pyda8w4.linear(floats(600)[:rows], pack(weight)), expected[rows], kernel)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(name,)) for name in pyda8w4.kernels() * 2]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.pitfall("general", "GIL held during a product")
def test_the_gil_is_released(threads):
    # Another Python thread notes the time again and again while one long call runs.
    pyda8w4.set_num_threads(1)
    packed = pyda8w4.prepack(np.zeros((2048, 2048), np.uint8), np.ones(2048, np.float32))
    x = np.ones((100, 2048), np.float32)
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.002)

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        with pyda8w4.use_kernel("scalar"):
            begin = time.perf_counter()
            pyda8w4.linear(x, packed)
            end = time.perf_counter()
    finally:
        stop.set()
        ticker.join()
    tenth = (end - begin) / 10
    inside = [t for t in ticks if begin + tenth < t < end - tenth]
    assert len(inside) >= 3, f"{len(inside)} ticks within {end - begin:.3f} s"


@pytest.mark.pitfall("faiss #5206", "fork hang")
@linux
def test_fork_after_use():
    code = """
    y = alone()
    assert product() == y
    for _ in range(3):
        print(in_child(lambda: product() == y and pyda8w4.get_num_threads() == 3))
        assert product() == y
    """
    assert run(FORK + textwrap.dedent(code), product=True) == ["0"] * 3


@linux
def test_a_forked_child_asks_again_for_its_cpus():
    code = """
    import os
    print(pyda8w4.get_num_threads())
    def check():
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        return pyda8w4.get_num_threads() == 1
    print(in_child(check), pyda8w4.get_num_threads())
    """
    before, after = run(FORK + textwrap.dedent(code))
    if before == "1":
        pytest.skip("needs two CPUs")
    assert after == f"0 {before}"


@linux
def test_fork_after_use_twice():
    # The child of a child, and a child that starts while another Python thread is in a call.
    code = """
    import threading
    y = alone()
    product()
    print(in_child(lambda: product() == y and in_child(lambda: product() == y) == 0))
    busy = threading.Event()
    def work():
        while not busy.is_set():
            product()
    thread = threading.Thread(target=work)
    thread.start()
    results = [in_child(lambda: product() == y) for _ in range(5)]
    busy.set()
    thread.join()
    print(results)
    """
    assert run(FORK + textwrap.dedent(code), product=True) == ["0", "[0, 0, 0, 0, 0]"]


MULTIPROCESSING = """
def task(i):
    return product()
def main(method):
    import multiprocessing
    y = alone()
    product()
    with multiprocessing.get_context(method).Pool(2) as pool:
        results = pool.map_async(task, range(4)).get(40)
    print(all(result == y for result in results))
if __name__ == "__main__":
    main(sys.argv[1])
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(method, tmp_path):
    import multiprocessing

    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    script = tmp_path / "script.py"
    script.write_text(PRODUCT + MULTIPROCESSING)
    process = subprocess.run(
        [sys.executable, str(script), method], capture_output=True, text=True, timeout=90, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == "True\n"


def test_exit_with_busy_workers():
    assert run("pyda8w4.set_num_threads(4); product(); print('done')", product=True, timeout=20) == ["done"]


def test_threads_that_end_give_their_memory_back():
    # A workspace belongs to a thread; several hundred of 20 MiB would not fit.
    code = """
    import resource, threading
    def rss():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wide = pyda8w4.prepack(np.zeros((1, 80000), np.uint8), np.ones(1, np.float32))
    big = np.ones((240, 80000), np.float32)
    def once():
        thread = threading.Thread(target=pyda8w4.linear, args=(big, wide))
        thread.start()
        thread.join()
    once(); once()
    before = rss()
    for _ in range(10):
        once()
    print(rss() - before < 60000)
    """
    assert run(code, product=True) == ["True"]


@linux
def test_weights_that_are_freed_give_their_memory_back():
    # Small weights share pages; all of these pages but the last few go back to the system.
    code = """
    import resource
    def rss():
        return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
    weights = [pyda8w4.prepack(np.zeros((1024, 1024), np.uint8), np.ones(1024, np.float32)) for _ in range(200)]
    full = rss()
    del weights
    print(full - rss())
    """
    (freed,) = run(code, product=True)
    assert 75 < float(freed) < 105  # MiB, of 100


# ---- signals -----------------------------------------------------------------------------------


FAULTS = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE")


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
    from cases import stored_arrays, with_stored
    faulthandler.enable()
    wide = pyda8w4.prepack(np.zeros((4096, 1024), np.uint8), np.ones(4096, np.float32))
    codes = stored_arrays(wide)["codes"]
    codes.tofile({str(tmp_path / "codes")!r})
    mapped = with_stored(wide, codes=np.memmap({str(tmp_path / "codes")!r}, np.uint8, "r", shape=codes.shape))
    os.truncate({str(tmp_path / "codes")!r}, codes.nbytes * 3 // 4 // mmap.PAGESIZE * mmap.PAGESIZE)
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


@pytest.mark.pitfall("general", "Ctrl-C during prepack")
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


@pytest.mark.slow
@pytest.mark.pitfall("general", "crash at interpreter exit")
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
