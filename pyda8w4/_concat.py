"""Joining packed weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4._format import Format
from pyda8w4._packed import PackedWeight, empty_arrays
from pyda8w4._prepack import prepack


def concat(weights: Sequence[PackedWeight], *more: PackedWeight) -> PackedWeight:
    """Join packed weights along N: one product instead of several for layers that share an input.

    Parameters
    ----------
    weights : sequence of PackedWeight
        At least one; all with the same K and group size.
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
        If it is empty, or K or group sizes differ.

    Notes
    -----
    Scales that the parts store in different types are stored as float32. Where some parts have offsets,
    the others get offsets of 0, which change no bit of a product (docs/numbers.md). Parts whose N is a
    multiple of 32 (all but the last) are copied block by block; others are unpacked and packed
    again.

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
        if not isinstance(weight, PackedWeight):
            raise TypeError(f"weights[{i}] must be a PackedWeight, got {type(weight).__name__}")
    if not weights:
        raise ValueError("weights must hold at least one PackedWeight, got none")
    formats = [weight._format for weight in weights]
    first = formats[0]
    for i, format in enumerate(formats):
        if (format.k, format.group_size) != (first.k, first.group_size):
            raise ValueError(
                f"weights[{i}] must have K = {first.k} and group_size = {first.group_size} like weights[0], "
                f"got K = {format.k} and group_size = {format.group_size}"
            )
    whole = Format.joined(formats)
    if not all(format.has_whole_blocks for format in formats[:-1]):
        unpacked = [_unpacked(weight, whole) for weight in weights]
        return prepack(*(np.concatenate(arrays) for arrays in zip(*unpacked)), group_size=whole.group_size)
    parts = [format.restored(weight._arrays, whole) for format, weight in zip(formats, weights)]
    arrays = empty_arrays(whole)
    for name, array in arrays.items():
        np.concatenate([part[name] for part in parts], out=array)
    return PackedWeight._from_arrays(whole, arrays)


def _unpacked(weight: PackedWeight, whole: Format) -> tuple[npt.NDArray[Any], ...]:
    arrays = weight.unpack()
    return (*arrays, np.zeros_like(arrays[1])) if whole.has_offsets and not weight.has_offsets else arrays
