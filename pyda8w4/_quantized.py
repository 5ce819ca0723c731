"""A weight matrix that is quantized, not packed yet: what every format becomes, and floats that are rounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4._packed import PackedWeight
from pyda8w4._prepack import prepack

_BY_POSITION = ("codes", "scales", "zps", "offsets")
_OF_COLUMNS = ("codes", "scales", "zps", "offsets", "sub_scales", "sub_offsets")


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A quantized weight matrix: the arguments of `pyda8w4.prepack`, by name.

    Parameters
    ----------
    codes : (N, K) ndarray of uint8 or int8
        All of them are as `pyda8w4.prepack` has them.
    scales : (N, G) or (N, S) ndarray of float32, float16 or bfloat16
    zps : (N, G) ndarray of integers, optional
    offsets : (N, G) or (N, S) ndarray of float32, float16 or bfloat16, optional
    bits : {4, 5, 6, 8}
    table : (16,) ndarray of integers, optional
    sub_scales, sub_offsets : (N, G) ndarray of uint8 or int8, optional
    perm : (K,) ndarray of integers, optional
    factors : (K,) ndarray of float32, float16 or bfloat16, optional
    rotation : int
    group_size : int, optional

    Examples
    --------
    >>> import numpy as np
    >>> from pyda8w4.formats import QuantizedWeight
    >>> weight = QuantizedWeight(np.full((64, 128), 9, np.uint8), np.full((64, 4), 0.5, np.float16))
    >>> weight.pack()
    PackedWeight(shape=(64, 128), bits=4, group_size=32, scales=float16, zero_point=8, nbytes=4864)
    """

    codes: npt.NDArray[Any]
    scales: npt.NDArray[Any]
    zps: npt.NDArray[Any] | None = None
    offsets: npt.NDArray[Any] | None = None
    bits: int = 4
    table: npt.ArrayLike | None = None
    sub_scales: npt.NDArray[Any] | None = None
    sub_offsets: npt.NDArray[Any] | None = None
    perm: npt.NDArray[Any] | None = None
    factors: npt.NDArray[Any] | None = None
    rotation: int = 0
    group_size: int | None = None

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        """Give what `pyda8w4.prepack` takes by position: codes, scales, zps and, if there are some, offsets.

        Yields
        ------
        ndarray
            Each of them.

        Raises
        ------
        ValueError
            If there is more, which that would lose: two levels or a rotation, say.

        Notes
        -----
        Where groups do not divide K, `pyda8w4.prepack` needs `group_size` beside these; `pack` gives it.
        """
        given = self._arguments()
        more = given.keys() - {*_BY_POSITION, "bits", "rotation", "group_size"}
        if more or self.bits != 4 or self.rotation or self.zps is None:
            raise ValueError(
                f"only codes of 4 bits with scales, zps and offsets can be unpacked, got {', '.join(given)}: use pack()"
            )
        return iter([given[name] for name in _BY_POSITION if name in given])

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): output and input features."""
        n, k = self.codes.shape
        return n, k

    def rows(self, rows: slice | npt.NDArray[Any]) -> QuantizedWeight:
        """Give some output features, in the order that is given.

        Parameters
        ----------
        rows : slice or array of int
            As numpy takes them.

        Returns
        -------
        QuantizedWeight
            With these rows.
        """
        parts = self._arguments()
        return QuantizedWeight(**{name: part[rows] if name in _OF_COLUMNS else part for name, part in parts.items()})

    def pack(self) -> PackedWeight:
        """Pack it.

        Returns
        -------
        PackedWeight
            What `pyda8w4.prepack` makes of it.

        Raises
        ------
        TypeError, ValueError
            As `pyda8w4.prepack` does.
        """
        return prepack(**self._arguments())

    def _arguments(self) -> dict[str, Any]:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in given.items() if value is not None}

    @staticmethod
    def from_packed(packed: PackedWeight) -> QuantizedWeight:
        """Undo `pack`.

        Parameters
        ----------
        packed : PackedWeight
            Any.

        Returns
        -------
        QuantizedWeight
            That packs to the same bits.
        """
        given = packed._given()
        zero_point = packed.zero_point
        if zero_point is not None and "table" not in given:
            given["zps"] = np.full((packed.shape[0], packed.groups), zero_point, np.int8)
        return QuantizedWeight(**given, bits=packed.bits, rotation=packed.rotation, group_size=packed.group_size)
