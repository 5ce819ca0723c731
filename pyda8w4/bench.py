"""`pyda8w4.linear` on layers of language models, compared with numpy's float32: ``pyda8w4 bench``.

Weights are cold, as in a model, where a layer is read again only after all the others: each call
takes the next of several copies. The runs of the two sides are interleaved, so that both see what else the machine
does.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from pyda8w4._linear import linear
from pyda8w4._packed import PackedWeight
from pyda8w4._prepack import prepack
from pyda8w4._runtime import cpu_info, forced_kernel, get_num_threads
from pyda8w4._svg import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, Series, chart
from pyda8w4._terminal import counted
from pyda8w4._timing import (
    MAX_COPIES,
    SETTLE_SECONDS,
    Spread,
    cold_bytes,
    count_copies,
    interleave,
    last_level_cache_bytes,
    time_calls,
)

__all__ = ["ROWS", "SECONDS", "SHAPES", "Cell", "main", "measure_layer"]

# N x K: an attention and a feed-forward layer of a 7B Llama, a feed-forward layer of SmolLM2-135M. With these rows and
# seconds they take less than half a minute.
SHAPES = [(4096, 4096), (11008, 4096), (1536, 576)]
ROWS = [1, 4, 16, 128]
SECONDS = 0.4

_ROUNDS = 3


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
    linear_ms, float32_ms : Spread
        Milliseconds of a call of `pyda8w4.linear` and of numpy.
    """

    n: int
    k: int
    m: int
    packed_bytes: int
    packed_copies: int
    float32_copies: int
    numpy_read: float
    linear_ms: Spread
    float32_ms: Spread

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
    seconds: float = SECONDS,
    threads: int | None = None,
    json_file: TextIO | None = None,
    plot_file: TextIO | None = None,
    *,
    bits: int = 4,
    act: str = "uint8",
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
    plot_file : text file, optional
        Where to write a chart of them, as SVG.
    bits : {4, 5, 6, 8}
        Of a weight's code.
    act : {'uint8', 'int8', 'int8_group', 'int16'}
        To what activations are quantized.

    Returns
    -------
    int
    """
    with _numpy_limit(threads):
        target = cold_bytes()
        setup = {
            **cpu_info(),
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # None on Windows
            "bits": bits,
            "group_size": group_size,
            "act": act,
            "last_level_cache_bytes": last_level_cache_bytes(),
            "rotated_bytes": target,
            "numpy": np.__version__,
            "numpy_threads": _numpy_threads(),
        }
        kernel = forced_kernel()
        if kernel is not None:
            setup["kernel"] = kernel.decode()
        _print_header(setup)
        _print_duration(len(shapes), len(rows), seconds)
        _print_columns()
        cells = []
        for n, k in shapes:
            for number, cell in enumerate(measure_layer(n, k, rows, group_size, seconds, target, bits, act)):
                _print_row(cell, first=number == 0)
                cells.append(cell)
    reads = [cell.numpy_read for cell in cells]
    print(f"\nnumpy read {min(reads):.1f} to {max(reads):.1f} GB/s")
    if json_file is not None:
        json.dump({**setup, "cells": [cell.as_dict() for cell in cells]}, json_file, indent=2)
        json_file.write("\n")
    if plot_file is not None:
        plot_file.write(_chart(cells, setup))
    return 0


def measure_layer(
    n: int,
    k: int,
    rows: Sequence[int],
    group_size: int,
    seconds: float,
    rotated_bytes: int,
    bits: int = 4,
    act: str = "uint8",
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
    bits : {4, 5, 6, 8}
    act : {'uint8', 'int8', 'int8_group', 'int16'}

    Yields
    ------
    Cell
    """
    read = _read_bandwidth(rotated_bytes)
    rng = np.random.default_rng(0)
    packed, w = _random_layer(rng, n, k, group_size, bits)
    packed_copies = [packed, *(copy.copy(packed) for _ in range(1, count_copies(packed.nbytes, rotated_bytes)))]
    float32_copies = [w, *(w.copy() for _ in range(1, count_copies(w.nbytes, rotated_bytes)))]
    for m in rows:
        x = rng.standard_normal((m, k), np.float32)
        linear_ms, float32_ms = _time_both(x, packed_copies, float32_copies, seconds, act)
        yield Cell(n, k, m, packed.nbytes, len(packed_copies), len(float32_copies), read, linear_ms, float32_ms)


def _time_both(
    x: NDArray[np.float32],
    packed_copies: list[PackedWeight],
    float32_copies: list[NDArray[np.float32]],
    seconds: float,
    act: str,
) -> tuple[Spread, Spread]:
    """Milliseconds of `linear` and of numpy."""
    out = np.empty((len(x), packed_copies[0].shape[0]), np.float32)
    calls = {
        "linear": cycle([partial(linear, x, packed, act=act, out=out) for packed in packed_copies]),
        "float32": cycle([partial(np.matmul, x, w.T, out=out) for w in float32_copies]),
    }
    ms: dict[str, list[float]] = {side: [] for side in calls}
    for side in interleave(calls, _ROUNDS, SETTLE_SECONDS):
        ms[side] += [1e3 * each for each in time_calls(calls[side], seconds / _ROUNDS / 2)]
    return Spread.of(ms["linear"]), Spread.of(ms["float32"])


