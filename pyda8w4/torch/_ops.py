"""The product and the lookup as operators: ``torch.ops.pyda8w4.linear`` and ``embedding``, for graphs and subclasses.

Eager modules keep a `Product` and call that, because the dispatcher takes longer than a small product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad
from torch.nested._internal.nested_tensor import NestedTensor
from torch.nested._internal.ops import extract_kwargs
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import register_flop_formula

from pyda8w4._checks import SCHEMES, check_scheme
from pyda8w4._core import CoreError, Gating
from pyda8w4._format import ARRAYS, Format
from pyda8w4._layout import read_layout
from pyda8w4._runtime import forced_kernel, translate
from pyda8w4.torch._state import format_of
from pyda8w4.torch._tensors import DTYPES, FLOATS

# Looked up once: a small product waits for them.
KINDS = {dtype: kind for dtype, (_, kind) in FLOATS.items()}
_strided = torch.strided

# Graphs that were exported hold this, so it names nothing that another layout version could have otherwise:
# weight      the arrays that there are, in the order of ARRAYS
# layout      what the state dict has under that name: see _state
# activation  how `input` is quantized: one of SCHEMES
_SCHEMA = "linear(Tensor input, Tensor[] weight, Tensor? bias, int[] layout, str activation) -> Tensor"


# Rows of the weight; `dtype` is that of the output.
_EMBEDDING_SCHEMA = "embedding(Tensor input, Tensor[] weight, int[] layout, ScalarType dtype) -> Tensor"


class Arguments(NamedTuple):
    """Of the operator, after its input."""

    weight: list[torch.Tensor]
    bias: torch.Tensor | None
    layout: list[int]
    activation: str


def arguments_of(
    tensors: Mapping[str, torch.Tensor | None], bias: torch.Tensor | None, layout: list[int], act: str
) -> Arguments:
    found = [tensors.get(name) for name in ARRAYS]
    weight = [tensor for tensor in found if tensor is not None]
    return Arguments(weight, bias, layout, act)


def names_of(weight: Sequence[torch.Tensor], layout: Sequence[int]) -> tuple[str, ...]:
    """What the tensors of a weight are."""
    found = read_layout(tuple(layout))
    names = found.names if len(weight) == len(found.names) else found.names + found.optional
    if len(weight) != len(names):
        raise ValueError(f"weight must be {', '.join(names)}, got {len(weight)} tensors")
    return names


def linear(
    input: torch.Tensor, weight: list[torch.Tensor], bias: torch.Tensor | None, layout: list[int], activation: str
) -> torch.Tensor:
    """The operator on the CPU."""
    scheme = SCHEMES[check_scheme("activation", activation, tuple(SCHEMES))]
    return _product_of(weight, bias, layout).multiply(input, scheme)


def embedding(input: torch.Tensor, weight: list[torch.Tensor], layout: list[int], dtype: torch.dtype) -> torch.Tensor:
    """The operator on the CPU."""
    return _product_of(weight, None, layout).rows(input, dtype)


# Compiled models give the same tensors in each call. A product is what is seen of them and their addresses, so it may
# serve whatever tensors look so and lie there.
_products: dict[tuple[Any, ...], Product] = {}
_MOST_PRODUCTS = 1 << 14


def _product_of(weight: list[torch.Tensor], bias: torch.Tensor | None, layout: list[int]) -> Product:
    key = (tuple(layout), *map(_seen, weight), None if bias is None else _seen(bias))
    product = _products.get(key)
    if product is None:
        tensors = dict(zip(names_of(weight, layout), weight))
        product = Product(format_of(layout, tensors), tensors, bias)
        if product.format.has_perm:  # whose numbers are looked at in each call
            return product
        if len(_products) == _MOST_PRODUCTS:
            _products.clear()
        _products[key] = product
    return product


def _seen(tensor: torch.Tensor) -> tuple[Any, ...]:
    """All that a product asks of a tensor. One of no dimensions is a zero point."""
    value = None if tensor.dim() else tensor.item()
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.device, tensor.is_contiguous(), value


class Product:
    """Tensors that are the arrays of a weight, and the view of them that kernels read.

    Raises ValueError if they are not. It must not be used once a tensor was given other memory.
    """

    __slots__ = ("_bias", "_k", "_n", "_perm", "_view", "format")

    def __init__(self, format: Format, tensors: Mapping[str, torch.Tensor | None], bias: torch.Tensor | None) -> None:
        self.format, self._n, self._k = format, format.n, format.k
        addresses, self._bias = check_arrays(format, tensors, bias)
        self._view = format.view(addresses)
        self._perm = tensors["perm"] if format.has_perm else None

    def multiply(self, input: torch.Tensor, scheme: int, gating: Gating | None = None) -> torch.Tensor:
        """`pyda8w4.linear` on tensors; with a gating `pyda8w4.linear_gated`."""
        try:
            shape, k = input.shape, self._k
        except RuntimeError:  # a nested tensor of strided layout has none; to ask every input would take longer
            return _of_each(lambda part: self.multiply(part, scheme, gating), input)
        kind = KINDS.get(input.dtype)
        if kind is None or not shape or shape[-1] != k or not input.is_cpu:
            check_input(input, k)
        if input.layout is not _strided or not input.is_contiguous():
            check_input(input, k)
            input = input.contiguous()
        n = self._n if gating is None else self._n // 2
        if len(shape) == 2:  # slicing a shape takes as long as all of its checks
            rows = shape[0]
            out = input.new_empty(rows, n)
        else:
            rows = input.numel() // k
            out = input.new_empty(*shape[:-1], n)
        if rows == 0:
            return out
        assert kind is not None
        if self._perm is not None:
            check_perm(self._perm, self._k)
        try:
            # Without names, which take as long as the smallest products.
            self._view.linear(
                rows, input.data_ptr(), kind, scheme, self._bias, out.data_ptr(), kind, forced_kernel(), gating
            )
        except CoreError as error:
            raise translate(error) from None
        return out

    def rows(self, input: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`PackedWeight.dequantize` on tensors."""
        check_indices(input)
        out = torch.empty(*input.shape, self._k, dtype=torch.float32, device="cpu")
        if input.numel():
            least, most = torch.aminmax(input)
            if least < 0 or most >= self._n:
                raise IndexError(f"input must be 0 to {self._n - 1}, got {int(least)} to {int(most)}")
            if self._perm is not None:
                check_perm(self._perm, self._k)
            self._view.dequantize(input.detach().numpy().reshape(-1).astype(np.uintp), out.numpy())
        return out.to(dtype)


