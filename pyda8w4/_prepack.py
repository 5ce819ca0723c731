"""From codes, scales, zero points and offsets to the packed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4 import _advice
from pyda8w4._checks import (
    FLOATS,
    INTEGERS,
    as_array,
    as_array_of,
    ceil_div,
    check_dtype,
    check_shape,
    one_of,
    plain,
    type_name,
)
from pyda8w4._core import CoreError
from pyda8w4._format import (
    BITS,
    INT32_RULE,
    KINDS,
    TABLE_SIZE,
    check_factors,
    check_group_size,
    check_perm,
    check_rotation,
    group_count,
    group_size_of,
)
from pyda8w4._packed import PackedWeight, pack


def prepack(
    codes: npt.ArrayLike,
    scales: npt.ArrayLike,
    zps: npt.ArrayLike | None = None,
    offsets: npt.ArrayLike | None = None,
    *,
    bits: int = 4,
    table: npt.ArrayLike | None = None,
    sub_scales: npt.ArrayLike | None = None,
    sub_offsets: npt.ArrayLike | None = None,
    perm: npt.ArrayLike | None = None,
    factors: npt.ArrayLike | None = None,
    rotation: int = 0,
    group_size: int | None = None,
    nibbles: str | None = None,
) -> PackedWeight:
    """Pack a quantized weight matrix for `gemm` and `linear`.

    Parameters
    ----------
    codes : (N, K) ndarray of uint8 or int8, or ml_dtypes uint4 or int4
        One code per element, of `bits` bits: with 4, uint8 from 0 to 15 or int8 from -8 to 7. Or (N, K / 2)
        uint8 with two codes a byte, see `nibbles`.
    scales : (N, G) or (N,) ndarray of float32, float16 or bfloat16
        Finite. G is the number of groups of consecutive k; (N,) means one. With `sub_scales`: (N, S), one for
        each super-group.
    zps : (N, G) or (N,) ndarray of integers, optional
        Zero points: ``w = (codes - zps) * scales + offsets``. None means half the range for unsigned codes (8
        of 4 bits) and 0 for signed ones and tables. -128 to 127; lower by half the range for signed codes of
        4 to 6 bits (-136 to 119 of 4 bits); 0 to 255 for unsigned codes of 8 bits.
    offsets : (N, G) or (N,) ndarray of float32, float16 or bfloat16, optional
        Finite. For weights whose zero is no integer code: with ``zps`` of 0, the minima of GGUF's Q4_1
        as they are, or ``-zero * scale`` of a float zero point. With `sub_scales`: (N, S).
    bits : {4, 5, 6, 8}
        Of a code.
    table : (16,) ndarray of integers, optional
        -128 to 127: what codes of 4 bits, as uint8, stand for: ``w = table[codes] * scales + offsets``.
    sub_scales : (N, G) ndarray of uint8 or int8, optional
        Scales of two levels: that of group g is ``scales[:, g // size] * sub_scales[:, g]``, with a size of
        ceil(G / S) groups, and is exact in float32.
    sub_offsets : (N, G) ndarray of uint8 or int8, optional
        The same of offsets. Offsets have two levels where scales have.
    perm : (K,) ndarray of integers, optional
        Each of 0 to K - 1 once: column k of `codes` multiplies ``x[perm[k]]``. For weights whose columns were
        sorted before they were cut into groups.
    factors : (K,) ndarray of float32, float16 or bfloat16, optional
        Column k of `codes` multiplies ``x[perm[k]] * factors[k]``. Finite. `gemm` does not take such weights.
    rotation : int
        0, or a power of two from 2 to 1024: after `perm` and `factors`, the inputs go through a Hadamard
        transform in blocks of so many. That is not normalized: `codes` are those of the transformed matrix,
        divided by the size of the block (docs/numbers.md). `gemm` does not take such weights.
    group_size : int, optional
        Elements of k in a group: a multiple of 4, or K. None means K / G, or where G does not divide
        K (the last group is shorter) the one multiple of 4 that makes G groups; if there are
        several, it must be given.
    nibbles : {None, 'low_first', 'high_first'}
        Where `codes` holds two codes of 4 bits a byte: which nibble is the even k.

    Returns
    -------
    PackedWeight
        Of shape (N, K); owns its memory.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If shapes do not fit each other, a code, scale, zero point, offset or factor is out of range, a product
        of two levels is not exact in float32, `perm` is no permutation, there is no such `rotation`, or the sum
        over a group could exceed int32 (``group_size * 128 * max|codes - zps| >= 2**31``).
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
    >>> codes = np.array([[8, 9, 10, 11, 7, 6, 5, 4]], np.uint8)
    >>> packed = pyda8w4.prepack(codes, scales=np.array([[0.5, 2.0]], np.float32))
    >>> packed.group_size
    4
    >>> pyda8w4.gemm(np.ones((1, 8), np.int8), packed)
    array([[-17.]], dtype=float32)

    A block of GGUF's Q4_1, ``w = code * d + m``:

    >>> d, m = np.array([[0.5]], np.float16), np.array([[-3.0]], np.float16)
    >>> packed = pyda8w4.prepack(np.array([[0, 6, 15, 6]], np.uint8), d, np.zeros((1, 1), np.int8), m)
    >>> pyda8w4.gemm(np.eye(4, dtype=np.int8), packed).ravel()
    array([-3. ,  0. ,  4.5,  0. ], dtype=float32)

    Weights of 8 bits, with a scale for each row:

    >>> pyda8w4.prepack(np.array([[-128, 5, 127, 0]], np.int8), np.array([0.25], np.float32), bits=8).dequantize()
    array([[-32.  ,   1.25,  31.75,   0.  ]], dtype=float32)

    Scales of two levels:

    >>> d, q = np.array([[0.5]], np.float16), np.array([[1, 63]], np.uint8)
    >>> packed = pyda8w4.prepack(np.full((1, 8), 9, np.uint8), d, sub_scales=q)
    >>> packed.dequantize()
    array([[ 0.5,  0.5,  0.5,  0.5, 31.5, 31.5, 31.5, 31.5]], dtype=float32)
    """
    given: dict[str, npt.NDArray[Any]] = {}
    bits = _bits(bits, table)
    given["codes"], form, k, shift = _codes(codes, bits, table, nibbles)
    n = len(given["codes"])
    given["scales"] = _floats("scales", scales, n)
    floats_shape = given["scales"].shape
    given |= _second_level(sub_scales, sub_offsets, offsets, n)
    per_group = given.get("sub_scales", given["scales"]).shape
    group = _group_size(k, per_group[1], group_size, "scales" if sub_scales is None else "sub_scales")
    super_size = 0 if sub_scales is None else _super_size(per_group[1], floats_shape[1])
    if offsets is not None:
        given["offsets"] = _floats("offsets", offsets, n)
        check_shape("offsets", given["offsets"], floats_shape)
    zps, zp = _zero_points(zps, bits, form, shift, per_group, table)
    if zps is not None:
        given["zps"] = zps
    if table is not None:
        given["table"] = _table(table)
    if perm is not None:
        given["perm"] = _permutation(perm, k)
    if factors is not None:
        given["factors"] = _factors(factors, k)
    rotation = check_rotation("rotation", rotation)
    try:
        return pack(
            given,
            k=k,
            bits=bits,
            form=form,
            group_size=group,
            super_size=super_size,
            zero_point=zp,
            rotation=rotation,
        )
    except CoreError as error:
        raise ValueError(_why(error, given["codes"], form, shift, bits, group)) from None


def _bits(value: Any, table: npt.ArrayLike | None) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"bits must be an int, got {type(value).__name__}")
    if (int(value), table is not None) not in KINDS:
        raise ValueError(f"bits must be {'4 with a table' if table is not None else one_of(BITS)}, got {value}")
    return int(value)


def _codes(
    value: npt.ArrayLike, bits: int, table: npt.ArrayLike | None, nibbles: str | None
) -> tuple[npt.NDArray[Any], str, int, int]:
    """-> codes with contiguous rows, their format, K, and what was subtracted from them."""
    codes = as_array("codes", value)
    if codes.ndim != 2 or 0 in codes.shape:
        raise ValueError(f"codes must be a non-empty matrix (N, K), got shape {codes.shape}")
    k, shift = codes.shape[1], 0
    if nibbles is not None:
        if nibbles not in ("low_first", "high_first"):
            raise ValueError(f"nibbles must be 'low_first', 'high_first' or None, got {nibbles!r}")
        if bits != 4:
            raise ValueError(f"nibbles must be None for codes of {bits} bits, got {nibbles!r}")
        check_dtype("codes with nibbles", codes, ("uint8",), value)
        form, k = nibbles, 2 * k
    else:
        # ml_dtypes' 4-bit types keep one element a byte.
        if type_name(codes.dtype) in ("int4", "uint4"):
            codes = codes.astype(np.int8 if codes.dtype.name == "int4" else np.uint8)
        form = check_dtype("codes", codes, INTEGERS if table is None else ("uint8",), value)
        if form == "uint8" and bits == 8:
            codes, form, shift = (codes ^ np.uint8(128)).view(np.int8), "int8", 128
    if codes.strides[1] != 1 or codes.strides[0] < codes.shape[1]:
        codes = np.ascontiguousarray(codes)
    return codes, form, k, shift


def _per_group(name: str, value: npt.NDArray[Any], n: int) -> npt.NDArray[Any]:
    """(N,) as (N, 1); anything but a matrix with N rows is refused."""
    if value.shape == (n,):
        value = value[:, None]
    if value.ndim != 2 or value.shape[0] != n or value.shape[1] == 0:
        hint = _advice.for_transposed(name, value.shape, (n, *value.shape[:1]))
        raise ValueError(f"{name} must have shape ({n},) or ({n}, G) for {n} rows of codes, got {value.shape}{hint}")
    return value


def _floats(name: str, value: npt.ArrayLike, n: int) -> npt.NDArray[np.float32]:
    """-> finite float32, one for each group."""
    floats, _ = as_array_of(name, value, FLOATS)
    floats = plain(_per_group(name, floats, n).astype(np.float32, copy=False))
    if not np.isfinite(floats).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return floats


def _second_level(
    sub_scales: npt.ArrayLike | None, sub_offsets: npt.ArrayLike | None, offsets: npt.ArrayLike | None, n: int
) -> dict[str, npt.NDArray[Any]]:
    if sub_scales is None:
        if sub_offsets is not None:
            raise ValueError("sub_offsets must come with sub_scales, got no sub_scales")
        return {}
    if (sub_offsets is None) != (offsets is None):
        got = "offsets" if sub_offsets is None else "sub_offsets"
        raise ValueError(f"offsets and sub_offsets must come together with sub_scales, got only {got}")
    found = {}
    for name, value in (("sub_scales", sub_scales), ("sub_offsets", sub_offsets)):
        if value is not None:
            array, _ = as_array_of(name, value, INTEGERS)
            found[name] = plain(_per_group(name, array, n))
    if sub_offsets is not None:
        check_shape("sub_offsets", found["sub_offsets"], found["sub_scales"].shape)
    return found


def _group_size(k: int, groups: int, group_size: int | None, name: str) -> int:
    if group_size is None:
        return group_size_of(k, groups, name)
    group = check_group_size(group_size, k)
    if group_count(k, group) != groups:
        raise ValueError(
            f"group_size must make of K = {k} the {groups} groups that {name} has, got {group_size}, which makes "
            f"{group_count(k, group)}"
        )
    return group


def _super_size(groups: int, supers: int) -> int:
    size = ceil_div(groups, supers)
    if ceil_div(groups, size) != supers:
        raise ValueError(
            f"scales must have S super-groups of one size for the {groups} groups of sub_scales, got S = {supers}, "
            "which none gives"
        )
    return size


def _zero_points(
    value: npt.ArrayLike | None,
    bits: int,
    form: str,
    shift: int,
    shape: tuple[int, ...],
    table: npt.ArrayLike | None,
) -> tuple[npt.NDArray[np.int8] | None, int]:
    """-> an array of int8, or None and the one of all groups; of codes as they are passed on."""
    signed = form == "int8"
    if value is None:
        return None, 0 if signed or table is not None else 1 << (bits - 1)
    zps = as_array("zps", value)
    if zps.dtype.kind not in "iu":
        hint = "; offsets = -zps * scales, with zps of 0, takes floats" if zps.dtype.kind == "f" else ""
        raise TypeError(f"zps must be an array of integers, got {zps.dtype}{hint}")
    zps = _per_group("zps", zps, shape[0])
    check_shape("zps", zps, shape)
    raised = 1 << (bits - 1) if signed and bits < 8 else 0  # when such codes are packed
    low, high = shift - raised - 128, shift - raised + 127
    least, most = int(zps.min()), int(zps.max())
    if table is not None and (least or most):
        raise ValueError(f"zps must be 0 with a table, got {least} to {most}")
    if least < low or most > high:
        given = "uint8" if shift else form
        raise ValueError(f"zps must be {low} to {high} for {given} codes, got {least} to {most}")
    if least == most:
        return None, least - shift
    if least - shift < -128:
        raise ValueError(f"zps must be -128 to {high} for int8 codes where they differ, got {least} to {most}")
    return np.ascontiguousarray(zps.astype(np.int16) - shift if shift else zps, dtype=np.int8), 0


def _table(value: npt.ArrayLike) -> npt.NDArray[np.int8]:
    table = _integers("table", value, TABLE_SIZE, -128, 127)
    return table.astype(np.int8)


def _permutation(value: npt.ArrayLike, k: int) -> npt.NDArray[np.int32]:
    perm = _integers("perm", value, k, 0, k - 1).astype(np.int32)
    check_perm(perm)
    return perm


def _integers(name: str, value: npt.ArrayLike, size: int, least: int, most: int) -> npt.NDArray[Any]:
    array = as_array(name, value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be an array of integers, got {array.dtype}")
    check_shape(name, array, (size,))
    if array.min() < least or array.max() > most:
        raise ValueError(f"{name} must hold {least} to {most}, got {array.min()} to {array.max()}")
    return array


def _factors(value: npt.ArrayLike, k: int) -> npt.NDArray[np.float32]:
    factors, _ = as_array_of("factors", value, FLOATS)
    check_shape("factors", factors, (k,))
    factors = factors.astype(np.float32, copy=False)
    check_factors(factors)
    return factors


def _why(error: CoreError, codes: npt.NDArray[Any], form: str, shift: int, bits: int, group: int) -> str:
    status, text = error.args
    if status == "BAD_CODE":
        half = 1 << (bits - 1)
        takes = f"{-half} to {half - 1}" if form == "int8" else f"0 to {2 * half - 1}"
        two_codes = ", nibbles two codes a byte" if form == "uint8" and bits == 4 else ""
        return (
            f"codes must hold {takes} as {form} of {bits} bits, got {codes.min()} to {codes.max()}; "
            f"bits=8 takes codes of 8 bits{two_codes}"
        )
    if status == "INEXACT_SCALE":
        return "scales * sub_scales and offsets * sub_offsets must be exact and finite in float32, got one that is not"
    if status == "INT32_OVERFLOW":
        return f"group_size {group} is too large for these zps: {INT32_RULE}"
    return str(text)
