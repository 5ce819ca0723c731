"""Joining packed weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from pyda8w4._checks import BLOCK, ceil_div
from pyda8w4._packed import PackedWeight, aligned_empty
from pyda8w4._prepack import prepack


def concat(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Join packed weights along N: one product instead of several for layers that share an input.

    Parameters
    ----------
    weights : sequence of PackedWeight
        At least one; all with the same K and group size.

    Returns
    -------
    PackedWeight
        Of shape (sum of N, K). Its products are those of the parts, side by side, bit for bit.

    Raises
    ------
    TypeError
        If `weights` is not a sequence of PackedWeight.
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
    if isinstance(weights, PackedWeight) or not isinstance(weights, Iterable):
        raise TypeError(f"weights must be a sequence of PackedWeight, got {type(weights).__name__}")
    weights = list(weights)
    for i, weight in enumerate(weights):
        if not isinstance(weight, PackedWeight):
            raise TypeError(f"weights[{i}] must be a PackedWeight, got {type(weight).__name__}")
    if not weights:
        raise ValueError("weights must hold at least one PackedWeight, got none")
    first = weights[0]
    for i, weight in enumerate(weights):
        if weight.shape[1] != first.shape[1] or weight.group_size != first.group_size:
            raise ValueError(
                f"weights[{i}] must have K = {first.shape[1]} and group_size = {first.group_size} like weights[0], "
                f"got K = {weight.shape[1]} and group_size = {weight.group_size}"
            )
    has_offsets = any(weight.has_offsets for weight in weights)
    if any(weight.shape[0] % BLOCK for weight in weights[:-1]):
        unpacked = [_unpacked(weight, has_offsets) for weight in weights]
        return prepack(*(np.concatenate(arrays) for arrays in zip(*unpacked)), group_size=first.group_size)

    n, k = sum(weight.shape[0] for weight in weights), first.shape[1]
    scale_dtype = first.scale_dtype if len({weight.scale_dtype for weight in weights}) == 1 else "float32"
    zero_point = first.zero_point if len({weight.zero_point for weight in weights}) == 1 else None
    parts = {
        "codes": [weight._arrays["codes"] for weight in weights],
        "scales": [_stored(weight, "scales", scale_dtype) for weight in weights],
        "sums": [weight._arrays["sums"] for weight in weights],
    }
    if zero_point is None:
        parts["zps"] = [_zps(weight) for weight in weights]
    if has_offsets:
        parts["offsets"] = [_stored(weight, "offsets", scale_dtype) for weight in weights]
    blocks = ceil_div(n, BLOCK)
    joined = aligned_empty(*(((blocks, *arrays[0].shape[1:]), arrays[0].dtype) for arrays in parts.values()))
    for place, arrays in zip(joined, parts.values()):
        np.concatenate(arrays, out=place)
    return PackedWeight._from_arrays((n, k), first.group_size, scale_dtype, zero_point, **dict(zip(parts, joined)))


def _unpacked(weight: PackedWeight, has_offsets: bool) -> tuple[np.ndarray, ...]:
    arrays = weight.unpack()
    return (*arrays, np.zeros_like(arrays[1])) if has_offsets and not weight.has_offsets else arrays


def _stored(weight: PackedWeight, part: str, dtype: str) -> np.ndarray:
    """Packed scales or offsets as they are stored in `dtype`: their own, or float32. Offsets may be missing."""
    values = weight._arrays.get(part)
    if values is None:
        return np.zeros_like(_stored(weight, "scales", dtype))
    if weight.scale_dtype == dtype:
        return values
    if weight.scale_dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _zps(weight: PackedWeight) -> np.ndarray:
    """Packed zero points, written out where they are all the same; 0 in columns beyond N."""
    if "zps" in weight._arrays:
        return weight._arrays["zps"]
    n = weight.shape[0]
    blocks = ceil_div(n, BLOCK)
    zps = np.full((blocks, weight.groups, BLOCK), weight.zero_point, np.int8)
    zps[-1, :, n - (blocks - 1) * BLOCK :] = 0
    return zps
