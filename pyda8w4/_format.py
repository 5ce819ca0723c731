"""The packed format, layout version 2: what docs/packed-format.md says, as Python needs it.

A `Format` says what kind of weight it is. Which arrays that takes, whether given ones fit, and how they are cut and
joined follows from it here and nowhere else: what is in memory, in files, in pickles and in torch's state dicts is
compared with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import FLOATS, INTEGERS, TYPES, as_float32, ceil_div, one_of
from pyda8w4._core import ExpertsView, View

# A reader refuses every other. Weights of version 1 are those of version 2 that have 4 bits and one level of scales,
# no table, no permutation, no factors and no rotation.
LAYOUT = "da8w4-n32k4"
LAYOUT_VERSION = 2
LAYOUT_VERSIONS = (1, 2)

_BLOCK = 32  # columns (n) of one packed block
_QUAD = 4  # consecutive k that lie side by side
_LINE = 64  # bytes

# A sum over a group must fit int32, whatever the activations: their absolute values go up to 128.
INT32_RULE = "group_size * 128 * max|codes - zps| must stay below 2**31"


class Kind(NamedTuple):
    """What the codes of a weight are, and how they lie in lines: a unit is some quads with all of their lines."""

    number: int  # in the C interface
    least: int  # code
    most: int
    unit_quads: int
    unit_lines: int
    is_table: bool = False  # codes are indices of a table of int8 values

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of codes that are not packed."""
        return np.dtype(np.int8 if self.least < 0 else np.uint8)

    @property
    def values(self) -> tuple[int, int]:
        """The least and the greatest that codes may stand for. A table counts as if it had every int8."""
        return (-128, 127) if self.is_table else (self.least, self.most)


# By bits, and whether there is a table.
KINDS = {
    (4, False): Kind(0, 0, 15, 1, 1),
    (5, False): Kind(1, 0, 31, 4, 5),
    (6, False): Kind(2, 0, 63, 2, 3),
    (8, False): Kind(3, -128, 127, 1, 2),
    (4, True): Kind(4, 0, 15, 1, 1, is_table=True),
}
BITS = tuple(dict.fromkeys(bits for bits, _ in KINDS))
TABLE_SIZE = 16

# The sizes of blocks in which inputs may be rotated; 0 is no rotation.
ROTATIONS = (0, *(1 << i for i in range(1, 11)))
_ROTATION_RULE = f"must be 0 or a power of two from 2 to {ROTATIONS[-1]}"

# How numpy holds elements of these types: it has no bfloat16, so their bits.
_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "int8": np.dtype(np.int8),
    "int32": np.dtype(np.int32),
}
_TYPES = {dtype: type for type, dtype in _DTYPES.items()}

Sliceable = TypeVar("Sliceable", bound=Any)  # arrays of numpy or tensors of torch


def fits(group: int, k: int) -> bool:
    """Whether rows of `k` can be cut into such groups: no quad may lie in two of them."""
    return 0 < group <= k and (group % _QUAD == 0 or group == k)


def group_count(k: int, group_size: int) -> int:
    return ceil_div(k, group_size)


def check_group_size(value: Any, k: int | None = None) -> int:
    """-> the group size, at most K where that is known: a multiple of 4, or K."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"group_size must be an int, got {type(value).__name__}")
    group = int(value) if k is None else min(int(value), k)
    if group < 1 or (group % _QUAD and group != k):
        whole = "" if k is None else f", or K = {k}"
        raise ValueError(f"group_size must be a multiple of {_QUAD}{whole}, got {value}")
    return group


def check_perm(perm: npt.NDArray[Any]) -> None:
    """Raise ValueError unless it has each of 0 to K - 1 once: kernels read where it tells them to."""
    k = len(perm)
    if (perm < 0).any() or (perm >= k).any() or (np.bincount(perm, minlength=k) != 1).any():
        found = f"{len(np.unique(perm))} different numbers from {perm.min()} to {perm.max()}"
        raise ValueError(f"perm must have each of 0 to {k - 1} once, got {found}")


def check_factors(factors: npt.NDArray[Any]) -> None:
    if not np.isfinite(factors).all():
        raise ValueError("factors must be finite, got NaN or infinity")


def check_rotation(name: str, value: Any) -> int:
    """-> the size of its blocks, or 0."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value not in ROTATIONS:
        raise ValueError(f"{name} {_ROTATION_RULE}, got {value}")
    return int(value)


