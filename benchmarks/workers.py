"""Processes in which libraries run: what compare.py, compare_commits.py and generation.py are made of.

Thread pools spin after a call and slow down whoever runs beside them. So each library has a process of its own,
one process runs at a time, and some time passes between two runs.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from itertools import cycle
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from timing import count_copies, interleave, time_calls


class Unavailable(Exception):
    """A library cannot go on; the message says why."""


class Worker:
    """A process with one object: ``worker.ask(method, ...)`` calls a method of it there.

    Parameters
    ----------
    threads : int
    make : str
        ``module:function`` in this folder; the object is what it returns for `arguments`.
    arguments : tuple
    environment : mapping, optional
        More variables.
    """

    def __init__(
        self, threads: int, make: str, arguments: tuple = (), environment: Mapping[str, str] | None = None
    ) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  close() closes it.
        self._pipe, theirs = Pipe()
        tunables = ":".join(filter(None, [os.environ.get("GLIBC_TUNABLES"), "glibc.malloc.hugetlb=1"]))
        limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "GLIBC_TUNABLES": tunables, **limits, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
        )
        theirs.close()
        self._pipe.send((make, arguments))

    def ask(self, method: str, *arguments: Any) -> Any:
        """Return the answer; raise Unavailable where there is none."""
        try:
            self._pipe.send((method, arguments))
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise Unavailable(self._last_words()) from None
        if isinstance(answer, Unavailable):
            raise answer
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        if code < 0:
            return f"its process died of {signal.Signals(-code).name}"
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), f"its process ended with status {code}")

    def close(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.wait()
        self._output.close()


def interleaved_samples(
    runs: Mapping[str, Callable[[], list[float]]], rounds: int, settle: float, seed: int = 0
) -> dict[str, list[float] | Unavailable]:
    """Call every run once a round and return all samples of each, or why it could not go on.

    Parameters
    ----------
    runs : mapping
        A run returns its samples.
    rounds : int
    settle : float
        Seconds to wait before each run.
    seed : int
        Of the orders.
    """
    samples: dict[str, list[float] | Unavailable] = {name: [] for name in runs}
    for name in interleave(runs, rounds, settle, seed):
        found = samples[name]
        if not isinstance(found, Unavailable):
            try:
                found += runs[name]()
            except Unavailable as reason:
                samples[name] = reason
    return samples


# ---- inside a worker -------------------------------------------------------------------------


class LayerTimer:
    """Times one of peers.PEERS in a worker."""

    def __init__(self, peer: str, threads: int) -> None:
        from peers import PEERS

        self._type = PEERS[peer]
        self._threads = threads
        reason = self._type.missing()
        if reason is not None:
            raise Unavailable(reason)

    def build(self, n: int, k: int, group_size: int, cold_bytes: int) -> dict[str, Any]:
        """Make the layer and the copies that pass through `cold_bytes`; 0 means a single one."""
        from peers import Layer

        layer = Layer.random(n, k, group_size)
        reason = self._type.refuses(layer)
        if reason is not None:
            raise Unavailable(reason)
        size = self._type.weight_bytes(layer)
        copies = count_copies(size, cold_bytes)
        self._peer = self._type(layer, copies, self._threads)
        return {
            "about": self._type.about,
            "per_pass": self._type.per_pass,
            "weight_bytes": size,
            "copies": copies,
            "versions": self._type.versions(),
        }

    def bind(self, m: int) -> dict[str, Any]:
        """Get ready for m rows; return how far the result is from exact and how much memory lies in huge pages."""
        import numpy as np
        from machine import huge_page_share
        from peers import exact_product, relative_error

        peer = self._peer
        x = np.random.default_rng(m).standard_normal((m, peer.layer.shape[1]), np.float32)
        calls = peer.bind(x)
        y = np.array(peer.result(calls[0]()), np.float64)
        self._products = peer.copies if peer.per_pass else 1
        self._calls = cycle(calls)
        for _ in range(peer.copies // self._products):  # A library may make something at the first call of each.
            next(self._calls)()
        some = np.unique(np.linspace(0, m - 1, 16).astype(int))
        exact = exact_product(x[some], peer.dense())
        return {"error": relative_error(y[some], exact), "huge_pages": huge_page_share()}

    def run(self, seconds: float) -> list[float]:
        """Seconds of each product."""
        return [each / self._products for each in time_calls(self._calls, seconds)]


def serve(pipe: Connection) -> None:
    """Make the object that the first message names, and answer the others with its methods."""
    make, arguments = pipe.recv()
    module, _, function = make.partition(":")
    reason: Unavailable | None = None
    try:
        served = getattr(importlib.import_module(module), function)(*arguments)
    except Unavailable as unavailable:
        reason = unavailable
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = reason or getattr(served, method)(*arguments)
        except Unavailable as unavailable:
            answer = unavailable
        except Exception as error:  # Whatever another library raises is a reason to print.
            answer = Unavailable(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        pipe.send(answer)


if __name__ == "__main__":
    import workers  # once more, by the name under which the other process knows its classes

    workers.serve(Connection(int(sys.argv[1])))
