"""transformers: the module of experts of a model in bfloat16, with grouped_mm, its fastest way on a CPU."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from peers import PEERS
from peers.torch_base import load_torch

from .base import ALPHA, LIMIT, Call, Mixture


class Transformers(Mixture):
    name = "transformers-bf16"
    about = "Qwen3MoeExperts or GptOssExperts in bfloat16, experts_implementation='grouped_mm'"
    like = PEERS["torch-bf16"]

    @classmethod
    def missing(cls) -> str | None:
        try:
            importlib.metadata.version("transformers")
        except importlib.metadata.PackageNotFoundError:
            return "transformers is not installed"
        return super().missing()

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {**super().versions(), "transformers": importlib.metadata.version("transformers")}

    def build(self) -> None:
        self.torch = load_torch(self.threads)
        parts = (self.experts.gate, self.experts.up, self.experts.down)
        self.parts = [self.torch.from_numpy(part.dense()).bfloat16() for part in parts]
        self.modules = [self._module(layer) for layer in range(self.layers)]

    def _module(self, layer: int) -> Any:
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        torch, shape = self.torch, self.shape
        config = SimpleNamespace(
            num_experts=shape.experts,
            num_local_experts=shape.experts,
            hidden_size=shape.k,
            intermediate_size=shape.i,
            moe_intermediate_size=shape.i,
            hidden_act="silu",
            swiglu_alpha=ALPHA,
            swiglu_limit=LIMIT,
            _experts_implementation="grouped_mm",
        )
        torch.set_default_dtype(torch.bfloat16)
        module = (GptOssExperts if shape.biased else Qwen3MoeExperts)(config).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        for expert, order in enumerate(self.experts.orders(layer)):
            gate, up, down = (part.roll(order, 0) for part in self.parts)
            if shape.biased:  # its weights are transposed
                module.gate_up_proj[expert] = torch.stack([gate, up], 1).flatten(0, 1).T
                module.down_proj[expert] = down.T
            else:
                module.gate_up_proj[expert] = torch.cat([gate, up])
                module.down_proj[expert] = down
        if shape.biased:
            module.gate_up_proj_bias.copy_(torch.from_numpy(self.experts.gate_up_bias(interleaved=True)))
            module.down_proj_bias.copy_(torch.from_numpy(self.experts.down_bias))
        return module

    def bind(self, x: np.ndarray, weights: np.ndarray, calls: Sequence[tuple[int, np.ndarray]]) -> list[Call]:
        tokens, rounded = (self.torch.from_numpy(array).bfloat16() for array in (x, weights))
        return [
            partial(self.modules[layer], tokens, self.torch.from_numpy(ids.astype(np.int64)), rounded)
            for layer, ids in calls
        ]

    def result(self, returned: Any) -> np.ndarray:
        return returned.float().numpy()

    def dense(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        gate, up, down = (part.float().numpy() for part in self.parts)
        return gate, up, down
