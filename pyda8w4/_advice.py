"""What to do instead: the end of messages about arguments of another kind than wanted, or nothing.

These run where something is refused only, so that good arguments do not pay for them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

# What takes floats where codes or quantized activations are wanted, and the other way round.
_FOR_FLOATS = {"a": "linear takes floats", "codes": "pyda8w4.quantize takes float weights"}
_FOR_CODES = {"x": "gemm takes activations that are quantized", "w": "prepack takes codes, with their scales"}

_CONVERTIBLE = re.compile(r"[<>]?(f|i|u|float|int|uint|bfloat)\d")  # names of numpy's and ml_dtypes' real numbers
_INTEGER = re.compile(r"u?int\d")


def for_array(name: str, value: Any) -> str:
    """Instead of what numpy makes no array of numbers of."""
    if _is_of_torch(value):
        if not hasattr(value, "detach"):
            return "; pyda8w4.torch.quantize_ takes models"
        detached = ".detach()" if value.requires_grad else ""
        moved = "" if value.device.type in ("cpu", "meta") else ".cpu()"
        as_float = ".float()" if "bfloat16" in str(value.dtype) else ""
        calls = f"{detached}{moved}{as_float}"
        return f"; {name}{calls}.numpy() makes one, and pyda8w4.torch has layers for tensors" if calls else ""
    if _is_ours(value, "QuantizedWeight"):
        return f"; {name}.pack() packs it"
    if name == "a" and isinstance(value, tuple):
        return "; gemm(a, packed, a_scales, a_zps) takes the three that quantize_activation gives"
    is_numpy = type(value).__module__ == "numpy"
    return f"; np.from_dlpack({name}) makes one" if hasattr(value, "__dlpack__") and not is_numpy else ""


def for_dtype(name: str, found: str, allowed: tuple[str, ...]) -> str:
    """Instead of an array of another type."""
    name = name.partition(" ")[0]
    floats = "float32" in allowed
    other = _FOR_CODES if floats else _FOR_FLOATS
    if name in other and found in (("uint8", "int8") if floats else ("float32", "float16", "bfloat16", "float64")):
        return f"; {other[name]}"
    if name == "out" or not _CONVERTIBLE.match(found):
        is_raw = "bfloat16" in allowed and found == "void16"
        return f"; {name}.view(ml_dtypes.bfloat16) takes its bits for bfloat16" if is_raw else ""
    if floats:
        is_raw = "bfloat16" in allowed and found == "uint16"
        bits = f", {name}.view(ml_dtypes.bfloat16) takes its bits for bfloat16" if is_raw else ""
        return f"; np.asarray({name}, np.float32) makes one{bits}"
    if "int8" in allowed and _INTEGER.match(found):
        return f"; np.asarray({name}, np.uint8) makes one, or np.int8 for signed numbers"
    return f"; np.asarray({name}, np.{allowed[0]}) makes one" if _INTEGER.match(found) else ""


def for_transposed(name: str, shape: tuple[int, ...], *wanted: tuple[int, ...]) -> str:
    """Instead of a matrix whose rows should be columns."""
    return f"; {name}.T has it" if len(shape) == 2 and shape[::-1] in wanted and name != "out" else ""


def for_out(value: Any) -> str:
    """Instead of an output that is no ndarray."""
    return "; out.numpy() shares the memory of a tensor" if _is_of_torch(value) else ""


def for_packed(name: str, value: Any) -> str:
    """Instead of a PackedWeight."""
    if _is_ours(value, "QuantizedWeight"):
        return f"; {name}.pack() makes one"
    if _is_ours(value, "PackedExperts"):
        return f"; grouped_linear and moe take them, and {name}[i] is the weight of one"
    if _is_of_torch(value) and not hasattr(value, "detach"):
        if hasattr(type(value), "packed"):
            return f"; {name}.packed is the one of a layer"
        return "; layers and models of torch are called, and pyda8w4.torch.quantize_ quantizes them"
    if isinstance(value, (str, os.PathLike)):
        return "; pyda8w4.load gives those of a file, by name"
    if isinstance(value, Mapping):
        return "; load and state dicts have weights by name, such as weights['name']"
    if isinstance(value, (list, tuple)) and value and all(_is_ours(each, "PackedWeight") for each in value):
        return "; pyda8w4.concat joins several along N"
    if hasattr(value, "dtype") or isinstance(value, (list, tuple)):
        return "; pyda8w4.quantize makes one of float weights, pyda8w4.prepack of codes and scales"
    return ""


def for_experts(value: Any) -> str:
    """Instead of PackedExperts."""
    is_weight = _is_ours(value, "PackedWeight")
    return "; pyda8w4.stack makes some of packed weights" if is_weight or isinstance(value, (list, tuple)) else ""


def for_model(value: Any) -> str:
    """Instead of a module of torch."""
    if isinstance(value, (str, os.PathLike)):
        return "; transformers loads one, and pyda8w4.torch.from_checkpoint one that is quantized already"
    return "; pyda8w4.quantize takes the array of a weight" if hasattr(value, "dtype") else ""


def _is_ours(value: Any, name: str) -> bool:
    """Without the class, whose module needs this one."""
    return type(value).__name__ == name and type(value).__module__.startswith("pyda8w4.")


def _is_of_torch(value: Any) -> bool:
    """A tensor or a module, of whatever subclass. Nothing here may import torch."""
    return any(base.__module__.partition(".")[0] == "torch" for base in type(value).__mro__)
