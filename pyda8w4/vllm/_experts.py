"""Mixtures of experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.utils import set_weight_attrs

from pyda8w4._concat import concat
from pyda8w4._experts import stack
from pyda8w4._packed import PackedWeight
from pyda8w4.torch import DA8W4Experts
from pyda8w4.vllm._method import Cut, naming, packed_of
from pyda8w4.vllm._options import Options
from pyda8w4.vllm._stored import Stored

# Activations by vLLM's name, and whether gates and ups alternate.
_GATES = {
    MoEActivation.SILU: ("silu", False),
    MoEActivation.GELU: ("gelu", False),
    MoEActivation.GELU_TANH: ("gelu_tanh", False),
    MoEActivation.SWIGLUOAI: ("swigluoai", True),
    MoEActivation.SWIGLUOAI_UNINTERLEAVE: ("swigluoai", False),
}


class ExpertsMethod(FusedMoEMethodBase):
    """Experts of which a rank has some, or of each some inner features.

    Parameters
    ----------
    options : Options
        How.
    prefix : str
        The layer's name.
    moe : FusedMoEConfig
        Its sizes.
    quantizes : bool
        Whether floats are quantized. Otherwise experts that are given floats stay float.
    """

    def __init__(self, options: Options, prefix: str, moe: FusedMoEConfig, quantizes: bool) -> None:
        super().__init__(moe)
        self.options, self.prefix, self._quantizes = options, prefix, quantizes
        self._given: list[dict[str, Any]] = []
        self._packed: dict[tuple[str, int], PackedWeight] = {}  # by the part (w1: gate, w2: down, w3: up) and expert
        self._float: FusedMoEMethodBase | None = None

    @staticmethod
    def takes(moe: FusedMoEConfig) -> bool:
        """Whether these experts can be computed.

        Parameters
        ----------
        moe : FusedMoEConfig
            What they are.

        Returns
        -------
        bool
            False of activations that `pyda8w4.moe` does not have.
        """
        clamped = moe.swiglu_limit is not None and "swigluoai" not in moe.activation.value
        return moe.activation in _GATES and not clamped and moe.swiglu_beta in (None, 1.0)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **more: Any,
    ) -> None:
        """Give the layer parameters without memory, for models to load."""
        self._more = {
            "num_experts": num_experts,
            "hidden_size": hidden_size,
            "intermediate_size_per_partition": intermediate_size_per_partition,
            "params_dtype": params_dtype,
            **more,
        }
        inner, count, dtype = intermediate_size_per_partition, num_experts, params_dtype
        for name, shape in (
            ("w13_weight", (count, 2 * inner, hidden_size)),
            ("w2_weight", (count, hidden_size, inner)),
        ):
            weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
            layer.register_parameter(name, weight)
            set_weight_attrs(weight, {"weight_loader": partial(self._load, layer)})
        if self.moe.has_bias:
            for name, sizes in (("w13_bias", (count, 2 * inner)), ("w2_bias", (count, hidden_size))):
                bias = nn.Parameter(torch.zeros(sizes, dtype=dtype), requires_grad=False)
                layer.register_parameter(name, bias)
                set_weight_attrs(bias, {"weight_loader": more["weight_loader"]})

    def _load(
        self,
        layer: Any,
        param: nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Take a matrix of an expert, or those of all. Whether it is one of this rank."""
        if loaded_weight.dim() == 3:
            found = [
                self._load(layer, param, one, weight_name, shard_id, expert, True)
                for expert, one in enumerate(loaded_weight.unbind())
            ]
            return any(found) if return_success else None
        if self._float is None and not isinstance(loaded_weight, Stored) and not self._quantizes:
            self._stay_float(layer)
        given = {
            "loaded_weight": loaded_weight,
            "weight_name": weight_name,
            "shard_id": shard_id,
            "expert_id": expert_id,
            "return_success": return_success,
        }
        if self._float is not None:
            param = getattr(layer, "w2_weight" if shard_id == "w2" else "w13_weight")
            success: bool | None = param.weight_loader(param, **given)
            return success
        expert = layer._map_global_expert_id_to_local_expert_id(expert_id)
        if expert >= 0:
            if isinstance(loaded_weight, Stored):
                self._given.append(given)
            with naming(f"{self.prefix}, {shard_id} of expert {expert_id}", loaded_weight):
                self._packed[shard_id, expert] = self._pack(loaded_weight, shard_id)
        return expert >= 0 if return_success else None

    def _pack(self, loaded: torch.Tensor, shard_id: str) -> PackedWeight:
        inner, hidden = self._more["intermediate_size_per_partition"], self._more["hidden_size"]
        rank, count = self.moe.tp_rank, self.moe.tp_size
        wanted = (hidden, inner * count) if shard_id == "w2" else (inner * count, hidden)
        if tuple(loaded.shape) != wanted:
            raise ValueError(f"its weight must be {wanted}, got {tuple(loaded.shape)}")
        if shard_id == "w2":
            return packed_of(loaded, self.options)(Cut(slice(None), rank, count))
        return packed_of(loaded, self.options)(Cut(slice(rank * inner, (rank + 1) * inner), 0, 1))

    def _stay_float(self, layer: Any) -> None:
        """As vLLM has it: also for what was given before."""
        for name in ("w13_weight", "w2_weight", "w13_bias", "w2_bias"):
            if hasattr(layer, name):
                delattr(layer, name)
        self._float = UnquantizedFusedMoEMethod(self.moe)
        self._float.create_weights(layer, **self._more)
        for given in self._given:
            param = getattr(layer, "w2_weight" if given["shard_id"] == "w2" else "w13_weight")
            param.weight_loader(param, **given)
        self._given, self._packed = [], {}

    def process_weights_after_loading(self, layer: Any) -> None:
        """Stack what was loaded."""
        if self._float is not None:
            layer._replace_quant_method(self._float)
            self._float.process_weights_after_loading(layer)
            return
        experts = range(self._more["num_experts"])
        missing = [(part, one) for one in experts for part in ("w1", "w2", "w3") if (part, one) not in self._packed]
        if missing:
            part, expert = missing[0]
            raise ValueError(f"{self.prefix}: {part} of expert {expert} of this rank is not in the checkpoint")
        activation, interleaved = _GATES[self.moe.activation]
        packed = self._packed
        ups = [concat([packed.pop(("w1", one)), packed.pop(("w3", one))]) for one in experts]
        downs = [packed.pop(("w2", one)) for one in experts]
        biases = [layer.w13_bias.data, layer.w2_bias.data] if self.moe.has_bias else [None, None]
        if self.moe.has_bias and self.moe.tp_rank:
            biases[1] = torch.zeros_like(biases[1])  # results of all ranks are added
        more = {} if layer.swiglu_alpha is None else {"alpha": layer.swiglu_alpha}
        more |= {} if layer.swiglu_limit is None else {"limit": layer.swiglu_limit}
        layer.experts = DA8W4Experts.from_packed(
            stack(ups),
            stack(downs),
            *biases,
            activation=activation,
            interleaved=interleaved,
            act=self.options.act,
            **more,
        )
        self._given = []
        for name in ("w13_weight", "w2_weight"):
            setattr(layer, name, nn.Parameter(getattr(layer, name).new_empty(0, device="cpu"), requires_grad=False))

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Return how vLLM's kernels are to be called: not at all."""
        return None

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: object,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Multiply rows by the experts that they take.

        Parameters
        ----------
        layer : RoutedExperts
            Of vLLM.
        x : (M, K) torch.Tensor
            Rows.
        topk_weights, topk_ids : (M, T) torch.Tensor
            Which experts, of all, and how much of them.
        shared_experts, shared_experts_input : object
            Computed elsewhere.

        Returns
        -------
        (M, K) torch.Tensor
            The results of this rank's experts.
        """
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]
        out: torch.Tensor = layer.experts(x, topk_ids, topk_weights)
        return out
