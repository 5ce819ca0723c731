"""Replacing the linear layers and mixtures of experts of a model."""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from pyda8w4 import _advice
from pyda8w4._checks import SCHEMES, check_scheme
from pyda8w4._format import check_group_size
from pyda8w4._packed import PackedWeight
from pyda8w4._quantize import Rounding
from pyda8w4.torch._experts import quantize_experts
from pyda8w4.torch._float_experts import float_experts, is_experts
from pyda8w4.torch._module import DA8W4Linear
from pyda8w4.torch._readers import weight_readers

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
    parameters : dict of str to str
        Names of other parameters of two or more dimensions that stayed float, and what they are, such as
        convolutions. Embeddings, which do not multiply, are not among them.
    replaced_bytes : int
        The size that the weights which were replaced had before.
    float_bytes : dict of str to int
        The size of each weight that stayed float, by the names in `kept` and `parameters`. Weights that are shared
        are counted once.
    """

    what: str = "Linear layers"
    replaced: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    replaced_bytes: int = 0
    float_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def float_share(self) -> float:
        """The part of the bytes of all weights that multiply which stayed float, 0 to 1."""
        stayed = sum(self.float_bytes.values())
        return stayed / (stayed + self.replaced_bytes) if stayed else 0.0

    def summary(self) -> str:
        """Say in few lines what stayed float.

        Returns
        -------
        str
            Names that differ in numbers only are one line; the largest come first.
        """
        kinds: dict[tuple[str, str], list[int]] = {}
        for name, size in self.float_bytes.items():
            pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
            reason = self.kept.get(name) or self.parameters[name]
            kinds.setdefault((pattern, reason), []).append(size)
        total = sum(self.float_bytes.values()) + self.replaced_bytes
        lines = [f"{_percent(self.float_share)} of the bytes of weights that multiply stay float:"]
        for (pattern, reason), sizes in sorted(kinds.items(), key=lambda kind: -sum(kind[1])):
            times = f" ({len(sizes)} times)" if len(sizes) > 1 else ""
            lines.append(f"  {_percent(sum(sizes) / total)} {pattern}{times}: {reason}")
        return "\n".join(lines)

    def __str__(self) -> str:
        total = len(self.replaced) + len(self.kept)
        lines = [f"replaced {len(self.replaced)} of {total} {self.what}"]
        lines += [f"  kept {name}: {reason}" for name, reason in self.kept.items()]
        lines += [f"  float {name}: {reason}" for name, reason in self.parameters.items()]
        if self.float_bytes:
            lines.append(f"{_percent(self.float_share)} of the bytes of weights that multiply stay float")
        return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.1 else 1}f} %"


def quantize_(
    model: nn.Module,
    group_size: int = 128,
    act: str = "uint8",
    *,
    method: str = "search",
    zeros: str = "float",
    two_level: bool = False,
    rotate: int = 0,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> Report:
    """Replace the `torch.nn.Linear` layers of a model by `DA8W4Linear`, and its mixtures of experts, in place.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place.
    group_size : int
        Weights that share a scale: a multiple of 4. Layers with fewer input features have one group.
    act : {'uint8', 'int8', 'int8_group', 'int16'}
        How the layers quantize activations, see `pyda8w4.linear`. They can be told another way later.
    method : {'search', 'minmax'}
        See `pyda8w4.quantize_weight`.
    zeros : {'float', 'integer', 'none'}
        See there.
    two_level : bool
        See there.
    rotate : int
        See there.
    filter_fn : callable, optional
        ``filter_fn(module, name)``: whether to replace this one. Called for each Linear and mixture of experts that
        could be; None means all.

    Returns
    -------
    Report
        Every Linear and mixture of experts of the model is in it, as replaced or with the reason why not, and every
        other parameter that may multiply. It counts bytes.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If `group_size` is out of range, there is no such `act`, or `model` itself is a Linear or a mixture of experts.

    Warns
    -----
    UserWarning
        When a mixture of experts cannot be replaced: why.

    Notes
    -----
    Each float weight is let go of before the next one is quantized, so that no more memory is needed than
    the model had, if nothing else holds them. Experts are quantized one after another.

    Mixtures of experts of transformers, whose parameters are stacks of matrices, become `DA8W4Experts`: those that have
    the interface of transformers for them, and gates that are seen to compute what `pyda8w4.moe` does. A Linear beside
    them that chooses experts is kept.

    Layers that share a weight share the packed one. A Linear that shares its weight with another kind
    of module, as an output head does with an embedding, is kept; to replace it, give it a parameter of
    its own first: ``model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach())``.

    transformers' Conv1D is a Linear here, and so are subclasses of Linear that are seen to compute the plain product.
    Other subclasses and layers with hooks are kept, as they may do more than multiply; and layers whose weight the
    model's own code reads to multiply with, which is found in its source. int4 weights of torchao are taken as they
    are.

    A model of transformers can be saved with ``save_pretrained`` afterwards: its config says how it was quantized.

    Progress is shown on a terminal when it takes more than two seconds.

    Examples
    --------
    >>> import torch
    >>> import pyda8w4.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 10))
    >>> print(pyda8w4.torch.quantize_(model, group_size=32, filter_fn=lambda module, name: name != "1"))
    replaced 1 of 2 Linear layers
      kept 1: filter_fn
    14 % of the bytes of weights that multiply stay float
    """
    check_model(model)
    rounding = Rounding(check_group_size(group_size), method, zeros, two_level, rotate)
    check_scheme("act", act, tuple(SCHEMES))
    report = replace_layers(model, rounding, act, chooser(model, filtered_by(filter_fn)))
    finish(model, report, rounding, act)
    return report


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{_advice.for_model(model)}")
    if is_linear(model) or is_experts(model):
        raise ValueError("model must hold its Linear layers as submodules; for one layer use DA8W4Linear.from_linear")


def filtered_by(filter_fn: Callable[[nn.Module, str], bool] | None) -> Callable[[nn.Module, str], str | None]:
    """What tells why a user keeps a layer: None if he does not."""
    return lambda module, name: None if filter_fn is None or filter_fn(module, name) else "filter_fn"


def finish(model: nn.Module, report: Report, rounding: Rounding, act: str) -> None:
    """Warn of mixtures of experts that stay float, and let models of transformers be saved."""
    for reason, kind in {
        reason: type(module).__name__
        for name, reason in report.kept.items()
        if reason != "filter_fn" and is_experts(module := model.get_submodule(name))
    }.items():
        warnings.warn(f"{kind} stays float: {reason}", stacklevel=3)
    pretrained = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    if report.replaced and any(isinstance(module, pretrained) for module in model.modules()):
        from pyda8w4.torch import transformers

        config = transformers.DA8W4Config(act=act, **asdict(rounding))
        transformers.set_config(model, config)


def replace_layers(
    model: nn.Module,
    rounding: Rounding,
    act: str,
    reason_of: Callable[[nn.Module, str], str | None],
    rounded: Mapping[int, PackedWeight] = MappingProxyType({}),
) -> Report:
    """As `quantize_`; `reason_of` tells why a layer is kept: None if it is not.

    `rounded` has weights that are quantized already, by the identity of the float ones.
    """
    report = Report()
    names = layers_of(model)
    if any(is_experts(model.get_submodule(name)) for name in names):
        report.what = "Linear layers and mixtures of experts"
    made: dict[int, nn.Module] = {}  # by the float module; modules that are one stay one
    packed: dict[int, DA8W4Linear] = {}  # by the float weight
    alive: list[object] = []  # float weights and modules that others share: their ids stay theirs
    shared = _ids_seen_twice(model, names)
    progress = Progress("quantize_", len(names))
    for name in names:
        progress.step()
        layer: Any = model.get_submodule(name)
        if id(layer) in made:
            _replace(model, name, made[id(layer)])
            report.replaced.append(name)
            continue
        reason = reason_of(layer, name)
        if reason is None:
            size, training = multiplied_bytes(layer), layer.training
            try:
                new: nn.Module
                if is_experts(layer):
                    new = quantize_experts(layer, rounding, act)
                elif id(layer.weight) in packed:
                    new, size = packed[id(layer.weight)].sharing_weight(layer.bias), 0
                else:
                    if id(layer.weight) in rounded:
                        weight, bias, dtype = rounded[id(layer.weight)], layer.bias, layer.weight.dtype
                        new = linear = DA8W4Linear.from_packed(weight, bias, act=act, dtype=dtype)
                    else:
                        new = linear = DA8W4Linear.from_linear(plain_linear(layer), act=act, **asdict(rounding))
                    if id(layer.weight) in shared:
                        packed[id(layer.weight)] = linear
                        alive.append(layer.weight)
            except (TypeError, ValueError) as error:
                reason = str(error)
            else:
                new.train(training)
                if id(layer) in shared:
                    made[id(layer)] = new
                    alive.append(layer)
                _replace(model, name, new)
                report.replaced.append(name)
                report.replaced_bytes += size
        if reason is not None:
            report.kept[name] = reason
        del layer
    progress.end()
    count_floats(model, report)
    return report


def layers_of(model: nn.Module) -> list[str]:
    """Names of the modules that may be replaced."""
    return [
        name for name, module in model.named_modules(remove_duplicate=False) if is_linear(module) or is_experts(module)
    ]


def chooser(model: nn.Module, keep: Callable[[nn.Module, str], str | None]) -> Callable[[nn.Module, str], str | None]:
    """What tells why a layer is kept: None if it is not. The model must be as it was."""
    foreign, readers, routers = _weights_of_others(model), weight_readers(model), _routers(model)

    def reason_of(layer: nn.Module, name: str) -> str | None:
        if is_experts(layer):
            reason = _experts_reason(layer)
        else:
            reason = _reason(layer, foreign) or readers.get(id(layer)) or routers.get(id(layer))
        return reason or keep(layer, name)

    return reason_of


def _conv1d() -> Any:
    """transformers' Linear with a transposed weight; a class that nothing is of while transformers is not imported."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, _conv1d()))


