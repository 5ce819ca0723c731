"""pyda8w4 beside what users would otherwise pick, and beside what the machine can do.

    pip install -r benchmarks/requirements.txt
    python benchmarks/compare.py
    python benchmarks/compare.py --shapes 4096x4096 --m 1,256 --threads 2 --json results.json
    python benchmarks/compare.py --peers pyda8w4,pyda8w4-q4_k,pyda8w4-q4_k:int8_group,ggml-q4_k --group-size 32

Every library (peers/) holds copies of one layer in a process of its own, and their runs are interleaved
(workers.py). Weights are cold, as in a model: copies rotate through four times the last-level cache; ``--hot``
uses one copy. The limits of the machine are measured in runs between those. A library that is not
installed, or cannot run here, is named with the reason. docs/performance.md says more.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

from options import add_common, names_of, numbers, shapes
from peers import PEERS
from report import print_run, start_report
from timing import Spread, cold_bytes
from workers import Unavailable, Worker, interleaved_samples

BY_DEFAULT = [name for name, peer in PEERS.items() if peer.by_default]


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    report = start_report("compare.py", arguments, options, 0 if options.hot else cold_bytes())
    _print_header(report)
    for threads, (n, k), group_size in product(options.threads, options.shapes, options.group_size):
        try:
            report["tables"].append(_table(n, k, min(group_size, k), threads, options, report))
        except Unavailable as reason:
            print(f"compare.py: error: no limits of this machine: {reason}", file=sys.stderr)
            return 1
        if options.json:  # after every table: a run is long
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _table(n: int, k: int, group_size: int, threads: int, options: argparse.Namespace, report: dict) -> dict[str, Any]:
    """Measure and print one layer, with all numbers of rows."""
    print(f"\n{n}x{k}, group {group_size}, {threads} thread{'s' * (threads != 1)}")
    machine = Worker(threads, "limits:Machine", (threads,))
    workers = {name: Worker(threads, "workers:LayerTimer", (name, threads)) for name in options.peers}
    try:
        isas = machine.ask("isas")
        built: dict[str, dict] = {}
        without: dict[str, str] = {}
        for name, worker in list(workers.items()):
            try:
                built[name] = worker.ask("build", n, k, group_size, report["cold_bytes"])
            except Unavailable as reason:
                without[name] = str(reason)
                print(f"  without {name}: {reason}", flush=True)
                workers.pop(name).close()
        for name, info in built.items():
            report["libraries"][name] = {key: info[key] for key in ("about", "per_pass", "versions")}
        print(_HEADER, flush=True)
        cells = [_cell(m, n, k, workers, built, machine, isas, options) for m in options.m]
    finally:
        for worker in [machine, *workers.values()]:
            worker.close()
    sizes = {name: {key: info[key] for key in ("weight_bytes", "copies")} for name, info in built.items()}
    layer = {"n": n, "k": k, "group_size": group_size, "threads": threads}
    return {**layer, "sizes": sizes, "without": without, "cells": cells}


def _cell(
    m: int,
    n: int,
    k: int,
    workers: dict[str, Worker],
    built: dict[str, dict],
    machine: Worker,
    isas: list[str],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Measure and print all libraries with m rows."""
    failed: dict[str, str] = {}
    bound: dict[str, dict] = {}
    for name, worker in workers.items():
        try:
            bound[name] = worker.ask("bind", m)
        except Unavailable as reason:
            failed[name] = str(reason)
    runs = {name: partial(workers[name].ask, "run", options.seconds) for name in bound}
    runs["read"] = partial(machine.ask, "read", n * k // 2, not options.hot)
    for isa in isas:
        runs[f"dots {isa}"] = partial(machine.ask, "dots", isa)
    samples = interleaved_samples(runs, options.rounds, options.settle, seed=m)

    limits = {}
    for name in list(samples):
        if name not in workers:
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
        kernel = built[name]["versions"].get("kernel")
        best = kernel if kernel in isas else isas[0] if isas else None
        read_ms = built[name]["weight_bytes"] / limits["read"].median / 1e6
        dots_ms = 2 * m * n * k / limits[f"dots {best}"].median / 1e6 if best else 0.0
        results[name] = {
            "ms": asdict(ms),
            "gb_per_s": built[name]["weight_bytes"] / ms.median / 1e6,
            "gops": 2 * m * n * k / ms.median / 1e6,
            "of_limit": max(read_ms, dots_ms) / ms.median,
            "limit": "read" if read_ms > dots_ms else f"dots {best}",
            **bound[name],
        }
    for result in results.values():
        base = results.get("pyda8w4")
        result["ratio"] = result["ms"]["median"] / base["ms"]["median"] if base else None
    cell = {
        "m": m,
        "limits": {name: asdict(limit) for name, limit in limits.items()},
        "results": results,
        "failed": failed,
    }
    _print_cell(cell)
    return cell


# ---- what is printed -------------------------------------------------------------------------

_HEADER = (
    f"  {'M':>5}  {'library':<24} {'ms, median [quartiles]':<26}{'GB/s':>7}{'GOPS':>8}"
    f"{'of limit':>10}{'error':>10}{'huge':>6}{'ratio':>8}"
)


def _print_header(report: dict[str, Any]) -> None:
    print_run(report)
    print("GB/s     of the weights, in the library's own format; of limit: the least time in which this machine")
    print("         reads them or makes the products in 8 bits, whichever is more, over the time taken")
    print("error    norm(y - exact) / norm(exact); exact: float64, the library's own weights, x not quantized")
    print("huge     share of the process's memory in huge pages; ratio: time over that of pyda8w4")


def _print_cell(cell: dict[str, Any]) -> None:
    for number, (name, result) in enumerate(cell["results"].items()):
        first = "" if number else cell["m"]
        huge = "" if result["huge_pages"] is None else f"{result['huge_pages']:.0%}"
        ratio = "" if result["ratio"] is None else f"{result['ratio']:.2f}"
        print(
            f"  {first:>5}  {name:<24} {Spread(**result['ms'])!s:<26}{result['gb_per_s']:>7.1f}{result['gops']:>8.0f}"
            f"{result['of_limit']:>10.0%}{result['error']:>10.1e}{huge:>6}{ratio:>8}"
        )
    for name, reason in cell["failed"].items():
        print(f"         {name:<24} failed: {reason}")
    limits = ", ".join(
        f"{name} {limit['median']:.1f} {'GB/s' if name == 'read' else 'GOPS'}" for name, limit in cell["limits"].items()
    )
    print(f"         limits: {limits}", flush=True)


# ---- options ---------------------------------------------------------------------------------


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shapes, default="4096x4096,11008x4096", help="NxK,... (%(default)s)")
    parser.add_argument("--m", type=numbers, default="1,4,16,64,256", help="numbers of rows (%(default)s)")
    parser.add_argument("--peers", type=names_of(PEERS), default=",".join(BY_DEFAULT), help="libraries (%(default)s)")
    add_common(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
