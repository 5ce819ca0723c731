"""What libraries that compute on torch's tensors have in common."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np

from .base import Call, Layer, Peer


def load_torch(threads: int) -> Any:
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    return torch


class TorchPeer(Peer):
    """A function of torch, or of what extends it, on tensors.

    `dtype` is that of x and y; x is rounded before the time starts.
    """

    packages: ClassVar[Sequence[str]] = ("torch",)
    dtype = "bfloat16"

    @cached_property
    def torch(self) -> Any:
        return load_torch(self.threads)

    def build(self) -> None:
        self.weights = [self.pack(part) for part in self.layers()]

    def pack(self, layer: Layer) -> Any:
        raise NotImplementedError

    def multiply(self, x: Any, weight: Any) -> Any:
        raise NotImplementedError

    def bind(self, x: np.ndarray) -> list[Call]:
        rounded = self.torch.from_numpy(x).to(getattr(self.torch, self.dtype))
        return [partial(self.multiply, rounded, weight) for weight in self.weights]

    def result(self, returned: Any) -> np.ndarray:
        return returned.float().numpy()

    def rounded(self, array: np.ndarray) -> np.ndarray:
        """The array rounded to bfloat16."""
        return self.torch.from_numpy(array).bfloat16().float().numpy()
