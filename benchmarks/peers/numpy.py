"""numpy: the product in float32."""

from __future__ import annotations

from functools import partial

import numpy as np

from .base import Call, Layer, Peer


class Float32(Peer):
    name = "numpy-float32"
    about = "x @ w.T in float32"
    packages = ("numpy",)

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return 4 * layer.codes.size

    def build(self) -> None:
        self.weights = [part.dense() for part in self.layers()]

    def bind(self, x: np.ndarray) -> list[Call]:
        out = np.empty((len(x), self.layer.shape[0]), np.float32)
        return [partial(np.matmul, x, w.T, out=out) for w in self.weights]
