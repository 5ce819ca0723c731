"""Quantization: weights to 4 bits once, activations to 8 bits at each call."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import FLOATS, INTEGERS, SCHEMES, TYPES, as_array_of, bits, check_flag, check_scheme, plain
from pyda8w4._core import CoreError, quantize_rows
from pyda8w4._format import check_group_size, group_count
from pyda8w4._runtime import forced_kernel, translate

_LEAST_SCALE = np.float32(2.0**-126)  # the least normal number: its inverse is finite


def quantize_weight(
    w: npt.ArrayLike, group_size: int = 128, symmetric: bool = False
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    """Quantize a float weight matrix to 4 bits, in groups of consecutive k.

    Parameters
    ----------
    w : (N, K) ndarray of float32, float16 or bfloat16
        One row per output feature, as in ``torch.nn.Linear.weight``. Finite.
    group_size : int
        Elements of k that share a scale: a multiple of 4, or K and more for one group per row. The
        last group may be shorter.
    symmetric : bool
        All zero points 8. Otherwise each group has its own, which costs a byte and uses the range
        of a lopsided group better.

    Returns
    -------
    codes : (N, K) ndarray of uint8
        Codes 0 to 15.
    scales : (N, G) ndarray of float32
        G = ceil(K / group_size).
    zps : (N, G) ndarray of int8
        Zero points, 0 to 15: ``w ~ (codes - zps) * scales``.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If `w` is not a non-empty matrix of finite numbers, or `group_size` is not as above.

    Notes
    -----
    Round to nearest, in float32, with the formulas of torchao's ``choose_qparams_affine`` and
    ``quantize_affine`` but for the least scale, which is 2**-23 there. Asymmetric:
    ``s = max((max(0, max w) - min(0, min w)) / 15, 2**-126)``,
    ``z = clip(-rint(min(0, min w) / s), 0, 15)``. Symmetric: ``s = max(max|w| / 7.5, 2**-126)``,
    ``z = 8``. Code: ``clip(rint(w * (1 / s)) + z, 0, 15)``.

    Examples
    --------
    >>> import numpy as np
    >>> import pyda8w4
    >>> w = np.array([[-1.0, 0.0, 1.0, 2.0]], np.float32)
    >>> pyda8w4.quantize_weight(w, group_size=4)
    (array([[ 0,  5, 10, 15]], dtype=uint8), array([[0.2]], dtype=float32), array([[5]], dtype=int8))
    """
    w, _ = as_array_of("w", w, FLOATS)
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"w must be a non-empty matrix (N, K), got shape {w.shape}")
    n, k = w.shape
    group = check_group_size(group_size, k)
    symmetric = check_flag("symmetric", symmetric)
    groups = group_count(k, group)
    codes = np.empty((n, k), np.uint8)
    scales = np.empty((n, groups), np.float32)
    zps = np.empty((n, groups), np.int8)
    rows = max(1, (1 << 20) // k)  # a few MB of temporaries at a time
    for top in range(0, n, rows):
        part = slice(top, top + rows)
        _quantize_rows(w[part], group, symmetric, codes[part], scales[part], zps[part])
    return codes, scales, zps


def _quantize_rows(
    w: npt.NDArray[Any],
    group: int,
    symmetric: bool,
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float32],
    zps: npt.NDArray[np.int8],
) -> None:
    n, k = w.shape
    grouped = np.zeros((n, scales.shape[1], group), np.float32)  # zeros change no minimum or maximum below
    grouped.reshape(n, -1)[:, :k] = w
    low = np.minimum(grouped.min(axis=2), np.float32(0))
    high = np.maximum(grouped.max(axis=2), np.float32(0))
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("w must be finite, got NaN or infinity")
    with np.errstate(over="ignore"):
        s = np.maximum(-low, high) / np.float32(7.5) if symmetric else (high - low) / np.float32(15)
    if not np.isfinite(s).all():
        raise ValueError("w must have groups whose range fits float32, got one that overflows")
    s = np.maximum(s, _LEAST_SCALE)
    z = np.full_like(s, 8) if symmetric else np.clip(-np.rint(low / s), 0, 15)
    grouped *= (np.float32(1) / s)[:, :, None]
    np.rint(grouped, out=grouped)
    grouped += z[:, :, None]
    np.clip(grouped, 0, 15, out=grouped)
    codes[:] = grouped.reshape(n, -1)[:, :k]
    scales[:] = s
    zps[:] = z


def quantize_activation(
    x: npt.ArrayLike, act: str = "uint8"
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Quantize activations to 8 bits, each row (token) with a scale of its own.

    Parameters
    ----------
    x : (..., K) ndarray of float32, float16 or bfloat16
        K >= 1. All other dimensions are rows.
    act : {'uint8', 'int8'}
        To uint8 with a zero point per row, which halves the rounding error of rows that are all
        positive; or to int8 with zero point 0. (The other schemes of `linear` have no such form.)

    Returns
    -------
    a : (..., K) ndarray of uint8 or int8
        The quantized rows.
    a_scales : (...) ndarray of float32
        One per row.
    a_zps : (...) ndarray of int32
        ``x ~ (a - a_zps) * a_scales``.

    Raises
    ------
    TypeError
        If an argument has another type.
    ValueError
        If `x` has no dimension or K is 0, or there is no such scheme.

    Notes
    -----
    In float32 with each operation rounded, as in torchao's ``choose_qparams_affine`` and
    ``quantize_affine`` but for the least scale, which is 2**-23 there, and the same bits from every
    kernel. ``uint8``: ``mn = min(0, min x)``, ``mx = max(0, max x)``,
    ``s = max((mx - mn) / 255, 2**-126)``, ``z = clip(-rint(mn / s), 0, 255)``,
    ``a = clip(rint(x * (1 / s)) + z, 0, 255)``. ``int8``: ``s = max(max|x| / 127, 2**-126)``,
    ``a = clip(rint(x * (1 / s)), -127, 127)``.

    A row with NaN or infinity, or whose range exceeds float32, gets the scale NaN and is all zero
    point (128, or 0 of int8): its outputs are NaN, and no other row's.

    Examples
    --------
    >>> import numpy as np
    >>> import pyda8w4
    >>> a, a_scales, a_zps = pyda8w4.quantize_activation(np.array([[-1.0, 0.0, 4.1]], np.float32))
    >>> a, a_scales, a_zps
    (array([[  0,  50, 255]], dtype=uint8), array([0.02], dtype=float32), array([50], dtype=int32))
    """
    x, x_type = as_array_of("x", x, FLOATS)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., K) with K >= 1, got {x.shape}")
    act = check_scheme("act", act, INTEGERS)
    rows, k = x.shape[:-1], x.shape[-1]
    a = np.empty(x.shape, act)
    scales = np.empty(rows, np.float32)
    zps = np.empty(rows, np.int32)
    try:
        quantize_rows(
            m=prod(rows),
            k=k,
            x=bits(plain(x), x_type),
            x_type=TYPES[x_type],
            scheme=SCHEMES[act],
            act=a,
            act_scales=scales,
            act_zps=zps,
            kernel=forced_kernel(),
        )
    except CoreError as error:
        raise translate(error) from None
    return a, scales, zps
