"""Fresh interpreters, for what a test cannot do in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SETTINGS = ("PYDA8W4_KERNEL", "OMP_NUM_THREADS", "GOMP_CPU_AFFINITY", "OMP_DYNAMIC", "OMP_THREAD_LIMIT")

# A product large enough for several threads, with a result that is easy to compare.
PRODUCT = """
import os, sys
import numpy as np
import pyda8w4
rng = np.random.default_rng(0)
packed = pyda8w4.quantize(rng.standard_normal((257, 600), dtype=np.float32), 100)
x = rng.standard_normal((20, 600), dtype=np.float32)
def product():
    return pyda8w4.linear(x, packed).tobytes()
def alone():
    pyda8w4.set_num_threads(1)
    y = product()
    pyda8w4.set_num_threads(3)
    return y
"""

FORK = """
def in_child(check):
    import os, signal
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # kills a child that hangs
        os._exit(0 if check() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def run(code, *, timeout=60, product=False, **environment):
    """The printed lines of a fresh interpreter."""
    inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    process = subprocess.run(
        [sys.executable, "-c", (PRODUCT if product else "import pyda8w4\n") + textwrap.dedent(code)],
        env={**inherited, **environment},
        cwd=Path(__file__).parent,  # where cases.py is; in the root, pyda8w4/ would hide an installed package
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


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


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