def group_size_of(k: int, groups: int, name: str) -> int:
    """-> the one group size that cuts rows of `k` into so many groups, which the array `name` has."""
    if k % groups == 0:
        group = k // groups
        if not fits(group, k):
            raise ValueError(
                f"{name} with {groups} groups of K = {k} make groups of {group}, not a multiple of {_QUAD}"
            )
        return group
    group = ceil_div(ceil_div(k, groups), _QUAD) * _QUAD
    if group_count(k, group) != groups:
        raise ValueError(f"{name} must have G groups of one size for K = {k}, got G = {groups}, which none gives")
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

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.type} of shape {self.shape}"


# All that a weight may have, in the order in which they are stored. The last three are those of all columns; the others
# are in blocks of columns.
ARRAYS = ("codes", "scales", "sums", "zps", "offsets", "sub_scales", "sub_offsets", "table", "perm", "factors")
SHARED = ARRAYS[-3:]

# What weights that are joined along N have in common.
_SAME = ("k", "group_size", "bits", "has_table", "super_size", "sub_scale_dtype", "has_perm", "has_factors", "rotation")


@dataclass(frozen=True)
class Format:
    """What kind of packed weight it is.

    The attributes are those of `PackedWeight`, and `experts`: of how many such weights the arrays hold the ones, with a
    dimension for them that comes first; None is one weight, without it. Values that no packed weight has raise
    ValueError.
    """

    n: int
    k: int
    group_size: int
    scale_dtype: str
    zero_point: int | None
    has_offsets: bool = False
    bits: int = 4
    has_table: bool = False
    super_size: int = 0
    sub_scale_dtype: str | None = None
    sub_offset_dtype: str | None = None
    has_perm: bool = False
    has_factors: bool = False
    rotation: int = 0
    experts: int | None = None

    def __post_init__(self) -> None:
        for name in ("n", "k", "group_size"):
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ValueError(f"{name} must be a positive int, got {size!r}")
        if not fits(self.group_size, self.k):
            raise ValueError(f"group_size must be a multiple of {_QUAD}, or K = {self.k}, got {self.group_size}")
        if self.scale_dtype not in FLOATS:
            raise ValueError(f"scale_dtype must be {one_of(FLOATS)}, got {self.scale_dtype!r}")
        for name in ("has_offsets", "has_table", "has_perm", "has_factors"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be a bool, got {getattr(self, name)!r}")
        if type(self.bits) is not int or (self.bits, self.has_table) not in KINDS:
            takes = "4 with a table" if self.has_table else one_of(BITS)
            raise ValueError(f"bits must be {takes}, got {self.bits!r}")
        if type(self.rotation) is not int or self.rotation not in ROTATIONS:
            raise ValueError(f"rotation {_ROTATION_RULE}, got {self.rotation!r}")
        self._check_levels()
        if self.zero_point is not None:
            if type(self.zero_point) is not int or not -128 <= self.zero_point <= 127:
                raise ValueError(f"zero_point must be an int from -128 to 127, or None, got {self.zero_point!r}")
            self._check_sums(self.zero_point, self.zero_point)
        if self.has_table and self.zero_point != 0:
            raise ValueError(f"zero_point must be 0 with a table, got {self.zero_point!r}")
        if self.experts is not None and (type(self.experts) is not int or self.experts < 1):
            raise ValueError(f"experts must be a positive int, or None, got {self.experts!r}")

    def _check_levels(self) -> None:
        if type(self.super_size) is not int or not 0 <= self.super_size <= self.groups:
            raise ValueError(f"super_size must be an int from 0 to {self.groups} groups, got {self.super_size!r}")
        for name, needed in (
            ("sub_scale_dtype", self.super_size > 0),
            ("sub_offset_dtype", self.super_size > 0 and self.has_offsets),
        ):
            dtype = getattr(self, name)
            if needed and dtype not in INTEGERS:
                raise ValueError(f"{name} must be {one_of(INTEGERS)}, got {dtype!r}")
            if not needed and dtype is not None:
                raise ValueError(f"{name} must be None where there is nothing of two levels, got {dtype!r}")

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K), or (E, N, K)."""
        return (self.n, self.k) if self.experts is None else (self.experts, self.n, self.k)

    @property
    def groups(self) -> int:
        """Groups of one row."""
        return group_count(self.k, self.group_size)

    @property
    def supers(self) -> int:
        """Scales of one row that are floats: one for each super-group, or group."""
        return ceil_div(self.groups, self.super_size) if self.super_size else self.groups

    @property
    def kind(self) -> Kind:
        """What the codes are."""
        return KINDS[self.bits, self.has_table]

    @cached_property
    def arrays(self) -> dict[str, ArraySpec]:
        """The arrays by name, in the order in which they are stored."""
        blocks = ceil_div(self.n, _BLOCK)
        per_group, floats = (blocks, self.groups, _BLOCK), (blocks, self.supers, _BLOCK)
        lines = ceil_div(ceil_div(self.k, _QUAD), self.kind.unit_quads) * self.kind.unit_lines
        arrays = {
            "codes": ArraySpec((blocks, lines, _LINE), "uint8"),
            "scales": ArraySpec(floats, self.scale_dtype),
            "sums": ArraySpec((blocks, _BLOCK), "float32"),
        }
        if self.zero_point is None:
            arrays["zps"] = ArraySpec(per_group, "int8")
        if self.has_offsets:
            arrays["offsets"] = ArraySpec(floats, self.scale_dtype)
        if self.sub_scale_dtype is not None:
            arrays["sub_scales"] = ArraySpec(per_group, self.sub_scale_dtype)
        if self.sub_offset_dtype is not None:
            arrays["sub_offsets"] = ArraySpec(per_group, self.sub_offset_dtype)
        if self.has_table:
            arrays["table"] = ArraySpec((TABLE_SIZE,), "int8")
        if self.has_perm:
            arrays["perm"] = ArraySpec((self.k,), "int32")
        if self.has_factors:
            arrays["factors"] = ArraySpec((self.k,), "float32")
        if self.experts is not None:
            return {name: ArraySpec((self.experts, *spec.shape), spec.type) for name, spec in arrays.items()}
        return arrays

    @cached_property
    def of_each(self) -> Format:
        """That of each expert, or of the one weight."""
        return replace(self, experts=None)

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(spec.nbytes for spec in self.arrays.values())

    def check(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Raise ValueError unless these are the arrays of such a weight."""
        if arrays.keys() != self.arrays.keys():
            raise ValueError(f"arrays must be {', '.join(self.arrays)}, got {', '.join(map(str, arrays))}")
        for name, wanted in self.arrays.items():
            array = arrays[name]
            if array.dtype != wanted.dtype or array.shape != wanted.shape:
                found = ArraySpec(array.shape, _TYPES.get(array.dtype, str(array.dtype)))
                raise ValueError(f"{name} must be {wanted}, got {found}")
        self.check_values(arrays)

    def check_values(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Raise ValueError if numbers in those of the arrays that are given could lead a kernel astray."""
        if self.experts is not None:
            for i in range(self.experts):
                self.of_each.check_values({name: array[i] for name, array in arrays.items()})
            return
        if "zps" in arrays:
            columns = self._columns(arrays["zps"])  # those beyond N do not count
            self._check_sums(int(columns.min()), int(columns.max()))
        if "perm" in arrays:
            check_perm(arrays["perm"])
        if "factors" in arrays:
            check_factors(arrays["factors"])

    def _check_sums(self, least: int, most: int) -> None:
        low, high = self.kind.values
        if self.group_size * 128 * max(high - least, most - low) >= 2**31:
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
        parts = {name: arrays[name] if name in SHARED else arrays[name][blocks] for name in self.arrays}
        return replace(self, n=end - begin), parts

    @staticmethod
    def joined(formats: Sequence[Format]) -> Format:
        """Of weights joined along N. ValueError names what must be the same and is not."""
        whole = formats[0]
        for i, part in enumerate(formats):
            whole = whole.common(part, i)
        return replace(whole, n=sum(part.n for part in formats))

    def common(self, other: Format, i: int) -> Format:
        """Of a weight like this, whose arrays can hold those of `weights[i]`, too. ValueError if no weight's can."""
        if other == self:
            return self
        for field in _SAME:
            wanted, found = getattr(self, field), getattr(other, field)
            if found != wanted:
                name = "K" if field == "k" else field
                raise ValueError(f"weights[{i}] must have {name} = {wanted} like weights[0], got {found}")
        if self.has_offsets and other.has_offsets and self.sub_offset_dtype != other.sub_offset_dtype:
            raise ValueError("weights must have sub_offsets of one type, got uint8 and int8")
        return replace(
            self,
            scale_dtype=self.scale_dtype if self.scale_dtype == other.scale_dtype else "float32",
            zero_point=self.zero_point if self.zero_point == other.zero_point else None,
            has_offsets=self.has_offsets or other.has_offsets,
            sub_offset_dtype=self.sub_offset_dtype or other.sub_offset_dtype,
        )

    def restored(self, arrays: Mapping[str, npt.NDArray[Any]], whole: Format) -> dict[str, npt.NDArray[Any]]:
        """The arrays of such a weight as they are stored in one that it is a part of."""
        parts = dict(arrays)
        if whole.scale_dtype != self.scale_dtype:
            for name in ("scales", "offsets"):
                if name in parts:
                    parts[name] = as_float32(parts[name], self.scale_dtype)
        wanted = replace(whole, n=self.n).arrays
        for name in wanted.keys() - parts.keys():  # those of offsets: zero is all bits zero in every type
            parts[name] = np.zeros(wanted[name].shape, wanted[name].dtype)
        if whole.zero_point is None and self.zero_point is not None:
            zps = parts["zps"]
            zps[...] = self.zero_point
            zps[-1, :, self.n - (len(zps) - 1) * _BLOCK :] = 0  # columns beyond N
        return parts

    def of_columns(self, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """What `prepack` was given beside the codes: (N, G), and where there are two levels both; floats as float32."""
        given = {name: arrays[name] for name in arrays if name not in ("codes", "sums")}
        for name in given.keys() - set(SHARED):
            floats = name in ("scales", "offsets")
            given[name] = self._columns(as_float32(given[name], self.scale_dtype) if floats else given[name])
        return given

    def _columns(self, blocks: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return blocks.transpose(0, 2, 1).reshape(-1, blocks.shape[1])[: self.n]

    def view(self, arrays: Mapping[str, Any]) -> View:
        """What kernels read: of numpy arrays, which the view keeps alive, or of addresses, which it cannot."""
        memory: dict[str, Any] = {name: arrays.get(name) for name in ARRAYS}
        return View(
            n=self.n,
            k=self.k,
            group=self.group_size,
            super=self.super_size,
            kind=self.kind.number,
            scale_type=TYPES[self.scale_dtype],
            sub_scale_type=TYPES[self.sub_scale_dtype or "uint8"],
            sub_offset_type=TYPES[self.sub_offset_dtype or "uint8"],
            zp=self.zero_point or 0,
            rotation=self.rotation,
            **memory,
        )

    def experts_view(self, arrays: Mapping[str, Any]) -> ExpertsView:
        """The same of experts."""
        return ExpertsView(self.view(arrays), self.experts or 1, self._sizes)

    @cached_property
    def _sizes(self) -> tuple[int, ...]:
        """Bytes of each of `ARRAYS` that are one expert's."""
        specs = self.of_each.arrays
        return tuple(specs[name].nbytes if name in specs else 0 for name in ARRAYS)
