"""Fixtures, `pytest --pitfalls`, and what is said at the end of a run.

The fixture `kernel` is every built kernel, by name. A kernel that this CPU cannot run is skipped, unless the
environment variable PYDA8W4_REQUIRE_KERNELS (names, with commas between) asks for it: then it must run, and some test
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
_tests: Counter[tuple[str, str]] = Counter()  # of a kernel, in a file


@pytest.fixture(params=pyda8w4.kernels(runnable=False))
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once with each kernel, inside `use_kernel`."""
    name = request.param
    reason = pyda8w4.cpu_info()["kernels"][name]
    if reason and name in REQUIRED:
        pytest.fail(f"PYDA8W4_REQUIRE_KERNELS asks for {name}, but {reason}")
    if reason:
        pytest.skip(f"this CPU cannot run the kernel {name}: {reason}")
    request.node.user_properties.append(("kernel", name))
    with pyda8w4.use_kernel(name):
        yield name


@pytest.fixture(scope="session", autouse=True)
def an_empty_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests work in one: in a clone, Python processes that they start would find the sources, not the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    yield
    pyda8w4.set_num_threads(None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pitfalls", action="store_true", help="list defects of other libraries and the tests for them")


def pytest_collection_finish(session: pytest.Session) -> None:
    global _selected
    _selected = any("kernel" in getattr(item, "fixturenames", ()) for item in session.items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """In the place of running the selected tests, list their pitfalls where `--pitfalls` asks for that.

    The library "general" stands for defects that are common rather than reported of one.
    """
    if not session.config.option.pitfalls:
        return None
    rows = {
        (item.location[0], getattr(item, "originalname", item.name), *mark.args): None
        for item in session.items
        for mark in item.iter_markers("pitfall")
    }
    _write_table([("file", "test", "library", "search for"), *rows])
    return True


def _write_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and not report.skipped:
        file = report.nodeid.partition("::")[0].rpartition("/")[2]
        _tests.update((str(value), file) for name, value in report.user_properties if name == "kernel")


def _total(name: str) -> int:
    return sum(count for (kernel, _), count in _tests.items() if kernel == name)


def _idle() -> list[str]:
    """Required kernels that no test ran, although tests of kernels were selected."""
    return [name for name in REQUIRED if not _total(name)] if _selected else []


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _idle() and not (session.config.option.collectonly or session.config.option.pitfalls):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.option.collectonly:
        return
    _write_skips(terminalreporter)
    if not _selected or config.option.pitfalls:
        return
    names = list(dict.fromkeys([*pyda8w4.kernels(runnable=False), *REQUIRED]))
    rows = [("tests per kernel", *names)]
    for file in sorted({file for _, file in _tests}):
        rows.append((file, *(str(_tests[name, file]) for name in names)))
    rows.append(("all", *(str(_total(name)) for name in names)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *counts in rows:
        cells = (count.rjust(width) for count, width in zip(counts, widths[1:]))
        terminalreporter.write_line("  ".join([first.ljust(widths[0]), *cells]))
    for name in _idle():
        terminalreporter.write_line(f"PYDA8W4_REQUIRE_KERNELS asks for {name}, but no test ran it", red=True)


def _write_skips(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each reason: most tests run once with each kernel, and no CPU has them all."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")
