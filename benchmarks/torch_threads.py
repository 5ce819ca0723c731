"""Whether torch and pyda8w4 get in each other's way: a matmul and a layer, apart and alternating.

    python benchmarks/torch_threads.py

Both use several threads. With one pool of threads the pair takes as long as the two apart; with two, the spinning
threads of one hold the CPUs that the other wants. Both orders of import are tried, each in a process of its own.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import cycle

ORDERS = ("torch, pyda8w4", "pyda8w4, torch")
ROUNDS, CALLS = 41, 20


def measure(order: str, threads: int) -> None:
    for name in order.split(", "):
        __import__(name)
    import torch

    import pyda8w4
    from pyda8w4.torch import DA8W4Linear

    torch.set_num_threads(threads)
    x = torch.randn(16, 1024)
    # Copies rotate, so that neither finds more of its weights in a cache when it runs alone.
    weights = cycle([torch.randn(1024, 1024) for _ in range(CALLS)])
    layers = cycle([DA8W4Linear.from_linear(torch.nn.Linear(1024, 1024)) for _ in range(CALLS)])

    def matmul() -> None:
        torch.mm(x, next(weights))

    def layer() -> None:
        next(layers)(x)

    def pair() -> None:
        matmul()
        layer()

    def seconds(call: Callable[[], None]) -> float:
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        return (time.perf_counter() - begin) / CALLS

    with torch.no_grad():
        rounds = [(seconds(matmul), seconds(layer), seconds(pair)) for _ in range(ROUNDS)]
    alone = [a + b for a, b, _ in rounds]
    ratios = sorted(together / apart for (_, _, together), apart in zip(rounds, alone))
    a, b, c = (statistics.median(column) * 1e6 for column in zip(*rounds))
    print(
        f"import {order}: matmul {a:.0f} us, layer {b:.0f} us, the pair {c:.0f} us; "
        f"pair / sum {statistics.median(ratios):.3f} "
        f"({ratios[len(ratios) // 4]:.3f} to {ratios[-len(ratios) // 4]:.3f}), "
        f"threads of {pyda8w4.cpu_info()['thread_runtime']}"
    )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(sys.argv[1], int(sys.argv[2]))
    else:
        for order in ORDERS:
            subprocess.run([sys.executable, __file__, order, "2"], check=True)
