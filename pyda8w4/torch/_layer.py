"""What layers with a packed weight have in common: its tensors, and how they move, load and are saved."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import numpy.typing as npt
import torch
from torch import nn
from torch.autograd import forward_ad

from pyda8w4._core import Places
from pyda8w4._format import ARRAYS
from pyda8w4._packed import Packed, PackedWeight
from pyda8w4.torch._ops import Product, check_arrays
from pyda8w4.torch._state import check_found, format_of, tensors_of
from pyda8w4.torch._tensors import FLOATS, aligned_copy, array_of, tensor_of
from pyda8w4.torch._weight import WeightStandIn

# Looked up once: a small product waits for them.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_tracing = torch._C._is_tracing
_transform = torch._C._functorch.peek_interpreter_stack
_is_profiling = torch._C._autograd._profiler_enabled
_Tensor = torch.Tensor

is_compiling = torch.compiler.is_dynamo_compiling  # other compilers are seen by the type of their tensors


class PackedLayer(nn.Module):
    """A module whose buffers are a packed weight of N rows, or several that are alike, and perhaps a bias."""

    layout: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    sums: torch.Tensor
    zps: torch.Tensor
    bias: torch.Tensor | None
    _layout: list[int]  # `layout`, for graphs: while they are traced, tensors hold no numbers
    _last_product: Any = None
    _weight: WeightStandIn

    def set_tensors(self, tensors: Mapping[str, torch.Tensor | None], dtype: torch.dtype | None) -> None:
        """Take the tensors of a weight, which has N and K of this layer.

        Parameters
        ----------
        tensors : mapping of str to tensor
            Those of `tensors_of`.
        dtype : torch.dtype or None
            What `weight` says; None means torch's default.
        """
        codes = tensors["codes"]
        assert codes is not None
        if codes.device.type not in ("cpu", "meta"):
            raise ValueError(f"device must be cpu or meta, got {codes.device.type}")
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._layout = self.layout.tolist()
        if dtype is None:
            dtype = torch.get_default_dtype() if torch.get_default_dtype() in FLOATS else torch.float32
        self._set_weight(dtype)

    def _set_packed(self, packed: Packed, dtype: torch.dtype | None) -> None:
        """Take the arrays of a weight, which has N and K of this layer."""
        format = packed._format
        arrays = {name: tensor_of(packed._arrays[name], spec.type) for name, spec in format.arrays.items()}
        self.set_tensors(tensors_of(format, arrays), dtype)

    def share_tensors(self, other: PackedLayer) -> None:
        """Take the tensors of another layer in the place of equal ones: one weight in memory, whoever moves it.

        Parameters
        ----------
        other : PackedLayer
            With the same weight.
        """
        self._buffers.update({name: tensor for name, tensor in other._buffers.items() if name != "bias"})

    def _set_weight(self, dtype: torch.dtype) -> None:
        if dtype not in FLOATS:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        _, n, k, *_ = self._layout
        self._weight = WeightStandIn((*self.codes.shape[:-3], n, k), dtype, self.codes.device)

    @property
    def weight(self) -> torch.Tensor:
        """What stands for the float weight: dtype, device and shape."""
        # Loaders put tensors in one by one, on another device. Compilers cannot make a new stand-in.
        if not torch.compiler.is_compiling() and self._weight.device != self.codes.device:
            self._set_weight(self._weight.dtype)
        return self._weight

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter, as assigning one does; as `weight` none is taken.

        Parameters
        ----------
        name : str
            Of the attribute.
        param : torch.nn.Parameter or None
            As `weight`, it must have the shape of the weight: the layer keeps its packed one, and warns.

        Raises
        ------
        ValueError
            If a `weight` has another shape.
        """
        if name != "weight" or param is None:
            super().register_parameter(name, param)
            return
        shape = tuple(self._weight.shape)
        if param.shape != shape:
            raise ValueError(
                f"weight must have shape {shape}, got {tuple(param.shape)}; a layer is resized before it is quantized"
            )
        # As code does that ties an output head to an embedding.
        kind = type(self).__name__
        warnings.warn(f"a {kind} keeps its packed weight; the one that was assigned is not used", stacklevel=3)

    @property
    def group_size(self) -> int:
        """Weights of consecutive input features that share a scale."""
        return self._layout[3] if is_compiling() else int(self.layout[3])

    @property
    def packed(self) -> PackedWeight:
        """The weight as numpy functions take it; shares the layer's memory."""
        memory = self._product().memory
        return PackedWeight._from_arrays(memory.format, memory.numpy())

    def _product(self) -> LayerProduct:
        """Of the tensors that the layer has now. Whoever put them there, here they are seen to fit each other."""
        product: LayerProduct | None = self._last_product
        if product is None or not product.memory.is_of(self._buffers):
            self._layout = self.layout.tolist()
            product = self._last_product = LayerProduct(LayerMemory(self._buffers, self._layout))
        return product

    def _describe_weight(self) -> str:
        bits = "" if self.layout.numel() == 4 else f", bits={self.layout[4]}"
        return f"{bits}, group_size={self.group_size}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last_product": None}

    def __prepare_scriptable__(self) -> nn.Module:
        refuse_script(self)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLayer:
        # What `.to`, `.half()`, `share_memory` and others do to every tensor, done to bytes: moves them, and
        # finds no floats to convert.
        self._last_product = None  # which keeps tensors alive
        for name, old in self._buffers.items():
            if old is None or name == "layout":  # which is on the CPU always
                continue
            old_bytes = old.reshape(-1).view(torch.uint8)
            new_bytes = fn(old_bytes)
            if new_bytes.device.type not in ("cpu", "meta"):
                raise ValueError(f"a {type(self).__name__} runs on the CPU only, cannot be moved to {new_bytes.device}")
            if new_bytes is not old_bytes and new_bytes.dtype is torch.uint8:
                self._buffers[name] = new_bytes.view(old.dtype).reshape(old.shape)
        dtype = fn(torch.empty(0, dtype=self._weight.dtype, device="cpu")).dtype
        if dtype in FLOATS:
            self._set_weight(dtype)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = ("layout", *ARRAYS, "bias")
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        try:
            layout = check_found(found, self._buffers)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}{error}")
            return
        wanted = ["layout", *layout.names] + ["bias"] * (self._buffers.get("bias") is not None)
        taken = {*wanted, *layout.optional}
        if strict:
            missing_keys += [prefix + name for name in wanted if name not in found]
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in taken]
        if "layout" in found:  # the weight is what that says, not what it was
            self._buffers.update({name: None for name in ARRAYS if name not in layout.names})
        for name in found.keys() & taken:
            new = found[name].detach()
            self._buffers[name] = new if local_metadata.get("assign_to_params_buffers") else aligned_copy(new)
        self._layout = self.layout.tolist()
        self._set_weight(self._weight.dtype)


