"""Experts: packed weights of one format, one behind the other, as a mixture of experts has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import replace
from typing import Any, Protocol, overload

import numpy as np
import numpy.typing as npt

from pyda8w4 import _advice
from pyda8w4._core import ExpertsView
from pyda8w4._format import Format
from pyda8w4._packed import Packed, PackedWeight, aligned_empty, check_packed, unpickled


class _Weights(Protocol):
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[PackedWeight]: ...


class PackedExperts(Packed):
    """Packed weights of one shape and kind, one for each expert; immutable.

    Made by `stack`, `load`, `shard` or slicing. Each is in the layout of a `PackedWeight`
    (docs/packed-format.md); the arrays have a dimension for the experts, which comes first.

    Attributes
    ----------
    shape : (int, int, int)
        (E, N, K): experts, output and input features.
    bits : int
        Of a code: 4, 5, 6 or 8.
    group_size : int
        Elements of k that share a scale; K where there is one group per row.
    scale_dtype : str
        How scales and offsets are stored: ``float16``, ``bfloat16`` or ``float32``.
    zero_point : int or None
        The one of all groups of all experts, or None where they differ.
    has_offsets : bool
        Whether there is a float offset per group.
    groups : int
        Groups of one row: ceil(K / group_size).
    super_size : int
        Groups that share a float scale where scales have two levels; else 0.
    sub_scale_dtype, sub_offset_dtype : str or None
        The types of the second level, ``uint8`` or ``int8``, where there is one.
    table : (E, 16) ndarray of int8, or None
        The values that codes stand for, where they do not stand for themselves.
    perm : (E, K) ndarray of int32, or None
        Position k of expert e multiplies ``x[perm[e, k]]``.
    factors : (E, K) ndarray of float32, or None
        What ``x[perm[e, k]]`` is multiplied by before it is quantized.
    rotation : int
        Inputs of a block that are rotated together before they are quantized; 0 where they are not.
    nbytes : int
        Bytes of the packed arrays.

    Examples
    --------
    >>> import numpy as np
    >>> import pyda8w4
    >>> packed = pyda8w4.prepack(np.zeros((64, 128), np.uint8), np.ones((64, 4), np.float32))
    >>> experts = pyda8w4.stack([packed] * 8)
    >>> experts
    PackedExperts(shape=(8, 64, 128), bits=4, group_size=32, scales=float16, zero_point=8, nbytes=38912)
    >>> len(experts), experts[0].shape, experts[2:4].shape
    (8, (64, 128), (2, 64, 128))
    """

    __slots__ = ("_view",)

    _view: ExpertsView

    def __init__(self) -> None:
        raise TypeError("PackedExperts are made by pyda8w4.stack, not by their constructor")

    @classmethod
    def _from_arrays(cls, format: Format, arrays: Mapping[str, npt.NDArray[Any]]) -> PackedExperts:
        """From C-contiguous, aligned arrays that fit the format: `Format.check` tells."""
        self = object.__new__(cls)
        self._set(format, arrays)
        object.__setattr__(self, "_view", format.experts_view(self._arrays))
        return self

    def __array__(self, dtype: Any = None, copy: Any = None) -> object:
        """As that of `PackedWeight`."""
        raise TypeError("they are packed: moe and grouped_linear multiply by them")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, self._pickled()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K): experts, output and input features."""
        return len(self), self._format.n, self._format.k

    def __len__(self) -> int:
        assert self._format.experts is not None
        return self._format.experts

    def __iter__(self) -> Iterator[PackedWeight]:
        return map(self._expert, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> PackedWeight: ...

    @overload
    def __getitem__(self, index: slice) -> PackedExperts: ...

    def __getitem__(self, index: int | slice) -> PackedWeight | PackedExperts:
        """Give one expert, or some of them, without copying.

        Parameters
        ----------
        index : int or slice
            Counted as in a list; a slice has step 1.

        Returns
        -------
        PackedWeight or PackedExperts
            In the memory of these.

        Raises
        ------
        TypeError
            If `index` is something else.
        IndexError
            If there is no such expert.
        ValueError
            If the slice is empty or has a step.

        Examples
        --------
        >>> import numpy as np
        >>> import pyda8w4
        >>> experts = pyda8w4.stack([pyda8w4.prepack(np.zeros((32, 16), np.uint8), np.ones(32, np.float32))] * 4)
        >>> experts[-1].shape, experts[1:].shape
        ((32, 16), (3, 32, 16))
        """
        count = len(self)
        if isinstance(index, slice):
            begin, end, step = index.indices(count)
            if step != 1 or begin >= end:
                raise ValueError(f"the slice must be non-empty with step 1, got {index} of {count} experts")
            format = replace(self._format, experts=end - begin)
            return PackedExperts._from_arrays(format, {name: a[begin:end] for name, a in self._arrays.items()})
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)):
            raise TypeError(f"PackedExperts take an int or a slice, got {type(index).__name__}")
        if not -count <= index < count:
            raise IndexError(f"the expert must be {-count} to {count - 1}, got {index}")
        return self._expert(int(index))

    def _expert(self, index: int) -> PackedWeight:
        arrays = {name: array[index] for name, array in self._arrays.items()}
        return PackedWeight._from_arrays(self._format.of_each, arrays)

    def shard(self, index: int, count: int, axis: int) -> PackedExperts:
        """Give one of `count` equal parts of each expert, for tensor parallelism.

        Parameters
        ----------
        index : int
            Which: 0 to count - 1.
        count : int
            How many parts, as `PackedWeight.shard` takes it.
        axis : {0, 1}
            0 cuts output features, 1 input features.

        Returns
        -------
        PackedExperts
            A copy, of `PackedWeight.shard` of each.

        Raises
        ------
        TypeError
            If an argument is no int.
        ValueError
            If there is no such part, as `PackedWeight.shard` says.

        Notes
        -----
        `moe` takes gates and ups in one weight. A part of its output features has gates as well as ups only
        where they are interleaved. Experts that are whole are divided by a slice and an ``expert_map``.

        Examples
        --------
        >>> import numpy as np
        >>> import pyda8w4
        >>> experts = pyda8w4.stack([pyda8w4.prepack(np.zeros((64, 16), np.uint8), np.ones((64, 4), np.float32))] * 4)
        >>> experts.shard(1, 2, axis=0).shape, experts.shard(1, 2, axis=1).shape
        ((4, 32, 16), (4, 64, 8))
        """
        return stack(_Shards(self, index, count, axis))