def _read_bandwidth(size: int) -> float:
    """GB/s at which numpy reads memory: the best of several passes over `size` bytes, a part for each thread.

    Memory may well be faster, where a core waits for its own arithmetic or threads are few.
    """
    threads = get_num_threads()
    buffer = np.ones(size // 8, np.int64)  # Pages that were never written would all be one page.
    parts = np.array_split(buffer, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(8):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - start)
    return buffer.nbytes / best / 1e9


def random_weight(
    rng: np.random.Generator, n: int, k: int, group_size: int, bits: int
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.int16]]:
    """Codes, scales and zero points of a layer, such as a quantizer makes them."""
    groups = -(-k // min(group_size, k))
    codes = rng.integers(0, 1 << bits, (n, k), np.uint8)
    scales = (rng.uniform(0.5, 1.5, (n, groups)) * 16 / (1 << bits) / np.sqrt(k)).astype(np.float16)
    middle = 1 << (bits - 1)
    zps = rng.integers(middle - 2, middle + 3, (n, groups), np.int16)
    return codes, scales, zps


def _random_layer(
    rng: np.random.Generator, n: int, k: int, group_size: int, bits: int
) -> tuple[PackedWeight, NDArray[np.float32]]:
    """A packed weight, and the float32 matrix that it stands for."""
    codes, scales, zps = random_weight(rng, n, k, group_size, bits)
    group = min(group_size, k)
    w = np.empty((n, k), np.float32)
    for g in range(zps.shape[1]):
        part = slice(g * group, (g + 1) * group)
        np.subtract(codes[:, part], zps[:, g, None], out=w[:, part], dtype=np.float32)
        w[:, part] *= scales[:, g, None]
    return prepack(codes, scales, zps, bits=bits, group_size=group), w


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
    limit: AbstractContextManager[Any] = control.threadpool_limits(threads, "blas")
    return limit


def _chart(cells: Sequence[Cell], setup: dict[str, Any]) -> str:
    """Milliseconds over rows: of each layer a line for either side."""
    of_shape: dict[tuple[int, int], list[Cell]] = {}
    for cell in cells:
        of_shape.setdefault((cell.n, cell.k), []).append(cell)
    series = []
    for (shape, found), colour in zip(of_shape.items(), cycle([BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE])):
        name = "{} x {}".format(*shape)
        ours = [(cell.m, cell.linear_ms.median) for cell in found]
        theirs = [(cell.m, cell.float32_ms.median) for cell in found]
        series.append(Series(name, ours, colour, "solid", "circle"))
        series.append(Series(f"{name}, numpy", theirs, colour, "dashed", "square"))
    threads = counted(setup["threads"], "thread")
    what = f"linear beside numpy float32: {setup['bits']} bits, groups of {setup['group_size']}, x as {setup['act']}"
    return chart(
        f"{what}\n{setup['cpu']}, {setup['kernel']}, {threads}, cold weights",
        "rows M",
        "milliseconds of a product",
        series,
        x_ticks=sorted({cell.m for cell in cells}),
    )


def _print_header(setup: dict[str, Any]) -> None:
    cache, rotated = setup["last_level_cache_bytes"], setup["rotated_bytes"]
    cache_text = "unknown" if cache is None else f"{cache / 2**20:.0f} MiB"
    cold = "" if cache is None or rotated > cache else ", NOT more than the cache"
    if setup["numpy_threads"] is None:
        numpy_threads = "as many threads as it likes (threadpoolctl, which is not installed, would tell)"
    else:
        numpy_threads = counted(setup["numpy_threads"], "thread")
    print(f"cpu      {setup['cpu']}")
    if setup["load_average"] is not None:
        print(f"load     {setup['load_average']:.1f} in the minute before; what else runs here makes times longer")
    print(f"pyda8w4  kernel {setup['kernel']}, {counted(setup['threads'], 'thread')} ({setup['thread_runtime']})")
    print(f"numpy    {setup['numpy']}, float32 x @ w.T, {numpy_threads}")
    print(
        f"weights  {setup['bits']} bits, group {setup['group_size']}, float16 scales, a zero point per group; "
        f"x and y float32, x as {setup['act']}"
    )
    print(f"cold     weights rotate through {rotated / 2**20:.0f} MiB or more on each side{cold}")
    print(f"         (last-level cache: {cache_text}; at most {MAX_COPIES} copies); x and y stay warm")


def _print_duration(layers: int, rows: int, seconds: float) -> None:
    cell_seconds = seconds + 2 * _ROUNDS * SETTLE_SECONDS
    total = layers * rows * cell_seconds
    print(
        f"time     {total:.0f} s or more: {layers * rows} cells of {cell_seconds:.1f} s, and the making of the layers"
    )


def _print_columns() -> None:
    print("times    ms: median [quartiles]; GB/s: packed weight read")
    print("of read  share of the GB/s at which numpy reads memory, measured before each layer; it can pass 100 %,")
    print("         because memory may give more than numpy reads")
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
