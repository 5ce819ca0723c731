"""Tensors as a checkpoint has them."""

import pathlib

import ml_dtypes
import numpy as np

from pyda8w4._safetensors import Tensor

TYPES = {
    np.dtype(np.float16): "F16", np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.int8): "I8", np.dtype(np.uint8): "U8", np.dtype(np.int32): "I32", np.dtype(np.uint32): "U32",
    np.dtype(np.int64): "I64",
}  # fmt: skip


def stored(**arrays):
    """-> the tensors of a checkpoint, by name; two underscores in a name are a dot."""
    found = {}
    for name, array in arrays.items():
        name = name.replace("__", ".")
        data = np.frombuffer(array.tobytes(), np.uint8)
        found[name] = Tensor(name, pathlib.Path("model.safetensors"), TYPES[array.dtype], array.shape, data)
    return found


def floats(rng, shape, dtype):
    """Numbers of both signs and many sizes, and zeros."""
    numbers = rng.standard_normal(shape) * 2.0 ** rng.integers(-6, 3, shape)
    return np.where(rng.random(shape) < 0.05, 0, numbers).astype(dtype)
