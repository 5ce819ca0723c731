"""The fixtures of these tests, and the table at the end of a run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true", help="run all cases of tests/serving")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PYDA8W4_REQUIRE_VLLM") and importlib.util.find_spec("vllm") is None:
        raise pytest.UsageError("PYDA8W4_REQUIRE_VLLM asks for vLLM, which is not installed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if item.get_closest_marker("matrix")]
    if left_out and not config.getoption("--matrix", False):
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from engine import Engine

    engine = Engine(tmp_path_factory.mktemp("engine"))
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import save_tokenizer

    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    rows = [value for report in reports for name, value in report.user_properties if name == "serving"]
    if not rows:
        return
    heads = ["format", "mode", "ranks", "type"]
    for reference in ("transformers", "cut as ranks are"):
        heads += [f"{reference}: equal tokens", "margin", "logits, usual", "most"]
    table = [heads, ["---"] * len(heads)]
    for case, total, comparisons in rows:
        cells = [*map(str, case)]
        for equal, margin, usual, most in comparisons:
            gap = f"{margin:.3f}" if equal < total else ""
            cells += [f"{equal} of {total}", gap, f"{usual:.0e}", f"{most:.0e}"]
        table.append(cells + [""] * (len(heads) - len(cells)))
    terminalreporter.write_line("")
    for cells in table:
        terminalreporter.write_line(f"| {' | '.join(cells)} |")
