"""What suits this CPU: finds the numbers of src/runtime/tuning.cpp by measurement, and prints the row to add there.

    python benchmarks/tune.py

Takes about a minute on an idle machine. `near_k` says how far ahead of its loads a product of one or two rows
prefetches; 0 leaves that to a prefetch of the next panel. A process with each value in PYDA8W4_NEAR_K, which comes
before the row, multiplies cold weights on one thread; their runs are interleaved. The geometric mean over all cells
decides. Only AVX-512 kernels look at it. `packed_max` is what other CPUs have.
"""

from __future__ import annotations

import argparse
import math
import platform
from functools import partial
from pathlib import Path
from statistics import median

from timing import SETTLE_SECONDS, cold_bytes
from workers import Unavailable, Worker, interleaved_samples

SHAPE = (4096, 4096)
GROUPS, ROWS = (128, 32), (1, 2)
NEAR_K = (0, 64, 128, 192, 256, 384, 512)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.15, help="of a run (%(default)s)")
    options = parser.parse_args(arguments)

    print(f"{'group':>5}{'M':>3}" + "".join(f"{f'near_k {value}':>12}" for value in NEAR_K) + "  ms")
    products = [1.0] * len(NEAR_K)
    for group_size in GROUPS:
        workers = [Worker(1, "workers:LayerTimer", ("pyda8w4", 1), {"PYDA8W4_NEAR_K": str(k)}) for k in NEAR_K]
        try:
            for worker in workers:
                worker.ask("build", *SHAPE, group_size, cold_bytes())
            for m in ROWS:
                times = _times(workers, m, options.rounds, options.seconds)
                print(f"{group_size:>5}{m:>3}" + "".join(f"{1e3 * time:>12.3g}" for time in times), flush=True)
                products = [product * time for product, time in zip(products, times)]
        finally:
            for worker in workers:
                worker.close()
    means = [math.pow(product / products[0], 1 / (len(GROUPS) * len(ROWS))) for product in products]
    print("  of near_k 0" + "".join(f"{mean:>8.3f}" for mean in means))
    best = min(zip(means, NEAR_K))[1]
    vendor, family, model = _cpu()
    print(f'{{.vendor = "{vendor}", .family = {family}, .first_model = {model}, .last_model = {model},')
    print(f" .tuning = {{.near_k = {best}, .packed_max = {{24, 24, 24}}}}}},")


def _times(workers: list[Worker], m: int, rounds: int, seconds: float) -> list[float]:
    for worker in workers:
        worker.ask("bind", m)
    runs = {str(i): partial(worker.ask, "run", seconds) for i, worker in enumerate(workers)}
    found = []
    for values in interleaved_samples(runs, rounds, SETTLE_SECONDS).values():
        if isinstance(values, Unavailable):
            raise values
        found.append(median(values))
    return found


def _cpu() -> tuple[str, str, str]:
    """-> vendor, family and model, as Linux says them."""
    said: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        said.setdefault(key.strip(), value.strip())
    return said.get("vendor_id", platform.machine()), said.get("cpu family", "?"), said.get("model", "?")


if __name__ == "__main__":
    main()
