"""Kernels, threads and processes. What needs a fresh process runs one."""

import ctypes
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from cases import Weight, assert_same_bits, floats, pack

import pyda8w4

SETTINGS = ("PYDA8W4_KERNEL", "OMP_NUM_THREADS", "GOMP_CPU_AFFINITY", "OMP_DYNAMIC", "OMP_THREAD_LIMIT")

# A product large enough for several threads, with a result that is easy to compare.
PRODUCT = """
import os, sys
import numpy as np
import pyda8w4
rng = np.random.default_rng(0)
packed = pyda8w4.prepack(*pyda8w4.quantize_weight(rng.standard_normal((257, 600), dtype=np.float32), 100))
x = rng.standard_normal((20, 600), dtype=np.float32)
def product():
    return pyda8w4.linear(x, packed).tobytes()
def alone():
    pyda8w4.set_num_threads(1)
    y = product()
    pyda8w4.set_num_threads(3)
    return y
"""


def run(code, *, timeout=60, product=False, **environment):
    """The printed lines of a fresh interpreter."""
    inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    process = subprocess.run(
        [sys.executable, "-c", (PRODUCT if product else "import pyda8w4\n") + textwrap.dedent(code)],
        env={**inherited, **environment},
        cwd=Path(__file__).parent,  # not the root: its pyda8w4/ would hide an installed package
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


# ---- kernels -----------------------------------------------------------------------------------


def test_kernels():
    built, runnable = pyda8w4.kernels(runnable=False), pyda8w4.kernels()
    assert set(runnable) <= set(built) and len(set(built)) == len(built)
    assert runnable == [name for name in built if name in runnable]
    assert built[-1] == "scalar" and runnable[-1] == "scalar"


def test_cpu_info():
    info = pyda8w4.cpu_info()
    assert set(info) == {"cpu", "features", "kernel", "kernels", "threads", "thread_runtime"}
    assert isinstance(info["cpu"], str) and info["cpu"]
    assert all(type(present) is bool for present in info["features"].values())
    assert list(info["kernels"]) == pyda8w4.kernels(runnable=False)
    assert [name for name, reason in info["kernels"].items() if reason is None] == pyda8w4.kernels()
    assert info["kernel"] in pyda8w4.kernels()
    assert info["threads"] == pyda8w4.get_num_threads() >= 1
    for name, reason in info["kernels"].items():
        missing = [feature for feature, present in info["features"].items() if not present]
        assert reason is None or any(feature in reason for feature in missing), name


def test_use_kernel_nests():
    from pyda8w4._runtime import forced_kernel

    first, last = pyda8w4.kernels()[0], "scalar"
    assert forced_kernel() is None
    with pyda8w4.use_kernel(first):
        with pyda8w4.use_kernel(last):
            assert forced_kernel() == last.encode()
            with pytest.raises(ValueError, match="no_such"), pyda8w4.use_kernel("no_such"):
                pass
            assert forced_kernel() == last.encode()
        assert forced_kernel() == first.encode()
    assert forced_kernel() is None


def test_use_kernel_is_undone_by_an_exception():
    from pyda8w4._runtime import forced_kernel

    with pytest.raises(KeyError), pyda8w4.use_kernel("scalar"):
        raise KeyError
    assert forced_kernel() is None


def test_use_kernel_is_for_this_thread_only():
    from pyda8w4._runtime import forced_kernel

    seen = []
    with pyda8w4.use_kernel("scalar"):
        thread = threading.Thread(target=lambda: seen.append(forced_kernel()))
        thread.start()
        thread.join()
        assert forced_kernel() == b"scalar"
    # A new thread has a context of its own, or (free-threaded Python) a copy of this one.
    assert seen in ([None], [b"scalar"])


def test_unknown_kernel_lists_the_choices():
    for name in ("no_such", "", "SCALAR", "scalar "):
        with pytest.raises(ValueError) as raised, pyda8w4.use_kernel(name):
            pass
        assert repr(name) in str(raised.value)
        assert all(choice in str(raised.value) for choice in pyda8w4.kernels())


def test_unavailable_kernel_says_why_and_lists_the_choices():
    reasons = {name: reason for name, reason in pyda8w4.cpu_info()["kernels"].items() if reason}
    if not reasons:
        pytest.skip("this CPU runs every kernel")
    for name, reason in reasons.items():
        with pytest.raises(ValueError) as raised, pyda8w4.use_kernel(name):
            pass
        message = str(raised.value)
        assert name in message and reason in message
        assert all(choice in message for choice in pyda8w4.kernels())


def test_kernel_from_the_environment(kernel):
    code = 'print(pyda8w4.cpu_info()["kernel"]); print(hash(product()) != 0)'
    assert run(code, product=True, PYDA8W4_KERNEL=kernel) == [kernel, "True"]


def test_empty_kernel_in_the_environment_is_none():
    assert run('print(pyda8w4.cpu_info()["kernel"])', PYDA8W4_KERNEL="") == [pyda8w4.kernels()[0]]


def refused_kernels():
    return ["no_such", *[name for name, reason in pyda8w4.cpu_info()["kernels"].items() if reason]]


@pytest.mark.parametrize("name", refused_kernels())
def test_bad_kernel_in_the_environment(name):
    lines = run(
        """
        import numpy as np
        packed = pyda8w4.prepack(np.zeros((2, 4), np.uint8), np.ones(2, np.float32))
        x = np.zeros((1, 4), np.float32)
        calls = (pyda8w4.cpu_info, lambda: pyda8w4.linear(x, packed), lambda: pyda8w4.gemm(x.astype(np.int8), packed),
                 lambda: pyda8w4.quantize_activation(x))
        for call in calls:
            try:
                call()
            except ValueError as error:
                print(error)
        with pyda8w4.use_kernel("scalar"):
            print(pyda8w4.linear(x, packed).shape)
        """,
        PYDA8W4_KERNEL=name,
    )
    assert len(lines) == 5 and lines[-1] == "(1, 2)"
    for line in lines[:-1]:
        assert "PYDA8W4_KERNEL" in line and repr(name) in line
        assert all(choice in line for choice in pyda8w4.kernels())


def test_import_is_light():
    code = 'import sys; print([name for name in ("torch", "ml_dtypes", "safetensors") if name in sys.modules])'
    assert run(code) == ["[]"]


def test_float32_needs_no_optional_package():
    code = """
    import sys
    sys.modules["ml_dtypes"] = sys.modules["safetensors"] = None
    product()
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        pyda8w4.save(folder + "/w", {"w": packed})
        for needs in (lambda: pyda8w4.load(folder + "/w"), lambda: pyda8w4.linear(x, packed, out_dtype="bfloat16")):
            try:
                needs()
            except ImportError as error:
                print(error)
    """
    lines = run(code, product=True)
    assert len(lines) == 2 and "safetensors" in lines[0] and "ml_dtypes" in lines[1]


def test_paths_for_c_programs():
    assert os.path.isfile(os.path.join(pyda8w4.get_include(), "pyda8w4", "pyda8w4.h"))
    library = ctypes.CDLL(pyda8w4.get_library())
    library.da8w4_kernel_name.restype = ctypes.c_char_p
    assert library.da8w4_kernel_name(ctypes.c_size_t(0)).decode() == pyda8w4.kernels(runnable=False)[0]


# ---- number of threads -------------------------------------------------------------------------


def test_set_num_threads(threads):
    before = pyda8w4.get_num_threads()
    for count in (1, 2, 3, 17, 65536):
        pyda8w4.set_num_threads(count)
        assert pyda8w4.get_num_threads() == count
    pyda8w4.set_num_threads(None)
    assert pyda8w4.get_num_threads() == before


@pytest.mark.parametrize("text, count", [("1", 1), ("3", 3), ("4,2", 4), (" 5", 5)])
def test_omp_num_threads(text, count):
    assert run("print(pyda8w4.get_num_threads())", OMP_NUM_THREADS=text) == [str(count)]


@pytest.mark.parametrize("text", ["", "0", "-1", "many", "99999999999999999999"])
def test_omp_num_threads_that_is_no_number(text):
    assert run("print(pyda8w4.get_num_threads())", OMP_NUM_THREADS=text) == run("print(pyda8w4.get_num_threads())")


@linux
def test_affinity_mask():
    one = min(os.sched_getaffinity(0))
    lines = run(f"import os; os.sched_setaffinity(0, {{{one}}}); print(pyda8w4.get_num_threads())")
    assert lines == ["1"]
    many = run("import os; print(pyda8w4.get_num_threads() <= len(os.sched_getaffinity(0)))")
    assert many == ["True"]


@pytest.fixture(scope="module")
def cgroup_files(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if not compiler:
        pytest.skip("there is no C compiler")
    library = tmp_path_factory.mktemp("preload") / "cgroup_files.so"
    source = Path(__file__).with_name("cgroup_files.c")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    return library


@linux
@pytest.mark.parametrize(
    "cgroup, files",
    [
        ("0::/", {"cpu.max": "100000 100000"}),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}),
        ("0::/docker/1", {"cpu.max": "100000 100000"}),  # the host's path, of which the container sees the end
        ("4:cpu,cpuacct:/docker/1", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}),
        ("1:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"}),
    ],
)
def test_cgroup_quota(cgroup_files, tmp_path, cgroup, files):
    for name, text in {"proc/self/cgroup": cgroup, **{f"sys/fs/cgroup/{name}": files[name] for name in files}}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    lines = run("print(pyda8w4.get_num_threads())", LD_PRELOAD=str(cgroup_files), FAKE_ROOT=str(tmp_path))
    assert lines == ["1"]


