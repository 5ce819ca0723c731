"""What tests of the torch adapter share. Results are compared with the numpy functions by equality."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyda8w4
from pyda8w4.torch import DA8W4Linear

# torch uses what torch has deprecated.
MARKS = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

ACTS = ("uint8", "int8", "int8_group", "int16")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def expected(layer: DA8W4Linear, x: torch.Tensor) -> torch.Tensor:
    """By the numpy functions; through float32, which holds every half exactly, and one rounding."""
    k = x.shape[-1]
    out = pyda8w4.linear(
        x.float().reshape(-1, k).numpy(),
        layer.packed,
        None if layer.bias is None else layer.bias.numpy(),
        act=layer.act,
    )
    return torch.from_numpy(out).to(x.dtype).reshape(*x.shape[:-1], -1)


class _Seen(TorchDispatchMode):
    """Notes the arguments of the operator."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.pyda8w4.linear.default:
            self.arguments = args
        return function(*args, **(kwargs or {}))


def operator_arguments(layer: DA8W4Linear) -> dict[str, Any]:
    """What the layer gives its operator beside the input, by name."""
    with _Seen() as seen:
        layer(torch.zeros(1, layer.in_features))
    _, *names = (argument.name for argument in torch.ops.pyda8w4.linear.default._schema.arguments)
    return dict(zip(names, seen.arguments[1:]))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


def sqnr(signal: torch.Tensor, noisy: torch.Tensor) -> float:
    signal, noisy = signal.double(), noisy.double()
    return float(20 * torch.log10(signal.norm() / (signal - noisy).norm()))


class Attention(nn.Module):
    """Layers that share an input, as models have them."""

    def __init__(self, bias: bool = False, k: int = 64) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(k, 64, bias), nn.Linear(k, 32, bias)
        self.v_proj, self.o_proj = nn.Linear(k, 32, bias), nn.Linear(32, k, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.q_proj(x)[..., :32] * self.k_proj(x) + self.v_proj(x))


GROUPS = [("q_proj", "k_proj", "v_proj")]


def calls(code: list[str]) -> int:
    return sum(text.count("torch.ops.pyda8w4.linear.default(") for text in code)


def compiled(model: nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, list[str], Callable[..., torch.Tensor]]:
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    function = torch.compile(model, fullgraph=True, dynamic=True)
    out, code = run_and_get_code(function, *inputs)
    return out, code, function
