"""The packed format, layout version 1: what docs/packed-format.md says, as Python needs it.

A `Format` says what kind of weight it is. Which arrays that takes, whether given ones fit, and how they are cut and
joined follows from it here and nowhere else: what is in memory, in files, in pickles and in torch's state dicts is
compared with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import FLOATS, TYPES, ceil_div, one_of
from pyda8w4._core import View

# A reader refuses every other.
LAYOUT = "da8w4-n32k4"
LAYOUT_VERSION = 1

_BLOCK = 32  # columns (n) of one packed block
_QUAD = 4  # consecutive k of one packed line

# A sum over a group must fit int32, whatever the activations: their absolute values go up to 128.
INT32_RULE = "group_size * 128 * max|w_int4 - zps| must stay below 2**31"

# How numpy holds elements of these types: it has no bfloat16, so their bits.
_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "int8": np.dtype(np.int8),
}
_TYPES = {dtype: type for type, dtype in _DTYPES.items()}

Sliceable = TypeVar("Sliceable", bound=Any)  # arrays of numpy or tensors of torch


def _fits(group: int, k: int) -> bool:
    """Whether rows of `k` can be cut into such groups: no quad may lie in two of them."""
    return 0 < group <= k and (group % _QUAD == 0 or group == k)


def group_count(k: int, group_size: int) -> int:
    return ceil_div(k, group_size)


def check_group_size(value: Any, k: int) -> int:
    """-> the group size, at most K: a multiple of 4, or K."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"group_size must be an int, got {type(value).__name__}")
    group = min(int(value), k)
    if not _fits(group, k):
        raise ValueError(f"group_size must be a multiple of {_QUAD}, or K = {k}, got {value}")
    return group


def group_size_of(k: int, groups: int) -> int:
    """-> the one group size that cuts rows of `k` into so many groups."""
    if k % groups == 0:
        group = k // groups
        if not _fits(group, k):
            raise ValueError(
                f"scales with {groups} groups of K = {k} make groups of {group}, not a multiple of {_QUAD}"
            )
        return group
    group = ceil_div(ceil_div(k, groups), _QUAD) * _QUAD
    if group_count(k, group) != groups:
        raise ValueError(f"scales must have G groups of one size for K = {k}, got G = {groups}, which none gives")
    if group_count(k, group + _QUAD) == groups:
        raise ValueError(f"group_size must be given: several sizes make {groups} groups of K = {k}")
    return group


