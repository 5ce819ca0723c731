"""A layer of a checkpoint: what a format knows of it before it reads the layer, and how it reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from pyda8w4._experts import PackedExperts
from pyda8w4._format import Format
from pyda8w4._packed import PackedWeight
from pyda8w4._quantized import QuantizedWeight
from pyda8w4._safetensors import Tensor


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
    stored : Tensor, optional
        Itself as it is in the file, where safetensors has its type.
    verify : callable, optional
        Raises ValueError unless `stored` has its checksum, where the file has one.
    packed : callable, optional
        Gives all of it packed, where the file has it so.
    read_rows : callable, optional
        ``read_rows(index, rows)`` gives some output features of what `read` gives; packed, all slices have one format.
    """

    type: str
    shape: tuple[int, ...]
    nbytes: int
    tensors: tuple[str, ...]
    read: Callable[[int], QuantizedWeight] | None = None
    floats: Callable[[int], npt.NDArray[np.float32]] | None = None
    format: Format | None = None
    refusal: str | None = None
    stored: Tensor | None = None
    verify: Callable[[], None] | None = None
    packed: Callable[[], PackedWeight | PackedExperts] | None = None
    read_rows: Callable[[int, slice], QuantizedWeight] | None = None

    @property
    def is_stack(self) -> bool:
        """Whether it is several matrices."""
        return len(self.shape) == 3

    @property
    def refused(self) -> str | None:
        """Why it can neither be packed exactly nor stay as it is, where it cannot.

        Floats stay, and so do quantized tensors that are no matrices.
        """
        if self.read is not None or self.stored is not None:
            return None
        if self.floats is not None and (self.refusal is None or len(self.shape) not in (2, 3)):
            return None
        return self.refusal or "its elements are no floats"

    @property
    def packed_nbytes(self) -> int | None:
        """What it will take when it is packed, where it can be."""
        if self.packed is not None:
            return self.nbytes
        if self.format is None:
            return None
        return self.format.nbytes * (self.shape[0] if self.is_stack else 1)


def packed_layer(
    type: str, format: Format, tensors: tuple[str, ...], packed: Callable[[], PackedWeight | PackedExperts]
) -> Layer:
    """A packed weight, or experts, in a file."""

    def read(index: int) -> QuantizedWeight:
        return QuantizedWeight.from_packed(matrix_of(packed(), index))

    return Layer(type, format.shape, format.nbytes, tensors, read=read, format=format.of_each, packed=packed)


def matrix_of(packed: PackedWeight | PackedExperts, index: int) -> PackedWeight:
    """That of an expert, or the weight itself."""
    return packed[index] if isinstance(packed, PackedExperts) else packed


def plain_layer(tensor: Tensor) -> Layer:
    """A tensor of floats, or of integers that are no weights."""
    floats = partial(_floats, tensor) if tensor.is_float else None
    return Layer(tensor.dtype, tensor.shape, tensor.nbytes, (tensor.name,), floats=floats, stored=tensor)


def _floats(tensor: Tensor, index: int) -> npt.NDArray[np.float32]:
    floats = tensor.part(index) if len(tensor.shape) == 3 else tensor
    return floats.floats().astype(np.float32, copy=False)
