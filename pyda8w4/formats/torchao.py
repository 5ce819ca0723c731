"""torchao: integer weights of its tensor subclasses, and of checkpoints in which it has flattened them.

The layouts are those of ``torchao/quantization/quantize_/workflows`` and of
``torchao/prototype/safetensors/safetensors_support.py``. Each function takes the tensors of one subclass. What these
say of activations, such as ``activation_quantization`` and ``act_quant_scale``, is no part of the weight and is not
read; ``act_pre_scale`` is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import FLOATS, ceil_div, one_of
from pyda8w4._format import Format, check_group_size, group_count
from pyda8w4._quantized import QuantizedWeight
from pyda8w4._safetensors import Tensor, parse_json
from pyda8w4.formats._bits import check_bits, fields, stored_bits
from pyda8w4.formats._layer import Layer
from pyda8w4.formats._parts import (
    FLOAT_TYPES,
    Parts,
    Shaped,
    arrays_of,
    check_count,
    check_matrix,
    check_shape,
    head,
    named,
    read_arrays,
    scale_dtype,
)
from pyda8w4.formats._zeros import without_zeros

__all__ = ["unpack_int4", "unpack_int8", "unpack_plain_int32", "unpack_tile_packed"]


def unpack_int4(
    qdata: npt.ArrayLike,
    scale: npt.ArrayLike,
    zero_point: npt.ArrayLike,
    *,
    group_size: int,
    act_pre_scale: npt.ArrayLike | None = None,
) -> QuantizedWeight:
    """Take an ``Int4Tensor``.

    Parameters
    ----------
    qdata : (N, K / 2) ndarray of int8 or uint8
        Two codes of -8 to 7 a byte, that of the even k in the low bits.
    scale, zero_point : (G, N) ndarray of float16, bfloat16 or float32
        Of each group.
    group_size : int
        The last number of ``block_size``.
    act_pre_scale : (K,) ndarray of float16, bfloat16 or float32, optional
        What activations are multiplied by.

    Returns
    -------
    QuantizedWeight
        Exactly these weights; of float32 scales, as float32 rounds product and sum.

    Raises
    ------
    TypeError
        If an array has the wrong type.
    ValueError
        If shapes do not fit each other.

    Notes
    -----
    ``w = code * scale + zero_point``: the zero point is a float and is added, as ``int4_row_quantize_zp`` of mslk
    (and FBGEMM before it) makes it.

    Examples
    --------
    >>> import numpy as np
    >>> from pyda8w4.formats import torchao
    >>> half = np.array([[0.5]], np.float16)
    >>> torchao.unpack_int4(np.array([[0x71, 0x08]], np.uint8), half, half, group_size=4).pack().dequantize()
    array([[ 1. ,  4. , -3.5,  0.5]], dtype=float32)
    """
    arrays = arrays_of(("int8", "uint8"), qdata=qdata)
    arrays |= arrays_of(FLOATS, scale=scale, zero_point=zero_point, act_pre_scale=act_pre_scale)
    sizes = _word_sizes(2, named(arrays), group_size)
    return QuantizedWeight(
        fields(arrays["qdata"], 4, 1) ^ np.uint8(8),  # signed codes plus 8, which is the zero point of unsigned ones
        arrays["scale"].T,
        offsets=arrays["zero_point"].T,
        factors=_factors(arrays),
        group_size=sizes.group_size,
    )


def unpack_plain_int32(
    qdata: npt.ArrayLike,
    scale: npt.ArrayLike,
    zero_point: npt.ArrayLike,
    *,
    group_size: int,
    act_pre_scale: npt.ArrayLike | None = None,
) -> QuantizedWeight:
    """Take an ``Int4PlainInt32Tensor``, as Intel's GPUs have it.

    Parameters
    ----------
    qdata : (N, K / 8) ndarray of int32
        Eight codes of 0 to 15 a word, that of the first k in the lowest bits.
    scale : (G, N) ndarray of float16, bfloat16 or float32
        Of each group.
    zero_point : (G, N) ndarray of int8
        Of each group.
    group_size : int
        As for `unpack_int4`.
    act_pre_scale : (K,) ndarray of float16, bfloat16 or float32, optional
        As for `unpack_int4`.

    Returns
    -------
    QuantizedWeight
        Exactly these weights.

    Raises
    ------
    TypeError, ValueError
        As `unpack_int4`. Zero points that are floats mark tensors for Ascend's NPUs, of another layout.

    Notes
    -----
    ``w = (code - zero_point) * scale``. The order of the codes is that of ``WeightInt4PackKernel.cpp`` in
    torch-xpu-ops.

    Examples
    --------
    >>> import numpy as np
    >>> from pyda8w4.formats import torchao
    >>> scale, zero_point = np.array([[0.5]], np.float16), np.array([[3]], np.int8)
    >>> weight = torchao.unpack_plain_int32(np.array([[0x76543210]], np.int32), scale, zero_point, group_size=8)
    >>> weight.pack().dequantize()
    array([[-1.5, -1. , -0.5,  0. ,  0.5,  1. ,  1.5,  2. ]], dtype=float32)
    """
    arrays = arrays_of(("int32",), qdata=qdata) | arrays_of(("int8",), zero_point=zero_point)
    arrays |= arrays_of(FLOATS, scale=scale, act_pre_scale=act_pre_scale)
    sizes = _word_sizes(8, named(arrays), group_size)
    return QuantizedWeight(
        fields(arrays["qdata"], 4, 1),
        arrays["scale"].T,
        arrays["zero_point"].T,
        factors=_factors(arrays),
        group_size=sizes.group_size,
    )


def unpack_int8(
    qdata: npt.ArrayLike,
    scale: npt.ArrayLike,
    zero_point: npt.ArrayLike | None = None,
    *,
    block_size: tuple[int, int],
    bits: int = 8,
    act_pre_scale: npt.ArrayLike | None = None,
) -> QuantizedWeight:
    """Take an ``IntxUnpackedToInt8Tensor`` or an ``Int8Tensor``: one code a byte.

    Parameters
    ----------
    qdata : (N, K) ndarray of int8
        Codes of `bits` bits.
    scale : ndarray of float16, bfloat16 or float32
        Of each block: as many as blocks.
    zero_point : ndarray of int8, float16, bfloat16 or float32, optional
        Of each block. None means 0.
    block_size : tuple of two ints
        Rows and columns of a block; they divide N and K.
    bits : int
        1 to 8: those of ``target_dtype``.
    act_pre_scale : (K,) ndarray of float16, bfloat16 or float32, optional
        As for `unpack_int4`.

    Returns
    -------
    QuantizedWeight
        Exactly these weights, of 4, 5, 6 or 8 bits.

    Raises
    ------
    TypeError, ValueError
        As `unpack_int4`; and if zero points are floats, not all integers, and one times its scale is not exact in
        float32.

    Notes
    -----
    ``w = (code - zero_point) * scale``.

    Examples
    --------
    >>> import numpy as np
    >>> from pyda8w4.formats import torchao
    >>> codes, scale = np.array([[-8, 0, 2, 7]], np.int8), np.array([[0.5]], np.float16)
    >>> torchao.unpack_int8(codes, scale, block_size=(1, 4), bits=4).pack().dequantize()
    array([[-4. ,  0. ,  1. ,  3.5]], dtype=float32)
    """
    arrays = arrays_of(("int8",), qdata=qdata) | arrays_of(("int8", *FLOATS), zero_point=zero_point)
    arrays |= arrays_of(FLOATS, scale=scale, act_pre_scale=act_pre_scale)
    bits = stored_bits(check_bits("bits", bits, _BITS))
    sizes = _block_sizes(named(arrays), block_size)
    blocks = sizes.n // block_size[0], sizes.k // block_size[1]
    of_blocks: dict[str, npt.NDArray[Any]] = {"scales": arrays["scale"].reshape(blocks)}
    zeros = arrays["zero_point"].reshape(blocks) if "zero_point" in arrays else None
    if zeros is not None and zeros.dtype == np.int8:
        of_blocks["zps"] = zeros
    elif zeros is not None:
        most = 127 if bits == 8 else 127 - (1 << bits - 1)  # what prepack takes for codes with a sign
        of_blocks |= without_zeros(zeros, of_blocks["scales"], -128, most)
    of_rows: dict[str, Any] = {name: np.repeat(part, block_size[0], axis=0) for name, part in of_blocks.items()}
    return QuantizedWeight(arrays["qdata"], bits=bits, factors=_factors(arrays), group_size=sizes.group_size, **of_rows)


def unpack_tile_packed(
    qdata: npt.ArrayLike,
    scale_and_zero: npt.ArrayLike,
    *,
    shape: tuple[int, int],
    group_size: int,
    act_pre_scale: npt.ArrayLike | None = None,
) -> QuantizedWeight:
    """Take an ``Int4TilePackedTo4dTensor``, as NVIDIA's GPUs have it.

    Parameters
    ----------
    qdata : (N' / 8, K' / (32 * T), 32, T) ndarray of int32
        Codes of 0 to 15 in the tiles of tinygemm. N' and K' are N and K with padding.
    scale_and_zero : (K' / group_size, N', 2) ndarray of float16, bfloat16 or float32
        Scale and zero point of each group.
    shape : tuple of two ints
        (N, K): what is beyond is cut off.
    group_size : int
        As for `unpack_int4`.
    act_pre_scale : (K,) ndarray of float16, bfloat16 or float32, optional
        As for `unpack_int4`.

    Returns
    -------
    QuantizedWeight
        Exactly these weights; of float32 scales, as float32 rounds product and sum.

    Raises
    ------
    TypeError, ValueError
        As `unpack_int4`.

    Notes
    -----
    ``w = (code - 8) * scale + zero``. Word t of 32 in a tile has codes of row ``t // 4``; its i-th 4 bits are that
    of column ``8 * (i % 4) + 2 * (t % 4) + i // 4``: ``matrix_to_m16n8k16_Bint4_layout`` in PyTorch's
    ``aten/src/ATen/native/cuda/int4mm.cu``. Tensors that PyTorch packed on AMD's GPUs have the same shape and another
    order; nothing in them tells, so they must not be given.

    Examples
    --------
    >>> import numpy as np
    >>> from pyda8w4.formats import torchao
    >>> words = np.arange(32, dtype=np.int32).reshape(1, 1, 32, 1) // 4
    >>> half = np.full((1, 8, 2), 0.5, np.float16)
    >>> torchao.unpack_tile_packed(words, half, shape=(3, 32), group_size=32).pack().dequantize()[:, :3]
    array([[-3.5, -3.5, -3.5],
           [-3. , -3.5, -3. ],
           [-2.5, -3.5, -2.5]], dtype=float32)
    """
    arrays = arrays_of(("int32",), qdata=qdata)
    arrays |= arrays_of(FLOATS, scale_and_zero=scale_and_zero, act_pre_scale=act_pre_scale)
    sizes = _tile_sizes(named(arrays), shape, group_size)
    tiles, k_tiles, _, pairs = arrays["qdata"].shape
    # (tile, k tile, row, column // 2 % 4, pair, column % 2, column // 8 % 4) to rows, and columns from the outside in.
    codes = fields(arrays["qdata"], 4, 3).reshape(tiles, k_tiles, 8, 4, pairs, 2, 4).transpose(0, 2, 1, 4, 6, 3, 5)
    codes = codes.reshape(8 * tiles, -1)[: sizes.n, : sizes.k]
    both = arrays["scale_and_zero"][: ceil_div(sizes.k, sizes.group_size), : sizes.n]
    return QuantizedWeight(
        codes,
        both[:, :, 0].T,
        offsets=both[:, :, 1].T,
        factors=_factors(arrays),
        group_size=sizes.group_size,
    )


def layers(config: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Layer]:
    """Find the layers of a checkpoint that torchao has flattened.

    Parameters
    ----------
    config : mapping
        ``quantization_config`` of config.json. Nothing of it is needed: the metadata says how each tensor is quantized.
    tensors : mapping of str to Tensor
        All of the checkpoint.
    metadata : mapping of str to str
        Of the headers of all its files.

    Returns
    -------
    dict of str to Layer
        By the paths of modules; where the quantized tensor of a module is not its weight, by the name of the tensor.
    """
    found: dict[str, Layer] = {}
    for name, text in metadata.items():
        module, _, leaf = name.rpartition(".")
        entry = _entry(text)
        if module and entry is not None:
            parts = Parts(tensors, f"{module}._{leaf}_", _NAMES)
            found[module if leaf == "weight" else name] = _layer(entry, parts)
    known = {name for layer in found.values() for name in layer.tensors}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition("._weight_")
        if module and leaf == "qdata" and name not in known:
            parts = Parts(tensors, f"{module}._weight_", _NAMES)
            why = f"{name} must have metadata in the header of a file, got none"
            found[module] = parts.layer("torchao", tensor.shape, refusal=why)
    return found


# ---- shapes ----------------------------------------------------------------------------------


_BITS = tuple(range(1, 9))


class _Sizes(NamedTuple):
    n: int
    k: int
    group_size: int


def _word_sizes(per_word: int, parts: Mapping[str, Shaped], group_size: int) -> _Sizes:
    n, words = check_matrix(parts["qdata"])
    k = per_word * words
    group = check_group_size(group_size, k)
    for name in ("scale", "zero_point"):
        check_shape(parts[name], (group_count(k, group), n))
    return _with_factors(_Sizes(n, k, group), parts)


def _block_sizes(parts: Mapping[str, Shaped], block_size: Sequence[int]) -> _Sizes:
    n, k = check_matrix(parts["qdata"])
    rows, columns = _two("block_size", block_size, n, k)
    if n % rows or k % columns:
        raise ValueError(f"block_size must divide ({n}, {k}), got ({rows}, {columns})")
    blocks = n // rows * (k // columns)
    for name in ("scale", "zero_point") if "zero_point" in parts else ("scale",):
        check_count(parts[name], blocks)
    return _with_factors(_Sizes(n, k, columns), parts)


def _tile_sizes(parts: Mapping[str, Shaped], shape: Sequence[int], group_size: int) -> _Sizes:
    qdata = parts["qdata"]
    if len(qdata.shape) != 4 or 0 in qdata.shape or qdata.shape[2] != 32:
        raise ValueError(f"{qdata.name} must have shape (N / 8, K / (32 * T), 32, T), got {qdata.shape}")
    tiles, k_tiles, _, pairs = qdata.shape
    n, k = 8 * tiles, 32 * k_tiles * pairs
    check_shape(parts["scale_and_zero"], (group_count(k, check_group_size(group_size, k)), n, 2))
    n, k = _two("shape", shape, n, k)
    return _with_factors(_Sizes(n, k, check_group_size(group_size, k)), parts)


def _two(name: str, sizes: Sequence[int], n: int, k: int) -> tuple[int, int]:
    if len(sizes) != 2 or not all(isinstance(size, int) and 0 < size <= most for size, most in zip(sizes, (n, k))):
        raise ValueError(f"{name} must be two ints from 1 to {n} and {k}, got {sizes!r}")
    return sizes[0], sizes[1]


def _with_factors(sizes: _Sizes, parts: Mapping[str, Shaped]) -> _Sizes:
    factors = parts.get("act_pre_scale")
    if factors is not None and (factors.shape[-1:] != (sizes.k,) or prod(factors.shape) != sizes.k):
        raise ValueError(f"{factors.name} must have shape ({sizes.k},), got {factors.shape}")
    return sizes


def _factors(arrays: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any] | None:
    return arrays["act_pre_scale"].reshape(-1) if "act_pre_scale" in arrays else None


# ---- checkpoints -----------------------------------------------------------------------------

_NAMES = (
    "qdata", "scale", "zero_point", "scale_and_zero", "act_pre_scale", "act_quant_scale", "act_quant_zero_point",
    "packed_weights", "per_tensor_scale", "act_per_tensor_scale",
)  # fmt: skip


def _entry(text: str) -> dict[str, Any] | None:
    """What the metadata says of a tensor, if it is quantized."""
    try:
        entry = parse_json(text)
    except (ValueError, RecursionError):
        return None
    if type(entry) is not dict or type(entry.get("_type")) is not str or entry["_type"] == "Tensor":
        return None
    return entry


def _layer(entry: dict[str, Any], parts: Parts) -> Layer:
    kind, type_ = _KINDS.get(entry["_type"]), f"torchao {entry['_type']}"
    shape: tuple[int, ...] = ()
    try:
        if kind is None:
            raise ValueError(f"the codes of a {type_} are no integers that are stored in plain order")
        _check_names(entry, parts)
        shape = parts.take("qdata").shape
        stack = shape[:1] if len(shape) == kind.dimensions + 1 else ()
        more, format = kind.plan(_tensors(kind, parts.matrix(0, stack)), _attributes(entry, stack))
    except ValueError as error:
        return parts.layer(type_, shape, refusal=str(error))

    def read(index: int) -> QuantizedWeight:
        return kind.unpack(**read_arrays(_tensors(kind, parts.matrix(index, stack))), **more)

    return parts.layer(f"torchao {format.bits}-bit", (*stack, format.n, format.k), read=read, format=format)


def _check_names(entry: dict[str, Any], parts: Parts) -> None:
    """That of the tensors that the metadata names none is missing, of which some are optional, and none is unknown."""
    names = entry.get("_tensor_data_names", [])
    if type(names) is not list or not all(type(name) is str for name in names):
        raise ValueError(f"_tensor_data_names must be a list of strings, got {str(names)[:80]}")
    for name in names:
        if name not in _NAMES:
            raise ValueError(f"its metadata has a tensor {name[:80]!r}, which is not known")
        parts.take(name)


def _tensors(kind: _Kind, parts: Parts) -> dict[str, Tensor]:
    optional = {"zero_point": ("I8", *FLOAT_TYPES), "act_pre_scale": FLOAT_TYPES}
    return parts.take_all({name: dtypes for name, dtypes in optional.items() if name in parts} | kind.tensors)


def _attributes(entry: dict[str, Any], stack: tuple[int, ...]) -> dict[str, Any]:
    """What the metadata says of a matrix."""
    found = entry.get("_data")
    if type(found) is not dict:
        raise ValueError(f"its metadata must have attributes, got {found!r}")
    found = {"block_size": None, **found}
    for name, first in (("block_size", (1,)), ("shape", stack)):
        if name in found:
            sizes = found[name]
            if type(sizes) is not list or not all(type(size) is int and size > 0 for size in sizes):
                raise ValueError(f"{name} must be positive ints, got {sizes!r}")
            if stack and sizes[:1] != list(first):
                raise ValueError(f"{name} of a stack must begin with {first[0]}, got {sizes}")
            found[name] = tuple(sizes[len(stack) :])
    return found


# What a function above takes beside tensors, and the format of what it gives, as far as headers tell.
_Plan = tuple[dict[str, Any], Format]


def _plan_int4(tensors: Mapping[str, Tensor], attributes: dict[str, Any]) -> _Plan:
    more = {"group_size": _group_size(attributes)}
    sizes = _check_whole(_word_sizes(2, tensors, **more), attributes)
    dtype = scale_dtype(tensors["scale"], tensors["zero_point"])
    return more, _format(tensors, sizes, dtype, zero_point=8, has_offsets=True)


def _plan_plain_int32(tensors: Mapping[str, Tensor], attributes: dict[str, Any]) -> _Plan:
    more = {"group_size": _group_size(attributes)}
    sizes = _check_whole(_word_sizes(8, tensors, **more), attributes)
    return more, _format(tensors, sizes, scale_dtype(tensors["scale"]), zero_point=None)


def _plan_tile_packed(tensors: Mapping[str, Tensor], attributes: dict[str, Any]) -> _Plan:
    more = {"group_size": _group_size(attributes), "shape": attributes.get("shape", ())}
    dtype = scale_dtype(tensors["scale_and_zero"])
    return more, _format(tensors, _tile_sizes(tensors, **more), dtype, zero_point=8, has_offsets=True)


def _plan_int8(tensors: Mapping[str, Tensor], attributes: dict[str, Any]) -> _Plan:
    more = {"block_size": attributes["block_size"], "bits": _target_bits(attributes)}
    sizes, bits = _block_sizes(tensors, more["block_size"]), stored_bits(more["bits"])
    zero_point = tensors.get("zero_point")
    if zero_point is not None and zero_point.is_float:
        # As offsets, which are products and need float32.
        return more, _format(tensors, sizes, "float32", zero_point=0, has_offsets=True, bits=bits)
    # Symmetric weights have zero points, too, all of them 0.
    some = np.zeros(1, np.int8) if zero_point is None else head(zero_point).array()
    alike = bool((some == some[0]).all())
    return more, _format(tensors, sizes, scale_dtype(tensors["scale"]), zero_point=0 if alike else None, bits=bits)


class _Kind(NamedTuple):
    dimensions: int  # of qdata
    tensors: dict[str, tuple[str, ...]]  # that it must have, and of which types
    unpack: Callable[..., QuantizedWeight]
    plan: Callable[[Mapping[str, Tensor], dict[str, Any]], _Plan]


_INT8 = _Kind(2, {"qdata": ("I8",), "scale": FLOAT_TYPES}, unpack_int8, _plan_int8)
_KINDS = {
    "Int4Tensor": _Kind(
        2, {"qdata": ("I8", "U8"), "scale": FLOAT_TYPES, "zero_point": FLOAT_TYPES}, unpack_int4, _plan_int4
    ),
    "Int4PlainInt32Tensor": _Kind(
        2, {"qdata": ("I32",), "scale": FLOAT_TYPES, "zero_point": ("I8",)}, unpack_plain_int32, _plan_plain_int32
    ),
    "Int4TilePackedTo4dTensor": _Kind(
        4, {"qdata": ("I32",), "scale_and_zero": FLOAT_TYPES}, unpack_tile_packed, _plan_tile_packed
    ),
    "IntxUnpackedToInt8Tensor": _INT8,
    "Int8Tensor": _INT8,
}


def _group_size(attributes: dict[str, Any]) -> int:
    block_size: tuple[int, ...] = attributes["block_size"]
    if len(block_size) != 2 or block_size[0] != 1:
        raise ValueError(f"block_size must be 1 and the size of a group, got {block_size}")
    return block_size[1]


def _target_bits(attributes: dict[str, Any]) -> int:
    """Those of codes: an Int8Tensor has no such attribute."""
    dtype = attributes.get("target_dtype", {"_data": "int8"})
    name = dtype.get("_data") if type(dtype) is dict else None
    if name not in (names := [f"int{bits}" for bits in range(1, 9)]):
        raise ValueError(f"target_dtype must be {one_of(tuple(names))}, got {name!r}")
    return names.index(name) + 1


def _check_whole(sizes: _Sizes, attributes: dict[str, Any]) -> _Sizes:
    if attributes.get("shape") != (sizes.n, sizes.k):
        raise ValueError(f"shape must be ({sizes.n}, {sizes.k}) for this qdata, got {attributes.get('shape')}")
    return sizes


def _format(tensors: Mapping[str, Tensor], sizes: _Sizes, scale_dtype: str, **more: Any) -> Format:
    return Format(*sizes, scale_dtype, has_factors="act_pre_scale" in tensors, **more)