def test_omp_num_threads_is_overridden_by_set_num_threads():
    code = """
    for count in (2, None):
        pyda8w4.set_num_threads(count)
        print(pyda8w4.get_num_threads())
    """
    assert run(code, OMP_NUM_THREADS="3") == ["2", "3"]


# ---- several threads, several processes ----------------------------------------------------------


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


def test_gil_released(threads):
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


FORK = """
def in_child(check):
    import os, signal
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # kills a child that hangs
        os._exit(0 if check() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


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


# ---- an OpenMP runtime that is already loaded ----------------------------------------------------


@pytest.fixture(scope="module")
def libgomp():
    try:
        ctypes.CDLL("libgomp.so.1")
    except OSError:
        pytest.skip("libgomp.so.1 is not installed")


LOAD = "import ctypes; ctypes.CDLL('libgomp.so.1', mode=ctypes.RTLD_GLOBAL)\n"


def test_no_openmp_runtime_is_loaded_by_us():
    assert run('product(); print(pyda8w4.cpu_info()["thread_runtime"])', product=True) == ["own"]


@linux
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("mode", ["RTLD_GLOBAL", "RTLD_LOCAL"])
def test_a_loaded_libgomp_is_used(libgomp, when, mode):
    load = LOAD.replace("RTLD_GLOBAL", mode)
    code = f"""
