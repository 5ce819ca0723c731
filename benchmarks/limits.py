"""Limits of this machine, measured: memory reads in GB/s, 8-bit dot products in GOPS.

    python benchmarks/limits.py

Compiles limits.cpp with the system's C++ compiler ($CXX, else c++) into a temporary folder. Benchmarks
import `Limits` and measure in turn with what they hold against it, because these limits drift with
whatever else a machine does.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

ISAS = {"amx": 2, "avx512vnni": 0, "avx2": 1}  # best first
_STREAMS = (1, 2)  # of each thread that reads; the better one counts


def last_level_cache() -> int:
    """Bytes of the largest cache of CPU 0; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = size.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes)


def _beyond_caches() -> int:
    return max(4 * last_level_cache(), 256 << 20)


class Limits:
    """The compiled loops, and buffers larger than the caches."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        library = Path(self._folder.name) / "limits.so"
        source = Path(__file__).with_name("limits.cpp")
        compiler = os.environ.get("CXX", "c++")
        subprocess.run(
            [compiler, "-O2", "-std=c++17", "-shared", "-fPIC", "-pthread", source, "-o", library], check=True
        )
        self._library = ctypes.CDLL(str(library))
        self._library.limits_alloc.restype = ctypes.c_void_p
        self._library.limits_read.restype = self._library.limits_dots.restype = ctypes.c_double
        self._library.limits_alloc.argtypes = [ctypes.c_size_t, ctypes.c_int]
        self._library.limits_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3]
        self._buffers: dict[tuple[int, bool], int] = {}

    def read(self, size: int, threads: int, *, huge: bool = True, passes: int = 1) -> float:
        """GB/s of `threads` threads that read `size` bytes between them, `passes` times each."""
        start = self._buffer(size, huge)
        seconds = min(self._library.limits_read(start, size, threads, passes, streams) for streams in _STREAMS)
        return size * passes / seconds / 1e9

    def dram(self, threads: int, *, huge: bool = True) -> float:
        return self.read(_beyond_caches(), threads, huge=huge)

    def dram_pieces(self, piece: int, threads: int) -> list[float]:
        """GB/s of each `piece` bytes of memory in huge pages: as long, and as many, as calls that read as much."""
        size = _beyond_caches()
        start = self._buffer(size, True)
        found = []
        for streams in _STREAMS:
            places = range(start, start + size - piece + 1, piece)
            seconds = [self._library.limits_read(place, piece, threads, 1, streams) for place in places]
            found.append([piece / each / 1e9 for each in seconds])
        return max(found, key=statistics.median)

    def _buffer(self, size: int, huge: bool) -> int:
        if (size, huge) not in self._buffers:
            self._buffers[size, huge] = self._library.limits_alloc(size, huge)
        return self._buffers[size, huge]

    def dots(self, isa: str, threads: int) -> float:
        """GOPS of a register-only loop; isa is a key of ISAS that this CPU has."""
        return float(self._library.limits_dots(ISAS[isa], threads))


def main() -> None:
    import pyda8w4

    limits, cpus = Limits(), pyda8w4.get_num_threads()
    print(pyda8w4.cpu_info()["cpu"])
    measures: dict[tuple[str, str], Callable[[], float]] = {}
    for threads in dict.fromkeys((1, cpus)):
        measures[f"DRAM read, huge pages, {threads} threads", "GB/s"] = partial(limits.dram, threads)
        measures[f"DRAM read, 4 KiB pages, {threads} threads", "GB/s"] = partial(limits.dram, threads, huge=False)
        measures[f"L3 read, {threads} threads", "GB/s"] = partial(limits.read, 8 << 20, threads, passes=40)
        measures[f"L2 read, {threads} threads", "GB/s"] = partial(limits.read, threads << 18, threads, passes=800)
        for isa in ISAS:
            if isa in pyda8w4.kernels():
                measures[f"dot products, {isa}, {threads} threads", "GOPS"] = partial(limits.dots, isa, threads)
    results: dict[tuple[str, str], list[float]] = {key: [] for key in measures}
    for _ in range(9):
        for key, measure in measures.items():
            results[key].append(measure())
    for (name, unit), values in results.items():
        print(f"{name:40} {statistics.median(values):8.1f} {unit}  ({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    main()
