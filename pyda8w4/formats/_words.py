"""What GPTQ and AWQ have in common: modules of words that hold codes, scales, and words that hold zero points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import as_array, ceil_div, one_of
from pyda8w4._safetensors import Tensor

# What can be read without rounding.
_FLOATS = ("F32", "F16", "BF16")


def modules(tensors: Iterable[str], words: str = "qweight") -> list[str]:
    """Paths of the modules that have words of codes: those are quantized, whatever a config says."""
    return [name.removesuffix(f".{words}") for name in tensors if name.endswith(f".{words}")]


def parts(module: str, tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Those of these tensors that the module has."""
    return {name: tensors[f"{module}.{name}"] for name in names if f"{module}.{name}" in tensors}


class Described(TypedDict):
    """What a layer is, whether it can be read or not."""

    type: str
    nbytes: int
    tensors: tuple[str, ...]


def described(type: str, found: Mapping[str, Tensor]) -> Described:
    return {
        "type": type,
        "nbytes": sum(tensor.nbytes for tensor in found.values()),
        "tensors": tuple(tensor.name for tensor in found.values()),
    }


def joined(module: str, name: str) -> str:
    """The name of a tensor in messages."""
    return f"{module}.{name}" if module else name


class Words(NamedTuple):
    """What can be said of words before they are read."""

    shape: tuple[int, ...]
    bits: int  # of a word

    @staticmethod
    def of(array: npt.NDArray[Any]) -> Words:
        return Words(array.shape, 8 * array.dtype.itemsize)

    @staticmethod
    def in_file(tensor: Tensor) -> Words:
        kind, bits = tensor.dtype[0], tensor.dtype[1:]
        if kind not in "IU" or not bits.isdecimal():
            raise ValueError(f"{tensor.name} must be of integers, got {tensor.dtype}")
        return Words(tensor.shape, int(bits))


def floats_in_file(module: str, found: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """-> the shape of a tensor of floats."""
    if name not in found:
        raise ValueError(f"{module}.{name} is missing")
    if found[name].dtype not in _FLOATS:
        raise ValueError(f"{module}.{name} must be of {', '.join(_FLOATS)}, got {found[name].dtype}")
    return found[name].shape


def as_words(name: str, value: npt.ArrayLike) -> npt.NDArray[Any]:
    words = as_array(name, value)
    if words.dtype.kind not in "iu":
        raise TypeError(f"{name} must be an array of integers, got {words.dtype}")
    return words


def check_matrix(name: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{name} must be a non-empty matrix, got shape {shape}")


def check_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...], why: str) -> None:
    if shape != wanted:
        raise ValueError(f"{name} must have shape {wanted} for {why}, got {shape}")


def check_bits(bits: Any, allowed: tuple[int, ...]) -> None:
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)):
        raise TypeError(f"bits must be an int, got {type(bits).__name__}")
    if bits not in allowed:
        raise ValueError(f"bits must be {one_of(allowed)}, got {bits}")


def group_of(group_size: Any, k: int) -> tuple[int, int]:
    """-> the size of groups, at most K, and how many there are. -1 means K."""
    if isinstance(group_size, bool) or not isinstance(group_size, (int, np.integer)):
        raise TypeError(f"group_size must be an int, got {type(group_size).__name__}")
    if group_size < 1 and group_size != -1:
        raise ValueError(f"group_size must be positive, or -1 for one group, got {group_size}")
    group = k if group_size == -1 else min(int(group_size), k)
    return group, ceil_div(k, group)
