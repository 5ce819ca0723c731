"""Which tensors of a checkpoint a model of transformers is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyda8w4.checkpoints import Checkpoint


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
