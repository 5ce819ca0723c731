"""The mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pyda8w4._checks import SCHEMES, check_flag, check_scheme
from pyda8w4._experts import PackedExperts, check_experts, stack
from pyda8w4._format import Format, check_group_size
from pyda8w4._linear import check_gating
from pyda8w4._packed import PackedWeight
from pyda8w4._quantize import Rounding
from pyda8w4.torch._float_experts import float_experts
from pyda8w4.torch._layer import LayerMemory, PackedLayer, is_compiling, needs_operator, refuse_script
from pyda8w4.torch._module import autocast, is_any_autocast_enabled, pack_floats
from pyda8w4.torch._moe import Gating, Mixture, Stack
from pyda8w4.torch._ops import arguments_of
from pyda8w4.torch._state import zeros_of
from pyda8w4.torch._tensors import check_float

STACKS = ("gate_up", "down")


class PackedStack(PackedLayer):
    """One of the two stacks of weights of a `DA8W4Experts`, with its bias.

    Parameters
    ----------
    format : Format
        Of weights of zeros, to load others into.
    bias : bool
        Whether there is one.
    device : torch.device, optional
        Of the tensors.
    dtype : torch.dtype or None
        What `weight` says.
    """

    def __init__(self, format: Format, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.set_tensors(zeros_of(format, device), dtype)
        zeros = torch.zeros(format.shape[:-1], dtype=torch.float32, device=device) if bias else None
        self.register_buffer("bias", zeros)

    @property
    def packed(self) -> PackedExperts:  # type: ignore[override]
        """The weights as numpy functions take them; shares the module's memory."""
        memory = self.memory()
        return PackedExperts._from_arrays(memory.format, memory.numpy())

    def memory(self) -> LayerMemory:
        """The tensors that there are now. Whoever put them there, here they are seen to fit each other."""
        memory: LayerMemory | None = self._last_product
        if memory is None or not memory.is_of(self._buffers):
            self._layout = self.layout.tolist()
            memory = self._last_product = LayerMemory(self._buffers, self._layout)
        return memory

    def extra_repr(self) -> str:
        """Return what is printed of it.

        Returns
        -------
        str
            Its sizes.
        """
        experts, n, k = self._weight.shape
        return f"{experts}, {n}, {k}, bias={self.bias is not None}{self._describe_weight()}"


