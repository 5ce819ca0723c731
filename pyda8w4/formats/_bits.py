"""Small fields in larger words, as formats pack codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


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
