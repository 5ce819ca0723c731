"""Limits of this machine, measured: memory reads in GB/s, 8-bit dot products in GOPS.

    python benchmarks/limits.py

The loops are those of the library, which `pyda8w4 explain` measures once. Limits drift with whatever else a machine
does, so benchmarks interleave them with the calls that they are compared with.
"""

from __future__ import annotations

import mmap
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from timing import interleave

import pyda8w4
from pyda8w4._limits import STREAMS, cold_memory, dot_rate, read_rate

ROUNDS = 9

# Portable C++ has no instruction whose limit would say anything.
ISAS = [kernel for kernel in pyda8w4.kernels() if kernel != "scalar"]


class Limits:
    """The loops, and memory larger than the caches."""

    def __init__(self) -> None:
        self._kernel = pyda8w4.kernels()[0]
        self._huge = cold_memory()
        self._small: NDArray[np.uint8] | None = None

    def read(self, size: int, threads: int, *, passes: int = 1) -> float:
        """GB/s of `threads` threads that read `size` bytes between them, `passes` times each."""
        return read_rate(self._huge[:size], self._kernel, threads, passes)

    def read_memory(self, threads: int, *, huge: bool = True) -> float:
        """GB/s of one pass through more than the caches hold."""
        return read_rate(self._huge if huge else self._small_pages(), self._kernel, threads)

    def read_memory_in_pieces(self, piece: int, threads: int) -> list[float]:
        """GB/s of each `piece` bytes of such a pass in huge pages: as long as calls that read as much."""
        pieces = [self._huge[start : start + piece] for start in range(0, self._huge.size - piece + 1, piece)]
        found = [[read_rate(each, self._kernel, threads, streams=(streams,)) for each in pieces] for streams in STREAMS]
        return max(found, key=statistics.median)

    def _small_pages(self) -> NDArray[np.uint8]:
        if self._small is None:
            pages = mmap.mmap(-1, self._huge.size)
            pages.madvise(mmap.MADV_NOHUGEPAGE)
            self._small = np.frombuffer(pages, np.uint8)
            self._small.fill(1)
        return self._small


class Machine:
    """The limits, as a worker (workers.py) measures them."""

    def __init__(self, threads: int) -> None:
        self._limits, self._threads = Limits(), threads

    def isas(self) -> list[str]:
        """Names of instruction sets whose peak can be measured, the best first."""
        return ISAS

    def read(self, size: int, cold: bool) -> list[float]:
        """GB/s of reading `size` bytes: other ones each time, or the same again and again."""
        if cold:
            return self._limits.read_memory_in_pieces(min(max(size, 4 << 20), 64 << 20), self._threads)
        passes = max(1, (32 << 20) // size)
        return [self._limits.read(size, self._threads, passes=passes) for _ in range(3)]

    def dots(self, isa: str) -> list[float]:
        """GOPS of dot products."""
        return [dot_rate(isa, self._threads) for _ in range(2)]


def main() -> None:
    limits, cpus = Limits(), pyda8w4.get_num_threads()
    print(pyda8w4.cpu_info()["cpu"])
    measures: dict[str, tuple[str, Callable[[], float]]] = {}
    for threads in dict.fromkeys((1, cpus)):
        of = f"{threads} thread{'s' * (threads != 1)}"
        measures |= {
            f"DRAM read, huge pages, {of}": ("GB/s", partial(limits.read_memory, threads)),
            f"DRAM read, 4 KiB pages, {of}": ("GB/s", partial(limits.read_memory, threads, huge=False)),
            f"L3 read, {of}": ("GB/s", partial(limits.read, 8 << 20, threads, passes=40)),
            f"L2 read, {of}": ("GB/s", partial(limits.read, threads << 18, threads, passes=800)),
        }
        for isa in ISAS:
            measures[f"dot products, {isa}, {of}"] = ("GOPS", partial(dot_rate, isa, threads))
    results: dict[str, list[float]] = {name: [] for name in measures}
    for name in interleave(measures, ROUNDS, settle=0):
        results[name].append(measures[name][1]())
    for name, (unit, _) in measures.items():
        values = results[name]
        print(f"{name:40} {statistics.median(values):8.1f} {unit}  ({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    main()
