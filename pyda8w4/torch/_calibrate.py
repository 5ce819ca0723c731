"""Quantization of a model with inputs for it: each weight is rounded against what it is multiplied with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from pyda8w4._checks import SCHEMES, check_scheme
from pyda8w4._format import check_group_size
from pyda8w4._packed import PackedWeight
from pyda8w4._quantize import Rounding
from pyda8w4.torch._gptq import round_weight
from pyda8w4.torch._quantize import (
    Progress,
    Report,
    check_model,
    chooser,
    filtered_by,
    finish,
    is_linear,
    layers_of,
    plain_linear,
    replace_layers,
)
from pyda8w4.torch._tensors import check_float


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    group_size: int = 128,
    act: str = "uint8",
    *,
    zeros: str = "float",
    two_level: bool = False,
    rotate: int = 0,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> Report:
    """Quantize a model as `quantize_` does, but round its weights so that their outputs for some inputs change little.

    Parameters
    ----------
    model : torch.nn.Module
        Float, on the CPU. Changed in place.
    batches : iterable
        What to call the model with, as in use: mappings of arguments by name, as tokenizers of transformers give them,
        tuples of arguments, or tensors. Where a mapping has an ``attention_mask`` of 2 dimensions, tokens that it masks
        do not count.
    group_size : int
        See `quantize_`.
    act : {'uint8', 'int8', 'int8_group', 'int16'}
        See `quantize_`.
    zeros : {'float', 'integer', 'none'}
        See `pyda8w4.quantize_weight`.
    two_level : bool
        See there.
    rotate : int
        See there. It helps here, too.
    filter_fn : callable, optional
        See `quantize_`.

    Returns
    -------
    Report
        That of `quantize_`.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If there are no batches, or they give NaN, another argument is out of range, or `model` itself is a Linear or a
        mixture of experts.

    Notes
    -----
    The method is GPTQ: after each input of a weight is rounded, the weights of the inputs behind it are changed so that
    they make up for the error, as far as these inputs go together. Scales are searched when their group comes.

    Blocks, modules in a list of which each takes what the one before it gives, are rounded one after another, each with
    what the rounded ones before it give. So it takes memory for what the batches are between two blocks, and for sums
    over the inputs of one block, (K, K) for each. Layers outside of blocks come last, by whole calls of the model.
    Experts of mixtures and layers that no batch reaches are rounded as by `quantize_`. Activations are not quantized
    meanwhile.

    docs/accuracy.md says what is gained.

    Examples
    --------
    >>> import torch
    >>> import pyda8w4.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    >>> x = torch.randn(500, 64)
    >>> print(pyda8w4.torch.calibrate(model, [x], group_size=32))
    replaced 2 of 2 Linear layers
    """
    check_model(model)
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable, got {type(batches).__name__}")
    rounding = Rounding(check_group_size(group_size), "search", zeros, two_level, rotate)
    check_scheme("act", act, tuple(SCHEMES))
    calls = [_call_of(model, batch) for batch in batches]
    if not calls:
        raise ValueError("batches must have some, got none")
    reason_of = chooser(model, filtered_by(filter_fn))
    modules = {name: model.get_submodule(name) for name in layers_of(model)}
    linears = {
        id(module.weight): module
        for name, module in modules.items()
        if is_linear(module) and not reason_of(module, name)
    }
    calibration = _Calibration(linears, rounding)
    with torch.inference_mode(False), torch.no_grad(), _evaluating(model):
        for blocks in _stacks(model, linears):
            calibration.run(blocks, calls)
        calibration.round_layers(calls)
    report = replace_layers(model, rounding, act, reason_of, calibration.rounded)
    finish(model, report, rounding, act)
    return report


class _Call(NamedTuple):
    """Of a module: what it is called with, and which positions are tokens, where a mask tells."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: torch.Tensor | None

    def run(self) -> Any:
        return self.module(*self.args, **self.kwargs)

    def with_input(self, hidden: torch.Tensor | None) -> _Call:
        """The same with other hidden states, which blocks take first."""
        if self.args:
            return self._replace(args=(hidden, *self.args[1:]))
        return self._replace(kwargs={**self.kwargs, "hidden_states": hidden})


