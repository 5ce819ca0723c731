"""The arithmetic of this library in plain numpy: slow, short, and what every kernel must equal bit for bit.

The formulas are those of docs/numbers.md. Nothing here calls the compiled code. It is public so that
other implementations can be compared with it.

>>> import numpy as np
>>> import pyda8w4
>>> from pyda8w4 import reference
>>> rng = np.random.default_rng(0)
>>> w_int4, scales, zps = pyda8w4.quantize_weight(rng.standard_normal((5, 12), dtype=np.float32), 4)
>>> x = rng.standard_normal((2, 12), dtype=np.float32)
>>> y = reference.linear(x, w_int4, scales, zps, group_size=4)
>>> bool((y == pyda8w4.linear(x, pyda8w4.prepack(w_int4, scales, zps))).all())
True
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["convert", "fma", "gemm", "linear", "quantize_activation"]

_F32 = np.float32
_LEAST_SCALE = _F32(2.0**-126)


def fma(a: npt.NDArray[Any], b: npt.NDArray[Any], c: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a * b + c in float32 with a single rounding, as a fused multiply-add instruction gives it.

    Parameters
    ----------
    a, b, c : array-like
        Converted to float32, and broadcast.

    Returns
    -------
    ndarray of float32
        Of the shape that they have together.

    Notes
    -----
    The product of two float32 is exact in float64. The sum is rounded there to odd (a result that
    is not exact gets an odd last bit), which keeps the second rounding, to float32, honest: float64
    has more than the two extra bits that this needs (Boldo and Melquiond, "Emulation of FMA and
    correctly rounded sums", 2008).
    """
    a, b, c = np.broadcast_arrays(np.asarray(a, _F32), np.asarray(b, _F32), np.asarray(c, _F32))
    with np.errstate(all="ignore"):
        product, c = a.astype(np.float64) * b, c.astype(np.float64)
        total = product + c
        # Knuth's two-sum: error is exactly product + c - total.
        back = total - product
        error = (product - (total - back)) + (c - back)
        bits = total.view(np.int64)
        inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
        # One step towards the exact sum is an odd neighbour.
        away = (error > 0) == (total > 0)
        odd: npt.NDArray[Any] = np.where(inexact, bits + np.where(away, 1, -1), bits).view(np.float64)
        return odd.astype(_F32)


