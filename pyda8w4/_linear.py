"""The products."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy.typing as npt

from pyda8w4 import _advice
from pyda8w4._checks import (
    ACTIVATIONS,
    FLOATS,
    SCHEMES,
    TYPES,
    as_array_of,
    bits,
    check_flag,
    check_number,
    check_scheme,
    operand,
    output,
    plain,
)
from pyda8w4._core import CoreError, Gating
from pyda8w4._packed import PackedWeight, check_packed
from pyda8w4._runtime import forced_kernel, translate

_SCHEMES, _ACTIVATIONS = tuple(SCHEMES), tuple(ACTIVATIONS)


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
        Of shape (N, K), and without factors and rotation.
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
        If shapes do not fit, a zero point is out of range, `packed` has factors or a rotation (which are for
        activations that are still float), or `out` cannot be written as it is. Nothing has been written then.

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
    if out_dtype is None and (result := _try_plain(packed, a, a_scales, a_zps, -1, bias, None, out, 0)) is not None:
        return result
    a, a_type = as_array_of("a", a, ("uint8", "int8"))
    rows = _check_rows("a", a, packed)
    scales = None if a_scales is None else operand("a_scales", a_scales, "float32", rows)
    zps = None if a_zps is None else operand("a_zps", a_zps, "int32", rows)
    n = packed._format.n
    bias = None if bias is None else operand("bias", bias, "float32", (n,))
    out, out_type = output(out, out_dtype, "float32", (*rows, n))
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
        if error.args[0] == "TRANSFORM_NEEDS_FLOATS":
            raise ValueError(
                "packed must have no factors and no rotation for activations that are quantized already, got one that "
                "has: use linear"
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
        All dimensions but the last are rows; there may be none, or no rows. The numbers of a list are taken as
        float32, here and wherever floats are taken. Arrays are not converted: those of float64 are refused.
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
        `out`, or a new array. With ``uint8`` and ``int8``, and a weight without factors and rotation, the same
        bits as `quantize_activation` followed by `gemm`.

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
    >>> pyda8w4.linear([0.0, 0.0, 25.5, 0.0], packed)
    array([25.5], dtype=float32)
    """
    return multiply(x, packed, "packed", bias, None, act, out, out_dtype)


def linear_gated(
    x: npt.ArrayLike,
    gate_up: PackedWeight,
    bias: npt.ArrayLike | None = None,
    *,
    activation: str = "silu",
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    act: str = "uint8",
    out: npt.NDArray[Any] | None = None,
    out_dtype: npt.DTypeLike | None = None,
) -> npt.NDArray[Any]:
    """Multiply by gates and ups, and give ``activation(gate) * up``, in one call.

    Parameters
    ----------
    x : (..., K) ndarray of float32, float16 or bfloat16
        All dimensions but the last are rows; there may be none, or no rows.
    gate_up : PackedWeight
        Of shape (N, K) with an even N: half of its output features are gates, and half of them are ups.
    bias : (N,) ndarray of float32, optional
        Added to gates and ups.
    activation : {'silu', 'gelu', 'gelu_tanh', 'swigluoai'}
        The function of the gates. ``silu``: ``gate / (1 + exp(-gate)) * up``. ``gelu``:
        ``gate / 2 * (1 + erf(gate / sqrt(2))) * up``, and ``gelu_tanh`` is its approximation by tanh.
        ``swigluoai``, of gpt-oss: ``gate / (1 + exp(-alpha * gate)) * (up + 1)``, where gates are at most
        `limit` and ups from ``-limit`` to `limit`.
    interleaved : bool
        Whether gates are the even output features and ups the odd ones; else gates are the first half.
    alpha, limit : float
        Of ``swigluoai``; `limit` is positive.
    act : {'uint8', 'int8', 'int8_group', 'int16'}
        To what `x` is quantized, as in `linear`.
    out : (..., N / 2) ndarray of float32, float16 or bfloat16, optional
        Where to put the result; C-contiguous, aligned, and apart from the inputs.
    out_dtype : dtype-like, optional
        One of float32, float16 and bfloat16; that of `out`, else that of `x`.

    Returns
    -------
    (..., N / 2) ndarray
        `out`, or a new array.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If shapes do not fit, there is no such activation or scheme, a number is out of range, or `out` cannot
        be written as it is. Nothing has been written then.

    Notes
    -----
    Gates and ups are the float32 results of `linear`. Each operation on them is rounded once
    (docs/numbers.md): the same bits from every kernel, number of rows and number of threads.

    Examples
    --------
    >>> import numpy as np
    >>> import pyda8w4
    >>> gate_up = pyda8w4.prepack(np.array([[9, 9, 8, 7], [10, 8, 8, 8]], np.uint8), np.ones(2, np.float32))
    >>> pyda8w4.linear_gated(np.array([0.0, 0.0, 0.0, 255.0], np.float32), gate_up).shape
    (1,)
    """
    gating = check_gating(activation, interleaved, alpha, limit)
    return multiply(x, gate_up, "gate_up", bias, gating, act, out, out_dtype)


