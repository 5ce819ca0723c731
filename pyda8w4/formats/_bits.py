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
    size = words.dtype.itemsize
    # Bytes of little-endian words are in ascending order of their bits.
    data = np.ascontiguousarray(words, dtype=words.dtype.newbyteorder("<")).view(np.uint8)
    data = data.reshape(*words.shape, size)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    found = data[..., None] >> shifts & np.uint8((1 << bits) - 1)
    found = found.reshape(*words.shape, size * len(shifts))
    if order is not None:
        found = found[..., list(order)]
    count = found.shape[-1]
    found = np.moveaxis(found, -1, axis + 1)
    shape = (*words.shape[:axis], words.shape[axis] * count, *words.shape[axis + 1 :])
    return np.ascontiguousarray(found.reshape(shape))
