"""From int4 codes, scales, zero points and offsets to the packed form."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyda8w4 import _core
from pyda8w4._checks import (
    BLOCK,
    FLOATS,
    QUAD,
    TYPES,
    as_array,
    as_array_of,
    ceil_div,
    check_dtype,
    check_group_size,
    check_shape,
    plain,
    type_name,
)
from pyda8w4._packed import PackedWeight, aligned_empty

_FORMATS = {"uint8": 0, "int8": 1, "low_first": 2, "high_first": 3}
_SCALE_TYPES = {number: name for name, number in TYPES.items()}


def _codes(w_int4: Any, nibbles: str | None) -> tuple[np.ndarray, str, int]:
    """-> codes with contiguous rows, their format, K."""
    w = as_array("w_int4", w_int4)
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"w_int4 must be a non-empty matrix (N, K), got shape {w.shape}")
    if nibbles is not None:
        if nibbles not in ("low_first", "high_first"):
            raise ValueError(f"nibbles must be 'low_first', 'high_first' or None, got {nibbles!r}")
        check_dtype("w_int4 with nibbles", w, ("uint8",))
        form, k = nibbles, 2 * w.shape[1]
    else:
        # ml_dtypes' 4-bit types keep one element a byte.
        if type_name(w.dtype) in ("int4", "uint4"):
            w = w.astype(np.int8 if w.dtype.name == "int4" else np.uint8)
        form, k = check_dtype("w_int4", w, ("uint8", "int8")), w.shape[1]
    if w.strides[1] != 1 or w.strides[0] < w.shape[1]:
        w = np.ascontiguousarray(w)
    return w, form, k


def _per_group(name: str, value: np.ndarray, n: int) -> np.ndarray:
    """(N,) as (N, 1); anything but a matrix with N rows is refused."""
    if value.shape == (n,):
        value = value[:, None]
    if value.ndim != 2 or value.shape[0] != n or value.shape[1] == 0:
        raise ValueError(f"{name} must have shape ({n},) or ({n}, G), got {value.shape}")
    return value


def _floats(name: str, value: Any, n: int) -> np.ndarray:
    """-> finite float32, one for each group."""
    floats, _ = as_array_of(name, value, FLOATS)
    floats = plain(_per_group(name, floats, n).astype(np.float32, copy=False))
    if not np.isfinite(floats).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return floats


def _group_size(k: int, groups: int, group_size: int | None) -> int:
    if group_size is not None:
        group = check_group_size(group_size, k)
        if ceil_div(k, group) != groups:
            raise ValueError(f"group_size {group_size} does not fit scales with {groups} groups of K = {k}")
        return group
    if k % groups == 0:
        group = k // groups
        if group % QUAD and group != k:
            raise ValueError(f"scales with {groups} groups of K = {k} make groups of {group}, not a multiple of 4")
        return group
    group = ceil_div(ceil_div(k, groups), QUAD) * QUAD
    if ceil_div(k, group) != groups:
        raise ValueError(f"scales must have G groups of one size for K = {k}, got G = {groups}, which none gives")
    if ceil_div(k, group + QUAD) == groups:
        raise ValueError(f"group_size must be given: several sizes make {groups} groups of K = {k}")
    return group


def prepack(
    w_int4: np.ndarray,
    scales: np.ndarray,
    zps: np.ndarray | None = None,
    offsets: np.ndarray | None = None,
    *,
    group_size: int | None = None,
    nibbles: str | None = None,
) -> PackedWeight:
    """Pack an int4 weight matrix for `gemm` and `linear`.

    Parameters
    ----------
    w_int4 : (N, K) ndarray of uint8 (0 to 15), int8 (-8 to 7), or ml_dtypes uint4 or int4
        One code per element; or (N, K / 2) uint8 with two codes a byte, see `nibbles`.
    scales : (N, G) or (N,) ndarray of float32, float16 or bfloat16
        Finite. G is the number of groups of consecutive k; (N,) means one.
    zps : (N, G) or (N,) ndarray of integers, optional
        Zero points: ``w = (w_int4 - zps) * scales + offsets``. None means 8 for unsigned codes and 0
        for signed ones. -128 to 127 (signed codes: -136 to 119).
    offsets : (N, G) or (N,) ndarray of float32, float16 or bfloat16, optional
        Finite. For weights whose zero is no integer code: with ``zps`` of 0, the minima of GGUF's Q4_1
        as they are, or ``-zero * scale`` of a float zero point.
    group_size : int, optional
        Elements of k in a group: a multiple of 4, or K. None means K / G, or where G does not divide
        K (the last group is shorter) the one multiple of 4 that makes G groups; if there are
        several, it must be given.
    nibbles : {None, 'low_first', 'high_first'}
        Where `w_int4` holds two codes a byte: which nibble is the even k.

    Returns
    -------
    PackedWeight

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If shapes do not fit each other, a code, scale, zero point or offset is out of range, or the sum
        over a group could exceed int32 (``group_size * 128 * max|w_int4 - zps| >= 2**31``).
    MemoryError
        If there is no memory for the packed weight.

    Notes
    -----
    The inputs are not changed. Packing uses several threads, and no more memory than the packed
    weight beside C-contiguous inputs; others are copied first.

    Examples
    --------
    >>> import numpy as np
    >>> import pyda8w4
    >>> w_int4 = np.array([[8, 9, 10, 11, 7, 6, 5, 4]], np.uint8)
    >>> packed = pyda8w4.prepack(w_int4, scales=np.array([[0.5, 2.0]], np.float32))
    >>> packed.group_size
    4
    >>> pyda8w4.gemm(np.ones((1, 8), np.int8), packed)
    array([[-17.]], dtype=float32)

    A block of GGUF's Q4_1, ``w = code * d + m``:

    >>> d, m = np.array([[0.5]], np.float16), np.array([[-3.0]], np.float16)
    >>> packed = pyda8w4.prepack(np.array([[0, 6, 15, 6]], np.uint8), d, np.zeros((1, 1), np.int8), m)
    >>> pyda8w4.gemm(np.eye(4, dtype=np.int8), packed).ravel()
    array([-3. ,  0. ,  4.5,  0. ], dtype=float32)
    """
    w, form, k = _codes(w_int4, nibbles)
    n = w.shape[0]

    scales = _floats("scales", scales, n)
    group = _group_size(k, scales.shape[1], group_size)

    zp = 0 if form == "int8" else 8
    if zps is not None:
        zps = as_array("zps", zps)
        if zps.dtype.kind not in "iu":
            raise TypeError(f"zps must be an array of integers, got {zps.dtype}")
        zps = _per_group("zps", zps, n)
        check_shape("zps", zps, scales.shape)
        low, high = (-136, 119) if form == "int8" else (-128, 127)
        least, most = int(zps.min()), int(zps.max())
        if least < low or most > high:
            raise ValueError(f"zps must be {low} to {high} for {form} codes, got {least} to {most}")
        # The C interface takes an array of int8, or one number for all.
        if least == most:
            zp, zps = least, None
        elif least < -128:
            raise ValueError(f"zps must be -128 to 119 for int8 codes where they differ, got {least} to {most}")
        else:
            zps = np.ascontiguousarray(zps, dtype=np.int8)

    if offsets is not None:
        offsets = _floats("offsets", offsets, n)
        check_shape("offsets", offsets, scales.shape)

    # numpy gives a single row any stride, such as the 0 of w[None].
    stride = max(w.strides[0], w.shape[1])
    source = _core.Source(n, k, group, _FORMATS[form], w, stride, scales, zps, zp, offsets)
    try:
        scale_type, zero_point, zp_bytes = source.plan_pack()
        scale_dtype = _SCALE_TYPES[scale_type]
        blocks, groups = ceil_div(n, BLOCK), scales.shape[1]
        stored = np.uint16 if scale_dtype == "bfloat16" else np.dtype(scale_dtype)
        arrays = aligned_empty(
            ((blocks, ceil_div(k, QUAD), 2 * BLOCK), np.uint8),
            ((blocks, groups, BLOCK), stored),
            ((blocks, BLOCK), np.float32),
            ((blocks if zp_bytes else 0, groups, BLOCK), np.int8),
            ((0 if offsets is None else blocks, groups, BLOCK), stored),
        )
        codes, packed_scales, sums = arrays[:3]
        packed_zps = arrays[3] if zp_bytes else None
        packed_offsets = None if offsets is None else arrays[4]
        source.pack(codes, packed_scales, packed_zps, packed_offsets, sums)
    except _core.CoreError as error:
        raise ValueError(_why(error, w, form, group)) from None
    return PackedWeight._from_arrays(
        (n, k),
        group,
        scale_dtype,
        None if zp_bytes else zero_point,
        codes=codes,
        scales=packed_scales,
        sums=sums,
        zps=packed_zps,
        offsets=packed_offsets,
    )


def _why(error: Exception, w: np.ndarray, form: str, group: int) -> str:
    status, text = error.args
    if status == "BAD_CODE":
        takes = "-8 to 7" if form == "int8" else "0 to 15"
        return f"w_int4 must hold {takes} as {form}, got {w.min()} to {w.max()}"
    if status == "INT32_OVERFLOW":
        limit = "group_size * 128 * max|w_int4 - zps| must stay below 2**31"
        return f"group_size {group} is too large for these zps: {limit}"
    return str(text)