class DA8W4Experts(nn.Module):
    """A mixture of experts with weights of 4 to 8 bits and integer activations: what `pyda8w4.moe` computes.

    The constructor makes experts of zeros, to load a state dict into. `from_packed` makes experts with weights, and
    `quantize_` those of models of transformers.

    Parameters
    ----------
    num_experts, in_features, intermediate_features, out_features : int
        E, K, I and N, at least 1.
    bias : bool
        Whether both products add one.
    activation : {'silu', 'gelu', 'gelu_tanh', 'swigluoai'}
        The function of the gate.
    interleaved : bool
        Whether gates are the even outputs of the first product and ups the odd ones. Otherwise gates are the first
        half.
    alpha, limit : float
        Of ``swigluoai``.
    group_size : int
        Weights of consecutive input features that share a scale: a multiple of 4. A product with fewer inputs has one
        group.
    act : {'uint8', 'int8', 'int8_group', 'int16'}
        How both products quantize activations, see `pyda8w4.linear`.
    device : torch.device, optional
        ``"cpu"``, or ``"meta"`` for experts without memory.
    dtype : torch.dtype, optional
        What the weights say: float32, bfloat16 or float16. None means torch's default.

    Attributes
    ----------
    num_experts, in_features, intermediate_features, out_features : int
    activation : str
    interleaved : bool
    alpha, limit : float
    act : str
        May be set at any time.
    gate_up, down : torch.nn.Module
        The two stacks. Each has ``packed``, the `PackedExperts`, in the same memory; ``bias``, (E, 2 I) and (E, N)
        tensors of float32, or None; and ``weight``, which says dtype, device and shape, and raises where its numbers
        are needed.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If a size is out of range, or there is no such `act` or `activation`.

    Notes
    -----
    For inference: it has buffers, no parameters, and its outputs have no gradient. The result is that of `pyda8w4.moe`,
    bit for bit. Which experts a row takes is decided outside, by a router.

    The state dict has the tensors of `DA8W4Linear` under ``gate_up`` and ``down``, with a dimension for the experts
    that comes first (but ``layout``, and ``zps`` where all zero points are the same). The state decides what kind of
    weights there are. `activation`, `act` and what belongs to them are in no state.

    Examples
    --------
    >>> import torch
    >>> from pyda8w4.torch import DA8W4Experts
    >>> experts = DA8W4Experts(8, 64, 96, 64, group_size=32)
    >>> ids, weights = torch.tensor([[0, 7], [3, 1]]), torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    >>> experts(torch.ones(2, 64), ids, weights).shape
    torch.Size([2, 64])
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        intermediate_features: int,
        out_features: int,
        bias: bool = False,
        *,
        activation: str = "silu",
        interleaved: bool = False,
        alpha: float = 1.702,
        limit: float = 7.0,
        group_size: int = 128,
        act: str = "uint8",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "num_experts": num_experts,
            "in_features": in_features,
            "intermediate_features": intermediate_features,
            "out_features": out_features,
        }
        for name, value in sizes.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
            setattr(self, name, value)
        check_gating(activation, interleaved, alpha, limit)
        self._gating = Gating(activation, bool(interleaved), float(alpha), float(limit))
        self.act = act
        check_flag("bias", bias)
        for name, n, k in (
            ("gate_up", 2 * intermediate_features, in_features),
            ("down", out_features, intermediate_features),
        ):
            format = Format(n, k, check_group_size(group_size, k), "float32", None, experts=num_experts)
            setattr(self, name, PackedStack(format, bias, device, dtype))
        # transformers gives the number of experts as the id of none.
        self._expert_map = torch.tensor([*range(num_experts), -1], dtype=torch.int32, device="cpu")
        self._last: tuple[LayerMemory, LayerMemory, Mixture] | None = None

    num_experts: int
    in_features: int
    intermediate_features: int
    out_features: int
    gate_up: PackedStack
    down: PackedStack

    @classmethod
    def from_packed(
        cls,
        gate_up: PackedExperts,
        down: PackedExperts,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        *,
        activation: str = "silu",
        interleaved: bool = False,
        alpha: float = 1.702,
        limit: float = 7.0,
        act: str = "uint8",
        dtype: torch.dtype | None = None,
    ) -> DA8W4Experts:
        """Make experts of packed weights, without copying these.

        Parameters
        ----------
        gate_up, down : PackedExperts
            Of shapes (E, 2 I, K) and (E, N, I). Their arrays become buffers.
        gate_up_bias : (E, 2 I) tensor of float32, bfloat16 or float16, optional
            Copied. There are both biases or none.
        down_bias : (E, N) tensor of float32, bfloat16 or float16, optional
            Copied.
        activation : str
            See the class.
        interleaved : bool
            See the class.
        alpha, limit : float
            See the class.
        act : str
            See the class.
        dtype : torch.dtype, optional
            See the class.

        Returns
        -------
        DA8W4Experts
            In the memory of `gate_up` and `down`.

        Raises
        ------
        TypeError
            If an argument has the wrong type.
        ValueError
            If shapes do not fit each other, or a bias is not on the CPU.

        Examples
        --------
        >>> import numpy as np
        >>> import pyda8w4
        >>> from pyda8w4.torch import DA8W4Experts
        >>> w = np.random.default_rng(0).standard_normal((4, 64, 32), np.float32)
        >>> gate_up = pyda8w4.stack([pyda8w4.quantize(one) for one in w])  # doctest: +SKIP
        >>> experts = DA8W4Experts.from_packed(gate_up, down)  # doctest: +SKIP
        """
        for name, packed in (("gate_up", gate_up), ("down", down)):
            check_experts(name, packed)
        count, n, k = gate_up.shape
        if n % 2 or down.shape[::2] != (count, n // 2):
            raise ValueError(
                f"gate_up and down must have shapes (E, 2 I, K) and (E, N, I), got {gate_up.shape} and {down.shape}"
            )
        biases = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
        if len({bias is None for bias in biases.values()}) > 1:
            raise ValueError("gate_up_bias and down_bias must both be given, or none")
        copies: list[torch.Tensor | None] = []
        for (name, bias), packed in zip(biases.items(), (gate_up, down)):
            if bias is not None:
                check_float(name, bias)
                if bias.shape != packed.shape[:2]:
                    raise ValueError(f"{name} must have shape {packed.shape[:2]}, got {tuple(bias.shape)}")
                bias = bias.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            copies.append(bias)
        self = cls(
            count, k, n // 2, down.shape[1], activation=activation, interleaved=interleaved, alpha=alpha, limit=limit,
            act=act, device="meta", dtype=dtype,
        )  # fmt: skip
        for stack_of, packed, copy in zip((self.gate_up, self.down), (gate_up, down), copies):
            stack_of._set_packed(packed, stack_of._weight.dtype)
            stack_of.bias = copy
        return self

    @property
    def activation(self) -> str:
        """The function of the gate."""
        return self._gating.activation

    @property
    def interleaved(self) -> bool:
        """Whether gates and ups alternate."""
        return self._gating.interleaved

    @property
    def alpha(self) -> float:
        """The factor in the gate of ``swigluoai``."""
        return self._gating.alpha

    @property
    def limit(self) -> float:
        """What ``swigluoai`` clamps to."""
        return self._gating.limit

    @property
    def act(self) -> str:
        """How activations are quantized."""
        return self._act

    @act.setter
    def act(self, act: str) -> None:
        self._act = check_scheme("act", act, tuple(SCHEMES))
        self._scheme = SCHEMES[act]

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Multiply rows by the experts that they take, and add the results.

        Parameters
        ----------
        hidden_states : (..., in_features) tensor of float32, bfloat16 or float16
            All dimensions but the last are rows.
        top_k_index : (..., T) tensor of int64 or int32, optional
            Which experts a row takes. -1, and the number of experts, stand for none. Without it the rows of each
            expert, equally many, follow those of the one before: as Llama 4 has them. Rows of zeros take no time where
            there are no biases.
        top_k_weights : (..., T) tensor of float32, bfloat16 or float16, optional
            What the results are multiplied by.

        Returns
        -------
        (..., out_features) tensor
            Of the type of `hidden_states`.

        Raises
        ------
        TypeError
            If an argument has another type.
        ValueError
            If one has another shape or is not on the CPU, there is no such expert, or the buffers do not fit each
            other.
        """
        if is_any_autocast_enabled():
            hidden_states = autocast(hidden_states)
        if top_k_index is None or top_k_weights is None:
            top_k_index, top_k_weights = self._route_sorted(hidden_states, top_k_index, top_k_weights)
        elif type(hidden_states) is torch.Tensor:  # else a tracer, perhaps, to which nothing is a tensor
            for name, given in (("top_k_index", top_k_index), ("top_k_weights", top_k_weights)):
                if not isinstance(given, torch.Tensor):
                    raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
        if (
            is_compiling()
            or needs_operator(hidden_states)
            or top_k_weights.is_neg()
            or ((hidden_states.requires_grad or top_k_weights.requires_grad) and torch.is_grad_enabled())
        ):
            weight, bias, layout, _ = arguments_of(self.gate_up._buffers, self.gate_up.bias, self.gate_up._layout, "")
            down, down_bias, down_layout, _ = arguments_of(self.down._buffers, self.down.bias, self.down._layout, "")
            out: torch.Tensor = torch.ops.pyda8w4.moe(
                hidden_states, top_k_index, top_k_weights, weight, bias, layout, down, down_bias, down_layout,
                *self._gating, self._expert_map, 1.0, self._act,
            )  # fmt: skip
            return out
        multiply = self._mixture().multiply
        try:
            return multiply(hidden_states, top_k_index, top_k_weights, self._gating, None, 1.0, self._scheme)
        except ValueError:
            if not (top_k_index.is_cpu and (top_k_index == self.num_experts).any()):
                raise
        # Few models choose this none: the others need not wait until ids are mapped.
        return multiply(hidden_states, top_k_index, top_k_weights, self._gating, self._expert_map, 1.0, self._scheme)

    def _route_sorted(self, rows: torch.Tensor, *given: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if any(one is not None for one in given):
            raise TypeError("top_k_index and top_k_weights must both be given, or none")
        if rows.dim() != 2 or rows.shape[0] % self.num_experts:
            raise ValueError(
                f"hidden_states must have shape (R, K), R a multiple of {self.num_experts}, got {tuple(rows.shape)}"
            )
        experts = torch.arange(self.num_experts, device="cpu").repeat_interleave(rows.shape[0] // self.num_experts)
        # Without biases zeros give zeros.
        ids = (torch.where(rows.any(-1), experts, -1) if self.down.bias is None else experts)[:, None]
        return ids, torch.ones(ids.shape, dtype=torch.float32, device="cpu")

    def _mixture(self) -> Mixture:
        gate_up, down = (self._modules[name].memory() for name in STACKS)
        last = self._last
        if last is None or last[0] is not gate_up or last[1] is not down:
            stacks = (Stack(one.format, one.arrays, one.bias) for one in (gate_up, down))
            last = self._last = gate_up, down, Mixture(*stacks)
        return last[2]

    def extra_repr(self) -> str:
        """Return what is printed of it.

        Returns
        -------
        str
            What is not that of one stack.
        """
        interleaved = ", interleaved" if self.interleaved else ""
        act = "" if self._act == "uint8" else f", act={self._act}"
        return f"activation={self.activation}{interleaved}{act}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def __prepare_scriptable__(self) -> nn.Module:
        refuse_script(self)

    def _apply(self, *arguments: Any, **options: Any) -> DA8W4Experts:
        self._last = None  # which keeps tensors alive
        super()._apply(*arguments, **options)
        return self


def empty_experts(module: Any, name: str, formats: Mapping[str, tuple[Format, bool]], act: str) -> DA8W4Experts:
    """What takes the place of float experts, to load a checkpoint into that has these stacks, with biases or without.

    ValueError if the checkpoint has those of other experts.
    """
    floats = float_experts(module)
    for part, (format, bias) in formats.items():
        wanted = tuple(getattr(floats, part).shape)
        if format.shape != wanted:
            raise ValueError(f"{name}.{part} is {wanted} by the config of the model, {format.shape} in the checkpoint")
        if bias != (floats.gate_up_bias is not None):
            raise ValueError(f"{name}.{part} must have {'no bias' if bias else 'a bias'} by the config of the model")
    count, n, k = floats.gate_up.shape
    dtype = floats.gate_up.dtype
    experts = DA8W4Experts(
        count, k, n // 2, floats.down.shape[1], floats.gate_up_bias is not None,
        **floats.gating._asdict(), act=act, device="meta", dtype=dtype,
    )  # fmt: skip
    for part, (format, _) in formats.items():
        getattr(experts, part).set_tensors(zeros_of(format, "meta"), dtype)
    return experts


def quantize_experts(module: Any, rounding: Rounding, act: str) -> DA8W4Experts:
    """What takes the place of float experts, which are given up: each of their parameters once it is packed.

    ValueError, before that, says why nothing can.
    """
    floats = float_experts(module)
    dtype = floats.gate_up.dtype
    for name, stacked in (("gate_up_proj", floats.gate_up), ("down_proj", floats.down)):
        check_float(name, stacked)
        for one in stacked:
            least, most = torch.aminmax(one)
            if not torch.isfinite(most.float() - least.float()):
                raise ValueError(f"{name} must be finite, and the range of an expert fit float32")
    del stacked, one
    _, _, *biases, gating = floats
    weights = list(floats[:2])
    del floats
    packed = []
    for name in ("gate_up_proj", "down_proj"):
        packed.append(stack(_Packing(weights.pop(0), rounding)))
        module._parameters[name] = None
    return DA8W4Experts.from_packed(*packed, *biases, **gating._asdict(), act=act, dtype=dtype)


class _Packing:
    """Matrices, each of which is quantized and packed when it is wanted."""

    def __init__(self, weights: torch.Tensor, rounding: Rounding) -> None:
        self._weights, self._rounding = weights, rounding

    def __len__(self) -> int:
        return len(self._weights)

    def __iter__(self) -> Iterator[PackedWeight]:
        return (pack_floats(weight, self._rounding) for weight in self._weights)
