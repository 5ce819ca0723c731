"""The arithmetic of this library in plain numpy: slow, short, and what every kernel must equal bit for bit.

The formulas are those of docs/numbers.md. Nothing here calls the compiled code. It is public so that
other implementations can be compared with it.

>>> import numpy as np
>>> import pyda8w4
>>> from pyda8w4 import reference
>>> rng = np.random.default_rng(0)
>>> codes, scales, zps, offsets = pyda8w4.quantize_weight(rng.standard_normal((5, 12), dtype=np.float32), 4)
>>> x = rng.standard_normal((2, 12), dtype=np.float32)
>>> y = reference.linear(x, codes, scales, zps, group_size=4)
>>> bool((y == pyda8w4.linear(x, pyda8w4.prepack(codes, scales, zps))).all())
True
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "convert",
    "dequantize",
    "fma",
    "gate",
    "gemm",
    "linear",
    "linear_gated",
    "moe",
    "quantize_activation",
    "sum_slots",
]

_F32 = np.float32
_LEAST_SCALE = _F32(2.0**-126)


def fma(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> npt.NDArray[Any]:
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
    x, y, z = np.broadcast_arrays(np.asarray(a, _F32), np.asarray(b, _F32), np.asarray(c, _F32))
    with np.errstate(all="ignore"):
        product, z = x.astype(np.float64) * y, z.astype(np.float64)
        total = product + z
        # Knuth's two-sum: error is exactly product + z - total.
        back = total - product
        error = (product - (total - back)) + (z - back)
        bits = total.view(np.int64)
        inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
        # One step towards the exact sum is an odd neighbour.
        away = (error > 0) == (total > 0)
        odd: npt.NDArray[Any] = np.where(inexact, bits + np.where(away, 1, -1), bits).view(np.float64)
        return odd.astype(_F32)


def quantize_activation(
    x: npt.NDArray[Any], act: str = "uint8"
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Return what `pyda8w4.quantize_activation` returns, for a matrix.

    Parameters
    ----------
    x : (M, K) ndarray of float32, float16 or bfloat16
        One row per token.
    act : {'uint8', 'int8'}
        The type of the result.

    Returns
    -------
    a : (M, K) ndarray of uint8 or int8
        The quantized rows.
    a_scales : (M,) ndarray of float32
        One per row.
    a_zps : (M,) ndarray of int32
        One per row.
    """
    x = x.astype(_F32)
    if act == "int8":
        a, s = _quantize_symmetric(x, 127)
        return a.astype(np.int8), s, np.zeros(len(x), np.int32)
    with np.errstate(all="ignore"):
        low, high = np.minimum(x.min(axis=1), _F32(0)), np.maximum(x.max(axis=1), _F32(0))
        s = (high - low) / _F32(255)
        bad = ~np.isfinite(x).all(axis=1) | ~np.isfinite(s)
        s = np.maximum(s, _LEAST_SCALE)
        z = np.clip(-np.rint(low / s), 0, 255)
        a = np.clip(np.rint(x * (_F32(1) / s)[:, None]) + z[:, None], 0, 255)
    a[bad], s[bad], z[bad] = 128, np.nan, 128
    return a.astype(np.uint8), s, z.astype(np.int32)


