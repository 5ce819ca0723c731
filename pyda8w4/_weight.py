"""Weights: from floats to int4, and from int4 to the packed form that the kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyda8w4 import _core
from pyda8w4._checks import (
    FLOATS,
    TYPES,
    as_array,
    check_dtype,
    check_shape,
    type_name,
)

BLOCK = 32  # columns (n) of one packed block
QUAD = 4  # consecutive k of one packed line

_EPSILON = np.float32(2.0**-23)
_FORMATS = {"uint8": 0, "int8": 1, "low_first": 2, "high_first": 3}
_SCALE_TYPES = {number: name for name, number in TYPES.items()}


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _check_group_size(group_size: Any) -> int:
    if isinstance(group_size, bool) or not isinstance(group_size, (int, np.integer)):
        raise TypeError(f"group_size must be an int, got {type(group_size).__name__}")
    return int(group_size)


def quantize_weight(
    w: np.ndarray, group_size: int = 128, symmetric: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
    w_int4 : (N, K) ndarray of uint8
        Codes 0 to 15.
    scales : (N, G) ndarray of float32
        G = ceil(K / group_size).
    zps : (N, G) ndarray of int8
        Zero points, 0 to 15: ``w ~ (w_int4 - zps) * scales``.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If `w` is not a non-empty matrix of finite numbers, or `group_size` is not as above.

    Notes
    -----
    Round to nearest, in float32, with the formulas of torchao's ``choose_qparams_affine`` and
    ``quantize_affine``. Asymmetric: ``s = max((max(0, max w) - min(0, min w)) / 15, 2**-23)``,
    ``z = clip(-rint(min(0, min w) / s), 0, 15)``. Symmetric: ``s = max(max|w| / 7.5, 2**-23)``,
    ``z = 8``. Code: ``clip(rint(w * (1 / s)) + z, 0, 15)``.

    Examples
    --------
    >>> import numpy as np
    >>> import pyda8w4
    >>> w = np.array([[-1.0, 0.0, 1.0, 2.0]], np.float32)
    >>> pyda8w4.quantize_weight(w, group_size=4)
    (array([[ 0,  5, 10, 15]], dtype=uint8), array([[0.2]], dtype=float32), array([[5]], dtype=int8))
    """
    w = as_array("w", w)
    check_dtype("w", w, FLOATS)
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"w must be a non-empty matrix (N, K), got shape {w.shape}")
    n, k = w.shape
    group = min(_check_group_size(group_size), k)
    if group < 1 or (group % QUAD and group != k):
        raise ValueError(f"group_size must be a multiple of 4, or K = {k}, got {group_size}")
    groups = _ceil_div(k, group)
    codes = np.empty((n, k), np.uint8)
    scales = np.empty((n, groups), np.float32)
    zps = np.empty((n, groups), np.int8)
    rows = max(1, (1 << 20) // k)  # a few MB of temporaries at a time
    for top in range(0, n, rows):
        part = slice(top, top + rows)
        _quantize_rows(w[part], group, symmetric, codes[part], scales[part], zps[part])
    return codes, scales, zps


def _quantize_rows(w, group, symmetric, codes, scales, zps) -> None:
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
    s = np.maximum(s, _EPSILON)
    z = np.full_like(s, 8) if symmetric else np.clip(-np.rint(low / s), 0, 15)
    grouped *= (np.float32(1) / s)[:, :, None]
    np.rint(grouped, out=grouped)
    grouped += z[:, :, None]
    np.clip(grouped, 0, 15, out=grouped)
    codes[:] = grouped.reshape(n, -1)[:, :k]
    scales[:] = s
    zps[:] = z


def aligned_empty(*parts: tuple[tuple[int, ...], np.dtype]) -> list[np.ndarray]:
    """Arrays of these shapes and dtypes in one allocation, each at a multiple of 64 bytes."""
    dtypes = [np.dtype(dtype) for _, dtype in parts]
    sizes = [int(np.prod(shape, dtype=object)) * dtype.itemsize for (shape, _), dtype in zip(parts, dtypes)]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + _ceil_div(size, 64) * 64)
    memory = np.frombuffer(_core.Memory(starts[-1]), np.uint8)
    return [
        memory[start : start + size].view(dtype).reshape(shape)
        for start, size, dtype, (shape, _) in zip(starts, sizes, dtypes, parts)
    ]


