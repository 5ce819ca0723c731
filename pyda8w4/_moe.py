"""Products of experts, and mixtures of experts."""

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
    check_number,
    check_scheme,
    check_shape,
    operand,
    output,
    plain,
)
from pyda8w4._core import CoreError
from pyda8w4._experts import PackedExperts, check_experts
from pyda8w4._linear import check_gating
from pyda8w4._runtime import forced_kernel, translate

_SCHEMES = tuple(SCHEMES)
_MOST_SLOTS = (1 << 23) - 1  # of the C interface


def grouped_linear(
    x: npt.ArrayLike,
    experts: PackedExperts,
    rows_of_expert: npt.ArrayLike,
    bias: npt.ArrayLike | None = None,
    *,
    act: str = "uint8",
    out: npt.NDArray[Any] | None = None,
    out_dtype: npt.DTypeLike | None = None,
) -> npt.NDArray[Any]:
    """Quantize rows and multiply each by the weight of its expert, in one call.

    Parameters
    ----------
    x : (R, K) ndarray of float32, float16 or bfloat16
        Rows, expert by expert. There may be none.
    experts : PackedExperts
        Of shape (E, N, K).
    rows_of_expert : (E,) ndarray of integers
        How many of the rows are those of each expert. They add up to R.
    bias : (E, N) ndarray of float32, optional
        Added to each row of the expert's result.
    act : {'uint8', 'int8', 'int8_group', 'int16'}
        To what `x` is quantized, as in `linear`.
    out : (R, N) ndarray of float32, float16 or bfloat16, optional
        Where to put the result; C-contiguous, aligned, and apart from the inputs.
    out_dtype : dtype-like, optional
        One of float32, float16 and bfloat16; that of `out`, else that of `x`.

    Returns
    -------
    (R, N) ndarray
        `out`, or a new array. The bits of `linear` with each expert and its rows.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If shapes do not fit, numbers of rows are negative or do not add up, there is no such scheme, or `out`
        cannot be written as it is. Nothing has been written then.

    Examples
    --------
    >>> import numpy as np
    >>> import pyda8w4
    >>> one, two = (pyda8w4.prepack(np.full((1, 4), code, np.uint8), np.ones(1, np.float32)) for code in (9, 10))
    >>> x = np.array([[255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0]], np.float32)
    >>> pyda8w4.grouped_linear(x, pyda8w4.stack([one, two]), [1, 2])
    array([[255.],
           [510.],
           [510.]], dtype=float32)
    """
    x, x_type = as_array_of("x", x, FLOATS)
    check_experts("experts", experts)
    count, n, k = experts.shape
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"x must have shape (R, {k}) for experts of shape {experts.shape}, got {x.shape}")
    rows = _rows_of_expert(rows_of_expert, count, len(x))
    act = check_scheme("act", act, _SCHEMES)
    bias = None if bias is None else operand("bias", bias, "float32", (count, n))
    out, out_type = output(out, out_dtype, x_type, (len(x), n))
    try:
        experts._view.grouped_linear(
            m=len(x),
            x=bits(plain(x), x_type),
            x_type=TYPES[x_type],
            scheme=SCHEMES[act],
            rows_of_expert=rows,
            bias=bias,
            out=bits(out, out_type),
            out_type=TYPES[out_type],
            kernel=forced_kernel(),
        )
    except CoreError as error:
        raise translate(error) from None
    return out