def check_perm(perm: torch.Tensor, k: int) -> None:
    """Raise ValueError where kernels would read beyond a row, as a tensor can be changed in place."""
    least, most = torch.aminmax(perm)
    if least < 0 or most >= k:
        raise ValueError(f"perm must have each of 0 to {k - 1} once, got {int(least)} to {int(most)}")


def _is_strided_nested(input: torch.Tensor) -> bool:
    return input.is_nested and input.layout is _strided


def _of_each(function: Callable[[torch.Tensor], torch.Tensor], nested: torch.Tensor) -> torch.Tensor:
    """The nested tensor of what `function` makes of each of its tensors."""
    return torch.nested.as_nested_tensor([function(part) for part in nested.unbind()])


def slice_outputs(out: torch.Tensor, within: slice) -> torch.Tensor:
    """``out[..., within]``, which nested tensors of strided layout do not have."""
    if isinstance(out, torch.Tensor) and _is_strided_nested(out):  # tracers give something else
        return _of_each(lambda part: part[..., within], out)
    return out[..., within]


def check_arrays(
    format: Format, tensors: Mapping[str, torch.Tensor | None], bias: torch.Tensor | None
) -> tuple[dict[str, int], int | None]:
    """The addresses of the arrays of a weight, or of several, and of a bias. ValueError if tensors are not these."""
    addresses = {
        name: _address(name, tensors.get(name), DTYPES[type], shape) for name, (shape, type) in format.arrays.items()
    }
    return addresses, None if bias is None else _address("bias", bias, torch.float32, format.shape[:-1])


def _address(name: str, tensor: torch.Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    if tensor is None:
        raise ValueError(f"{name} must be a tensor of {dtype} and shape {shape}, got none")
    if tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous CPU tensor of {dtype} and shape {shape}, got {tensor.dtype}, "
            f"{tuple(tensor.shape)} on {tensor.device}"
        )
    address: int = tensor.data_ptr()
    return address


def check_input(input: torch.Tensor, k: int) -> None:
    if input.dtype not in FLOATS:
        raise TypeError(f"input must be float32, bfloat16 or float16, got {input.dtype}")
    if not input.is_cpu or input.layout is not torch.strided:
        raise ValueError(f"input must be a dense tensor on the CPU, got {input.layout} on {input.device}")
    if not input.dim() or input.shape[-1] != k:
        raise ValueError(f"input must have shape (..., {k}), got {tuple(input.shape)}")


def check_indices(input: torch.Tensor) -> None:
    if input.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input must be int64 or int32, got {input.dtype}")
    if not input.is_cpu or input.layout is not torch.strided:
        raise ValueError(f"input must be a dense tensor on the CPU, got {input.layout} on {input.device}")


def _linear_fake(
    input: torch.Tensor, weight: list[torch.Tensor], bias: torch.Tensor | None, layout: list[int], activation: str
) -> torch.Tensor:
    _, n, k, *_ = layout
    check_input(input, k)
    for name, tensor in zip(names_of(weight, layout), weight):
        if not tensor.is_cpu:
            raise ValueError(f"{name} must be on the CPU, got {tensor.device}")
    return input.new_empty((*input.shape[:-1], n))


def _embedding_fake(
    input: torch.Tensor, weight: list[torch.Tensor], layout: list[int], dtype: torch.dtype
) -> torch.Tensor:
    check_indices(input)
    return input.new_empty((*input.shape, layout[2]), dtype=dtype)


_NO_GRADIENTS = "DA8W4 layers are for inference and have no gradients; run the model under torch.no_grad()"


