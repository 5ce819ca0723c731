"""A layer of a checkpoint: what a format knows of it before it reads the layer, and how it reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4._format import Format
from pyda8w4.formats._weight import QuantizedWeight


@dataclass(frozen=True)
class Layer:
    """A matrix (N, K), a stack of matrices (E, N, K), or any tensor of floats.

    Parameters
    ----------
    type : str
        How it is stored, in a few words: "Q4_K", "GPTQ 4-bit", "BF16".
    shape : tuple of int
        Of the floats that it stands for.
    nbytes : int
        What it takes in the file.
    tensors : tuple of str
        Names of the tensors that it consists of.
    read : callable, optional
        ``read(index)`` gives matrix `index` of the stack, of a matrix itself 0, exactly.
    floats : callable, optional
        ``floats(index)`` gives float32 instead, of what `read` cannot give.
    format : Format, optional
        What a matrix will be when it is packed, as far as its shapes and dtypes tell.
    refusal : str, optional
        Why there is no `read`.
    """

    type: str
    shape: tuple[int, ...]
    nbytes: int
    tensors: tuple[str, ...]
    read: Callable[[int], QuantizedWeight] | None = None
    floats: Callable[[int], npt.NDArray[np.float32]] | None = None
    format: Format | None = None
    refusal: str | None = None

    @property
    def packed_nbytes(self) -> int | None:
        """What it will take when it is packed, where it can be."""
        if self.format is None:
            return None
        one = sum(prod(spec.shape) * spec.dtype.itemsize for spec in self.format.arrays.values())
        return one * (self.shape[0] if len(self.shape) == 3 else 1)


def predicted_format(n: int, k: int, group_size: int, zero_point: int | None, **more: Any) -> Format:
    """The format of a weight whose scales float16 can hold."""
    return Format(n=n, k=k, group_size=group_size, scale_dtype="float16", zero_point=zero_point, **more)
