"""torch: weights of 4 and 8 bits, and bfloat16."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from .base import Layer, four_bits
from .torch_base import TorchPeer


class Int4(TorchPeer):
    name = "torch-int4pack"
    about = "_weight_int4pack_mm_for_cpu: bfloat16 activations, not quantized"

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return four_bits(layer, scale=2, zero_point=2)

    @classmethod
    def refuses(cls, layer: Layer) -> str | None:
        if layer.group_size not in (32, 64, 128, 256):
            return "the group size must be 32, 64, 128 or 256"
        return "N must be a multiple of 16, K of the group" if layer.shape[0] % 16 or layer.codes[0].size % 32 else None

    def _scales_and_zeros(self, layer: Layer) -> np.ndarray:
        """The array (G, N, 2) of scale and zero: w = (code - 8) * scale + zero."""
        zeros = (8 - layer.zps.astype(np.float32)) * layer.scales
        return np.ascontiguousarray(np.stack([layer.scales, zeros], axis=-1).swapaxes(0, 1))

    def pack(self, layer: Layer) -> Any:
        codes = self.torch.from_numpy(layer.codes.astype(np.int32))
        packed = self.torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        return packed, self.torch.from_numpy(self._scales_and_zeros(layer)).bfloat16()

    def multiply(self, x: Any, weight: Any) -> Any:
        packed, scales_and_zeros = weight
        return self.torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, self.layer.group_size, scales_and_zeros)

    def dense(self) -> np.ndarray:
        pairs = np.repeat(self.rounded(self._scales_and_zeros(self.layer)), self.layer.group_size, axis=0)
        scales, zeros = (pairs[: self.layer.shape[1], :, part].T for part in range(2))
        return (self.layer.codes.astype(np.float32) - 8) * scales + zeros


class Int8(TorchPeer):
    name = "torch-int8"
    about = "quantized::linear_dynamic: 8-bit weights, a scale for each column, float32 in and out"
    dtype = "float32"
    engine = "onednn"

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return layer.codes.size + 4 * layer.shape[0]

    def _quantized(self, layer: Layer) -> Any:
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")  # It is deprecated and not replaced.
        w = self.torch.from_numpy(layer.dense())
        scales = w.abs().amax(1) / 127
        zeros = self.torch.zeros(len(w), dtype=self.torch.int64)
        return self.torch.quantize_per_channel(w, scales, zeros, 0, self.torch.qint8)

    def pack(self, layer: Layer) -> Any:
        engines = self.torch.backends.quantized.supported_engines
        self.torch.backends.quantized.engine = self.engine if self.engine in engines else engines[-1]
        return self.torch.ops.quantized.linear_prepack(self._quantized(layer), None)

    def multiply(self, x: Any, weight: Any) -> Any:
        return self.torch.ops.quantized.linear_dynamic(x, weight, False)

    def dense(self) -> np.ndarray:
        return self._quantized(self.layer).dequantize().numpy()


class Int8Fbgemm(Int8):
    name = "torch-int8-fbgemm"
    about = "the same with FBGEMM, as torch.ao.quantization has it by default"
    by_default = False
    engine = "fbgemm"


class Bfloat16(TorchPeer):
    name = "torch-bf16"
    about = "nn.functional.linear in bfloat16"

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return 2 * layer.codes.size

    def pack(self, layer: Layer) -> Any:
        return self.torch.from_numpy(layer.dense()).bfloat16()

    def multiply(self, x: Any, weight: Any) -> Any:
        return self.torch.nn.functional.linear(x, weight)

    def dense(self) -> np.ndarray:
        return self.rounded(self.layer.dense())
