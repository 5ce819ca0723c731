"""Types of command-line options that programs here have in common."""

from __future__ import annotations


def numbers(text: str) -> list[int]:
    """Read 1,2,3."""
    values = [int(value) for value in text.split(",")]
    if min(values) < 1:
        raise ValueError
    return values


def shapes(text: str) -> list[tuple[int, int]]:
    """Read NxK,NxK."""
    return [(n, k) for n, k in (map(int, shape.split("x")) for shape in text.split(","))]
