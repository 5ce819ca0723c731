"""The packed weight: its arrays, and what can be done to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from math import gcd, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4 import _advice
from pyda8w4._checks import TYPES, as_array, ceil_div, one_of, type_name
from pyda8w4._core import Memory, Source, View
from pyda8w4._format import KINDS, LAYOUT_VERSION, LAYOUT_VERSIONS, SHARED, Format, fits, group_count

_CODE_FORMATS = {"uint8": 0, "int8": 1, "low_first": 2, "high_first": 3}
_NAMES_OF_TYPES = {number: name for name, number in TYPES.items()}


def aligned_empty(*parts: tuple[tuple[int, ...], npt.DTypeLike]) -> list[npt.NDArray[Any]]:
    """Arrays of these shapes and dtypes in one allocation, each at a multiple of 64 bytes."""
    dtypes = [np.dtype(dtype) for _, dtype in parts]
    sizes = [prod(shape) * dtype.itemsize for (shape, _), dtype in zip(parts, dtypes)]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + ceil_div(size, 64) * 64)
    memory = np.asarray(memoryview(Memory(starts[-1])))
    return [
        memory[start : start + size].view(dtype).reshape(shape)
        for start, size, dtype, (shape, _) in zip(starts, sizes, dtypes, parts)
    ]


def empty_arrays(format: Format) -> dict[str, npt.NDArray[Any]]:
    """Memory for a packed weight."""
    specs = format.arrays.values()
    return dict(zip(format.arrays, aligned_empty(*((spec.shape, spec.dtype) for spec in specs))))


class Packed:
    """Arrays that are packed, and what their format says of them; immutable.

    Where there are several weights, arrays have a dimension for them that comes first.
    """

    __slots__ = ("_arrays", "_format")

    _format: Format
    _arrays: dict[str, npt.NDArray[Any]]  # bfloat16 as the bits, in uint16

    def _set(self, format: Format, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        read_only = {name: array.view() for name, array in arrays.items()}
        for array in read_only.values():
            array.flags.writeable = False
        object.__setattr__(self, "_format", format)
        object.__setattr__(self, "_arrays", read_only)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a {type(self).__name__} is immutable; cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a {type(self).__name__} is immutable; cannot delete {name!r}")

    def _pickled(self) -> tuple[int, dict[str, Any], dict[str, npt.NDArray[Any]]]:
        return LAYOUT_VERSION, asdict(self._format), {name: np.asarray(array) for name, array in self._arrays.items()}

    def __repr__(self) -> str:
        parts = [f"shape={self._format.shape}", f"bits={self.bits}", f"group_size={self.group_size}"]
        if self.super_size:
            parts.append(f"super_size={self.super_size}")
        for name, found, sub_dtype in (
            ("scales", True, self.sub_scale_dtype),
            ("offsets", self.has_offsets, self.sub_offset_dtype),
        ):
            if found:
                parts.append(f"{name}={self.scale_dtype}{f'*{sub_dtype}' if sub_dtype else ''}")
        parts.append(f"zero_point={'per group' if self.zero_point is None else self.zero_point}")
        parts += [name for name in SHARED if name in self._arrays]
        if self.rotation:
            parts.append(f"rotation={self.rotation}")
        return f"{type(self).__name__}({', '.join(parts)}, nbytes={self.nbytes})"

    @property
    def bits(self) -> int:
        """Of a code: 4, 5, 6 or 8."""
        return self._format.bits

    @property
    def group_size(self) -> int:
        """Elements of k that share a scale; K where there is one group per row."""
        return self._format.group_size

    @property
    def scale_dtype(self) -> str:
        """How scales and offsets are stored."""
        return self._format.scale_dtype

    @property
    def zero_point(self) -> int | None:
        """The one of all groups, or None where they differ."""
        return self._format.zero_point

    @property
    def has_offsets(self) -> bool:
        """Whether there is a float offset per group."""
        return self._format.has_offsets

    @property
    def groups(self) -> int:
        """Groups of one row: ceil(K / group_size)."""
        return self._format.groups

    @property
    def super_size(self) -> int:
        """Groups that share a float scale where scales have two levels; else 0."""
        return self._format.super_size

    @property
    def sub_scale_dtype(self) -> str | None:
        """How the second level of scales is stored, where there is one."""
        return self._format.sub_scale_dtype

    @property
    def sub_offset_dtype(self) -> str | None:
        """How the second level of offsets is stored, where there is one."""
        return self._format.sub_offset_dtype

    @property
    def table(self) -> npt.NDArray[np.int8] | None:
        """The 16 values that codes stand for, where they do not stand for themselves."""
        return self._arrays.get("table")

    @property
    def perm(self) -> npt.NDArray[np.int32] | None:
        """Position k of the weight multiplies ``x[perm[k]]``; None where it multiplies ``x[k]``."""
        return self._arrays.get("perm")

    @property
    def factors(self) -> npt.NDArray[np.float32] | None:
        """What ``x[perm[k]]`` is multiplied by before it is quantized, where it is."""
        return self._arrays.get("factors")

    @property
    def rotation(self) -> int:
        """Inputs of a block that are rotated together before they are quantized; 0 where they are not."""
        return self._format.rotation

    @property
    def nbytes(self) -> int:
        """Bytes of the packed arrays."""
        return sum(array.nbytes for array in self._arrays.values())


class PackedWeight(Packed):
    """A weight matrix in the layout that the kernels read; immutable.

    Made by `prepack`, `concat`, `load`, `shard` or slicing. The layout is the same for every CPU
    (docs/packed-format.md), so a packed weight can be pickled or saved on one machine and used on
    another.

    Attributes
    ----------
    shape : (int, int)
        (N, K): output and input features.
    bits : int
        Of a code: 4, 5, 6 or 8.
    group_size : int
        Elements of k that share a scale; K where there is one group per row.
    scale_dtype : str
        How scales and offsets are stored: ``float16`` or ``bfloat16`` where that loses nothing, else ``float32``.
    zero_point : int or None
        The one of all groups, or None where they differ.
    has_offsets : bool
        Whether there is a float offset per group.
    groups : int
        Groups of one row: ceil(K / group_size).
    super_size : int
        Groups that share a float scale where scales have two levels; else 0.
    sub_scale_dtype, sub_offset_dtype : str or None
        The types of the second level, ``uint8`` or ``int8``, where there is one.
    table : (16,) ndarray of int8, or None
        The values that codes stand for, where they do not stand for themselves.
    perm : (K,) ndarray of int32, or None
        Position k of the weight multiplies ``x[perm[k]]``.
    factors : (K,) ndarray of float32, or None
        What ``x[perm[k]]`` is multiplied by before it is quantized.
    rotation : int
        Inputs of a block that are rotated together before they are quantized; 0 where they are not.
    nbytes : int
        Bytes of the packed arrays.

    Examples
    --------
    >>> import numpy as np
    >>> import pyda8w4
    >>> packed = pyda8w4.prepack(np.zeros((64, 128), np.uint8), np.ones((64, 4), np.float32))
    >>> packed
    PackedWeight(shape=(64, 128), bits=4, group_size=32, scales=float16, zero_point=8, nbytes=4864)
    >>> packed[32:].shape
    (32, 128)
    """

    __slots__ = ("_view",)

    _view: View

    def __init__(self) -> None:
        raise TypeError("a PackedWeight is made by pyda8w4.quantize or pyda8w4.prepack, not by its constructor")

    @classmethod
    def _from_arrays(cls, format: Format, arrays: Mapping[str, npt.NDArray[Any]]) -> PackedWeight:
        """From C-contiguous, aligned arrays that fit the format: `Format.check` tells."""
        self = object.__new__(cls)
        self._set(format, arrays)
        object.__setattr__(self, "_view", format.view(self._arrays))
        return self

    def __array__(self, dtype: Any = None, copy: Any = None) -> object:
        """Numpy would make an array of one object, and go on with that."""
        raise TypeError("it is packed: dequantize() gives its floats, and linear(x, packed) multiplies by it")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, self._pickled()

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): output and input features."""
        return self._format.n, self._format.k

    def __getitem__(self, rows: slice) -> PackedWeight:
        """Give output features `rows` without copying them.

        Parameters
        ----------
        rows : slice
            From a multiple of 32 to a multiple of 32, or to N.

        Returns
        -------
        PackedWeight
            In the memory of this one.

        Raises
        ------
        TypeError
            If `rows` is not a slice.
        ValueError
            If it is empty, has a step, or does not begin and end at borders of blocks.

        Examples
        --------
        >>> import numpy as np
        >>> import pyda8w4
        >>> packed = pyda8w4.prepack(np.zeros((80, 16), np.uint8), np.ones(80, np.float32))
        >>> packed[32:].shape
        (48, 16)
        """
        if not isinstance(rows, slice):
            raise TypeError(f"a PackedWeight takes a slice of output features, got {type(rows).__name__}")
        begin, end, step = rows.indices(self._format.n)
        if step != 1 or begin >= end:
            raise ValueError(f"the slice must be non-empty with step 1, got {rows} of {self._format.n} output features")
        return PackedWeight._from_arrays(*self._format.slice(begin, end, self._arrays))

    def unpack(self) -> tuple[npt.NDArray[Any], ...]:
        """Give back what was packed, exactly: arguments of `prepack`.

        Returns
        -------
        codes : (N, K) ndarray of uint8, or of int8 where they have 8 bits
            Codes of 4 to 6 bits that were given as signed numbers come back higher by half their range
            (-8..7 as 0..15), and so do their zero points; those of 8 bits that were given as uint8, and
            their zero points, lower by 128.
        scales : (N, G) ndarray of float32
            One per group: where there are two levels, their products.
        zps : (N, G) ndarray of int8
            One per group.
        offsets : (N, G) ndarray of float32
            Only of a weight that has offsets: otherwise there are three arrays.

        Notes
        -----
        `bits`, `table`, `perm`, `factors` and `rotation` are attributes.

        Examples
        --------
        >>> import numpy as np
        >>> import pyda8w4
        >>> w = np.arange(32, dtype=np.uint8).reshape(2, 16) % 16
        >>> packed = pyda8w4.prepack(w, np.ones(2, np.float32))
        >>> bool((packed.unpack()[0] == w).all())
        True
        """
        per_group = self._format.n, self._format.groups
        codes = np.empty(self.shape, self._format.kind.dtype)
        scales = np.empty(per_group, np.float32)
        zps = np.empty(per_group, np.int8)
        offsets = np.empty(per_group, np.float32) if self.has_offsets else None
        self._view.unpack(codes, scales, zps, offsets)
        return (codes, scales, zps) if offsets is None else (codes, scales, zps, offsets)

    def dequantize(self, rows: int | slice | npt.ArrayLike | None = None) -> npt.NDArray[np.float32]:
        """Give the float weights.

        Parameters
        ----------
        rows : int, slice, or array of integers, optional
            Which output features, counted as numpy does; None means all.

        Returns
        -------
        (..., K) ndarray of float32
            In the order of the inputs: what stands at position k of a weight with a permutation is in
            column ``perm[k]``, multiplied by ``factors[k]`` if it has factors. The first dimensions are
            those of `rows`.

        Raises
        ------
        TypeError
            If `rows` is something else.
        IndexError
            If it is out of range.

        Notes
        -----
        ``((value of the code - zp) * scale + offset) * factor``, each operation rounded to float32. Where the
        weight has a rotation, rows go through it before factors multiply them (docs/numbers.md).

        Examples
        --------
        >>> import numpy as np
        >>> import pyda8w4
        >>> packed = pyda8w4.prepack(np.array([[9, 9, 10, 7], [8, 8, 8, 0]], np.uint8), np.array([0.5, 2], np.float32))
        >>> packed.dequantize()
        array([[  0.5,   0.5,   1. ,  -0.5],
               [  0. ,   0. ,   0. , -16. ]], dtype=float32)
        >>> packed.dequantize(-1)
        array([  0.,   0.,   0., -16.], dtype=float32)
        """
        columns = _indices("rows", rows, self._format.n)
        out = np.empty((*columns.shape, self._format.k), np.float32)
        self._view.dequantize(columns.reshape(-1), out)
        return out

    def shard(self, index: int, count: int, axis: int) -> PackedWeight:
        """Give one of `count` equal parts, for tensor parallelism.

        Parameters
        ----------
        index : int
            Which: 0 to count - 1.
        count : int
            How many parts. It divides N (axis 0) or K (axis 1).
        axis : {0, 1}
            0 cuts output features: the outputs of the parts, side by side, are those of the weight, bit for
            bit. 1 cuts input features: the outputs of `gemm` with the parts add up to those with the weight,
            up to the rounding of that sum. `linear` also quantizes other rows: those of a part. A border
            inside a group cuts all groups into pieces that end there.

        Returns
        -------
        PackedWeight
            In the memory of this one where axis is 0 and the part begins and ends at multiples of 32; else
            a copy.

        Raises
        ------
        TypeError
            If an argument is no int.
        ValueError
            If there is no such part, or `axis` is 1 and a border lies inside a quad of inputs, or inside a block
            of the rotation, or the permutation mixes the parts: such weights must be cut before they are permuted.

        Examples
        --------
        >>> import numpy as np
        >>> import pyda8w4
        >>> packed = pyda8w4.prepack(np.zeros((64, 128), np.uint8), np.ones((64, 4), np.float32))
        >>> packed.shard(1, 2, axis=0).shape, packed.shard(1, 2, axis=1).shape
        ((32, 128), (64, 64))
        """
        for name, value in (("index", index), ("count", count), ("axis", axis)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        index, count = int(index), int(count)
        if axis not in (0, 1):
            raise ValueError(f"axis must be 0 or 1, got {axis}")
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if not 0 <= index < count:
            raise ValueError(f"index must be 0 to {count - 1} for a count of {count}, got {index}")
        return self._shard_of_k(index, count) if axis else self._shard_of_n(index, count)

    def _shard_of_n(self, index: int, count: int) -> PackedWeight:
        n = self._format.n
        if n % count:
            raise ValueError(f"count must divide N = {n}, got {count}")
        return self._rows(n // count * index, n // count * (index + 1))

    def _rows(self, begin: int, end: int) -> PackedWeight:
        """Output features, in the memory of this one where they begin and end at blocks."""
        if self._format.is_sliceable(begin, end):
            return self[begin:end]
        first, last = self._format.blocks_around(begin, end)
        part = self[first:last]
        given = part._given()
        for name in given.keys() - set(SHARED):
            given[name] = given[name][begin - first : end - first]
        return pack_again(given, part._format)

    def _shard_of_k(self, index: int, count: int) -> PackedWeight:
        k, super_size = self._format.k, self.super_size
        if k % count:
            raise ValueError(f"count must divide K = {k}, got {count}")
        size = k // count
        ks = slice(size * index, size * (index + 1))
        # A border inside a group makes pieces of all groups, with the scales of the groups that they are pieces of.
        group = self.group_size if count == 1 else gcd(self.group_size, size)
        if not fits(group, size):
            raise ValueError(
                f"count must cut K = {k} into parts of groups of a multiple of 4, got {count}, which cuts groups of "
                f"{self.group_size} into pieces of {group}"
            )
        if self.rotation and count > 1 and size % self.rotation:
            raise ValueError(
                f"count must cut K = {k} into parts of whole blocks of the rotation, {self.rotation}, got {count}, "
                f"which gives parts of {size}"
            )
        pieces = np.arange(index * group_count(size, group), (index + 1) * group_count(size, group))
        groups: npt.NDArray[Any] = pieces // (self.group_size // group)
        given = self._given()
        floats = groups
        if super_size:
            # Super-groups that lie in one shard, each in one of the old: so these may come several times.
            new_super = gcd(min(super_size, self.groups) * (self.group_size // group), len(pieces))
            floats = groups[::new_super] // super_size
            super_size = new_super
        for name in given:
            if name == "codes":
                given[name] = given[name][:, ks]
            elif name in ("scales", "offsets"):
                given[name] = given[name][:, floats]
            elif name == "factors":
                given[name] = given[name][ks]
            elif name == "perm":
                given[name] = given[name][ks] - np.int32(ks.start)
                if given[name].min() < 0 or given[name].max() >= size:
                    raise ValueError(
                        f"count must cut K where perm keeps inputs apart, got {count}, which perm does not: cut the "
                        "weight before it is permuted"
                    )
            elif name != "table":
                given[name] = given[name][:, groups]
        return pack_again(given, replace(self._format, group_size=group, super_size=super_size))

    def _given(self) -> dict[str, npt.NDArray[Any]]:
        """What was packed, as `pack_again` takes it."""
        return {"codes": self.unpack()[0], **self._format.of_columns(self._arrays)}


def check_packed(name: str, value: Any) -> None:
    if not isinstance(value, PackedWeight):
        hint = _advice.for_packed(name, value)
        raise TypeError(f"{name} must be a PackedWeight, got {type(value).__name__}{hint}")


def pack(
    given: Mapping[str, npt.NDArray[Any]],
    *,
    k: int,
    bits: int,
    form: str,
    group_size: int,
    super_size: int,
    zero_point: int,
    rotation: int,
) -> PackedWeight:
    """Pack arrays that are checked. CoreError where their values do not allow it.

    Those of `given` have the names of the packed arrays, and but for codes, whose rows are contiguous and of this form,
    they are C-contiguous. The zero point is that of all groups where there are no zps.
    """
    codes = given["codes"]
    # numpy gives a single row any stride, such as the 0 of w[None].
    stride = max(codes.strides[0], codes.shape[1])
    arrays: dict[str, Any] = {
        name: given.get(name) for name in ("table", "scales", "sub_scales", "zps", "offsets", "sub_offsets")
    }
    sub_dtypes = [type_name(given[name].dtype) if name in given else None for name in ("sub_scales", "sub_offsets")]
    source = Source(
        n=len(codes),
        k=k,
        group=group_size,
        super=super_size,
        kind=KINDS[bits, "table" in given].number,
        format=_CODE_FORMATS[form],
        codes=codes,
        codes_stride=stride,
        sub_scale_type=TYPES[sub_dtypes[0] or "uint8"],
        sub_offset_type=TYPES[sub_dtypes[1] or "uint8"],
        zp=zero_point,
        **arrays,
    )
    scale_type, one_zero_point = source.plan_pack()
    format = Format(
        n=len(codes),
        k=k,
        group_size=group_size,
        scale_dtype=_NAMES_OF_TYPES[scale_type],
        zero_point=one_zero_point,
        has_offsets="offsets" in given,
        bits=bits,
        has_table="table" in given,
        super_size=super_size,
        sub_scale_dtype=sub_dtypes[0],
        sub_offset_dtype=sub_dtypes[1],
        has_perm="perm" in given,
        has_factors="factors" in given,
        rotation=rotation,
    )
    places = empty_arrays(format)
    source.pack(**{name: place for name, place in places.items() if name not in SHARED})
    for name in SHARED:
        if name in places:
            places[name][...] = given[name]
    return PackedWeight._from_arrays(format, places)


def pack_again(given: Mapping[str, npt.NDArray[Any]], like: Format) -> PackedWeight:
    """Pack what `PackedWeight._given` gave, or parts of it, without losing anything."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in given.items()}
    return pack(
        contiguous,
        k=contiguous["codes"].shape[1],
        bits=like.bits,
        form=contiguous["codes"].dtype.name,
        group_size=like.group_size,
        super_size=like.super_size,
        zero_point=like.zero_point or 0,
        rotation=like.rotation,
    )


def _indices(name: str, value: Any, count: int) -> npt.NDArray[np.uintp]:
    """-> indices below `count`, of the dimensions that numpy gives them."""
    if value is None:
        value = slice(None)
    if isinstance(value, slice):
        return np.arange(*value.indices(count)).astype(np.uintp)
    indices = as_array(name, value)
    if indices.size == 0:
        return np.empty(indices.shape, np.uintp)
    if indices.dtype.kind not in "iu":
        raise TypeError(f"{name} must be an int, a slice or an array of integers, got {indices.dtype}")
    least, most = int(indices.min()), int(indices.max())
    if least < -count or most >= count:
        raise IndexError(f"{name} must be {-count} to {count - 1}, got {least} to {most}")
    return np.where(indices < 0, indices.astype(np.int64) + count, indices).astype(np.uintp)


def _rebuild(layout_version: int, fields: dict[str, Any], arrays: dict[str, Any]) -> PackedWeight:
    format, places = unpickled(layout_version, fields, arrays)
    if format.experts is not None:
        raise ValueError(f"experts must be None for a PackedWeight, got {format.experts}")
    return PackedWeight._from_arrays(format, places)


def unpickled(
    layout_version: int, fields: dict[str, Any], arrays: dict[str, Any]
) -> tuple[Format, dict[str, npt.NDArray[Any]]]:
    """What `Packed._pickled` gave, or another, which is checked as a file is; in memory for kernels."""
    if layout_version not in LAYOUT_VERSIONS:
        raise ValueError(f"layout_version must be {one_of(LAYOUT_VERSIONS)}, got {layout_version!r}")
    for name, mapping in (("fields", fields), ("arrays", arrays)):
        if not isinstance(mapping, dict):
            raise TypeError(f"{name} must be a dict, got {type(mapping).__name__}")
    for name, array in arrays.items():
        if type(array) is not np.ndarray:
            raise TypeError(f"{name} must be an ndarray, got {type(array).__name__}")
    format = Format(**fields)
    format.check(arrays)
    places = empty_arrays(format)
    for name, place in places.items():
        place[...] = arrays[name]
    return format, places