def refuse_gradients(input: torch.Tensor) -> None:
    """Raise NotImplementedError for an input that function transforms or forward mode differentiate.

    torch takes an output without a tangent for a constant, so without this derivatives would be zero.
    """
    tracked = torch._C._functorch.is_gradtrackingtensor(input)
    if not tracked and forward_ad._current_level >= 0 and not torch._C._functorch.is_batchedtensor(input):
        tracked = forward_ad.unpack_dual(input).tangent is not None  # type: ignore[no-untyped-call, unused-ignore]
    if tracked:
        raise NotImplementedError(_NO_GRADIENTS)


# Compilers trace the backward pass before it is known whether anyone runs it. So it is an operator that refuses to run.
_BACKWARD_SCHEMA = "linear_backward(Tensor gradient, int in_features) -> Tensor"


def _no_backward(gradient: torch.Tensor, in_features: int) -> torch.Tensor:
    raise NotImplementedError(_NO_GRADIENTS)


def _backward_fake(gradient: torch.Tensor, in_features: int) -> torch.Tensor:
    return gradient.new_empty((*gradient.shape[:-1], in_features))


def _keep_sizes(ctx: Any, inputs: Sequence[Any], output: object) -> None:
    _, weight, _, layout, _ = inputs
    ctx.weights, ctx.in_features = len(weight), layout[2]


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    return torch.ops.pyda8w4.linear_backward(gradient, ctx.in_features), [None] * ctx.weights, None, None, None


def _autograd(keys: Any, input: torch.Tensor, *others: Any) -> torch.Tensor:
    # What torch.library.register_autograd does, which knows neither forward mode nor these nested tensors.
    refuse_gradients(input)
    if _is_strided_nested(input):
        return _of_each(lambda part: torch.ops.pyda8w4.linear(part, *others), input)
    out: torch.Tensor = _reverse_mode(keys, input, *others)
    return out


def _jagged(cls: type, operator: Any, types: object, args: Sequence[Any], kwargs: object) -> torch.Tensor:
    """Of a nested tensor of jagged layout, whose tensors are rows of one."""
    input: Any = args[0]
    others, k = args[1:], args[3][2]
    if not issubclass(type(input), cls):
        raise TypeError("weights of DA8W4 layers cannot be nested tensors")
    if input.shape[-1] != k:
        raise ValueError(f"input must have shape (..., {k}), got {tuple(input.shape)}")
    # As torch has it for its own operators: the public function cannot be traced.
    kept = extract_kwargs(input)  # type: ignore[no-untyped-call, unused-ignore]
    out: torch.Tensor = cls(operator(input._values, *others), **kept)
    return out


def _vmap(
    info: object,
    in_dims: Sequence[Any],
    input: torch.Tensor,
    weight: list[torch.Tensor],
    bias: torch.Tensor | None,
    layout: list[int],
    activation: str,
) -> tuple[torch.Tensor, int]:
    """Rows know nothing of each other: one more dimension of `input` is more rows."""
    at, *others = in_dims
    if any(dim is not None for dim in tree_leaves(others)):
        raise NotImplementedError("torch.vmap over the weights of DA8W4 layers")
    return torch.ops.pyda8w4.linear(input.movedim(at, 0), weight, bias, layout, activation), 0


def _flops(input: Sequence[int], weight: object, bias: object, layout: Sequence[int], *others: Any, **more: Any) -> int:
    """As many as those of a float layer: two for each weight and row."""
    return 2 * prod(input[:-1]) * layout[1] * layout[2]


# Reloading the module finds the operators there, with functions that see the names of the new one.
if not hasattr(torch.ops.pyda8w4, "linear"):
    _library: Any = torch.library.Library("pyda8w4", "DEF")  # type: ignore[no-untyped-call, unused-ignore]
    _library.define(_SCHEMA)
    _library.define(_BACKWARD_SCHEMA)
    _library.define(_EMBEDDING_SCHEMA)
    _library.impl("linear", linear, "CPU")
    _library.impl("linear_backward", _no_backward, "CPU")
    _library.impl("embedding", embedding, "CPU")
    torch.library.register_fake("pyda8w4::linear", _linear_fake, lib=_library)
    torch.library.register_fake("pyda8w4::linear_backward", _backward_fake, lib=_library)
    torch.library.register_fake("pyda8w4::embedding", _embedding_fake, lib=_library)
    _reverse_mode = make_autograd_impl(torch.ops.pyda8w4.linear.default, Info(_backward, _keep_sizes))
    _library.impl("linear", _autograd, "Autograd", with_keyset=True)
    _library.impl("linear", linear, "NestedTensorCPU")
    if hasattr(torch.library, "register_vmap"):  # torch 2.5
        torch.library.register_vmap("pyda8w4::linear", _vmap, lib=_library)
        torch.library.register_torch_dispatch("pyda8w4::linear", NestedTensor, _jagged, lib=_library)
    register_flop_formula(torch.ops.pyda8w4.linear)(_flops)  # type: ignore[no-untyped-call, unused-ignore]
