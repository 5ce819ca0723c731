"""MLX: weights that mlx.core.quantize makes, and checkpoints of mlx-lm and mlx-vlm.

The layout is that of ``mlx/backend/cpu/quantized.cpp``: the codes of a row are one stream of bits, the first code in
the lowest bits of the first word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import FLOATS, as_array_of, one_of
from pyda8w4._format import Format
from pyda8w4._safetensors import Tensor
from pyda8w4.formats._bits import fields
from pyda8w4.formats._floats import E2M1_TWICE, e4m3, half_of_e8m0
from pyda8w4.formats._layer import Layer
from pyda8w4.formats._parts import FLOAT_TYPES, Parts, scale_dtype
from pyda8w4.formats._weight import QuantizedWeight

__all__ = ["unpack"]

_DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
_BITS = (1, 2, 3, 4, 5, 6, 8)
_FLOATS_OF_8_BITS = "the codes of mode mxfp8 are floats"


def unpack(
    weight: npt.ArrayLike,
    scales: npt.ArrayLike,
    biases: npt.ArrayLike | None = None,
    *,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
) -> QuantizedWeight:
    """Take what ``mlx.core.quantize`` gives.

    Parameters
    ----------
    weight : (N, K * bits / 32) ndarray of uint32
        Codes.
    scales : (N, K / group_size) ndarray
        Of each group: float16, bfloat16 or float32, which may be negative; in other modes uint8, the bits of E8M0
        (mxfp4) or E4M3 (nvfp4).
    biases : (N, K / group_size) ndarray of float16, bfloat16 or float32, optional
        Of each group; only the mode affine has them.
    group_size : int, optional
        None means that of MLX: 64, in the mode mxfp4 32, nvfp4 16.
    bits : {1, 2, 3, 4, 5, 6, 8}, optional
        Of a code. None means 4.
    mode : {'affine', 'mxfp4', 'nvfp4'}
        What codes stand for.

    Returns
    -------
    QuantizedWeight
        Exactly these weights, of 4, 5, 6 or 8 bits; of float32 scales, as float32 rounds product and sum, which is
        what MLX gives.

    Raises
    ------
    TypeError
        If an array has the wrong type.
    ValueError
        If shapes do not fit each other, or the mode is mxfp8, which has floats of 8 bits for codes.

    Notes
    -----
    ``w = code * scale + bias``; in the modes mxfp4 and nvfp4 ``w = E2M1(code) * scale``.

    Examples
    --------
    >>> import numpy as np
    >>> from pyda8w4.formats import mlx
    >>> words = np.array([[0x76543210]], np.uint32)
    >>> scales, biases = np.array([[-0.5]], np.float16), np.array([[4]], np.float16)
    >>> mlx.unpack(words, scales, biases, group_size=8).pack().dequantize()
    array([[4. , 3.5, 3. , 2.5, 2. , 1.5, 1. , 0.5]], dtype=float32)
    """
    settings = _settings(group_size, bits, mode)
    if mode == "mxfp8":
        raise ValueError(_FLOATS_OF_8_BITS)
    words, _ = as_array_of("weight", weight, ("uint32",))
    stored, _ = as_array_of("scales", scales, FLOATS if mode == "affine" else ("uint8",))
    offsets = None if biases is None else as_array_of("biases", biases, FLOATS)[0]
    _sizes(words.shape, stored.shape, None if offsets is None else offsets.shape, settings)
    codes = _codes(words, settings.bits)
    if mode == "affine":
        zps = np.zeros(stored.shape, np.int8)
        stored_bits = max(settings.bits, 4)
        return QuantizedWeight(codes, stored, zps, offsets, bits=stored_bits, group_size=settings.group_size)
    if mode == "mxfp4":
        if (stored == 255).any():
            raise ValueError("scales must be finite, got E8M0's NaN")
        halves = half_of_e8m0(stored)
    else:
        halves = e4m3(stored) * np.float32(0.5)
    return QuantizedWeight(codes, halves, table=E2M1_TWICE, group_size=settings.group_size)


def layers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Layer]:
    """Find the layers of a checkpoint.

    Parameters
    ----------
    config : mapping
        ``quantization`` of config.json: ``group_size``, ``bits`` and ``mode``, and under the paths of modules their
        own, or false. Or ``quantization_config`` of transformers' MetalConfig, which names ``biases`` ``qbiases``.
    tensors : mapping of str to Tensor
        All of the checkpoint.

    Returns
    -------
    dict of str to Layer
        By the paths of modules.

    Raises
    ------
    ValueError
        If `config` has something else than numbers for `group_size` or `bits`.
    """
    general = _configured(config, "quantization")
    found: dict[str, Layer] = {}
    for name in tensors:
        module = name.removesuffix(".scales")
        weight = tensors.get(f"{module}.weight")
        if module == name or weight is None or weight.is_float or config.get(module) is False:
            continue
        own = config.get(module, True)
        if type(own) not in (bool, dict):
            raise ValueError(f"quantization: {module} must be an object or a bool, got {own!r}")
        settings = _configured(own, f"quantization: {module}") if type(own) is dict else general
        parts = Parts(tensors, f"{module}.", ("weight", "scales", "biases", "qbiases"))
        found[module] = _layer(module, parts, settings)
    return found


# ---- shapes and codes ------------------------------------------------------------------------


class _Settings(NamedTuple):
    group_size: int
    bits: int
    mode: str


def _settings(group_size: int | None, bits: int | None, mode: str) -> _Settings:
    """With MLX's defaults. ValueError if there is no such quantization."""
    if mode not in _DEFAULTS:
        raise ValueError(f"mode must be {one_of(tuple(_DEFAULTS))}, got {mode!r}")
    defaults = _DEFAULTS[mode]
    found = _Settings(group_size or defaults[0], bits or defaults[1], mode)
    if found.bits not in _BITS:
        raise ValueError(f"bits must be {one_of(_BITS)}, got {bits!r}")
    if found.group_size < 1 or found.group_size % 4:
        raise ValueError(f"group_size must be a positive multiple of 4, got {group_size!r}")
    if mode != "affine" and found[:2] != defaults:
        raise ValueError(f"group_size and bits must be {defaults} in the mode {mode}, got {found[:2]}")
    return found


