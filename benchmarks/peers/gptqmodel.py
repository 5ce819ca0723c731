"""GPTQModel: the operation for CPUs that it compiles at run time, without the rest of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from .base import Layer, four_bits
from .torch_base import TorchPeer

_OPERATION = "gptqmodel_int4_qzero_group_scaled_cpu"
_EXTENSIONS = ("avx512f", "avx512bf16", "avx512vl", "avx512dq", "avx512bw", "avx512vbmi", "fma", "f16c")
_INSTRUCTIONS = [f"-m{extension}" for extension in _EXTENSIONS]  # as GPTQModel itself has them


class GptqModel(TorchPeer):
    name = "gptqmodel"
    about = "gemm_int4_qzero_group_scaled_cpu of GPTQModel's sdist: float32 scales, bfloat16 activations, not quantized"

    @classmethod
    def lacks(cls) -> str | None:
        import torch
        from torch.utils import cpp_extension

        if "GPTQMODEL_SOURCES" not in os.environ:
            return "GPTQMODEL_SOURCES does not name an unpacked sdist of GPTQModel"
        if not torch.cpu._is_avx512_bf16_supported():
            return "this CPU lacks AVX512_BF16"
        folder = Path(os.environ["GPTQMODEL_SOURCES"], "gptqmodel_ext", "int4_qzero_group_scaled_cpu")
        try:
            cpp_extension.load(
                _OPERATION,
                [str(source) for source in sorted(folder.glob("*.cpp"))],
                extra_cflags=["-O3", "-fopenmp", "-std=c++20", *_INSTRUCTIONS],
                extra_include_paths=[str(folder)],
                extra_ldflags=["-fopenmp"],
                is_python_module=False,
            )
        except Exception as error:  # no compiler, no ninja, or other sources
            return f"compiling {folder}: {error}"
        return None

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return four_bits(layer, scale=4, zero_point=1)

    @classmethod
    def refuses(cls, layer: Layer) -> str | None:
        n, k = layer.shape
        return "N must be a multiple of 32, K of the group" if n % 32 or k % layer.group_size else None

    def pack(self, layer: Layer) -> Any:
        def eights(codes: np.ndarray) -> Any:
            """Pack eight rows into an int32, the first in the lowest bits."""
            shifts = (4 * np.arange(8, dtype=np.uint32))[:, None]
            rows = codes.reshape(-1, 8, codes.shape[1]).astype(np.uint32)
            packed = np.bitwise_or.reduce(rows << shifts, axis=1)
            return self.torch.from_numpy(np.ascontiguousarray(packed).view(np.int32))

        n, k = layer.shape
        codes, zps = eights(layer.codes.T), eights(layer.zps).T.contiguous()
        no_order = self.torch.empty(0, dtype=self.torch.int32)
        packed = getattr(self.torch.ops, _OPERATION).pack_gptq_int4(codes, zps, no_order, n, k)
        return *packed, self.torch.from_numpy(np.ascontiguousarray(layer.scales.T))

    def multiply(self, x: Any, weight: Any) -> Any:
        operation = getattr(self.torch.ops, _OPERATION).gemm_int4_qzero_group_scaled_cpu_forward
        return operation(x, *weight, self.layer.group_size, None)
