"""zentorch, AMD's extension of torch: zentorch_fused_moe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from peers import PEERS, Layer
from peers.torch_base import load_torch

from .base import Call, Mixture, stacked


class Zentorch(Mixture):
    name = "zentorch"
    about = "zentorch_fused_moe: symmetric weights, bfloat16 in and out"
    like = PEERS["zentorch"]

    @classmethod
    def missing(cls) -> str | None:
        reason = cls.like.missing()
        if reason is None:
            import torch

            if not hasattr(torch.ops.zentorch, "zentorch_fused_moe"):
                return "this version of zentorch has no zentorch_fused_moe"
        return reason

    def build(self) -> None:
        self.torch = load_torch(self.threads)
        experts, interleaved = self.experts, self.shape.interleaved
        self.weights = []
        for layer in range(self.layers):
            first = (experts.gate_up(order, interleaved=interleaved) for order in experts.orders(layer))
            second = (experts.down.rolled(order) for order in experts.orders(layer))
            self.weights.append((self._stacked(first), self._stacked(second)))
        biases = (experts.gate_up_bias(interleaved=interleaved), experts.down_bias)
        self.biases = [None if bias is None else self.torch.from_numpy(bias).bfloat16() for bias in biases]

    def _stacked(self, parts: Iterator[Layer]) -> tuple[Any, Any]:
        """Codes (E, N, K / 2) int8, two's complement with the even k in the low half, and scales (E, G, N)."""

        def repack(codes: np.ndarray) -> np.ndarray:
            signed = self.torch.from_numpy(codes.astype(np.int8) - 8)
            return self.torch.ops.zentorch.zentorch_woq_repack_weight(signed).view(self.torch.int8).numpy()

        codes, scales = stacked(parts, repack)
        return self.torch.from_numpy(codes), self.torch.from_numpy(np.ascontiguousarray(scales.swapaxes(1, 2)))

    def bind(self, x: np.ndarray, weights: np.ndarray, calls: Sequence[tuple[int, np.ndarray]]) -> list[Call]:
        tokens, routed = self.torch.from_numpy(x).bfloat16(), self.torch.from_numpy(weights)
        out = self.torch.empty_like(tokens)
        fused_moe = self.torch.ops.zentorch.zentorch_fused_moe

        def call(first: tuple[Any, Any], second: tuple[Any, Any], ids: Any) -> Any:
            (w13, w13_scales), (w2, w2_scales) = first, second
            out.zero_()  # It adds to what is there.
            fused_moe(
                out, tokens, w13, w2, *self.biases, routed, ids, False, self.shape.activation, w13_scales, w2_scales
            )
            return out

        return [
            partial(call, *self.weights[layer], self.torch.from_numpy(np.ascontiguousarray(ids)))
            for layer, ids in calls
        ]

    def result(self, returned: Any) -> np.ndarray:
        return returned.float().numpy()

    def dense(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        experts = self.experts
        gate, up, down = (part.dense(symmetric=True) for part in (experts.gate, experts.up, experts.down))
        return gate, up, down
