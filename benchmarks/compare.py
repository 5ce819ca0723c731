"""pyda8w4 beside what users would otherwise pick, and beside what the machine can do.

    pip install -r benchmarks/requirements.txt
    python benchmarks/compare.py
    python benchmarks/compare.py --shapes 4096x4096 --m 1,256 --threads 2 --json results.json

Every contender (peers.py) holds copies of one layer in a process of its own, and they take turns (turns.py).
Weights are cold, as in a model: copies rotate through more than four times the last-level cache; ``--hot``
uses one copy. The limits of the machine are measured in the same turns. A contender that is not installed,
or cannot run here, is named with the reason. docs/performance.md says more.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from limits import last_level_cache
from peers import PEERS
from turns import CACHES_TOUCHED, MOST_BYTES, SETTLE_SECONDS, Gone, Spread, Worker, page_policy, take_turns

OURS = "pyda8w4"
BY_DEFAULT = [name for name in PEERS if name not in ("pyda8w4-scalar", "pyda8w4-torch")]


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/compare.py", *(arguments or sys.argv[1:])]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": _machine(),
        "pages": page_policy(),
        "cold_bytes": 0 if options.hot else min(CACHES_TOUCHED * last_level_cache(), MOST_BYTES),
        "seconds": options.seconds,
        "rounds": options.rounds,
        "settle": options.settle,
        "contenders": {},
        "tables": [],
    }
    _print_header(report)
    for threads, (n, k), group_size in product(options.threads, options.shapes, options.group_size):
        try:
            report["tables"].append(_table(n, k, min(group_size, k), threads, options, report))
        except Gone as reason:
            print(f"compare.py: error: no limits of this machine: {reason}", file=sys.stderr)
            return 1
        if options.json:  # after every table: a run is long
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _table(n: int, k: int, group_size: int, threads: int, options: argparse.Namespace, report: dict) -> dict[str, Any]:
    """Measure and print one layer, with all numbers of rows."""
    print(f"\n{n}x{k}, group {group_size}, {threads} thread{'s' * (threads != 1)}")
    machine = Worker("machine", threads, "turns:Machine", (threads,))
    workers = {name: Worker(name, threads, "turns:Contender", (name, threads)) for name in options.peers}
    try:
        isas = machine.ask("names")
        built: dict[str, dict] = {}
        without: dict[str, str] = {}
        for name, worker in list(workers.items()):
            try:
                built[name] = worker.ask("build", n, k, group_size, report["cold_bytes"])
            except Gone as reason:
                without[name] = str(reason)
                print(f"  without {name}: {reason}", flush=True)
                workers.pop(name).close()
        for name, info in built.items():
            report["contenders"][name] = {key: info[key] for key in ("about", "per_pass", "versions")}
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
    """Measure and print all contenders with m rows."""
    failed: dict[str, str] = {}
    bound: dict[str, dict] = {}
    for name, worker in workers.items():
        try:
            bound[name] = worker.ask("bind", m)
        except Gone as reason:
            failed[name] = str(reason)
    turns = {name: partial(workers[name].ask, "turn", options.seconds) for name in bound}
    turns["read"] = partial(machine.ask, "read", n * k // 2, not options.hot)
    for isa in isas:
        turns[f"dots {isa}"] = partial(machine.ask, "dots", isa)
    samples = take_turns(turns, options.rounds, options.settle, seed=m)

    limits = {}
    for name in list(samples):
        if name not in workers:
            values = samples.pop(name)
            if isinstance(values, Gone):
                raise values
            limits[name] = Spread.of(values)
    results: dict[str, dict[str, Any]] = {}
    for name, values in samples.items():
        if isinstance(values, Gone):
            failed[name] = str(values)
            continue
        ms = Spread.of([1e3 * value for value in values])
        kernel = built[name]["versions"].get("kernel")
        best = kernel if kernel in isas else isas[0] if isas else None
        read_ms = built[name]["weight_bytes"] / limits["read"].median / 1e6
        dots_ms = 2 * m * n * k / limits[f"dots {best}"].median / 1e6 if best else 0.0
        results[name] = {
            "ms": ms.as_dict(),
            "gb_per_s": built[name]["weight_bytes"] / ms.median / 1e6,
            "gops": 2 * m * n * k / ms.median / 1e6,
            "of_limit": max(read_ms, dots_ms) / ms.median,
            "limit": "read" if read_ms > dots_ms else f"dots {best}",
            **bound[name],
        }
    for result in results.values():
        ours = results.get(OURS)
        result["times_ours"] = result["ms"]["median"] / ours["ms"]["median"] if ours else None
    cell = {
        "m": m,
        "limits": {name: limit.as_dict() for name, limit in limits.items()},
        "results": results,
        "failed": failed,
    }
    _print_cell(cell)
    return cell


# ---- what is printed -------------------------------------------------------------------------

_HEADER = (
    f"  {'M':>5}  {'contender':<15} {'ms, median [quartiles]':<26}{'GB/s':>7}{'GOPS':>8}"
    f"{'of limit':>10}{'error':>10}{'huge':>6}{'x ours':>8}"
)


def _print_header(report: dict[str, Any]) -> None:
    machine, cold = report["machine"], report["cold_bytes"]
    print(f"cpu      {machine['cpu']}, {machine['cpus']} CPUs; load {machine['load_average']:.1f} in the minute before")
    print(
        f"weights  {f'cold: copies pass through {cold >> 20} MiB or more' if cold else 'hot: one copy'}; x and y warm"
    )
    print(f"pages    {report['pages']}")
    print(f"turns    {report['rounds']} of {report['seconds']} s each, in changing order, {report['settle']} s apart")
    print("GB/s     of the weights, in the contender's own format; of limit: the least time in which this machine")
    print("         reads them or makes the products in 8 bits, whichever is more, over the time taken")
    print("error    norm(y - exact) / norm(exact); exact: float64, the contender's own weights, x not quantized")
    print("huge     share of the process's memory in huge pages; x ours: time over that of pyda8w4")


def _print_cell(cell: dict[str, Any]) -> None:
    for number, (name, result) in enumerate(cell["results"].items()):
        ms = result["ms"]
        first = "" if number else cell["m"]
        times = f"{_short(ms['median']):>7} [{_short(ms['q1'])}..{_short(ms['q3'])}]"
        huge = "" if result["huge_pages"] is None else f"{result['huge_pages']:.0%}"
        ours = "" if result["times_ours"] is None else f"{result['times_ours']:.2f}"
        print(
            f"  {first:>5}  {name:<15} {times:<26}{result['gb_per_s']:>7.1f}{result['gops']:>8.0f}"
            f"{result['of_limit']:>10.0%}{result['error']:>10.1e}{huge:>6}{ours:>8}"
        )
    for name, reason in cell["failed"].items():
        print(f"         {name:<15} failed: {reason}")
    limits = ", ".join(
        f"{name} {limit['median']:.1f} {'GB/s' if name == 'read' else 'GOPS'}" for name, limit in cell["limits"].items()
    )
    print(f"         limits: {limits}", flush=True)


def _short(ms: float) -> str:
    """Three digits, or all those before the point."""
    return f"{ms:.0f}" if ms >= 99.95 else f"{ms:#.3g}"


# ---- machine and options ---------------------------------------------------------------------


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"),
        "cpus": len(os.sched_getaffinity(0)),
        "last_level_cache": last_level_cache(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def numbers(text: str) -> list[int]:
    """Of an option: 1,2,3."""
    values = [int(value) for value in text.split(",")]
    if min(values) < 1:
        raise ValueError
    return values


def shapes(text: str) -> list[tuple[int, int]]:
    """Of an option: NxK,NxK."""
    return [(n, k) for n, k in (map(int, shape.split("x")) for shape in text.split(","))]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        unknown = set(text.split(",")) - set(PEERS)
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(PEERS)}")
        return text.split(",")

    cpus = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shapes, default="4096x4096,11008x4096", help="NxK,... (%(default)s)")
    parser.add_argument("--m", type=numbers, default="1,4,16,64,256", help="numbers of rows (%(default)s)")
    parser.add_argument("--group-size", type=numbers, default="128,32", help="(%(default)s)")
    parser.add_argument("--threads", type=numbers, default="1" if cpus == 1 else f"1,{cpus}", help="(%(default)s)")
    parser.add_argument("--peers", type=names, default=",".join(BY_DEFAULT), help="contenders (%(default)s)")
    parser.add_argument("--hot", action="store_true", help="one copy of the weights, which may stay in cache")
    parser.add_argument("--seconds", type=float, default=0.3, help="of a turn (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (%(default)s)")
    parser.add_argument("--settle", type=float, default=SETTLE_SECONDS, help="seconds before a turn (%(default)s)")
    parser.add_argument("--json", type=Path, help="where to write everything")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