def _sizes(
    weight: tuple[int, ...], scales: tuple[int, ...], biases: tuple[int, ...] | None, settings: _Settings
) -> tuple[int, int]:
    group_size, bits, mode = settings
    if len(weight) != 2 or 0 in weight:
        raise ValueError(f"weight must be a non-empty matrix, got shape {weight}")
    n, k = weight[0], 32 * weight[1] // bits
    if k * bits != 32 * weight[1] or k % 8 or k % group_size:
        raise ValueError(f"weight must have rows of whole groups of {group_size} codes of {bits} bits, got {weight}")
    if scales != (n, k // group_size):
        raise ValueError(f"scales must have shape {(n, k // group_size)}, got {scales}")
    if mode == "affine" and biases is None:
        raise ValueError("biases are missing")
    if mode != "affine" and biases is not None:
        raise ValueError(f"biases must not be given in the mode {mode}")
    if biases is not None and biases != scales:
        raise ValueError(f"biases must have shape {scales}, got {biases}")
    return n, k


def _codes(words: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint8]:
    if 8 % bits == 0:
        return fields(words, bits, 1)
    # Eight codes are in as many bytes as one has bits: one number, of which each code is a field.
    data = np.ascontiguousarray(words, "<u4").view(np.uint8).reshape(len(words), -1, bits)
    numbers = np.zeros((*data.shape[:2], 8), np.uint8)
    numbers[:, :, :bits] = data
    numbers = numbers.view("<u8")
    codes = np.empty((*data.shape[:2], 8), np.uint8)
    for i in range(8):
        field = numbers[:, :, 0] >> np.uint64(bits * i) & np.uint64((1 << bits) - 1)
        np.copyto(codes[:, :, i], field, casting="unsafe")
    return codes.reshape(len(words), -1)


def _mxfp8(weight: npt.NDArray[np.uint32], scales: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    floats = e4m3(fields(weight, 8, 1))
    with np.errstate(over="ignore", invalid="ignore"):
        powers: npt.NDArray[np.float32] = np.where(scales == 255, np.float32(np.nan), 2 * half_of_e8m0(scales))
        floats.reshape(*scales.shape, -1)[...] *= powers[:, :, None]
    return floats


# ---- checkpoints -----------------------------------------------------------------------------


class _Configured(NamedTuple):
    group_size: int | None
    bits: int | None
    mode: str


def _configured(config: Mapping[str, Any], where: str) -> _Configured:
    for key in ("group_size", "bits"):
        if type(config.get(key, 1)) is not int:
            raise ValueError(f"{where}: {key} must be an int, got {config[key]!r}")
    mode = config.get("mode", "affine")
    if type(mode) is not str:
        raise ValueError(f"{where}: mode must be a str, got {mode!r}")
    return _Configured(config.get("group_size"), config.get("bits"), mode)


def _layer(module: str, parts: Parts, configured: _Configured) -> Layer:
    type_, shape = "MLX", parts.take("weight").shape
    try:
        settings = _settings(*configured)
        affine = settings.mode == "affine"
        type_ = f"MLX {settings.bits}-bit" if affine else f"MLX {settings.mode.upper()}"
        stack = shape[:1] if len(shape) == 3 else ()
        first = _matrix(parts, stack, 0)
        weight, scales, biases = _tensors(first, settings)
        n, k = _sizes(weight.shape, scales.shape, biases and biases.shape, settings)
    except ValueError as error:
        return Layer(type_, shape, parts.nbytes, parts.tensors, refusal=f"{module}: {error}")
    shape = (*stack, n, k)

    def read(index: int) -> QuantizedWeight:
        weight, scales, biases = _tensors(_matrix(parts, stack, index), settings)
        if biases is None:
            return unpack(weight.array(), scales.array(), **settings._asdict())
        return unpack(weight.array(), scales.floats(), biases.floats(), **settings._asdict())

    def floats(index: int) -> npt.NDArray[np.float32]:
        weight, scales, _ = _tensors(_matrix(parts, stack, index), settings)
        return _mxfp8(weight.array(), scales.array())

    if settings.mode == "mxfp8":
        why = f"{module}: {_FLOATS_OF_8_BITS}"
        return Layer(type_, shape, parts.nbytes, parts.tensors, floats=floats, refusal=why)
    sizes = n, k, settings.group_size
    if affine:
        assert biases is not None
        dtype, bits = scale_dtype(scales, biases), max(settings.bits, 4)
        format = Format(*sizes, dtype, zero_point=-128 if bits == 8 else 0, has_offsets=True, bits=bits)
    else:
        format = Format(*sizes, "bfloat16", zero_point=0, has_table=True)
    return Layer(type_, shape, parts.nbytes, parts.tensors, read=read, format=format)


def _matrix(parts: Parts, stack: tuple[int, ...], index: int) -> Parts:
    return parts.part(index, stack[0]) if stack else parts


def _tensors(parts: Parts, settings: _Settings) -> tuple[Tensor, Tensor, Tensor | None]:
    scales = parts.take("scales", *(FLOAT_TYPES if settings.mode == "affine" else ("U8",)))
    biases = parts.find("biases", *FLOAT_TYPES) or parts.find("qbiases", *FLOAT_TYPES)
    return parts.take("weight", "U32"), scales, biases
