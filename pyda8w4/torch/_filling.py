"""Packed layers for an empty model, from a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pyda8w4._packed import PackedWeight
from pyda8w4.checkpoints import Checkpoint
from pyda8w4.torch._embedding import DA8W4Embedding
from pyda8w4.torch._float_experts import is_experts
from pyda8w4.torch._layer import PackedLayer
from pyda8w4.torch._mixtures import FoundMixture, find_mixtures, names_of_stacks
from pyda8w4.torch._module import DA8W4Linear
from pyda8w4.torch._names import Names
from pyda8w4.torch._parts import Floats, Part, is_quantized, packed_part
from pyda8w4.torch._quantize import Progress, plain_linear
from pyda8w4.torch._readers import weight_readers


class Filling:
    """Gives an empty model the packed layers of a checkpoint.

    Parameters
    ----------
    checkpoint : Checkpoint
        Where weights come from.
    parts : mapping of str to Part
        What it has for the tensors of the model, by the names that these have in checkpoints of transformers.
    act : str
        How layers quantize activations.
    requantize : bool
        Whether matrices are quantized again where they cannot be packed exactly.

    Attributes
    ----------
    state : dict
        What `from_pretrained` takes as the state dict: the tensors of packed layers, and floats, which are read
        when they are loaded.
    """

    def __init__(self, checkpoint: Checkpoint, parts: Mapping[str, Part], act: str, requantize: bool) -> None:
        self.state: dict[str, Any] = {}
        self._checkpoint, self._parts, self._act, self._requantize = checkpoint, dict(parts), act, requantize

    def __call__(self, model: Any) -> tuple[dict[str, nn.Module], set[str]]:
        """Packed layers by the names of the modules that they replace; names of all tensors that stay float."""
        own = {name: module for name, module in model.named_modules() if is_experts(module)}
        names = Names(model, names_of_stacks(own))
        mixtures = self._mixtures(find_mixtures(self._parts, own, names))
        taken = {key for mixture in mixtures for key in mixture.keys}
        places = self._places(model, names, mixtures, taken)
        packed: dict[str, nn.Module] = {}
        progress = Progress("from_checkpoint", len(places) + len(mixtures))
        for key, name in places.items():
            progress.step()
            self._add(name, self._layer(key, name, model.get_submodule(name)), packed)
        for mixture in mixtures:
            progress.step()
            self._add(mixture.name, mixture.packed(self._checkpoint, self._act, self._requantize), packed)
        progress.end()
        taken |= {*places, *(_bias_of(key) for key in places)}
        floats = {key: part for key, part in self._parts.items() if key not in taken}
        self.state |= {key: Floats(self._checkpoint, part) for key, part in floats.items()}
        return packed, set(map(names, floats))

    def _add(self, name: str, layer: nn.Module, packed: dict[str, nn.Module]) -> None:
        packed[name] = layer
        self.state |= {f"{name}.{buffer}": tensor for buffer, tensor in layer.state_dict().items()}

    def _mixtures(self, found: Mapping[str, FoundMixture]) -> list[FoundMixture]:
        """Those that are quantized. Of the others, stacks that the model has in one are joined as they are loaded."""
        mixtures = []
        for mixture in found.values():
            if any(is_quantized(self._checkpoint, name) for name in mixture.tensors):
                mixtures.append(mixture)
                continue
            if apart := mixture.stacks_apart:
                for key in mixture.keys:
                    del self._parts[key]
                self._parts |= {name: Part(first, more=tuple(more)) for name, (first, *more) in apart.items()}
        return mixtures

    def _places(
        self, model: Any, names: Names, mixtures: Sequence[FoundMixture], taken: Container[str]
    ) -> dict[str, str]:
        """Parts that are packed, and the names of the modules whose weights they are. All is checked before."""
        own, readers = model.state_dict(), weight_readers(model)
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        places, refused = {}, []
        for key, part in self._parts.items():
            name, joined = names.find(key)
            module = model.get_submodule(name.rpartition(".")[0]) if name in own else None
            layer = self._checkpoint._layers[part.name]
            if layer.refusal is not None and layer.floats is None:  # and so of no known shape
                refused.append(part.name)
                continue
            if key in taken:
                if layer.refused and not self._requantize:
                    refused.append(part.name)
                continue
            if name in own and not joined:
                self._check_shape(name, part, module, own[name])
            if not is_quantized(self._checkpoint, part.name) or any(re.search(pattern, name) for pattern in ignored):
                continue
            if joined:
                raise self._refused(f"{part.name} is quantized: it cannot be cut or joined, which {name} needs")
            if name not in own:
                raise self._refused(f"{part.name} is in no {type(model).__name__}")
            if name.endswith(".weight") and _can_be_packed(module) and id(module) not in readers:
                places[key] = name.removesuffix(".weight")
                if layer.read is None and not self._requantize:
                    refused.append(part.name)
        if refused:
            first, *more = refused
            layer = self._checkpoint._layers[first]
            hint = "" if layer.floats is None else "; requantize=True quantizes it again"
            others = f" (and {len(more)} more such as {more[0]})" if more else ""
            raise self._refused(f"{first}{others} cannot be packed exactly: {layer.refusal}{hint}")
        for mixture in mixtures:
            try:
                mixture.check(self._checkpoint)
            except ValueError as error:
                raise self._refused(str(error)) from None
        return places

    def _check_shape(self, name: str, part: Part, module: Any, tensor: torch.Tensor) -> None:
        wanted, found = tuple(tensor.shape), self._checkpoint.shapes[part.name]
        for more in part.more:
            e, n, *k = self._checkpoint.shapes[more]
            found = (found[0], found[1] + n, *found[2:]) if (e, *k) == (found[0], *found[2:]) else ()
        if part.is_row:
            found = (1, *found)
        if isinstance(module, Conv1D) and name.endswith(".weight") and is_quantized(self._checkpoint, part.name):
            wanted = wanted[::-1]  # it has the transposed matrix
        if part.rows is not None:
            found = (len(np.arange(found[0])[part.rows]), *found[1:])
        if wanted != found:
            raise self._refused(f"{name} is {wanted} by the config of the model, {found} in the checkpoint")

    def _layer(self, key: str, name: str, module: Any) -> PackedLayer:
        bias = self._parts.get(_bias_of(key))
        if bias is None and getattr(module, "bias", None) is not None:
            raise self._refused(f"{name} must have a bias, got none")
        packed = packed_part(self._checkpoint, self._parts[key], self._requantize)
        numbers = None if bias is None else Floats(self._checkpoint, bias)[...]
        if bias is not None and numbers is not None and numbers.shape != packed.shape[:1]:
            raise self._refused(f"{bias.name} must be of shape {packed.shape[:1]}, got {tuple(numbers.shape)}")
        return packed_layer(module, packed, numbers, self._act)

    def _refused(self, why: str) -> ValueError:
        return ValueError(f"{self._checkpoint.path}: {why}")


# ---- modules ---------------------------------------------------------------------------------


def packed_layer(module: Any, packed: PackedWeight, bias: torch.Tensor | None, act: str) -> PackedLayer:
    """What takes the place of a float module."""
    dtype = module.weight.dtype
    if isinstance(module, nn.Embedding):
        return DA8W4Embedding.from_packed(packed, scale=scale_of(module), dtype=dtype)
    return DA8W4Linear.from_packed(packed, bias, act=act, dtype=dtype)


def tied_layer(module: Any, other: PackedLayer, act: str) -> PackedLayer:
    """The same with the weight of another packed layer, in its memory."""
    layer = packed_layer(module, other.packed, None, act)
    layer.share_tensors(other)
    return layer


def scale_of(embedding: nn.Embedding) -> float | None:
    """What the embeddings of the Gemma family multiply by."""
    scale = getattr(embedding, "scalar_embed_scale", None)
    return None if scale is None else float(scale)


def check_sizes(name: str, module: Any, shape: tuple[int, int]) -> None:
    """Raise ValueError unless a weight of this shape is that of the module."""
    weight = module.weight if isinstance(module, nn.Embedding) else plain_linear(module).weight
    if tuple(weight.shape) != shape:
        raise ValueError(f"{name} is {tuple(weight.shape)} by the config of the model, {shape} in the checkpoint")


def _can_be_packed(module: nn.Module | None) -> bool:
    if isinstance(module, nn.Embedding):
        return type(module) is nn.Embedding or hasattr(module, "scalar_embed_scale")
    return type(module) in (nn.Linear, Conv1D)


def _bias_of(key: str) -> str:
    return key.removesuffix("weight") + "bias"