class ArraySpec(NamedTuple):
    """Shape and element type of an array."""

    shape: tuple[int, ...]
    type: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the numpy array that holds it."""
        return _DTYPES[self.type]

    def __str__(self) -> str:
        return f"{self.type} of shape {self.shape}"


@dataclass(frozen=True)
class Format:
    """What kind of packed weight it is.

    The attributes are those of `PackedWeight`. Values that no packed weight has raise ValueError.
    """

    n: int
    k: int
    group_size: int
    scale_dtype: str
    zero_point: int | None
    has_offsets: bool

    def __post_init__(self) -> None:
        for name in ("n", "k", "group_size"):
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ValueError(f"{name} must be a positive int, got {size!r}")
        if not _fits(self.group_size, self.k):
            raise ValueError(f"group_size must be a multiple of {_QUAD}, or K = {self.k}, got {self.group_size}")
        if self.scale_dtype not in FLOATS:
            raise ValueError(f"scale_dtype must be {one_of(FLOATS)}, got {self.scale_dtype!r}")
        if type(self.has_offsets) is not bool:
            raise ValueError(f"has_offsets must be a bool, got {self.has_offsets!r}")
        if self.zero_point is not None:
            if type(self.zero_point) is not int or not -128 <= self.zero_point <= 127:
                raise ValueError(f"zero_point must be an int from -128 to 127, or None, got {self.zero_point!r}")
            self._check_sums(self.zero_point, self.zero_point)

    @property
    def groups(self) -> int:
        """Groups of one row."""
        return group_count(self.k, self.group_size)

    @cached_property
    def arrays(self) -> dict[str, ArraySpec]:
        """The arrays by name, in the order in which they are stored."""
        blocks = ceil_div(self.n, _BLOCK)
        per_group = (blocks, self.groups, _BLOCK)
        arrays = {
            "codes": ArraySpec((blocks, ceil_div(self.k, _QUAD), 2 * _BLOCK), "uint8"),
            "scales": ArraySpec(per_group, self.scale_dtype),
            "sums": ArraySpec((blocks, _BLOCK), "float32"),
        }
        if self.zero_point is None:
            arrays["zps"] = ArraySpec(per_group, "int8")
        if self.has_offsets:
            arrays["offsets"] = ArraySpec(per_group, self.scale_dtype)
        return arrays

    def check(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Raise ValueError unless these are the arrays of such a weight."""
        if arrays.keys() != self.arrays.keys():
            raise ValueError(f"arrays must be {', '.join(self.arrays)}, got {', '.join(map(str, arrays))}")
        for name, wanted in self.arrays.items():
            array = arrays[name]
            if array.dtype != wanted.dtype or array.shape != wanted.shape:
                found = ArraySpec(array.shape, _TYPES.get(array.dtype, str(array.dtype)))
                raise ValueError(f"{name} must be {wanted}, got {found}")
        if "zps" in arrays:
            self.check_zero_points(arrays["zps"])

    def check_zero_points(self, zps: npt.NDArray[Any]) -> None:
        """Raise ValueError if a sum over a group could leave int32. Columns beyond N do not count."""
        columns = zps.transpose(0, 2, 1).reshape(-1, self.groups)[: self.n]
        self._check_sums(int(columns.min()), int(columns.max()))

    def _check_sums(self, least: int, most: int) -> None:
        if self.group_size * 128 * max(15 - least, most) >= 2**31:
            raise ValueError(
                f"zps of {least} to {most} are too large for a group_size of {self.group_size}: {INT32_RULE}"
            )

    @property
    def has_whole_blocks(self) -> bool:
        """Whether the arrays of another weight can follow."""
        return self.n % _BLOCK == 0

    def is_sliceable(self, begin: int, end: int) -> bool:
        """Whether columns `begin` to `end` are whole blocks."""
        return begin % _BLOCK == 0 and (end % _BLOCK == 0 or end == self.n)

    def blocks_around(self, begin: int, end: int) -> tuple[int, int]:
        """The columns of all blocks that have some of columns `begin` to `end`."""
        return begin // _BLOCK * _BLOCK, min(ceil_div(end, _BLOCK) * _BLOCK, self.n)

    def slice(self, begin: int, end: int, arrays: Mapping[str, Sliceable]) -> tuple[Format, dict[str, Sliceable]]:
        """Columns `begin` to `end`, in the memory of the arrays."""
        if not self.is_sliceable(begin, end):
            raise ValueError(
                f"the slice must begin and end at multiples of {_BLOCK} (or end at {self.n}), got {begin}:{end}"
            )
        blocks = slice(begin // _BLOCK, ceil_div(end, _BLOCK))
        return replace(self, n=end - begin), {name: arrays[name][blocks] for name in self.arrays}

    @staticmethod
    def joined(formats: Sequence[Format]) -> Format:
        """Of weights joined along N, all with the same K and groups."""
        first = formats[0]
        return Format(
            sum(part.n for part in formats),
            first.k,
            first.group_size,
            first.scale_dtype if len({part.scale_dtype for part in formats}) == 1 else "float32",
            first.zero_point if len({part.zero_point for part in formats}) == 1 else None,
            any(part.has_offsets for part in formats),
        )

    def restored(self, arrays: Mapping[str, npt.NDArray[Any]], whole: Format) -> dict[str, npt.NDArray[Any]]:
        """The arrays of such a weight as they are stored in one that it is a part of."""
        parts = dict(arrays)
        if whole.has_offsets and not self.has_offsets:
            parts["offsets"] = np.zeros_like(arrays["scales"])  # zero is all bits zero in every type
        if whole.scale_dtype != self.scale_dtype:
            for name in ("scales", "offsets"):
                if name in parts:
                    parts[name] = self._as_float32(parts[name])
        if whole.zero_point is None and self.zero_point is not None:
            wanted = replace(self, zero_point=None).arrays["zps"]
            zps = parts["zps"] = np.full(wanted.shape, self.zero_point, wanted.dtype)
            zps[-1, :, self.n - (len(zps) - 1) * _BLOCK :] = 0  # columns beyond N
        return parts

    def _as_float32(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        if self.scale_dtype == "bfloat16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32)

    def view(self, arrays: Mapping[str, Any]) -> View:
        """What kernels read: of numpy arrays, which the view keeps alive, or of addresses, which it cannot."""
        return View(
            n=self.n,
            k=self.k,
            group=self.group_size,
            scale_type=TYPES[self.scale_dtype],
            zp=self.zero_point or 0,
            codes=arrays["codes"],
            scales=arrays["scales"],
            sums=arrays["sums"],
            zps=arrays.get("zps"),
            offsets=arrays.get("offsets"),
        )
