"""zentorch, AMD's extension of torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from .base import Layer, eight_bits, eight_bits_dense, four_bits
from .torch_base import TorchPeer


class Zentorch(TorchPeer):
    name = "zentorch"
    about = "zentorch_dynamic_qlinear: symmetric weights, bfloat16 in and out"
    packages = ("zentorch", "torch")

    @classmethod
    def lacks(cls) -> str | None:
        import torch

        if not torch.cpu._is_avx512_bf16_supported():
            return "this CPU lacks AVX512_BF16, which its operation for bfloat16 uses"
        try:
            import zentorch  # noqa: F401
        except Exception as error:
            return f"import zentorch: {error}"
        if not hasattr(torch.ops.zentorch, "zentorch_dynamic_qlinear"):
            return "this version of zentorch has no zentorch_dynamic_qlinear"
        return None

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return four_bits(layer, scale=4, zero_point=0)

    @classmethod
    def refuses(cls, layer: Layer) -> str | None:
        return "K must be a multiple of 8 and of the group" if layer.shape[1] % np.lcm(8, layer.group_size) else None

    def pack(self, layer: Layer) -> Any:
        codes = self.torch.from_numpy(layer.codes.astype(np.int8) - 8)
        packed = self.torch.ops.zentorch.zentorch_woq_repack_weight(codes).view(self.torch.int8)
        return packed, self.torch.from_numpy(np.ascontiguousarray(layer.scales.T))

    def multiply(self, x: Any, weight: Any) -> Any:
        return self.torch.ops.zentorch.zentorch_dynamic_qlinear(x, *weight)

    def dense(self) -> np.ndarray:
        return self.layer.dense(symmetric=True)


class Zentorch8(Zentorch):
    name = "zentorch-int8"
    about = "zentorch_dynamic_qlinear with 8-bit weights, a scale for each column, bfloat16 in and out"
    by_default = False

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return layer.codes.size + 4 * layer.shape[0]

    @classmethod
    def refuses(cls, layer: Layer) -> str | None:
        return None

    def pack(self, layer: Layer) -> Any:
        # Not by zentorch_weight_prepack_for_dynamic_qlinear: with K = 4096, 2.13.0.2 gives wrong numbers then.
        codes, scales = eight_bits(layer, per_column=True)
        return self.torch.from_numpy(codes), self.torch.from_numpy(scales[:, 0].copy())

    def dense(self) -> np.ndarray:
        return eight_bits_dense(self.layer, per_column=True)
