"""`pyda8w4.linear` on layers of language models, against numpy's float32: ``pyda8w4 bench``.

Weights are cold, as in a model, where a layer comes round again only after all the others: each call
takes the next of several copies. The two sides alternate, so that both see what else the machine does.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from pyda8w4._linear import linear
from pyda8w4._packed import PackedWeight, aligned_empty
from pyda8w4._prepack import prepack
from pyda8w4._runtime import cpu_info, forced_kernel, get_num_threads

__all__ = ["ROWS", "SHAPES", "Cell", "Timing", "main", "measure_layer"]

# N x K: attention and both feed-forward layers of a 7B Llama, two layers of SmolLM2-135M.
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (576, 576), (1536, 576)]
ROWS = [1, 4, 16, 64, 256]

_ROUNDS = 3
# OpenBLAS threads spin for about this long after a product; whoever runs beside them is slowed.
_SETTLE_SECONDS = 0.12
_CACHES_TOUCHED = 4
_MOST_BYTES = 700 << 20  # of copies, for each side
_MOST_COPIES = 4096
_UNKNOWN_CACHE = 64 << 20


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Attributes
    ----------
    median, q1, q3 : float
        The median and the quartiles.
    calls : int
        How many were timed.
    """

    median: float
    q1: float
    q3: float
    calls: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarize the times of calls.

        Parameters
        ----------
        seconds : list of float
            Of each call.

        Returns
        -------
        Timing
        """
        q1, median, q3 = (float(value) for value in np.percentile(seconds, [25, 50, 75]) * 1e3)
        return cls(median, q1, q3, len(seconds))

    def __str__(self) -> str:
        return f"{_short(self.median):>6} [{_short(self.q1)}..{_short(self.q3)}]"


@dataclass(frozen=True)
class Cell:
    """One layer with one number of rows.

    Attributes
    ----------
    n, k, m : int
        Outputs, inputs and rows.
    packed_bytes : int
        Of the packed weight.
    packed_copies, float32_copies : int
        How many copies of the weight each side passed through.
    numpy_read : float
        What numpy reads in GB/s.
    linear_ms, float32_ms : Timing
        Of `pyda8w4.linear` and of numpy.
    """

    n: int
    k: int
    m: int
    packed_bytes: int
    packed_copies: int
    float32_copies: int
    numpy_read: float
    linear_ms: Timing
    float32_ms: Timing

    @property
    def gigabytes(self) -> float:
        """Packed weight read, in GB/s."""
        return self.packed_bytes / self.linear_ms.median / 1e6

    @property
    def gigaops(self) -> float:
        """Multiplications and additions, in 1e9/s."""
        return 2 * self.m * self.n * self.k / self.linear_ms.median / 1e6

    @property
    def ratio(self) -> float:
        """How many times faster than float32."""
        return self.float32_ms.median / self.linear_ms.median

    def as_dict(self) -> dict[str, Any]:
        """Everything in this cell, and what follows from it.

        Returns
        -------
        dict of str
        """
        return {**asdict(self), "gb_per_s": self.gigabytes, "gops": self.gigaops, "ratio": self.ratio}


def main(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    group_size: int = 128,
    seconds: float = 1.0,
    threads: int | None = None,
    json_file: TextIO | None = None,
) -> int:
    """Measure, print a table and return the exit status.

    Parameters
    ----------
    shapes : sequence of (int, int)
        (N, K) of layers.
    rows : sequence of int
        Values of M.
    group_size : int
        Of the weights; K where K is less.
    seconds : float
        To measure for each shape and M, both sides together.
    threads : int, optional
        To limit numpy to, where threadpoolctl is there to do so. `pyda8w4.set_num_threads` is for the caller.
    json_file : text file, optional
        Where to write all numbers.

    Returns
    -------
    int
    """
    with _numpy_limit(threads):
        cache = _last_level_cache()
        target = min(_CACHES_TOUCHED * (cache or _UNKNOWN_CACHE), _MOST_BYTES)
        setup = {
            **cpu_info(),
            "load_average": os.getloadavg()[0],
            "group_size": group_size,
            "last_level_cache_bytes": cache,
            "rotated_bytes": target,
            "numpy": np.__version__,
            "numpy_threads": _numpy_threads(),
        }
        kernel = forced_kernel()
        if kernel is not None:
            setup["kernel"] = kernel.decode()
        _print_header(setup)
        cells = []
        for n, k in shapes:
            for number, cell in enumerate(measure_layer(n, k, rows, group_size, seconds, target)):
                _print_row(cell, first=number == 0)
                cells.append(cell)
    reads = [cell.numpy_read for cell in cells]
    print("\nof read: the share of the GB/s at which numpy, before each layer, read memory, which may give more;")
    print(f"here {min(reads):.1f} to {max(reads):.1f} GB/s")
    if json_file is not None:
        json.dump({**setup, "cells": [cell.as_dict() for cell in cells]}, json_file, indent=2)
        json_file.write("\n")
    return 0


def measure_layer(
    n: int, k: int, rows: Sequence[int], group_size: int, seconds: float, rotated_bytes: int
) -> Iterator[Cell]:
    """Time one layer, of random weights, with each number of rows.

    Parameters
    ----------
    n, k : int
    rows : sequence of int
    group_size : int
    seconds : float
        For each number of rows, both sides together; a few calls are made however long they take.
    rotated_bytes : int
        How much weight each side passes through before it reads the same again.

    Yields
    ------
    Cell
    """
    read = _read_bandwidth(rotated_bytes)
    rng = np.random.default_rng(0)
    packed, w = _random_layer(rng, n, k, group_size)
    packed_copies = [packed, *(copy.copy(packed) for _ in range(1, _copies(packed.nbytes, rotated_bytes)))]
    float32_copies = [w, *(w.copy() for _ in range(1, _copies(w.nbytes, rotated_bytes)))]
    for m in rows:
        x = rng.standard_normal((m, k), np.float32)
        ours, theirs = _alternate(x, packed_copies, float32_copies, seconds)
        yield Cell(n, k, m, packed.nbytes, len(packed_copies), len(float32_copies), read, ours, theirs)


def _alternate(
    x: np.ndarray, packed_copies: list[PackedWeight], float32_copies: list[np.ndarray], seconds: float
) -> tuple[Timing, Timing]:
    packed, float32 = cycle(packed_copies), cycle(float32_copies)
    out = np.empty((len(x), packed_copies[0].shape[0]), np.float32)
    ours: list[float] = []
    theirs: list[float] = []
    share = seconds / _ROUNDS / 2
    for _ in range(_ROUNDS):
        ours += _time(lambda: linear(x, next(packed), out=out), share)
        theirs += _time(lambda: np.matmul(x, next(float32).T, out=out), share)
        time.sleep(_SETTLE_SECONDS)
    return Timing.of(ours), Timing.of(theirs)


def _last_level_cache() -> int | None:
    """Bytes of the last level of cache, all its parts together; None where the system does not say."""
    found: dict[tuple[int, str], int] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level = int((index / "level").read_text())
            shared_by = (index / "shared_cpu_list").read_text()
            found[level, shared_by] = int((index / "size").read_text().strip().removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last) or None


def _read_bandwidth(size: int) -> float:
    """GB/s at which numpy reads memory: the best of several passes over `size` bytes, a part for each thread.

    Memory may well be faster than that, where a core waits for its own arithmetic or threads are few.
    """
    threads = get_num_threads()
    (buffer,) = aligned_empty(((size // 8,), np.dtype(np.int64)))
    buffer.fill(1)  # pages that were never written all read the same one
    parts = np.array_split(buffer, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(8):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - start)
    return buffer.nbytes / best / 1e9


def _time(call: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of each call, after a fifth of the time for the clock frequency and the threads to settle."""
    times: list[float] = []
    start = time.perf_counter()
    warm, end = start + seconds / 5, start + seconds
    before = start
    while before < end or not times:
        call()
        after = time.perf_counter()
        if before >= warm or after >= end:
            times.append(after - before)
        before = after
    return times