class _Shards:
    """Parts of experts, each of which is made when it is wanted."""

    def __init__(self, experts: PackedExperts, *part: int) -> None:
        self._experts, self._part = experts, part

    def __len__(self) -> int:
        return len(self._experts)

    def __iter__(self) -> Iterator[PackedWeight]:
        return (expert.shard(*self._part) for expert in self._experts)


def stack(weights: _Weights) -> PackedExperts:
    """Put packed weights of one shape and kind behind each other, for `moe` and `grouped_linear`.

    Parameters
    ----------
    weights : sequence of PackedWeight
        One for each expert, at least one; all of one shape, with the same group size, bits and rotation,
        scales of one level or of two levels alike, and a table, a permutation and factors in all of them or in none.
        Whatever has a length and can be iterated over: each weight may be made when its turn comes, and is
        not kept.

    Returns
    -------
    PackedExperts
        Of shape (E, N, K); owns its memory. ``experts[i]`` gives the products of ``weights[i]``, bit for bit.

    Raises
    ------
    TypeError
        If `weights` is not a sequence of PackedWeight.
    ValueError
        If it is empty or does not have the length that it says, or what must be the same differs.
    MemoryError
        If there is no memory for the result.

    Notes
    -----
    As with `concat`, scales that the weights store in different types are stored as float32, zero points are
    stored for each group where the weights do not all have the same one, and weights without offsets get
    offsets of 0 where others have some: no bit of a product changes.

    Examples
    --------
    >>> import numpy as np
    >>> import pyda8w4
    >>> one, two = (pyda8w4.prepack(np.full((32, 16), code, np.uint8), np.ones(32, np.float32)) for code in (7, 9))
    >>> experts = pyda8w4.stack([one, two])
    >>> experts.shape
    (2, 32, 16)
    >>> experts[1].dequantize()[0, :4]
    array([1., 1., 1., 1.], dtype=float32)
    """
    if isinstance(weights, PackedWeight) or not isinstance(weights, Iterable) or not isinstance(weights, Sized):
        raise TypeError(f"weights must be a sequence of PackedWeight, got {type(weights).__name__}")
    count = len(weights)
    if not count:
        raise ValueError("weights must hold at least one PackedWeight, got none")
    format: Format | None = None
    arrays: dict[str, npt.NDArray[Any]] = {}
    found = 0
    for weight in weights:
        check_packed(f"weights[{found}]", weight)
        first = format or weight._format
        if found == count:
            raise ValueError(f"weights must have the length {count} that they say, got more")
        if weight.shape != first.shape:
            raise ValueError(f"weights[{found}] must have shape {first.shape} like weights[0], got {weight.shape}")
        common = first.common(weight._format, found)
        if common != format:
            arrays = _converted(arrays, first, common, found, count)
            format = common
        for name, part in weight._format.restored(weight._arrays, common).items():
            arrays[name][found] = part
        found += 1
        del weight, part  # before the next is made
    if found < count or format is None:
        raise ValueError(f"weights must have the length {count} that they say, got {found}")
    return PackedExperts._from_arrays(replace(format, experts=count), arrays)


def check_experts(name: str, value: Any) -> None:
    if type(value) is not PackedExperts:
        raise TypeError(f"{name} must be PackedExperts, got {type(value).__name__}{_advice.for_experts(value)}")


def _converted(
    arrays: dict[str, npt.NDArray[Any]], old: Format, new: Format, found: int, count: int
) -> dict[str, npt.NDArray[Any]]:
    """Arrays of a new format for all experts, with what those of the old one have of the first; most are the same."""
    converted = {}
    for name, spec in replace(new, experts=count).arrays.items():
        if name in arrays and arrays[name].dtype == spec.dtype:
            converted[name] = arrays[name]
            continue
        (converted[name],) = aligned_empty((spec.shape, spec.dtype))
        for i in range(found):
            expert = {part: array[i] for part, array in arrays.items()}
            converted[name][i] = old.restored(expert, new)[name]
    return converted


def _rebuild(layout_version: int, fields: dict[str, Any], arrays: dict[str, Any]) -> PackedExperts:
    format, places = unpickled(layout_version, fields, arrays)
    if format.experts is None:
        raise ValueError("experts must be an int for PackedExperts, got None")
    return PackedExperts._from_arrays(format, places)
