"""This machine: what it is, and the limits of what it can do, measured.

`Limits` compiles limits.cpp with the system's C++ compiler ($CXX, else c++) into a temporary folder. Limits drift with
whatever else a machine does, so benchmarks interleave them with the calls that they are compared with.
"""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from timing import cold_bytes, last_level_cache_bytes

ISAS = {"amx": 2, "avx512vnni": 0, "avx2": 1}  # The best comes first; the numbers are those of limits.cpp.
_STREAMS = (1, 2)  # Each thread reads in so many; the better number counts.
_MIN_BYTES = 256 << 20  # A pass through memory takes that much at least.
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def describe() -> dict[str, Any]:
    """Say what a reader of results has to know of this machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"),
        "cpus": len(os.sched_getaffinity(0)),
        "last_level_cache": last_level_cache_bytes(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def available_bytes() -> int:
    """Memory that new processes can have."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10


def page_policy() -> str:
    """Say what this system does about huge pages, and what workers.py does about them."""
    try:
        policy = _HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return "unknown to this system"
    if policy == "madvise":
        return "madvise: glibc's malloc asks for huge pages in every process (glibc.malloc.hugetlb=1), pyda8w4 always"
    return f"{policy}, for all alike"


def huge_page_share() -> float | None:
    """Share of this process's own memory that lies in huge pages; None where the system does not say."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    sizes = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
    return sizes["AnonHugePages"] / max(1, sizes["Anonymous"])


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
        self._cold_bytes = max(cold_bytes(), _MIN_BYTES)

    def read(self, size: int, threads: int, *, huge: bool = True, passes: int = 1) -> float:
        """GB/s of `threads` threads that read `size` bytes between them, `passes` times each."""
        start = self._buffer(size, huge)
        seconds = min(self._library.limits_read(start, size, threads, passes, streams) for streams in _STREAMS)
        return size * passes / seconds / 1e9

    def read_memory(self, threads: int, *, huge: bool = True) -> float:
        """GB/s of one pass through more than the caches hold."""
        return self.read(self._cold_bytes, threads, huge=huge)

    def read_memory_in_pieces(self, piece: int, threads: int) -> list[float]:
        """GB/s of each `piece` bytes of such a pass in huge pages: as long as calls that read as much."""
        start = self._buffer(self._cold_bytes, True)
        found = []
        for streams in _STREAMS:
            places = range(start, start + self._cold_bytes - piece + 1, piece)
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


class Machine:
    """The limits, as a worker (workers.py) measures them."""

    def __init__(self, threads: int) -> None:
        self._limits, self._threads = Limits(), threads
        # A peak of 0 means that the system does not allow the instructions.
        self._isas = [isa for isa in ISAS if _cpu_has(isa) and self._limits.dots(isa, 1) > 0]

    def isas(self) -> list[str]:
        """Names of instruction sets whose peak can be measured, the best first."""
        return self._isas

    def read(self, size: int, cold: bool) -> list[float]:
        """GB/s of reading `size` bytes: other ones each time, or the same again and again."""
        if cold:
            return self._limits.read_memory_in_pieces(min(max(size, 4 << 20), 64 << 20), self._threads)
        passes = max(1, (32 << 20) // size)
        return [self._limits.read(size, self._threads, passes=passes) for _ in range(3)]

    def dots(self, isa: str) -> list[float]:
        """GOPS of dot products."""
        return [self._limits.dots(isa, self._threads) for _ in range(2)]


def _cpu_has(isa: str) -> bool:
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    return {"amx": "amx_int8", "avx512vnni": "avx512_vnni"}.get(isa, isa) in flags
