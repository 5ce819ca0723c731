"""A table of what `explain` says of one layer with several numbers of rows: ``pyda8w4 explain``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyda8w4._explain import Explanation, explanations
from pyda8w4._prepack import prepack
from pyda8w4._runtime import cpu_model
from pyda8w4._terminal import counted, in_bytes, table
from pyda8w4._timing import Spread
from pyda8w4.bench import random_weight

ROWS = [1, 16, 256]

_COLUMNS = (
    *("M", "kernel", "form", "path", "tile", "blocks", "K block", "threads"),
    *("ms", "GB/s", "GOPS", "limit", "of limit"),
)


def main(n: int, k: int, rows: Sequence[int], group_size: int, threads: int | None, *, bits: int, act: str) -> int:
    """Explain a layer of random weights, and return the exit status."""
    group = min(group_size, k)
    packed = prepack(*random_weight(np.random.default_rng(0), n, k, group, bits), bits=bits, group_size=group)
    found = list(explanations(packed, rows, act, threads))
    first = found[0]
    print(f"cpu      {cpu_model()}")
    print(f"layer    {n} x {k}, {bits} bits, groups of {group}, x as {act}; packed {in_bytes(first.weight_bytes)}")
    print(f"kernel   {first.kernel}, up to {counted(first.most_threads, 'thread')}")
    print(f"limits   read {first.read_limit:.1f} GB/s, dot products {first.dots_limit:.0f} GOPS")
    print("of limit the longer of two times, to read the weight once and to make the dot products, over the time taken")
    print()
    for line in table([_COLUMNS, *map(_row, found)], right=(0, 5, 6, 7, 9, 10)):
        print(line)
    reasons = _reasons(found)
    if reasons:
        print("\nwhy nothing faster is done")
        for rows_of_reason, reason in reasons:
            print(f"  {rows_of_reason}{reason}")
    return 0


def _row(one: Explanation) -> tuple[str, ...]:
    return (
        str(one.m),
        "+".join(one.multiplied_by),
        one.form,
        one.path,
        f"{one.tile_rows} x 32",
        str(one.row_blocks),
        str(one.k_block),
        str(one.threads),
        str(Spread(one.ms, one.ms_q1, one.ms_q3, 0)),
        f"{one.weight_bytes / one.ms / 1e6:.1f}",
        f"{one.operations / one.ms / 1e6:.0f}",
        one.limit,
        f"{one.of_limit:.0%}",
    )


def _reasons(found: Sequence[Explanation]) -> list[tuple[str, str]]:
    """Each reason once, after the rows that it is for, where these are not all."""
    of_reason: dict[str, list[str]] = {}
    for one in found:
        for reason in one.reasons:
            of_reason.setdefault(reason, []).append(str(one.m))
    return [
        ("" if len(rows) == len(found) else f"M = {', '.join(rows)}: ", reason) for reason, rows in of_reason.items()
    ]
