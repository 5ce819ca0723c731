"""The mixture of experts as an operator: ``torch.ops.pyda8w4.moe``, for graphs and subclasses.

Eager modules keep a `Mixture` and call that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._library.autograd import Info, make_autograd_impl
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import register_flop_formula

from pyda8w4._checks import SCHEMES, check_number, check_scheme
from pyda8w4._core import CoreError
from pyda8w4._format import Format
from pyda8w4._linear import check_gating
from pyda8w4._moe import check_ids, local_ids
from pyda8w4._runtime import forced_kernel, translate
from pyda8w4.torch._ops import KINDS, check_arrays, check_input, check_perm, names_of, refuse_gradients
from pyda8w4.torch._state import format_of
from pyda8w4.torch._tensors import FLOATS

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

    __slots__ = ("_biases", "_count", "_down", "_gate_up", "_k", "_n", "_perms")

    def __init__(self, gate_up: Stack, down: Stack) -> None:
        shape, down_shape = gate_up.format.shape, down.format.shape
        if len(shape) != 3 or len(down_shape) != 3 or shape[1] % 2 or down_shape[::2] != (shape[0], shape[1] // 2):
            raise ValueError(
                f"gate_up and down must have shapes (E, 2 I, K) and (E, N, I), got {shape} and {down_shape}"
            )
        views, self._biases = [], []
        for format, arrays, bias in (gate_up, down):
            addresses, at_bias = check_arrays(format, arrays, bias)
            views.append(format.experts_view(addresses))
            self._biases.append(at_bias)
        self._gate_up, self._down = views
        self._count, self._n, self._k = shape[0], down_shape[1], shape[2]
        self._perms = [(one.arrays["perm"], one.format.k) for one in (gate_up, down) if one.format.has_perm]

    def multiply(
        self,
        input: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        gating: Gating,
        expert_map: torch.Tensor | None,
        routed_scaling: float,
        scheme: int,
    ) -> torch.Tensor:
        """`pyda8w4.moe` on tensors."""
        kind = KINDS.get(input.dtype)
        if (  # of what models give in most calls, which need not wait for all checks
            kind is None
            or input.dim() != 2
            or not input.is_contiguous()
            or topk_weights.dtype is not torch.float32
            or not topk_weights.is_contiguous()
            or topk_ids.dtype is not torch.int64
            or not input.is_cpu
            or not topk_ids.is_cpu
            or not topk_weights.is_cpu
            or topk_weights.shape != topk_ids.shape
            or topk_ids.shape[:-1] != input.shape[:-1]
            or input.shape[1] != self._k
            or expert_map is not None
        ):
            check_operands(input, topk_ids, topk_weights, expert_map, self._k)
            input, topk_weights = input.contiguous(), topk_weights.to(torch.float32).contiguous()
        tokens, slots = input.shape[:-1], topk_ids.shape[-1]
        ids = local_ids(topk_ids.numpy(), self._count, None if expert_map is None else expert_map.numpy())
        out = input.new_empty(*tokens, self._n)
        if not out.numel():
            return out
        assert kind is not None
        for perm, k in self._perms:
            check_perm(perm, k)
        ids = np.ascontiguousarray(ids)
        try:
            self._gate_up.moe(
                down=self._down,
                m=out.numel() // self._n,
                slots=slots,
                x=input.data_ptr(),
                x_type=kind,
                scheme=scheme,
                ids=ids,
                weights=topk_weights.data_ptr(),
                scaling=routed_scaling,
                gating=core_gating(*gating),
                gate_up_bias=self._biases[0],
                down_bias=self._biases[1],
                out=out.data_ptr(),
                out_type=kind,
                kernel=forced_kernel(),
            )
        except CoreError as error:
            if error.args[0] == "BAD_EXPERT":
                check_ids("topk_ids", ids, self._count)
            raise translate(error) from None
        return out


core_gating = lru_cache(maxsize=64)(check_gating)


_IDS = (torch.int64, torch.int32)


def check_operands(
    input: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, expert_map: torch.Tensor | None, k: int
) -> None:
    """Raise TypeError or ValueError unless these are rows, and what is chosen for them."""
    if input.is_nested:
        raise TypeError("input must be no nested tensor: the experts of its rows could not be told")
    check_input(input, k)
    for name, tensor, dtypes in (
        ("topk_ids", topk_ids, _IDS),
        ("topk_weights", topk_weights, FLOATS),
        ("expert_map", expert_map, _IDS),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            takes = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{name} must be {takes}, got {tensor.dtype}")
        if not tensor.is_cpu or tensor.layout is not torch.strided:
            raise ValueError(f"{name} must be a dense tensor on the CPU, got {tensor.layout} on {tensor.device}")
    if topk_ids.dim() != input.dim() or topk_ids.shape[:-1] != input.shape[:-1]:
        sizes = "".join(f"{size}, " for size in input.shape[:-1])
        raise ValueError(f"topk_ids must have shape ({sizes}T), got {tuple(topk_ids.shape)}")
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
    routed_scaling = check_number("routed_scaling", routed_scaling)
    scheme = SCHEMES[check_scheme("act", act, tuple(SCHEMES))]
    return Mixture(*stacks).multiply(input, topk_ids, topk_weights, gating, expert_map, routed_scaling, scheme)


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
    check_operands(input, topk_ids, topk_weights, expert_map, gate_up_layout[2])
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
    weights: int = gate_up_layout[1] * gate_up_layout[2] + down_layout[1] * down_layout[2]
    return 2 * prod(topk_ids) * weights


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
