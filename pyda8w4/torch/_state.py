"""A packed weight as the tensors of a state dict, which `torch.ops.pyda8w4.linear` takes, too.

``layout`` is int64: the layout version, N, K, group size. The others are the arrays of docs/packed-format.md; but where
all zero points are the same, ``zps`` is that one, without dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from pyda8w4._format import LAYOUT_VERSION, ArraySpec, Format
from pyda8w4.torch._tensors import DTYPES, FLOATS, array_of, check_dense, check_tensor

ARRAYS = ("codes", "scales", "sums", "zps", "offsets")


def layout_of(format: Format) -> list[int]:
    return [LAYOUT_VERSION, format.n, format.k, format.group_size]


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
    zps = tensors["zps"]
    if not zps.is_cpu or zps.dtype is not torch.int8:
        raise ValueError(f"zps must be int8 on the CPU, got {zps.dtype} on {zps.device}")
    zero_point = None if zps.dim() else zps.item()
    return _format(tuple(layout), tensors["scales"].dtype, zero_point, tensors.get("offsets") is not None)


@lru_cache(maxsize=256)
def _format(layout: tuple[int, ...], dtype: torch.dtype, zero_point: int | None, has_offsets: bool) -> Format:
    """Kept, since compiled models come here at each call."""
    if len(layout) != 4 or layout[0] != LAYOUT_VERSION:
        raise ValueError(f"layout must be [{LAYOUT_VERSION}, N, K, group size], got {list(layout)}")
    if dtype not in FLOATS:
        raise ValueError(f"scales must be float32, bfloat16 or float16, got {dtype}")
    return Format(*layout[1:], FLOATS[dtype][0], zero_point, has_offsets)


def check_found(found: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor | None]) -> None:
    """Raise ValueError unless tensors of a state dict fit a layer: its sizes, and each other.

    Those that it lacks may be in another state dict: layers are compared as a whole when they are called.
    """
    for name, tensor in found.items():
        check_dense(name, tensor)
    sizes = own["layout"]
    assert sizes is not None
    layout = found.get("layout", sizes)
    if layout.dtype is not torch.int64 or layout.shape != (4,) or layout.tolist()[:3] != sizes.tolist()[:3]:
        raise ValueError(f"layout must begin with {sizes.tolist()[:3]} (version, N, K), got {layout.tolist()}")
    _, n, k, group_size = layout.tolist()
    scales, zps = found.get("scales", found.get("offsets", own["scales"])), found.get("zps")
    assert scales is not None
    zero_point = None if zps is None or zps.dim() or zps.dtype is not torch.int8 else int(zps)
    if scales.dtype not in FLOATS:
        raise ValueError(f"scales must be float32, bfloat16 or float16, got {scales.dtype}")
    try:
        format = Format(n, k, group_size, FLOATS[scales.dtype][0], zero_point, True)
    except ValueError as error:
        raise ValueError(f"layout {layout.tolist()} is that of no packed weight: {error}") from None
    wanted = {**format.arrays, "bias": ArraySpec((n,), "float32")}
    for name, tensor in found.items():
        if name in wanted:
            check_tensor(name, tensor, wanted[name])
    if zps is not None and zero_point is None:
        format.check_zero_points(array_of(zps))
