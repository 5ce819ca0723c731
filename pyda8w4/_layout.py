"""A packed weight as tensors of which one, of a few integers, says what the others are: torch's state dicts have these.

``layout`` is int64: the layout version, N, K, group size. Of a weight that is not plain (4 bits, scales of one level,
no table, no permutation, no factors, no rotation) three numbers follow: bits, groups of a super-group, and which arrays
there are, bit i for `ARRAYS` number i; the rotation is an eighth, where there is one. The other tensors are the arrays
of docs/packed-format.md; but where all zero points are the same, ``zps`` is that one, without dimensions. Those of
several weights that are alike have one ``layout``, and a dimension for the weights that comes first.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from pyda8w4._checks import FLOATS, INTEGERS, one_of
from pyda8w4._format import ARRAYS, LAYOUT_VERSION, LAYOUT_VERSIONS, Format

_PLAIN = ("codes", "scales", "sums", "zps")

# The arrays whose element type, or whether there is one, a layout may not tell.
TYPED = ("scales", "offsets", "sub_scales", "sub_offsets")


class Layout(NamedTuple):
    """What the tensor ``layout`` says."""

    n: int
    k: int
    group_size: int
    bits: int
    super_size: int
    names: tuple[str, ...]  # of the arrays
    optional: tuple[str, ...]  # those that there may be, too
    rotation: int = 0


@lru_cache(maxsize=256)
def read_layout(numbers: tuple[int, ...]) -> Layout:
    """ValueError if they are no layout."""
    if len(numbers) == 4 and numbers[0] in LAYOUT_VERSIONS:
        _, n, k, group_size = numbers
        return Layout(n, k, group_size, 4, 0, _PLAIN, ("offsets",))
    if len(numbers) in (7, 8) and numbers[0] == LAYOUT_VERSION:
        _, n, k, group_size, bits, super_size, there, *rotation = numbers
        if 0 <= there < 1 << len(ARRAYS):
            names = tuple(name for i, name in enumerate(ARRAYS) if there >> i & 1)
            return Layout(n, k, group_size, bits, super_size, names, (), *rotation)
    raise ValueError(
        f"layout must be [{LAYOUT_VERSION}, N, K, group size], or these with bits, groups of a super-group and the bit "
        f"set of the arrays, or these with the rotation, got {list(numbers)}"
    )


def layout_of(format: Format) -> list[int]:
    """Its numbers."""
    names = {*format.arrays, "zps"}
    numbers = [LAYOUT_VERSION, format.n, format.k, format.group_size]
    if format.bits == 4 and names <= {*_PLAIN, "offsets"} and not format.rotation:
        return numbers
    numbers += [format.bits, format.super_size, sum(1 << i for i, name in enumerate(ARRAYS) if name in names)]
    return [*numbers, format.rotation] if format.rotation else numbers


@lru_cache(maxsize=256)
def format_from(
    numbers: tuple[int, ...],
    zero_point: int | None,
    scales: str | None,
    offsets: str | None,
    sub_scales: str | None,
    sub_offsets: str | None,
    experts: int | None = None,
) -> Format:
    """The format of a weight, or of so many, with this layout and arrays of these element types: those of `TYPED`.

    ValueError if none has such. Kept, since compiled models need it at each call.
    """
    layout = read_layout(numbers)
    if scales not in FLOATS:
        raise ValueError(f"scales must be {one_of(FLOATS)}, got {scales}")
    for name, type in (("sub_scales", sub_scales), ("sub_offsets", sub_offsets)):
        if name in layout.names and type not in INTEGERS:
            raise ValueError(f"{name} must be {one_of(INTEGERS)}, got {type}")
    if "table" in layout.names and zero_point != 0:
        raise ValueError(f"zps must be 0 without dimensions where there is a table, got {zero_point or 'an array'}")
    try:
        format = Format(
            layout.n,
            layout.k,
            layout.group_size,
            scales,
            zero_point,
            "offsets" in layout.names or ("offsets" in layout.optional and offsets is not None),
            bits=layout.bits,
            has_table="table" in layout.names,
            super_size=layout.super_size,
            sub_scale_dtype=sub_scales if "sub_scales" in layout.names else None,
            sub_offset_dtype=sub_offsets if "sub_offsets" in layout.names else None,
            has_perm="perm" in layout.names,
            has_factors="factors" in layout.names,
            rotation=layout.rotation,
            experts=experts,
        )
    except ValueError as error:
        raise ValueError(f"layout {list(numbers)} is that of no packed weight: {error}") from None
    if {*format.arrays, "zps"} - {*layout.optional} != {*layout.names}:
        raise ValueError(f"layout {list(numbers)} is that of no packed weight: it has {', '.join(layout.names)}")
    return format
