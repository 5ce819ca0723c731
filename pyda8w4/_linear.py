"""The products."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import (
    FLOATS,
    SCHEMES,
    TYPES,
    as_array,
    as_array_of,
    bits,
    check_dtype,
    check_scheme,
    check_shape,
    dtype_of,
    one_of,
    plain,
    type_name,
    wrong_type,
)
from pyda8w4._core import CoreError
from pyda8w4._packed import PackedWeight
from pyda8w4._runtime import forced_kernel, translate

_SCHEMES = tuple(SCHEMES)


def gemm(
    a: npt.ArrayLike,
    packed: PackedWeight,
    a_scales: npt.ArrayLike | None = None,
    a_zps: npt.ArrayLike | None = None,
    *,
    bias: npt.ArrayLike | None = None,
    out: npt.NDArray[Any] | None = None,
    out_dtype: npt.DTypeLike | None = None,
) -> npt.NDArray[Any]:
    """Multiply quantized activations by a packed weight.

    Parameters
    ----------
    a : (..., K) ndarray of uint8 or int8
        All dimensions but the last are rows; there may be none, or no rows.
    packed : PackedWeight
        Of shape (N, K), and without factors.
    a_scales : (...) ndarray of float32, optional
        One per row. None means 1.
    a_zps : (...) ndarray of int32, optional
        One per row, in the range of `a`'s type. None means 0.
    bias : (N,) ndarray of float32, optional
        Added to each row of the result.
    out : (..., N) ndarray of float32, float16 or bfloat16, optional
        Where to put the result; C-contiguous, aligned, and apart from the inputs.
    out_dtype : dtype-like, optional
        One of float32, float16 and bfloat16; that of `out`, else float32.

    Returns
    -------
    (..., N) ndarray
        `out`, or a new array.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If shapes do not fit, a zero point is out of range, `packed` has factors (which are for activations
        that are still float), or `out` cannot be written as it is. Nothing has been written then.

    Notes
    -----
    ``y[m, n] = a_scales[m] * sum_k (a[m, k] - a_zps[m]) * w[n, k] + bias[n]``, where
    ``w[n, k] = (codes[n, k] - zps[n, g]) * scales[n, g] + offsets[n, g]``, with integer sums within
    groups that are exact and one fixed order of float operations (docs/numbers.md): the same bits from
    every kernel, number of rows and number of threads. Where the weight has a permutation, ``a[m, perm[k]]``
    takes the place of ``a[m, k]``.

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
    scales = None if a_scales is None else _operand("a_scales", a_scales, "float32", rows)
    zps = None if a_zps is None else _operand("a_zps", a_zps, "int32", rows)
    n = packed._format.n
    bias = None if bias is None else _operand("bias", bias, "float32", (n,))
    out, out_type = _output(out, out_dtype, "float32", (*rows, n))
    try:
        packed._view.gemm(
            m=prod(rows),
            a=plain(a),
            a_type=TYPES[a_type],
            a_scales=scales,
            a_zps=zps,
            bias=bias,
            out=bits(out, out_type),
            out_type=TYPES[out_type],
            kernel=forced_kernel(),
        )
    except CoreError as error:
        if error.args[0] == "BAD_ACT_ZP" and zps is not None:
            takes = "0 to 255" if a_type == "uint8" else "-128 to 127"
            raise ValueError(
                f"a_zps must be {takes} for {a_type} activations, got {zps.min()} to {zps.max()}"
            ) from None
        if error.args[0] == "FACTORS_NEED_FLOATS":
            raise ValueError(
                "packed must have no factors for activations that are quantized already, got one that has: use linear"
            ) from None
        raise translate(error) from None
    return out


def linear(
    x: npt.ArrayLike,
    packed: PackedWeight,
    bias: npt.ArrayLike | None = None,
    *,
    act: str = "uint8",
    out: npt.NDArray[Any] | None = None,
    out_dtype: npt.DTypeLike | None = None,
) -> npt.NDArray[Any]:
    """Quantize activations and multiply them by a packed weight, in one call.

    Parameters
    ----------
    x : (..., K) ndarray of float32, float16 or bfloat16
        All dimensions but the last are rows; there may be none, or no rows.
    packed : PackedWeight
        Of shape (N, K).
    bias : (N,) ndarray of float32, optional
        Added to each row of the result.
    act : {'uint8', 'int8', 'int8_group', 'int16'}
        To what `x` is quantized. ``uint8`` and ``int8``: with one scale for each row, see
        `quantize_activation`. ``int8_group``: with a scale for each row and each group of the weight, so that
        a large value costs the others of its group, not of the row, their precision. ``int16``: nearly as good
        as float, at up to twice the time where rows are many.
    out : (..., N) ndarray of float32, float16 or bfloat16, optional
        Where to put the result; C-contiguous, aligned, and apart from the inputs.
    out_dtype : dtype-like, optional
        One of float32, float16 and bfloat16; that of `out`, else that of `x`.

    Returns
    -------
    (..., N) ndarray
        `out`, or a new array. With ``uint8`` and ``int8``, and a weight without factors, the same bits as
        `quantize_activation` followed by `gemm`.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If shapes do not fit, there is no such scheme, or `out` cannot be written as it is. Nothing has been
        written then.

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
    act = check_scheme("act", act, _SCHEMES)
    n = packed._format.n
    bias = None if bias is None else _operand("bias", bias, "float32", (n,))
    out, out_type = _output(out, out_dtype, x_type, (*rows, n))
    try:
        packed._view.linear(
            m=prod(rows),
            x=bits(plain(x), x_type),
            x_type=TYPES[x_type],
            scheme=SCHEMES[act],
            bias=bias,
            out=bits(out, out_type),
            out_type=TYPES[out_type],
            kernel=forced_kernel(),
        )
    except CoreError as error:
        raise translate(error) from None
    return out


def _check_rows(name: str, act: npt.NDArray[Any], packed: PackedWeight) -> tuple[int, ...]:
    if type(packed) is not PackedWeight:
        raise TypeError(f"packed must be a PackedWeight, got {type(packed).__name__}")
    shape, k = act.shape, packed._format.k
    if not shape or shape[-1] != k:
        raise ValueError(f"{name} must have shape (..., {k}) for packed of shape {packed.shape}, got {shape}")
    return shape[:-1]


def _operand(name: str, value: npt.ArrayLike, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    array = as_array(name, value)
    if array.dtype != dtype:
        raise wrong_type(name, (dtype,), str(array.dtype), value)
    check_shape(name, array, shape)
    return plain(array)


def _output(
    out: npt.NDArray[Any] | None, out_dtype: npt.DTypeLike | None, default: str, shape: tuple[int, ...]
) -> tuple[npt.NDArray[Any], str]:
    """-> where to put the result, and its type."""
    if out is None:
        name = default if out_dtype is None else _out_type(out_dtype)
        return np.empty(shape, dtype_of(name)), name
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be an ndarray, got {type(out).__name__}")
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
        raise TypeError(f"out_dtype must be {one_of(FLOATS)}, got {out_dtype!r}") from None
    if name not in FLOATS:
        raise TypeError(f"out_dtype must be {one_of(FLOATS)}, got {name}")
    return name
