"""Tensors that stand for weights in a checkpoint, for loaders that cut, stack and rename tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch.utils._pytree import tree_map

from pyda8w4._packed import PackedWeight


class Source(NamedTuple):
    """A matrix (N, K) or a stack (E, N, K) of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    packed: Callable[[int], PackedWeight]  # of a matrix: of the stack, or 0
    floats: Callable[[], npt.NDArray[Any]]  # of all


class Stored(torch.Tensor):
    """A weight in a checkpoint, or a view of it: its numbers are read when an operation needs them.

    What only looks at parts of it, such as ``chunk``, ``unbind`` and ``narrow``, gives another one. All else is done
    with floats. So whoever takes a float weight takes this, and who knows it finds in `matrix` what it is a view of.

    Parameters
    ----------
    source : Source
        What it is a view of.
    place : torch.Tensor
        The same view of a tensor without memory.
    """

    source: Source
    place: torch.Tensor

    @staticmethod
    def __new__(cls, source: Source, place: torch.Tensor) -> Stored:
        self: Stored = torch.Tensor._make_wrapper_subclass(
            cls, place.shape, place.stride(), place.storage_offset(), dtype=place.dtype, device="cpu"
        )
        self.source, self.place = source, place
        return self

    @classmethod
    def of(cls, source: Source, dtype: torch.dtype) -> Stored:
        """All of a weight, as floats of this type."""
        return cls(source, torch.empty(source.shape, dtype=dtype, device="meta"))

    @classmethod
    def __torch_dispatch__(
        cls, operator: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        view = operator.is_view and isinstance(args[0], Stored)
        if view:
            source, args = args[0].source, (args[0].place, *args[1:])
        out = operator(*_with_floats(args), **_with_floats(kwargs or {}))
        return tree_map(lambda one: cls(source, one) if isinstance(one, torch.Tensor) else one, out) if view else out

    def floats(self) -> torch.Tensor:
        """Its numbers.

        Returns
        -------
        torch.Tensor
            Of its type and shape.
        """
        place = self.place
        whole = torch.from_numpy(self.source.floats()).to(self.dtype)
        return whole.as_strided(place.shape, place.stride(), place.storage_offset())

    def matrix(self) -> tuple[int, slice] | None:
        """Which rows of which matrix of the source it is.

        Returns
        -------
        index : int
            Of the matrix.
        rows : slice
            Of it.
        None
            If it is something else, such as part of each row.
        """
        n, k = self.source.shape[-2:]
        first, column = divmod(self.place.storage_offset(), k)
        index, begin = divmod(first, n)
        rows = self.shape[0] if self.dim() == 2 else 0
        if column or not rows or self.shape[1] != k or not self.place.is_contiguous() or begin + rows > n:
            return None
        return index, slice(begin, begin + rows)

    def __repr__(self) -> str:
        return f"Stored({self.source.name!r}, shape={tuple(self.shape)})"


def _with_floats(values: Any) -> Any:
    return tree_map(lambda one: one.floats() if isinstance(one, Stored) else one, values)