class _Columns(NamedTuple):
    """Some blocks of a layer."""

    product: Product
    arrays: dict[str, torch.Tensor]
    bias: torch.Tensor | None
    within: slice | None  # which of their outputs are wanted; None means all


class LayerMemory:
    """The buffers of a layer, which are seen to fit each other, and where in memory they were then."""

    __slots__ = ("_one_zero_point", "_places", "arrays", "bias", "format")

    def __init__(self, buffers: Mapping[str, Any], layout: list[int]) -> None:
        self.format, self.bias = format_of(layout, buffers), buffers.get("bias")
        check_arrays(self.format, buffers, self.bias)
        self.arrays: dict[str, torch.Tensor] = {name: buffers[name] for name in self.format.arrays}
        self.format.check_values(self.numpy())
        self._one_zero_point = None if "zps" in self.arrays else buffers["zps"]
        read = [*self.arrays.values(), *([] if self.bias is None else [self.bias])]
        self._places = Places(buffers.values(), read)

    def numpy(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays, in the same memory."""
        return {name: array_of(tensor) for name, tensor in self.arrays.items()}

    def is_of(self, buffers: Mapping[str, torch.Tensor | None]) -> bool:
        """Whether these are the same tensors in the same memory.

        A tensor can be given other memory (``tensor.data = other``), and what it had can become part of another.
        """
        return self._places.are(buffers.values()) and (
            self._one_zero_point is None or self._one_zero_point.item() == self.format.zero_point
        )


class LayerProduct(Product):
    """The product of a layer's buffers."""

    __slots__ = ("_columns", "memory")

    def __init__(self, memory: LayerMemory) -> None:
        super().__init__(memory.format, memory.arrays, memory.bias)
        self.memory = memory
        self._columns: dict[tuple[int, int], _Columns] = {}

    def columns(self, begin: int, end: int) -> _Columns:
        """Of the blocks that have these outputs."""
        part = self._columns.get((begin, end))
        if part is None:
            first, last = self.format.blocks_around(begin, end)
            format, arrays = self.format.slice(first, last, self.memory.arrays)
            bias = None if self.memory.bias is None else self.memory.bias[first:last]
            within = None if (first, last) == (begin, end) else slice(begin - first, end - first)
            part = self._columns[begin, end] = _Columns(Product(format, arrays, bias), arrays, bias, within)
        return part


def needs_operator(input: torch.Tensor) -> bool:
    """Whether torch must see the call: tracers, profilers, modes, transforms, subclasses, forward mode, negation."""
    if type(input) is not _Tensor:
        if not hasattr(input, "__torch_function__"):
            raise TypeError(f"input must be a tensor, got {type(input).__name__}; torch.as_tensor(input) makes one")
        return True
    return (
        _dispatch_modes() > 0
        or _is_tracing()
        or _is_profiling()
        or _transform() is not None
        or forward_ad._current_level >= 0
        or input.is_neg()
    )


def refuse_script(layer: nn.Module) -> NoReturn:
    raise NotImplementedError(
        f"torch.jit.script has no {type(layer).__name__}; use torch.compile, torch.export or torch.jit.trace"
    )
