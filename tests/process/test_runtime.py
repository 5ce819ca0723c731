"""Which kernel runs, on how many threads, and on whose."""

import ctypes
import os
import shutil
import subprocess
import textwrap
import threading
from pathlib import Path

import pytest
from interpreters import FORK, linux, run

import pyda8w4
from pyda8w4._runtime import forced_kernel

pytestmark = pytest.mark.process


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
    with pytest.raises(KeyError), pyda8w4.use_kernel("scalar"):
        raise KeyError
    assert forced_kernel() is None


def test_use_kernel_is_for_this_thread_only():
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


@pytest.mark.pitfall("aprender #3105", "one ISA never tested because every CI machine has a better one")
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


# ---- imports -----------------------------------------------------------------------------------


def test_import_is_light():
    code = 'import sys; print([name for name in ("torch", "ml_dtypes", "safetensors") if name in sys.modules])'
    assert run(code) == ["[]"]


def test_the_import_leaves_subnormal_numbers_alone():
    # A build with -ffast-math in CXXFLAGS set flush-to-zero for the importing thread and those that it starts.
    code = """
    import threading
    import numpy as np
    def kept():
        print(np.float32(1e-40) * np.float32(1) != 0)
    kept()
    thread = threading.Thread(target=kept)
    thread.start()
    thread.join()
    """
    assert run(code) == ["True", "True"]


def test_float32_needs_no_optional_package():
    code = """
    import sys
    sys.modules["ml_dtypes"] = sys.modules["safetensors"] = None
    product()
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        pyda8w4.save(folder + "/w", {"w": packed})
        print(*pyda8w4.load(folder + "/w"))
    try:
        pyda8w4.linear(x, packed, out_dtype="bfloat16")
    except ImportError as error:
        print(error)
    """
    lines = run(code, product=True)
    assert lines[0] == "w" and len(lines) == 2 and "ml_dtypes" in lines[1]


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


@pytest.mark.parametrize("rows", [1, 300, 3000])
def test_more_threads_than_cpus_take_little_memory(rows):
    code = f"""
    import numpy as np
    packed = pyda8w4.prepack(np.zeros((4096, 4096), np.uint8), np.ones(4096, np.float32))
    x = np.ones(({rows}, 4096), np.float32)
    expected = pyda8w4.linear(x, packed)
    pyda8w4.set_num_threads(65536)
    assert (pyda8w4.linear(x, packed) == expected).all()
    print(len(memoryview(pyda8w4._core._workspaces.memory)))
    """
    (size,) = run(code)
    assert int(size) < 2**29


@pytest.mark.parametrize("text, count", [("1", 1), ("3", 3), ("4,2", 4), (" 5", 5)])
def test_omp_num_threads(text, count):
    assert run("print(pyda8w4.get_num_threads())", OMP_NUM_THREADS=text) == [str(count)]


@pytest.mark.parametrize("text", ["", "0", "-1", "many", "99999999999999999999"])
def test_omp_num_threads_that_is_no_number(text):
    assert run("print(pyda8w4.get_num_threads())", OMP_NUM_THREADS=text) == run("print(pyda8w4.get_num_threads())")


@pytest.mark.pitfall("general", "affinity mask ignored")
@linux
def test_affinity_limits_the_threads():
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
    source = Path(__file__).parents[1] / "tools" / "cgroup_files.c"
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    return library


@pytest.mark.pitfall("Ollama #17916, LLVM #225493", "cgroup quota ignored")
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
def test_cgroup_quota_limits_the_threads(cgroup_files, tmp_path, cgroup, files):
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


# ---- an OpenMP runtime that is already loaded --------------------------------------------------


@pytest.fixture(scope="module")
def libgomp():
    try:
        ctypes.CDLL("libgomp.so.1")
    except OSError:
        pytest.skip("libgomp.so.1 is not installed")


LOAD = "import ctypes; ctypes.CDLL('libgomp.so.1', mode=ctypes.RTLD_GLOBAL)\n"


def test_no_openmp_runtime_is_loaded_by_us():
    assert run('product(); print(pyda8w4.cpu_info()["thread_runtime"])', product=True) == ["own"]


@pytest.mark.pitfall("PyTorch #98836, #149422, vLLM #27369", "two libgomps")
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


# As from another package: not global, under a name of its own.
OTHER_RUNTIME = """
void GOMP_parallel(void (*function)(void *), void *argument, unsigned threads, unsigned flags) { function(argument); }
int omp_get_max_threads(void) { return 3; }
int omp_get_num_threads(void) { return 1; }
int omp_get_thread_num(void) { return 0; }
int omp_in_parallel(void) { return 0; }
"""


@pytest.fixture(scope="module")
def other_runtime(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if not compiler:
        pytest.skip("there is no C compiler")
    library = tmp_path_factory.mktemp("openmp") / "libgomp-other.so"
    command = [compiler, "-shared", "-fPIC", "-xc", "-", "-o", library]
    subprocess.run(command, check=True, input=OTHER_RUNTIME.encode())
    return library


@linux
@pytest.mark.parametrize(
    "order", ["global, other", "other, global", "other, product, global", "product, other, global"]
)
def test_of_two_runtimes_that_of_the_application_is_used(libgomp, other_runtime, order):
    """torch makes the names of its runtime global; scikit-learn, imported before it, brings one that is not."""
    code = f"""
    import ctypes
    y = alone()
    steps = {{
        "product": lambda: print(product() == y),
        "other": lambda: ctypes.CDLL({str(other_runtime)!r}),
        "global": lambda: ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL),
    }}
    for step in {order!r}.split(", "):
        steps[step]()
    print(product() == y)
    print(os.path.basename(pyda8w4.cpu_info()["thread_runtime"]).startswith("libgomp.so"))
    pyda8w4.set_num_threads(None)
    ctypes.CDLL("libgomp.so.1").omp_set_num_threads(1)
    print(pyda8w4.get_num_threads() == 1, product() == y)
    """
    assert set(run(code, product=True, OMP_NUM_THREADS="2")) == {"True", "True True"}


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


@pytest.mark.pitfall("general", "nested OpenMP")
@linux
def test_calls_from_a_parallel_region(libgomp):
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


@linux
def test_a_system_that_refuses_threads_to_an_openmp_runtime(libgomp):
    # It would end the process, so no team is requested of it until the system has granted one.
    code = """
    import resource, threading
    y = alone()
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**22, -1))
    before = len(os.listdir("/proc/self/task"))
    print(product() == y, len(os.listdir("/proc/self/task")) - before)
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    print(product() == y, len(os.listdir("/proc/self/task")) - before)
    """
    assert run(LOAD + textwrap.dedent(code), product=True) == ["True 0", "True 2"]
