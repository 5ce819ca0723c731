"""The packed weight: its arrays, and what can be done to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import ceil_div
from pyda8w4._core import Memory, View
from pyda8w4._format import LAYOUT_VERSION, Format


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
        How scales and offsets are stored: ``float16`` or ``bfloat16`` where that loses nothing, else ``float32``.
    zero_point : int or None
        The one of all groups, or None where they differ.
    has_offsets : bool
        Whether there is a float offset per group.
    groups : int
        Groups of one row: ceil(K / group_size).
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

    __slots__ = ("_arrays", "_format", "_view")

    _format: Format
    _arrays: dict[str, npt.NDArray[Any]]  # bfloat16 as the bits, in uint16
    _view: View

    def __init__(self) -> None:
        raise TypeError("a PackedWeight is made by pyda8w4.prepack, not by its constructor")

    @classmethod
    def _from_arrays(cls, format: Format, arrays: Mapping[str, npt.NDArray[Any]]) -> PackedWeight:
        """From C-contiguous, aligned arrays that fit the format: `Format.check` tells."""
        read_only = {name: array.view() for name, array in arrays.items()}
        for array in read_only.values():
            array.flags.writeable = False
        self = object.__new__(cls)
        object.__setattr__(self, "_format", format)
        object.__setattr__(self, "_arrays", read_only)
        object.__setattr__(self, "_view", format.view(read_only))
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a PackedWeight is immutable; cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a PackedWeight is immutable; cannot delete {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        arrays = {name: np.asarray(array) for name, array in self._arrays.items()}
        return _rebuild, (LAYOUT_VERSION, asdict(self._format), arrays)

    def __repr__(self) -> str:
        zero_point = "per group" if self.zero_point is None else self.zero_point
        offsets = f"offsets={self.scale_dtype}, " if self.has_offsets else ""
        return (
            f"PackedWeight(shape={self.shape}, group_size={self.group_size}, scales={self.scale_dtype}, {offsets}"
            f"zero_point={zero_point}, nbytes={self.nbytes})"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): output and input features."""
        return self._format.n, self._format.k

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
    def nbytes(self) -> int:
        """Bytes of the packed arrays."""
        return sum(array.nbytes for array in self._arrays.values())

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
        w_int4 : (N, K) ndarray of uint8
            Codes 0 to 15. Codes that were given as -8..7 come back 8 higher, and so do their zero
            points.
        scales : (N, G) ndarray of float32
            One per group.
        zps : (N, G) ndarray of int8
            One per group.
        offsets : (N, G) ndarray of float32
            Only of a weight that has offsets: otherwise there are three arrays.

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
        codes = np.empty(self.shape, np.uint8)
        scales = np.empty(per_group, np.float32)
        zps = np.empty(per_group, np.int8)
        offsets = np.empty(per_group, np.float32) if self.has_offsets else None
        self._view.unpack(codes, scales, zps, offsets)
        return (codes, scales, zps) if offsets is None else (codes, scales, zps, offsets)


def _rebuild(layout_version: int, fields: dict[str, Any], arrays: dict[str, Any]) -> PackedWeight:
    """From a pickle, whose contents are checked as those of a file are."""
    if layout_version != LAYOUT_VERSION:
        raise ValueError(f"layout_version must be {LAYOUT_VERSION}, got {layout_version!r}")
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
    return PackedWeight._from_arrays(format, places)
