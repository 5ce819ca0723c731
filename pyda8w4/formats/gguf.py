"""GGUF, the files of llama.cpp: tensors of ggml's types.

>>> import numpy as np
>>> from pyda8w4.formats import gguf
>>> d, nibbles = np.array([0.5], np.float16).view(np.uint8), np.full(16, 0x9A, np.uint8)
>>> weight = gguf.unpack(np.concatenate([d, nibbles])[None], "Q4_0")
>>> weight.pack().dequantize()[0, [0, 15, 16, 31]]
array([1. , 1. , 0.5, 0.5], dtype=float32)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import as_array, check_dtype, one_of
from pyda8w4._format import Format
from pyda8w4._quantized import QuantizedWeight
from pyda8w4.formats import _bits
from pyda8w4.formats._floats import E2M1_TWICE, e4m3, half_of_e8m0

__all__ = ["unpack"]


def unpack(data: npt.ArrayLike, type: str) -> QuantizedWeight:
    """Take the blocks of a tensor apart.

    Parameters
    ----------
    data : (N, bytes of a row) ndarray of uint8
        The tensor as it is in the file.
    type : str
        Its type, as ggml names it: "Q1_0", "Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K",
        "Q8_0", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4" or "NVFP4".

    Returns
    -------
    QuantizedWeight
        What `pyda8w4.formats.QuantizedWeight.pack` makes of it stands for the weights to which ggml dequantizes the
        tensor, bit for bit.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If `type` is none of these, `data` has not the shape of whole blocks, or a scale of MXFP4 is NaN.

    Notes
    -----
    The blocks are those of ggml's ggml-common.h, and what they stand for is what the functions dequantize_row_* of
    ggml-quants.c say: in most types ``d * code``, with a float16 `d` for 32 weights and a code less half its range;
    in Q4_1 and Q5_1 ``d * code + m``. Q2_K, Q3_K, Q4_K, Q5_K, Q6_K and IQ4_XS have scales of two levels: a float16
    for 256 weights times an integer for each 16 or 32, and Q2_K, Q4_K and Q5_K subtract minima of the same kind. All
    products are exact in float32; where something is added to them, the sum is rounded once. Codes of IQ4_NL and
    IQ4_XS stand for the values of a table, as do those of MXFP4 and NVFP4, which are 4-bit floats.

    Codes of less than 4 bits take 4 bits when they are packed.

    ggml takes the scale NaN of NVFP4 for 0. The scale of a whole tensor in NVFP4 is another tensor, which is not part
    of these weights.
    """
    if not isinstance(type, str):
        raise TypeError(f"type must be a str, got {type.__class__.__name__}")
    if type not in TYPES:
        raise ValueError(f"type must be {one_of(tuple(TYPES))}, got {type!r}")
    array = as_array("data", data)
    check_dtype("data", array, ("uint8",))
    size = TYPES[type].size
    if array.ndim != 2 or 0 in array.shape or array.shape[1] % size:
        raise ValueError(f"data of {type} must be a matrix of rows of whole blocks of {size} bytes, got {array.shape}")
    return TYPES[type].unpack(array.reshape(len(array), -1, size))


def format_of(type: str, n: int, k: int) -> Format:
    """What a tensor will be when it is packed."""
    return Format(n=n, k=k, scale_dtype="float16", **TYPES[type].packed)


# ---- its blocks ------------------------------------------------------------------------------
# A row is blocks of 32 to 256 weights: bytes with scales, and codes whose bits lie in one or two places. Functions
# take (N, blocks of a row, bytes of a block).

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# Of E4M3 whose highest bit is unused. ggml takes one NaN for 0, and the other for a number.
_HALF_UE4M3 = np.abs(e4m3(np.arange(256, dtype=np.uint8))) / 2
_HALF_UE4M3[[127, 255]] = 0, 240


def _q1_0(blocks: npt.NDArray[Any]) -> QuantizedWeight:
    codes = _fields(blocks[:, :, 2:], 1, 1) << 1
    return QuantizedWeight(codes, _halves(blocks, 0), _same(codes, 128, 1))


def _q2_k(blocks: npt.NDArray[Any]) -> QuantizedWeight:
    codes = _fields(blocks[:, :, 16:80], 2, 32)
    both = blocks[:, :, :16].reshape(len(blocks), -1)
    return QuantizedWeight(
        codes,
        _halves(blocks, 80),
        _same(codes, 16, 0),
        -_halves(blocks, 82),
        sub_scales=both & np.uint8(15),
        sub_offsets=both >> np.uint8(4),
    )


def _q3_k(blocks: npt.NDArray[Any]) -> QuantizedWeight:
    codes = _fields(blocks[:, :, 32:96], 2, 32) | _fields(blocks[:, :, :32], 1, 32) << 2
    six_bits = _fields(blocks[:, :, 96:104], 4, 8) | _fields(blocks[:, :, 104:108], 2, 4) << 4
    return QuantizedWeight(codes, _halves(blocks, 108), _same(codes, 16, 4), sub_scales=_less_32(six_bits))


def _q4_0(blocks: npt.NDArray[Any]) -> QuantizedWeight:
    return QuantizedWeight(_fields(blocks[:, :, 2:], 4, 16), _halves(blocks, 0))


def _q4_1(blocks: npt.NDArray[Any]) -> QuantizedWeight:
    codes = _fields(blocks[:, :, 4:], 4, 16)
    return QuantizedWeight(codes, _halves(blocks, 0), _same(codes, 32, 0), _halves(blocks, 2))


def _q4_k(blocks: npt.NDArray[Any]) -> QuantizedWeight:
    return _with_minima(_fields(blocks[:, :, 16:], 4, 32), blocks, bits=4)


def _q5_0(blocks: npt.NDArray[Any]) -> QuantizedWeight:
    return QuantizedWeight(_five_bits(blocks, 2), _halves(blocks, 0), bits=5)


def _q5_1(blocks: npt.NDArray[Any]) -> QuantizedWeight:
    codes = _five_bits(blocks, 4)
    return QuantizedWeight(codes, _halves(blocks, 0), _same(codes, 32, 0), _halves(blocks, 2), bits=5)


def _q5_k(blocks: npt.NDArray[Any]) -> QuantizedWeight:
    codes = _fields(blocks[:, :, 48:], 4, 32) | _fields(blocks[:, :, 16:48], 1, 32) << 4
    return _with_minima(codes, blocks, bits=5)


def _with_minima(codes: npt.NDArray[Any], blocks: npt.NDArray[Any], bits: int) -> QuantizedWeight:
    """With the first 16 bytes of a block: two float16, and 6 bits twice for each of 8 groups."""
    scales, minima, both = (blocks[:, :, at : at + 4] for at in (4, 8, 12))  # both: lower bits of the last 4 groups

    def six_bits(part: npt.NDArray[Any], last: npt.NDArray[Any]) -> npt.NDArray[Any]:
        fields: npt.NDArray[Any] = np.concatenate([part & 63, last | part >> 2 & 48], axis=2)
        return fields.reshape(len(blocks), -1)

    return QuantizedWeight(
        codes,
        _halves(blocks, 0),
        _same(codes, 32, 0),
        -_halves(blocks, 2),
        bits=bits,
        sub_scales=six_bits(scales, both & 15),
        sub_offsets=six_bits(minima, both >> 4),
    )


def _q6_k(blocks: npt.NDArray[Any]) -> QuantizedWeight:
    codes = _fields(blocks[:, :, :128], 4, 64) | _fields(blocks[:, :, 128:192], 2, 32) << 4
    sub_scales = blocks[:, :, 192:208].reshape(len(blocks), -1).view(np.int8)
    return QuantizedWeight(codes, _halves(blocks, 208), bits=6, sub_scales=sub_scales)


def _q8_0(blocks: npt.NDArray[Any]) -> QuantizedWeight:
    codes = blocks[:, :, 2:].reshape(len(blocks), -1).view(np.int8)
    return QuantizedWeight(codes, _halves(blocks, 0), bits=8)


def _iq4_nl(blocks: npt.NDArray[Any]) -> QuantizedWeight:
    return QuantizedWeight(_fields(blocks[:, :, 2:], 4, 16), _halves(blocks, 0), table=_IQ4)


def _iq4_xs(blocks: npt.NDArray[Any]) -> QuantizedWeight:
    six_bits = _fields(blocks[:, :, 4:8], 4, 1) | _fields(blocks[:, :, 2:4], 2, 1) << 4
    codes = _fields(blocks[:, :, 8:], 4, 16)
    return QuantizedWeight(codes, _halves(blocks, 0), table=_IQ4, sub_scales=_less_32(six_bits))


def _tq1_0(blocks: npt.NDArray[Any]) -> QuantizedWeight:
    # A byte is a fraction of 256 in base 3: times 3, the next digit is what overflows.
    parts = [_digits(blocks[:, :, :32], 5), _digits(blocks[:, :, 32:48], 5), _digits(blocks[:, :, 48:52], 4)]
    codes = np.concatenate(parts, axis=2).reshape(len(blocks), -1)
    return QuantizedWeight(codes, _halves(blocks, 52), _same(codes, 256, 1))


def _digits(data: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """The first digits of all bytes, then the second ones, and so on."""
    powers = np.array([3**digit for digit in range(count)], np.uint8)[:, None]
    rest = (data[:, :, None] * powers).astype(np.uint16)
    digits: npt.NDArray[Any] = (rest * np.uint16(3) >> 8).astype(np.uint8)
    return digits.reshape(*data.shape[:2], -1)


def _tq2_0(blocks: npt.NDArray[Any]) -> QuantizedWeight:
    codes = _fields(blocks[:, :, :64], 2, 32)
    return QuantizedWeight(codes, _halves(blocks, 64), _same(codes, 256, 1))


def _mxfp4(blocks: npt.NDArray[Any]) -> QuantizedWeight:
    exponents = blocks[:, :, 0]
    if (exponents == 255).any():
        raise ValueError("scales must be finite, got the exponent 255")
    return QuantizedWeight(_fields(blocks[:, :, 1:], 4, 16), half_of_e8m0(exponents), table=E2M1_TWICE)


def _nvfp4(blocks: npt.NDArray[Any]) -> QuantizedWeight:
    scales = _HALF_UE4M3[blocks[:, :, :4].reshape(len(blocks), -1)]
    return QuantizedWeight(_fields(blocks[:, :, 4:], 4, 8), scales, table=E2M1_TWICE)


def _fields(data: npt.NDArray[Any], width: int, run: int) -> npt.NDArray[Any]:
    """Fields of `width` bits of each byte: the lowest of `run` bytes, then the next of those bytes, and so on."""
    return _bits.fields(data.reshape(*data.shape[:2], -1, run), width, axis=2).reshape(len(data), -1)


def _five_bits(blocks: npt.NDArray[Any], at: int) -> npt.NDArray[Any]:
    """The codes of Q5_0 and Q5_1: 4 bytes with the fifth bits come before the nibbles."""
    codes: npt.NDArray[Any] = _fields(blocks[:, :, at + 4 :], 4, 16) | _fields(blocks[:, :, at : at + 4], 1, 1) << 4
    return codes


def _less_32(six_bits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    signed: npt.NDArray[Any] = six_bits.view(np.int8) - np.int8(32)
    return signed


def _halves(blocks: npt.NDArray[Any], at: int) -> npt.NDArray[Any]:
    """A float16 of each block."""
    return np.ascontiguousarray(blocks[:, :, at : at + 2]).view("<f2")[:, :, 0]


def _same(codes: npt.NDArray[Any], group_size: int, zero_point: int) -> npt.NDArray[Any]:
    """The same zero point for all groups."""
    return np.full((len(codes), codes.shape[1] // group_size), zero_point, np.int8)


class _Type(NamedTuple):
    size: int  # bytes of a block
    unpack: Callable[[npt.NDArray[Any]], QuantizedWeight]
    packed: dict[str, Any]  # what the packed weight will be


def _one_level(group_size: int, zero_point: int, bits: int = 4, **more: bool) -> dict[str, Any]:
    return {"group_size": group_size, "zero_point": zero_point, "bits": bits, **more}


def _two_levels(group_size: int, zero_point: int, bits: int = 4, minima: bool = False, **more: Any) -> dict[str, Any]:
    levels = {"super_size": 256 // group_size, "sub_scale_dtype": "uint8" if minima else "int8"}
    if minima:
        levels |= {"has_offsets": True, "sub_offset_dtype": "uint8"}
    return {**_one_level(group_size, zero_point, bits, **more), **levels}


# What is read exactly.
TYPES = {
    "Q1_0": _Type(18, _q1_0, _one_level(128, 1)),
    "Q2_K": _Type(84, _q2_k, _two_levels(16, 0, minima=True)),
    "Q3_K": _Type(110, _q3_k, _two_levels(16, 4)),
    "Q4_0": _Type(18, _q4_0, _one_level(32, 8)),
    "Q4_1": _Type(20, _q4_1, _one_level(32, 0, has_offsets=True)),
    "Q4_K": _Type(144, _q4_k, _two_levels(32, 0, minima=True)),
    "Q5_0": _Type(22, _q5_0, _one_level(32, 16, 5)),
    "Q5_1": _Type(24, _q5_1, _one_level(32, 0, 5, has_offsets=True)),
    "Q5_K": _Type(176, _q5_k, _two_levels(32, 0, 5, minima=True)),
    "Q6_K": _Type(210, _q6_k, _two_levels(16, 32, 6)),
    "Q8_0": _Type(34, _q8_0, _one_level(32, 0, 8)),
    "IQ4_NL": _Type(18, _iq4_nl, _one_level(32, 0, has_table=True)),
    "IQ4_XS": _Type(136, _iq4_xs, _two_levels(32, 0, has_table=True)),
    "TQ1_0": _Type(54, _tq1_0, _one_level(256, 1)),
    "TQ2_0": _Type(66, _tq2_0, _one_level(256, 1)),
    "MXFP4": _Type(17, _mxfp4, _one_level(32, 0, has_table=True)),
    "NVFP4": _Type(36, _nvfp4, _one_level(16, 0, has_table=True)),
}
