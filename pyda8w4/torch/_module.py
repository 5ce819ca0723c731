"""The linear layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from pyda8w4._checks import SCHEMES, check_flag, check_scheme
from pyda8w4._format import Format, check_group_size
from pyda8w4._layout import layout_of
from pyda8w4._packed import PackedWeight, check_packed
from pyda8w4._prepack import prepack
from pyda8w4._quantize import Rounding
from pyda8w4.torch._layer import PackedLayer, is_compiling, needs_operator
from pyda8w4.torch._ops import Arguments, arguments_of, slice_outputs
from pyda8w4.torch._state import zeros_of
from pyda8w4.torch._tensors import FLOATS, array_of, check_float
from pyda8w4.torch._torchao import int4_of

# Looked up once: a small product waits for it.
is_any_autocast_enabled: Callable[[], bool] = getattr(
    torch._C, "_is_any_autocast_enabled", partial(torch.is_autocast_enabled, "cpu")
)


class DA8W4Linear(PackedLayer):
    """A linear layer with weights of 4 to 8 bits and integer activations: ``y = x @ weight.T + bias``.

    The constructor makes a layer of zeros, to load a state dict into. `from_linear`, `from_int4` and
    `from_packed` make layers with weights.

    Parameters
    ----------
    in_features, out_features : int
        At least 1.
    bias : bool
        Whether to add one.
    group_size : int
        Weights of consecutive input features that share a scale: a multiple of 4, or `in_features`.
    act : {'uint8', 'int8', 'int8_group', 'int16'}
        How activations are quantized, see `pyda8w4.linear`. The weight is the same for all.
    device : torch.device, optional
        ``"cpu"``, or ``"meta"`` for a layer without memory.
    dtype : torch.dtype, optional
        What `weight` says: float32, bfloat16 or float16. None means torch's default.
    group_zero_points : bool
        Whether ``zps`` has a zero point for each group. `load_state_dict` takes every kind of weight; loaders that
        compare shapes (accelerate) need a layer with the shapes of the file.

    Attributes
    ----------
    in_features, out_features, group_size : int
    act : str
        May be set at any time: it says how the next input is quantized.
    packed : PackedWeight
        The weight, sharing memory with the layer.
    weight : (out_features, in_features) tensor
        Stands for the weight of a `torch.nn.Linear`: it says dtype, device and shape, and raises where its numbers are
        needed.
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
    result is that of `pyda8w4.linear`, bit for bit. ``.to(dtype)`` changes what `weight` says, and nothing else.

    The state dict holds plain tensors in the layout of docs/packed-format.md, the same for every CPU: ``layout``
    (its version, N, K, group size, and of weights that are not plain 4 bits what they are), ``codes``, ``scales``,
    ``sums``, ``zps`` (of no dimensions where all zero points are the same), ``bias``, and those of ``offsets``,
    ``sub_scales``, ``sub_offsets``, ``table``, ``perm`` and ``factors`` that the weight has. A layer loads every
    weight of its N and K, whatever it had before: the state decides. `act` is in no state.

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

    bias: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 128,
        act: str = "uint8",
        device: Any = None,
        dtype: torch.dtype | None = None,
        group_zero_points: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        self.in_features, self.out_features = in_features, out_features
        self.act = act
        group = check_group_size(group_size, in_features)
        zero_point = None if check_flag("group_zero_points", group_zero_points) else 0
        format = Format(out_features, in_features, group, "float32", zero_point, False)
        self.set_tensors(zeros_of(format, device), dtype)
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32, device=device) if bias else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        group_size: int = 128,
        act: str = "uint8",
        *,
        method: str = "search",
        zeros: str = "float",
        two_level: bool = False,
        rotate: int = 0,
    ) -> DA8W4Linear:
        """Quantize a float layer.

        Parameters
        ----------
        linear : torch.nn.Linear
            On the CPU, of float32, bfloat16 or float16; not changed. An int4 weight of torchao is
            taken as it is, and says itself what its groups are.
        group_size : int
            See `pyda8w4.quantize_weight`.
        act : str
            See the class.
        method : {'search', 'minmax'}
            See `pyda8w4.quantize_weight`.
        zeros : {'float', 'integer', 'none'}
            See there.
        two_level : bool
            See there.
        rotate : int
            See there.

        Returns
        -------
        DA8W4Linear
            With a weight and bias of its own.

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
            self = cls.from_int4(**int4, bias=bias, act=act)
            if weight.dtype in FLOATS:
                self._set_weight(weight.dtype)
            return self
        packed = pack_floats(weight, Rounding(group_size, method, zeros, two_level, rotate))
        return cls.from_packed(packed, bias, act=act, dtype=weight.dtype)

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
        act: str = "uint8",
    ) -> DA8W4Linear:
        """Pack int4 codes, scales and zero points: the arguments of `pyda8w4.prepack` as tensors.

        Parameters
        ----------
        w_int4 : (N, K) tensor of uint8 or int8
            One code per element.
        scales : (N, G) or (N,) tensor of floats
            One per group.
        zps : (N, G) or (N,) tensor of integers, optional
            Zero points; None means 8 for unsigned codes and 0 for signed ones.
        bias : (N,) tensor of float32, bfloat16 or float16, optional
            Copied.
        offsets : (N, G) or (N,) tensor of floats, optional
            One per group.
        group_size : int, optional
            Needed where the shapes do not say it.
        act : str
            See the class.

        Returns
        -------
        DA8W4Linear
            With a weight and bias of its own.

        Raises
        ------
        TypeError
            If an argument has the wrong type.
        ValueError
            If the tensors do not fit each other, or a value is out of range.

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
        return cls.from_packed(packed, bias, act=act)

    @classmethod
    def from_packed(
        cls,
        packed: PackedWeight,
        bias: torch.Tensor | None = None,
        *,
        act: str = "uint8",
        dtype: torch.dtype | None = None,
    ) -> DA8W4Linear:
        """Make a layer of a packed weight, without copying that.

        Parameters
        ----------
        packed : PackedWeight
            Its arrays become the layer's buffers.
        bias : (N,) tensor of float32, bfloat16 or float16, optional
            Copied.
        act : str
            See the class.
        dtype : torch.dtype, optional
            See the class.

        Returns
        -------
        DA8W4Linear
            In the memory of `packed`.

        Raises
        ------
        TypeError
            If an argument has the wrong type.
        ValueError
            If `bias` has another shape or is not on the CPU.
        """
        check_packed("packed", packed)
        n, k = packed.shape
        if bias is not None:
            check_float("bias", bias)
            if bias.shape != (n,):
                raise ValueError(f"bias must have shape ({n},), got {tuple(bias.shape)}")
            bias = bias.detach().to(torch.float32, copy=True)
        self = cls(k, n, False, act=act, device="meta", dtype=dtype)
        self._set_packed(packed, self._weight.dtype)
        self.bias = bias
        return self

    def sharing_weight(self, bias: torch.Tensor | None) -> DA8W4Linear:
        """Make another layer with the same weight in the same tensors.

        Parameters
        ----------
        bias : (out_features,) tensor of float32, bfloat16 or float16, or None
            Copied.

        Returns
        -------
        DA8W4Linear
            Like this one but for the bias.
        """
        new = DA8W4Linear.from_packed(self.packed, bias, act=self.act, dtype=self.weight.dtype)
        new.share_tensors(self)
        return new

    @property
    def act(self) -> str:
        """How activations are quantized."""
        return self._act

    @act.setter
    def act(self, act: str) -> None:
        self._act = check_scheme("act", act, tuple(SCHEMES))
        self._scheme = SCHEMES[act]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply.

        Parameters
        ----------
        input : (..., in_features) tensor of float32, bfloat16 or float16
            All dimensions but the last are rows.

        Returns
        -------
        (..., out_features) tensor
            Of the type of `input`.

        Raises
        ------
        TypeError
            If `input` has another type.
        ValueError
            If it has another shape or is not on the CPU, or the buffers of the layer do not fit each other.
        """
        if is_any_autocast_enabled():
            input = autocast(input)
        if is_compiling() or needs_operator(input) or (input.requires_grad and torch.is_grad_enabled()):
            out: torch.Tensor = torch.ops.pyda8w4.linear(input, *self._arguments())
            return out
        return self._product().multiply(input, self._scheme)

    def columns(self, input: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Compute outputs `begin` to `end`, in whole blocks of 32: all others take no time.

        Parameters
        ----------
        input : (..., in_features) tensor of float32, bfloat16 or float16
            All dimensions but the last are rows.
        begin, end : int
            Numbers of outputs.

        Returns
        -------
        (..., end - begin) tensor
            Of the type of `input`.
        """
        if is_any_autocast_enabled():
            input = autocast(input)
        part = self._product().columns(begin, end)
        if needs_operator(input) or (input.requires_grad and torch.is_grad_enabled()):
            arguments = arguments_of(
                {**self._buffers, **part.arrays}, part.bias, layout_of(part.product.format), self._act
            )
            out: torch.Tensor = torch.ops.pyda8w4.linear(input, *arguments)
        else:
            out = part.product.multiply(input, self._scheme)
        return out if part.within is None else slice_outputs(out, part.within)

    def _arguments(self) -> Arguments:
        return arguments_of(self._buffers, self._buffers["bias"], self._layout, self._act)

    def extra_repr(self) -> str:
        """Return what is printed of it.

        Returns
        -------
        str
            Its sizes and how it quantizes.
        """
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        act = "" if self._act == "uint8" else f", act={self._act}"
        return f"{text}{self._describe_weight()}{act}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        symmetric = state.pop("symmetric_activation", None)  # of earlier versions
        super().__setstate__(state)  # type: ignore[no-untyped-call, unused-ignore]
        if symmetric is not None:
            self.act = "int8" if symmetric else "uint8"


def pack_floats(weight: torch.Tensor, rounding: Rounding) -> PackedWeight:
    """Quantize a float matrix, and pack it."""
    check_float("weight", weight)
    return rounding.quantize(array_of(weight.contiguous()), FLOATS[weight.dtype][0]).pack()


def autocast(input: torch.Tensor) -> torch.Tensor:
    """As `torch.autocast` has the input of a `torch.nn.Linear`."""
    if not torch.is_autocast_enabled("cpu") or input.dtype not in FLOATS:
        return input
    return input.to(torch.get_autocast_dtype("cpu"))
