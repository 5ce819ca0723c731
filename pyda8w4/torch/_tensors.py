"""Tensors and numpy arrays over the same memory."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from pyda8w4._checks import TYPES
from pyda8w4._packed import aligned_empty

# Name, number in the C interface, bytes.
FLOATS = {
    torch.float32: ("float32", TYPES["float32"], 4),
    torch.bfloat16: ("bfloat16", TYPES["bfloat16"], 2),
    torch.float16: ("float16", TYPES["float16"], 2),
}


def check_float(name: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor on the CPU, got {tensor.layout} on {tensor.device}")


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """Shares memory; bfloat16 as its uint16 bits."""
    if tensor.dtype is torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().view(np.uint16)
    return tensor.detach().numpy()


def tensor_of(array: np.ndarray, bfloat16: bool = False) -> torch.Tensor:
    """Shares memory; an array of uint16 as bfloat16 where that is what it holds."""
    if bfloat16:
        array = array.view(np.int16)
    with warnings.catch_warnings():
        # Packed arrays are read-only, which tensors cannot be. Nothing here writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ", category=UserWarning)
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if bfloat16 else tensor


def aligned_copy(tensor: torch.Tensor) -> torch.Tensor:
    """In memory as `prepack` allocates it: aligned, in huge pages where it is large."""
    (memory,) = aligned_empty(((tensor.nbytes,), np.uint8))
    copy = torch.from_numpy(memory).view(tensor.dtype).reshape(tensor.shape)
    return copy.copy_(tensor)
