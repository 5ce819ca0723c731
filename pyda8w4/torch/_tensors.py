"""Tensors and numpy arrays over the same memory."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pyda8w4._checks import TYPES
from pyda8w4._format import ArraySpec
from pyda8w4._packed import aligned_empty

# Name, number in the C interface.
FLOATS = {
    torch.float32: ("float32", TYPES["float32"]),
    torch.bfloat16: ("bfloat16", TYPES["bfloat16"]),
    torch.float16: ("float16", TYPES["float16"]),
}
INTEGERS = {torch.uint8: "uint8", torch.int8: "int8"}
DTYPES = {name: dtype for dtype, (name, _) in FLOATS.items()} | {name: dtype for dtype, name in INTEGERS.items()}
DTYPES["int32"] = torch.int32


def check_float(name: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    check_dense(name, tensor)


def check_dense(name: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_cpu or tensor.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor on the CPU, got {tensor.layout} on {tensor.device}")


def check_tensor(name: str, tensor: torch.Tensor, wanted: ArraySpec) -> None:
    """Raise ValueError unless it is such an array."""
    if tensor.dtype is not DTYPES[wanted.type] or tensor.shape != wanted.shape or not tensor.is_cpu:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be {wanted}, got {ArraySpec(tuple(tensor.shape), dtype)} on {tensor.device}")
    check_dense(name, tensor)


def array_of(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Shares memory; bfloat16 as its uint16 bits."""
    if tensor.dtype is not torch.bfloat16:
        array: npt.NDArray[Any] = tensor.detach().numpy()
        return array
    bits: npt.NDArray[Any] = tensor.detach().view(torch.int16).numpy()
    return bits.view(np.uint16)


def tensor_of(array: npt.NDArray[Any], type: str) -> torch.Tensor:
    """Shares memory; of elements of this type, which numpy holds in a type of its own."""
    if type == "bfloat16":
        array = array.view(np.int16)  # torch.from_numpy takes no uint16 before torch 2.3
    with warnings.catch_warnings():
        # Packed arrays are read-only, which tensors cannot be. Nothing here writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ", category=UserWarning)
        tensor = torch.from_numpy(array)
    return tensor.view(DTYPES[type])


def aligned_copy(tensor: torch.Tensor) -> torch.Tensor:
    """In memory as `prepack` allocates it: aligned, in huge pages where it is large."""
    (memory,) = aligned_empty(((tensor.nbytes,), np.uint8))
    copy = torch.from_numpy(memory).view(tensor.dtype).reshape(tensor.shape)
    return copy.copy_(tensor)
