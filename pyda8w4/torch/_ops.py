"""The product as an operator: ``torch.ops.pyda8w4.linear``, for graphs and tensor subclasses.

Eager modules call `multiply` directly, because the dispatcher takes longer than a small product.
"""

from __future__ import annotations

from typing import Any

import torch

from pyda8w4 import _core
from pyda8w4._checks import BLOCK, QUAD, ceil_div
from pyda8w4._runtime import forced_kernel, translate
from pyda8w4.torch._tensors import FLOATS

_SCHEMA = (
    "linear(Tensor input, Tensor codes, Tensor scales, Tensor sums, Tensor? zps, Tensor? offsets, Tensor? bias, "
    "int in_features, int out_features, int group_size, int zero_point, "
    "bool symmetric_activation) -> Tensor"
)


def linear(input: torch.Tensor, *weight: Any) -> torch.Tensor:
    """The operator on the CPU."""
    check_weight(*weight)
    return multiply(input, *weight)


def check_weight(
    codes: torch.Tensor,
    scales: torch.Tensor,
    sums: torch.Tensor,
    zps: torch.Tensor | None,
    offsets: torch.Tensor | None,
    bias: torch.Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    *rest: Any,
) -> None:
    """Raises ValueError unless the tensors of a packed weight fit its sizes."""
    if in_features < 1 or out_features < 1 or group_size < 1:
        raise ValueError(f"sizes must be positive, got {in_features}, {out_features} and a group of {group_size}")
    blocks, groups = ceil_div(out_features, BLOCK), ceil_div(in_features, group_size)
    _check("codes", codes, torch.uint8, blocks * ceil_div(in_features, QUAD) * 2 * BLOCK)
    _check("scales", scales, scales.dtype if scales.dtype in FLOATS else torch.float32, blocks * groups * BLOCK)
    _check("sums", sums, torch.float32, blocks * BLOCK)
    if zps is not None:
        _check("zps", zps, torch.int8, blocks * groups * BLOCK)
    if offsets is not None:
        _check("offsets", offsets, scales.dtype, blocks * groups * BLOCK)
    if bias is not None:
        _check("bias", bias, torch.float32, out_features)


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, size: int) -> None:
    if tensor.dtype is not dtype or tensor.numel() != size or not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous CPU tensor of {size} {dtype}, got shape {tuple(tensor.shape)} of "
            f"{tensor.dtype} on {tensor.device}"
        )


def multiply(
    input: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    sums: torch.Tensor,
    zps: torch.Tensor | None,
    offsets: torch.Tensor | None,
    bias: torch.Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    zero_point: int,
    symmetric_activation: bool,
) -> torch.Tensor:
    """`pyda8w4.linear` on tensors, those of the weight checked before: see docs/packed-format.md.

    `zps` None: every zero point is `zero_point`.
    """
    shape, dtype = input.shape, input.dtype
    if dtype not in FLOATS or not shape or shape[-1] != in_features or not input.is_cpu:
        check_input(input, in_features)
    if input.layout is not torch.strided or not input.is_contiguous():
        check_input(input, in_features)
        input = input.contiguous()
    if len(shape) == 2:  # slicing a shape takes as long as all of its checks
        rows = shape[0]
        out = torch.empty((rows, out_features), dtype=dtype)
    else:
        rows = input.numel() // in_features
        out = torch.empty((*shape[:-1], out_features), dtype=dtype)
    if rows == 0:
        return out
    _, kind, size = FLOATS[dtype]
    weight = _core.View(
        out_features, in_features, group_size, FLOATS[scales.dtype][1], zero_point,
        codes.data_ptr(), scales.data_ptr(), None if zps is None else zps.data_ptr(),
        None if offsets is None else offsets.data_ptr(), sums.data_ptr(),
    )  # fmt: skip
    try:
        _core.multiply(
            True, rows, input.data_ptr(), kind, in_features * size, None, None, symmetric_activation, weight,
            None if bias is None else bias.data_ptr(), out.data_ptr(), kind, out_features * size, forced_kernel(),
        )  # fmt: skip
    except _core.CoreError as error:
        raise translate(error) from None
    return out


def check_input(input: torch.Tensor, in_features: int) -> None:
    if input.dtype not in FLOATS:
        raise TypeError(f"input must be float32, bfloat16 or float16, got {input.dtype}")
    if not input.is_cpu or input.layout is not torch.strided:
        raise ValueError(f"input must be a dense tensor on the CPU, got {input.layout} on {input.device}")
    if not input.dim() or input.shape[-1] != in_features:
        raise ValueError(f"input must have shape (..., {in_features}), got {tuple(input.shape)}")


def _linear_fake(input: torch.Tensor, *weight: Any) -> torch.Tensor:
    in_features, out_features = weight[6:8]
    check_input(input, in_features)
    return input.new_empty((*input.shape[:-1], out_features))


def _backward(context: Any, *gradients: torch.Tensor) -> None:
    raise NotImplementedError(
        "DA8W4 layers are for inference and have no backward; run the model under torch.no_grad()"
    )


_library = torch.library.Library("pyda8w4", "DEF")
_library.define(_SCHEMA)
_library.impl("linear", linear, "CPU")
torch.library.register_fake("pyda8w4::linear", _linear_fake, lib=_library)
torch.library.register_autograd("pyda8w4::linear", _backward, lib=_library)