def plain_linear(module: Any) -> nn.Linear:
    """The layer as an `nn.Linear` that shares its weight and bias."""
    if isinstance(module, nn.Linear):
        return module
    k, n = module.weight.shape
    linear = nn.Linear(k, n, device="meta")
    linear.weight, linear.bias = nn.Parameter(module.weight.detach().T, requires_grad=False), module.bias
    return linear


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS) or "forward" in vars(module)


def _experts_reason(experts: nn.Module) -> str | None:
    """Why a mixture of experts cannot be replaced; None if it can."""
    if has_hooks(experts):
        return "it has hooks"
    try:
        float_experts(experts)
    except ValueError as error:
        return str(error)
    return None


def _reason(linear: Any, foreign: dict[int, str]) -> str | None:
    """Why a layer cannot be replaced; None if it can."""
    if has_hooks(linear):
        return "it has hooks"
    if type(linear) is not nn.Linear and type(linear) is not _conv1d() and not _is_plain(linear):
        return f"{type(linear).__name__} is a subclass of Linear that may do more than multiply"
    if id(linear.weight) in foreign:
        return f"its weight is shared with {foreign[id(linear.weight)]}"
    return None


def _is_plain(linear: nn.Linear) -> bool:
    """Whether a subclass has nothing but a weight and a bias, and computes what `nn.Linear` does."""
    tensors = {*linear._parameters, *linear._buffers, *linear._modules}
    if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear):  # its weight is used, it is not called
        return False
    if tensors != {"weight", "bias"} or linear.weight.device.type != "cpu" or not linear.weight.is_floating_point():
        return False
    if type(linear).forward is nn.Linear.forward and type(linear).__call__ is nn.Module.__call__:
        return True
    generator = torch.Generator().manual_seed(0)
    ones = torch.randn(2, 3, linear.in_features, generator=generator, device="cpu").to(linear.weight.dtype)
    tolerance = 64 * torch.finfo(linear.weight.dtype).eps
    with torch.no_grad():
        for input in (ones[0], 100 * ones, 0 * ones, 0.01 * ones[:, :1]):
            try:
                want = nn.functional.linear(input, linear.weight, linear.bias)
                out = linear(input)
            except Exception:
                return False
            if type(out) is not torch.Tensor or out.shape != want.shape or out.dtype != want.dtype:
                return False
            if not (out - want).abs().max() <= tolerance * want.abs().max():
                return False
    return True