def moe(
    x: npt.ArrayLike,
    gate_up: PackedExperts,
    down: PackedExperts,
    topk_ids: npt.ArrayLike,
    topk_weights: npt.ArrayLike,
    *,
    activation: str = "silu",
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    gate_up_bias: npt.ArrayLike | None = None,
    down_bias: npt.ArrayLike | None = None,
    expert_map: npt.ArrayLike | None = None,
    routed_scaling: float = 1.0,
    act: str = "uint8",
    out: npt.NDArray[Any] | None = None,
    out_dtype: npt.DTypeLike | None = None,
) -> npt.NDArray[Any]:
    """Multiply each token by the experts that were chosen for it, and add their results, in one call.

    Parameters
    ----------
    x : (..., K) ndarray of float32, float16 or bfloat16
        All dimensions but the last are tokens; there may be none, or no tokens.
    gate_up : PackedExperts
        Of shape (E, 2 I, K): gates and ups of each expert.
    down : PackedExperts
        Of shape (E, N, I).
    topk_ids : (..., T) ndarray of int32 or int64
        The experts of each token: 0 to E - 1, or -1 for a slot that adds nothing. One may come twice.
    topk_weights : (..., T) ndarray of float32
        What the results of these experts are multiplied by.
    activation : {'silu', 'gelu', 'gelu_tanh', 'swigluoai'}
        The function of the gates, see `linear_gated`.
    interleaved : bool
        Whether gates are the even output features of `gate_up` and ups the odd ones; else gates are the first
        half.
    alpha, limit : float
        Of ``swigluoai``, see `linear_gated`.
    gate_up_bias : (E, 2 I) ndarray of float32, optional
        Added to the products with `gate_up`.
    down_bias : (E, N) ndarray of float32, optional
        Added to the products with `down`, before they are multiplied by their weights.
    expert_map : (E_global,) ndarray of int32 or int64, optional
        For experts of which only some are here: `topk_ids` are then 0 to E_global - 1 or -1, and this has the
        expert of each, 0 to E - 1, or -1 where it is not here.
    routed_scaling : float
        What all of `topk_weights` are multiplied by.
    act : {'uint8', 'int8', 'int8_group', 'int16'}
        To what the inputs of both products are quantized, as in `linear`.
    out : (..., N) ndarray of float32, float16 or bfloat16, optional
        Where to put the result; C-contiguous, aligned, and apart from the inputs.
    out_dtype : dtype-like, optional
        One of float32, float16 and bfloat16; that of `out`, else that of `x`.

    Returns
    -------
    (..., N) ndarray
        `out`, or a new array.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If shapes do not fit, there is no such expert, activation or scheme, a number is not finite, or `out`
        cannot be written as it is. Nothing has been written then.

    Notes
    -----
    For token t, in float32::

        h[s] = linear_gated(x[t], gate_up[topk_ids[t, s]], gate_up_bias[topk_ids[t, s]])
        y[s] = linear(h[s], down[topk_ids[t, s]], down_bias[topk_ids[t, s]])
        acc  = 0;  for s ascending, where topk_ids[t, s] != -1:
               acc = fma(y[s], topk_weights[t, s] * routed_scaling, acc)

    and `acc` is rounded to `out_dtype` (docs/numbers.md). So a token has the same bits alone and among others,
    from every kernel and number of threads. Experts that no token chose cost nothing.

    Examples
    --------
    >>> import numpy as np
    >>> import pyda8w4
    >>> rng = np.random.default_rng(0)
    >>> def experts(n, k):
    ...     weights = rng.standard_normal((8, n, k), dtype=np.float32)
    ...     return pyda8w4.stack([pyda8w4.quantize(w, 32) for w in weights])
    >>> gate_up, down = experts(2 * 96, 64), experts(64, 96)
    >>> x = rng.standard_normal((3, 64), dtype=np.float32)
    >>> topk_ids = np.array([[0, 5], [5, 2], [7, -1]])
    >>> topk_weights = np.array([[0.75, 0.25], [0.5, 0.5], [1, 0]], np.float32)
    >>> pyda8w4.moe(x, gate_up, down, topk_ids, topk_weights).shape
    (3, 64)
    """
    x, x_type = as_array_of("x", x, FLOATS)
    check_experts("gate_up", gate_up)
    check_experts("down", down)
    count, width, k = gate_up.shape
    if width % 2:
        raise ValueError(f"gate_up must have an even N, of which half are gates, got shape {gate_up.shape}")
    if down.shape[::2] != (count, width // 2):
        raise ValueError(
            f"down must have shape ({count}, N, {width // 2}) for gate_up of shape {gate_up.shape}, got {down.shape}"
        )
    if not x.shape or x.shape[-1] != k:
        raise ValueError(f"x must have shape (..., {k}) for gate_up of shape {gate_up.shape}, got {x.shape}")
    tokens, n = x.shape[:-1], down.shape[1]
    ids = _topk_ids(topk_ids, tokens)
    weights = operand("topk_weights", topk_weights, "float32", ids.shape)
    gating = check_gating(activation, interleaved, alpha, limit)
    if gate_up_bias is not None:
        gate_up_bias = operand("gate_up_bias", gate_up_bias, "float32", (count, width))
    if down_bias is not None:
        down_bias = operand("down_bias", down_bias, "float32", (count, n))
    ids = local_ids(ids, count, expert_map)
    routed_scaling = check_number("routed_scaling", routed_scaling)
    act = check_scheme("act", act, _SCHEMES)
    out, out_type = output(out, out_dtype, x_type, (*tokens, n))
    try:
        gate_up._view.moe(
            down=down._view,
            m=prod(tokens),
            slots=ids.shape[-1],
            x=bits(plain(x), x_type),
            x_type=TYPES[x_type],
            scheme=SCHEMES[act],
            ids=plain(ids),
            weights=weights,
            scaling=routed_scaling,
            gating=gating,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            out=bits(out, out_type),
            out_type=TYPES[out_type],
            kernel=forced_kernel(),
        )
    except CoreError as error:
        if error.args[0] == "BAD_EXPERT":
            check_ids("topk_ids", ids, count)
        raise translate(error) from None
    return out


def _rows_of_expert(value: npt.ArrayLike, count: int, rows: int) -> npt.NDArray[np.uintp]:
    array = as_array("rows_of_expert", value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"rows_of_expert must be an array of integers, got {array.dtype}")
    check_shape("rows_of_expert", array, (count,))
    if (array < 0).any():
        raise ValueError(f"rows_of_expert must hold numbers of rows, got {array.min()}")
    total = sum(array.tolist())  # of Python's integers, which do not wrap around
    if total != rows:
        raise ValueError(f"rows_of_expert must add up to the {rows} rows of x, got {total}")
    return array.astype(np.uintp)


def _topk_ids(value: npt.ArrayLike, tokens: tuple[int, ...]) -> npt.NDArray[Any]:
    array = _ids("topk_ids", value)
    if array.shape[:-1] != tokens or array.ndim != len(tokens) + 1:
        sizes = "".join(f"{size}, " for size in tokens)
        raise ValueError(f"topk_ids must have shape ({sizes}T), got {array.shape}")
    return array


def _ids(name: str, value: npt.ArrayLike) -> npt.NDArray[Any]:
    array = as_array(name, value)
    if array.dtype != np.int32 and array.dtype != np.int64:
        raise TypeError(f"{name} must be an array of int32 or int64, got {array.dtype}")
    return array


def local_ids(ids: npt.NDArray[Any], count: int, expert_map: npt.ArrayLike | None) -> npt.NDArray[np.int32]:
    """The experts that are here, or -1."""
    if ids.shape[-1] > _MOST_SLOTS:
        raise ValueError(f"topk_ids must have at most {_MOST_SLOTS} slots, got {ids.shape[-1]}")
    if expert_map is None:
        narrow = ids.astype(np.int32, copy=False)
        if narrow is not ids and (narrow != ids).any():
            check_ids("topk_ids", ids, count)
        return narrow  # the C interface finds others that are out of range
    local = _ids("expert_map", expert_map)
    if local.ndim != 1:
        raise ValueError(f"expert_map must have shape (E_global,), got {local.shape}")
    check_ids("expert_map", local, count)
    check_ids("topk_ids", ids, len(local))
    padded: npt.NDArray[np.int32] = np.append(local, -1).astype(np.int32)  # -1 means its last, which is -1
    return np.take(padded, ids)


def check_ids(name: str, ids: npt.NDArray[Any], count: int) -> None:
    if ids.size:
        for found in (ids.min(), ids.max()):
            if not -1 <= found < count:
                raise ValueError(f"{name} must hold -1 to {count - 1}, got {found}")
