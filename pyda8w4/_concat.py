"""Joining packed weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4._format import SHARED, Format
from pyda8w4._packed import PackedWeight, check_packed, empty_arrays, pack_again


def concat(weights: Sequence[PackedWeight], *more: PackedWeight) -> PackedWeight:
    """Join packed weights along N: one product instead of several for layers that share an input.

    Parameters
    ----------
    weights : sequence of PackedWeight
        At least one; all with the same K, group size, bits, table, permutation, factors and rotation,
        and with scales of one level or of two levels alike.
    *more : PackedWeight
        None: all weights belong into `weights`.

    Returns
    -------
    PackedWeight
        Of shape (sum of N, K). Its products are those of the parts, side by side, bit for bit.

    Raises
    ------
    TypeError
        If `weights` is not a sequence of PackedWeight, or there are `more`.
    ValueError
        If it is empty, or what must be the same differs.

    Notes
    -----
    Scales that the parts store in different types are stored as float32. Where some parts have offsets,
    the others get offsets of 0, which change no bit of a product (docs/numbers.md). Parts whose N is a
    multiple of 32 (all but the last) are copied block by block; others are unpacked and packed
    again, which loses nothing.

    Examples
    --------
    >>> import numpy as np
    >>> import pyda8w4
    >>> q = pyda8w4.prepack(np.zeros((64, 16), np.uint8), np.ones(64, np.float32))
    >>> k = pyda8w4.prepack(np.zeros((32, 16), np.uint8), np.ones(32, np.float32))
    >>> pyda8w4.concat([q, k]).shape
    (96, 16)
    """
    if more:
        raise TypeError(f"weights must be one sequence, as in concat([a, b]), got {1 + len(more)} arguments")
    if isinstance(weights, PackedWeight) or not isinstance(weights, Iterable):
        raise TypeError(f"weights must be a sequence of PackedWeight, got {type(weights).__name__}")
    weights = list(weights)
    for i, weight in enumerate(weights):
        check_packed(f"weights[{i}]", weight)
    if not weights:
        raise ValueError("weights must hold at least one PackedWeight, got none")
    formats = [weight._format for weight in weights]
    whole = Format.joined(formats)
    first = weights[0]._arrays
    for i, weight in enumerate(weights):
        for name in SHARED:
            if name in first and not np.array_equal(weight._arrays[name], first[name]):
                raise ValueError(f"weights[{i}] must have the {name} of weights[0], got another")
    parts = [format.restored(weight._arrays, whole) for format, weight in zip(formats, weights)]
    if not all(format.has_whole_blocks for format in formats[:-1]):
        columns = [replace(whole, n=format.n).of_columns(part) for format, part in zip(formats, parts)]
        for part, weight in zip(columns, weights):
            part["codes"] = weight.unpack()[0]
        return pack_again({name: _join(name, columns) for name in columns[0]}, whole)
    arrays = empty_arrays(whole)
    for name, array in arrays.items():
        _join(name, parts, out=array)
    return PackedWeight._from_arrays(whole, arrays)


def concat_parts(n: int, weights: Iterator[PackedWeight]) -> PackedWeight:
    """Join packed weights of one format to `n` columns: only one of them need be in memory beside the result."""
    first = next(weights)
    if first.shape[0] == n:
        return first
    format = replace(first._format, n=n)
    arrays = empty_arrays(format)
    end = 0
    for weight in chain([first], weights):
        begin, end = end, end + weight.shape[0]
        part, places = format.slice(begin, end, arrays)
        if weight._format != part:
            raise ValueError(f"columns {begin} to {end} must have the format of those before, got {weight!r}")
        for name, place in places.items():
            place[...] = weight._arrays[name]
    return PackedWeight._from_arrays(format, arrays)


def _join(
    name: str, parts: Sequence[Mapping[str, npt.NDArray[Any]]], out: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    return np.concatenate([part[name] for part in (parts[:1] if name in SHARED else parts)], out=out)
