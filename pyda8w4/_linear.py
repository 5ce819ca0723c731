"""The products."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from pyda8w4 import _core
from pyda8w4._checks import (
    FLOATS,
    SIZES,
    TYPES,
    as_array,
    as_array_of,
    check_dtype,
    check_flag,
    check_shape,
    dtype_of,
    one_of,
    plain,
    raw,
    type_name,
)
from pyda8w4._packed import PackedWeight
from pyda8w4._runtime import forced_kernel, translate


def gemm(
    a: np.ndarray,
    packed: PackedWeight,
    a_scales: np.ndarray | None = None,
    a_zps: np.ndarray | None = None,
    *,
    bias: np.ndarray | None = None,
    out: np.ndarray | None = None,
    out_dtype: Any = None,
) -> np.ndarray:
    """Multiply quantized activations by a packed weight.

    Parameters
    ----------
    a : (..., K) ndarray of uint8 or int8
        All dimensions but the last are rows; there may be none, or no rows.
    packed : PackedWeight
        Of shape (N, K).
    a_scales : (...) ndarray of float32, optional
        One per row. None means 1.
    a_zps : (...) ndarray of int32, optional
        One per row, in the range of `a`'s type. None means 0.
    bias : (N,) ndarray of float32, optional
    out : (..., N) ndarray of float32, float16 or bfloat16, optional
        Where to put the result; C-contiguous, aligned, and apart from the inputs.
    out_dtype : dtype-like, optional
        float32, float16 or bfloat16; that of `out`, else float32.

    Returns
    -------
    (..., N) ndarray
        `out`, or a new array.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If shapes do not fit, a zero point is out of range, or `out` cannot be written as it is.
        Nothing has been written then.

    Notes
    -----
    ``y[m, n] = a_scales[m] * sum_k (a[m, k] - a_zps[m]) * w[n, k] + bias[n]``, where
    ``w[n, k] = (w_int4[n, k] - zps[n, g]) * scales[n, g] + offsets[n, g]``, with integer sums within
    groups that are exact and one fixed order of float operations (docs/numbers.md): the same bits from
    every kernel, number of rows and number of threads.

    Examples
    --------
    >>> import numpy as np
    >>> import pyda8w4
    >>> packed = pyda8w4.prepack(np.array([[9, 9, 10, 7]], np.uint8), np.array([0.5], np.float32))
    >>> pyda8w4.gemm(np.array([[1, 2, 3, 4]], np.uint8), packed)
    array([[2.5]], dtype=float32)
    """
    a, a_type = as_array_of("a", a, ("uint8", "int8"))
    rows = _check_rows("a", a, packed)
    if a_scales is not None:
        a_scales = _check_operand("a_scales", a_scales, "float32", rows)
    if a_zps is not None:
        a_zps = _check_operand("a_zps", a_zps, "int32", rows)
    return _multiply(False, a, a_type, rows, a_scales, a_zps, False, packed, bias, out, out_dtype, "float32")


def linear(
    x: np.ndarray,
    packed: PackedWeight,
    bias: np.ndarray | None = None,
    *,
    symmetric: bool = False,
    out: np.ndarray | None = None,
    out_dtype: Any = None,
) -> np.ndarray:
    """Quantize activations and multiply them by a packed weight, in one call.

    Parameters
    ----------
    x : (..., K) ndarray of float32, float16 or bfloat16
        All dimensions but the last are rows; there may be none, or no rows.
    packed : PackedWeight
        Of shape (N, K).
    bias : (N,) ndarray of float32, optional
    symmetric : bool
        Quantize to int8 instead of uint8, see `quantize_activation`.
    out : (..., N) ndarray of float32, float16 or bfloat16, optional
        Where to put the result; C-contiguous, aligned, and apart from the inputs.
    out_dtype : dtype-like, optional
        float32, float16 or bfloat16; that of `out`, else that of `x`.

    Returns
    -------
    (..., N) ndarray
        `out`, or a new array. The same bits as `quantize_activation` followed by `gemm`.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If shapes do not fit, or `out` cannot be written as it is. Nothing has been written then.

    Examples
    --------
    >>> import numpy as np
    >>> import pyda8w4
    >>> packed = pyda8w4.prepack(np.array([[9, 9, 10, 7]], np.uint8), np.array([0.5], np.float32))
    >>> pyda8w4.linear(np.array([0.0, 0.0, 25.5, 0.0], np.float32), packed)
    array([25.5], dtype=float32)
    """
    x, x_type = as_array_of("x", x, FLOATS)
    rows = _check_rows("x", x, packed)
    symmetric = check_flag("symmetric", symmetric)
    return _multiply(True, x, x_type, rows, None, None, symmetric, packed, bias, out, out_dtype, x_type)


def _check_rows(name: str, act: np.ndarray, packed: PackedWeight) -> tuple[int, ...]:
    if type(packed) is not PackedWeight:
        raise TypeError(f"packed must be a PackedWeight, got {type(packed).__name__}")
    shape = act.shape
    if not shape or shape[-1] != packed.shape[1]:
        raise ValueError(
            f"{name} must have shape (..., {packed.shape[1]}) for packed of shape {packed.shape}, got {shape}"
        )
    return shape[:-1]


def _check_operand(name: str, value: Any, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    array = as_array(name, value)
    if array.dtype != dtype:
        raise TypeError(f"{name} must be an array of {dtype}, got {array.dtype}")
    check_shape(name, array, shape)
    return plain(array)


def _out_type(out: np.ndarray | None, out_dtype: Any, default: str) -> str:
    if out is not None and not isinstance(out, np.ndarray):
        raise TypeError(f"out must be an ndarray, got {type(out).__name__}")
    if out_dtype is None:
        return default if out is None else check_dtype("out", out, FLOATS)
    if isinstance(out_dtype, str) and out_dtype == "bfloat16":
        name = out_dtype
    else:
        try:
            name = type_name(np.dtype(out_dtype))
        except (TypeError, ValueError):
            raise TypeError(f"out_dtype must be {one_of(FLOATS)}, got {out_dtype!r}") from None
    if name not in FLOATS:
        raise TypeError(f"out_dtype must be {one_of(FLOATS)}, got {name}")
    if out is not None:
        check_dtype("out", out, (name,))
    return name


def _multiply(
    quantize: bool,
    act: np.ndarray,
    act_type: str,
    rows: tuple[int, ...],
    a_scales: np.ndarray | None,
    a_zps: np.ndarray | None,
    symmetric: bool,
    packed: PackedWeight,
    bias: np.ndarray | None,
    out: np.ndarray | None,
    out_dtype: Any,
    default: str,
) -> np.ndarray:
    n, k = packed.shape
    if bias is not None:
        bias = _check_operand("bias", bias, "float32", (n,))
    out_type = _out_type(out, out_dtype, default)
    if out is None:
        out = np.empty((*rows, n), dtype_of(out_type))
    else:
        _check_out(out, (*rows, n), (act, a_scales, a_zps, bias), packed)
    try:
        _core.multiply(
            quantize, prod(rows), raw(act, act_type), TYPES[act_type], SIZES[act_type] * k, a_scales, a_zps, symmetric,
            packed._view, bias, raw(out, out_type), TYPES[out_type], SIZES[out_type] * n, forced_kernel(),
        )  # fmt: skip
    except _core.CoreError as error:
        if error.args[0] == "BAD_ACT_ZP" and a_zps is not None:
            takes = "0 to 255" if act_type == "uint8" else "-128 to 127"
            raise ValueError(
                f"a_zps must be {takes} for {act_type} activations, got {a_zps.min()} to {a_zps.max()}"
            ) from None
        raise translate(error) from None
    return out


def _check_out(
    out: np.ndarray, shape: tuple[int, ...], inputs: tuple[np.ndarray | None, ...], packed: PackedWeight
) -> None:
    check_shape("out", out, shape)
    if not out.flags.c_contiguous:
        raise ValueError("out must be C-contiguous, got an array with other strides")
    if not out.flags.aligned:
        raise ValueError(f"out must be aligned to its {out.itemsize} bytes, got an array that is not")
    if not out.flags.writeable:
        raise ValueError("out must be writable, got a read-only array")
    overlap = packed._view.overlaps(raw(out, type_name(out.dtype)))
    for array in inputs:
        overlap = overlap or (array is not None and np.may_share_memory(out, array))
    if overlap:
        raise ValueError("out must not overlap the inputs, got memory that does")