y = alone()
if {when == "after"}:
    assert product() == y and pyda8w4.cpu_info()["thread_runtime"] == "own"
{load}
print(os.path.basename(pyda8w4.cpu_info()["thread_runtime"]))
before = len(os.listdir("/proc/self/task"))
print(all(product() == y for _ in range(5)))
print(len(os.listdir("/proc/self/task")) - before)
"""
    lines = run(code if when == "after" else code.replace("y = alone()", load + "y = alone()"), product=True)
    assert lines[0].startswith("libgomp.so")
    assert lines[1] == "True"
    # Its workers, and none of ours, did the work: 2 beside the caller.
    assert lines[2] == "2"


@linux
def test_small_products_keep_the_team_of_libgomp(libgomp):
    """GNU's runtime would end the threads that a smaller team leaves out, and start new ones for the next."""
    code = """
    y = alone()
    pyda8w4.set_num_threads(None)
    def threads():
        return sorted(os.listdir("/proc/self/task"))
    assert product() == y
    before = threads()
    for _ in range(3):
        pyda8w4.linear(x[:2], packed)  # two threads' worth of work
        print(threads() == before, len(before) - 1)
        assert product() == y
    print(threads() == before)
    """
    lines = run(LOAD + textwrap.dedent(code), product=True, OMP_NUM_THREADS="4")
    assert {line.split()[0] for line in lines} == {"True"}
    assert int(lines[0].split()[1]) >= 3


@linux
def test_libgomp_is_found_behind_a_library_of_a_similar_name(libgomp, tmp_path):
    similar = tmp_path / "libomptarget.so"
    shutil.copy(pyda8w4.get_library(), similar)  # any library will do
    code = f"""
    import ctypes
    ctypes.CDLL({str(similar)!r})
    ctypes.CDLL("libgomp.so.1")
    print(pyda8w4.cpu_info()["thread_runtime"])
    """
    assert "libgomp" in run(code)[0]


@linux
def test_libgomp_limits_the_threads(libgomp):
    code = """
    print(pyda8w4.get_num_threads())
    ctypes.CDLL("libgomp.so.1").omp_set_num_threads(2)
    print(pyda8w4.get_num_threads())
    """
    assert run(LOAD + textwrap.dedent(code), OMP_NUM_THREADS="3") == ["3", "2"]


@linux
def test_fork_after_libgomp_was_used(libgomp):
    code = """
    y = alone()
    assert product() == y
    print(in_child(lambda: product() == y))
    print(product() == y)
    """
    assert run(LOAD + FORK + textwrap.dedent(code), product=True) == ["0", "True"]


@linux
def test_libgomp_limits_the_threads_of_a_forked_child(libgomp):
    # As torch's DataLoader does in its workers.
    code = """
    print(pyda8w4.get_num_threads())
    def check():
        ctypes.CDLL("libgomp.so.1").omp_set_num_threads(1)
        return pyda8w4.get_num_threads() == 1 and pyda8w4.cpu_info()["thread_runtime"] == "own"
    print(in_child(check))
    """
    assert run(LOAD + FORK + textwrap.dedent(code), OMP_NUM_THREADS="3") == ["3", "0"]


@linux
def test_nested_omp(libgomp):
    # A call from inside a parallel region of the application.
    code = """
    y = alone()
    gomp = ctypes.CDLL("libgomp.so.1")
    results = []
    body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: results.append(product() == y))
    gomp.GOMP_parallel(body, None, 3, 0)
    print(results)
    """
    assert run(LOAD + textwrap.dedent(code), product=True) == ["[True, True, True]"]
