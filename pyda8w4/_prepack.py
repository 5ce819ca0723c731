"""From int4 codes, scales, zero points and offsets to the packed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import FLOATS, TYPES, as_array, as_array_of, check_dtype, check_shape, plain, type_name
from pyda8w4._core import CoreError, Source
from pyda8w4._format import INT32_RULE, Format, check_group_size, group_count, group_size_of
from pyda8w4._packed import PackedWeight, empty_arrays

_FORMATS = {"uint8": 0, "int8": 1, "low_first": 2, "high_first": 3}
_SCALE_TYPES = {number: name for name, number in TYPES.items()}


def _codes(w_int4: npt.ArrayLike, nibbles: str | None) -> tuple[npt.NDArray[Any], str, int]:
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


def _per_group(name: str, value: npt.NDArray[Any], n: int) -> npt.NDArray[Any]:
    """(N,) as (N, 1); anything but a matrix with N rows is refused."""
    if value.shape == (n,):
        value = value[:, None]
    if value.ndim != 2 or value.shape[0] != n or value.shape[1] == 0:
        raise ValueError(f"{name} must have shape ({n},) or ({n}, G), got {value.shape}")
    return value


def _floats(name: str, value: npt.ArrayLike, n: int) -> npt.NDArray[np.float32]:
    """-> finite float32, one for each group."""
    floats, _ = as_array_of(name, value, FLOATS)
    floats = plain(_per_group(name, floats, n).astype(np.float32, copy=False))
    if not np.isfinite(floats).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return floats


def _group_size(k: int, groups: int, group_size: int | None) -> int:
    if group_size is None:
        return group_size_of(k, groups)
    group = check_group_size(group_size, k)
    if group_count(k, group) != groups:
        raise ValueError(f"group_size {group_size} does not fit scales with {groups} groups of K = {k}")
    return group


def _zero_points(
    value: npt.ArrayLike | None, form: str, shape: tuple[int, ...]
) -> tuple[npt.NDArray[np.int8] | None, int]:
    """-> an array of int8, or None and the one of all groups."""
    if value is None:
        return None, 0 if form == "int8" else 8
    zps = as_array("zps", value)
    if zps.dtype.kind not in "iu":
        raise TypeError(f"zps must be an array of integers, got {zps.dtype}")
    zps = _per_group("zps", zps, shape[0])
    check_shape("zps", zps, shape)
    low, high = (-136, 119) if form == "int8" else (-128, 127)
    least, most = int(zps.min()), int(zps.max())
    if least < low or most > high:
        raise ValueError(f"zps must be {low} to {high} for {form} codes, got {least} to {most}")
    if least == most:
        return None, least
    if least < -128:
        raise ValueError(f"zps must be -128 to 119 for int8 codes where they differ, got {least} to {most}")
    return np.ascontiguousarray(zps, dtype=np.int8), 0


def prepack(
    w_int4: npt.ArrayLike,
    scales: npt.ArrayLike,
    zps: npt.ArrayLike | None = None,
    offsets: npt.ArrayLike | None = None,
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
        Of shape (N, K); owns its memory.

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
    zps, zp = _zero_points(zps, form, scales.shape)
    if offsets is not None:
        offsets = _floats("offsets", offsets, n)
        check_shape("offsets", offsets, scales.shape)

    source = Source(
        n=n,
        k=k,
        group=group,
        format=_FORMATS[form],
        codes=w,
        codes_stride=max(w.strides[0], w.shape[1]),  # numpy gives a single row any stride, such as the 0 of w[None]
        scales=scales,
        zps=zps,
        zp=zp,
        offsets=offsets,
    )
    try:
        scale_type, zero_point = source.plan_pack()
        packed = Format(n, k, group, _SCALE_TYPES[scale_type], zero_point, offsets is not None)
        arrays = empty_arrays(packed)
        source.pack(**arrays)
    except CoreError as error:
        raise ValueError(_why(error, w, form, group)) from None
    return PackedWeight._from_arrays(packed, arrays)


def _why(error: CoreError, w: npt.NDArray[Any], form: str, group: int) -> str:
    status, text = error.args
    if status == "BAD_CODE":
        takes = "-8 to 7" if form == "int8" else "0 to 15"
        return f"w_int4 must hold {takes} as {form}, got {w.min()} to {w.max()}"
    if status == "INT32_OVERFLOW":
        return f"group_size {group} is too large for these zps: {INT32_RULE}"
    return str(text)
