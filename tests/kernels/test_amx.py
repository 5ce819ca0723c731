"""The kernel amx on CPUs without AMX, and where the system refuses it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyda8w4

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or "amx" not in pyda8w4.kernels(runnable=False),
    reason="the kernel amx is not built",
)
FEATURES = pyda8w4.cpu_info()["features"]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("no C compiler for the emulator")
    library = tmp_path_factory.mktemp("amx") / "amx_emulator.so"
    source = Path(__file__).parents[1] / "tools" / "amx_emulator.c"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    return library


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.skipif(not FEATURES["avx512f+bw+dq+vl+vnni"], reason="the emulator needs AVX-512 VNNI for the rest")
def test_selftest_over_the_emulator(emulator: Path) -> None:
    claim = 'import pyda8w4; print(pyda8w4.cpu_info()["features"]["amx_tile+int8"])'
    if run("-c", claim, PYDA8W4_EMULATED_AMX="1").stdout.strip() != "True":
        pytest.skip("the library was not built with -Demulated_amx=true")
    done = run("-m", "pyda8w4", "selftest", PYDA8W4_EMULATED_AMX="1", LD_PRELOAD=str(emulator), PYDA8W4_KERNEL="")
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("amx")]
    assert "bit-identical" in line


def test_without_amx_the_reason_is_given() -> None:
    reason = pyda8w4.cpu_info()["kernels"]["amx"]
    if FEATURES["amx_tile+int8"] and FEATURES["permission to use amx"]:
        assert reason is None
    else:
        assert "amx" in reason


# Refuses arch_prctl(ARCH_REQ_XCOMP_PERM), as sandboxes do, and then looks at what is left.
REFUSED = """
import ctypes, struct

libc = ctypes.CDLL(None, use_errno=True)
program = [(0x20, 0, 0, 0), (0x15, 0, 3, 158), (0x20, 0, 0, 16), (0x15, 0, 1, 0x1023), (0x06, 0, 0, 0x50001),
           (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
fprog = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, fprog, 0, 0) == 0
import pyda8w4

print(pyda8w4.cpu_info()["kernels"]["amx"], "|", pyda8w4.cpu_info()["kernel"])
"""


def test_a_refused_permission_is_a_reason_not_a_crash() -> None:
    done = run("-c", REFUSED, PYDA8W4_KERNEL="", PYDA8W4_EMULATED_AMX="0")
    assert done.returncode == 0, done.stderr
    reason, _, default = done.stdout.strip().partition(" | ")
    assert "permission to use amx" in reason
    assert default != "amx"
