"""The timing method of `pyda8w4.bench` and of the programs in benchmarks/.

Weights are cold: copies of a layer rotate through more memory than the last-level cache holds, as the layers of
a model do. Runs are interleaved: each side runs once a round, in an order that changes, so that all sides see what
else the machine does. Some time passes before each run, because thread pools spin after a call and slow down
whoever runs beside them. The first fifth of a run is not counted.

This module imports nothing but the standard library: benchmarks/timing.py loads it from its file.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SETTLE_SECONDS = 0.12  # OpenBLAS threads spin for about this long after a call.
MAX_COPIES = 4096
_CACHES_PASSED = 4
_MAX_COLD_BYTES = 700 << 20
_UNKNOWN_CACHE_BYTES = 64 << 20
_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of samples.

    Attributes
    ----------
    median, q1, q3 : float
        The median and the quartiles.
    samples : int
        How many there were.
    """

    median: float
    q1: float
    q3: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize samples.

        Parameters
        ----------
        values : sequence of float

        Returns
        -------
        Spread
        """
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3, len(values))

    def __str__(self) -> str:
        return f"{_three_digits(self.median):>6} [{_three_digits(self.q1)}..{_three_digits(self.q3)}]"


def last_level_cache_bytes() -> int | None:
    """Size of the last-level cache, or None where the system does not say.

    Returns
    -------
    int or None
        The sum over all parts that CPUs of this process share: threads on several of them use all of it.
    """
    parts: dict[tuple[int, str], int] = {}
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():  # Linux only
        for index in (_CPUS / f"cpu{cpu}" / "cache").glob("index[0-9]*"):
            try:
                level = int((index / "level").read_text())
                shared_by = (index / "shared_cpu_list").read_text()
                parts[level, shared_by] = int((index / "size").read_text().strip().removesuffix("K")) << 10
            except (OSError, ValueError):
                continue
    last = max((level for level, _ in parts), default=0)
    return sum(size for (level, _), size in parts.items() if level == last) or None


def cold_bytes() -> int:
    """Bytes that the copies of a layer pass through before the first one is read again.

    Returns
    -------
    int
    """
    return min(_CACHES_PASSED * (last_level_cache_bytes() or _UNKNOWN_CACHE_BYTES), _MAX_COLD_BYTES)


def count_copies(size: int, total: int) -> int:
    """How many copies of a layer pass through a number of bytes.

    Parameters
    ----------
    size : int
        Bytes of one copy.
    total : int
        Bytes to pass through; 0 for a single copy, which may stay in cache.

    Returns
    -------
    int
        At most `MAX_COPIES`.
    """
    return max(1, min(-(-total // size), MAX_COPIES))


def interleave(names: Iterable[str], rounds: int, settle: float, seed: int = 0) -> Iterator[str]:
    """Say whose run is next: each name comes once a round.

    Parameters
    ----------
    names : iterable of str
    rounds : int
    settle : float
        Seconds to wait before each run.
    seed : int
        Of the orders.

    Yields
    ------
    str
    """
    order = list(names)
    shuffle = random.Random(seed).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            time.sleep(settle)
            yield name


def time_calls(calls: Iterator[Callable[[], Any]], seconds: float) -> list[float]:
    """Time the calls of one run.

    Parameters
    ----------
    calls : iterator of callable
        It does not end: each call takes the next copy of a layer.
    seconds : float
        To run for. The first fifth is not counted: the clock frequency and the threads settle.

    Returns
    -------
    list of float
        Seconds of each call; one call at least, however long it takes.
    """
    times: list[float] = []
    start = time.perf_counter()
    warm, end, before = start + seconds / 5, start + seconds, start
    while before < end or not times:
        next(calls)()
        after = time.perf_counter()
        if before >= warm or after >= end:
            times.append(after - before)
        before = after
    return times


def _three_digits(value: float) -> str:
    """Three digits, or all those before the point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"
