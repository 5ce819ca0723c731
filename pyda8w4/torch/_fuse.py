"""Layers that share an input as one product."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from pyda8w4._concat import concat
from pyda8w4.torch._module import DA8W4Linear, autocast_dtype, needs_operator
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
    others hand out theirs when they are given the same tensor with the same numbers, else compute anew. So results are
    those of the separate layers, bit for bit, in any order of calls. Outputs are views into one tensor, which is
    let go of once all have theirs, or the input is.
    ``torch.compile`` and export see no numbers: there, the input must not be changed in place between the calls
    of one group.

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


class _Outputs(NamedTuple):
    """What one part has computed for all, and what of."""

    input: weakref.ref[torch.Tensor]
    copy: torch.Tensor  # nothing else tells that an input was changed through numpy or `.data`
    autocast: torch.dtype | None
    product: object
    versions: list[int] | None
    out: torch.Tensor
    left: int  # parts that have not taken theirs


class _Sharing:
    """What the parts of a group have in common. No Module, so that only one part has it in its state."""

    def __init__(self, whole: DA8W4Linear, count: int) -> None:
        self.whole, self.count = whole, count
        # None between inputs. Tuples, so that other threads never see half of one.
        self.outputs: _Outputs | None = None
        # The same of graphs while they are traced: input, outputs, first columns of the parts that have taken theirs.
        self.traced: tuple[torch.Tensor, torch.Tensor, tuple[int, ...]] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"whole": self.whole, "count": self.count, "outputs": None, "traced": None}

    def multiply(self, input: torch.Tensor) -> torch.Tensor:
        """The outputs of all parts; computed for the first one that comes with an input."""
        product, autocast = self.whole._product(), autocast_dtype()
        found, versions = self.outputs, product.versions()
        if (
            found is not None
            and found.input() is input
            and found.product is product
            and found.versions == versions
            and found.autocast is autocast
            and found.copy.dtype is input.dtype
            and torch.equal(found.copy, input)
        ):
            self.outputs = found._replace(left=found.left - 1) if found.left > 1 else None
            return found.out
        out: torch.Tensor = self.whole(input)
        reference = weakref.ref(input, self._forget)
        self.outputs = _Outputs(reference, input.detach().clone(), autocast, product, versions, out, self.count - 1)
        return out

    def trace(self, input: torch.Tensor, part: int) -> torch.Tensor:
        """The same for inputs that hold no numbers: only the object tells one from another, once for each part."""
        found = self.traced
        taken: tuple[int, ...] = (part,)
        if found is not None and found[0] is input and part not in found[2]:
            out, taken = found[1], (*found[2], part)
        else:
            out = self.whole(input)
        self.traced = (input, out, taken) if len(taken) < self.count else None
        return out

    def _forget(self, reference: weakref.ref[torch.Tensor]) -> None:
        found = self.outputs
        if found is not None and found.input is reference:
            self.outputs = None


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
        traced = torch.compiler.is_compiling() or needs_operator(input)
        out = sharing.trace(input, self._begin) if traced else sharing.multiply(input)
        return out[..., self._begin : self._end]
