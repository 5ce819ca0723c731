"""Gates and ups as one product with its activation, and MLPs made of it: ``torch.ops.pyda8w4.linear_gated``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from math import prod
from typing import Any

import torch
from torch import nn
from torch._library.autograd import Info, make_autograd_impl
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import register_flop_formula

from pyda8w4._checks import SCHEMES, check_scheme
from pyda8w4._concat import concat
from pyda8w4.torch._float_experts import ACTIVATIONS
from pyda8w4.torch._layer import is_compiling, needs_operator
from pyda8w4.torch._module import DA8W4Linear, autocast, is_any_autocast_enabled
from pyda8w4.torch._moe import Gating, core_gating
from pyda8w4.torch._ops import Product, check_input, names_of, refuse_gradients
from pyda8w4.torch._quantize import Report, has_hooks
from pyda8w4.torch._state import format_of

# Arguments are those of `linear` and of `pyda8w4.linear_gated`.
_SCHEMA = (
    "linear_gated(Tensor input, Tensor[] weight, Tensor? bias, int[] layout, str activation, bool interleaved, "
    "float alpha, float limit, str act) -> Tensor"
)


class GatedMLP(nn.Module):
    """An MLP of packed layers: ``down(activation(gate(x)) * up(x))``. `fuse_gated` makes it.

    Parameters
    ----------
    gate_up : DA8W4Linear
        Gates, and as many ups behind them.
    down : DA8W4Linear
        What multiplies their products.
    activation : {'silu', 'gelu', 'gelu_tanh'}
        The function of the gates.
    """

    def __init__(self, gate_up: DA8W4Linear, down: DA8W4Linear, activation: str) -> None:
        super().__init__()
        self.gate_up, self.down, self._gating = gate_up, down, Gating(activation)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply by gates and ups, and by what follows.

        Parameters
        ----------
        input : (..., in_features) tensor of float32, bfloat16 or float16
            All dimensions but the last are rows.

        Returns
        -------
        (..., out_features) tensor
            Of the type of `input`.
        """
        layer = self.gate_up
        if is_any_autocast_enabled():
            input = autocast(input)
        if is_compiling() or needs_operator(input) or (input.requires_grad and torch.is_grad_enabled()):
            weight, bias, layout, act = layer._arguments()
            hidden = torch.ops.pyda8w4.linear_gated(input, weight, bias, layout, *self._gating, act)
        else:
            hidden = layer._product().multiply(input, layer._scheme, core_gating(*self._gating))
        out: torch.Tensor = self.down(hidden)
        return out

    def extra_repr(self) -> str:
        """Return what is printed of it.

        Returns
        -------
        str
            The function of the gates.
        """
        return f"activation={self._gating.activation}"


