"""Minutes of mixed calls from several threads, compared by equality; memory must not grow.

    python tests/tools/soak.py [--minutes MINUTES] [--threads COUNT] [--seed SEED]

The results are those that the same calls gave before, alone and with one thread of this library.
"""

from __future__ import annotations

import argparse
import pickle
import random
import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where cases.py is

import numpy as np
from cases import DTYPES, Weight, arrays, bias_of, floats, pack, packed_bytes, quantized

import pyda8w4

WARM_UP = 0.1  # of the time: until then memory may grow
GROWTH = 64 * 2**20


def weights(rng: random.Random) -> list[Weight]:
    found = [Weight(1, 1), Weight(640, 1024, 128, "float16", 8)]
    while len(found) < 16:
        k = rng.choice([7, 64, 70, 259, 512, 600])
        group = rng.choice([None, 4, 32, 64, 100])
        zps = rng.choice(["random", "extreme", 8])
        found.append(Weight(rng.randrange(1, 300), k, group, rng.choice(list(DTYPES)), zps, rng.random() < 0.3))
    return found


def digest(*results: np.ndarray) -> int:
    return hash(tuple(result.tobytes() for result in results))


def calls(weight: Weight, folder: Path):
    """-> functions, each giving a number that depends on all bits of a result."""
    packed = pack(weight)
    path = folder / f"{hash(weight)}.safetensors"
    pyda8w4.save(path, {"w": packed})
    edge = weight.n // 2 // 32 * 32 or weight.n
    whole = arrays(weight)
    codes = whole[0]

    def gemm(rows: int):
        act = "uint8" if rows % 2 else "int8"
        a, scales, zps = (array[:rows] for array in quantized(weight.k, act))
        return lambda: digest(pyda8w4.gemm(a, packed, scales, zps, bias=bias_of(weight.n)))

    def linear(rows: int):
        x = floats(weight.k, list(DTYPES)[rows % 3])[:rows]
        return lambda: digest(pyda8w4.linear(x, packed, act=("uint8", "int8", "int8_group", "int16")[rows % 4]))

    def slices() -> int:
        x = floats(weight.k)[:5]
        return digest(pyda8w4.linear(x, packed[:edge]), pyda8w4.linear(x, pyda8w4.concat([packed[:edge], packed])))

    def again() -> int:
        return hash(tuple(packed_bytes(pyda8w4.prepack(*whole, group_size=weight.group_size)).items()))

    def low_nibbles() -> int:
        even = codes[:, : weight.k // 2 * 2]
        if not even.size:
            return 0
        joined = even[:, ::2] | even[:, 1::2] << 4
        return digest(*pyda8w4.prepack(joined, np.ones(weight.n, np.float32), nibbles="low_first").unpack())

    def quantizers() -> int:
        x = floats(weight.k)
        return digest(*pyda8w4.quantize_activation(x), *pyda8w4.quantize_weight(x, min(64, weight.k)))

    def files() -> int:
        loaded = pyda8w4.load(path)["w"]
        return digest(pyda8w4.linear(floats(weight.k)[:3], pickle.loads(pickle.dumps(loaded))), *loaded.unpack())

    return [gemm(1), gemm(9), gemm(70), linear(1), linear(4), linear(33), slices, again, low_nibbles, quantizers, files]


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def soak(minutes: float, threads: int, seed: int) -> tuple[Counter[str], int, int]:
    """-> calls by name, bytes of memory after warming up, and at the end."""
    with tempfile.TemporaryDirectory() as name:
        pyda8w4.set_num_threads(1)
        with pyda8w4.use_kernel("scalar"):
            work = [(call, call()) for weight in weights(random.Random(seed)) for call in calls(weight, Path(name))]
        pyda8w4.set_num_threads(None)
        end = time.monotonic() + 60 * minutes
        failures: list[BaseException] = []
        counts = [Counter[str]() for _ in range(threads)]

        def loop(number: int) -> None:
            rng = random.Random(f"{seed} {number}")
            try:
                while time.monotonic() < end and not failures:
                    call, expected = rng.choice(work)
                    kernel = rng.choice(pyda8w4.kernels())
                    with pyda8w4.use_kernel(kernel):
                        if rng.random() < 0.01:
                            pyda8w4.set_num_threads(rng.choice([None, 1, 2, 3, 8]))
                        assert call() == expected, (call, kernel)
                    counts[number][call.__qualname__.split(".")[2]] += 1
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=loop, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        time.sleep(60 * minutes * WARM_UP)
        first = rss()
        for worker in workers:
            worker.join()
        pyda8w4.set_num_threads(None)
    if failures:
        raise failures[0]
    return sum(counts, Counter()), first, rss()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counts, first, last = soak(arguments.minutes, arguments.threads, arguments.seed)
    print(f"{counts.total()} calls: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    print(f"memory {first / 2**20:.0f} MiB after warming up, {last / 2**20:.0f} MiB at the end")
    if last > first + GROWTH:
        sys.exit("memory has grown")


if __name__ == "__main__":
    main()
