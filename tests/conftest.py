"""The `kernel` fixture: every built kernel, by name.

A kernel that this CPU cannot run is skipped, unless the environment variable
PYDA8W4_REQUIRE_KERNELS (names, with commas between) asks for it: then it must run, and some test
must have used it. So a job that is there to test a kernel cannot pass without doing so.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest

import pyda8w4

REQUIRED = [name.strip() for name in os.environ.get("PYDA8W4_REQUIRE_KERNELS", "").split(",") if name.strip()]

_selected = False
_tests: Counter[str] = Counter()


@pytest.fixture(params=pyda8w4.kernels(runnable=False))
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once with each kernel, inside `use_kernel`."""
    name = request.param
    reason = pyda8w4.cpu_info()["kernels"][name]
    if reason and name in REQUIRED:
        pytest.fail(f"PYDA8W4_REQUIRE_KERNELS asks for {name}, but {reason}")
    if reason:
        pytest.skip(f"{name}: {reason}")
    request.node.user_properties.append(("kernel", name))
    with pyda8w4.use_kernel(name):
        yield name


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    yield
    pyda8w4.set_num_threads(None)


def pytest_collection_finish(session: pytest.Session) -> None:
    global _selected
    _selected = any("kernel" in getattr(item, "fixturenames", ()) for item in session.items)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and not report.skipped:
        _tests.update(value for name, value in report.user_properties if name == "kernel")


def _idle() -> list[str]:
    """Required kernels that no test ran, although tests of kernels were selected."""
    return [name for name in REQUIRED if not _tests[name]] if _selected else []


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _idle() and not session.config.option.collectonly:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not _selected or config.option.collectonly:
        return
    names = dict.fromkeys([*pyda8w4.kernels(runnable=False), *REQUIRED])
    terminalreporter.write_line("tests per kernel: " + ", ".join(f"{name} {_tests[name]}" for name in names))
    for name in _idle():
        terminalreporter.write_line(f"PYDA8W4_REQUIRE_KERNELS asks for {name}, but no test ran it", red=True)
