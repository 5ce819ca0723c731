"""MXFP4 of OpenAI's gpt-oss: floats of 4 bits in blocks of 32 along K, each with a power of two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4._format import Format
from pyda8w4._quantized import QuantizedWeight
from pyda8w4._safetensors import Tensor
from pyda8w4.formats._bits import fields
from pyda8w4.formats._floats import E2M1_TWICE, half_of_e8m0
from pyda8w4.formats._layer import Layer
from pyda8w4.formats._parts import Parts, Shaped, arrays_of, check_shape, modules, named, read_arrays

__all__ = ["unpack"]

_BLOCK = 32
_NAN = 255  # of E8M0
_TYPES = {"blocks": ("U8",), "scales": ("U8", "F8_E8M0")}


def unpack(blocks: npt.ArrayLike, scales: npt.ArrayLike) -> QuantizedWeight:
    """Unpack a matrix, such as one expert of a stack.

    Parameters
    ----------
    blocks : (N, G, 16) ndarray of uint8
        Two codes a byte: the low nibble is the even k.
    scales : (N, G) ndarray of uint8
        Exponents, with a bias of 127.

    Returns
    -------
    QuantizedWeight
        Of shape (N, 32 * G).

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If shapes do not fit each other, or an exponent is 255, which stands for NaN.

    Notes
    -----
    ``w = value * 2**(scale - 127)``, where codes stand for the values of E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and the same
    with a minus (OCP Microscaling Formats 1.0; `convert_moe_packed_tensors` in transformers' `integrations/mxfp4.py`).
    The table of the weight has twice these values, and its scales are half of those. Both are exact, -0 is 0.

    Examples
    --------
    >>> import numpy as np
    >>> from pyda8w4.formats import mxfp4
    >>> blocks, scales = np.full((1, 1, 16), 0xF1, np.uint8), np.array([[128]], np.uint8)
    >>> mxfp4.unpack(blocks, scales).pack().dequantize()[0, :4]
    array([  1., -12.,   1., -12.], dtype=float32)
    """
    arrays = arrays_of(("uint8",), blocks=blocks, scales=scales)
    _check_shapes(named(arrays))
    return _unpack(**arrays)


def layers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Layer]:
    """Find the layers whose tensors are called ``*_blocks`` and ``*_scales``: matrices, or stacks of experts.

    Parameters
    ----------
    config : mapping
        With ``quant_method`` "mxfp4". All else follows from the tensors: modules that are not converted have none such.
    tensors : mapping of str to Tensor
        Of the checkpoint.

    Returns
    -------
    dict of str to Layer
        By the name before ``_blocks``.
    """
    found = {}
    for module in modules(tensors, "_blocks"):
        if tensors[f"{module}_blocks"].dtype == "U8":
            found[module] = _layer(Parts(tensors, f"{module}_", ("blocks", "scales")))
    return found


def _layer(parts: Parts) -> Layer:
    shape = parts.take("blocks").shape
    stack = shape[:1] if len(shape) == 4 else ()
    try:
        n, k = _check_shapes(parts.matrix(0, stack).take_all(_TYPES))
        format = Format(n, k, _BLOCK, "float16", zero_point=0, has_table=True)
    except ValueError as error:
        shape = (*shape[:-2], _BLOCK * shape[-2]) if len(shape) > 2 else shape
        return parts.layer("MXFP4", shape, refusal=str(error))

    def read(index: int) -> QuantizedWeight:
        return _unpack(**read_arrays(parts.matrix(index, stack).take_all(_TYPES)))

    return parts.layer("MXFP4", (*stack, n, k), read=read, format=format)


def _check_shapes(parts: Mapping[str, Shaped]) -> tuple[int, int]:
    """-> N, K."""
    blocks = parts["blocks"]
    if len(blocks.shape) != 3 or 0 in blocks.shape or blocks.shape[2] != _BLOCK // 2:
        raise ValueError(f"{blocks.name} must have shape (N, G, {_BLOCK // 2}), got {blocks.shape}")
    check_shape(parts["scales"], blocks.shape[:2])
    return blocks.shape[0], blocks.shape[1] * _BLOCK


def _unpack(blocks: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]) -> QuantizedWeight:
    if (scales == _NAN).any():
        raise ValueError(f"scales must be 0 to {_NAN - 1}, got {_NAN}, which stands for NaN")
    codes = fields(blocks, 4, axis=2).reshape(len(blocks), -1)
    return QuantizedWeight(codes, half_of_e8m0(scales), table=E2M1_TWICE, group_size=_BLOCK)
