"""Mixtures of experts for an empty model, from a checkpoint: which of its tensors they are, and their modules.

Checkpoints have stacks, or a matrix for each expert; gates and ups apart, or in one. Which matrices transformers merges
as it loads, it says in its conversions (`Names.merged`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from pyda8w4._experts import PackedExperts
from pyda8w4._packed import PackedWeight
from pyda8w4.checkpoints import Checkpoint
from pyda8w4.formats import QuantizedWeight
from pyda8w4.torch._experts import STACKS, DA8W4Experts
from pyda8w4.torch._float_experts import FloatExperts, float_experts
from pyda8w4.torch._names import Names
from pyda8w4.torch._parts import Part, is_quantized

# Of which of `STACKS` a tensor is a part, and which part along N: parameters of transformers, such with gates and ups
# apart, and buffers of `DA8W4Experts`.
_PLACES = {
    "gate_up_proj": ("gate_up", 0),
    "gate_proj": ("gate_up", 0),
    "up_proj": ("gate_up", 1),
    "down_proj": ("down", 0),
    **{stack: (stack, 0) for stack in STACKS},
}
_NAME = re.compile(rf"(.+)\.({'|'.join(_PLACES)})(?:\.weight|([._]bias))?")


def names_of_stacks(mixtures: Iterable[str]) -> list[str]:
    """What they may be called, beside the names that a model has."""
    return [f"{name}.{stack}{kind}" for name in mixtures for stack in _PLACES for kind in (".weight", ".bias", "_bias")]


def find_mixtures(parts: Mapping[str, Part], mixtures: Mapping[str, Any], names: Names) -> dict[str, FoundMixture]:
    """What there is of experts, by the names of the modules."""
    found: dict[str, FoundMixture] = {}
    for key, part in parts.items():
        name, joined = names.find(key)
        name = name.replace(".switch_mlp.", ".experts.")  # which is what MLX calls them
        place = names.merged(key) if joined else 0
        match = _NAME.fullmatch(name)
        if place is not None and match is not None and match[1] in mixtures:
            mixture = found.setdefault(match[1], FoundMixture(match[1], mixtures[match[1]]))
            stack, first = _PLACES[match[2]]
            mixture.add(key, part.name, (stack, first + place), "bias" if match[3] else "matrix" if joined else "stack")
    return found


class FoundMixture:
    """What a checkpoint has of one mixture of experts.

    Parameters
    ----------
    name : str
        Of the module.
    module : torch.nn.Module
        The float one, empty.

    Attributes
    ----------
    keys : list of str
        Of all parts that it has.
    weights : dict
        Names in the checkpoint, by stack and place along N: a stack, or the matrices of the experts.
    biases : dict
        Names, by stack and place.
    """

    def __init__(self, name: str, module: Any) -> None:
        self.name, self._module = name, module
        self.keys: list[str] = []
        self.weights: dict[tuple[str, int], str | list[str]] = {}
        self.biases: dict[tuple[str, int], str] = {}

    def add(self, key: str, name: str, place: tuple[str, int], kind: str) -> None:
        """Take what is named so: a stack, a matrix or a bias."""
        self.keys.append(key)
        if kind == "bias":
            self.biases[place] = name
            return
        names = self.weights.setdefault(place, name if kind == "stack" else [])
        if isinstance(names, list):
            names.append(name)

    @property
    def tensors(self) -> list[str]:
        """The names of all weights."""
        found: list[str] = []
        for names in self.weights.values():
            found += [names] if isinstance(names, str) else names
        return found

    @property
    def stacks_apart(self) -> dict[str, list[str]]:
        """Stacks that are parameters of the model together, or under another name: by the name of the parameter."""
        found = {stack: self._names(stack) for stack in STACKS}
        own = [f"{self.name}.{stack}_proj" for stack in STACKS]
        if all(key in own for key in self.keys) or not all(isinstance(names, str) for names in self.weights.values()):
            return {}
        return dict(zip(own, found.values()))  # type: ignore[arg-type]

    def _names(self, stack: str) -> list[str | list[str]]:
        """In the order along N; matrices in that of the experts."""
        places = sorted(place for place in self.weights if place[0] == stack)
        found = (self.weights[place] for place in places)
        return [names if isinstance(names, str) else sorted(names, key=_natural) for names in found]

    def _biases(self, stack: str) -> list[str]:
        return [self.biases[place] for place in sorted(self.biases) if place[0] == stack]

    def check(self, checkpoint: Checkpoint) -> FloatExperts:
        """What the module has. ValueError unless all weights are quantized and fit it."""
        kinds = {is_quantized(checkpoint, name): name for name in self.tensors}
        if len(kinds) > 1:
            raise ValueError(f"{kinds[True]} is quantized, but {kinds[False]} of the same experts is float")
        try:
            floats = float_experts(self._module)
        except ValueError as error:
            raise ValueError(f"{self.name} cannot be packed: {error}") from None
        for stack, weight, bias in zip(STACKS, floats[:2], floats[2:4]):
            shapes = []
            for names in self._names(stack):
                matrices = [names] if isinstance(names, str) else names
                different = dict.fromkeys(checkpoint.shapes[name] for name in matrices)
                if len(different) > 1:
                    raise ValueError(f"{names[0]} and the like must have one shape, got {[*different]}")
                shape = next(iter(different))
                shapes.append(shape if isinstance(names, str) else (len(names), *shape))
            self._check_shape(stack, tuple(weight.shape), shapes)
            found = [checkpoint.shapes[name] for name in self._biases(stack)]
            if bias is not None:
                self._check_shape(f"{stack} bias", tuple(bias.shape), found)
            elif found:
                raise ValueError(f"{self.name}.{stack} must have no bias by the config of the model")
        return floats

    def _check_shape(self, what: str, wanted: tuple[int, ...], parts: list[tuple[int, ...]]) -> None:
        """Of all parts along N, the second dimension."""
        others = {shape[:1] + shape[2:] for shape in parts}
        if others != {wanted[:1] + wanted[2:]} or sum(shape[1] for shape in parts) != wanted[1]:
            found = " and ".join(map(str, parts)) or "none"
            raise ValueError(f"{self.name}: {what} is {wanted} by the config of the model, {found} in the checkpoint")

    def packed(self, checkpoint: Checkpoint, act: str, requantize: bool) -> DA8W4Experts:
        """The module that takes the place of the float one."""
        floats = self.check(checkpoint)
        stacks: list[PackedExperts] = []
        biases: list[torch.Tensor | None] = []
        for stack, bias in zip(STACKS, floats[2:4]):
            names = self._names(stack)
            alternate = floats.gating.interleaved and len(names) > 1
            stacks.append(checkpoint._stacked(names, requantize, _alternated if alternate else None))
            if bias is None:
                biases.append(None)
                continue
            joined = np.concatenate([checkpoint.array(name) for name in self._biases(stack)], axis=1)
            biases.append(torch.from_numpy(joined[:, _alternating(joined.shape[1])] if alternate else joined))
        options = floats.gating._asdict()
        return DA8W4Experts.from_packed(*stacks, *biases, **options, act=act, dtype=floats.gate_up.dtype)


def _alternated(weight: PackedWeight) -> PackedWeight:
    """With its gates and its ups, which are the halves of its rows, in turn."""
    return QuantizedWeight.from_packed(weight).rows(_alternating(weight.shape[0])).pack()


def _alternating(rows: int) -> Any:
    return np.arange(rows).reshape(2, -1).T.reshape(-1)


def _natural(name: str) -> list[Any]:
    """Numbers in names in their order."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
