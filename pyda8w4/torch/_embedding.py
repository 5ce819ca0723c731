"""The embedding."""

from __future__ import annotations

from typing import Any

import torch

from pyda8w4._format import Format, check_group_size
from pyda8w4._packed import PackedWeight, check_packed
from pyda8w4.torch._layer import PackedLayer, is_compiling, needs_operator
from pyda8w4.torch._ops import arguments_of
from pyda8w4.torch._state import zeros_of


class DA8W4Embedding(PackedLayer):
    """Rows of a packed weight: ``y = weight[input]``, or ``weight[input] * scale``.

    The constructor makes an embedding of zeros, to load a state dict into. `from_packed` makes one with a weight.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Rows and columns of the weight, at least 1.
    scale : float, optional
        What rows are multiplied by, as the models of the Gemma family do.
    group_size : int
        Consecutive elements of a row that share a scale: a multiple of 4, or `embedding_dim`.
    device : torch.device, optional
        ``"cpu"``, or ``"meta"`` for an embedding without memory.
    dtype : torch.dtype, optional
        Of the outputs: float32, bfloat16 or float16. None means torch's default.

    Attributes
    ----------
    num_embeddings, embedding_dim, group_size : int
    scale : float or None
    packed : PackedWeight
        The weight, sharing memory with the module.
    weight : (num_embeddings, embedding_dim) tensor
        Stands for the weight of a `torch.nn.Embedding`: it says dtype, device and shape, and raises where its numbers
        are needed.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If a size is out of range.

    Notes
    -----
    Outputs are what `PackedWeight.dequantize` gives, rounded to `dtype`; with a scale, that times the scale in
    `dtype`, rounded again. ``.to(dtype)`` changes what outputs are, not the weight. Nothing has a gradient.

    The state dict is that of a `DA8W4Linear` with this weight. An output head that is tied to the embedding can share
    its memory: ``DA8W4Linear.from_packed(embedding.packed)``.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> import pyda8w4
    >>> from pyda8w4.torch import DA8W4Embedding
    >>> packed = pyda8w4.prepack(np.array([[9, 9, 10, 7], [8, 8, 8, 0]], np.uint8), np.array([0.5, 2], np.float32))
    >>> embedding = DA8W4Embedding.from_packed(packed)
    >>> embedding
    DA8W4Embedding(2, 4, group_size=4)
    >>> embedding(torch.tensor([1, 0]))
    tensor([[  0.0000,   0.0000,   0.0000, -16.0000],
            [  0.5000,   0.5000,   1.0000,  -0.5000]])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        scale: float | None = None,
        group_size: int = 128,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_embeddings", num_embeddings), ("embedding_dim", embedding_dim)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if scale is not None and not isinstance(scale, (int, float)):
            raise TypeError(f"scale must be a float, got {type(scale).__name__}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.scale = scale
        group = check_group_size(group_size, embedding_dim)
        format = Format(num_embeddings, embedding_dim, group, "float32", 0, False)
        self.set_tensors(zeros_of(format, device), dtype)

    @classmethod
    def from_packed(
        cls, packed: PackedWeight, *, scale: float | None = None, dtype: torch.dtype | None = None
    ) -> DA8W4Embedding:
        """Make an embedding of a packed weight, without copying that.

        Parameters
        ----------
        packed : PackedWeight
            Its arrays become the buffers.
        scale : float, optional
            See the class.
        dtype : torch.dtype, optional
            See the class.

        Returns
        -------
        DA8W4Embedding
            In the memory of `packed`.

        Raises
        ------
        TypeError
            If an argument has the wrong type.
        """
        check_packed("packed", packed)
        self = cls(*packed.shape, scale=scale, device="meta", dtype=dtype)
        self._set_packed(packed, self._weight.dtype)
        return self

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up rows.

        Parameters
        ----------
        input : tensor of int64 or int32
            Numbers of rows, of any shape.

        Returns
        -------
        (..., embedding_dim) tensor
            Of the module's dtype.

        Raises
        ------
        TypeError
            If `input` has another type.
        IndexError
            If there is no such row.
        ValueError
            If it is not on the CPU, or the buffers of the module do not fit each other.
        """
        dtype = self._weight.dtype
        if is_compiling() or needs_operator(input):
            weight, _, layout, _ = arguments_of(self._buffers, None, self._layout, "")
            out: torch.Tensor = torch.ops.pyda8w4.embedding(input, weight, layout, dtype)
        else:
            out = self._product().rows(input, dtype)
        return out if self.scale is None else out * torch.tensor(self.scale).to(dtype)

    def extra_repr(self) -> str:
        """Return what is printed of it.

        Returns
        -------
        str
            Its sizes.
        """
        scale = "" if self.scale is None else f", scale={self.scale:g}"
        return f"{self.num_embeddings}, {self.embedding_dim}{self._describe_weight()}{scale}"
