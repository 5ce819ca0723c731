"""Types of command-line options that programs here have in common."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection
from pathlib import Path

from timing import SETTLE_SECONDS


def numbers(text: str) -> list[int]:
    """Read 1,2,3."""
    values = [int(value) for value in text.split(",")]
    if min(values) < 1:
        raise ValueError
    return values


def shapes(text: str) -> list[tuple[int, int]]:
    """Read NxK,NxK."""
    return [(n, k) for n, k in (map(int, shape.split("x")) for shape in text.split(","))]


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Read NAME,NAME of those that are known."""

    def names(text: str) -> list[str]:
        unknown = set(text.split(",")) - set(known)
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
        return text.split(",")

    return names


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add what compare.py and experts.py have in common."""
    cpus = len(os.sched_getaffinity(0))
    parser.add_argument("--group-size", type=numbers, default="128,32", help="(%(default)s)")
    parser.add_argument("--threads", type=numbers, default="1" if cpus == 1 else f"1,{cpus}", help="(%(default)s)")
    parser.add_argument("--hot", action="store_true", help="one copy of the weights, which may stay in cache")
    parser.add_argument("--seconds", type=float, default=0.3, help="of a run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each library (%(default)s)")
    parser.add_argument("--settle", type=float, default=SETTLE_SECONDS, help="seconds before a run (%(default)s)")
    parser.add_argument("--json", type=Path, help="where to write everything")