def _random_layer(rng: np.random.Generator, n: int, k: int, group_size: int) -> tuple[PackedWeight, np.ndarray]:
    """A packed weight, and the float32 matrix that it stands for."""
    group = min(group_size, k)
    groups = -(-k // group)
    codes = rng.integers(0, 16, (n, k), np.uint8)
    scales = (rng.uniform(0.5, 1.5, (n, groups)) / np.sqrt(k)).astype(np.float16)
    zps = rng.integers(6, 11, (n, groups), np.int8)
    w = np.empty((n, k), np.float32)
    for g in range(groups):
        part = slice(g * group, (g + 1) * group)
        np.subtract(codes[:, part], zps[:, g, None], out=w[:, part], dtype=np.float32)
        w[:, part] *= scales[:, g, None]
    return prepack(codes, scales, zps, group_size=group), w


def _copies(size: int, total: int) -> int:
    return min(-(-total // size), _MOST_COPIES)


def _threadpoolctl() -> Any:
    try:
        import threadpoolctl
    except ImportError:
        return None
    return threadpoolctl


def _numpy_threads() -> int | None:
    control = _threadpoolctl()
    if control is None:
        return None
    return max((pool["num_threads"] for pool in control.threadpool_info() if pool["user_api"] == "blas"), default=1)


def _numpy_limit(threads: int | None) -> AbstractContextManager[Any]:
    control = _threadpoolctl()
    if threads is None or control is None:
        return nullcontext()
    return control.threadpool_limits(threads, "blas")


def _print_header(setup: dict[str, Any]) -> None:
    cache, rotated = setup["last_level_cache_bytes"], setup["rotated_bytes"]
    cache_text = "unknown" if cache is None else f"{cache / 2**20:.0f} MiB"
    cold = "" if cache is None or rotated > cache else ", NOT more than the cache"
    if setup["numpy_threads"] is None:
        numpy_threads = "as many threads as it likes (threadpoolctl, which is not installed, would tell)"
    else:
        numpy_threads = _threads(setup["numpy_threads"])
    print(f"cpu      {setup['cpu']}")
    print(f"load     {setup['load_average']:.1f} in the minute before; what else runs here makes times longer")
    print(f"pyda8w4  kernel {setup['kernel']}, {_threads(setup['threads'])} ({setup['thread_runtime']})")
    print(f"numpy    {setup['numpy']}, float32 x @ w.T, {numpy_threads}")
    print(f"weights  int4, group {setup['group_size']}, float16 scales, a zero point per group; x and y float32")
    print(f"cold     weights rotate through {rotated / 2**20:.0f} MiB or more on each side{cold}")
    print(f"         (last-level cache: {cache_text}; at most {_MOST_COPIES} copies); x and y stay warm")
    print("times    ms: median [quartiles]; GB/s: packed weight read")
    print()
    print(
        f"{'N x K':<12}{'M':>5}  {'linear ms':<24}{'GB/s':>6}{'of read':>9}{'GOPS':>8}"
        f"  {'numpy float32 ms':<24}{'ratio':>6}",
        flush=True,
    )


def _print_row(cell: Cell, first: bool) -> None:
    name = f"{cell.n}x{cell.k}" if first else ""
    print(
        f"{name:<12}{cell.m:>5}  {cell.linear_ms!s:<24}{cell.gigabytes:>6.1f}{cell.gigabytes / cell.numpy_read:>9.0%}"
        f"{cell.gigaops:>8.0f}  {cell.float32_ms!s:<24}{cell.ratio:>6.1f}",
        flush=True,
    )


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _short(ms: float) -> str:
    """Three digits, or all those before the point."""
    return f"{ms:.0f}" if ms >= 99.95 else f"{ms:#.3g}"