def _size(weight: Any) -> int:
    """In bytes, in this process."""
    local = weight.to_local() if hasattr(weight, "to_local") else weight  # a DTensor is a part
    size: int = local.numel() * local.element_size()
    return size


def multiplied_bytes(layer: nn.Module) -> int:
    """Of the weights of a layer, without its biases."""
    return sum(_size(weight) for weight in _weights(layer))


def _weights(layer: Any) -> list[torch.Tensor]:
    if is_experts(layer):
        return [parameter for parameter in layer.parameters(recurse=False) if parameter.dim() == 3]
    return [layer.weight]


def count_floats(model: nn.Module, report: Report) -> None:
    """Enter the weights that stayed float: of kept layers, and other parameters that may multiply."""
    seen: set[int] = set()
    for name in report.kept:
        weights = _weights(model.get_submodule(name))
        report.float_bytes[name] = sum(_size(weight) for weight in weights if id(weight) not in seen)
        seen.update(map(id, weights))
    for name, module in model.named_modules():
        kind = type(module).__name__
        if is_linear(module) or is_experts(module) or "embed" in kind.lower():
            continue
        for child, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or id(parameter) in seen or max(parameter.shape) == parameter.numel():
                continue
            if re.search("embed|token|position", child):
                continue
            seen.add(id(parameter))
            path = f"{name}.{child}".lstrip(".")
            report.parameters[path] = f"a parameter of {kind}, which is no Linear"
            report.float_bytes[path] = _size(parameter)


