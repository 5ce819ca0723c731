"""Layers that share an input as one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pyda8w4._concat import concat
from pyda8w4.torch._layer import needs_operator, refuse_script
from pyda8w4.torch._module import DA8W4Linear
from pyda8w4.torch._ops import slice_outputs
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
    The children stay callable by their names, in any order, with results those of the separate layers, bit for bit.
    ``torch.compile``, export and other tracers get one product for the children that are given the same tensor, which
    must not be changed in place between their calls. In eager mode each child multiplies its part of the
    weight: nothing tells whether numbers of an input were changed since another child was given it.

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
            if reason is None:
                try:
                    parts = _parts(layers)
                except ValueError as error:  # weights of different kinds
                    reason = str(error)
            if reason is not None:
                report.kept[name] = reason
                continue
            for child, part in zip(group, parts):
                setattr(parent, child, part)
            report.replaced.append(name)
    return report


def _reason(layers: Sequence[nn.Module]) -> str | None:
    """Why layers cannot be joined; None if they can."""
    for layer in layers:
        if type(layer) is not DA8W4Linear:  # those of tensor parallelism do more
            return f"it has a {type(layer).__name__}"
    first = layers[0]
    for what in ("in_features", "group_size", "act"):
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
        concat([layer.packed for layer in layers]), bias, act=first.act, dtype=first.weight.dtype
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
        # While a graph is traced: an input, the outputs of all parts, and the first columns of those that have theirs.
        self.traced: tuple[torch.Tensor, torch.Tensor, tuple[int, ...]] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "traced": None}

    def trace(self, input: torch.Tensor, begin: int) -> torch.Tensor:
        """The outputs of all parts, of one call for all that come with the same object as input, each once."""
        found = self.traced
        taken: tuple[int, ...] = (begin,)
        if found is not None and found[0] is input and begin not in found[2]:
            out, taken = found[1], (*found[2], begin)
        else:
            out = self.whole(input)
        self.traced = (input, out, taken) if len(taken) < self.count else None
        return out


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

    def __prepare_scriptable__(self) -> nn.Module:
        refuse_script(self)

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
        sharing, begin, end = self._sharing, self._begin, self._end
        if torch.compiler.is_dynamo_compiling() or needs_operator(input):
            return slice_outputs(sharing.trace(input, begin), slice(begin, end))
        return sharing.whole.columns(input, begin, end)
