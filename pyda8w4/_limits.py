"""What this machine can do at best: read memory, and make dot products of 8 bits.

Both are measured once for each CPU, kernel, number of threads and version of this library, and kept in a file in the
cache of the user.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4._core import time_dots, time_read, version
from pyda8w4._filesystem import cache_folder, replaced_file
from pyda8w4._packed import aligned_empty
from pyda8w4._runtime import cpu_model
from pyda8w4._timing import cold_bytes

STREAMS = (1, 2)  # Each thread reads in so many; the faster one counts.
_MIN_BYTES = 256 << 20  # of memory that is read
_DOTS_NANOSECONDS = 1_000_000  # A run takes that long at least.
# The best run counts: whatever else the machine does makes others slower. Those of dot products are so short that some
# are not interrupted.
_READ_RUNS, _DOTS_RUNS = 5, 30


@dataclass(frozen=True)
class Limits:
    """Memory read in GB/s, and operations of dot products in 1e9/s, of which a product and an addition are two."""

    read: float
    dots: float


def limits(kernel: str, threads: int) -> Limits:
    """Those of a kernel's instructions: what was measured before, or is measured now."""
    key = f"{cpu_model()}, {kernel}, {threads} threads, pyda8w4 {version()}"
    known = _load()
    found = _limits_of(known.get(key))
    if found is None:
        found = measure(kernel, threads)
        _save({**known, key: asdict(found)})
    return found


def measure(kernel: str, threads: int) -> Limits:
    memory = cold_memory()
    return Limits(
        read=max(read_rate(memory, kernel, threads) for _ in range(_READ_RUNS)),
        dots=max(dot_rate(kernel, threads) for _ in range(_DOTS_RUNS)),
    )


def cold_memory() -> npt.NDArray[np.uint8]:
    """More than the caches hold, in huge pages where the system grants them, and written once."""
    (memory,) = aligned_empty(((max(cold_bytes(), _MIN_BYTES),), np.uint8))
    memory.fill(1)
    return memory


def read_rate(
    memory: npt.NDArray[np.uint8], kernel: str, threads: int, passes: int = 1, streams: Sequence[int] = STREAMS
) -> float:
    """GB/s of threads that read this memory between them, `passes` times."""
    nanoseconds = min(time_read(kernel.encode(), memory, passes, each, threads) for each in streams)
    return memory.nbytes * passes / nanoseconds


def dot_rate(kernel: str, threads: int) -> float:
    """Operations in 1e9/s, with operands in registers."""
    rounds, multiplications, nanoseconds = 1000, 0, 0
    while nanoseconds < _DOTS_NANOSECONDS:
        multiplications, nanoseconds = time_dots(kernel.encode(), rounds, threads)
        rounds *= 4
    return 2 * multiplications / nanoseconds


# ---- the file --------------------------------------------------------------------------------

_FILE = "limits.json"


def _load() -> dict[str, Any]:
    """What was kept; nothing where that cannot be read."""
    try:
        known = json.loads((cache_folder() / _FILE).read_bytes())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home
        return {}
    return known if isinstance(known, dict) else {}


def _limits_of(entry: Any) -> Limits | None:
    """None for what this module has not written."""
    if not isinstance(entry, dict) or entry.keys() != {"read", "dots"}:
        return None
    if not all(isinstance(value, float) and 0 < value < inf for value in entry.values()):
        return None
    return Limits(**entry)


def _save(known: dict[str, Any]) -> None:
    """Keep this if it can be: otherwise the next process measures again."""
    with suppress(OSError, RuntimeError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        with replaced_file(cache_folder() / _FILE) as file:
            file.write(json.dumps(known, indent=2).encode() + b"\n")
