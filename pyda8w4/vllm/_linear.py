"""Linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from pyda8w4._packed import PackedWeight
from pyda8w4.torch import DA8W4Linear
from pyda8w4.vllm._method import Cut, WeightMethod, joined, packed_of

_PARTS_OF_QKV = {"q": 0, "k": 1, "v": 2}


@register_weight_loader_v2_supported_method
class LinearMethod(WeightMethod, LinearMethodBase):
    """A linear layer of which a rank has some outputs, of several parts, or some inputs."""

    def _float_method(self) -> QuantizeMethodBase:
        return UnquantizedLinearMethod()

    def _pack(self, layer: nn.Module, loaded: torch.Tensor, *shard: Any) -> dict[int, PackedWeight]:
        k, sizes, input_size = self._sizes.k, self._sizes.parts, self._sizes.input_size
        packed, count = packed_of(loaded, self.options), input_size // k
        cut = layer.tp_rank * count // layer.tp_size, count
        numbers = _numbers(shard[0] if shard else None, len(sizes))
        if len(numbers) == 1:
            wholes = [loaded.shape[0]]
        else:  # joined in the checkpoint
            replicas = getattr(layer, "num_kv_head_replicas", 1)
            wholes = [sizes[i] * layer.tp_size // (replicas if i else 1) for i in numbers]
        if (
            loaded.shape[1] != input_size
            or sum(wholes) != loaded.shape[0]
            or any(whole % sizes[i] for whole, i in zip(wholes, numbers))
        ):
            given, wanted = tuple(loaded.shape), (sum(wholes), input_size)
            raise ValueError(f"its weight must be {wanted}, of ranks with {[sizes[i] for i in numbers]}, got {given}")
        if wholes == [sizes[i] for i in numbers]:
            return {numbers[0]: packed(Cut(slice(None), *cut))}
        parts = {}
        for i, whole, end in zip(numbers, wholes, accumulate(wholes)):
            begin = end - whole + layer.tp_rank * (whole // sizes[i]) // layer.tp_size * sizes[i]
            parts[i] = packed(Cut(slice(begin, begin + sizes[i]), *cut))
        return parts

    def _finish(self, layer: nn.Module, packed: Sequence[PackedWeight]) -> None:
        found, wanted = sum(part.shape[0] for part in packed), sum(self._sizes.parts)
        if found != wanted:
            raise ValueError(f"{self.prefix}: {found} rows of its weight of {wanted} are in the checkpoint")
        products = [
            DA8W4Linear.from_packed(part, act=self.options.act, dtype=self._sizes.dtype) for part in joined(packed)
        ]
        layer.products = nn.ModuleList(products)
        if layer.bias is not None:
            # In each call vLLM says whether the bias is added: of inputs that are cut, only one rank does.
            parts = layer.bias.data.split([product.out_features for product in products])
            layer.biased = nn.ModuleList(product.sharing_weight(part) for product, part in zip(products, parts))

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply.

        Parameters
        ----------
        layer : torch.nn.Module
            Of vLLM.
        x : (..., K) torch.Tensor
            Its input.
        bias : torch.Tensor, optional
            Its bias, where it is to be added.

        Returns
        -------
        torch.Tensor
            Of shape (..., N).
        """
        outputs = [product(x) for product in (layer.products if bias is None else layer.biased)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _numbers(shard: Any, count: int) -> list[int]:
    """Which parts a loader means: one of q, k, v, a number, some numbers, or all."""
    if shard is None:
        return list(range(count))
    return list(shard) if isinstance(shard, tuple) else [_PARTS_OF_QKV.get(shard, shard)]
