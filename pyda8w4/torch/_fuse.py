"""Layers that share an input as one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pyda8w4._concat import concat
from pyda8w4.torch._module import DA8W4Linear
from pyda8w4.torch._quantize import Report
from pyda8w4.torch._weight import WeightStandIn


def fuse_linears(model: nn.Module, groups: Sequence[Sequence[str]]) -> Report:
    """Join `DA8W4Linear` layers that are given the same input, in place: one product instead of several.

    Parameters
    ----------
    model : torch.nn.Module
        After `quantize_`.
    groups : sequence of sequences of str
        Names that modules give their layers, for example
        ``[("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]``. Wherever a module has children of all the
        names of a group, these are joined.

    Returns
    -------
    Report
        Of the modules that have such children: joined, or not and why.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If a group has fewer than two names, or no module has children of its names.

    Notes
    -----
    The children stay callable by their names. The first one that is given an input computes all outputs, the
    others hand out theirs when they are given the same tensor (the same object, not changed in place
    since), else compute anew. So results are those of the separate layers, bit for bit, in any order of calls.
    Outputs are views into one tensor. Under ``torch.inference_mode``, where tensors do not tell whether they
    were changed, each layer multiplies its own part of the weight in eager mode. ``torch.compile`` and export
    cannot see it either: there, the input must not be changed in place between the calls of one group.

    In the state dict, all of a group is under the name of its first layer.

    Examples
    --------
    >>> import torch
    >>> import pyda8w4.torch
    >>> class Gated(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gate, self.up = torch.nn.Linear(64, 32), torch.nn.Linear(64, 32)
    ...     def forward(self, x):
    ...         return self.gate(x).sigmoid() * self.up(x)
    >>> model = torch.nn.Sequential(Gated())
    >>> _ = pyda8w4.torch.quantize_(model)
    >>> print(pyda8w4.torch.fuse_linears(model, [("gate", "up")]))
    replaced 1 of 1 groups of layers
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(groups, str) or not all(
        not isinstance(group, str) and all(isinstance(name, str) for name in group) for group in groups
    ):
        raise TypeError(f"groups must be a sequence of sequences of str, got {groups!r}")
    report = Report("groups of layers")
    for group in groups:
        if len(set(group)) != len(group) or len(group) < 2:
            raise ValueError(f"groups must each have at least two names, all different, got {tuple(group)}")
        parents = [
            (path, module)
            for path, module in model.named_modules()
            if all(isinstance(getattr(module, name, None), nn.Module) for name in group)
        ]
        if not parents:
            raise ValueError(f"groups must name children of a module, got {tuple(group)}, which none has")
        for path, parent in parents:
            name = f"{path}.({', '.join(group)})".lstrip(".")
            layers = [getattr(parent, child) for child in group]
            reason = _reason(layers)
            if reason is not None:
                report.kept[name] = reason
                continue
            for child, part in zip(group, _parts(layers)):
                setattr(parent, child, part)
            report.replaced.append(name)
    return report


def _reason(layers: Sequence[nn.Module]) -> str | None:
    """Why layers cannot be joined; None if they can."""
    for layer in layers:
        if not isinstance(layer, DA8W4Linear):
            return f"it has a {type(layer).__name__}"
    first = layers[0]
    for what in ("in_features", "group_size", "symmetric_activation"):
        values = [getattr(layer, what) for layer in layers]
        if any(value != values[0] for value in values):
            return f"{what} differs: {values}"
    if len({layer.bias is None for layer in layers}) > 1:
        return "some have a bias, some have none"
    if first.codes.is_meta:
        return "it is on the meta device"
    return None


def _parts(layers: Sequence[DA8W4Linear]) -> list[FusedPart]:
    first = layers[0]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat(biases) if biases else None
    whole = DA8W4Linear.from_packed(
        concat([layer.packed for layer in layers]),
        bias,
        symmetric_activation=first.symmetric_activation,
        dtype=first.weight.dtype,
    )
    whole.train(first.training)
    sharing = _Sharing(whole, len(layers))
    parts: list[FusedPart] = []
    begin = 0
    for layer in layers:
        parts.append(FusedPart(sharing, begin, begin + layer.out_features, owner=not parts))
        begin += layer.out_features
    return parts


class _Sharing:
    """What the parts of a group have in common. No Module, so that only one part has it in its state."""

    def __init__(self, whole: DA8W4Linear, count: int) -> None:
        self.whole, self.count = whole, count
        # The input, its version, the outputs, and how many parts have not taken theirs; None between inputs. One
        # tuple, so that other threads never see half of it.
        self.entry: tuple[torch.Tensor, int, torch.Tensor, int] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "entry": None}


class FusedPart(nn.Module):
    """Some outputs of layers that were joined by `fuse_linears`, which makes it.

    Parameters
    ----------
    sharing : object
        What the parts of a group have in common.
    begin, end : int
        Which outputs of the fused layer these are.
    owner : bool
        Whether the fused layer is in the state of this part: of one in each group.
    """

    def __init__(self, sharing: _Sharing, begin: int, end: int, owner: bool) -> None:
        super().__init__()
        self._sharing, self._begin, self._end = sharing, begin, end
        self.in_features, self.out_features = sharing.whole.in_features, end - begin
        if owner:
            self.fused = sharing.whole

    @property
    def weight(self) -> torch.Tensor:
        """See `DA8W4Linear`."""
        whole = self._sharing.whole.weight
        return WeightStandIn((self.out_features, self.in_features), whole.dtype, whole.device)

    @property
    def bias(self) -> torch.Tensor | None:
        """The part of these outputs."""
        bias = self._sharing.whole.bias
        return None if bias is None else bias[self._begin : self._end]

    def extra_repr(self) -> str:
        """Return what is printed of it.

        Returns
        -------
        str
            Its sizes.
        """
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply, or hand out what another part has computed.

        Parameters
        ----------
        input : (..., in_features) tensor of float32, bfloat16 or float16
            All dimensions but the last are rows.

        Returns
        -------
        (..., out_features) tensor
            A view into the outputs of the whole group, or a tensor of its own.
        """
        sharing = self._sharing
        version = 0
        if not torch.compiler.is_compiling():
            if input.is_inference():
                return sharing.whole.columns(input, self._begin, self._end)
            version = input._version
        entry = sharing.entry
        if entry is not None and entry[0] is input and entry[1] == version:
            out, left = entry[2], entry[3] - 1
        else:
            out, left = sharing.whole(input), sharing.count - 1
        sharing.entry = (input, version, out, left) if left else None
        return out[..., self._begin : self._end]
