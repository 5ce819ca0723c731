"""MLX: weights that mlx.core.quantize makes, and checkpoints of mlx-lm and mlx-vlm.

The layout is that of ``mlx/backend/cpu/quantized.cpp``: the codes of a row are one stream of bits, the first code in
the lowest bits of the first word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import FLOATS, one_of
from pyda8w4._format import Format
from pyda8w4._quantized import QuantizedWeight
from pyda8w4._safetensors import Tensor
from pyda8w4.formats import _config
from pyda8w4.formats._bits import check_bits, fields, stored_bits, stream
from pyda8w4.formats._floats import E2M1_TWICE, e4m3, half_of_e8m0
from pyda8w4.formats._layer import Layer
from pyda8w4.formats._parts import (
    FLOAT_TYPES,
    Parts,
    Shaped,
    arrays_of,
    check_matrix,
    check_shape,
    modules,
    named,
    read_arrays,
    scale_dtype,
)

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
    arrays = (
        arrays_of(("uint32",), weight=weight)
        | arrays_of(FLOATS if mode == "affine" else ("uint8",), scales=scales)
        | arrays_of(FLOATS, biases=biases)
    )
    _sizes(named(arrays), settings)
    return _unpack(arrays, settings)


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
    general = _configured(config, _config.WHOLE)
    found: dict[str, Layer] = {}
    for module in modules(tensors, ".scales"):
        weight = tensors.get(f"{module}.weight")
        if weight is None or weight.is_float or config.get(module) is False:
            continue
        settings = general
        if config.get(module) not in (None, True):
            settings = _configured(_config.mapping(config, module), f"{module} of {_config.WHOLE}")
        found[module] = _layer(Parts(tensors, f"{module}.", ("weight", "scales", "biases", "qbiases")), settings)
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
    group, width = _DEFAULTS[mode]
    found = _Settings(group if group_size is None else group_size, width if bits is None else bits, mode)
    check_bits("bits", found.bits, _BITS)
    if found.group_size < 1 or found.group_size % 4:
        raise ValueError(f"group_size must be a positive multiple of 4, got {group_size!r}")
    if mode != "affine" and found[:2] != (group, width):
        raise ValueError(f"group_size and bits must be {(group, width)} in the mode {mode}, got {found[:2]}")
    return found


def _sizes(parts: Mapping[str, Shaped], settings: _Settings) -> tuple[int, int]:
    group_size, bits, mode = settings
    weight = parts["weight"]
    n, words = check_matrix(weight)
    k = 32 * words // bits
    if k * bits != 32 * words or k % 8 or k % group_size:
        raise ValueError(
            f"{weight.name} must have rows of whole groups of {group_size} codes of {bits} bits, got {weight.shape}"
        )
    check_shape(parts["scales"], (n, k // group_size))
    if mode == "affine":
        if "biases" not in parts:
            raise ValueError("biases are missing")
        check_shape(parts["biases"], (n, k // group_size))
    elif "biases" in parts:
        raise ValueError(f"biases must not be given in the mode {mode}")
    return n, k


def _unpack(arrays: Mapping[str, npt.NDArray[Any]], settings: _Settings) -> QuantizedWeight:
    group_size, bits, mode = settings
    words, scales = arrays["weight"], arrays["scales"]
    codes = stream(words, bits, 32 * words.shape[1] // bits)
    if mode == "affine":
        zps = np.zeros(scales.shape, np.int8)
        return QuantizedWeight(codes, scales, zps, arrays["biases"], bits=stored_bits(bits), group_size=group_size)
    if mode == "mxfp4":
        if (scales == 255).any():
            raise ValueError("scales must be finite, got E8M0's NaN")
        halves = half_of_e8m0(scales)
    else:
        halves = e4m3(scales) * np.float32(0.5)
    return QuantizedWeight(codes, halves, table=E2M1_TWICE, group_size=group_size)


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
    return _Configured(
        _config.optional_integer(config, "group_size", where),
        _config.optional_integer(config, "bits", where),
        _config.word(config, "mode", default="affine", where=where),
    )


def _layer(parts: Parts, configured: _Configured) -> Layer:
    type_, shape = "MLX", parts.take("weight").shape
    try:
        settings = _settings(*configured)
        affine = settings.mode == "affine"
        type_ = f"MLX {settings.bits}-bit" if affine else f"MLX {settings.mode.upper()}"
        stack = shape[:1] if len(shape) == 3 else ()
        first = _tensors(parts.matrix(0, stack), settings)
        n, k = _sizes(first, settings)
        format = _format(n, k, settings, first)
    except ValueError as error:
        return parts.layer(type_, shape, refusal=str(error))
    shape = (*stack, n, k)

    def read(index: int) -> QuantizedWeight:
        return _unpack(read_arrays(_tensors(parts.matrix(index, stack), settings)), settings)

    def floats(index: int) -> npt.NDArray[np.float32]:
        return _mxfp8(**read_arrays(_tensors(parts.matrix(index, stack), settings)))

    if settings.mode == "mxfp8":
        return parts.layer(type_, shape, floats=floats, refusal=_FLOATS_OF_8_BITS)
    return parts.layer(type_, shape, read=read, format=format)


def _tensors(parts: Parts, settings: _Settings) -> dict[str, Tensor]:
    found = {
        "weight": parts.take("weight", "U32"),
        "scales": parts.take("scales", *(FLOAT_TYPES if settings.mode == "affine" else ("U8",))),
    }
    if "biases" in parts and "qbiases" in parts:
        raise ValueError("biases and qbiases are both there")
    for name in ("qbiases", "biases"):
        if name in parts:
            found["biases"] = parts.take(name, *FLOAT_TYPES)
    return found


def _format(n: int, k: int, settings: _Settings, tensors: dict[str, Tensor]) -> Format:
    sizes = n, k, settings.group_size
    if settings.mode != "affine":
        return Format(*sizes, "bfloat16", zero_point=0, has_table=True)
    dtype, bits = scale_dtype(tensors["scales"], tensors["biases"]), stored_bits(settings.bits)
    return Format(*sizes, dtype, zero_point=-128 if bits == 8 else 0, has_offsets=True, bits=bits)
