"""Mixtures of experts of transformers, whose parameters are stacks of matrices: what they compute, and with what.

Modules are known by the interface that transformers has for them (``use_experts_implementation``): attributes say how
parameters are stored, and the method ``_apply_gate`` is the gate. What that computes is seen by running it. So no list
of models is needed; only Llama 4 has a module of its own kind.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import gelu, silu

from pyda8w4.torch._moe import Gating


class FloatExperts(NamedTuple):
    """What a module has, in the shapes of `pyda8w4.moe`: views of its parameters."""

    gate_up: torch.Tensor  # (E, 2 I, K)
    down: torch.Tensor  # (E, N, I)
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    gating: Gating


_FLAGS = ("has_bias", "has_gate", "is_concatenated", "is_transposed")


def is_experts(module: nn.Module) -> bool:
    """Whether it is a mixture of experts, of matrices that may be packed or not."""
    return all(flag in vars(module) for flag in _FLAGS) or type(module) is _llama4()


def _llama4() -> Any:
    """Takes rows that are sorted by experts; a class that nothing is of while its model is not imported."""
    return getattr(sys.modules.get("transformers.models.llama4.modeling_llama4"), "Llama4TextExperts", ())


def float_experts(module: Any) -> FloatExperts:
    """What `is_experts` knows as such. ValueError says why a packed one cannot take its place."""
    if type(module) is _llama4():
        is_transposed, has_bias, gate = True, False, _gate_of_llama4(module)
    else:
        for flag, wanted, reason in (
            ("has_gate", True, "it has no gate"),
            ("has_post_expert_norm", False, "its experts have norms"),
        ):
            if getattr(module, flag, wanted) != wanted:  # transformers before 5.20 knows no norms of experts
                raise ValueError(reason)
        is_transposed, has_bias, gate = module.is_transposed, module.has_bias, module._apply_gate
    wanted_names = {"gate_up_proj", "down_proj", *(("gate_up_proj_bias", "down_proj_bias") if has_bias else ())}
    found = {*module._parameters, *module._buffers}
    if found != wanted_names:
        raise ValueError(f"it must have {', '.join(sorted(wanted_names))}, got {', '.join(sorted(found))}")
    gate_up, down = module.gate_up_proj.detach(), module.down_proj.detach()
    if gate_up.dim() != 3 or down.dim() != 3:
        raise ValueError(f"its parameters must be stacks of matrices, got {gate_up.dim()} and {down.dim()} dimensions")
    if is_transposed:
        gate_up, down = gate_up.mT, down.mT
    if len(gate_up) != len(down) or gate_up.shape[1] != 2 * down.shape[2]:
        raise ValueError(f"its parameters must be (E, 2 I, K) and (E, N, I), got {gate_up.shape} and {down.shape}")
    gating = _gating(module, gate, gate_up.shape[1])
    if not has_bias:
        return FloatExperts(gate_up, down, None, None, gating)
    return FloatExperts(gate_up, down, module.gate_up_proj_bias, module.down_proj_bias, gating)


def _gate_of_llama4(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def gate(gate_up: torch.Tensor) -> torch.Tensor:
        gates, ups = gate_up.chunk(2, dim=-1)
        activated: torch.Tensor = ups * module.act_fn(gates)
        return activated

    return gate


def _gating(module: Any, gate: Callable[[torch.Tensor], torch.Tensor], columns: int) -> Gating:
    """What a gate is seen to compute."""
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.empty(8, columns, dtype=torch.float32, device="cpu").uniform_(-12, 12, generator=generator)
    gate_up[1:3] *= 0.1
    gate_up[3] *= 1000  # a limit is seen where numbers exceed it
    with torch.no_grad():
        try:
            found = gate(gate_up)
        except Exception as error:
            raise ValueError(f"its gate raises {type(error).__name__}: {error}") from None
    alpha, limit = _number(module, "alpha", "swiglu_alpha"), _number(module, "limit", "swiglu_limit")
    for interleaved in (False, True):
        gates, ups = (gate_up[:, ::2], gate_up[:, 1::2]) if interleaved else gate_up.chunk(2, dim=-1)
        for activation, compute in ACTIVATIONS.items():
            want = compute(gates, ups, alpha, limit)
            # GELU and its approximation differ by 3e-4; what rounding makes is far less.
            if found.shape == want.shape and torch.allclose(found.float(), want, rtol=1e-5, atol=1e-5):
                gating = Gating(activation, interleaved)
                return gating._replace(alpha=alpha, limit=limit) if activation == "swigluoai" else gating
    function = type(getattr(module, "act_fn", None)).__name__
    with_function = "" if function == "NoneType" else f" with {function}"
    raise ValueError(f"its gate{with_function} is none of {', '.join(ACTIVATIONS)}")


def _number(module: Any, *names: str) -> float:
    values = [getattr(module, name, None) for name in names]
    return next((float(value) for value in values if isinstance(value, (int, float))), 1.0)


def _swigluoai(gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1)


ACTIVATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor]] = {
    "silu": lambda gate, up, alpha, limit: silu(gate) * up,
    "gelu": lambda gate, up, alpha, limit: gelu(gate) * up,
    "gelu_tanh": lambda gate, up, alpha, limit: gelu(gate, approximate="tanh") * up,
    "swigluoai": _swigluoai,
}