def _call_of(model: nn.Module, batch: Any) -> _Call:
    if isinstance(batch, Mapping):
        mask: Any = batch.get("attention_mask")
        is_mask = isinstance(mask, torch.Tensor) and mask.dim() == 2
        caches = {"use_cache": False} if "use_cache" in batch else {}
        return _Call(model, (), {**batch, **caches}, mask.bool() if is_mask else None)
    if isinstance(batch, (tuple, list)):
        return _Call(model, tuple(batch), {}, None)
    if isinstance(batch, torch.Tensor):
        return _Call(model, (batch,), {}, None)
    raise TypeError(f"batches must be mappings, tuples or tensors, got {type(batch).__name__}")


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, and without caches of keys and values that one call would leave to another."""
    training = [module for module in model.modules() if module.training]
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if getattr(config, "use_cache", None) is True}
    model.eval()
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True
        for module in training:
            module.training = True


def _stacks(model: nn.Module, linears: Mapping[int, nn.Module]) -> list[list[nn.Module]]:
    """Lists of what may be blocks, outside of others, with some of the layers; in the order of the model."""
    stacks: list[list[nn.Module]] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside and len(module) > 1:
            blocks = list(module)
            if any(id(getattr(part, "weight", None)) in linears for part in module.modules()):
                stacks.append(blocks)
                inside.update(module.modules())
    return stacks


class _Stop(Exception):
    """The last block has been reached."""


class _Calibration:
    """`linears` are the layers to round, and `rounded` what they became, by the identity of the float weights."""

    def __init__(self, linears: Mapping[int, nn.Module], rounding: Rounding) -> None:
        self.linears, self.rounding = linears, rounding
        self.rounded: dict[int, PackedWeight] = {}

    def run(self, blocks: list[nn.Module], calls: list[_Call]) -> None:
        """Round the layers of blocks, if calls of the model pass through them one after another."""
        recorded = [_record(blocks, call) for call in calls]
        if not recorded[0] or any(len(each) != len(recorded[0]) for each in recorded):
            return
        progress = Progress("calibrate", len(recorded[0]), "blocks")
        hidden = [each[0].args[0] if each[0].args else each[0].kwargs["hidden_states"] for each in recorded]
        for step in zip(*recorded):
            progress.step()
            self.round_layers([call.with_input(each.clone()) for call, each in zip(step, hidden)])
            for i, call in enumerate(step):
                out = call.with_input(hidden[i]).run()
                hidden[i] = out[0] if isinstance(out, tuple) else out
        progress.end()

    def round_layers(self, calls: list[_Call]) -> None:
        """Round the layers of one module by what these calls of it give them as inputs."""
        layers = [
            (identity, module)
            for module in calls[0].module.modules()
            if is_linear(module) and (identity := id(module.weight)) in self.linears and identity not in self.rounded
        ]
        if not layers:
            return
        moments = _moments(layers, calls)
        for identity, layer in layers:
            if identity in moments and identity not in self.rounded:
                linear = plain_linear(layer)
                weight = linear.weight.data
                try:
                    check_float("weight", weight)
                    if linear.bias is not None:
                        check_float("bias", linear.bias)
                    packed = round_weight(weight, moments[identity], self.rounding).pack()
                except (TypeError, ValueError):
                    continue  # the layer stays as it is, and the report will say why
                weight.copy_(torch.from_numpy(packed.dequantize()))
                self.rounded[identity] = packed


def _record(blocks: list[nn.Module], call: _Call) -> list[_Call]:
    """Calls of the blocks that a call of the model makes, all but the first one without the hidden states.

    Nothing if they are no blocks of which each takes what the one before it gives, or the model does not call the last.
    """
    found: list[_Call] = []
    given: list[Any] = []  # by the last block

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        follows = not found or (given and given[0] is hidden and _version(hidden) == given[1])
        if not isinstance(hidden, torch.Tensor) or not follows:
            found.clear()
            raise _Stop
        inner = _Call(module, args, kwargs, call.mask)
        found.append(inner.with_input(None) if found else inner.with_input(hidden.clone()))
        if module is blocks[-1]:
            raise _Stop

    def keep(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        given[:] = out, _version(out)

    with contextlib.ExitStack() as hooks, contextlib.suppress(_Stop):
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(record, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(keep).remove)
        call.run()
        found.clear()
    return found


def _version(value: Any) -> int:
    """Of a tensor, as often as it was changed in place; those of inference mode do not count that."""
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else 0


def _moments(layers: list[tuple[int, nn.Module]], calls: list[_Call]) -> dict[int, torch.Tensor]:
    """By the identity of weights: the sum over all inputs of their products with themselves, (K, K)."""
    moments: dict[int, torch.Tensor] = {}
    last: list[Any] = [None, None, None]  # an input, its version, and the sum that it is in: layers often share one

    def add(identity: int, mask: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if x is last[0] and _version(x) == last[1] and moments.setdefault(identity, last[2]) is last[2]:
            return
        rows = x[mask] if mask is not None and x.shape[:-1] == mask.shape else x
        rows = rows.reshape(-1, x.shape[-1]).float()
        if identity not in moments:
            moments[identity] = torch.zeros(rows.shape[1], rows.shape[1])
        moments[identity].addmm_(rows.T, rows)
        last[:] = x, _version(x), moments[identity]

    for call in calls:
        with contextlib.ExitStack() as hooks:
            for identity, layer in layers:
                hook = partial(add, identity, call.mask)
                hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            call.run()
        last[:] = None, None, None
    if not all(torch.isfinite(each).all() for each in moments.values()):
        raise ValueError("batches must make finite inputs of all layers, got NaN or infinity")
    return moments
