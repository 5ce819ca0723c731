"""AWQ: what AutoAWQ, llm-awq and GPTQModel write.

>>> import numpy as np
>>> from pyda8w4.formats import awq
>>> qweight = np.full((32, 1), 0x75316420, np.uint32)  # codes 0 to 7 of 8 columns, for each of 32 k
>>> qzeros, scales = np.full((1, 1), 0x44444444, np.uint32), np.full((1, 8), 0.5, np.float16)
>>> awq.unpack(qweight, qzeros, scales, group_size=32).pack().dequantize()[:, 0]
array([-2. , -1.5, -1. , -0.5,  0. ,  0.5,  1. ,  1.5], dtype=float32)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import FLOATS, ceil_div, check_scheme
from pyda8w4._format import Format, check_group_size, group_count
from pyda8w4._quantized import QuantizedWeight
from pyda8w4._safetensors import Tensor
from pyda8w4.formats import _config
from pyda8w4.formats._bits import check_bits, fields
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

_VERSIONS = ("gemm", "gemv", "gemv_fast")
_PER_WORD = 8  # codes of 4 bits in 32
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # gemm: which field of a word is the first column, the second, ...
_MIDDLE = 8

# gemv_fast: a word has 4 codes of 4 bits, and words of 4 rows are interleaved over blocks of 64 k.
_ROWS, _BLOCK = 4, 64


def unpack(
    qweight: npt.ArrayLike,
    qzeros: npt.ArrayLike | None,
    scales: npt.ArrayLike,
    *,
    group_size: int,
    version: str = "gemm",
) -> QuantizedWeight:
    """Take the tensors of a layer.

    Parameters
    ----------
    qweight : ndarray of int32, or int16 in 'gemv_fast'
        Words of codes of 4 bits. 'gemm': (K, N / 8), 'gemv': (N, K / 8), 'gemv_fast': (N / 4, K).
    qzeros : ndarray, or None
        Words of zero points, as int32. 'gemm': (G, N / 8), 'gemv': (N, Z), with a Z that AutoAWQ rounds up. Or
        (8 * Z, N) offsets as float16, 'gemv_fast'. None means 8, but not in 'gemv_fast'.
    scales : ndarray of float32, float16 or bfloat16
        'gemm': (G, N), 'gemv': (N, 8 * Z), 'gemv_fast': (8 * Z, N).
    group_size : int
        How many k are in a group: it divides K. -1 means all.
    version : {'gemm', 'gemv', 'gemv_fast'}
        Of the layout. That of llm-awq is 'gemv_fast', with scaled_zeros for `qzeros`.

    Returns
    -------
    QuantizedWeight
        ``w = (code - zero) * scale``, or ``w = code * scale + offset`` in 'gemv_fast'.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If shapes do not fit each other.

    Notes
    -----
    AutoAWQ's gemm.py, gemv.py and gemv_fast.py have the definitions. Its writer has rounded the offsets of 'gemv_fast',
    ``-scale * zero``, to float16; they are kept. Of such a weight, float32 holds ``code * scale`` exactly, and rounds
    the sum where scale and offset differ much.
    """
    check_scheme("version", version, _VERSIONS)
    is_fast = version == "gemv_fast"
    if is_fast and qzeros is None:
        raise ValueError("qzeros must be given in gemv_fast, got None")
    arrays = (
        arrays_of(_words(version), qweight=qweight)
        | arrays_of(FLOATS if is_fast else _words(version), qzeros=qzeros)
        | arrays_of(FLOATS, scales=scales)
    )
    return _unpack(arrays, _sizes(named(arrays), version, group_size), version)


def layers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Layer]:
    """Find the layers of a checkpoint.

    Parameters
    ----------
    config : dict
        What config.json has as quantization_config, or quant_config.json.
    tensors : dict of str to Tensor
        All of the checkpoint.

    Returns
    -------
    dict of str to Layer
        By the path of the module.

    Raises
    ------
    ValueError
        If the config makes no sense: names the key.
    """
    scheme_of(config)
    configs = _config.by_module(config, modules(tensors, ".qweight"))
    return {name: layer(name, tensors, scheme_of(of_module, refusal)) for name, of_module, refusal in configs}


class Scheme(NamedTuple):
    """How a layer is quantized."""

    bits: int
    group_size: int
    has_zeros: bool
    version: str
    refusal: str | None = None


def scheme_of(config: Mapping[str, Any], refusal: str | None = None) -> Scheme:
    """What a config says."""
    version = _config.word(config, "version", "format", "checkpoint_format", default="gemm")
    if version == "llm-awq" or config.get("backend") == "llm-awq":
        version = "gemv_fast"
    return Scheme(
        bits=_config.integer(config, "bits", "w_bit"),
        group_size=_config.integer(config, "group_size", "q_group_size"),
        has_zeros=_config.flag(config, "zero_point", default=True),
        version=version,
        refusal=refusal,
    )


def layer(name: str, tensors: Mapping[str, Tensor], scheme: Scheme, method: str = "AWQ") -> Layer:
    """Describe a layer that has the tensors of AWQ."""
    parts = Parts(tensors, f"{name}.", ("qweight", "qzeros", "scaled_zeros", "scales"))
    type_ = f"{method} {scheme.bits}-bit"
    is_fast = scheme.version == "gemv_fast"
    zeros = "scaled_zeros" if "scaled_zeros" in parts else "qzeros"  # the first in llm-awq
    try:
        if scheme.refusal is not None:
            raise ValueError(scheme.refusal)
        check_bits("bits", scheme.bits, (4,))
        check_scheme("version", scheme.version, _VERSIONS)
        if "scaled_zeros" in parts and "qzeros" in parts:
            raise ValueError(f"{name}.scaled_zeros and {name}.qzeros are both there")
        words = tuple(f"{word[0].upper()}{word[-2:]}" for word in _words(scheme.version))
        found = {"qweight": parts.take("qweight", *words), "scales": parts.take("scales", *FLOAT_TYPES)}
        if zeros in parts or scheme.has_zeros or is_fast:
            found["qzeros"] = parts.take(zeros, *(FLOAT_TYPES if is_fast else words))
        sizes = _sizes(found, scheme.version, scheme.group_size)
        zero_point = 0 if is_fast else None if scheme.has_zeros else _MIDDLE
        format = Format(
            sizes.n, sizes.k, sizes.group, scale_dtype(found["scales"]), zero_point=zero_point, has_offsets=is_fast
        )
    except ValueError as error:
        return parts.layer(type_, _shape(parts.take("qweight").shape, scheme.version), refusal=str(error))

    def read(index: int) -> QuantizedWeight:
        return _unpack(read_arrays(found), sizes, scheme.version)

    return parts.layer(type_, (sizes.n, sizes.k), read=read, format=format)


def _words(version: str) -> tuple[str, ...]:
    return ("int16", "uint16") if version == "gemv_fast" else ("int32", "uint32")


def _shape(shape: tuple[int, ...], version: str) -> tuple[int, ...]:
    """What the words stand for: (N, K), or of those that are no matrix their own."""
    if len(shape) != 2:
        return shape
    rows, columns = shape
    if version == "gemv":
        return rows, columns * _PER_WORD
    return (rows * _ROWS, columns) if version == "gemv_fast" else (columns * _PER_WORD, rows)


class _Sizes(NamedTuple):
    n: int
    k: int
    group: int  # elements of k in a group
    groups: int


def _sizes(parts: Mapping[str, Shaped], version: str, group_size: int) -> _Sizes:
    """Check all shapes."""
    qweight = parts["qweight"]
    n, k = _shape(check_matrix(qweight), version)
    group = check_group_size(k if group_size == -1 else group_size, k)
    groups = group_count(k, group)
    if k % group:
        raise ValueError(f"group_size must divide K = {k} of {qweight.name}, got {group_size}")
    if version == "gemv_fast" and k % _BLOCK:
        raise ValueError(f"{qweight.name} must have a multiple of {_BLOCK} columns, got {k}")
    if version == "gemm":
        scales, zeros = (groups, n), (groups, n // _PER_WORD)
    else:
        width = _zeros_width(k, group)
        scales, zeros = (n, _PER_WORD * width), (n, width)
        if version == "gemv_fast":
            scales = zeros = scales[::-1]
    why = f" for K = {k}, N = {n} and group_size {group_size}"
    check_shape(parts["scales"], scales, why)
    if "qzeros" in parts:
        check_shape(parts["qzeros"], zeros, why)
    return _Sizes(n, k, group, groups)


def _unpack(arrays: Mapping[str, npt.NDArray[Any]], sizes: _Sizes, version: str) -> QuantizedWeight:
    words, scales, zeros = arrays["qweight"], arrays["scales"], arrays.get("qzeros")
    if version == "gemm":
        # Words are transposed before they become codes, which are more.
        codes = fields(words.T, 4, axis=0, order=_ORDER)
        zps = None if zeros is None else fields(zeros, 4, axis=1, order=_ORDER).T
        return QuantizedWeight(codes, scales.T, zps, group_size=sizes.group)
    if version == "gemv":
        zps = None if zeros is None else fields(zeros, 4, axis=1)[:, : sizes.groups]
        return QuantizedWeight(fields(words, 4, axis=1), scales[:, : sizes.groups], zps, group_size=sizes.group)
    return QuantizedWeight(
        _interleaved(words),
        scales[: sizes.groups].T,
        np.zeros((sizes.n, sizes.groups), np.int8),
        arrays["qzeros"][: sizes.groups].T,
        group_size=sizes.group,
    )


def _zeros_width(k: int, group: int) -> int:
    """AutoAWQ's calculate_zeros_width: words of zero points in a row, with those that kernels load in vain."""
    multiple = 1 if group >= 128 else {64: 2, 32: 4, 16: 8}.get(group)
    if multiple is None:
        raise ValueError(f"group_size must be 16, 32, 64 or at least 128 in gemv and gemv_fast, got {group}")
    return ceil_div(ceil_div(k // group, _PER_WORD), multiple) * multiple


def _interleaved(words: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Undo AutoAWQ's pack_intweight.

    Words along a row are nibbles of 64 k of each of four rows, one row after the other. Of 32 k in the order a, b, c of
    sizes 4, 4, 2, pairs are first sorted to b, a, c, and then halves of 8 to b, c, a.
    """
    rows, k = words.shape
    codes = fields(words, 4, axis=1).reshape(rows, k // _BLOCK, _ROWS, _BLOCK // 32, 4, 2, 4)
    return codes.transpose(0, 2, 1, 3, 6, 4, 5).reshape(rows * _ROWS, k)
