"""A layer of a mixture of experts: pyda8w4 beside others, and beside what the machine can do.

    pip install -r benchmarks/requirements.txt
    python benchmarks/experts.py --json experts.json
    python benchmarks/experts.py --mixtures qwen3-30b-a3b --m 1,4 --threads 2 --group-size 32
    python benchmarks/experts.py --mixtures 64x8x2048x1024 --peers pyda8w4,ggml-q4_0

The mixtures have the sizes of models, and random weights. Every library (mixtures/) holds two layers or more in a
process of its own, and their runs are interleaved (workers.py). Each token takes random experts, and calls go through
all experts of all layers before they read one again, as far as there are enough: weights are cold. Where memory does
not hold all experts of a layer, there are fewer, and the heading says so. All see the same tokens and experts.

What a library gives is compared with a mixture in float64 of its own weights, and it is timed only if its error is
below TOLERANCE. Two limits are measured in runs between: reading the weights of the chosen experts, and one dense
product by pyda8w4's `linear` of as many multiplications. docs/performance.md says more.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from functools import partial
from itertools import cycle, product
from typing import Any

from machine import available_bytes
from mixtures import MIXTURES, SHAPES, Experts, Shape, routing
from options import add_common, names_of, numbers
from peers import relative_error
from report import print_run, start_report
from timing import Spread, cold_bytes, count_copies, time_calls
from workers import Unavailable, Worker, interleaved_samples

BY_DEFAULT = [name for name, mixture in MIXTURES.items() if mixture.by_default]
TOLERANCE = 0.03  # Two products of activations with 8 bits have an error of about 0.01; one of wrong weights, of 1.
LEAST_LAYERS = 2
CHECKED_TOKENS = 4
MEMORY_SHARE = 0.6  # of what is available: weights may take so much, and making them takes more


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    report = start_report("experts.py", arguments, options, 0 if options.hot else cold_bytes())
    print_run(report)
    print(_LEGEND)
    for threads, (name, shape), group_size in product(options.threads, options.mixtures, options.group_size):
        try:
            report["tables"].append(_table(name, shape, group_size, threads, options, report))
        except Unavailable as reason:
            print(f"experts.py: error: no limits of this machine: {reason}", file=sys.stderr)
            return 1
        if options.json:  # after every table: a run is long
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _table(
    name: str, whole: Shape, group_size: int, threads: int, options: argparse.Namespace, report: dict[str, Any]
) -> dict[str, Any]:
    """Measure and print one mixture, with all numbers of rows."""
    machine = Worker(threads, "limits:Machine", (threads,))
    dense = Worker(threads, "workers:LayerTimer", ("pyda8w4", threads))
    workers = {peer: Worker(threads, "experts:MixtureTimer", (peer, threads)) for peer in options.peers}
    try:
        without: dict[str, str] = {}
        sizes = _asked(workers, without, "expert_bytes", whole, group_size)
        shape, layers = _fitting(whole, sizes, report["cold_bytes"])
        print(f"\n{name}: {whole}; group {group_size}, {threads} thread{'s' * (threads != 1)}")
        if shape != whole:
            print(f"  memory holds {shape.experts} of {whole.experts} experts: each has more rows than in the model")
        dense.ask("build", shape.top * 3 * shape.i, shape.k, min(group_size, shape.k), report["cold_bytes"])
        built = _asked(workers, without, "build", shape, group_size, layers)
        for peer, reason in without.items():
            print(f"  without {peer}: {reason}")
        report["libraries"].update(built)
        print(_HEADER, flush=True)
        cells = [_cell(m, shape, workers, sizes, dense, machine, layers, options) for m in options.m]
    finally:
        for worker in [machine, dense, *workers.values()]:
            worker.close()
    table = {"mixture": name, "group_size": group_size, "threads": threads, "layers": layers}
    return {**table, "model": asdict(whole), "measured": asdict(shape), "without": without, "cells": cells}


def _asked(workers: dict[str, Worker], without: dict[str, str], method: str, *arguments: Any) -> dict[str, Any]:
    """The answers of all workers. One that has none is closed, and the reason goes to `without`."""
    answers = {}
    for name, worker in list(workers.items()):
        try:
            answers[name] = worker.ask(method, *arguments)
        except Unavailable as reason:
            without[name] = str(reason)
            workers.pop(name).close()
    return answers


def _fitting(shape: Shape, expert_bytes: dict[str, int], cold: int) -> tuple[Shape, int]:
    """As many of the experts as memory holds for all libraries but those in float, and the number of layers."""
    least = min(expert_bytes.values(), default=1)
    layers = max(LEAST_LAYERS, count_copies(shape.experts * least, cold)) if cold else 1
    together = layers * sum(size for size in expert_bytes.values() if size < shape.expert_size)
    experts = shape.experts
    while experts > shape.top and experts * together > MEMORY_SHARE * available_bytes():
        experts = max(shape.top, experts // 2)
    return replace(shape, experts=experts), layers


def _cell(
    m: int,
    shape: Shape,
    workers: dict[str, Worker],
    expert_bytes: dict[str, int],
    dense: Worker,
    machine: Worker,
    layers: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Measure and print all libraries with m tokens."""
    failed: dict[str, str] = {}
    bound: dict[str, dict] = {}
    for name, worker in workers.items():
        try:
            bound[name] = worker.ask("bind", m)
        except Unavailable as reason:
            failed[name] = str(reason)
    dense.ask("bind", m)
    chosen = routing(shape, m, layers).chosen
    runs = {name: partial(workers[name].ask, "run", options.seconds) for name in bound}
    runs["read limit"] = partial(machine.ask, "read", chosen * shape.expert_size // 2, not options.hot)
    runs["dense limit"] = partial(dense.ask, "run", options.seconds)
    samples = interleaved_samples(runs, options.rounds, options.settle, seed=m)
    limits = {}
    for name in ("read limit", "dense limit"):
        values = samples.pop(name)
        if isinstance(values, Unavailable):
            raise values
        limits[name] = Spread.of(values)
    results: dict[str, dict[str, Any]] = {}
    for name, values in samples.items():
        if isinstance(values, Unavailable):
            failed[name] = str(values)
            continue
        ms = Spread.of([1e3 * value for value in values])
        read = chosen * expert_bytes[name]
        results[name] = {
            "ms": asdict(ms),
            "gb_per_s": read / ms.median / 1e6,
            "gops": 2 * m * shape.top * shape.expert_size / ms.median / 1e6,
            "of_read": read / limits["read limit"].median / 1e6 / ms.median,
            "of_dense": 1e3 * limits["dense limit"].median / ms.median,
            **bound[name],
        }
    for result in results.values():
        base = results.get("pyda8w4")
        result["ratio"] = result["ms"]["median"] / base["ms"]["median"] if base else None
    cell = {
        "m": m,
        "chosen": chosen,
        "read_gb_per_s": asdict(limits["read limit"]),
        "dense_seconds": asdict(limits["dense limit"]),
        "results": results,
        "failed": failed,
    }
    _print_cell(cell)
    return cell


# ---- what is printed -------------------------------------------------------------------------

_LEGEND = """\
GB/s     of the weights of the chosen experts, in the library's own format
of read  the time in which this machine reads these bytes, over the time taken
of dense the time of one product by pyda8w4's linear with as many multiplications, over the time taken
error    norm(y - exact) / norm(exact); exact: float64, the library's own weights, nothing quantized between
huge     share of the process's memory in huge pages; ratio: time over that of pyda8w4"""

_HEADER = (
    f"  {'M':>5}  {'library':<18} {'ms, median [quartiles]':<26}{'GB/s':>7}{'GOPS':>8}"
    f"{'of read':>9}{'of dense':>10}{'error':>10}{'huge':>6}{'ratio':>8}"
)


def _print_cell(cell: dict[str, Any]) -> None:
    for number, (name, result) in enumerate(cell["results"].items()):
        first = "" if number else cell["m"]
        huge = "" if result["huge_pages"] is None else f"{result['huge_pages']:.0%}"
        ratio = "" if result["ratio"] is None else f"{result['ratio']:.2f}"
        print(
            f"  {first:>5}  {name:<18} {Spread(**result['ms'])!s:<26}{result['gb_per_s']:>7.1f}{result['gops']:>8.0f}"
            f"{result['of_read']:>9.0%}{result['of_dense']:>10.0%}{result['error']:>10.1e}{huge:>6}{ratio:>8}"
        )
    for name, reason in cell["failed"].items():
        print(f"         {name:<18} failed: {reason}")
    read, dense = cell["read_gb_per_s"]["median"], 1e3 * cell["dense_seconds"]["median"]
    print(f"         {cell['chosen']} experts chosen; limits: read {read:.1f} GB/s, dense {dense:.3g} ms", flush=True)


# ---- inside a worker -------------------------------------------------------------------------


class MixtureTimer:
    """Times one of MIXTURES in a worker."""

    def __init__(self, name: str, threads: int) -> None:
        self._type, self._threads = MIXTURES[name], threads
        reason = self._type.missing()
        if reason is not None:
            raise Unavailable(reason)

    def expert_bytes(self, shape: Shape, group_size: int) -> int:
        reason = self._type.refuses(shape, group_size)
        if reason is not None:
            raise Unavailable(reason)
        return self._type.expert_bytes(shape, group_size)

    def build(self, shape: Shape, group_size: int, layers: int) -> dict[str, Any]:
        need, available = layers * shape.experts * self._type.expert_bytes(shape, group_size), available_bytes()
        if need > MEMORY_SHARE * available:
            raise Unavailable(f"its weights would take {need / 1e9:.1f} GB of {available / 1e9:.1f} GB available")
        self._mixture = self._type(Experts.random(shape, group_size), layers, self._threads)
        return {"about": self._type.about, "versions": self._type.versions()}

    def bind(self, m: int) -> dict[str, Any]:
        """Get ready for m tokens; return how far the result is from exact and how much memory lies in huge pages."""
        import numpy as np
        from machine import huge_page_share

        mixture, experts = self._mixture, self._mixture.experts
        x = np.random.default_rng(m).standard_normal((m, experts.shape.k), np.float32)
        routed = routing(experts.shape, m, mixture.layers)
        calls = mixture.bind(x, routed.weights, routed.calls)
        y = np.array(mixture.result(calls[0]()), np.float64)
        some = np.unique(np.linspace(0, m - 1, CHECKED_TOKENS).astype(int))
        ids = routed.calls[0][1]
        error = relative_error(y[some], experts.exact(x[some], ids[some], routed.weights[some], *mixture.dense()))
        if not error < TOLERANCE:
            raise Unavailable(f"its result is wrong: an error of {error:.1e}, where {TOLERANCE} is allowed")
        for call in calls[1 : mixture.layers]:  # A library may make something at the first call of each layer.
            call()
        self._calls = cycle(calls)
        return {"error": error, "huge_pages": huge_page_share()}

    def run(self, seconds: float) -> list[float]:
        """Seconds of each call."""
        return time_calls(self._calls, seconds)


# ---- options ---------------------------------------------------------------------------------


def _mixtures(text: str) -> list[tuple[str, Shape]]:
    """Read NAME,ExTxKxI,ExTxKxI:ACTIVATION."""
    found = []
    for name in text.split(","):
        sizes, _, activation = name.partition(":")
        found.append((name, SHAPES.get(name) or Shape(*map(int, sizes.split("x")), activation or "silu")))
    return found


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mixtures",
        type=_mixtures,
        default=",".join(SHAPES),
        help="names, or experts x of a token x K x I, with :swigluoai for that activation (%(default)s)",
    )
    parser.add_argument("--m", type=numbers, default="1,4,256", help="numbers of tokens (%(default)s)")
    parser.add_argument(
        "--peers", type=names_of(MIXTURES), default=",".join(BY_DEFAULT), help="libraries (%(default)s)"
    )
    add_common(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
