"""What kinds of weights and schemes of activations cost: the tables of docs/results.md.

    python benchmarks/kinds.py
    python benchmarks/kinds.py --threads 1 --shape 11008x4096 --rounds 15

One process holds copies of a layer of every kind (peers/pyda8w4.py), through which runs rotate, so that weights are
cold. The runs of all kinds are interleaved. A ratio is the median over rounds of the time over that of plain 4 bits, or
of ``uint8``, in the same round. Tables in Markdown go to stdout, their progress to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from itertools import cycle
from statistics import median

import numpy as np
from options import shapes
from peers import Layer
from peers.pyda8w4 import KINDS, SCHEMES, Kind, Pyda8w4
from timing import SETTLE_SECONDS, Spread, cold_bytes, count_copies, interleave, time_calls

import pyda8w4

GROUPS = (32, 128)
KIND_ROWS = (1, 256)
SCHEME_ROWS = (1, 16, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=shapes, default="4096x4096", help="NxK (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="runs of each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.2, help="of a run (%(default)s)")
    parser.add_argument("--settle", type=float, default=SETTLE_SECONDS, help="seconds before a run (%(default)s)")
    parser.add_argument("--hot", action="store_true", help="one copy of the weights, which may stay in cache")
    options = parser.parse_args()
    ((n, k),) = options.shape
    info = pyda8w4.cpu_info()
    print(f"{n} x {k}, {options.threads} thread{'s' * (options.threads != 1)}, kernel {info['kernel']}, {info['cpu']}")
    kinds = {group: _kinds(n, k, group, options) for group in GROUPS}
    schemes = {group: _schemes(n, k, group, options) for group in GROUPS}

    # Kinds that have groups of their own stand in the columns of groups of 32.
    columns = [f"g = {group}, M = {m}" for group in GROUPS for m in KIND_ROWS]
    print(f"\n| weights | group | bits | {' | '.join(columns)} |\n|---|---|---|{'---|' * len(columns)}")
    for name, kind in KINDS.items():
        sizes = [f"{bits:.4g}" for group in GROUPS for label, (bits, _) in kinds[group].items() if label == name]
        found = [kinds[group][name][1][m] if name in kinds[group] else "" for group in GROUPS for m in KIND_ROWS]
        group = kind.group_size or "32, 128"
        print(f"| {kind.about} | {group} | {', '.join(sizes)} | {' | '.join(found)} |")
    columns = [f"g = {group}, M = {m}" for group in GROUPS for m in SCHEME_ROWS]
    print(f"\n| activations | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for act in SCHEMES:
        print(f"| {act} | {' | '.join(schemes[group][act][m] for group in GROUPS for m in SCHEME_ROWS)} |")


def _kinds(n: int, k: int, group: int, options: argparse.Namespace) -> dict[str, tuple[float, dict[int, str]]]:
    """Bits of a weight in memory, and its time for numbers of rows, of every kind that has such groups."""
    names = [name for name, kind in KINDS.items() if kind.group_size is None or group == min(GROUPS)]
    peers = {name: _peer(KINDS[name], n, k, group, options) for name in names}
    times = {m: _times({name: peer.bind(_rows(m, k)) for name, peer in peers.items()}, m, options) for m in KIND_ROWS}
    found = {}
    for name, peer in peers.items():
        sums = 4 * -(-n // 32) * 32  # bytes of the column sums, which a product hardly reads
        bits = 8 * (peer.packed[0].nbytes - sums) / (n * k)
        found[name] = bits, {m: times[m][name] for m in KIND_ROWS}
    return found


def _schemes(n: int, k: int, group: int, options: argparse.Namespace) -> dict[str, dict[int, str]]:
    """The time of plain weights with activations of every scheme, for numbers of rows."""
    peer = _peer(KINDS[""], n, k, group, options)
    times = {m: _times({act: peer.calls(_rows(m, k), act) for act in SCHEMES}, m, options) for m in SCHEME_ROWS}
    return {act: {m: times[m][act] for m in SCHEME_ROWS} for act in SCHEMES}


def _peer(kind: Kind, n: int, k: int, group: int, options: argparse.Namespace) -> Pyda8w4:
    layer = Layer.random(n, k, min(group, k))
    copies = count_copies(kind.weight_bytes(layer), 0 if options.hot else cold_bytes())
    return type("Of", (Pyda8w4,), {"kind": kind})(layer, copies, options.threads)


def _rows(m: int, k: int) -> np.ndarray:
    return np.random.default_rng(m).standard_normal((m, k), np.float32)


def _times(calls: Mapping[str, list[Callable[[], object]]], m: int, options: argparse.Namespace) -> dict[str, str]:
    """Of the first in milliseconds, of the others over that."""
    rotating = {name: cycle(copies) for name, copies in calls.items()}
    medians: dict[str, list[float]] = {name: [] for name in calls}
    for name in interleave(calls, options.rounds, options.settle, m):
        medians[name].append(median(time_calls(rotating[name], options.seconds)))
    base, *others = calls
    found = {base: f"{1e3 * median(medians[base]):.3g} ms"}
    for name in others:
        ratio = Spread.of([each / plain for each, plain in zip(medians[name], medians[base])])
        found[name] = f"{ratio.median:.2f} x"
        print(f"M = {m:<4} {name:<11}{ratio.median:.3f} [{ratio.q1:.3f}..{ratio.q3:.3f}]", file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    main()