def _quantize_symmetric(x: npt.NDArray[Any], most: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """-> whole numbers up to `most`, as float32, and the scale of each row."""
    with np.errstate(all="ignore"):
        s = np.abs(x).max(axis=1) / _F32(most)
        bad = ~np.isfinite(s)
        s = np.maximum(s, _LEAST_SCALE)
        q = np.clip(np.rint(x * (_F32(1) / s)[:, None]), -most, most)
    q[bad], s[bad] = 0, np.nan
    return q, s


def gemm(
    a: npt.NDArray[Any],
    codes: npt.NDArray[Any],
    scales: npt.NDArray[Any],
    zps: npt.NDArray[Any],
    a_scales: npt.NDArray[Any] | None = None,
    a_zps: npt.NDArray[Any] | None = None,
    bias: npt.NDArray[Any] | None = None,
    *,
    offsets: npt.NDArray[Any] | None = None,
    sub_scales: npt.NDArray[Any] | None = None,
    sub_offsets: npt.NDArray[Any] | None = None,
    table: npt.NDArray[Any] | None = None,
    perm: npt.NDArray[Any] | None = None,
    group_size: int,
    out_dtype: str = "float32",
) -> npt.NDArray[Any]:
    """Return what `pyda8w4.gemm` returns, for a matrix.

    Parameters
    ----------
    a : (M, K) ndarray of uint8 or int8
        Quantized activations.
    codes : (N, K) ndarray of uint8 or int8
        Codes, as `PackedWeight.unpack` gives them.
    scales : (N, G) ndarray of float32
        One per group; (N, S) with `sub_scales`.
    zps : (N, G) ndarray of int8
        One per group.
    a_scales : (M,) ndarray of float32, optional
        One per row; None means 1.
    a_zps : (M,) ndarray of int32, optional
        One per row; None means 0.
    bias : (N,) ndarray of float32, optional
        Added to each row.
    offsets : (N, G) ndarray of float32, optional
        One per group; (N, S) with `sub_offsets`.
    sub_scales, sub_offsets : (N, G) ndarray of uint8 or int8, optional
        The second level of scales and offsets.
    table : (16,) ndarray of int8, optional
        What codes stand for.
    perm : (K,) ndarray of int, optional
        Column k of `codes` multiplies ``a[:, perm[k]]``.
    group_size : int
        Elements of k that share a scale.
    out_dtype : {'float32', 'float16', 'bfloat16'}
        What the result is rounded to.

    Returns
    -------
    (M, N) ndarray
        Of `out_dtype`; bfloat16 as the bits, uint16.
    """
    w = _Weight(codes, scales, zps, offsets, sub_scales, sub_offsets, table, group_size)
    m, n = len(a), len(codes)
    shift = 128 if a.dtype == np.uint8 else 0
    act = (a if perm is None else a[:, perm]).astype(np.float64) - shift
    acc: npt.NDArray[Any] = np.zeros((m, n), _F32)
    column: npt.NDArray[Any] = np.zeros(n, _F32)
    for g, part in enumerate(w.groups):
        acc = fma(w.dots(act, g), w.scales[:, g], acc)
        column = fma(w.centred(g).sum(axis=1).astype(_F32), w.scales[:, g], column)
        if w.offsets is not None:
            acc = fma(_sums(act[:, part]), w.offsets[:, g], acc)
            column = fma(np.full(n, part.stop - part.start, _F32), w.offsets[:, g], column)
    z = ((0 if a_zps is None else a_zps.astype(np.float64)) - np.full(m, shift)).astype(_F32)[:, None]
    s = np.ones((m, 1), _F32) if a_scales is None else a_scales.astype(_F32)[:, None]
    t = np.where(z == 0, acc, fma(-z, column, acc))
    with np.errstate(all="ignore"):
        y = t * s if bias is None else fma(t, s, bias)
    return convert(y, out_dtype)


def rotate(x: npt.NDArray[Any], rotation: int) -> npt.NDArray[np.float32]:
    """Return what a rotation makes of rows: in each of its blocks, the sums and differences of a Hadamard transform.

    Parameters
    ----------
    x : (..., K) ndarray of float32, float16 or bfloat16
        Any number of rows.
    rotation : int
        Consecutive numbers that are a block, a power of two; 0 changes nothing. What is left of K is cut into
        blocks of the largest powers of two that fit.

    Returns
    -------
    (..., K) ndarray of float32
        Not normalized: a block of b numbers that is rotated twice is itself times b.

    Examples
    --------
    >>> import numpy as np
    >>> from pyda8w4 import reference
    >>> reference.rotate(np.array([1, 2, 3, 4, 10, 20, 30], np.float32), 4)
    array([ 10.,  -2.,  -4.,   0.,  30., -10.,  30.], dtype=float32)
    """
    rotated = x.astype(_F32)
    begin, k = 0, x.shape[-1]
    while rotation and begin < k:
        block = min(rotation, 1 << (k - begin).bit_length() - 1)
        end = begin + (k - begin) // block * block
        for stride in (1 << i for i in range(block.bit_length() - 1)):
            pairs = rotated[..., begin:end].reshape(*x.shape[:-1], (end - begin) // (2 * stride), 2, stride)
            first, second = pairs[..., 0, :], pairs[..., 1, :]
            with np.errstate(all="ignore"):
                first[...], second[...] = first + second, first - second
        begin = end
    return rotated


def linear(
    x: npt.NDArray[Any],
    codes: npt.NDArray[Any],
    scales: npt.NDArray[Any],
    zps: npt.NDArray[Any],
    bias: npt.NDArray[Any] | None = None,
    *,
    offsets: npt.NDArray[Any] | None = None,
    sub_scales: npt.NDArray[Any] | None = None,
    sub_offsets: npt.NDArray[Any] | None = None,
    table: npt.NDArray[Any] | None = None,
    perm: npt.NDArray[Any] | None = None,
    factors: npt.NDArray[Any] | None = None,
    rotation: int = 0,
    group_size: int,
    act: str = "uint8",
    out_dtype: str = "float32",
) -> npt.NDArray[Any]:
    """Return what `pyda8w4.linear` returns, for a matrix.

    Parameters
    ----------
    x : (M, K) ndarray of float32, float16 or bfloat16
        Activations.
    codes : (N, K) ndarray of uint8 or int8
        Codes, as `PackedWeight.unpack` gives them.
    scales : (N, G) ndarray of float32
        One per group; (N, S) with `sub_scales`.
    zps : (N, G) ndarray of int8
        One per group.
    bias : (N,) ndarray of float32, optional
        Added to each row.
    offsets : (N, G) ndarray of float32, optional
        One per group; (N, S) with `sub_offsets`.
    sub_scales, sub_offsets : (N, G) ndarray of uint8 or int8, optional
        The second level of scales and offsets.
    table : (16,) ndarray of int8, optional
        What codes stand for.
    perm : (K,) ndarray of int, optional
        Column k of `codes` multiplies ``x[:, perm[k]]``.
    factors : (K,) ndarray of float32, optional
        What ``x[:, perm[k]]`` is multiplied by before it is quantized.
    rotation : int
        In blocks of how many the result is rotated, as `rotate` does it, before it is quantized.
    group_size : int
        Elements of k that share a scale.
    act : {'uint8', 'int8', 'int8_group', 'int16'}
        To what activations are quantized.
    out_dtype : {'float32', 'float16', 'bfloat16'}
        What the result is rounded to.

    Returns
    -------
    (M, N) ndarray
        Of `out_dtype`; bfloat16 as the bits, uint16.
    """
    x = x.astype(_F32)
    if perm is not None:
        x = x[:, perm]
    if factors is not None:
        with np.errstate(all="ignore"):
            x = x * factors.astype(_F32)
    x = rotate(x, rotation)
    w = _Weight(codes, scales, zps, offsets, sub_scales, sub_offsets, table, group_size)
    if act == "int8_group":
        return convert(_linear_int8_group(x, w, bias), out_dtype)
    if act == "int16":
        return convert(_linear_int16(x, w, bias), out_dtype)
    a, a_scales, a_zps = quantize_activation(x, act)
    return gemm(
        a,
        codes,
        w.scales,
        zps,
        a_scales,
        a_zps,
        bias,
        offsets=w.offsets,
        table=table,
        group_size=group_size,
        out_dtype=out_dtype,
    )


def _linear_int8_group(x: npt.NDArray[Any], w: _Weight, bias: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    acc: npt.NDArray[Any] = np.zeros((len(x), len(w.values)), _F32)
    for g, part in enumerate(w.groups):
        a, s = _quantize_symmetric(x[:, part], 127)
        act = np.zeros(x.shape)
        act[:, part] = a
        with np.errstate(all="ignore"):
            acc = fma(w.dots(act, g), w.scales[:, g] * s[:, None], acc)
            if w.offsets is not None:
                acc = fma(_sums(a) * s[:, None], w.offsets[:, g], acc)
    with np.errstate(all="ignore"):
        return acc if bias is None else acc + bias.astype(_F32)


def _linear_int16(x: npt.NDArray[Any], w: _Weight, bias: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    q, s = _quantize_symmetric(x, 32512)
    upper = (q.astype(np.int64) + 128) >> 8
    lower = q.astype(np.int64) - 256 * upper
    acc: npt.NDArray[Any] = np.zeros((len(x), len(w.values)), _F32)
    for g, part in enumerate(w.groups):
        t = fma(np.array(256), w.dots(upper.astype(np.float64), g), w.dots(lower.astype(np.float64), g))
        acc = fma(t, w.scales[:, g], acc)
        if w.offsets is not None:
            acc = fma(_sums(q[:, part]), w.offsets[:, g], acc)
    with np.errstate(all="ignore"):
        return acc * s[:, None] if bias is None else fma(acc, s[:, None], bias)


def dequantize(
    codes: npt.NDArray[Any],
    scales: npt.NDArray[Any],
    zps: npt.NDArray[Any],
    *,
    offsets: npt.NDArray[Any] | None = None,
    sub_scales: npt.NDArray[Any] | None = None,
    sub_offsets: npt.NDArray[Any] | None = None,
    table: npt.NDArray[Any] | None = None,
    perm: npt.NDArray[Any] | None = None,
    factors: npt.NDArray[Any] | None = None,
    rotation: int = 0,
    group_size: int,
) -> npt.NDArray[Any]:
    """Return what `PackedWeight.dequantize` returns.

    Parameters
    ----------
    codes : (N, K) ndarray of uint8 or int8
        Codes, as `PackedWeight.unpack` gives them.
    scales : (N, G) ndarray of float32
        One per group; (N, S) with `sub_scales`.
    zps : (N, G) ndarray of int8
        One per group.
    offsets : (N, G) ndarray of float32, optional
        One per group; (N, S) with `sub_offsets`.
    sub_scales, sub_offsets : (N, G) ndarray of uint8 or int8, optional
        The second level of scales and offsets.
    table : (16,) ndarray of int8, optional
        What codes stand for.
    perm : (K,) ndarray of int, optional
        Column k of `codes` is that of input ``perm[k]``.
    factors : (K,) ndarray of float32, optional
        What that input is multiplied by.
    rotation : int
        In blocks of how many inputs are rotated, as `rotate` does it.
    group_size : int
        Elements of k that share a scale.

    Returns
    -------
    (N, K) ndarray of float32
        In the order of the inputs.
    """
    w = _Weight(codes, scales, zps, offsets, sub_scales, sub_offsets, table, group_size)
    floats = np.empty(codes.shape, _F32)
    with np.errstate(all="ignore"):
        for g, part in enumerate(w.groups):
            floats[:, part] = w.centred(g).astype(_F32) * w.scales[:, g, None]
            if w.offsets is not None:
                floats[:, part] += w.offsets[:, g, None]
        floats = rotate(floats, rotation)
        if factors is not None:
            floats *= factors.astype(_F32)
    if perm is None:
        return floats
    restored = np.empty_like(floats)
    restored[:, perm] = floats
    return restored


def gate(
    gates: npt.NDArray[Any],
    ups: npt.NDArray[Any],
    activation: str = "silu",
    *,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> npt.NDArray[Any]:
    """Return ``activation(gates) * ups`` in float32, each operation rounded once.

    Parameters
    ----------
    gates, ups : ndarray of float32
        Of one shape.
    activation : {'silu', 'gelu', 'gelu_tanh', 'swigluoai'}
        The function of the gates.
    alpha, limit : float
        Of 'swigluoai'.

    Returns
    -------
    ndarray of float32
        Of their shape, with one NaN.
    """
    gates, ups = gates.astype(_F32), ups.astype(_F32)
    with np.errstate(all="ignore"):
        if activation != "swigluoai":
            return convert({"silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh}[activation](gates) * ups, "float32")
        most = _F32(limit)
        y = _swish(_least(most, gates), _F32(alpha)) * (_most(-most, _least(most, ups)) + _F32(1))
        return convert(y, "float32")


def _least(a: Any, b: Any) -> npt.NDArray[Any]:
    """The second where one is NaN or both are zeros."""
    return np.where(a < b, a, b)


def _most(a: Any, b: Any) -> npt.NDArray[Any]:
    """Likewise."""
    return np.where(a > b, a, b)


def _silu(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    x = _most(_F32(-150), x)
    return _times_sigmoid(x, *_reduce(_least(x, _F32(87))))


def _gelu(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    t = _least(np.abs(x), _F32(14.37))
    piece = (t + _F32(1)).view(np.uint32) >> 22 & 7
    centers, *coefficients = _GELU
    m = _polynomial(t - centers[piece], [c[piece] for c in coefficients])
    kt = t * np.where(piece < 6, _F32(0.5), _F32(0))
    r, n = _reduce(t * kt, fma(t, kt, -(t * kt)))
    m = -np.ldexp(m, n)
    return fma(m, _fraction(r), _most(_F32(-0.0), x) + m)


def _gelu_tanh(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    (c, c_low), (d, d_low) = _TANH_C, _TANH_D
    x = _most(_F32(-11), x)
    y = _least(x, _F32(9.5))
    square = y * y
    factor = fma(square, d, c)
    low = fma(fma(y, y, -square), d, fma(square, d_low, c_low))
    low = fma(square, d, c - factor) + low
    z = y * factor
    return _times_sigmoid(x, *_reduce(z, fma(y, low, fma(y, factor, -z))))


def _swish(x: npt.NDArray[Any], alpha: np.float32) -> npt.NDArray[Any]:
    x = _most(_F32(-(2.0**60)), x)
    z = x * alpha
    low = _most(_least(fma(x, alpha, -z), _F32(2.0**-16)), _F32(-(2.0**-16)))
    return _times_sigmoid(x, *_reduce(_least(_most(z, _F32(-150)), _F32(87)), low))


def _times_sigmoid(x: npt.NDArray[Any], r: npt.NDArray[Any], n: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """x / (1 + exp(-z)), where z = r - n * ln 2."""
    least = np.minimum(n, 100)
    power, scale = np.ldexp(_F32(1), least), np.ldexp(_F32(1), least - n)
    y: npt.NDArray[Any] = x * scale / (power + fma(_fraction(r), power, scale))
    return y


def _reduce(z: npt.NDArray[Any], low: npt.NDArray[Any] | None = None) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """-> r, n: z + low = r - n * ln 2."""
    n = fma(-_LOG2_E, z, _F32(3 << 22)) - _F32(3 << 22)  # next to -z / ln 2
    exact = fma(n, _LN2[0], z)
    return fma(n, _LN2[1], exact) if low is None else exact + fma(n, _LN2[1], low), n.astype(int)


def _fraction(r: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """exp(-r) - 1."""
    return fma(r * r, _polynomial(r, _EXP), -r)


def _polynomial(x: npt.NDArray[Any], coefficients: Iterable[Any]) -> npt.NDArray[Any]:
    y: npt.NDArray[Any] = np.zeros_like(x)
    for c in coefficients:
        y = fma(x, y, c)
    return y


def _hex(*numbers: str) -> npt.NDArray[Any]:
    return np.array([float.fromhex(number) for number in numbers], _F32)


# src/kernels/gate_constants.h says what they are.
_LOG2_E = _F32(1.4426950408889634)
_LN2 = _hex("0x1.62e43p-1", "-0x1.05c61p-29")
_EXP = _hex("0x1.6a504cp-10", "-0x1.123974p-7", "0x1.5558acp-5", "-0x1.555492p-3", "0x1.fffffcp-2")
_TANH_C = _hex("0x1.98846p+0", "-0x1.985794p-21")
_TANH_D = _hex("0x1.2444f2p-4", "0x1.49b16ap-29")
# fmt: off
_GELU = [
    _hex("0x1.8000f8p+0", "0x1.400134p+1", "0x1.00029cp+2", "0x1.800172p+2",
         "0x1.2002cap+3", "0x1.9ccf4p+3", "0", "0x1.800236p-1"),
    _hex("0x1.de18e2p-13", "0x1.c3539p-16", "0x1.14a492p-19", "0x1.090cecp-23",
         "0x1.85f4fcp-28", "0x1.2441acp-32", "0x1.f0fa6ap-10", "0x1.67cea6p-9"),
    _hex("-0x1.85ece2p-11", "-0x1.b6bc76p-14", "-0x1.4bbcb8p-17", "-0x1.9e758ap-21",
         "-0x1.9d0836p-25", "-0x1.ac1dfcp-29", "-0x1.6f4b64p-7", "0x1.34b36ep-9"),
    _hex("0x1.21643ep-9", "0x1.880ba2p-12", "0x1.63e0e6p-15", "0x1.2cd148p-18",
         "0x1.85bedap-22", "0x1.262962p-25", "0x1.a70a0cp-12", "-0x1.75fa4cp-6"),
    _hex("-0x1.9ea416p-8", "-0x1.514898p-10", "-0x1.88a48cp-13", "-0x1.b5fb64p-16",
         "-0x1.8b5106p-19", "-0x1.9b70c4p-22", "0x1.1011bcp-4", "0x1.37a2dcp-8"),
    _hex("0x1.0d5facp-6", "0x1.0abee2p-8", "0x1.94331cp-11", "0x1.2ca778p-13",
         "0x1.7daf56p-16", "0x1.12d13ap-18", "0x1.5a4dbcp-18", "0x1.090064p-3"),
    _hex("-0x1.331f1cp-5", "-0x1.7899e6p-7", "-0x1.78f1dp-9", "-0x1.7b54dp-11",
         "-0x1.54a2aap-13", "-0x1.560354p-15", "-0x1.98845cp-2", "-0x1.bb42cep-3"),
    _hex("0x1.203f0ep-4", "0x1.bf3614p-6", "0x1.2dd24cp-7", "0x1.a0ea9ap-9",
         "0x1.0b668ep-10", "0x1.784232p-12", "0x1p-1", "0x1.921ddap-11"),
    _hex("0x1.3c1486p-2", "0x1.69cf2ap-2", "0x1.82b51ep-2", "0x1.8e012p-2",
         "0x1.93a666p-2", "0x1.961ae8p-2", "0", "0x1.5c1982p-3"),
]
# fmt: on


def sum_slots(
    results: npt.NDArray[Any], weights: npt.NDArray[Any], scaling: float = 1.0, *, ids: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    """Return what the results of a token's slots add up to, in float32, in the order of the slots.

    Parameters
    ----------
    results : (..., T, K) ndarray of float32
        What the experts of the slots gave.
    weights : (..., T) ndarray of float32
        What each is multiplied by, itself multiplied by `scaling`.
    scaling : float
        Of all weights.
    ids : (..., T) ndarray of int, optional
        A slot whose id is negative adds nothing.

    Returns
    -------
    (..., K) ndarray of float32
        With one NaN.
    """
    acc: npt.NDArray[Any] = np.zeros((*results.shape[:-2], results.shape[-1]), _F32)
    for slot in range(results.shape[-2]):
        with np.errstate(all="ignore"):
            weight = weights[..., slot].astype(_F32) * _F32(scaling)
        total = fma(results[..., slot, :], weight[..., None], acc)
        acc = total if ids is None else np.where(ids[..., slot, None] < 0, acc, total)
    return convert(acc, "float32")


def linear_gated(
    x: npt.NDArray[Any],
    gate_up: Mapping[str, Any],
    bias: npt.NDArray[Any] | None = None,
    *,
    activation: str = "silu",
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    act: str = "uint8",
    out_dtype: str = "float32",
) -> npt.NDArray[Any]:
    """Return what `pyda8w4.linear_gated` returns, for a matrix.

    Parameters
    ----------
    x : (M, K) ndarray of float32, float16 or bfloat16
        Activations.
    gate_up : mapping of str to ndarray or int
        The weight: `codes`, `scales`, `zps`, `group_size` and what else it has, as `linear` takes them.
    bias : (N,) ndarray of float32, optional
        Added to each row of gates and ups.
    activation : {'silu', 'gelu', 'gelu_tanh', 'swigluoai'}
        The function of the gates.
    interleaved : bool
        Whether gates are the even columns and ups the odd ones; else gates are the first half.
    alpha, limit : float
        Of 'swigluoai'.
    act : {'uint8', 'int8', 'int8_group', 'int16'}
        To what activations are quantized.
    out_dtype : {'float32', 'float16', 'bfloat16'}
        What the result is rounded to.

    Returns
    -------
    (M, N / 2) ndarray
        Of `out_dtype`; bfloat16 as the bits, uint16.
    """
    y = linear(x, bias=bias, act=act, **gate_up)
    half = y.shape[1] // 2
    gates, ups = (y[:, ::2], y[:, 1::2]) if interleaved else (y[:, :half], y[:, half:])
    return convert(gate(gates, ups, activation, alpha=alpha, limit=limit), out_dtype)


def moe(
    x: npt.NDArray[Any],
    gate_up: Sequence[Mapping[str, Any]],
    down: Sequence[Mapping[str, Any]],
    topk_ids: npt.NDArray[Any],
    topk_weights: npt.NDArray[Any],
    *,
    activation: str = "silu",
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    gate_up_bias: npt.NDArray[Any] | None = None,
    down_bias: npt.NDArray[Any] | None = None,
    expert_map: npt.NDArray[Any] | None = None,
    routed_scaling: float = 1.0,
    act: str = "uint8",
    out_dtype: str = "float32",
) -> npt.NDArray[Any]:
    """Return what `pyda8w4.moe` returns, for a matrix.

    Parameters
    ----------
    x : (M, K) ndarray of float32, float16 or bfloat16
        One row per token.
    gate_up, down : sequence of mappings of str to ndarray or int
        The weights of each expert, as `linear_gated` takes one.
    topk_ids : (M, T) ndarray of int
        The experts of each token; -1 adds nothing.
    topk_weights : (M, T) ndarray of float32
        What their results are multiplied by.
    activation : {'silu', 'gelu', 'gelu_tanh', 'swigluoai'}
        The function of the gates.
    interleaved : bool
        Whether gates are the even columns and ups the odd ones; else gates are the first half.
    alpha, limit : float
        Of 'swigluoai'.
    gate_up_bias : (E, 2 I) ndarray of float32, optional
        Added to gates and ups.
    down_bias : (E, N) ndarray of float32, optional
        Added to the results of the experts.
    expert_map : (E_global,) ndarray of int, optional
        The expert of each id, or -1.
    routed_scaling : float
        What all weights are multiplied by.
    act : {'uint8', 'int8', 'int8_group', 'int16'}
        To what the inputs of both products are quantized.
    out_dtype : {'float32', 'float16', 'bfloat16'}
        What the result is rounded to.

    Returns
    -------
    (M, N) ndarray
        Of `out_dtype`; bfloat16 as the bits, uint16.
    """
    ids = topk_ids if expert_map is None else np.where(topk_ids < 0, -1, expert_map[topk_ids])
    results = np.zeros((*ids.shape, len(down[0]["codes"])), _F32)
    for expert in set(ids[ids >= 0].tolist()):
        chosen = ids == expert
        h = linear_gated(
            x[np.nonzero(chosen)[0]],
            gate_up[expert],
            None if gate_up_bias is None else gate_up_bias[expert],
            activation=activation,
            interleaved=interleaved,
            alpha=alpha,
            limit=limit,
            act=act,
        )
        results[chosen] = linear(h, bias=None if down_bias is None else down_bias[expert], act=act, **down[expert])
    return convert(sum_slots(results, topk_weights, routed_scaling, ids=ids), out_dtype)


class _Weight:
    """What codes stand for, with scales and offsets of one level."""

    def __init__(
        self,
        codes: npt.NDArray[Any],
        scales: npt.NDArray[Any],
        zps: npt.NDArray[Any],
        offsets: npt.NDArray[Any] | None,
        sub_scales: npt.NDArray[Any] | None,
        sub_offsets: npt.NDArray[Any] | None,
        table: npt.NDArray[Any] | None,
        group_size: int,
    ) -> None:
        k = codes.shape[1]
        self.values: npt.NDArray[Any] = (codes if table is None else table[codes]).astype(np.float64)
        self.zps = zps.astype(np.float64)
        self.scales = _one_level(scales, sub_scales)
        self.offsets = None if offsets is None else _one_level(offsets, sub_offsets)
        self.groups = [slice(begin, min(begin + group_size, k)) for begin in range(0, k, group_size)]

    def centred(self, g: int) -> npt.NDArray[Any]:
        """Values less their zero points."""
        return self.values[:, self.groups[g]] - self.zps[:, g, None]

    def dots(self, act: npt.NDArray[Any], g: int) -> npt.NDArray[Any]:
        """The integer sums of a group, exact (they are below 2**53), rounded to float32 once."""
        sums: npt.NDArray[Any] = (act[:, self.groups[g]] @ self.centred(g).T).astype(_F32)
        return sums


def _one_level(floats: npt.NDArray[Any], subs: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    floats = floats.astype(_F32)
    if subs is None:
        return floats
    size = -(-subs.shape[1] // floats.shape[1])
    with np.errstate(all="ignore"):
        return np.repeat(floats, size, axis=1)[:, : subs.shape[1]] * subs.astype(_F32)


def _sums(act: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Of each row, as a column of float32."""
    sums: npt.NDArray[Any] = act.sum(axis=1, dtype=np.float64).astype(_F32)
    return sums[:, None]


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
