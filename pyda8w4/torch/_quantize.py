"""Replacing the linear layers of a model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from pyda8w4._checks import check_flag
from pyda8w4._format import check_group_size
from pyda8w4.torch._module import DA8W4Linear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Report:
    """What was replaced and what was not.

    Parameters
    ----------
    what : str
        What is counted.
    replaced : list of str
        Names of modules.
    kept : dict of str to str
        Names of modules that stayed as they were, with the reason.
    """

    what: str = "Linear layers"
    replaced: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        total = len(self.replaced) + len(self.kept)
        lines = [f"replaced {len(self.replaced)} of {total} {self.what}"]
        return "\n".join(lines + [f"  kept {name}: {reason}" for name, reason in self.kept.items()])


def quantize_(
    model: nn.Module,
    group_size: int = 128,
    symmetric_activation: bool = False,
    symmetric_weight: bool = False,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> Report:
    """Replace the `torch.nn.Linear` layers of a model by `DA8W4Linear`, in place.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place.
    group_size : int
        Weights that share a scale: a multiple of 4. Layers with fewer input features have one group.
    symmetric_activation, symmetric_weight : bool
        See `DA8W4Linear` and `pyda8w4.quantize_weight`.
    filter_fn : callable, optional
        ``filter_fn(module, name)``: whether to replace this one. Called for each Linear; None means all.

    Returns
    -------
    Report
        Every Linear of the model is in it, as replaced or with the reason why not.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If `group_size` is out of range, or `model` itself is a Linear.

    Notes
    -----
    Each float weight is let go of before the next one is quantized, so that no more memory is needed than
    the model had, if nothing else holds them.

    Layers that share a weight share the packed one. A Linear that shares its weight with another kind
    of module, as an output head does with an embedding, is kept; to replace it, give it a parameter of
    its own first: ``model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach())``.

    Subclasses of Linear and layers with hooks are kept, as they may do more than multiply. int4 weights of
    torchao are taken as they are.

    Progress is shown on a terminal when it takes more than two seconds.

    Examples
    --------
    >>> import torch
    >>> import pyda8w4.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 10))
    >>> print(pyda8w4.torch.quantize_(model, group_size=32, filter_fn=lambda module, name: name != "1"))
    replaced 1 of 2 Linear layers
      kept 1: filter_fn
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.Linear):
        raise ValueError("model must hold its Linear layers as submodules; for one layer use DA8W4Linear.from_linear")
    check_group_size(group_size, 1 << 31)
    for name, value in (("symmetric_activation", symmetric_activation), ("symmetric_weight", symmetric_weight)):
        check_flag(name, value)

    report = Report()
    linears = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, nn.Linear)]
    foreign = _weights_of_others(model)
    made: dict[int, DA8W4Linear] = {}  # by the float module; modules that are one stay one
    packed: dict[int, DA8W4Linear] = {}  # by the float weight
    alive: list[object] = []  # float weights and modules that others share: their ids stay theirs
    shared = _ids_seen_twice(model, linears)
    progress = _Progress(len(linears))
    for name in linears:
        progress.step()
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if id(linear) in made:
            _replace(model, name, made[id(linear)])
            report.replaced.append(name)
            continue
        reason = _reason(linear, name, foreign, filter_fn)
        if reason is None:
            weight_id = id(linear.weight)
            try:
                if weight_id in packed:
                    new = packed[weight_id].sharing_weight(linear.bias)
                else:
                    new = DA8W4Linear.from_linear(linear, group_size, symmetric_activation, symmetric_weight)
            except (TypeError, ValueError) as error:
                reason = str(error)
            else:
                new.train(linear.training)
                if weight_id in shared or id(linear) in shared:
                    made[id(linear)] = packed[weight_id] = new
                    alive += [linear, linear.weight]
                _replace(model, name, new)
                report.replaced.append(name)
        if reason is not None:
            report.kept[name] = reason
        del linear
    progress.end()
    return report


def _reason(
    linear: nn.Linear, name: str, foreign: dict[int, str], filter_fn: Callable[[nn.Module, str], bool] | None
) -> str | None:
    """Why a layer is kept; None if it is to be replaced."""
    if type(linear) is not nn.Linear:
        return f"{type(linear).__name__} is a subclass of Linear"
    if filter_fn is not None and not filter_fn(linear, name):
        return "filter_fn"
    if id(linear.weight) in foreign:
        return f"its weight is shared with {foreign[id(linear.weight)]}"
    if any(getattr(linear, hooks) for hooks in _HOOKS) or "forward" in vars(linear):
        return "it has hooks"
    return None


def _weights_of_others(model: nn.Module) -> dict[int, str]:
    """Parameters of modules that are no Linear, by identity: where they are."""
    others = {}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            for parameter in module.parameters(recurse=False):
                others[id(parameter)] = f"{name} ({type(module).__name__})"
    return others


def _ids_seen_twice(model: nn.Module, names: list[str]) -> set[int]:
    """Identities of modules and weights that several of these names lead to."""
    seen: set[int] = set()
    twice: set[int] = set()
    for name in names:
        linear = model.get_submodule(name)
        for identity in (id(linear), id(linear.weight)):
            (twice if identity in seen else seen).add(identity)
    return twice


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


class _Progress:
    def __init__(self, total: int) -> None:
        self.done, self.total, self.start = 0, total, time.monotonic()
        self.shown = False

    def step(self) -> None:
        if sys.stderr.isatty() and time.monotonic() - self.start > 2:
            print(f"\rquantize_: {self.done} of {self.total} layers", end="", file=sys.stderr, flush=True)
            self.shown = True
        self.done += 1

    def end(self) -> None:
        if self.shown:
            print(f"\rquantize_: {self.total} of {self.total} layers", file=sys.stderr)
