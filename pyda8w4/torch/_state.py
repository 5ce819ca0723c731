"""A packed weight as the tensors of a state dict, which `torch.ops.pyda8w4.linear` takes, too.

``layout`` is int64: the layout version, N, K, group size. Of a weight that is not plain (4 bits, scales of one level,
no table, no permutation, no factors) three numbers follow: bits, groups of a super-group, and which arrays there are,
bit i for `ARRAYS` number i. The other tensors are the arrays of docs/packed-format.md; but where all zero points are
the same, ``zps`` is that one, without dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from pyda8w4._format import ARRAYS, LAYOUT_VERSION, LAYOUT_VERSIONS, ArraySpec, Format
from pyda8w4.torch._tensors import DTYPES, FLOATS, INTEGERS, array_of, check_dense, check_tensor

_PLAIN = ("codes", "scales", "sums", "zps")

# The arrays whose element type, or whether there is one, a layout may not tell.
TYPED = ("scales", "offsets", "sub_scales", "sub_offsets")


class Layout(NamedTuple):
    """What the tensor ``layout`` says."""

    n: int
    k: int
    group_size: int
    bits: int
    super_size: int
    names: tuple[str, ...]  # of the arrays
    optional: tuple[str, ...]  # those that there may be, too


@lru_cache(maxsize=256)
def read_layout(numbers: tuple[int, ...]) -> Layout:
    """ValueError if they are no layout."""
    if len(numbers) == 4 and numbers[0] in LAYOUT_VERSIONS:
        _, n, k, group_size = numbers
        return Layout(n, k, group_size, 4, 0, _PLAIN, ("offsets",))
    if len(numbers) == 7 and numbers[0] == LAYOUT_VERSION:
        _, n, k, group_size, bits, super_size, there = numbers
        if 0 <= there < 1 << len(ARRAYS):
            names = tuple(name for i, name in enumerate(ARRAYS) if there >> i & 1)
            return Layout(n, k, group_size, bits, super_size, names, ())
    raise ValueError(
        f"layout must be [{LAYOUT_VERSION}, N, K, group size], or these with bits, groups of a super-group and the bit "
        f"set of the arrays, got {list(numbers)}"
    )


def layout_of(format: Format) -> list[int]:
    """Its numbers."""
    names = {*format.arrays, "zps"}
    numbers = [LAYOUT_VERSION, format.n, format.k, format.group_size]
    if format.bits == 4 and names <= {*_PLAIN, "offsets"}:
        return numbers
    return [*numbers, format.bits, format.super_size, sum(1 << i for i, name in enumerate(ARRAYS) if name in names)]


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
    return format_from(tuple(layout), None if zps.dim() else zps.item(), *_dtypes(tensors))


def _dtypes(tensors: Mapping[str, Any]) -> list[torch.dtype | None]:
    return [None if (tensor := tensors.get(name)) is None else tensor.dtype for name in TYPED]


@lru_cache(maxsize=256)
def format_from(
    numbers: tuple[int, ...],
    zero_point: int | None,
    scales: torch.dtype | None,
    offsets: torch.dtype | None,
    sub_scales: torch.dtype | None,
    sub_offsets: torch.dtype | None,
) -> Format:
    """The same, from a layout and the element types of `TYPED`. Kept, since compiled models need it at each call."""
    layout = read_layout(numbers)
    if scales is None or scales not in FLOATS:
        raise ValueError(f"scales must be float32, bfloat16 or float16, got {scales}")
    sub_types = {}
    for name, dtype in (("sub_scales", sub_scales), ("sub_offsets", sub_offsets)):
        if name in layout.names:
            if dtype is None or dtype not in INTEGERS:
                raise ValueError(f"{name} must be uint8 or int8, got {dtype}")
            sub_types[name] = INTEGERS[dtype]
    if "table" in layout.names and zero_point != 0:
        raise ValueError(f"zps must be 0 without dimensions where there is a table, got {zero_point or 'an array'}")
    try:
        format = Format(
            layout.n,
            layout.k,
            layout.group_size,
            FLOATS[scales][0],
            zero_point,
            "offsets" in layout.names or ("offsets" in layout.optional and offsets is not None),
            bits=layout.bits,
            has_table="table" in layout.names,
            super_size=layout.super_size,
            sub_scale_dtype=sub_types.get("sub_scales"),
            sub_offset_dtype=sub_types.get("sub_offsets"),
            has_perm="perm" in layout.names,
            has_factors="factors" in layout.names,
        )
    except ValueError as error:
        raise ValueError(f"layout {list(numbers)} is that of no packed weight: {error}") from None
    if {*format.arrays, "zps"} - {*layout.optional} != {*layout.names}:
        raise ValueError(f"layout {list(numbers)} is that of no packed weight: it has {', '.join(layout.names)}")
    return format


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
    format = format_from(tuple(numbers.tolist()), zero_point, *_dtypes({**any_types, **found}))
    wanted = {**format.arrays, "bias": ArraySpec((n,), "float32")}
    for name, tensor in found.items():
        if name in wanted:
            check_tensor(name, tensor, wanted[name])
    format.check_values({name: array_of(tensor) for name, tensor in found.items() if name in format.arrays})
    return layout


_BYTES = torch.empty(0, dtype=torch.uint8, device="cpu")
