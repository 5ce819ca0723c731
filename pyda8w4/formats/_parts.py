"""The tensors of one layer in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from pyda8w4._checks import one_of
from pyda8w4._safetensors import Tensor

FLOAT_TYPES = ("F16", "BF16", "F32")


class Parts:
    """Those of the tensors called `prefix` and one of `names` that a checkpoint has."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, names: Sequence[str]) -> None:
        self._parts = {name: tensors[prefix + name] for name in names if prefix + name in tensors}

    @property
    def tensors(self) -> tuple[str, ...]:
        """Their names in the checkpoint."""
        return tuple(tensor.name for tensor in self._parts.values())

    @property
    def nbytes(self) -> int:
        """What they take in the file."""
        return sum(tensor.nbytes for tensor in self._parts.values())

    def find(self, name: str, *dtypes: str) -> Tensor | None:
        """-> the tensor, or None. ValueError if it is of none of these types."""
        tensor = self._parts.get(name)
        if tensor is not None and dtypes and tensor.dtype not in dtypes:
            raise ValueError(f"{name} must be of {one_of(dtypes)}, got {tensor.dtype}")
        return tensor

    def take(self, name: str, *dtypes: str) -> Tensor:
        """-> the tensor. ValueError if there is none, or it is of none of these types."""
        tensor = self.find(name, *dtypes)
        if tensor is None:
            raise ValueError(f"{name} is missing")
        return tensor

    def part(self, index: int, count: int) -> Parts:
        """Those of one of `count` matrices in stacks. ValueError if one is no such stack."""
        if not count:
            raise ValueError("stacks must have matrices, got none")
        found = Parts({}, "", ())
        for name, tensor in self._parts.items():
            if tensor.shape[:1] != (count,):
                raise ValueError(f"{name} must have {count} matrices, got shape {tensor.shape}")
            found._parts[name] = tensor.part(index)
        return found


def scale_dtype(*tensors: Tensor) -> str:
    """What prepack stores the floats of these tensors as, unless they fit a smaller type."""
    types = {tensor.dtype for tensor in tensors}
    return {"F16": "float16", "BF16": "bfloat16"}.get(types.pop(), "float32") if len(types) == 1 else "float32"


def head(tensor: Tensor) -> Tensor:
    """Some of its first numbers."""
    count = min(prod(tensor.shape), 1024)
    size = tensor.nbytes // max(prod(tensor.shape), 1)
    return tensor._replace(shape=(count,), bytes=tensor.bytes[: count * size])
