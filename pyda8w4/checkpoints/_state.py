"""Layers that transformers has saved from pyda8w4.torch: packed weights as the tensors of state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from pyda8w4._format import ARRAYS
from pyda8w4._layout import TYPED, format_from
from pyda8w4._packed_file import KINDS, TYPES, mapped
from pyda8w4._safetensors import Tensor
from pyda8w4.formats._layer import Layer, packed_layer
from pyda8w4.formats._parts import Parts, check_shape, modules


def layers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Layer]:
    """Find the layers: those that have a ``layout``."""
    found = {}
    for name in modules(tensors, ".layout"):
        if tensors[f"{name}.layout"].dtype == "I64":
            found[name] = _layer(name, Parts(tensors, f"{name}.", ("layout", *ARRAYS)))
    return found


def _layer(name: str, parts: Parts) -> Layer:
    try:
        layout, zps = parts.take("layout"), parts.take("zps", "I8")
        if layout.shape not in ((4,), (7,), (8,)):
            raise ValueError(f"{layout.name} must have 4, 7 or 8 numbers, got shape {layout.shape}")
        numbers = tuple(layout.array().tolist())
        codes = parts.take("codes")
        experts = codes.shape[0] if len(codes.shape) == 4 else None
        types = (TYPES.get(parts.take(part).dtype, "another") if part in parts else None for part in TYPED)
        try:
            format = format_from(numbers, None if zps.shape else int(zps.array()), *types, experts)
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
        data = {}
        for part, spec in format.arrays.items():
            tensor = parts.take(part, KINDS[spec.type])
            check_shape(tensor, spec.shape)
            data[part] = tensor.bytes
    except ValueError as error:
        return parts.layer("packed", (), refusal=str(error))
    return packed_layer(f"packed {format.bits}-bit", format, parts.names, partial(mapped, name, format, data))
