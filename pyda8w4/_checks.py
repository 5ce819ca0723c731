"""Argument checks that public functions share. Messages name the argument, what it got and what it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4 import _advice

# Element types by name, as the C interface numbers them.
TYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "uint8": 3, "int8": 4}
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int8": 1}
FLOATS = ("float32", "float16", "bfloat16")
INTEGERS = ("uint8", "int8")

# Schemes of activations by name, as the C interface numbers them.
SCHEMES = {"uint8": 0, "int8": 1, "int8_group": 2, "int16": 3}

# Functions of gates by name, as the C interface numbers them.
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "swigluoai": 3}

_MOST_FLOAT32 = float(np.finfo(np.float32).max)

# Native dtypes by name, and names by the identity of the dtype, of which numpy has one each and whose hash
# takes longer than all other checks together. ml_dtypes' bfloat16 joins when one is first seen.
_dtypes: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in ("float32", "float16", "uint8", "int8")}
_names: dict[int, str] = {id(dtype): name for name, dtype in _dtypes.items()}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def type_name(dtype: np.dtype[Any]) -> str:
    """Name of a native dtype; other byte orders have a name that nothing accepts."""
    name = _names.get(id(dtype))
    if name is None:
        name = dtype.name if dtype.isnative else dtype.str
        if name == "bfloat16":
            _dtypes[name] = dtype  # keeps it, and so its identity
            _names[id(dtype)] = name
    return name


def bfloat16() -> np.dtype[Any]:
    """numpy's bfloat16, which the package ml_dtypes defines."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError('bfloat16 arrays need ml_dtypes: pip install "pyda8w4[bfloat16]"') from error
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def dtype_of(name: str) -> np.dtype[Any]:
    return _dtypes[name] if name in _dtypes else bfloat16()


def one_of(values: tuple[Any, ...]) -> str:
    names = list(map(str, values))
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def wrong_type(name: str, allowed: tuple[str, ...], found: str, value: Any = None) -> TypeError:
    """`value` is what was given, where it need not be an array."""
    if isinstance(value, (str, bytes)):
        got = type(value).__name__
    elif value is None or hasattr(value, "dtype"):
        got = found
    else:
        got = f"{type(value).__name__}, which numpy makes {found}"
    return TypeError(
        f"{name} must be an array of {one_of(allowed)}, got {got}{_advice.for_dtype(name, found, allowed)}"
    )


def check_dtype(name: str, array: npt.NDArray[Any], allowed: tuple[str, ...], value: Any = None) -> str:
    """-> the name of the array's type."""
    found = type_name(array.dtype)
    if found not in allowed:
        raise wrong_type(name, allowed, found, value)
    return found


def check_shape(name: str, array: npt.NDArray[Any], *shapes: tuple[int, ...]) -> None:
    if array.shape not in shapes:
        takes = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
        hint = _advice.for_transposed(name, array.shape, *shapes)
        raise ValueError(f"{name} must have shape {takes}, got {array.shape}{hint}")


def as_array(name: str, value: npt.ArrayLike) -> npt.NDArray[Any]:
    """Any array-like that is not a bare Python number or text."""
    try:
        array = value if type(value) is np.ndarray else np.asarray(value)
    except ValueError as error:  # nested sequences of different lengths
        why = str(error).rstrip(".")
        hint = _advice.for_array(name, value)
        raise ValueError(f"{name} must be an array, got {type(value).__name__}: {why}{hint}") from None
    except MemoryError:
        raise
    except Exception as error:  # whatever __array__ raises, such as torch for types that numpy lacks, or gradients
        hint = _advice.for_array(name, value)
        why = str(error).rstrip(".")
        raise TypeError(f"{name} must be an array, got {type(value).__name__}: {why}{hint}") from None
    if array.dtype == object:
        got = "an array of objects" if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{name} must be a numeric array, got {got}{_advice.for_array(name, value)}")
    return array


def as_array_of(name: str, value: npt.ArrayLike, allowed: tuple[str, ...]) -> tuple[npt.NDArray[Any], str]:
    """-> an array of one of these types, and its type."""
    if type(value) is np.ndarray:  # without the function calls: this takes as long as a small product
        found = _names.get(id(value.dtype))
        if found in allowed:
            return value, found
    array = as_array(name, value)
    if "float32" in allowed and type_name(array.dtype) not in allowed:
        array = _of_list(array, value, "float32")
    return array, check_dtype(name, array, allowed, value)


