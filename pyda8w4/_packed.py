"""The packed weight: arrays in the layout of docs/packed-format.md, and what can be done to them."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyda8w4 import _core
from pyda8w4._checks import BLOCK, TYPES, ceil_div


def aligned_empty(*parts: tuple[tuple[int, ...], Any]) -> list[np.ndarray]:
    """Arrays of these shapes and dtypes in one allocation, each at a multiple of 64 bytes."""
    dtypes = [np.dtype(dtype) for _, dtype in parts]
    sizes = [int(np.prod(shape, dtype=object)) * dtype.itemsize for (shape, _), dtype in zip(parts, dtypes)]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + ceil_div(size, 64) * 64)
    memory = np.asarray(memoryview(_core.Memory(starts[-1])))
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

    __slots__ = ("_arrays", "_view", "group_size", "scale_dtype", "shape", "zero_point")

    shape: tuple[int, int]
    group_size: int
    scale_dtype: str
    zero_point: int | None  # the one of all groups, or None where they differ
    _arrays: dict[str, np.ndarray]
    _view: _core.View

    def __init__(self) -> None:
        raise TypeError("a PackedWeight is made by pyda8w4.prepack, not by its constructor")

    @classmethod
    def _from_arrays(
        cls,
        shape: tuple[int, int],
        group_size: int,
        scale_dtype: str,
        zero_point: int | None,
        *,
        codes: np.ndarray,
        scales: np.ndarray,
        sums: np.ndarray,
        zps: np.ndarray | None = None,
        offsets: np.ndarray | None = None,
    ) -> PackedWeight:
        """From arrays as docs/packed-format.md has them; bfloat16 scales and offsets as their uint16 bits."""
        self = object.__new__(cls)
        arrays = {"codes": codes, "scales": scales, "sums": sums}
        if zps is not None:
            arrays["zps"] = zps
        if offsets is not None:
            arrays["offsets"] = offsets
        for name, array in arrays.items():
            arrays[name] = array.view()
            arrays[name].flags.writeable = False
        set_once = object.__setattr__
        set_once(self, "_arrays", arrays)
        set_once(self, "shape", shape)
        set_once(self, "group_size", group_size)
        set_once(self, "scale_dtype", scale_dtype)
        set_once(self, "zero_point", zero_point)
        zp = 0 if zero_point is None else zero_point
        view = _core.View(*shape, group_size, TYPES[scale_dtype], zp, codes, scales, zps, offsets, sums)
        set_once(self, "_view", view)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a PackedWeight is immutable; cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a PackedWeight is immutable; cannot delete {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (self.shape, self.group_size, self.scale_dtype, self.zero_point)
        return _rebuild, (*fields, {name: np.asarray(array) for name, array in self._arrays.items()})

    def __repr__(self) -> str:
        zero_point = "per group" if self.zero_point is None else self.zero_point
        offsets = f"offsets={self.scale_dtype}, " if self.has_offsets else ""
        return (
            f"PackedWeight(shape={self.shape}, group_size={self.group_size}, scales={self.scale_dtype}, {offsets}"
            f"zero_point={zero_point}, nbytes={self.nbytes})"
        )

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays.values())

    @property
    def has_offsets(self) -> bool:
        """Whether there is a float offset per group."""
        return "offsets" in self._arrays

    @property
    def groups(self) -> int:
        """Groups of one row: ceil(K / group_size)."""
        return ceil_div(self.shape[1], self.group_size)

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
        blocks = slice(begin // BLOCK, ceil_div(end, BLOCK))
        parts = {name: array[blocks] for name, array in self._arrays.items()}
        return PackedWeight._from_arrays((end - begin, k), self.group_size, self.scale_dtype, self.zero_point, **parts)

    def unpack(self) -> tuple[np.ndarray, ...]:
        """Give back what was packed, exactly: arguments of `prepack`.

        Returns
        -------
        w_int4 : (N, K) ndarray of uint8
            Codes 0 to 15. Codes that were given as -8..7 come back 8 higher, and so do their zero
            points.
        scales : (N, G) ndarray of float32
        zps : (N, G) ndarray of int8
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
        n, k = self.shape
        codes = np.empty((n, k), np.uint8)
        scales = np.empty((n, self.groups), np.float32)
        zps = np.empty((n, self.groups), np.int8)
        offsets = np.empty((n, self.groups), np.float32) if self.has_offsets else None
        self._view.unpack(codes, scales, zps, offsets)
        return (codes, scales, zps) if offsets is None else (codes, scales, zps, offsets)


def _rebuild(
    shape: tuple[int, int],
    group_size: int,
    scale_dtype: str,
    zero_point: int | None,
    arrays: dict[str, np.ndarray],
) -> PackedWeight:
    places = aligned_empty(*((array.shape, array.dtype) for array in arrays.values()))
    for place, array in zip(places, arrays.values()):
        place[...] = array
    parts = dict(zip(arrays, places))
    return PackedWeight._from_arrays(shape, group_size, scale_dtype, zero_point, **parts)
