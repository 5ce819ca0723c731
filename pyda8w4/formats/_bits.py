"""Small fields in larger words, as formats pack codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import one_of

_CACHED = 1 << 18  # bytes that are written again and again


def fields(words: npt.NDArray[Any], bits: int, axis: int, order: Sequence[int] | None = None) -> npt.NDArray[np.uint8]:
    """Cut every word into fields of `bits` bits, which take its place along `axis`.

    Parameters
    ----------
    words : ndarray of integers
        Signed ones are taken as their bits.
    bits : {1, 2, 4, 8}
        Of a field.
    axis : int
        The one that grows.
    order : sequence of int, optional
        Which field of a word comes first, second, ...; the lowest is 0. None means from the lowest up.

    Returns
    -------
    ndarray of uint8
        C-contiguous.
    """
    axis %= words.ndim
    # Bytes of little-endian words are in ascending order of their bits.
    data = np.ascontiguousarray(words, dtype=words.dtype.newbyteorder("<")).view(np.uint8)
    data = data.reshape(*words.shape, words.dtype.itemsize)
    places = range(8 * words.dtype.itemsize // bits) if order is None else order
    found = np.empty((*words.shape[: axis + 1], len(places), *words.shape[axis + 1 :]), np.uint8)
    for place, field in enumerate(places):
        byte, shift = divmod(bits * field, 8)
        np.right_shift(data[..., byte], np.uint8(shift), out=found[(slice(None),) * (axis + 1) + (place,)])
    found &= np.uint8((1 << bits) - 1)
    return found.reshape(*words.shape[:axis], words.shape[axis] * len(places), *words.shape[axis + 1 :])


def stream(words: npt.NDArray[Any], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Take the first `count` fields of each row, which follow each other without gaps, across words where need be.

    Parameters
    ----------
    words : (N, W) ndarray of integers
        Signed ones are taken as their bits.
    bits : int
        Of a field, 1 to 8.
    count : int
        At most those that the words have.

    Returns
    -------
    (N, count) ndarray of uint8
        The lowest bits of the first word come first.
    """
    if 8 % bits == 0:
        return fields(words, bits, axis=1)[:, :count]
    n = len(words)
    data = np.ascontiguousarray(words, dtype=words.dtype.newbyteorder("<")).view(np.uint8)
    # 8 fields take as many bytes as one has bits, and none lies in more than two bytes.
    if data.shape[1] % bits:
        data = np.pad(data, ((0, 0), (0, -data.shape[1] % bits)))
    data = data.reshape(n, -1, bits)
    found = np.empty((n, data.shape[1], 8), np.uint8)
    step = max(1, _CACHED // max(found[:1].size, 1))
    for begin in range(0, n, step):
        rows = slice(begin, begin + step)
        for field in range(8):
            byte, shift = divmod(field * bits, 8)
            part = data[rows, :, byte] >> shift
            if shift + bits > 8:
                part |= data[rows, :, byte + 1] << (8 - shift)
            np.bitwise_and(part, (1 << bits) - 1, out=found[rows, :, field])
    return found.reshape(n, -1)[:, :count]


def check_bits(name: str, bits: Any, allowed: tuple[int, ...]) -> int:
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(bits).__name__}")
    if bits not in allowed:
        raise ValueError(f"{name} must be {one_of(allowed)}, got {bits}")
    return int(bits)


def stored_bits(bits: int) -> int:
    """Of the codes of a packed weight that can hold codes of so many."""
    return 8 if bits == 7 else max(bits, 4)