def _of_list(array: npt.NDArray[Any], value: npt.ArrayLike, dtype: str) -> npt.NDArray[Any]:
    """With the numbers of a list or tuple in the type that is wanted, where they have one in it.

    Numbers of Python have no type that anybody chose, so they take this one, as in numpy's own arithmetic. What has a
    dtype keeps it: an array of float64 is refused, since its conversion can cost more than the product.
    """
    if not isinstance(value, (list, tuple)) or array.dtype.kind not in ("iuf" if dtype == "float32" else "iu"):
        return array
    if _has_dtype(value):
        return array
    with np.errstate(over="ignore"):
        of_type = array.astype(dtype)
    fits = np.isfinite(of_type) == np.isfinite(array) if dtype == "float32" else of_type == array
    return of_type if np.all(fits) else array


def _has_dtype(value: Any) -> bool:
    """Whether a list or tuple holds an array or a number of numpy."""
    return any(_has_dtype(each) if isinstance(each, (list, tuple)) else hasattr(each, "dtype") for each in value)


def plain(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """C-contiguous and aligned, as C and C++ want it."""
    array = np.ascontiguousarray(array)
    return array if array.flags.aligned else array.copy()


def bits(array: npt.NDArray[Any], type_name: str) -> npt.NDArray[Any]:
    """With a buffer, which bfloat16 has not."""
    return array.view(np.uint16) if type_name == "bfloat16" else array


def as_float32(array: npt.NDArray[Any], type_name: str) -> npt.NDArray[np.float32]:
    """A copy of floats that are held as `bits` gives them."""
    if type_name == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def check_scheme(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value in allowed and type(value) is str:
        return value
    takes = one_of(tuple(map(repr, allowed)))
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {takes}, got {type(value).__name__}")
    raise ValueError(f"{name} must be {takes}, got {value!r}")


def check_flag(name: str, value: Any) -> bool:
    if value is True or value is False:
        return value
    if not isinstance(value, np.bool_):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return bool(value)


def check_number(name: str, value: Any) -> float:
    """-> a number that float32 holds, up to its rounding."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -_MOST_FLOAT32 <= value <= _MOST_FLOAT32:
        raise ValueError(f"{name} must be finite in float32, got {value}")
    return float(value)


def operand(name: str, value: npt.ArrayLike, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    array = as_array(name, value)
    if array.dtype != dtype:
        array = _of_list(array, value, dtype)
    if array.dtype != dtype:
        raise wrong_type(name, (dtype,), str(array.dtype), value)
    check_shape(name, array, shape)
    return plain(array)


def output(
    out: npt.NDArray[Any] | None, out_dtype: npt.DTypeLike | None, default: str, shape: tuple[int, ...]
) -> tuple[npt.NDArray[Any], str]:
    """-> where to put the result, and its type."""
    if out is None:
        name = default if out_dtype is None else _out_type(out_dtype)
        return np.empty(shape, dtype_of(name)), name
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be an ndarray, got {type(out).__name__}{_advice.for_out(out)}")
    name = check_dtype("out", out, FLOATS if out_dtype is None else (_out_type(out_dtype),))
    check_shape("out", out, shape)
    flags = out.flags
    if not flags.c_contiguous:
        raise ValueError("out must be C-contiguous, got an array with other strides")
    if not flags.aligned:
        raise ValueError(f"out must be aligned to its {out.itemsize} bytes, got an array that is not")
    if not flags.writeable:
        raise ValueError("out must be writable, got a read-only array")
    return out, name


def _out_type(out_dtype: npt.DTypeLike) -> str:
    if isinstance(out_dtype, str) and out_dtype == "bfloat16":
        return out_dtype
    try:
        name = type_name(np.dtype(out_dtype))
    except (TypeError, ValueError):
        raise TypeError(f"out_dtype must be {one_of(FLOATS)}, as numpy has it or as a str, got {out_dtype!r}") from None
    if name not in FLOATS:
        raise TypeError(f"out_dtype must be {one_of(FLOATS)}, got {name}")
    return name
