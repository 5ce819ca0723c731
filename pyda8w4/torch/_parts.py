"""Which tensors of a checkpoint a model of transformers is made of, and what these are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pyda8w4._packed import PackedWeight
from pyda8w4.checkpoints import Checkpoint
from pyda8w4.formats import QuantizedWeight

# Types of half the size of float32, as safetensors names them.
_STORED = {"F16": torch.float16, "BF16": torch.bfloat16}


class Part(NamedTuple):
    """What becomes a tensor of a model."""

    name: str  # in the checkpoint
    rows: slice | npt.NDArray[np.intp] | None = None  # which of it, in which order; None means all
    minus: float = 0.0
    more: tuple[str, ...] = ()  # stacks whose matrices follow the ones of this stack, along N
    is_row: bool = False  # of a vector, which is the one row of a matrix


class Recipe(NamedTuple):
    """A model, and what its tensors are made of."""

    model: type[Any]  # its class
    config: Any
    parts: dict[str, Part]  # by the name of the tensor, which a quantized matrix has if it is float: "....weight"
    generation: Any = None  # a GenerationConfig


def is_quantized(checkpoint: Checkpoint, name: str) -> bool:
    """Whether it is more than plain numbers in the file."""
    layer = checkpoint._layers[name]
    return layer.read is not None or layer.refusal is not None


def config_of(checkpoint: Checkpoint, cls: type[Any], values: Mapping[str, Any]) -> Any:
    """A config of transformers. ValueError for values that its class, which checks in many ways, does not take."""
    try:
        return cls.from_dict(dict(values))
    except Exception as error:
        raise ValueError(f"{checkpoint.path}: a {cls.__name__} cannot be made of its config: {error}") from None


def packed_part(checkpoint: Checkpoint, part: Part, requantize: bool, index: int | None = None) -> PackedWeight:
    """A matrix, or one of a stack."""
    name, rows = part.name, part.rows
    if rows is None:
        return checkpoint.packed(name, index, requantize=requantize)
    if requantize:
        weight = QuantizedWeight.from_packed(checkpoint.packed(name, index, requantize=True))
    else:
        weight = checkpoint.weight(name, index or 0)
    try:
        return weight.rows(rows).pack()
    except ValueError as error:
        raise checkpoint._refused(f"{name} cannot be packed: {error}") from None


class Floats:
    """A tensor that is read when it is loaded: what transformers needs of a slice of safetensors."""

    def __init__(self, checkpoint: Checkpoint, part: Part) -> None:
        self._checkpoint, self._part = checkpoint, part

    def __getitem__(self, everything: Any) -> torch.Tensor:
        name, rows, minus, more, is_row = self._part
        if more:
            arrays = [self._checkpoint.array(one) for one in (name, *more)]
            return torch.from_numpy(np.concatenate(arrays, axis=1))
        if is_row:
            return torch.from_numpy(self._checkpoint.array(name)[None])
        stored = self._checkpoint._stored(name)
        if stored is not None and stored.dtype in _STORED and not minus:
            # In the type that it has: the largest tensors of many models are embeddings, which stay float.
            array = stored.array()
            array = np.array(array if rows is None else array[rows])
            return torch.from_numpy(array.view(np.int16)).view(_STORED[stored.dtype])
        array = self._checkpoint.array(name)
        if rows is not None:
            array = np.ascontiguousarray(array[rows])
        return torch.from_numpy(array - np.float32(minus) if minus else array)
