"""The tensors of one layer in a checkpoint: how they are found, checked, named in messages and read."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt

from pyda8w4._checks import as_array_of, one_of
from pyda8w4._safetensors import Tensor
from pyda8w4.formats._layer import Layer

FLOAT_TYPES = ("F32", "F16", "BF16")  # what is read without rounding

# Of words that hold fields; what files have is named as in safetensors files.
WORDS = ("int32", "uint32", "int64", "uint64", "int16", "uint16", "int8", "uint8")
WORD_TYPES = ("I32", "U32", "I64", "U64", "I16", "U16", "I8", "U8")


class Shaped(Protocol):
    """What is checked before it is read: a tensor in a file, or an array."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def itemsize(self) -> int: ...


class Named(NamedTuple):
    """An array, by the name of the argument."""

    name: str
    shape: tuple[int, ...]
    itemsize: int


def named(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Shaped]:
    return {name: Named(name, array.shape, array.itemsize) for name, array in arrays.items()}


def arrays_of(dtypes: tuple[str, ...], **given: npt.ArrayLike | None) -> dict[str, npt.NDArray[Any]]:
    """Those arguments that are not None. TypeError if one is an array of none of these types."""
    return {name: as_array_of(name, value, dtypes)[0] for name, value in given.items() if value is not None}


def check_matrix(part: Shaped) -> tuple[int, int]:
    """-> its shape."""
    if len(part.shape) != 2 or 0 in part.shape:
        raise ValueError(f"{part.name} must be a non-empty matrix, got shape {part.shape}")
    rows, columns = part.shape
    return rows, columns


def check_shape(part: Shaped, wanted: tuple[int, ...], why: str = "") -> None:
    if part.shape != wanted:
        raise ValueError(f"{part.name} must have shape {wanted}{why}, got {part.shape}")


def check_count(part: Shaped, wanted: int) -> None:
    """Whatever its shape."""
    if prod(part.shape) != wanted:
        raise ValueError(
            f"{part.name} must have {'one number' if wanted == 1 else f'{wanted} numbers'}, got shape {part.shape}"
        )


def modules(tensors: Iterable[str], mark: str) -> list[str]:
    """Paths of the modules that have a tensor whose name ends so: those are quantized, whatever a config says."""
    return [name.removesuffix(mark) for name in tensors if name.endswith(mark)]


class Parts:
    """Those of the tensors called `prefix` and one of `names` that a checkpoint has."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, names: Sequence[str]) -> None:
        self._prefix = prefix
        self._parts = {name: tensors[prefix + name] for name in names if prefix + name in tensors}
        self._stack: tuple[int, ...] = ()
        self._index, self._share = 0, False

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def layer(self, type: str, shape: tuple[int, ...], **more: Any) -> Layer:
        """Describe the layer that consists of them."""
        return Layer(type, shape, sum(tensor.nbytes for tensor in self._parts.values()), self.names, **more)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors."""
        return tuple(tensor.name for tensor in self._parts.values())

    def matrix(self, index: int, stack: tuple[int, ...], *, share: bool = False) -> Parts:
        """Those of one matrix, where tensors have `stack` for a first dimension: what is () is a matrix itself.

        `share` allows tensors of one number, which is that of all matrices.
        """
        if 0 in stack:
            raise ValueError("stacks must have matrices, got none")
        found = copy.copy(self)
        found._stack, found._index, found._share = stack, index, share
        return found

    def find(self, name: str, *dtypes: str) -> Tensor | None:
        """-> the tensor, or None. ValueError if it is of none of these types, or no stack where the others are."""
        tensor = self._parts.get(name)
        if tensor is None:
            return None
        if dtypes and tensor.dtype not in dtypes:
            raise ValueError(f"{tensor.name} must be of {one_of(dtypes)}, got {tensor.dtype}")
        if tensor.shape[:1] == self._stack or not self._stack:
            return tensor.part(self._index) if self._stack else tensor
        if not self._share or prod(tensor.shape) != 1:
            raise ValueError(f"{tensor.name} must have {self._stack[0]} matrices, got shape {tensor.shape}")
        return tensor

    def take(self, name: str, *dtypes: str) -> Tensor:
        """-> the tensor. ValueError also if there is none."""
        tensor = self.find(name, *dtypes)
        if tensor is None:
            raise ValueError(f"{self._prefix}{name} is missing")
        return tensor

    def take_all(self, dtypes: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
        """Take those that are named, each of one of its types."""
        return {name: self.take(name, *allowed) for name, allowed in dtypes.items()}


def read_arrays(tensors: Mapping[str, Tensor]) -> dict[str, npt.NDArray[Any]]:
    """Their numbers: bfloat16 as float32."""
    return {name: tensor.floats() if tensor.is_float else tensor.array() for name, tensor in tensors.items()}


def scale_dtype(*tensors: Tensor) -> str:
    """What prepack stores the floats of these tensors as, unless they fit a smaller type."""
    types = {tensor.dtype for tensor in tensors}
    return {"F16": "float16", "BF16": "bfloat16"}.get(types.pop(), "float32") if len(types) == 1 else "float32"


def head(tensor: Tensor) -> Tensor:
    """Some of its first numbers."""
    count = min(prod(tensor.shape), 1024)
    return tensor._replace(shape=(count,), bytes=tensor.bytes[: count * tensor.itemsize])
