"""A packed weight as the tensors of a state dict, which `torch.ops.pyda8w4.linear` takes, too: those of `_layout`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pyda8w4._format import ARRAYS, ArraySpec, Format
from pyda8w4._layout import TYPED, Layout, format_from, layout_of, read_layout
from pyda8w4.torch._tensors import DTYPES, array_of, check_dense, check_tensor

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def tensors_of(
    format: Format, arrays: Mapping[str, torch.Tensor], device: torch.types.Device = "cpu"
) -> dict[str, torch.Tensor | None]:
    """The state of a weight; `device` is that of the zero point."""
    zps = arrays.get("zps")
    if zps is None:
        zps = torch.tensor(format.zero_point, dtype=torch.int8, device=device)
    layout = torch.tensor(layout_of(format), device="cpu")  # never meta: it is read at once
    return {"layout": layout, **dict.fromkeys(ARRAYS), **arrays, "zps": zps}


def zeros_of(format: Format, device: torch.types.Device) -> dict[str, torch.Tensor | None]:
    arrays = {
        name: torch.zeros(spec.shape, dtype=DTYPES[spec.type], device=device) for name, spec in format.arrays.items()
    }
    return tensors_of(format, arrays, device)


def format_of(layout: Sequence[int], tensors: Mapping[str, Any]) -> Format:
    """The format that the tensors of a weight have if they fit each other; ValueError if none has such."""
    zps = tensors.get("zps")
    if zps is None or not zps.is_cpu or zps.dtype is not torch.int8:
        raise ValueError(f"zps must be int8 on the CPU, got {None if zps is None else f'{zps.dtype} on {zps.device}'}")
    return format_from(tuple(layout), None if zps.dim() else zps.item(), *_types(tensors), experts_of(tensors))


def experts_of(tensors: Mapping[str, Any]) -> int | None:
    """How many weights the tensors are of; None is one, without a dimension for it."""
    codes = tensors.get("codes")
    return int(codes.shape[0]) if codes is not None and codes.dim() == 4 else None


def _types(tensors: Mapping[str, Any]) -> list[str | None]:
    found = (tensors.get(name) for name in TYPED)
    return [None if tensor is None else _NAMES.get(tensor.dtype, str(tensor.dtype)) for tensor in found]


def check_found(found: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor | None]) -> Layout:
    """Raise ValueError unless tensors of a state dict fit a layer: its sizes, and each other.

    Those that it lacks may be in another state dict: layers are compared as a whole when they are called.
    """
    for name, tensor in found.items():
        check_dense(name, tensor)
    sizes = own["layout"]
    assert sizes is not None
    numbers = found.get("layout", sizes)
    layout = read_layout(tuple(numbers.tolist()) if numbers.dtype is torch.int64 and numbers.dim() == 1 else ())
    _, n, k, *_ = sizes.tolist()
    if (layout.n, layout.k) != (n, k):
        raise ValueError(f"layout must have N = {n} and K = {k}, got {numbers.tolist()}")
    zps = found.get("zps")
    zero_point = 0 if zps is None else None if zps.dim() or zps.dtype is not torch.int8 else int(zps)
    # Of those that are missing, any types do.
    any_types = {"scales": found.get("offsets", own["scales"]), "sub_scales": _BYTES, "sub_offsets": _BYTES}
    format = format_from(tuple(numbers.tolist()), zero_point, *_types({**any_types, **found}), experts_of(own))
    wanted = {**format.arrays, "bias": ArraySpec(format.shape[:-1], "float32")}
    for name, tensor in found.items():
        if name in wanted:
            check_tensor(name, tensor, wanted[name])
    format.check_values({name: array_of(tensor) for name, tensor in found.items() if name in format.arrays})
    return layout


_BYTES = torch.empty(0, dtype=torch.uint8, device="cpu")
