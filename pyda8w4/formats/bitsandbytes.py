"""bitsandbytes: weights of LLM.int8(), and those of NF4 and FP4 as floats.

NF4 and FP4 have 16 floats for codes, which no table of integers holds exactly: a packed weight cannot be made of them
without quantizing again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import ceil_div, one_of
from pyda8w4._format import Format
from pyda8w4._quantized import QuantizedWeight
from pyda8w4._safetensors import Tensor, parse_json
from pyda8w4.formats._layer import Layer
from pyda8w4.formats._parts import (
    Parts,
    Shaped,
    arrays_of,
    check_count,
    check_matrix,
    check_shape,
    modules,
    named,
    read_arrays,
)

__all__ = ["dequantize_4bit", "dequantize_absmax", "unpack_int8"]

# bitsandbytes.functional.get_4bit_type.
_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
_FP4 = [0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3]
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_TABLES = {"nf4": np.array(_NF4, np.float32), "fp4": np.array(_FP4, np.float32) / np.float32(12)}


def unpack_int8(weight: npt.ArrayLike, scb: npt.ArrayLike) -> QuantizedWeight:
    """Take a weight of LLM.int8().

    Parameters
    ----------
    weight : (N, K) ndarray of int8
        Codes.
    scb : (N,) ndarray of float32
        The absolute maximum of each row.

    Returns
    -------
    QuantizedWeight
        Of 8 bits, with one scale for each row.

    Raises
    ------
    TypeError
        If an array has the wrong type.
    ValueError
        If shapes do not fit each other.

    Notes
    -----
    ``w = code * scb / 127``. The scale is ``scb / 127``, rounded to float32, which no float holds exactly. bitsandbytes
    rounds, too, and nowhere alike: it multiplies by a rounded 1 / 127, or divides, or multiplies sums of products by
    6.200124e-05, which stands for 1 / 127**2.

    Examples
    --------
    >>> import numpy as np
    >>> from pyda8w4.formats import bitsandbytes
    >>> weight = bitsandbytes.unpack_int8(np.array([[127, 0, -127, 64]], np.int8), np.array([0.5], np.float32))
    >>> weight.pack().dequantize()
    array([[ 0.5      ,  0.       , -0.5      ,  0.2519685]], dtype=float32)
    """
    arrays = arrays_of(("int8",), weight=weight) | arrays_of(("float32",), scb=scb)
    _, k = _check_8bit(named(arrays))
    with np.errstate(invalid="ignore"):  # prepack refuses what is not finite
        scales = arrays["scb"][:, None] / np.float32(127)
    return QuantizedWeight(arrays["weight"], scales, bits=8, group_size=k)


def dequantize_4bit(
    weight: npt.ArrayLike,
    absmax: npt.ArrayLike,
    *,
    shape: tuple[int, ...],
    quant_type: str = "nf4",
    blocksize: int = 64,
) -> npt.NDArray[np.float32]:
    """Give the floats of a weight of NF4 or FP4.

    Parameters
    ----------
    weight : ndarray of uint8
        Two codes a byte, the first in the high bits, in the order of the floats.
    absmax : ndarray of float32
        The absolute maximum of each block.
    shape : tuple of int
        Of the floats.
    quant_type : {'nf4', 'fp4'}
        What codes stand for.
    blocksize : int
        Floats in a block: 32, 64, ..., 4096. Blocks follow each other, whatever the shape; the last may be shorter.

    Returns
    -------
    ndarray of float32
        Of `shape`.

    Raises
    ------
    TypeError
        If an array has the wrong type.
    ValueError
        If there are not as many codes and blocks as `shape` needs, or `quant_type` is another.

    Notes
    -----
    ``w = table[code] * absmax``, rounded to float32; bitsandbytes rounds that to the type of the model. The tables are
    those of ``bitsandbytes.functional.get_4bit_type``.

    Examples
    --------
    >>> import numpy as np
    >>> from pyda8w4.formats import bitsandbytes
    >>> bitsandbytes.dequantize_4bit(np.array([0x0F, 0x7F], np.uint8), np.array([0.5], np.float32), shape=(2, 2))
    array([[-0.5,  0.5],
           [ 0. ,  0.5]], dtype=float32)
    """
    arrays = arrays_of(("uint8",), weight=weight) | arrays_of(("float32",), absmax=absmax)
    count = _check_4bit(named(arrays), shape, quant_type, blocksize)
    data, maxima = (array.reshape(-1) for array in arrays.values())
    return _floats(data, maxima, quant_type, blocksize, 0, count).reshape(shape)


def dequantize_absmax(
    absmax: npt.ArrayLike,
    nested_absmax: npt.ArrayLike,
    nested_quant_map: npt.ArrayLike,
    *,
    nested_offset: float,
    nested_blocksize: int = 256,
) -> npt.NDArray[np.float32]:
    """Give absolute maxima that are quantized themselves: double quantization.

    Parameters
    ----------
    absmax : ndarray of uint8
        Codes.
    nested_absmax : ndarray of float32
        The absolute maximum of each of their blocks.
    nested_quant_map : (256,) ndarray of float32
        What the codes stand for.
    nested_offset : float
        What is added.
    nested_blocksize : int
        Codes in a block: 32, 64, ..., 4096.

    Returns
    -------
    ndarray of float32
        For `dequantize_4bit`.

    Raises
    ------
    TypeError
        If an array has the wrong type.
    ValueError
        If shapes do not fit each other.

    Notes
    -----
    ``nested_quant_map[absmax] * nested_absmax + nested_offset``, each operation rounded to float32.

    Examples
    --------
    >>> import numpy as np
    >>> from pyda8w4.formats import bitsandbytes
    >>> table = np.linspace(-1, 1, 256, dtype=np.float32)
    >>> maxima = np.array([0.25], np.float32)
    >>> bitsandbytes.dequantize_absmax(np.array([0, 255], np.uint8), maxima, table, nested_offset=1)
    array([0.75, 1.25], dtype=float32)
    """
    arrays = arrays_of(("uint8",), absmax=absmax)
    arrays |= arrays_of(("float32",), nested_absmax=nested_absmax, nested_quant_map=nested_quant_map)
    _check_nested(named(arrays), nested_offset, nested_blocksize)
    codes, maxima, table = (array.reshape(-1) for array in arrays.values())
    found: npt.NDArray[np.float32] = table[codes]
    with np.errstate(over="ignore", invalid="ignore"):
        found *= np.repeat(maxima, nested_blocksize)[: codes.size]
        found += np.float32(nested_offset)
    return found


def layers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Layer]:
    """Find the layers of a checkpoint.

    Parameters
    ----------
    config : mapping
        ``quantization_config`` of config.json. Nothing of it is needed: every layer has its own in tensors.
    tensors : mapping of str to Tensor
        All of the checkpoint.

    Returns
    -------
    dict of str to Layer
        By the paths of modules; where the quantized tensor of a module is not its weight, by the name of the tensor.
        Those of NF4 and FP4 are refused, and have floats.
    """
    found: dict[str, Layer] = {}
    for name in tensors:
        weight, _, kind = name.rpartition(".quant_state.bitsandbytes__")
        if weight and weight in tensors:
            found[weight.removesuffix(".weight")] = _layer_4bit(weight, kind, tensors)
    for module in modules(tensors, ".SCB"):
        if f"{module}.weight" in tensors:
            found[module] = _layer_8bit(Parts(tensors, f"{module}.", ("weight", "SCB", "weight_format")))
    return found


# ---- 4 bits ----------------------------------------------------------------------------------


def _check_4bit(parts: Mapping[str, Shaped], shape: Sequence[int], quant_type: str, blocksize: Any) -> int:
    """-> how many floats."""
    if quant_type not in _TABLES:
        raise ValueError(f"quant_type must be {one_of(tuple(_TABLES))}, got {quant_type!r}")
    if blocksize not in _BLOCKSIZES:
        raise ValueError(f"blocksize must be {one_of(_BLOCKSIZES)}, got {blocksize!r}")
    if not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"shape must be positive ints, got {shape!r}")
    count, weight = prod(shape), parts["weight"]
    nbytes = prod(weight.shape) * weight.itemsize
    if nbytes != ceil_div(count, 2):
        raise ValueError(f"{weight.name} must have {ceil_div(count, 2)} bytes for shape {tuple(shape)}, got {nbytes}")
    check_count(parts["absmax"], ceil_div(count, blocksize))
    return count


def _check_nested(parts: Mapping[str, Shaped], offset: Any, blocksize: Any) -> None:
    if blocksize not in _BLOCKSIZES:
        raise ValueError(f"nested_blocksize must be {one_of(_BLOCKSIZES)}, got {blocksize!r}")
    if type(offset) not in (int, float) or not abs(offset) < 1e30:
        raise ValueError(f"nested_offset must be a finite float, got {str(offset)[:20]}")
    check_count(parts["nested_absmax"], ceil_div(prod(parts["absmax"].shape), blocksize))
    check_count(parts["nested_quant_map"], 256)


def _floats(
    data: npt.NDArray[np.uint8],
    absmax: npt.NDArray[np.float32],
    quant_type: str,
    blocksize: int,
    begin: int,
    end: int,
) -> npt.NDArray[np.float32]:
    """Those from `begin` to `end`."""
    table = _TABLES[quant_type]
    both = np.stack([table.repeat(16), np.tile(table, 16)], axis=1)  # of a byte
    first, after = begin // blocksize, ceil_div(end, blocksize)
    data = data[first * blocksize // 2 : after * blocksize // 2]
    found = np.empty((after - first, blocksize // 2, 2), np.float32)
    flat = found.reshape(-1, 2)
    for at in range(0, len(data), 1 << 20):  # numpy makes indices of 8 bytes
        some = data[at : at + (1 << 20)]
        flat[at : at + len(some)] = both[some]
    flat[len(data) :] = 0
    with np.errstate(over="ignore", invalid="ignore"):
        found *= absmax[first:after, None, None]
    return found.reshape(-1)[begin - first * blocksize : end - first * blocksize]


def _layer_4bit(name: str, kind: str, tensors: Mapping[str, Tensor]) -> Layer:
    state, nested = f"quant_state.bitsandbytes__{kind}", ("nested_absmax", "nested_quant_map")
    parts = Parts(tensors, name, ("", *(f".{part}" for part in ("absmax", "quant_map", *nested, state))))
    type_, weight = f"bitsandbytes {kind.upper()}", parts.take("")
    try:
        said = _state(parts.take(f".{state}", "U8"))
        blocksize: Any = said.get("blocksize")
        sizes = said.get("shape")
        if said.get("quant_type") != kind:
            raise ValueError(f"quant_type must be {kind}, got {said.get('quant_type')!r}")
        if type(sizes) is not list or len(sizes) not in (2, 3):
            raise ValueError(f"shape must be two or three ints, got {sizes!r}")
        of_blocks = {"absmax": parts.take(".absmax", "U8" if ".nested_absmax" in parts else "F32")}
        _check_4bit({"weight": weight, **of_blocks}, sizes, kind, blocksize)
        if ".nested_absmax" in parts:
            of_blocks |= {part: parts.take(f".{part}", "F32") for part in nested}
            more: dict[str, Any] = {key: said.get(key) for key in ("nested_offset", "nested_blocksize")}
            _check_nested(of_blocks, *more.values())
        stored = parts.find(".quant_map", "F32")
        if stored is not None and not np.array_equal(stored.array(), _TABLES[kind]):
            raise ValueError(f"{stored.name} must be that of {kind.upper()}, got another")
    except ValueError as error:
        return parts.layer(type_, weight.shape, refusal=str(error))
    shape = tuple(sizes)

    def floats(index: int) -> npt.NDArray[np.float32]:
        arrays: dict[str, Any] = read_arrays(of_blocks)
        absmax = dequantize_absmax(**arrays, **more) if len(arrays) > 1 else arrays["absmax"].reshape(-1)
        count = prod(shape[-2:])
        found = _floats(weight.bytes, absmax, kind, blocksize, index * count, (index + 1) * count)
        return found.reshape(shape[-2:])

    why = f"{kind.upper()} has 16 floats for codes, which no table of integers holds"
    return parts.layer(type_, shape, floats=floats, refusal=why)


def _state(tensor: Tensor) -> dict[str, Any]:
    """What does not fit tensors, as JSON."""
    try:
        found = parse_json(tensor.bytes.tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"quant_state must be JSON: {error}") from None
    if type(found) is not dict:
        raise ValueError(f"quant_state must be a JSON object, got {found!r}")
    return found


# ---- 8 bits ----------------------------------------------------------------------------------


def _layer_8bit(parts: Parts) -> Layer:
    shape, type_ = parts.take("weight").shape, "bitsandbytes 8-bit"
    try:
        tensors = {"weight": parts.take("weight", "I8"), "scb": parts.take("SCB", "F32")}
        n, k = _check_8bit(tensors)
        order = parts.find("weight_format", "U8")
        if order is not None and order.bytes.any():
            raise ValueError(f"{order.name} must be 0, which means rows: others are those of GPUs")
        format = Format(n, k, k, "float32", zero_point=0, bits=8)
    except ValueError as error:
        return parts.layer(type_, shape, refusal=str(error))

    def read(index: int) -> QuantizedWeight:
        return unpack_int8(**read_arrays(tensors))

    return parts.layer(type_, shape, read=read, format=format)


def _check_8bit(parts: Mapping[str, Shaped]) -> tuple[int, int]:
    """-> N, K."""
    n, k = check_matrix(parts["weight"])
    check_shape(parts["scb"], (n,))
    return n, k
