"""Contenders in processes of their own, which take turns: what compare.py and compare_commits.py are made of.

Thread pools spin after a product and slow down whoever runs beside them. So each contender has its own
process, one runs at a time, and some time passes between two turns.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

SETTLE_SECONDS = 0.12  # OpenBLAS threads spin for about this long
MOST_BYTES = 700 << 20  # of copies, for each contender
MOST_COPIES = 1024
CACHES_TOUCHED = 4
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of samples."""

    median: float
    q1: float
    q3: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3, len(values))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


class Gone(Exception):
    """A contender cannot go on; says why."""


def page_policy() -> str:
    """What this system does about huge pages, and what is done for each contender."""
    try:
        policy = _HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return "unknown to this system"
    if policy == "madvise":
        return "madvise: glibc's malloc asks for huge pages in every process (glibc.malloc.hugetlb=1), pyda8w4 always"
    return f"{policy}, for all alike"


class Worker:
    """A process with one contender: ``worker.ask(method, ...)`` calls a method of `Contender` in there.

    Parameters
    ----------
    name : str
        Of the contender, for messages.
    threads : int
    make : str
        ``module:function`` in this folder; what it returns for `arguments` answers.
    arguments : tuple
    environment : mapping, optional
        More variables.
    """

    def __init__(
        self, name: str, threads: int, make: str, arguments: tuple = (), environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        self._pipe, theirs = Pipe()
        tunables = ":".join(filter(None, [os.environ.get("GLIBC_TUNABLES"), "glibc.malloc.hugetlb=1"]))
        limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "GLIBC_TUNABLES": tunables, **limits, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
        )
        theirs.close()
        self._pipe.send((make, arguments))

    def ask(self, method: str, *arguments: Any) -> Any:
        """The answer; Gone where there is none."""
        try:
            self._pipe.send((method, arguments))
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise Gone(self._last_words()) from None
        if isinstance(answer, Gone):
            raise answer
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        if code < 0:
            return f"its process died of {signal.Signals(-code).name}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), f"its process ended with status {code}")

    def close(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.wait()
        self._errors.close()


def take_turns(
    turns: Mapping[str, Callable[[], list[float]]], rounds: int, settle: float, seed: int = 0
) -> dict[str, list[float] | Gone]:
    """Every contender once a round, in an order that changes; all samples of each, or why it went.

    Parameters
    ----------
    turns : mapping
        A turn returns its samples.
    rounds : int
    settle : float
        Seconds to wait before each turn.
    seed : int
        Of the orders.
    """
    order = list(turns)
    shuffle = random.Random(seed).shuffle
    samples: dict[str, list[float] | Gone] = {name: [] for name in order}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            found = samples[name]
            if isinstance(found, Gone):
                continue
            time.sleep(settle)
            try:
                found += turns[name]()
            except Gone as reason:
                samples[name] = reason
    return samples


# ---- inside a worker -------------------------------------------------------------------------


class Contender:
    """One of peers.PEERS, as a worker serves it."""

    def __init__(self, peer: str, threads: int) -> None:
        import peers

        self._type = peers.PEERS[peer]
        self._threads = threads
        reason = self._type.missing()
        if reason is not None:
            raise Gone(reason)

    def build(self, n: int, k: int, group_size: int, cold_bytes: int) -> dict[str, Any]:
        """Make the layer and its copies, enough to pass through `cold_bytes`; 0: a single one."""
        import peers

        layer = peers.Layer.random(n, k, group_size)
        reason = self._type.refuses(layer)
        if reason is not None:
            raise Gone(reason)
        size = self._type.weight_bytes(layer)
        copies = max(1, min(-(-cold_bytes // size), MOST_BYTES // size, MOST_COPIES))
        self._peer = self._type(layer, copies, self._threads)
        return {
            "about": self._type.about,
            "per_pass": self._type.per_pass,
            "weight_bytes": size,
            "copies": copies,
            "versions": self._type.versions(),
        }

    def bind(self, m: int) -> dict[str, Any]:
        """Get ready for m rows, check the result, say how far it is from exact and how much lies in huge pages."""
        import numpy as np

        peer = self._peer
        x = np.random.default_rng(m).standard_normal((m, peer.layer.shape[1]), np.float32)
        calls = peer.bind(x)
        y = np.array(peer.result(calls[0]()), np.float64)
        self._products = peer.copies if peer.per_pass else 1
        self._calls = cycle(calls)
        for _ in range(peer.copies // self._products):  # so that nothing is left to make at a first call
            next(self._calls)()
        some = np.unique(np.linspace(0, m - 1, 16).astype(int))
        w = peer.dense()
        exact = np.concatenate([x[some].astype(np.float64) @ w[n : n + 1024].T for n in range(0, len(w), 1024)], axis=1)
        error = float(np.linalg.norm(y[some] - exact) / np.linalg.norm(exact))
        return {"error": error, "huge_pages": _huge_pages()}

    def turn(self, seconds: float) -> list[float]:
        """Seconds of each product, after a fifth of the time for the clock frequency and the threads to settle."""
        times: list[float] = []
        start = time.perf_counter()
        warm, end, before = start + seconds / 5, start + seconds, start
        while before < end or not times:
            next(self._calls)()
            after = time.perf_counter()
            if before >= warm or after >= end:
                times.append((after - before) / self._products)
            before = after
        return times


class Machine:
    """The machine's limits (limits.py), as a worker serves them."""

    def __init__(self, threads: int) -> None:
        from limits import ISAS, Limits

        self._limits, self._threads = Limits(), threads
        # A peak of 0: the system does not allow it.
        self.isas = [isa for isa in ISAS if _runs(isa) and self._limits.dots(isa, 1) > 0]

    def names(self) -> list[str]:
        """Of ISAs whose peak can be measured, best first."""
        return self.isas

    def read(self, size: int, cold: bool) -> list[float]:
        """GB/s of reading `size` bytes: other ones each time, or the same again and again."""
        if cold:
            return self._limits.dram_pieces(min(max(size, 4 << 20), 64 << 20), self._threads)
        passes = max(1, (32 << 20) // size)
        return [self._limits.read(size, self._threads, passes=passes) for _ in range(3)]

    def dots(self, isa: str) -> list[float]:
        """GOPS of dot products."""
        return [self._limits.dots(isa, self._threads) for _ in range(2)]


def _runs(isa: str) -> bool:
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    return {"amx": "amx_int8", "avx512vnni": "avx512_vnni"}.get(isa, isa) in flags


def _huge_pages() -> float | None:
    """Share of this process's own memory that lies in huge pages."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    sizes = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
    return sizes["AnonHugePages"] / max(1, sizes["Anonymous"])


def serve(pipe: Connection) -> None:
    """Make what the first message asks for, and answer the others with its methods."""
    make, arguments = pipe.recv()
    module, _, function = make.partition(":")
    reason: Gone | None = None
    try:
        contender = getattr(importlib.import_module(module), function)(*arguments)
    except Gone as gone:
        reason = gone
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = reason or getattr(contender, method)(*arguments)
        except Gone as gone:
            answer = gone
        except Exception as error:  # whatever another library raises is a reason to print
            answer = Gone(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        pipe.send(answer)


if __name__ == "__main__":
    import turns  # once more, by the name under which the other process knows its classes

    turns.serve(Connection(int(sys.argv[1])))