def multiply(
    x: npt.ArrayLike,
    packed: PackedWeight,
    packed_name: str,
    bias: npt.ArrayLike | None,
    gating: Gating | None,
    act: str,
    out: npt.NDArray[Any] | None,
    out_dtype: npt.DTypeLike | None,
    threads: int = 0,
) -> npt.NDArray[Any]:
    """`linear`, or `linear_gated`, with at most so many threads; 0 for those of the process."""
    if out_dtype is None and type(act) is str and act in SCHEMES:
        result = _try_plain(packed, x, None, None, SCHEMES[act], bias, gating, out, threads)
        if result is not None:
            return result
    x, x_type = as_array_of("x", x, FLOATS)
    rows = _check_rows("x", x, packed, packed_name)
    n = packed._format.n
    if gating is not None and n % 2:
        raise ValueError(f"{packed_name} must have an even N, of which half are gates, got shape {packed.shape}")
    act = check_scheme("act", act, _SCHEMES)
    bias = None if bias is None else operand("bias", bias, "float32", (n,))
    out, out_type = output(out, out_dtype, x_type, (*rows, n if gating is None else n // 2))
    try:
        packed._view.linear(
            m=prod(rows),
            x=bits(plain(x), x_type),
            x_type=TYPES[x_type],
            scheme=SCHEMES[act],
            bias=bias,
            gating=gating,
            out=bits(out, out_type),
            out_type=TYPES[out_type],
            kernel=forced_kernel(),
            threads=threads,
        )
    except CoreError as error:
        raise translate(error) from None
    return out


def _try_plain(
    packed: PackedWeight,
    act: npt.ArrayLike,
    act_scales: npt.ArrayLike | None,
    act_zps: npt.ArrayLike | None,
    scheme: int,
    bias: npt.ArrayLike | None,
    gating: Gating | None,
    out: npt.NDArray[Any] | None,
    threads: int,
) -> npt.NDArray[Any] | None:
    """The product where nothing must be converted or refused, else None."""
    if type(packed) is not PackedWeight:
        return None
    try:
        return packed._view.try_plain(act, act_scales, act_zps, scheme, bias, gating, out, threads, forced_kernel())
    except CoreError:  # which is raised again with the names of the arguments
        return None


def check_gating(activation: str, interleaved: bool, alpha: float, limit: float) -> Gating:
    activation = check_scheme("activation", activation, _ACTIVATIONS)
    interleaved = check_flag("interleaved", interleaved)
    alpha, limit = check_number("alpha", alpha), check_number("limit", limit)
    if limit <= 0:
        raise ValueError(f"limit must be positive, got {limit}")
    return Gating(ACTIVATIONS[activation], interleaved, alpha, limit)


def _check_rows(name: str, act: npt.NDArray[Any], packed: PackedWeight, packed_name: str = "packed") -> tuple[int, ...]:
    check_packed(packed_name, packed)
    shape, (n, k) = act.shape, packed.shape
    if not shape or shape[-1] != k:
        hint = _advice.for_transposed(name, shape, (*shape[1:], k))
        if shape and shape[-1] == n:
            hint = "; a weight that is stored as (K, N) must be transposed before it is packed"
        raise ValueError(
            f"{name} must have shape (..., {k}) for {packed_name} of shape {packed.shape}, got {shape}{hint}"
        )
    return shape[:-1]