class PackedWeight:
    """A weight matrix in the layout that the kernels read; immutable.

    Made by `prepack`, `concat`, `load` or slicing. The layout is the same for every CPU
    (docs/packed-format.md), so a packed weight can be pickled or saved on one machine and used on
    another.

    Attributes
    ----------
    shape : (int, int)
        (N, K): output and input features.
    group_size : int
        Elements of k that share a scale; K where there is one group per row.
    scale_dtype : str
        How scales are stored: ``float16`` or ``bfloat16`` where that loses nothing, else ``float32``.
    nbytes : int
        Bytes of the packed arrays.

    Examples
    --------
    >>> import numpy as np
    >>> import pyda8w4
    >>> packed = pyda8w4.prepack(np.zeros((64, 128), np.uint8), np.ones((64, 4), np.float32))
    >>> packed
    PackedWeight(shape=(64, 128), group_size=32, scales=float16, zero_point=8, nbytes=4864)
    >>> packed[32:].shape
    (32, 128)
    """

    __slots__ = ("_arrays", "_view", "group_size", "scale_dtype", "shape", "zero_point")

    shape: tuple[int, int]
    group_size: int
    scale_dtype: str
    zero_point: int | None  # the one of all groups, or None where they differ

    def __init__(self) -> None:
        raise TypeError("a PackedWeight is made by pyda8w4.prepack, not by its constructor")

    @classmethod
    def _from_arrays(
        cls,
        shape: tuple[int, int],
        group_size: int,
        scale_dtype: str,
        zero_point: int | None,
        codes: np.ndarray,
        scales: np.ndarray,
        zps: np.ndarray | None,
        sums: np.ndarray,
    ) -> PackedWeight:
        """From arrays as docs/packed-format.md has them; bfloat16 scales as their uint16 bits."""
        self = object.__new__(cls)
        arrays = {"codes": codes, "scales": scales, "sums": sums}
        if zps is not None:
            arrays["zps"] = zps
        for name, array in arrays.items():
            arrays[name] = array.view()
            arrays[name].flags.writeable = False
        set_once = object.__setattr__
        set_once(self, "_arrays", arrays)
        set_once(self, "shape", shape)
        set_once(self, "group_size", group_size)
        set_once(self, "scale_dtype", scale_dtype)
        set_once(self, "zero_point", zero_point)
        view = _core.View(
            *shape, group_size, TYPES[scale_dtype], zero_point or 0, codes, scales, zps, sums
        )
        set_once(self, "_view", view)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a PackedWeight is immutable; cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a PackedWeight is immutable; cannot delete {name!r}")

    def __reduce__(self):
        fields = (self.shape, self.group_size, self.scale_dtype, self.zero_point)
        return _rebuild, (*fields, {name: np.asarray(array) for name, array in self._arrays.items()})

    def __repr__(self) -> str:
        zero_point = "per group" if self.zero_point is None else self.zero_point
        return (
            f"PackedWeight(shape={self.shape}, group_size={self.group_size}, scales={self.scale_dtype}, "
            f"zero_point={zero_point}, nbytes={self.nbytes})"
        )

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays.values())

    @property
    def groups(self) -> int:
        """Groups of one row: ceil(K / group_size)."""
        return _ceil_div(self.shape[1], self.group_size)

    def __getitem__(self, rows: slice) -> PackedWeight:
        """Output features `rows`, without copying: ``packed[a:b]`` with a and b multiples of 32 (or b = N).

        Raises
        ------
        TypeError
            If `rows` is not a slice.
        ValueError
            If it is empty, has a step, or does not begin and end at borders of blocks.
        """
        if not isinstance(rows, slice):
            raise TypeError(f"a PackedWeight takes a slice of output features, got {type(rows).__name__}")
        n, k = self.shape
        begin, end, step = rows.indices(n)
        if step != 1 or begin >= end:
            raise ValueError(f"the slice must be non-empty with step 1, got {rows} of {n} output features")
        if begin % BLOCK or (end % BLOCK and end != n):
            raise ValueError(f"the slice must begin and end at multiples of {BLOCK} (or end at {n}), got {rows}")
        blocks = slice(begin // BLOCK, _ceil_div(end, BLOCK))
        parts = {name: array[blocks] for name, array in self._arrays.items()}
        return PackedWeight._from_arrays(
            (end - begin, k), self.group_size, self.scale_dtype, self.zero_point, **{"zps": None, **parts}
        )

    def unpack(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Give back what was packed, exactly.

        Returns
        -------
        w_int4 : (N, K) ndarray of uint8
            Codes 0 to 15. Codes that were given as -8..7 come back 8 higher, and so do their zero
            points.
        scales : (N, G) ndarray of float32
        zps : (N, G) ndarray of int8

        Examples
        --------
        >>> import numpy as np
        >>> import pyda8w4
        >>> w = np.arange(32, dtype=np.uint8).reshape(2, 16) % 16
        >>> packed = pyda8w4.prepack(w, np.ones(2, np.float32))
        >>> bool((packed.unpack()[0] == w).all())
        True
        """
        n, k = self.shape
        codes = np.empty((n, k), np.uint8)
        scales = np.empty((n, self.groups), np.float32)
        zps = np.empty((n, self.groups), np.int8)
        self._view.unpack(codes, scales, zps)
        return codes, scales, zps


def _rebuild(shape, group_size, scale_dtype, zero_point, arrays) -> PackedWeight:
    places = aligned_empty(*((array.shape, array.dtype) for array in arrays.values()))
    for place, array in zip(places, arrays.values()):
        place[...] = array
    parts = dict(zip(arrays, places))
    return PackedWeight._from_arrays(shape, group_size, scale_dtype, zero_point, **{"zps": None, **parts})


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


def _group_size(k: int, groups: int, group_size: int | None) -> int:
    if group_size is not None:
        group = min(_check_group_size(group_size), k)
        if group < 1 or _ceil_div(k, group) != groups:
            raise ValueError(f"group_size {group_size} does not fit scales with {groups} groups of K = {k}")
    elif k % groups == 0:
        group = k // groups
    else:
        group = _ceil_div(_ceil_div(k, groups), QUAD) * QUAD
        if _ceil_div(k, group) != groups:
            raise ValueError(f"scales must have G groups of one size for K = {k}, got G = {groups}, which none gives")
        if _ceil_div(k, group + QUAD) == groups:
            raise ValueError(f"group_size must be given: several sizes make {groups} groups of K = {k}")
    if group % QUAD and group != k:
        raise ValueError(f"group_size must be a multiple of 4, or K = {k}, got {group}")
    return group


def prepack(
    w_int4: np.ndarray,
    scales: np.ndarray,
    zps: np.ndarray | None = None,
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
        Zero points: ``w = (w_int4 - zps) * scales``. None means 8 for unsigned codes and 0 for
        signed ones. -128 to 127 (signed codes: -136 to 119).
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
        If shapes do not fit each other, a code, scale or zero point is out of range, or the sum
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
    """
    w, form, k = _codes(w_int4, nibbles)
    n = w.shape[0]

    scales = as_array("scales", scales)
    check_dtype("scales", scales, FLOATS)
    scales = np.ascontiguousarray(_per_group("scales", scales, n), dtype=np.float32)
    if not np.isfinite(scales).all():
        raise ValueError("scales must be finite, got NaN or infinity")
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
        # The C interface takes int8: signed codes with zero points below that move up with them.
        if least == most:
            zp, zps = least, None
        elif least < -128:
            raise ValueError(f"zps must be -128 to 119 for int8 codes where they differ, got {least} to {most}")
        else:
            zps = np.ascontiguousarray(zps, dtype=np.int8)

    source = _core.Source(n, k, group, _FORMATS[form], w, w.strides[0], scales, zps, zp)
    try:
        scale_type, zero_point, *_, zp_bytes, _ = source.plan_pack()
        scale_dtype = _SCALE_TYPES[scale_type]
        blocks, groups = _ceil_div(n, BLOCK), scales.shape[1]
        stored = np.uint16 if scale_dtype == "bfloat16" else np.dtype(scale_dtype)
        arrays = aligned_empty(
            ((blocks, _ceil_div(k, QUAD), 2 * BLOCK), np.uint8),
            ((blocks, groups, BLOCK), stored),
            ((blocks, BLOCK), np.float32),
            ((blocks if zp_bytes else 0, groups, BLOCK), np.int8),
        )
        codes, packed_scales, sums, packed_zps = arrays
        if not zp_bytes:
            packed_zps = None
        source.pack(codes, packed_scales, packed_zps, sums)
    except _core.CoreError as error:
        raise ValueError(_why(error, w, form, group)) from None
    return PackedWeight._from_arrays(
        (n, k), group, scale_dtype, None if zp_bytes else zero_point, codes, packed_scales, packed_zps, sums
    )


def _why(error: Exception, w: np.ndarray, form: str, group: int) -> str:
    status, text = error.args
    if status == "BAD_CODE":
        takes = "-8 to 7" if form == "int8" else "0 to 15"
        return f"w_int4 must hold {takes} as {form}, got {w.min()} to {w.max()}"
    if status == "INT32_OVERFLOW":
        return f"group_size {group} with these zps is too large: group_size * 128 * max|w_int4 - zps| must stay below 2**31"
    return text


def concat(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Join packed weights along N: one product instead of several for layers that share an input.

    Parameters
    ----------
    weights : sequence of PackedWeight
        At least one; all with the same K and group size.

    Returns
    -------
    PackedWeight
        Of shape (sum of N, K). Its products are those of the parts, side by side, bit for bit.

    Raises
    ------
    TypeError
        If `weights` is not a sequence of PackedWeight.
    ValueError
        If it is empty, or K or group sizes differ.

    Notes
    -----
    Scales that the parts store in different types are stored as float32. Parts whose N is a
    multiple of 32 (all but the last) are copied block by block; others are unpacked and packed
    again.

    Examples
    --------
    >>> import numpy as np
    >>> import pyda8w4
    >>> q = pyda8w4.prepack(np.zeros((64, 16), np.uint8), np.ones(64, np.float32))
    >>> k = pyda8w4.prepack(np.zeros((32, 16), np.uint8), np.ones(32, np.float32))
    >>> pyda8w4.concat([q, k]).shape
    (96, 16)
    """
    weights = list(weights)
    for i, weight in enumerate(weights):
        if not isinstance(weight, PackedWeight):
            raise TypeError(f"weights[{i}] must be a PackedWeight, got {type(weight).__name__}")
    if not weights:
        raise ValueError("weights must hold at least one PackedWeight, got none")
    first = weights[0]
    for i, weight in enumerate(weights):
        if weight.shape[1] != first.shape[1] or weight.group_size != first.group_size:
            raise ValueError(
                f"weights[{i}] must have K = {first.shape[1]} and group_size = {first.group_size} like weights[0], "
                f"got K = {weight.shape[1]} and group_size = {weight.group_size}"
            )
    if any(weight.shape[0] % BLOCK for weight in weights[:-1]):
        parts = [weight.unpack() for weight in weights]
        return prepack(*(np.concatenate(arrays) for arrays in zip(*parts)), group_size=first.group_size)

    n, k = sum(weight.shape[0] for weight in weights), first.shape[1]
    scale_dtype = first.scale_dtype if len({weight.scale_dtype for weight in weights}) == 1 else "float32"
    zero_point = first.zero_point if len({weight.zero_point for weight in weights}) == 1 else None
    parts = {
        "codes": [weight._arrays["codes"] for weight in weights],
        "scales": [_scales(weight, scale_dtype) for weight in weights],
        "sums": [weight._arrays["sums"] for weight in weights],
    }
    if zero_point is None:
        parts["zps"] = [_zps(weight) for weight in weights]
    blocks = _ceil_div(n, BLOCK)
    joined = aligned_empty(*(((blocks, *arrays[0].shape[1:]), arrays[0].dtype) for arrays in parts.values()))
    for place, arrays in zip(joined, parts.values()):
        np.concatenate(arrays, out=place)
    return PackedWeight._from_arrays(
        (n, k), first.group_size, scale_dtype, zero_point, **{"zps": None, **dict(zip(parts, joined))}
    )


def _scales(weight: PackedWeight, dtype: str) -> np.ndarray:
    """Packed scales as they are stored in `dtype`: their own, or float32."""
    scales = weight._arrays["scales"]
    if weight.scale_dtype == dtype:
        return scales
    if weight.scale_dtype == "bfloat16":
        return (scales.astype(np.uint32) << 16).view(np.float32)
    return scales.astype(np.float32)


def _zps(weight: PackedWeight) -> np.ndarray:
    """Packed zero points, written out where they are all the same; 0 in columns beyond N."""
    if "zps" in weight._arrays:
        return weight._arrays["zps"]
    n = weight.shape[0]
    blocks = _ceil_div(n, BLOCK)
    zps = np.full((blocks, weight.groups, BLOCK), weight.zero_point, np.int8)
    zps[-1, :, n - (blocks - 1) * BLOCK :] = 0
    return zps
