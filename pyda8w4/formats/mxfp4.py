"""MXFP4 of OpenAI's gpt-oss: floats of 4 bits in blocks of 32 along K, each with a power of two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import as_array, check_dtype
from pyda8w4._safetensors import Tensor
from pyda8w4.formats._floats import E2M1_TWICE, half_of_e8m0
from pyda8w4.formats._layer import Layer, predicted_format
from pyda8w4.formats._weight import QuantizedWeight

__all__ = ["unpack"]

_BLOCK = 32
_NAN = 255  # of E8M0


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
    blocks, scales = as_array("blocks", blocks), as_array("scales", scales)
    check_dtype("blocks", blocks, ("uint8",))
    check_dtype("scales", scales, ("uint8",))
    _check_shapes(blocks.shape, scales.shape)
    codes = np.empty((*blocks.shape, 2), np.uint8)
    np.bitwise_and(blocks, 15, out=codes[..., 0])
    np.right_shift(blocks, 4, out=codes[..., 1])
    if (scales == _NAN).any():
        raise ValueError(f"scales must be 0 to {_NAN - 1}, got {_NAN}, which stands for NaN")
    return QuantizedWeight(codes.reshape(len(blocks), -1), half_of_e8m0(scales), table=E2M1_TWICE, group_size=_BLOCK)


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
    for name, tensor in tensors.items():
        if name.endswith("_blocks") and tensor.dtype == "U8":
            module = name.removesuffix("_blocks")
            found[module] = _layer(tensor, tensors.get(f"{module}_scales"))
    return found


def _layer(blocks: Tensor, scales: Tensor | None) -> Layer:
    of = [blocks] if scales is None else [blocks, scales]
    names, nbytes = tuple(tensor.name for tensor in of), sum(tensor.nbytes for tensor in of)
    is_stack = len(blocks.shape) == 4
    shape = (*blocks.shape[:-2], _BLOCK * blocks.shape[-2]) if len(blocks.shape) > 2 else blocks.shape
    try:
        if scales is None:
            raise ValueError("scales are missing")
        if scales.dtype not in ("U8", "F8_E8M0"):
            raise ValueError(f"scales must be of U8, got {scales.dtype}")
        if is_stack and (scales.shape[:1] != blocks.shape[:1] or not blocks.shape[0]):
            raise ValueError(f"scales must be of {blocks.shape[0]} experts like blocks, got shape {scales.shape}")
        n, k = _check_shapes(*(tensor.shape[is_stack:] for tensor in of))
    except ValueError as error:
        return Layer("MXFP4", shape, nbytes, names, refusal=str(error))

    def read(index: int) -> QuantizedWeight:
        return unpack(*((tensor.part(index) if is_stack else tensor).array() for tensor in of))

    return Layer("MXFP4", shape, nbytes, names, read, format=predicted_format(n, k, _BLOCK, 0, has_table=True))


def _check_shapes(blocks: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int]:
    """-> N, K."""
    if len(blocks) != 3 or 0 in blocks or blocks[2] != _BLOCK // 2:
        raise ValueError(f"blocks must have shape (N, G, {_BLOCK // 2}), got {blocks}")
    if scales != blocks[:2]:
        raise ValueError(f"scales must have shape {blocks[:2]}, got {scales}")
    return blocks[0], blocks[1] * _BLOCK
