"""Layers of compressed-tensors, which LLM Compressor writes: integers, packed and not, and floats of 4 bits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import FLOATS, ceil_div
from pyda8w4._format import Format, check_group_size, group_count, group_size_of
from pyda8w4._quantized import QuantizedWeight
from pyda8w4._safetensors import Tensor
from pyda8w4.formats import mxfp4
from pyda8w4.formats._bits import check_bits, fields, stored_bits, stream
from pyda8w4.formats._compressed_tensors_config import MX_GROUP, NV_GROUP, Scheme, Schemes
from pyda8w4.formats._floats import E2M1_TWICE, e4m3, half_of_e8m0
from pyda8w4.formats._layer import Layer
from pyda8w4.formats._parts import (
    FLOAT_TYPES,
    Parts,
    Shaped,
    arrays_of,
    check_count,
    check_matrix,
    check_shape,
    named,
    read_arrays,
    scale_dtype,
)

__all__ = ["int_quantized", "mxfp4_pack_quantized", "nvfp4_pack_quantized", "pack_quantized"]

_BITS = tuple(range(1, 9))


def pack_quantized(
    weight_packed: npt.ArrayLike,
    weight_scale: npt.ArrayLike,
    weight_shape: Sequence[int] | npt.NDArray[Any],
    weight_zero_point: npt.ArrayLike | None = None,
    weight_g_idx: npt.ArrayLike | None = None,
    *,
    num_bits: int = 4,
    group_size: int | None = None,
) -> QuantizedWeight:
    """Unpack a matrix of the format "pack-quantized".

    Parameters
    ----------
    weight_packed : (N, ceil(K * num_bits / 32)) ndarray of int32
        Codes along K, from the lowest bits of a word up, without gaps.
    weight_scale : (N, G), (N,) or (1,) ndarray of float32, float16 or bfloat16
        One for each group, row, or for all.
    weight_shape : (N, K)
        Two integers: K is not that of the words, which are filled up.
    weight_zero_point : ndarray of int32 or int8, optional
        With int32 of shape (ceil(N * num_bits / 32), G): packed along N, as codes are. With int8 of the shape of the
        scales.
    weight_g_idx : (K,) ndarray of int32 or int64, optional
        The group of each k. All -1 means none.
    num_bits : int
        Of a code, 1 to 8.
    group_size : int, optional
        Elements of k in a group. None means K / G.

    Returns
    -------
    QuantizedWeight
        Of 4, 5, 6 or 8 bits, at least `num_bits`. With `weight_g_idx` its columns are sorted by group, and it has a
        permutation.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If shapes do not fit each other, or `weight_g_idx` does not cut K into groups of `group_size`.

    Notes
    -----
    ``w = (code - zero_point) * scale``, where fields of words hold ``code + 2**(num_bits - 1)``, and zero points the
    same (compressed-tensors' `compressors/pack_quantized`). It is exact with scales of 16 bits, and rounded once with
    those of float32.

    Examples
    --------
    >>> import numpy as np
    >>> from pyda8w4.formats import compressed_tensors
    >>> words, scales = np.array([[0x0000F819]], np.uint32).view(np.int32), np.array([[0.5]], np.float16)
    >>> compressed_tensors.pack_quantized(words, scales, (1, 4)).pack().dequantize()
    array([[ 0.5, -3.5,  0. ,  3.5]], dtype=float32)
    """
    num_bits = check_bits("num_bits", num_bits, _BITS)
    arrays = (
        arrays_of(("int32",), weight_packed=weight_packed)
        | arrays_of(FLOATS, weight_scale=weight_scale)
        | arrays_of(("int32", "int8"), weight_zero_point=weight_zero_point)
        | arrays_of(("int32", "int64"), weight_g_idx=weight_g_idx)
    )
    n, k = shape = _ints("weight_shape", np.asarray(weight_shape), 2)
    group = _check_packed(named(arrays), shape, num_bits, group_size)
    codes = _signed(arrays["weight_packed"], num_bits, k)
    zps, g_idx = arrays.get("weight_zero_point"), arrays.get("weight_g_idx")
    if zps is not None and zps.dtype == np.int32:
        zps = _signed(zps.T, num_bits, n).T
    elif zps is not None:
        zps = _per_row(_in_range("weight_zero_point", zps, num_bits), n)
    perm = None if g_idx is None or (g_idx == -1).all() else _order(g_idx, group)
    return QuantizedWeight(
        codes if perm is None else codes.take(perm, axis=1),
        _per_row(arrays["weight_scale"], n),
        zps,
        bits=stored_bits(num_bits),
        perm=perm,
        group_size=group,
    )


def int_quantized(
    weight: npt.ArrayLike,
    weight_scale: npt.ArrayLike,
    weight_zero_point: npt.ArrayLike | None = None,
    *,
    num_bits: int = 8,
    group_size: int | None = None,
) -> QuantizedWeight:
    """Take a matrix of the formats "int-quantized" and "naive-quantized".

    Parameters
    ----------
    weight : (N, K) ndarray of int8
        One code an element.
    weight_scale : (N, G), (N,) or (1,) ndarray of float32, float16 or bfloat16
        One for each group, row, or for all.
    weight_zero_point : ndarray of int8, optional
        Of the shape of the scales.
    num_bits : int
        Of a code, 1 to 8.
    group_size : int, optional
        Elements of k in a group. None means K / G.

    Returns
    -------
    QuantizedWeight
        Of 4, 5, 6 or 8 bits, at least `num_bits`.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If shapes do not fit each other, or there are codes or zero points of more bits.

    Notes
    -----
    ``w = (weight - zero_point) * scale`` (compressed-tensors' `compressors/naive_quantized`). It is exact with scales
    of 16 bits, and rounded once with those of float32.

    Examples
    --------
    >>> import numpy as np
    >>> from pyda8w4.formats import compressed_tensors
    >>> weight, scales = np.array([[-8, 7, 1, 0]], np.int8), np.array([[0.5]], np.float16)
    >>> compressed_tensors.int_quantized(weight, scales, num_bits=4).pack()
    PackedWeight(shape=(1, 4), bits=4, group_size=4, scales=float16, zero_point=8, nbytes=256)
    """
    num_bits = check_bits("num_bits", num_bits, _BITS)
    arrays = arrays_of(("int8",), weight=weight, weight_zero_point=weight_zero_point)
    arrays |= arrays_of(FLOATS, weight_scale=weight_scale)
    group = _check_plain(named(arrays), group_size)
    codes, zps = _in_range("weight", arrays["weight"], num_bits), arrays.get("weight_zero_point")
    n = len(codes)
    if zps is not None:
        zps = _per_row(_in_range("weight_zero_point", zps, num_bits), n)
    return QuantizedWeight(
        codes, _per_row(arrays["weight_scale"], n), zps, bits=stored_bits(num_bits), group_size=group
    )


def mxfp4_pack_quantized(weight_packed: npt.ArrayLike, weight_scale: npt.ArrayLike) -> QuantizedWeight:
    """Unpack a matrix of the format "mxfp4-pack-quantized".

    Parameters
    ----------
    weight_packed : (N, K / 2) ndarray of uint8
        Two codes a byte: the low nibble is the even k.
    weight_scale : (N, K / 32) ndarray of uint8
        Exponents, with a bias of 127.

    Returns
    -------
    QuantizedWeight
        Exact.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If shapes do not fit each other, or an exponent is 255, which stands for NaN.

    Notes
    -----
    The numbers of `pyda8w4.formats.mxfp4.unpack`, in another shape (compressed-tensors' `compressors/mxfp4`).

    Examples
    --------
    >>> import numpy as np
    >>> from pyda8w4.formats import compressed_tensors
    >>> packed, scales = np.full((1, 16), 0xF1, np.uint8), np.array([[128]], np.uint8)
    >>> compressed_tensors.mxfp4_pack_quantized(packed, scales).pack().dequantize()[0, :4]
    array([  1., -12.,   1., -12.], dtype=float32)
    """
    arrays = arrays_of(("uint8",), weight_packed=weight_packed, weight_scale=weight_scale)
    _check_float4(named(arrays), MX_GROUP)
    packed, scales = arrays.values()
    _check_e8m0(scales)
    return mxfp4.unpack(packed.reshape(*scales.shape, MX_GROUP // 2), scales)


def nvfp4_pack_quantized(
    weight_packed: npt.ArrayLike, weight_scale: npt.ArrayLike, weight_global_scale: npt.ArrayLike
) -> QuantizedWeight:
    """Unpack a matrix of the format "nvfp4-pack-quantized".

    Parameters
    ----------
    weight_packed : (N, K / 2) ndarray of uint8
        Two codes a byte: the low nibble is the even k.
    weight_scale : (N, K / 16) ndarray of uint8 or ml_dtypes float8_e4m3fn
        E4M3, or its bits.
    weight_global_scale : (1,) ndarray of float32, float16 or bfloat16
        What these are divided by.

    Returns
    -------
    QuantizedWeight
        With a table of twice the values of E2M1.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If shapes do not fit each other, a scale is NaN, or the global scale is not above 0 and finite.

    Notes
    -----
    ``w = value * (scale / global_scale)``, where codes stand for the values of E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and
    the same with a minus (compressed-tensors' `compressors/nvfp4`). The quotient is rounded to float32 once and the
    product once, as compressed-tensors does it with tensors of float32.

    Examples
    --------
    >>> import numpy as np
    >>> from pyda8w4.formats import compressed_tensors
    >>> packed, scales = np.full((1, 8), 0xF1, np.uint8), np.array([[0x40]], np.uint8)  # 0.5 and -6; 2
    >>> compressed_tensors.nvfp4_pack_quantized(packed, scales, np.float32([4])).pack().dequantize()[0, :2]
    array([ 0.25, -3.  ], dtype=float32)
    """
    arrays = arrays_of(("uint8",), weight_packed=weight_packed)
    arrays |= arrays_of(("uint8", "float8_e4m3fn"), weight_scale=weight_scale)
    arrays |= arrays_of(FLOATS, weight_global_scale=weight_global_scale)
    _check_float4(named(arrays), NV_GROUP)
    divisor = arrays["weight_global_scale"].reshape(())
    if not 0 < float(divisor) < np.inf:
        raise ValueError(f"weight_global_scale must be above 0 and finite, got {divisor}")
    floats = e4m3(arrays["weight_scale"].view(np.uint8))
    if np.isnan(floats).any():
        raise ValueError("weight_scale must be numbers, got NaN")
    with np.errstate(over="ignore"):  # the packed weight takes no infinite scales
        halves = floats / divisor.astype(np.float32) / 2
    return QuantizedWeight(fields(arrays["weight_packed"], 4, axis=1), halves, table=E2M1_TWICE, group_size=NV_GROUP)


# ---- arrays ----------------------------------------------------------------------------------


def _ints(name: str, array: npt.NDArray[Any], *counts: int) -> tuple[int, ...]:
    if array.dtype.kind not in "iu" or array.ndim != 1 or array.size not in counts or (array < 1).any():
        shapes = {2: "(N, K)", 3: "(E, N, K) of experts"}
        takes = ", or ".join(shapes[count] for count in counts)
        raise ValueError(f"{name} must be {takes}, got {array.dtype} of shape {array.shape}")
    return tuple(map(int, array))


def _check_packed(parts: Mapping[str, Shaped], shape: tuple[int, ...], num_bits: int, group_size: int | None) -> int:
    """-> the group size."""
    n, k = shape
    check_shape(parts["weight_packed"], (n, _words(k, num_bits)), f" for (N, K) = {shape} of {num_bits} bits")
    groups, group = _check_groups(parts["weight_scale"], n, k, group_size)
    zps = parts.get("weight_zero_point")
    if zps is not None and zps.itemsize == 4:
        check_shape(zps, (_words(n, num_bits), groups), " as int32")
    elif zps is not None:
        _check_per_row(zps, n, groups)
    if "weight_g_idx" in parts:
        check_shape(parts["weight_g_idx"], (k,))
    return group


def _check_plain(parts: Mapping[str, Shaped], group_size: int | None) -> int:
    """-> the group size."""
    n, k = check_matrix(parts["weight"])
    groups, group = _check_groups(parts["weight_scale"], n, k, group_size)
    if "weight_zero_point" in parts:
        _check_per_row(parts["weight_zero_point"], n, groups)
    return group


def _check_float4(parts: Mapping[str, Shaped], group: int) -> tuple[int, int]:
    """-> N, K."""
    packed = parts["weight_packed"]
    n, k = check_matrix(packed)[0], packed.shape[1] * 2
    if k % group:
        raise ValueError(f"{packed.name} must have shape (N, K / 2) with K a multiple of {group}, got {packed.shape}")
    check_shape(parts["weight_scale"], (n, k // group))
    if "weight_global_scale" in parts:
        check_count(parts["weight_global_scale"], 1)
    return n, k


def _check_e8m0(scales: npt.NDArray[np.uint8]) -> None:
    if scales.max() == 255:
        raise ValueError("weight_scale must be 0 to 254, got 255, which stands for NaN")


def _check_groups(scales: Shaped, n: int, k: int, group_size: int | None) -> tuple[int, int]:
    """-> groups of a row, and their size."""
    if group_size is None:
        groups = scales.shape[1] if len(scales.shape) == 2 and scales.shape[1] else 1
        group = group_size_of(k, groups, scales.name)
    else:
        group = check_group_size(group_size, k)
        groups = group_count(k, group)
    _check_per_row(scales, n, groups)
    return groups, group


def _check_per_row(part: Shaped, n: int, groups: int) -> None:
    """One for each group of a row; where that is one, it may be one of all rows."""
    if groups > 1 or part.shape not in ((n,), (1, 1), (1,), ()):
        check_shape(part, (n, groups))


def _words(count: int, num_bits: int) -> int:
    """Of 32 bits."""
    return ceil_div(count * num_bits, 32)


def _signed(words: npt.NDArray[np.int32], num_bits: int, count: int) -> npt.NDArray[np.int8]:
    """Fields of signed numbers that half the range was added to."""
    codes = stream(words, num_bits, count)
    codes -= np.uint8(1 << (num_bits - 1))
    return codes.view(np.int8)


def _per_row(array: npt.NDArray[Any], n: int) -> npt.NDArray[Any]:
    """(N, G), of what may be one for each row, or one for all."""
    if array.ndim == 2 and len(array) == n:
        return array
    return array.reshape(n, 1) if array.size == n else np.repeat(array.reshape(1, 1), n, axis=0)


def _in_range(name: str, array: npt.NDArray[np.int8], num_bits: int) -> npt.NDArray[np.int8]:
    half = 1 << (num_bits - 1)
    least, most = int(array.min()), int(array.max())
    if least < -half or most >= half:
        raise ValueError(f"{name} must hold {-half} to {half - 1} of {num_bits} bits, got {least} to {most}")
    return array


def _order(g_idx: npt.NDArray[Any], group: int) -> npt.NDArray[np.int64] | None:
    """The columns, sorted by group; None where they are."""
    k = len(g_idx)
    order = np.argsort(g_idx, kind="stable")
    if (g_idx[order] != np.arange(k) // group).any():
        raise ValueError(
            f"weight_g_idx must have each of 0 to {ceil_div(k, group) - 1} {group} times, got others: "
            f"{g_idx.min()} to {g_idx.max()}"
        )
    return None if (order == np.arange(k)).all() else order


# ---- tensors of a checkpoint -----------------------------------------------------------------


# Formats that store tensors otherwise; what is stored tells all others.
_OTHER_FORMATS = ("marlin-24", "sparse-24-bitmask", "sparse-bitmask")

# What a quantized module has: scales of static activations are of no use here, and belong to it.
_ACTIVATIONS = tuple(
    f"{side}_{what}" for side in ("input", "output") for what in ("scale", "zero_point", "global_scale")
)
_SPARSE = ("compressed", "bitmask", "shape", "meta", "scale_packed")
_WEIGHTS = ("packed", "scale", "shape", "zero_point", "g_idx", "global_scale")
_PARTS = ("weight", *(f"weight_{what}" for what in _WEIGHTS), *_ACTIVATIONS, *_SPARSE)
_MARKS = ("weight_packed", "weight_scale", "weight_shape", "bitmask", "scale_packed")  # that it is quantized


def layers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Layer]:
    """Find the quantized layers of a checkpoint: matrices, or stacks of experts.

    Parameters
    ----------
    config : mapping
        ``quantization_config`` of config.json. Which modules are quantized follows from the tensors, so that ``ignore``
        is not read; how they are follows from ``config_groups``: a target that is the module's name, else a regular
        expression ("re:...") that matches its beginning, else a class.
    tensors : mapping of str to Tensor
        Of the checkpoint.

    Returns
    -------
    dict of str to Layer
        By the path of the module.

    Raises
    ------
    ValueError
        If a value in the config makes no sense.
    """
    schemes = Schemes(config)
    found: dict[str, Layer] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        has_codes = part == "weight" and tensor.dtype in ("I8", "F8_E4M3")
        if module and module not in found and (has_codes or part in _MARKS):
            found[module] = _layer(module, Parts(tensors, f"{module}.", _PARTS), schemes)
    return found


class _Plan(NamedTuple):
    """How matrices are read."""

    shape: tuple[int, ...]  # (N, K)
    read: Callable[[int], QuantizedWeight] | None = None
    format: Format | None = None
    floats: Callable[[int], npt.NDArray[np.float32]] | None = None
    refusal: str | None = None


class _Module(NamedTuple):
    name: str
    parts: Parts
    stack: tuple[int, ...]  # of experts
    scheme: Scheme

    def matrix(self, index: int, types: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
        return self.parts.matrix(index, self.stack, share=True).take_all(types)


def _layer(name: str, parts: Parts, schemes: Schemes) -> Layer:
    type_ = "compressed-tensors"
    try:
        scheme = schemes.of(name)
        type_ = scheme.type
        if schemes.refusal is not None:
            raise ValueError(schemes.refusal)
        if scheme.format in _OTHER_FORMATS or "bitmask" in parts or "scale_packed" in parts:
            raise ValueError("its weight is stored without zeros, which is not read")
        if "weight" in parts and "weight_packed" in parts:
            raise ValueError("weight and weight_packed are both there")
        main = parts.take("weight" if "weight" in parts else "weight_packed")
        if len(main.shape) not in (2, 3):
            raise ValueError(f"{main.name} must have shape (N, K), or (E, N, K) of experts, got {main.shape}")
        shape, *plan = _plan(_Module(name, parts, main.shape[:-2], scheme))
    except ValueError as error:
        return parts.layer(type_, _claimed_shape(parts), refusal=str(error))
    return parts.layer(type_, main.shape[:-2] + shape, **dict(zip(_Plan._fields[1:], plan)))


def _claimed_shape(parts: Parts) -> tuple[int, ...]:
    """Of a weight that cannot be read, as far as its tensors tell."""
    if "weight_shape" in parts:
        with suppress(ValueError):
            shape = parts.take("weight_shape")
            return _ints(shape.name, shape.array(), 2, 3)
    return next(parts.take(part).shape for part in ("weight", "weight_packed", *_MARKS) if part in parts)


def _plan(module: _Module) -> _Plan:
    scheme, is_packed = module.scheme, "weight" not in module.parts
    if not scheme.is_float:
        if scheme.strategy == "block":
            raise ValueError("its strategy is block: scales of several rows are not read")
        return _of_packed(module) if is_packed else _of_int8(module)
    if "weight_zero_point" in module.parts:
        raise ValueError("weight_zero_point is there, which floats do not have")
    if is_packed and scheme.type.endswith(("MXFP4", "NVFP4")):
        return _of_mxfp4(module) if scheme.group_size == MX_GROUP else _of_nvfp4(module)
    if not is_packed and scheme.num_bits == 8:
        return _of_float8(module)
    raise ValueError(f"its weights are floats of {scheme.num_bits} bits in groups of {scheme.group_size}, not read")


def _of_packed(module: _Module) -> _Plan:
    parts, scheme = module.parts, module.scheme
    stored = parts.take("weight_shape", "I64", "I32")
    shape = _ints(stored.name, stored.array(), 2 + len(module.stack))
    if shape[:-2] != module.stack:
        raise ValueError(f"{stored.name} must begin with the experts {module.stack}, got {shape}")
    shape = shape[-2:]
    types: dict[str, tuple[str, ...]] = {"weight_packed": ("I32",), "weight_scale": FLOAT_TYPES}
    if "weight_zero_point" in parts or not scheme.symmetric:
        types["weight_zero_point"] = ("I32", "I8")
    if "weight_g_idx" in parts or scheme.has_g_idx:
        types["weight_g_idx"] = ("I32", "I64")
    tensors, num_bits = module.matrix(0, types), check_bits("num_bits", scheme.num_bits, _BITS)
    group = _check_packed(tensors, shape, num_bits, scheme.group_size or shape[1])

    def read(index: int) -> QuantizedWeight:
        arrays = read_arrays(module.matrix(index, types))
        weight = pack_quantized(**arrays, weight_shape=shape, num_bits=num_bits, group_size=group)
        _warn_if_clamped(module, weight)
        return weight

    return _Plan(shape, read, _int_format(tensors, shape, num_bits, group))


def _of_int8(module: _Module) -> _Plan:
    parts, scheme = module.parts, module.scheme
    if parts.take("weight").dtype in FLOAT_TYPES:
        raise ValueError("weight holds floats that the model rounds when it runs: it is not compressed")
    types: dict[str, tuple[str, ...]] = {"weight": ("I8",), "weight_scale": FLOAT_TYPES}
    if "weight_zero_point" in parts or not scheme.symmetric:
        types["weight_zero_point"] = ("I8",)
    tensors, num_bits = module.matrix(0, types), check_bits("num_bits", scheme.num_bits, _BITS)
    shape = check_matrix(tensors["weight"])
    group = _check_plain(tensors, scheme.group_size or shape[1])

    def read(index: int) -> QuantizedWeight:
        weight = int_quantized(**read_arrays(module.matrix(index, types)), num_bits=num_bits, group_size=group)
        _warn_if_clamped(module, weight)
        return weight

    return _Plan(shape, read, _int_format(tensors, shape, num_bits, group))


def _int_format(tensors: Mapping[str, Tensor], shape: tuple[int, ...], num_bits: int, group: int) -> Format:
    bits = stored_bits(num_bits)
    zps = tensors.get("weight_zero_point")
    return Format(
        n=shape[0],
        k=shape[1],
        group_size=group,
        scale_dtype=scale_dtype(tensors["weight_scale"]),
        zero_point=(0 if bits == 8 else 1 << (bits - 1)) if zps is None or prod(zps.shape) == 1 else None,
        bits=bits,
        has_perm="weight_g_idx" in tensors,
    )


def _warn_if_clamped(module: _Module, weight: QuantizedWeight) -> None:
    """intel/auto-round#2273: zero points without a sign, to which weights were added and cut off."""
    num_bits = module.scheme.num_bits
    greatest = (1 << (num_bits - 1)) - 1
    # Of less than 4 bits that is nothing special.
    if weight.zps is not None and num_bits >= 4 and np.count_nonzero(weight.codes == greatest) * 3 > weight.codes.size:
        warnings.warn(
            f"{module.name} has its greatest code, {greatest}, in more than a third of its weights: auto-round before "
            "September 2026 wrote asymmetric weights that were cut off there",
            stacklevel=2,
        )


def _of_mxfp4(module: _Module) -> _Plan:
    types = {"weight_packed": ("U8",), "weight_scale": ("U8", "F8_E8M0")}
    shape = _check_float4(module.matrix(0, types), MX_GROUP)

    def read(index: int) -> QuantizedWeight:
        return mxfp4_pack_quantized(**read_arrays(module.matrix(index, types)))

    return _Plan(shape, read, Format(*shape, MX_GROUP, "float16", zero_point=0, has_table=True))


def _of_nvfp4(module: _Module) -> _Plan:
    types = {"weight_packed": ("U8",), "weight_scale": ("F8_E4M3",), "weight_global_scale": FLOAT_TYPES}
    shape = _check_float4(module.matrix(0, types), NV_GROUP)

    def read(index: int) -> QuantizedWeight:
        return nvfp4_pack_quantized(**read_arrays(module.matrix(index, types)))

    return _Plan(shape, read, Format(*shape, NV_GROUP, "float32", zero_point=0, has_table=True))


def _of_float8(module: _Module) -> _Plan:
    """E4M3, which no codes hold exactly: only as floats."""
    scheme, types = module.scheme, {"weight": ("F8_E4M3",), "weight_scale": (*FLOAT_TYPES, "U8", "F8_E8M0")}
    tensors = module.matrix(0, types)
    n, k = shape = check_matrix(tensors["weight"])
    height, width = scheme.block or (n if scheme.strategy == "tensor" else 1, scheme.group_size or k)
    height, width = min(height, n), min(width, k)
    wanted, scales = (ceil_div(n, height), ceil_div(k, width)), tensors["weight_scale"]
    if prod(scales.shape) != prod(wanted) or wanted[1] != 1:
        check_shape(scales, wanted)

    def floats(index: int) -> npt.NDArray[np.float32]:
        weight, scale = read_arrays(module.matrix(index, types)).values()
        if scale.dtype == np.uint8:
            _check_e8m0(scale)
            scale = half_of_e8m0(scale) * np.float32(2)
        of_rows = scale.reshape(wanted).astype(np.float32, copy=False).repeat(height, axis=0)[:n]
        return e4m3(weight) * of_rows.repeat(width, axis=1)[:, :k]

    return _Plan(shape, floats=floats, refusal="its weights are floats of 8 bits, which no codes hold exactly")
