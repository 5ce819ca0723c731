"""Packed layers of which each process has a part: transformers' tensor parallelism.

The plan of a model gives its modules styles. Outputs of a layer whose N is cut are parts of those of the whole, bit for
bit. Where K is cut, each process has a term of the outputs, and these are added up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from pyda8w4._concat import concat
from pyda8w4._experts import PackedExperts, stack
from pyda8w4._format import check_group_size
from pyda8w4._packed import PackedWeight
from pyda8w4._quantize import Rounding
from pyda8w4.torch._embedding import DA8W4Embedding
from pyda8w4.torch._experts import DA8W4Experts
from pyda8w4.torch._float_experts import float_experts, is_experts
from pyda8w4.torch._layer import PackedLayer
from pyda8w4.torch._module import DA8W4Linear
from pyda8w4.torch._quantize import Report, chooser, layers_of, replace_layers

# What styles do with a Linear: whether outputs are gathered, whether inputs come whole.
_CUT_N = {"colwise": False, "colwise_gather_output": True, "colwise_rep": True}
_CUT_K = {"rowwise": False, "rowwise_split_input": True, "rowwise_rep": True}
# What they do with gradients has no meaning for packed layers.
_WHOLE = (None, "replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj")
_EMBEDDING, _EXPERTS = "embedding_rowwise", "moe_tp_experts"


@dataclass(frozen=True)
class Ranks:
    """Processes that have a model in common."""

    index: int  # of this one
    count: int
    group: Any

    def __deepcopy__(self, memo: object) -> Ranks:  # a group is no data
        return self

    def add(self, out: torch.Tensor) -> torch.Tensor:
        """The sum of what all have."""
        dist.all_reduce(out, group=self.group)
        return out

    def gather(self, out: torch.Tensor) -> torch.Tensor:
        """What all have, side by side."""
        parts = [torch.empty_like(out) for _ in range(self.count)]
        dist.all_gather(parts, out, group=self.group)
        return torch.cat(parts, -1)


class GatheringLinear(DA8W4Linear):
    """Some outputs of a layer, for a call that wants all."""

    ranks: Ranks

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """See `DA8W4Linear`."""
        return self.ranks.gather(super().forward(input))


class AddingLinear(DA8W4Linear):
    """Some inputs of a layer. One process has the bias."""

    ranks: Ranks
    takes_all: bool  # whether it is called with all inputs

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """See `DA8W4Linear`."""
        if self.takes_all:
            begin = self.in_features * self.ranks.index
            input = input[..., begin : begin + self.in_features]
        return self.ranks.add(super().forward(input))


class AddingEmbedding(DA8W4Embedding):
    """Some rows of an embedding. The other processes add zeros to them."""

    ranks: Ranks

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """See `DA8W4Embedding`."""
        count = self.num_embeddings
        begin = count * self.ranks.index
        others = ((input >= 0) & (input < begin)) | ((input >= begin + count) & (input < count * self.ranks.count))
        rows = super().forward(torch.where(others, 0, input - begin))
        return self.ranks.add(torch.where(others[..., None], 0, rows))


class AddingExperts(DA8W4Experts):
    """Some gates and ups of each expert, and the inputs of down that these make. One process has the bias of down."""

    ranks: Ranks

    def forward(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """See `DA8W4Experts`."""
        return self.ranks.add(super().forward(*arguments, **options))


class TensorParallel:
    """How transformers divides a model that it loads.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With its weights.
    """

    def __init__(self, model: Any) -> None:
        mesh = model._mesh_manager.get_mesh("tp")
        self._ranks = Ranks(mesh.get_local_rank(), mesh.size(), mesh.get_group())
        self._plan: dict[str, str] = model.tp_plan
        self._shards: dict[tuple[int, int], PackedWeight] = {}  # layers that share a weight share its part

    def cut(self, model: nn.Module) -> None:
        """Put parts in the place of packed layers that are whole."""
        for name, layer in list(model.named_modules(remove_duplicate=False)):
            if isinstance(layer, (DA8W4Linear, DA8W4Embedding, DA8W4Experts)):
                style = self._style(name)
                with _naming(name, style):
                    part = layer if style in _WHOLE else self._part(layer, style)
                part.__dict__.pop("forward", None)  # of transformers, for float layers
                model.set_submodule(name, part.train(layer.training))

    def replace_layers(
        self,
        model: nn.Module,
        rounding: Rounding,
        act: str,
        keep: Callable[[nn.Module, str], str | None],
    ) -> Report:
        """As the function of this name, where each process has loaded its part of the float weights."""
        names = layers_of(model)
        # Of the hooks of transformers the layers that are replaced need none, and their floats are let go of.
        hooks = {name: vars(model.get_submodule(name)).pop("forward", None) for name in names if self._style(name)}
        reason_of = chooser(model, keep)
        reasons = {name: reason_of(model.get_submodule(name), name) for name in names}
        for name, reason in reasons.items():
            module, hook = model.get_submodule(name), hooks.pop(name, None)
            if reason is None:
                with _naming(name, self._style(name)):
                    self._take_local(module, self._style(name), rounding.group_size)
            elif hook is not None:
                module.forward = hook
        del module, hook
        report = replace_layers(model, rounding, act, lambda _, name: reasons[name])
        for name, why in report.kept.items():
            if reasons[name] is None:  # other processes may have packed their parts
                raise ValueError(f"{name} cannot be quantized: {why}")
        for name in report.replaced:
            layer: Any = model.get_submodule(name)
            model.set_submodule(name, self._calling(layer, self._style(name)).train(layer.training))
        return report

    def _style(self, name: str) -> str | None:
        """What the plan has for a module, or for its parameters only."""
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        parameters = (f"{style} of {key}" for key, style in self._plan.items() if key.startswith(f"{pattern}."))
        return self._plan.get(pattern) or next(parameters, None)

    def _part(self, layer: Any, style: str | None) -> nn.Module:
        """Of a packed layer, what this process multiplies."""
        bias, ranks = getattr(layer, "bias", None), self._ranks
        part: nn.Module
        if isinstance(layer, DA8W4Experts) and style == _EXPERTS:
            part = _part_of_experts(layer, ranks.index, ranks.count)
        elif isinstance(layer, DA8W4Embedding) and style == _EMBEDDING:
            part = DA8W4Embedding.from_packed(self._shard(layer, 0), scale=layer.scale, dtype=layer.weight.dtype)
        elif isinstance(layer, DA8W4Linear) and style in (*_CUT_N, *_CUT_K):
            packed = self._shard(layer, 0 if style in _CUT_N else 1)
            if bias is not None and style in _CUT_N:
                bias = bias.chunk(ranks.count)[ranks.index]
            part = DA8W4Linear.from_packed(packed, bias, act=layer.act, dtype=layer.weight.dtype)
        else:
            raise ValueError(f"a {type(layer).__name__} has no such parts")
        return self._calling(part, style)

    def _shard(self, layer: PackedLayer, axis: int) -> PackedWeight:
        key = layer.codes.data_ptr(), axis
        if key not in self._shards:
            self._shards[key] = layer.packed.shard(self._ranks.index, self._ranks.count, axis)
        return self._shards[key]

    def _take_local(self, module: Any, style: str | None, group_size: int) -> None:
        """Have a float layer as what this process has of its parameters."""
        count = self._ranks.count
        k = None  # where it is cut
        if is_experts(module) and style == _EXPERTS:
            k = int(float_experts(module).down.shape[-1])
        elif isinstance(module, nn.Linear) and style in _CUT_N:
            if module.weight.shape[0] % count:
                raise ValueError(f"N must be a multiple of {count}, got {module.weight.shape[0]}")
        elif isinstance(module, nn.Linear) and style in _CUT_K:
            k = module.weight.shape[1]
        elif style not in _WHOLE:
            raise ValueError(f"a {type(module).__name__} has no such parts")
        if k is not None and k % (count * check_group_size(group_size, k)):
            raise ValueError(f"K = {k} must be {count} times a multiple of group_size, got {group_size}")
        for key, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                module._parameters[key] = nn.Parameter(parameter.to_local(), requires_grad=False)
        if is_experts(module) and k is not None and float_experts(module).down.shape[-1] != k // count:
            raise ValueError("tp_plan does not cut its parameters")

    def _calling(self, part: Any, style: Any) -> nn.Module:
        """What is called in the place of the whole, of a part which has the whole bias where K is cut."""
        if style in _WHOLE or _CUT_N.get(style) is False:
            return part
        first = self._ranks.index == 0
        part.ranks = self._ranks
        if style == _EXPERTS:
            part.__class__ = AddingExperts
            if part.down.bias is not None and not first:
                part.down.bias.zero_()
        elif style == _EMBEDDING:
            part.__class__ = AddingEmbedding
        elif style in _CUT_K:
            part.__class__, part.takes_all = AddingLinear, _CUT_K[style]
            part.bias = part.bias if first else None
        else:
            part.__class__ = GatheringLinear
        return part


def _part_of_experts(experts: DA8W4Experts, index: int, count: int) -> DA8W4Experts:
    """With the whole bias of down."""
    halves = 1 if experts.interleaved else 2
    gate_up = stack(_GatesAndUps(experts.gate_up.packed, index, count, halves))
    bias = experts.gate_up.bias
    if bias is not None:
        bias = torch.cat([half.chunk(count, -1)[index] for half in bias.chunk(halves, -1)], -1)
    return DA8W4Experts.from_packed(
        gate_up, experts.down.packed.shard(index, count, 1), bias, experts.down.bias,
        **experts._gating._asdict(), act=experts.act, dtype=experts.down.weight.dtype,
    )  # fmt: skip


class _GatesAndUps:
    """Those of a part, of each expert when it is wanted."""

    def __init__(self, experts: PackedExperts, index: int, count: int, halves: int) -> None:
        self._experts, self._index, self._count, self._halves = experts, index, count, halves

    def __len__(self) -> int:
        return len(self._experts)

    def __iter__(self) -> Iterator[PackedWeight]:
        at = range(self._index, self._count * self._halves, self._count)
        return (concat([one.shard(i, self._count * self._halves, 0) for i in at]) for one in self._experts)


@contextmanager
def _naming(name: str, style: str | None) -> Iterator[None]:
    """Have errors say of what they are."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}, {style!r} in tp_plan, cannot be cut: {error}") from None
