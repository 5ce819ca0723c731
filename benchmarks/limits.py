"""Limits of this machine, measured: memory reads in GB/s, 8-bit dot products in GOPS.

    python benchmarks/limits.py

It needs a C++ compiler: $CXX, else c++.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

from machine import ISAS, Limits
from timing import interleave

import pyda8w4

ROUNDS = 9


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
            if isa in pyda8w4.kernels():
                measures[f"dot products, {isa}, {of}"] = ("GOPS", partial(limits.dots, isa, threads))
    results: dict[str, list[float]] = {name: [] for name in measures}
    for name in interleave(measures, ROUNDS, settle=0):
        results[name].append(measures[name][1]())
    for name, (unit, _) in measures.items():
        values = results[name]
        print(f"{name:40} {statistics.median(values):8.1f} {unit}  ({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    main()