def fuse_gated(model: nn.Module) -> Report:
    """Replace MLPs whose layers are packed by `GatedMLP`, in place: one product for gates and ups, with its activation.

    Parameters
    ----------
    model : torch.nn.Module
        After `quantize_`, in evaluation mode.

    Returns
    -------
    Report
        Of the modules that have three packed layers of fitting sizes: replaced, or not and why.

    Raises
    ------
    TypeError
        If `model` is no module.

    Notes
    -----
    A module is replaced if it has nothing else with tensors, and is seen to compute
    ``down(activation(gate(x)) * up(x))``, with SiLU, GELU or its approximation by tanh; names do not matter. Products
    of gates and ups are those of `pyda8w4.linear_gated`: the activation is computed in float32 and rounded once, so
    results differ from those of separate layers by rounding.

    In the state dict, the layers are under the names ``gate_up`` and ``down``. Save a model of transformers before.

    Examples
    --------
    >>> import torch
    >>> import pyda8w4.torch
    >>> class MLP(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gate_proj, self.up_proj = torch.nn.Linear(64, 96), torch.nn.Linear(64, 96)
    ...         self.down_proj = torch.nn.Linear(96, 64)
    ...     def forward(self, x):
    ...         return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
    >>> model = torch.nn.Sequential(MLP()).eval()
    >>> _ = pyda8w4.torch.quantize_(model)
    >>> print(pyda8w4.torch.fuse_gated(model))
    replaced 1 of 1 gated MLPs
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = Report("gated MLPs")
    for path, module in list(model.named_modules()):
        layers = [layer for layer in module.children() if isinstance(layer, DA8W4Linear)]
        orders = [order for order in permutations(layers) if _fits(*order)] if len(layers) == 3 else []
        if not orders or not path:
            continue
        try:
            new = _gated(module, orders)
        except ValueError as error:
            report.kept[path] = str(error)
            continue
        new.train(module.training)
        model.set_submodule(path, new)
        report.replaced.append(path)
    return report


def _fits(gate: DA8W4Linear, up: DA8W4Linear, down: DA8W4Linear) -> bool:
    if type(gate) is not DA8W4Linear or type(up) is not DA8W4Linear:  # those of tensor parallelism do more
        return False
    return gate.in_features == up.in_features and gate.out_features == up.out_features == down.in_features


def _gated(module: nn.Module, orders: Sequence[tuple[DA8W4Linear, ...]]) -> GatedMLP:
    """What takes the place of an MLP whose layers have these roles. ValueError says why nothing can."""
    if any(map(has_hooks, [module, *orders[0]])):
        raise ValueError("it has hooks")
    first = orders[0][0]
    if first.codes.is_meta:
        raise ValueError("it is on the meta device")
    tensors = len([*module.buffers(), *module.parameters()])
    if tensors != sum(len([*layer.buffers()]) for layer in orders[0]):
        raise ValueError("it has other tensors beside those of three layers")
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(5, first.in_features, generator=generator, device="cpu")
    # Small ones tell functions apart, and the largest what is clamped.
    input *= torch.tensor([1, 10, 0.01, 1, 1e4], device="cpu")[:, None]
    with torch.no_grad():
        try:
            found = module(input)
        except Exception as error:
            raise ValueError(f"it raises {type(error).__name__}: {error}") from None
        for gate, up, down in orders:
            for activation in ("silu", "gelu", "gelu_tanh"):
                want = down(ACTIVATIONS[activation](gate(input), up(input), 0.0, 0.0))
                if type(found) is torch.Tensor and found.shape == want.shape and _is_close(found, want):
                    return GatedMLP(_joined(gate, up), down, activation)
    raise ValueError("it computes something else than down(activation(gate(x)) * up(x))")


def _is_close(found: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((found - want).abs().amax(-1).le(1e-5 * want.abs().amax(-1)).all())


def _joined(gate: DA8W4Linear, up: DA8W4Linear) -> DA8W4Linear:
    if gate.act != up.act:
        raise ValueError(f"act differs: {[gate.act, up.act]}")
    if (gate.bias is None) != (up.bias is None):
        raise ValueError("some have a bias, some have none")
    bias = None if gate.bias is None or up.bias is None else torch.cat([gate.bias, up.bias])
    joined = concat([gate.packed, up.packed])
    return DA8W4Linear.from_packed(joined, bias, act=gate.act, dtype=gate.weight.dtype)


# ---- the operator ----------------------------------------------------------------------------


def _linear_gated(
    input: torch.Tensor,
    weight: list[torch.Tensor],
    bias: torch.Tensor | None,
    layout: list[int],
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    act: str,
) -> torch.Tensor:
    scheme = SCHEMES[check_scheme("act", act, tuple(SCHEMES))]
    tensors = dict(zip(names_of(weight, layout), weight))
    format = format_of(layout, tensors)
    if format.n % 2:
        raise ValueError(f"weight must have an even N, of which half are gates, got {format.n}")
    gating = core_gating(activation, interleaved, alpha, limit)
    return Product(format, tensors, bias).multiply(input, scheme, gating)


def _fake(input: torch.Tensor, weight: object, bias: object, layout: list[int], *others: object) -> torch.Tensor:
    check_input(input, layout[2])
    return input.new_empty((*input.shape[:-1], layout[1] // 2))


def _keep_sizes(ctx: Any, inputs: Sequence[Any], output: object) -> None:
    ctx.sizes = inputs[0].shape[-1], len(inputs[1])


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    k, weights = ctx.sizes
    return torch.ops.pyda8w4.linear_backward(gradient, k), [None] * weights, *[None] * 7


def _autograd(keys: Any, input: torch.Tensor, *others: Any) -> torch.Tensor:
    refuse_gradients(input)
    out: torch.Tensor = _reverse_mode(keys, input, *others)
    return out


def _vmap(info: object, in_dims: Sequence[Any], input: torch.Tensor, *others: Any) -> tuple[torch.Tensor, int]:
    at, *dims = in_dims
    if any(dim is not None for dim in tree_leaves(dims)):
        raise NotImplementedError("torch.vmap over the weights of DA8W4 layers")
    return torch.ops.pyda8w4.linear_gated(input.movedim(at, 0), *others), 0


def _flops(input: Sequence[int], weight: object, bias: object, layout: Sequence[int], *others: Any, **more: Any) -> int:
    return 2 * prod(input[:-1]) * layout[1] * layout[2]


# As with `linear`, reloading the module finds the operator there.
if not hasattr(torch.ops.pyda8w4, "linear_gated"):
    _library: Any = torch.library.Library("pyda8w4", "FRAGMENT")  # type: ignore[no-untyped-call, unused-ignore]
    _library.define(_SCHEMA)
    _library.impl("linear_gated", _linear_gated, "CPU")
    torch.library.register_fake("pyda8w4::linear_gated", _fake, lib=_library)
    _reverse_mode = make_autograd_impl(torch.ops.pyda8w4.linear_gated.default, Info(_backward, _keep_sizes))
    _library.impl("linear_gated", _autograd, "Autograd", with_keyset=True)
    if hasattr(torch.library, "register_vmap"):  # torch 2.5
        torch.library.register_vmap("pyda8w4::linear_gated", _vmap, lib=_library)
    register_flop_formula(torch.ops.pyda8w4.linear_gated)(_flops)  # type: ignore[no-untyped-call, unused-ignore]
