"""This library: `moe`, and what its users would otherwise write, a loop over experts that calls `linear`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from peers import PEERS, Layer

from .base import Call, Mixture


class _Pyda8w4(Mixture):
    like = PEERS["pyda8w4"]

    def parts(self, layer: int) -> tuple[Iterator[Any], Iterator[Any]]:
        """The packed weights of gate and up, and those of down."""
        from pyda8w4 import prepack

        def packed(part: Layer) -> Any:
            return prepack(part.codes, part.scales, part.zps, group_size=part.group_size)

        experts = self.experts
        first = (packed(experts.gate_up(order, interleaved=self.shape.interleaved)) for order in experts.orders(layer))
        return first, (packed(experts.down.rolled(order)) for order in experts.orders(layer))

    def gate(self) -> dict[str, Any]:
        """What linear_gated and moe are told of the activation; their defaults are those of gpt-oss."""
        return {"activation": self.shape.activation, "interleaved": self.shape.interleaved}

    def build(self) -> None:
        import pyda8w4

        pyda8w4.set_num_threads(self.threads)
        self.weights = [self.collect(*self.parts(layer)) for layer in range(self.layers)]

    def collect(self, gate_up: Iterator[Any], down: Iterator[Any]) -> tuple[Any, Any]:
        """The weights of one layer."""
        raise NotImplementedError


class Moe(_Pyda8w4):
    name = "pyda8w4"
    about = "moe: one call"

    def collect(self, gate_up: Iterator[Any], down: Iterator[Any]) -> tuple[Any, Any]:
        from pyda8w4 import stack

        return stack(list(gate_up)), stack(list(down))

    def bind(self, x: np.ndarray, weights: np.ndarray, calls: Sequence[tuple[int, np.ndarray]]) -> list[Call]:
        from pyda8w4 import moe

        out = np.empty_like(x)
        more = {
            **self.gate(),
            "gate_up_bias": self.experts.gate_up_bias(interleaved=self.shape.interleaved),
            "down_bias": self.experts.down_bias,
        }
        return [partial(moe, x, *self.weights[layer], ids, weights, **more, out=out) for layer, ids in calls]


class Loop(_Pyda8w4):
    name = "pyda8w4-linear"
    about = "a loop over the chosen experts that calls linear_gated and linear"

    def collect(self, gate_up: Iterator[Any], down: Iterator[Any]) -> tuple[Any, Any]:
        return list(gate_up), list(down)

    def bind(self, x: np.ndarray, weights: np.ndarray, calls: Sequence[tuple[int, np.ndarray]]) -> list[Call]:
        from pyda8w4 import linear, linear_gated

        out, more = np.empty_like(x), self.gate()
        gate_up_bias, down_bias = self.experts.gate_up_bias(interleaved=self.shape.interleaved), self.experts.down_bias

        def call(gate_up: list[Any], down: list[Any], ids: np.ndarray) -> np.ndarray:
            out.fill(0)
            for expert in np.unique(ids):
                tokens, slots = np.nonzero(ids == expert)
                biases = [None if bias is None else bias[expert] for bias in (gate_up_bias, down_bias)]
                h = linear_gated(x[tokens], gate_up[expert], biases[0], **more)
                out[tokens] += weights[tokens, slots, None] * linear(h, down[expert], biases[1])
            return out

        return [partial(call, *self.weights[layer], ids) for layer, ids in calls]