def _weights_of_others(model: nn.Module) -> dict[int, str]:
    """Parameters of modules that are no Linear, by identity: where they are."""
    others = {}
    for name, module in model.named_modules():
        if not is_linear(module):
            for parameter in module.parameters(recurse=False):
                others[id(parameter)] = f"{name} ({type(module).__name__})"
    return others


def _ids_seen_twice(model: nn.Module, names: list[str]) -> set[int]:
    """Identities of modules and weights that several of these names lead to."""
    seen: set[int] = set()
    twice: set[int] = set()
    for name in names:
        layer = model.get_submodule(name)
        for identity in map(id, (layer, *_weights(layer))):
            (twice if identity in seen else seen).add(identity)
    return twice


def _routers(model: nn.Module) -> dict[int, str]:
    """By the identity of a Linear: that it chooses experts of a mixture beside it."""
    routers = {}
    for module in model.modules():
        for experts in filter(is_experts, module.children()):
            for layer in filter(is_linear, module.modules()):
                if plain_linear(layer).out_features == getattr(experts, "num_experts", None):
                    routers[id(layer)] = "it chooses experts"
    return routers


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


_BAR = 30  # characters


class Progress:
    """A bar on a terminal, for what takes more than two seconds."""

    def __init__(self, name: str, total: int, unit: str = "layers") -> None:
        self.name, self.done, self.total, self.unit, self.start = name, 0, total, unit, time.monotonic()
        self.shown = False

    def step(self) -> None:
        """Show what is done, before the next."""
        seconds = time.monotonic() - self.start
        if sys.stderr.isatty() and seconds > 2:
            left = f", {seconds / self.done * (self.total - self.done):.0f} s left" if self.done else ""
            self._show(left, end="")
        self.done += 1

    def end(self) -> None:
        if self.shown:
            self._show("", end="\n")

    def _show(self, left: str, end: str) -> None:
        filled = self.done * _BAR // self.total
        bar = "#" * filled + "." * (_BAR - filled)
        text = f"\r{self.name}: {bar} {self.done} of {self.total} {self.unit}{left}"
        print(f"{text}\x1b[K", end=end, file=sys.stderr, flush=True)  # and nothing of a longer line before it
        self.shown = True
