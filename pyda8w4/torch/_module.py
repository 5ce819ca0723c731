"""The linear layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import nn

from pyda8w4._checks import BLOCK, QUAD, ceil_div, check_flag, check_group_size
from pyda8w4._files import LAYOUT_VERSION
from pyda8w4._packed import PackedWeight
from pyda8w4._prepack import prepack
from pyda8w4._quantize import quantize_weight
from pyda8w4.torch import _ops
from pyda8w4.torch._tensors import FLOATS, aligned_copy, array_of, check_float, tensor_of
from pyda8w4.torch._torchao import int4_of

# Looked up once: a small product waits for them.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_tracing = torch._C._is_tracing


class DA8W4Linear(nn.Module):
    """A linear layer with 4-bit weights and 8-bit activations: ``y = x @ weight.T + bias``.

    The constructor makes a layer of zeros, to load a state dict into. `from_linear`, `from_int4` and
    `from_packed` make layers with weights.

    Parameters
    ----------
    in_features, out_features : int
        At least 1.
    bias : bool
    group_size : int
        Weights of consecutive input features that share a scale: a multiple of 4, or `in_features`.
    symmetric_activation : bool
        Quantize activations to int8 instead of uint8 with a zero point.
    device : torch.device, optional
        ``"cpu"``, or ``"meta"`` for a layer without memory.

    Attributes
    ----------
    in_features, out_features, group_size : int
    symmetric_activation : bool
    packed : PackedWeight
        The weight, sharing memory with the layer.
    bias : (out_features,) tensor of float32, or None

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If a size is out of range.

    Notes
    -----
    For inference: it has buffers, no parameters, and its outputs have no gradient. Inputs may be float32,
    bfloat16 or float16, with any leading dimensions; outputs have the type of the input. The
    result is that of `pyda8w4.linear`, bit for bit. ``.to(dtype)`` leaves it as it is.

    The state dict holds plain tensors in the layout of docs/packed-format.md, the same for every CPU:
    ``layout`` (its version, N, K, group size), ``codes``, ``scales``, ``sums``, ``zps`` (of no dimensions where
    all zero points are the same), ``offsets`` where there are any, ``bias``. Groups, the type of the scales and the
    shape of the zero points may be others than those of the layer that loads them.

    Examples
    --------
    >>> import torch
    >>> from pyda8w4.torch import DA8W4Linear
    >>> layer = DA8W4Linear.from_linear(torch.nn.Linear(64, 32), group_size=32)
    >>> layer
    DA8W4Linear(in_features=64, out_features=32, bias=True, group_size=32)
    >>> layer(torch.ones(2, 3, 64, dtype=torch.bfloat16)).shape
    torch.Size([2, 3, 32])
    """

    layout: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    sums: torch.Tensor
    zps: torch.Tensor
    offsets: torch.Tensor | None
    bias: torch.Tensor | None
    _checked: tuple[tuple[torch.Tensor | None, ...], tuple[Any, ...]]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 128,
        symmetric_activation: bool = False,
        device: Any = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        self.in_features, self.out_features = in_features, out_features
        self.symmetric_activation = check_flag("symmetric_activation", symmetric_activation)
        group = check_group_size(group_size, in_features)
        blocks, groups = ceil_div(out_features, BLOCK), ceil_div(in_features, group)

        def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        sizes = [LAYOUT_VERSION, out_features, in_features, group]
        self.register_buffer("layout", torch.tensor(sizes, device="cpu"))  # never meta: it is read at once
        self.register_buffer("codes", zeros(torch.uint8, blocks, ceil_div(in_features, QUAD), 2 * BLOCK))
        self.register_buffer("scales", zeros(torch.float32, blocks, groups, BLOCK))
        self.register_buffer("sums", zeros(torch.float32, blocks, BLOCK))
        self.register_buffer("zps", zeros(torch.int8))
        self.register_buffer("offsets", None)
        self.register_buffer("bias", zeros(torch.float32, out_features) if bias else None)
        self._refresh()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        group_size: int = 128,
        symmetric_activation: bool = False,
        symmetric_weight: bool = False,
    ) -> DA8W4Linear:
        """Quantize a float layer.

        Parameters
        ----------
        linear : torch.nn.Linear
            On the CPU, of float32, bfloat16 or float16; not changed. An int4 weight of torchao is
            taken as it is, and says itself what its groups are.
        group_size, symmetric_weight
            See `pyda8w4.quantize_weight`.
        symmetric_activation : bool
            See the class.

        Raises
        ------
        TypeError
            If an argument has the wrong type.
        ValueError
            If the weight is not on the CPU or not finite, or `group_size` does not fit.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        weight, bias = linear.weight.detach(), linear.bias
        int4 = int4_of(weight)
        if int4 is not None:
            return cls.from_int4(**int4, bias=bias, symmetric_activation=symmetric_activation)
        check_float("weight", weight)
        n, k = weight.shape
        group = check_group_size(group_size, k)
        groups = ceil_div(k, group)
        codes, scales = np.empty((n, k), np.uint8), np.empty((n, groups), np.float32)
        zps = np.empty((n, groups), np.int8)
        rows = max(1, (1 << 22) // k)  # as float32 a few at a time: the weight may be of half the size
        for top in range(0, n, rows):
            part = slice(top, top + rows)
            floats = weight[part].float().numpy()
            codes[part], scales[part], zps[part] = quantize_weight(floats, group, symmetric_weight)
        return cls.from_packed(
            prepack(codes, scales, zps, group_size=group), bias, symmetric_activation=symmetric_activation
        )

    @classmethod
    def from_int4(
        cls,
        w_int4: torch.Tensor,
        scales: torch.Tensor,
        zps: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        *,
        offsets: torch.Tensor | None = None,
        group_size: int | None = None,
        symmetric_activation: bool = False,
    ) -> DA8W4Linear:
        """From int4 codes, scales and zero points: the arguments of `pyda8w4.prepack` as tensors.

        Examples
        --------
        >>> import torch
        >>> from pyda8w4.torch import DA8W4Linear
        >>> layer = DA8W4Linear.from_int4(torch.tensor([[1, -2, 3, -4]], dtype=torch.int8), torch.tensor([0.5]))
        >>> layer(torch.tensor([[0.0, 0.0, 255.0, 0.0]]))
        tensor([[382.5000]])
        """
        arrays: list[Any] = []
        for name, value in (("w_int4", w_int4), ("scales", scales), ("zps", zps), ("offsets", offsets)):
            if value is None and name in ("zps", "offsets"):
                arrays.append(None)
            elif isinstance(value, torch.Tensor):
                # In float32 halves are exact, and prepack finds the smallest type that holds them all.
                arrays.append(array_of(value.float() if value.is_floating_point() else value))
            else:
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        packed = prepack(*arrays, group_size=group_size)
        return cls.from_packed(packed, bias, symmetric_activation=symmetric_activation)

    @classmethod
    def from_packed(
        cls, packed: PackedWeight, bias: torch.Tensor | None = None, *, symmetric_activation: bool = False
    ) -> DA8W4Linear:
        """From a packed weight, without copying it.

        Parameters
        ----------
        packed : PackedWeight
        bias : (N,) tensor of float32, bfloat16 or float16, optional
        symmetric_activation : bool

        Raises
        ------
        TypeError
            If an argument has the wrong type.
        ValueError
            If `bias` has another shape or is not on the CPU.
        """
        if type(packed) is not PackedWeight:
            raise TypeError(f"packed must be a PackedWeight, got {type(packed).__name__}")
        n, k = packed.shape
        self = cls(k, n, False, group_size=packed.group_size, symmetric_activation=symmetric_activation, device="meta")
        for name, values in packed._arrays.items():
            self._buffers[name] = tensor_of(values, packed.scale_dtype == "bfloat16" and values.dtype == np.uint16)
        if packed.zero_point is not None:
            self.zps = torch.tensor(packed.zero_point, dtype=torch.int8)
        if bias is not None:
            check_float("bias", bias)
            if bias.shape != (n,):
                raise ValueError(f"bias must have shape ({n},), got {tuple(bias.shape)}")
            self.bias = bias.detach().to(torch.float32, copy=True)
        self._refresh()
        return self

    def sharing_weight(self, bias: torch.Tensor | None) -> DA8W4Linear:
        """Another layer with the same weight in the same memory."""
        new = DA8W4Linear.from_packed(self.packed, bias, symmetric_activation=self.symmetric_activation)
        new._buffers.update({name: old for name, old in self._buffers.items() if name != "bias"})
        new._refresh()
        return new

    @property
    def packed(self) -> PackedWeight:
        """The weight as numpy functions take it; shares the layer's memory."""
        self._refresh()
        _ops.check_weight(*self._arguments())
        shape = (self.out_features, self.in_features)
        arrays = {"codes": array_of(self.codes), "scales": array_of(self.scales), "sums": array_of(self.sums)}
        if self.zps.dim():
            arrays["zps"] = array_of(self.zps)
        if self.offsets is not None:
            arrays["offsets"] = array_of(self.offsets)
        zero_point = None if self.zps.dim() else int(self.zps)
        scale_dtype, *_ = FLOATS[self.scales.dtype]
        return PackedWeight._from_arrays(shape, self.group_size, scale_dtype, zero_point, **arrays)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or _needs_operator(input):
            return torch.ops.pyda8w4.linear(input, *self._arguments())
        checked, arguments = self._checked
        if not all(map(is_, checked, self._buffers.values())):
            self._refresh()
            arguments = self._arguments()
            _ops.check_weight(*arguments)
            self._checked = tuple(self._buffers.values()), arguments
        return _ops.multiply(input, *arguments)

    def columns(self, input: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Outputs `begin` to `end` only; multiples of 32, or the last."""
        blocks = slice(begin // BLOCK, ceil_div(end, BLOCK))
        *weight, bias, k, _, group_size, zero_point, symmetric = self._arguments()
        numbers = group_size, zero_point, symmetric
        weight = [None if part is None else part[blocks] for part in weight]
        bias = None if bias is None else bias[begin:end]
        return torch.ops.pyda8w4.linear(input, *weight, bias, k, end - begin, *numbers)

    def _arguments(self) -> tuple[Any, ...]:
        tensors = self._buffers
        zps = tensors["zps"] if self._zps_differ else None
        weight = tensors["codes"], tensors["scales"], tensors["sums"], zps, tensors["offsets"]
        return (*weight, tensors["bias"], *self._numbers)

    def _refresh(self) -> None:
        """Reads what the operator takes as numbers from the small tensors that hold them."""
        self._checked = (None,), ()  # tensors that are known to fit each other, and the arguments they make
        zps = self.zps
        self.group_size = int(self.layout[3])
        self._zps_differ = zps.dim() > 0
        zero_point = 0 if zps.is_meta or self._zps_differ else int(zps)
        self._numbers = (
            self.in_features, self.out_features, self.group_size, zero_point,
            self.symmetric_activation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
        text += f"group_size={self.group_size}"
        return text + ", symmetric_activation=True" if self.symmetric_activation else text

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> DA8W4Linear:
        # What `.to`, `.half()`, `share_memory` and others do to every tensor, done to bytes: moves them, and
        # finds no floats to convert.
        for name, old in self._buffers.items():
            if old is None:
                continue
            old_bytes = old.reshape(-1).view(torch.uint8)
            new_bytes = fn(old_bytes)
            if new_bytes.device.type not in ("cpu", "meta"):
                raise ValueError(f"a DA8W4Linear runs on the CPU only, cannot be moved to {new_bytes.device}")
            if new_bytes is not old_bytes and new_bytes.dtype is torch.uint8:
                self._buffers[name] = new_bytes.view(old.dtype).reshape(old.shape)
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
        wanted = ["layout", "codes", "scales", "sums", "zps"] + ["bias"] * (self.bias is not None)
        names = [*wanted, "offsets"]
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        missing_keys += [prefix + name for name in wanted if name not in found] if strict else []
        if strict:
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in names]
        group = self.group_size
        problems = {"layout": self._layout_problem(found["layout"])} if "layout" in found else {}
        if "layout" in found and not problems["layout"]:
            group = int(found["layout"][3])
        problems |= {name: self._problem(name, new, group) for name, new in found.items() if name != "layout"}
        errors = [f"{prefix}{name} {problem}" for name, problem in problems.items() if problem]
        error_msgs += errors
        if errors:
            return
        if "layout" in found:
            self.offsets = None
        for name, new in found.items():
            new = new.detach()
            self._buffers[name] = new if local_metadata.get("assign_to_params_buffers") else aligned_copy(new)
        self._refresh()

    def _layout_problem(self, new: Any) -> str | None:
        wanted = [LAYOUT_VERSION, self.out_features, self.in_features]
        if not isinstance(new, torch.Tensor) or new.dtype is not torch.int64 or new.shape != (4,) or new.is_meta:
            return "must be 4 numbers of int64"
        *found, group = new.tolist()
        if found != wanted:
            return f"must begin with the layout version, out_features and in_features {wanted}, got {found}"
        if not 0 < group <= self.in_features or (group % QUAD and group != self.in_features):
            return f"must end with a group size, a multiple of 4 or {self.in_features}, got {group}"
        return None

    def _problem(self, name: str, new: Any, group: int) -> str | None:
        """Why a tensor of a state dict cannot be this layer's."""
        if not isinstance(new, torch.Tensor) or new.layout is not torch.strided or new.device.type != "cpu":
            return "must be a dense tensor on the CPU"
        types = tuple(FLOATS) if name in ("scales", "offsets") else (getattr(self, name).dtype,)
        if new.dtype not in types:
            return f"must be of {' or '.join(str(dtype) for dtype in types)}, got {new.dtype}"
        if name in ("codes", "sums", "bias"):
            shapes: list[tuple[int, ...]] = [getattr(self, name).shape]
        else:
            shapes = [(ceil_div(self.out_features, BLOCK), ceil_div(self.in_features, group), BLOCK)]
        if name == "zps":
            shapes.append(())
        if tuple(new.shape) not in shapes:
            return f"must have shape {' or '.join(str(tuple(shape)) for shape in shapes)}, got {tuple(new.shape)}"
        if name == "zps" and group * 128 * max(15 - int(new.min()), int(new.max())) >= 2**31:
            return f"has values too large for a group_size of {group}"
        return None


def _needs_operator(input: torch.Tensor) -> bool:
    """Whether torch must see the call: tracers, dispatch modes, subclasses, autograd, lazy negation."""
    return (
        type(input) is not torch.Tensor
        or (input.requires_grad and torch.is_grad_enabled())
        or _dispatch_modes() > 0
        or _is_tracing()
        or input.is_neg()
    )
