"""The mixture of experts as an operator: ``torch.ops.pyda8w4.moe``, for graphs and subclasses.

Eager modules keep a `Mixture` and call that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch._library.autograd import Info, make_autograd_impl
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import register_flop_formula

import pyda8w4
from pyda8w4._experts import PackedExperts
from pyda8w4._format import Format
from pyda8w4.torch._ops import check_arrays, check_input, names_of, refuse_gradients
from pyda8w4.torch._state import format_of
from pyda8w4.torch._tensors import FLOATS, array_of

# Arguments are those of `pyda8w4.moe`. Each stack of weights is its arrays, in the order of ARRAYS, and what the state
# dict has as its layout, as in `linear`.
_SCHEMA = (
    "moe(Tensor input, Tensor topk_ids, Tensor topk_weights, Tensor[] gate_up, Tensor? gate_up_bias, "
    "int[] gate_up_layout, Tensor[] down, Tensor? down_bias, int[] down_layout, str activation, bool interleaved, "
    "float alpha, float limit, Tensor? expert_map, float routed_scaling, str act) -> Tensor"
)


class Gating(NamedTuple):
    """How the outputs of the first product become half as many: see `pyda8w4.moe`."""

    activation: str = "silu"
    interleaved: bool = False
    alpha: float = 1.702
    limit: float = 7.0


class Stack(NamedTuple):
    """Tensors that are the arrays of several weights, and perhaps a bias."""

    format: Format
    arrays: Mapping[str, torch.Tensor]
    bias: torch.Tensor | None


class Mixture:
    """Two stacks of weights, and the view of them that kernels read.

    Raises ValueError if they are no stacks, or do not fit each other. It must not be used once a tensor was given other
    memory.
    """

    __slots__ = ("_biases", "_k", "_stacks")

    def __init__(self, gate_up: Stack, down: Stack) -> None:
        for name, stack in (("gate_up", gate_up), ("down", down)):
            if stack.format.experts is None:
                raise ValueError(f"{name} must be weights of several experts, got one weight")
            check_arrays(stack.format, stack.arrays, stack.bias)
        self._k = gate_up.format.k
        self._stacks = [
            PackedExperts._from_arrays(format, {name: array_of(arrays[name]) for name in format.arrays})
            for format, arrays, _ in (gate_up, down)
        ]
        self._biases = [None if bias is None else array_of(bias) for _, _, bias in (gate_up, down)]

    def multiply(
        self,
        input: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        gating: Gating,
        expert_map: torch.Tensor | None,
        routed_scaling: float,
        act: str,
    ) -> torch.Tensor:
        """`pyda8w4.moe` on tensors."""
        _check_operands(input, topk_ids, topk_weights, expert_map, self._k)
        out = pyda8w4.moe(
            input.detach().float().numpy(),
            *self._stacks,
            topk_ids.numpy(),
            topk_weights.detach().float().numpy(),
            **gating._asdict(),
            gate_up_bias=self._biases[0],
            down_bias=self._biases[1],
            expert_map=None if expert_map is None else expert_map.numpy(),
            routed_scaling=routed_scaling,
            act=act,
        )
        return torch.from_numpy(out).to(input.dtype)


def _check_operands(
    input: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, expert_map: torch.Tensor | None, k: int
) -> None:
    check_input(input, k)
    for name, tensor, dtypes in (
        ("topk_ids", topk_ids, (torch.int64, torch.int32)),
        ("topk_weights", topk_weights, tuple(FLOATS)),
        ("expert_map", expert_map, (torch.int32,)),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            takes = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{name} must be {takes}, got {tensor.dtype}")
        if not tensor.is_cpu or tensor.layout is not torch.strided:
            raise ValueError(f"{name} must be a dense tensor on the CPU, got {tensor.layout} on {tensor.device}")
    rows = input.shape[:-1]
    if topk_ids.dim() != input.dim() or topk_ids.shape[:-1] != rows:
        raise ValueError(f"topk_ids must have shape ({', '.join(map(str, rows))}, T), got {tuple(topk_ids.shape)}")
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights must have the shape of topk_ids, {tuple(topk_ids.shape)}, got {tuple(topk_weights.shape)}"
        )


def _moe(
    input: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: list[torch.Tensor],
    gate_up_bias: torch.Tensor | None,
    gate_up_layout: list[int],
    down: list[torch.Tensor],
    down_bias: torch.Tensor | None,
    down_layout: list[int],
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    expert_map: torch.Tensor | None,
    routed_scaling: float,
    act: str,
) -> torch.Tensor:
    stacks = []
    for weight, bias, layout in ((gate_up, gate_up_bias, gate_up_layout), (down, down_bias, down_layout)):
        tensors = dict(zip(names_of(weight, layout), weight))
        stacks.append(Stack(format_of(layout, tensors), tensors, bias))
    gating = Gating(activation, interleaved, alpha, limit)
    return Mixture(*stacks).multiply(input, topk_ids, topk_weights, gating, expert_map, routed_scaling, act)


def _fake(
    input: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: list[torch.Tensor],
    gate_up_bias: torch.Tensor | None,
    gate_up_layout: list[int],
    down: list[torch.Tensor],
    down_bias: torch.Tensor | None,
    down_layout: list[int],
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    expert_map: torch.Tensor | None,
    routed_scaling: float,
    act: str,
) -> torch.Tensor:
    _check_operands(input, topk_ids, topk_weights, expert_map, gate_up_layout[2])
    return input.new_empty((*input.shape[:-1], down_layout[1]))


def _keep_sizes(ctx: Any, inputs: Sequence[Any], output: object) -> None:
    input, topk_ids, topk_weights, gate_up, _, _, down, *_ = inputs
    ctx.sizes = input.shape[-1], topk_ids.shape[-1], len(gate_up), len(down)
    ctx.dtype = topk_weights.dtype


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    k, slots, gate_up, down = ctx.sizes
    refused = torch.ops.pyda8w4.linear_backward
    of_weights = refused(gradient, slots).to(ctx.dtype)
    return refused(gradient, k), None, of_weights, [None] * gate_up, None, None, [None] * down, *[None] * 9


def _autograd(keys: Any, *arguments: Any) -> torch.Tensor:
    refuse_gradients(arguments[0])
    refuse_gradients(arguments[2])
    out: torch.Tensor = _reverse_mode(keys, *arguments)
    return out


def _vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[torch.Tensor, int]:
    """Rows know nothing of each other: one more dimension is more rows."""
    if any(dim is not None for dim in tree_leaves(in_dims[3:])):
        raise NotImplementedError("torch.vmap over the weights of DA8W4 layers")
    operands = [
        operand.expand(info.batch_size, *operand.shape) if dim is None else operand.movedim(dim, 0)
        for operand, dim in zip(arguments[:3], in_dims)
    ]
    return torch.ops.pyda8w4.moe(*operands, *arguments[3:]), 0


def _flops(input: object, topk_ids: Sequence[int], *others: Any, **more: Any) -> int:
    """As many as those of float experts: two for each weight and slot."""
    gate_up_layout, down_layout = others[3], others[6]
    return 2 * prod(topk_ids) * sum(layout[1] * layout[2] for layout in (gate_up_layout, down_layout))


# As with `linear`, reloading the module finds the operator there.
if not hasattr(torch.ops.pyda8w4, "moe"):
    _library: Any = torch.library.Library("pyda8w4", "FRAGMENT")  # type: ignore[no-untyped-call, unused-ignore]
    _library.define(_SCHEMA)
    _library.impl("moe", _moe, "CPU")
    torch.library.register_fake("pyda8w4::moe", _fake, lib=_library)
    _reverse_mode = make_autograd_impl(torch.ops.pyda8w4.moe.default, Info(_backward, _keep_sizes))
    _library.impl("moe", _autograd, "Autograd", with_keyset=True)
    if hasattr(torch.library, "register_vmap"):  # torch 2.5
        torch.library.register_vmap("pyda8w4::moe", _vmap, lib=_library)
    register_flop_formula(torch.ops.pyda8w4.moe)(_flops)  # type: ignore[no-untyped-call, unused-ignore]
