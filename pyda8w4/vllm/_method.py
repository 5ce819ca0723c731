"""What serves a layer that holds one weight, from the parts that vLLM's models give it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from pyda8w4._concat import concat
from pyda8w4._packed import PackedWeight
from pyda8w4.torch._module import pack_floats
from pyda8w4.vllm._options import Options
from pyda8w4.vllm._stored import Stored


class Cut:
    """Which part of a matrix a rank has.

    Parameters
    ----------
    rows : slice
        Its output features.
    index, count : int
        Which of how many equal parts of the input features.
    """

    def __init__(self, rows: slice, index: int, count: int) -> None:
        self.rows, self.index, self.count = rows, index, count

    def of_packed(self, packed: PackedWeight) -> PackedWeight:
        """Cut a packed weight. Rows that begin and end at blocks share its memory."""
        begin, end, _ = self.rows.indices(packed.shape[0])
        if (begin, end) != (0, packed.shape[0]):
            packed = packed._rows(begin, end)
        return packed if self.count == 1 else packed.shard(self.index, self.count, axis=1)

    def of_floats(self, floats: torch.Tensor, options: Options) -> PackedWeight:
        """Quantize the rank's part, which has the groups of the whole."""
        k = floats.shape[1] // self.count
        if self.count > 1 and k % options.group_size:
            raise ValueError(f"group_size must divide the {k} input features of a rank, got {options.group_size}")
        part = floats[self.rows, self.index * k : (self.index + 1) * k]
        return pack_floats(part, options.rounding)


class Sizes(NamedTuple):
    """Of the weight of a layer, as vLLM gives them."""

    k: int  # of this rank
    parts: list[int]  # output features of each part, of this rank
    input_size: int
    output_size: int
    dtype: torch.dtype


class WeightMethod(QuantizeMethodBase):
    """Packs what a layer is given; a layer that is given floats stays float, unless it is to be quantized.

    Parameters
    ----------
    options : Options
        How.
    prefix : str
        The layer's name.
    quantizes : bool
        Whether floats are quantized.
    """

    def __init__(self, options: Options, prefix: str, quantizes: bool) -> None:
        self.options, self.prefix, self._quantizes = options, prefix, quantizes
        self._given: list[tuple[Stored, tuple[Any, ...], dict[str, Any]]] = []
        self._packed: dict[int, PackedWeight] = {}
        self._float: QuantizeMethodBase | None = None

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **more: Any,
    ) -> None:
        """Give the layer a parameter without memory, for models to load."""
        self._sizes = Sizes(input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype)
        self._more = more
        shape = sum(output_partition_sizes), input_size_per_partition
        weight = nn.Parameter(torch.empty(shape, dtype=params_dtype, device="meta"), requires_grad=False)
        weight.weight_loader = partial(self._load, layer)
        layer.register_parameter("weight", weight)

    def _load(self, layer: nn.Module, param: object, loaded: torch.Tensor, *shard: Any, **named: Any) -> None:
        """Take part of the weight: `shard` says which, in the words of the layer's own loader."""
        if self._float is None and not isinstance(loaded, Stored) and not self._quantizes:
            self._stay_float(layer)
        if self._float is not None:
            layer.weight.weight_loader(layer.weight, loaded, *shard, **named)
            return
        if isinstance(loaded, Stored):
            self._given.append((loaded, shard, named))
        with naming(self.prefix, loaded):
            self._packed |= self._pack(layer, loaded, *shard, *named.values())

    def _pack(self, layer: nn.Module, loaded: torch.Tensor, *shard: Any) -> dict[int, PackedWeight]:
        """The parts of the weight that are given, by their numbers: those of this rank."""
        raise NotImplementedError

    def _float_method(self) -> QuantizeMethodBase:
        raise NotImplementedError

    def _stay_float(self, layer: nn.Module) -> None:
        """As vLLM has it: also for what was given before."""
        del layer.weight
        self._float = self._float_method()
        self._float.create_weights(layer, *self._sizes, **self._more)
        layer.update_param_tp_status()
        for loaded, shard, named in self._given:
            layer.weight.weight_loader(layer.weight, loaded, *shard, **named)
        self._given, self._packed = [], {}

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Make products of what was loaded."""
        if self._float is not None:
            layer.quant_method = self._float
            self._float.process_weights_after_loading(layer)
            return
        if not self._packed:
            raise ValueError(f"{self.prefix}: its weight is not in the checkpoint")
        self._finish(layer, [self._packed[number] for number in sorted(self._packed)])
        self._given, self._packed = [], {}
        layer.weight = nn.Parameter(layer.weight.new_empty(0, device="cpu"), requires_grad=False)

    def _finish(self, layer: nn.Module, packed: Sequence[PackedWeight]) -> None:
        raise NotImplementedError


@contextmanager
def naming(where: str, loaded: torch.Tensor) -> Iterator[None]:
    """Have errors say of what layer, and of what weight of the checkpoint."""
    try:
        yield
    except ValueError as error:
        name = f", {loaded.source.name} of the checkpoint" if isinstance(loaded, Stored) else ""
        raise ValueError(f"{where}{name}: {error}") from None


def packed_of(loaded: torch.Tensor, options: Options) -> Callable[[Cut], PackedWeight]:
    """What gives parts of a matrix: of floats, or of a weight in the checkpoint, which is read once."""
    if not isinstance(loaded, Stored):
        return lambda cut: cut.of_floats(loaded, options)
    place = loaded.matrix()
    if place is None:
        raise ValueError("the model changes the weight as it is loaded, in a way that packed weights cannot be changed")
    index, rows = place
    packed = Cut(rows, 0, 1).of_packed(loaded.source.packed(index))
    return lambda cut: cut.of_packed(packed)


def joined(packed: Sequence[PackedWeight]) -> list[PackedWeight]:
    """One weight if they can be one product: Q4_K_M files have matrices of several kinds in a layer."""
    if len(packed) == 1:
        return list(packed)
    try:
        return [concat(packed)]
    except ValueError:
        return list(packed)
