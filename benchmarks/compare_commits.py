"""Did `linear` become slower between two commits?

    python benchmarks/compare_commits.py main HEAD
    python benchmarks/compare_commits.py HEAD .       # "." is the working tree

Builds both into temporary folders with pip, interleaves their runs in processes of their own (workers.py), with
cold weights, and prints the time of the second over that of the first: the median over rounds and the
quartiles. Below 1 the second is faster. Where the quartiles enclose 1, the rounds do not tell them apart.
Exits with 1 if in some cell even the first quartile is above ``--worst``. Only public functions are called
(peers/pyda8w4.py), so any two commits that have these can be compared. The timing method is that of this tree.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

from options import numbers, shapes
from timing import SETTLE_SECONDS, Spread, cold_bytes
from workers import LayerTimer, Unavailable, Worker, interleaved_samples

_ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> int:
    cpus = str(len(os.sched_getaffinity(0)))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("head", nargs="?", default=".")
    parser.add_argument("--shapes", type=shapes, default="4096x4096", help="NxK,... (%(default)s)")
    parser.add_argument("--m", type=numbers, default="1,16,256", help="numbers of rows (%(default)s)")
    parser.add_argument("--group-size", type=numbers, default="128,32", help="(%(default)s)")
    parser.add_argument("--threads", type=numbers, default=cpus, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.2, help="of a run (%(default)s)")
    parser.add_argument("--worst", type=float, default=1.03, help="ratio that counts as a regression (%(default)s)")
    options = parser.parse_args(arguments)

    slower = 0
    with tempfile.TemporaryDirectory() as folder:
        places = [_install(commit, Path(folder) / str(i)) for i, commit in enumerate((options.base, options.head))]
        cells = len(options.shapes) * len(options.group_size) * len(options.threads) * len(options.m)
        cell_seconds = 2 * options.rounds * (options.seconds + SETTLE_SECONDS)
        total = cells * cell_seconds
        print(
            f"{total:.0f} s or more: {cells} cells of {cell_seconds:.1f} s, and the making of the weights", flush=True
        )
        print(f"{'N x K':<12}{'group':>6}{'threads':>8}{'M':>5}{'base ms':>10}{'head ms':>10}  head / base [quartiles]")
        for (n, k), group_size, threads in product(options.shapes, options.group_size, options.threads):
            workers = [_worker(place, threads) for place in places]
            try:
                for worker in workers:
                    worker.ask("build", n, k, min(group_size, k), cold_bytes())
                for m in options.m:
                    base, head = _measure(workers, m, options.seconds, options.rounds)
                    ratio = Spread.of([second / first for first, second in zip(base, head)])
                    slow = ratio.q1 > options.worst
                    slower += slow
                    print(
                        f"{f'{n}x{k}':<12}{group_size:>6}{threads:>8}{m:>5}"
                        f"{1e3 * median(base):>10.4g}{1e3 * median(head):>10.4g}"
                        f"  {ratio.median:.3f} [{ratio.q1:.3f}..{ratio.q3:.3f}]{'  SLOWER' * slow}",
                        flush=True,
                    )
            finally:
                for worker in workers:
                    worker.close()
    return int(slower > 0)


def _measure(workers: list[Worker], m: int, seconds: float, rounds: int) -> list[list[float]]:
    """Median seconds of a product, for each worker and round."""
    for worker in workers:
        worker.ask("bind", m)
    runs = {str(i): partial(_median_of_run, worker, seconds) for i, worker in enumerate(workers)}
    found = []
    for values in interleaved_samples(runs, rounds, SETTLE_SECONDS).values():
        if isinstance(values, Unavailable):
            raise values
        found.append(values)
    return found


def _median_of_run(worker: Worker, seconds: float) -> list[float]:
    return [median(worker.ask("run", seconds))]


def _worker(place: Path, threads: int) -> Worker:
    return Worker(threads, "compare_commits:from_folder", (str(place), threads))


def from_folder(place: str, threads: int) -> LayerTimer:
    """Make the timer of pyda8w4 as it is installed in this folder; called in a worker."""
    # The finder of an editable install comes before any folder, and both workers would run that install.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "pyda8w4" not in type(finder).__module__]
    sys.path.insert(0, place)
    import pyda8w4

    if not Path(pyda8w4.__file__).is_relative_to(place):
        raise ImportError(f"pyda8w4 was imported from {pyda8w4.__file__}, not from {place}")
    return LayerTimer("pyda8w4", threads)


def _install(commit: str, folder: Path) -> Path:
    """Build a commit and return the folder to import it from."""
    source, place = folder / "source", folder / "installed"
    if commit == ".":
        source = _ROOT
    else:
        source.mkdir(parents=True)
        archive = subprocess.run(["git", "-C", _ROOT, "archive", commit], check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "-x", "-C", source], input=archive, check=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    modules = (importlib.util.find_spec(name) for name in ("mesonpy", "mesonbuild", "Cython"))
    programs = (shutil.which(name, path=path) for name in ("ninja", "patchelf"))
    how = ["--no-build-isolation"] if all(modules) and all(programs) else []  # Else pip fetches what the build needs.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *how, "--target", str(place), str(source)]
    subprocess.run(pip, check=True, env={**os.environ, "PATH": path})
    return place


if __name__ == "__main__":
    sys.exit(main())