def quantize_activation(
    x: npt.NDArray[Any], symmetric: bool = False
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Return what `pyda8w4.quantize_activation` returns, for a matrix.

    Parameters
    ----------
    x : (M, K) ndarray of float32, float16 or bfloat16
        One row per token.
    symmetric : bool
        To int8 instead of uint8.

    Returns
    -------
    a : (M, K) ndarray of uint8, or of int8 if symmetric
        The quantized rows.
    a_scales : (M,) ndarray of float32
        One per row.
    a_zps : (M,) ndarray of int32
        One per row.
    """
    x = x.astype(_F32)
    with np.errstate(all="ignore"):
        low, high = np.minimum(x.min(axis=1), _F32(0)), np.maximum(x.max(axis=1), _F32(0))
        s = np.maximum(-low, high) / _F32(127) if symmetric else (high - low) / _F32(255)
        bad = ~np.isfinite(x).all(axis=1) | ~np.isfinite(s)
        s = np.maximum(s, _LEAST_SCALE)
        z = np.zeros_like(s) if symmetric else np.clip(-np.rint(low / s), 0, 255)
        a = np.rint(x * (_F32(1) / s)[:, None]) + z[:, None]
    a = np.clip(a, -127, 127) if symmetric else np.clip(a, 0, 255)
    neutral = 0 if symmetric else 128
    a[bad], s[bad], z[bad] = neutral, np.nan, neutral
    return a.astype(np.int8 if symmetric else np.uint8), s, z.astype(np.int32)


def gemm(
    a: npt.NDArray[Any],
    w_int4: npt.NDArray[Any],
    scales: npt.NDArray[Any],
    zps: npt.NDArray[Any],
    a_scales: npt.NDArray[Any] | None = None,
    a_zps: npt.NDArray[Any] | None = None,
    bias: npt.NDArray[Any] | None = None,
    *,
    offsets: npt.NDArray[Any] | None = None,
    group_size: int,
    out_dtype: str = "float32",
) -> npt.NDArray[Any]:
    """Return what `pyda8w4.gemm` returns, for a matrix.

    Parameters
    ----------
    a : (M, K) ndarray of uint8 or int8
        Quantized activations.
    w_int4 : (N, K) ndarray of uint8
        Codes, as `PackedWeight.unpack` gives them.
    scales : (N, G) ndarray of float32
        One per group.
    zps : (N, G) ndarray of int8
        One per group.
    a_scales : (M,) ndarray of float32, optional
        One per row; None means 1.
    a_zps : (M,) ndarray of int32, optional
        One per row; None means 0.
    bias : (N,) ndarray of float32, optional
        Added to each row.
    offsets : (N, G) ndarray of float32, optional
        One per group.
    group_size : int
        Elements of k that share a scale.
    out_dtype : {'float32', 'float16', 'bfloat16'}
        What the result is rounded to.

    Returns
    -------
    (M, N) ndarray
        Of `out_dtype`; bfloat16 as the bits, uint16.
    """
    m, k = a.shape
    n = w_int4.shape[0]
    shift = 128 if a.dtype == np.uint8 else 0
    act = a.astype(np.float64) - shift  # sums of products below 2**53 are exact in float64
    acc: npt.NDArray[Any] = np.zeros((m, n), _F32)
    column: npt.NDArray[Any] = np.zeros(n, _F32)
    for g, begin in enumerate(range(0, k, group_size)):
        part = slice(begin, min(begin + group_size, k))
        w = w_int4[:, part].astype(np.float64) - zps[:, g].astype(np.float64)[:, None]
        # astype rounds the exact integer to float32 once.
        acc = fma((act[:, part] @ w.T).astype(_F32), scales[:, g].astype(_F32), acc)
        column = fma(w.sum(axis=1).astype(_F32), scales[:, g].astype(_F32), column)
        if offsets is not None:
            acc = fma(act[:, part].sum(axis=1).astype(_F32)[:, None], offsets[:, g].astype(_F32), acc)
            column = fma(np.full(n, w.shape[1], _F32), offsets[:, g].astype(_F32), column)
    z = ((0 if a_zps is None else a_zps.astype(np.float64)) - np.full(m, shift)).astype(_F32)[:, None]
    s = np.ones((m, 1), _F32) if a_scales is None else a_scales.astype(_F32)[:, None]
    t = np.where(z == 0, acc, fma(-z, column, acc))
    with np.errstate(all="ignore"):
        y = t * s if bias is None else fma(t, s, bias)
    return convert(y, out_dtype)


def linear(
    x: npt.NDArray[Any],
    w_int4: npt.NDArray[Any],
    scales: npt.NDArray[Any],
    zps: npt.NDArray[Any],
    bias: npt.NDArray[Any] | None = None,
    *,
    offsets: npt.NDArray[Any] | None = None,
    group_size: int,
    symmetric: bool = False,
    out_dtype: str = "float32",
) -> npt.NDArray[Any]:
    """Return what `pyda8w4.linear` returns, for a matrix.

    Parameters
    ----------
    x : (M, K) ndarray of float32, float16 or bfloat16
        Activations.
    w_int4 : (N, K) ndarray of uint8
        Codes, as `PackedWeight.unpack` gives them.
    scales : (N, G) ndarray of float32
        One per group.
    zps : (N, G) ndarray of int8
        One per group.
    bias : (N,) ndarray of float32, optional
        Added to each row.
    offsets : (N, G) ndarray of float32, optional
        One per group.
    group_size : int
        Elements of k that share a scale.
    symmetric : bool
        Quantize activations to int8 instead of uint8.
    out_dtype : {'float32', 'float16', 'bfloat16'}
        What the result is rounded to.

    Returns
    -------
    (M, N) ndarray
        Of `out_dtype`; bfloat16 as the bits, uint16.
    """
    a, a_scales, a_zps = quantize_activation(x, symmetric)
    return gemm(
        a, w_int4, scales, zps, a_scales, a_zps, bias, offsets=offsets, group_size=group_size, out_dtype=out_dtype
    )


def convert(y: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Round float32 to the output type, to nearest even, with one NaN.

    Parameters
    ----------
    y : ndarray of float32
        Values to round.
    dtype : {'float32', 'float16', 'bfloat16'}
        The output type.

    Returns
    -------
    ndarray
        Of `dtype`; bfloat16 as the bits, uint16.
    """
    y = np.where(np.isnan(y), _F32(np.nan), y).astype(_F32)
    if dtype == "float32":
        return y
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return y.astype(np.float16)
    bits = y.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(y), np.uint16(0x7FC0), rounded)
