"""This library: `pyda8w4.linear`, also with kernels that it would not choose, and the torch adapter."""

from __future__ import annotations

import os
from functools import partial
from typing import Any, ClassVar

import numpy as np

from .base import Call, Layer, Peer, four_bits
from .torch_base import TorchPeer


class Pyda8w4(Peer):
    name = "pyda8w4"
    about = "the kernel that it chooses"
    packages = ("pyda8w4",)

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return four_bits(layer, scale=2, zero_point=1)

    @classmethod
    def versions(cls) -> dict[str, str]:
        import pyda8w4

        return {**super().versions(), "kernel": pyda8w4.cpu_info()["kernel"]}

    def build(self) -> None:
        import pyda8w4

        pyda8w4.set_num_threads(self.threads)
        self.packed = [
            pyda8w4.prepack(part.codes, part.scales, part.zps, group_size=part.group_size) for part in self.layers()
        ]

    def bind(self, x: np.ndarray) -> list[Call]:
        from pyda8w4 import linear

        out = np.empty((len(x), self.layer.shape[0]), np.float32)
        return [partial(linear, x, packed, out=out) for packed in self.packed]


class _Forced(Pyda8w4):
    kernel: ClassVar[str]

    @classmethod
    def lacks(cls) -> str | None:
        import pyda8w4

        return None if cls.kernel in pyda8w4.kernels() else f"this CPU or build lacks the kernel {cls.kernel}"

    def build(self) -> None:
        os.environ["PYDA8W4_KERNEL"] = self.kernel  # The library reads this at its first call.
        super().build()


class Avx2(_Forced):
    name = "pyda8w4-avx2"
    about = "kernel avx2"
    kernel = "avx2"


class Scalar(_Forced):
    name = "pyda8w4-scalar"
    about = "kernel scalar; slow, so only when named"
    kernel = "scalar"


class Module(TorchPeer):
    name = "pyda8w4-torch"
    about = "pyda8w4.torch.DA8W4Linear, bfloat16 in and out"
    packages = ("pyda8w4", "torch")

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return four_bits(layer, scale=2, zero_point=1)

    def pack(self, layer: Layer) -> Any:
        from pyda8w4.torch import DA8W4Linear

        parts = (self.torch.from_numpy(part) for part in (layer.codes, layer.scales, layer.zps))
        return DA8W4Linear.from_int4(*parts, group_size=layer.group_size)

    def multiply(self, x: Any, weight: Any) -> Any:
        return weight(x)
