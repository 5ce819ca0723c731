"""Tensors as files have them, made of arrays."""

from pathlib import Path

import ml_dtypes
import numpy as np

from pyda8w4._safetensors import Tensor

TYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "uint32": "U32", "int16": "I16", "int8": "I8", "uint8": "U8", "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip


def stored(arrays):
    """{name: array} -> {name: Tensor}"""
    return {name: tensor(name, array) for name, array in arrays.items()}


def tensor(name, array):
    data = np.frombuffer(array.tobytes(), np.uint8)
    return Tensor(name, Path("model.safetensors"), TYPES[array.dtype.name], array.shape, data)


def checkpoint(modules):
    """{module: {part: array}} -> {name: Tensor}"""
    return stored({f"{module}.{part}": array for module, parts in modules.items() for part, array in parts.items()})


def bfloat16(array):
    return np.asarray(array).astype(ml_dtypes.bfloat16)


def floats(rng, shape, dtype):
    """Numbers of both signs and many sizes, and zeros."""
    numbers = rng.standard_normal(shape) * 2.0 ** rng.integers(-6, 3, shape)
    return np.where(rng.random(shape) < 0.05, 0, numbers).astype(dtype)
