"""Quantization: weights to 4 bits once, activations to 8 bits at each call."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4 import _core
from pyda8w4._checks import (
    FLOATS,
    INTEGERS,
    SCHEMES,
    TYPES,
    as_array,
    as_array_of,
    as_float32,
    bits,
    ceil_div,
    check_flag,
    check_scheme,
    check_shape,
    plain,
)
from pyda8w4._core import CoreError, quantize_rows
from pyda8w4._format import check_group_size, check_rotation, group_count
from pyda8w4._packed import PackedWeight
from pyda8w4._quantized import QuantizedWeight
from pyda8w4._runtime import forced_kernel, translate
from pyda8w4.reference import rotate as rotate_rows

METHODS = ("search", "minmax")
ZEROS = {"none": 0, "integer": 1, "float": 2}  # as the C interface numbers them
_SUPER = 8  # groups, at most, that share a float where there are two levels

_LEAST_SCALE = np.float32(2.0**-126)  # the least normal number: its inverse is finite


def quantize(
    w: npt.ArrayLike,
    group_size: int = 128,
    *,
    method: str = "search",
    zeros: str = "float",
    importance: npt.ArrayLike | None = None,
    two_level: bool = False,
    rotate: int = 0,
) -> PackedWeight:
    """Quantize a float weight matrix to 4 bits and pack it, for `linear`.

    Parameters
    ----------
    w : (N, K) ndarray of float32, float16 or bfloat16
        One row per output feature, as in ``torch.nn.Linear.weight``. Finite. Lists are taken as float32; arrays of
        float64 are refused.
    group_size : int
        As in `quantize_weight`, like all that follow.
    method : {'search', 'minmax'}
        How scales are found.
    zeros : {'float', 'integer', 'none'}
        What stands beside the codes.
    importance : (K,) ndarray of numbers, optional
        What the squared error of each k counts.
    two_level : bool
        Whether groups share floats.
    rotate : int
        Whether inputs are rotated, and in blocks of how many.

    Returns
    -------
    PackedWeight
        Of shape (N, K).

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `quantize_weight` does.

    Examples
    --------
    >>> import numpy as np
    >>> import pyda8w4
    >>> w = np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32)
    >>> packed = pyda8w4.quantize(w, group_size=32)
    >>> packed
    PackedWeight(shape=(64, 256), bits=4, group_size=32, scales=float16, offsets=float16, zero_point=0, nbytes=10496)
    >>> error = packed.dequantize() - w
    >>> bool(error.std() < 0.08)
    True
    """
    weight = quantize_weight(
        w, group_size, method=method, zeros=zeros, importance=importance, two_level=two_level, rotate=rotate
    )
    return weight.pack()


def quantize_weight(
    w: npt.ArrayLike,
    group_size: int = 128,
    *,
    method: str = "search",
    zeros: str = "float",
    importance: npt.ArrayLike | None = None,
    two_level: bool = False,
    rotate: int = 0,
) -> QuantizedWeight:
    """Quantize a float weight matrix to 4 bits, in groups of consecutive k.

    Parameters
    ----------
    w : (N, K) ndarray of float32, float16 or bfloat16
        One row per output feature, as in ``torch.nn.Linear.weight``. Finite. Lists are taken as float32; arrays of
        float64 are refused.
    group_size : int
        Elements of k that share a scale: a multiple of 4, or K and more for one group per row. The
        last group may be shorter.
    method : {'search', 'minmax'}
        ``search`` finds scales of little squared error, of a group in which the ends may be clipped.
        ``minmax`` has the ends of each group exact.
    zeros : {'float', 'integer', 'none'}
        What stands beside the codes: a float offset for each group, ``w ~ codes * scales + offsets``; an integer zero
        point, ``w ~ (codes - zps) * scales``, with which zero is exact; or nothing, ``w ~ (codes - 8) * scales``,
        where ``search`` gives scales of either sign, so that -8 and not 7 may stand for the end.
    importance : (K,) ndarray of numbers, optional
        What the squared error of each k counts, such as the mean square of what it is multiplied with:
        `pyda8w4.checkpoints.read_imatrix` has those of llama.cpp. None below 0, and not all 0. Of ``search``.
    two_level : bool
        Whether scales and offsets are small integers, of which up to eight groups share the float that multiplies
        them: 4.625 bits a weight where others take 5, in groups of 32. Of ``search``.
    rotate : int
        Rotates the weight before it is rounded, by a Hadamard transform of so many consecutive k, a power of two from 2
        to 1024; True is 32, 0 and False are none. `linear` rotates its input likewise. What is large in few inputs is
        then spread over the block, which lets both weights and activations be rounded better. See docs/numbers.md.

    Returns
    -------
    QuantizedWeight
        ``codes`` of uint8, ``scales`` of float32, and what else there is; ``pack()`` makes a `PackedWeight` of it. With
        one level it unpacks to the arguments of `prepack`: codes, scales, zps and, if there are some, offsets.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If `w` is not a non-empty matrix of finite numbers, another argument is not as above, or `method` does not
        take it.
    MemoryError
        If there is no memory to search in.

    Notes
    -----
    ``search`` tries, for each group, six scales with which the codes 0 to 15 reach over all of the group or down to
    two thirds of it, each at its lower end, its upper end and its middle. For the codes that each try gives, the
    scale and offset of least squared error have a closed form; the best of all tries is refined three times by taking
    the codes that its scale gives, and the scale of those. Scales and offsets are then rounded to bfloat16, and codes
    to the nearest with these. The idea is that of the k-quants of ggml. It is the same on every CPU, for any number of
    threads, and takes some 15 ns a weight on one core.

    ``minmax`` rounds to nearest, in float32. For integer zero points and none with the formulas of torchao's
    ``choose_qparams_affine`` and ``quantize_affine`` but for the least scale, which is 2**-23 there. Integer:
    ``s = max((max(0, max w) - min(0, min w)) / 15, 2**-126)``,
    ``z = clip(-rint(min(0, min w) / s), 0, 15)``. None: ``s = max(max|w| / 7.5, 2**-126)``,
    ``z = 8``. Code: ``clip(rint(w * (1 / s)) + z, 0, 15)``. Float: ``s = max((max w - min w) / 15, 2**-126)``,
    the offset is ``min w``, the code ``clip(rint((w - min w) * (1 / s)), 0, 15)``.

    Examples
    --------
    >>> import numpy as np
    >>> import pyda8w4
    >>> w = np.array([[-1.0, 0.0, 1.0, 2.0]], np.float32)
    >>> codes, scales, zps = pyda8w4.quantize_weight(w, group_size=4, method="minmax", zeros="integer")
    >>> codes, scales, zps
    (array([[ 0,  5, 10, 15]], dtype=uint8), array([[0.2]], dtype=float32), array([[5]], dtype=int8))
    >>> codes, scales, zps, offsets = pyda8w4.quantize_weight(w, group_size=4)
    >>> codes, scales, offsets
    (array([[ 0,  5, 10, 15]], dtype=uint8), array([[0.20019531]], dtype=float32), array([[-1.]], dtype=float32))
    """
    rounding = Rounding(group_size, method, zeros, two_level, rotate)
    w, w_type = as_array_of("w", w, FLOATS)
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"w must be a non-empty matrix (N, K), got shape {w.shape}")
    return rounding.quantize(bits(plain(w), w_type), w_type, importance)


@dataclass(frozen=True)
class Rounding:
    """How float weights are quantized: arguments of `quantize_weight`, which are checked here."""

    group_size: int = 128
    method: str = "search"
    zeros: str = "float"
    two_level: bool = False
    rotate: int = 0

    def __post_init__(self) -> None:
        rotate = 32 * int(self.rotate) if isinstance(self.rotate, (bool, np.bool_)) else self.rotate
        object.__setattr__(self, "rotate", check_rotation("rotate", rotate))
        # JSON takes no bools of numpy.
        object.__setattr__(self, "two_level", check_flag("two_level", self.two_level))
        check_scheme("method", self.method, METHODS)
        check_scheme("zeros", self.zeros, tuple(ZEROS))
        if self.two_level and self.method != "search":
            raise ValueError(f"two_level must be False with method={self.method!r}, got True")

    def quantize(self, w: npt.NDArray[Any], w_type: str, importance: npt.ArrayLike | None = None) -> QuantizedWeight:
        """Of a C-contiguous matrix; bfloat16 as its bits."""
        n, k = w.shape
        group = check_group_size(self.group_size, k)
        if self.rotate:
            w, w_type = rotated(w, w_type, self.rotate), "float32"
        if importance is not None:
            importance = _importance(importance, k, self.rotate)
            if self.method != "search":
                raise ValueError(f"importance must be None with method={self.method!r}, got an array")
        groups, super_size = group_count(k, group), self._super_size(k)
        floats = n, ceil_div(groups, super_size) if super_size else groups
        arrays: dict[str, Any] = {"codes": np.empty((n, k), np.uint8), "scales": np.empty(floats, np.float32)}
        arrays["zps"] = np.full((n, groups), 8 if self.zeros == "none" else 0, np.int8)
        if self.zeros == "float":
            arrays["offsets"] = np.empty(floats, np.float32)
        if super_size:
            arrays["sub_scales"] = np.empty((n, groups), np.int8 if self.zeros == "none" else np.uint8)
            if self.zeros == "float":
                arrays["sub_offsets"] = np.empty((n, groups), np.int8)
        if self.method == "minmax":
            _minmax(w, w_type, group, self.zeros, arrays)
        else:
            _search(w, w_type, group, super_size, importance, self.zeros, arrays)
        return QuantizedWeight(**arrays, rotation=self.rotate, group_size=group)

    def _super_size(self, k: int) -> int:
        """Groups that share a float; 0: one level."""
        groups = group_count(k, self.group_size)
        return ceil_div(groups, ceil_div(groups, _SUPER)) if self.two_level else 0  # as `prepack` finds it

    def spans(self, k: int) -> list[slice]:
        """Of the inputs, those that share a float for scales."""
        size = self.group_size * max(self._super_size(k), 1)
        return [slice(begin, min(begin + size, k)) for begin in range(0, k, size)]


def rotated(w: npt.NDArray[Any], w_type: str, rotation: int) -> npt.NDArray[np.float32]:
    """The weight that gives with rotated inputs what this one gives with inputs as they are."""
    n, k = w.shape
    blocks = _blocks(k, rotation)
    sizes = np.repeat(blocks, blocks).astype(np.float32)  # powers of two
    out = np.empty((n, k), np.float32)
    rows = max(1, (1 << 20) // k)  # a few MB of temporaries at a time
    for top in range(0, n, rows):
        part = slice(top, top + rows)
        out[part] = rotate_rows(as_float32(w[part], w_type), rotation) / sizes
    return out


def _blocks(k: int, rotation: int) -> npt.NDArray[np.intp]:
    """The sizes of the blocks into which it cuts a row."""
    tail = [1 << bit for bit in reversed(range(rotation.bit_length() - 1)) if k % rotation >> bit & 1]
    return np.array([rotation] * (k // rotation) + tail, np.intp)


def _importance(value: npt.ArrayLike, k: int, rotation: int) -> npt.NDArray[np.float32]:
    """-> of which the largest is 1. Of inputs that are rotated, those of a block count as their sum does."""
    array = as_array("importance", value)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"importance must be an array of numbers, got {array.dtype}")
    check_shape("importance", array, (k,))
    array = array.astype(np.float64)
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() > 0):
        raise ValueError(
            f"importance must be finite, 0 or more and not all 0, got {array.min():.6g} to {array.max():.6g}"
        )
    array /= array.max()
    if rotation:
        blocks = _blocks(k, rotation)
        array = np.repeat(np.add.reduceat(array, np.cumsum(blocks) - blocks), blocks)
    relative: npt.NDArray[np.float32] = (array / array.max()).astype(np.float32)
    return relative


def _search(
    w: npt.NDArray[Any],
    w_type: str,
    group: int,
    super_size: int,
    importance: npt.NDArray[np.float32] | None,
    zeros: str,
    arrays: dict[str, npt.NDArray[Any]],
) -> None:
    n, k = w.shape
    try:
        _core.quantize_weight(n, k, group, super_size, w, TYPES[w_type], importance, ZEROS[zeros], **arrays)
    except CoreError as error:
        if error.args[0] == "NOT_FINITE":
            raise ValueError("w must be finite, got NaN or infinity") from None
        if error.args[0] == "BAD_SCALE":
            raise ValueError("w must have groups whose range fits float32, got one that overflows") from None
        if error.args[0] == "NO_MEMORY":
            raise MemoryError(f"cannot allocate what a search in groups of {group} needs") from None
        raise translate(error) from None


def _minmax(w: npt.NDArray[Any], w_type: str, group: int, zeros: str, arrays: dict[str, npt.NDArray[Any]]) -> None:
    n, k = w.shape
    rows = max(1, (1 << 20) // k)  # a few MB of temporaries at a time
    for top in range(0, n, rows):
        part = slice(top, top + rows)
        _minmax_rows(as_float32(w[part], w_type), group, zeros, **{name: array[part] for name, array in arrays.items()})


def _minmax_rows(
    w: npt.NDArray[Any],
    group: int,
    zeros: str,
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float32],
    zps: npt.NDArray[np.int8],
    offsets: npt.NDArray[np.float32] | None = None,
) -> None:
    n, k = w.shape
    grouped = np.empty((n, scales.shape[1], group), np.float32)
    grouped.reshape(n, -1)[:, :k] = w
    grouped.reshape(n, -1)[:, k:] = w[:, -1:]  # which changes no minimum or maximum
    low, high = grouped.min(axis=2), grouped.max(axis=2)
    if offsets is None:
        low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("w must be finite, got NaN or infinity")
    with np.errstate(over="ignore"):
        s = np.maximum(-low, high) / np.float32(7.5) if zeros == "none" else (high - low) / np.float32(15)
        farthest = s * np.float32(8 if zeros == "none" else 15)
    if not np.isfinite(farthest).all():
        raise ValueError("w must have groups whose range fits float32, got one that overflows")
    s = np.maximum(s, _LEAST_SCALE)
    if offsets is not None:
        offsets[:] = low
        grouped -= low[:, :, None]
    if zeros == "integer":
        zps[:] = np.clip(-np.rint(low / s), 0, 15)
    grouped *= (np.float32(1) / s)[:, :, None]
    np.rint(grouped, out=grouped)
    grouped += zps[:, :, None]
    np.clip(grouped, 0, 15, out=grouped)
    codes[:] = grouped.reshape(n, -1)[:, :k]
    scales[:] = s


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
