"""Argument checks that public functions share. Messages name the argument, what it got and what it takes."""

from __future__ import annotations

from typing import Any

import numpy as np

BLOCK = 32  # columns (n) of one packed block
QUAD = 4  # consecutive k of one packed line

# Element types by name, as the C interface numbers them.
TYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "uint8": 3, "int8": 4}
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int8": 1}
FLOATS = ("float32", "float16", "bfloat16")

# Native dtypes by name, and names by the identity of the dtype, of which numpy has one each and whose hash
# takes longer than all other checks together. ml_dtypes' bfloat16 joins when one is first seen.
_dtypes: dict[str, np.dtype] = {name: np.dtype(name) for name in ("float32", "float16", "uint8", "int8")}
_names: dict[int, str] = {id(dtype): name for name, dtype in _dtypes.items()}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def type_name(dtype: np.dtype) -> str:
    """Name of a native dtype; other byte orders have a name that nothing accepts."""
    name = _names.get(id(dtype))
    if name is None:
        name = dtype.name if dtype.isnative else dtype.str
        if name == "bfloat16":
            _dtypes[name] = dtype  # keeps it, and so its identity
            _names[id(dtype)] = name
    return name


def bfloat16() -> np.dtype:
    """numpy's bfloat16, which the package ml_dtypes defines."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError('bfloat16 arrays need ml_dtypes: pip install "pyda8w4[bfloat16]"') from error
    return np.dtype(ml_dtypes.bfloat16)


def dtype_of(name: str) -> np.dtype:
    return _dtypes[name] if name in _dtypes else bfloat16()


def one_of(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def check_dtype(name: str, array: np.ndarray, allowed: tuple[str, ...]) -> str:
    """-> the name of the array's type."""
    found = type_name(array.dtype)
    if found not in allowed:
        raise TypeError(f"{name} must be an array of {one_of(allowed)}, got {found}")
    return found


def check_shape(name: str, array: np.ndarray, *shapes: tuple[int, ...]) -> None:
    if array.shape not in shapes:
        takes = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{name} must have shape {takes}, got {array.shape}")


def as_array(name: str, value: Any) -> np.ndarray:
    """Any array-like that is not a bare Python number or text."""
    try:
        array = value if type(value) is np.ndarray else np.asarray(value)
    except ValueError as error:  # nested sequences of different lengths
        raise ValueError(f"{name} must be an array: {error}") from None
    if array.dtype == object:
        raise TypeError(f"{name} must be a numeric array, got {type(value).__name__}")
    return array


def as_array_of(name: str, value: Any, allowed: tuple[str, ...]) -> tuple[np.ndarray, str]:
    """-> an array of one of these types, and its type."""
    if type(value) is np.ndarray:  # without the function calls: this takes as long as a small product
        found = _names.get(id(value.dtype))
        if found in allowed:
            return value, found  # type: ignore[return-value]
    array = as_array(name, value)
    return array, check_dtype(name, array, allowed)


def plain(array: np.ndarray) -> np.ndarray:
    """C-contiguous and aligned, as C and C++ want it."""
    array = np.ascontiguousarray(array)
    return array if array.flags.aligned else array.copy()


def raw(array: np.ndarray, type_name: str) -> np.ndarray:
    """Plain, and without bfloat16, which has no buffer protocol."""
    array = plain(array)
    return array.view(np.uint16) if type_name == "bfloat16" else array


def check_group_size(value: Any, k: int) -> int:
    """-> the group size, at most K: a multiple of 4, or K."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"group_size must be an int, got {type(value).__name__}")
    group = min(int(value), k)
    if group < 1 or (group % QUAD and group != k):
        raise ValueError(f"group_size must be a multiple of 4, or K = {k}, got {value}")
    return group


def check_flag(name: str, value: Any) -> bool:
    if value is True or value is False:
        return value
    if not isinstance(value, np.bool_):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return bool(value)
