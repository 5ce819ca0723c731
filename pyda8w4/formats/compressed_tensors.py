"""Layers of compressed-tensors, which LLM Compressor writes: integers, packed and not, and floats of 4 bits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import FLOATS, as_array, as_array_of, ceil_div, check_dtype, one_of
from pyda8w4._format import Format, check_group_size, group_count, group_size_of
from pyda8w4._safetensors import Tensor
from pyda8w4.formats import mxfp4
from pyda8w4.formats._compressed_tensors_config import MX_GROUP, NV_GROUP, Scheme, Schemes
from pyda8w4.formats._floats import E2M1_TWICE, e4m3, half_of_e8m0
from pyda8w4.formats._layer import Layer, predicted_format
from pyda8w4.formats._weight import QuantizedWeight

__all__ = ["int_quantized", "mxfp4_pack_quantized", "nvfp4_pack_quantized", "pack_quantized"]

_Shape = tuple[int, ...]

_CACHED = 1 << 18  # bytes that are read again and again


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
    num_bits = _check_num_bits(num_bits)
    packed, scales = as_array("weight_packed", weight_packed), _floats("weight_scale", weight_scale)
    check_dtype("weight_packed", packed, ("int32",))
    shape = _ints("weight_shape", as_array("weight_shape", weight_shape))
    zps = None if weight_zero_point is None else as_array("weight_zero_point", weight_zero_point)
    is_packed = zps is not None and check_dtype("weight_zero_point", zps, ("int32", "int8")) == "int32"
    g_idx = None if weight_g_idx is None else as_array("weight_g_idx", weight_g_idx)
    if g_idx is not None:
        check_dtype("weight_g_idx", g_idx, ("int32", "int64"))
    n, k, group = _check_packed(
        packed.shape,
        scales.shape,
        shape,
        None if zps is None else zps.shape,
        None if g_idx is None else g_idx.shape,
        zps_are_packed=is_packed,
        num_bits=num_bits,
        group_size=group_size,
    )
    codes = _unpacked(packed, num_bits, k)
    if zps is not None:
        if is_packed:
            zps = _unpacked(zps.T, num_bits, n).T
        else:
            zps = _per_row(_in_range("weight_zero_point", zps, num_bits), n)
    perm = None if g_idx is None or (g_idx == -1).all() else _order(g_idx, group)
    return QuantizedWeight(
        codes if perm is None else np.take(codes, perm, axis=1),
        _per_row(scales, n),
        zps,
        bits=_bits(num_bits),
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
    num_bits = _check_num_bits(num_bits)
    codes, scales = as_array("weight", weight), _floats("weight_scale", weight_scale)
    check_dtype("weight", codes, ("int8",))
    zps = None if weight_zero_point is None else as_array("weight_zero_point", weight_zero_point)
    if zps is not None:
        check_dtype("weight_zero_point", zps, ("int8",))
    group = _check_plain(codes.shape, scales.shape, None if zps is None else zps.shape, group_size=group_size)
    n = len(codes)
    if zps is not None:
        zps = _per_row(_in_range("weight_zero_point", zps, num_bits), n)
    _in_range("weight", codes, num_bits)
    return QuantizedWeight(codes, _per_row(scales, n), zps, bits=_bits(num_bits), group_size=group)


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
    The numbers of `mxfp4.unpack`, in another shape (compressed-tensors' `compressors/mxfp4`).

    Examples
    --------
    >>> import numpy as np
    >>> from pyda8w4.formats import compressed_tensors
    >>> packed, scales = np.full((1, 16), 0xF1, np.uint8), np.array([[128]], np.uint8)
    >>> compressed_tensors.mxfp4_pack_quantized(packed, scales).pack().dequantize()[0, :4]
    array([  1., -12.,   1., -12.], dtype=float32)
    """
    packed, scales = as_array("weight_packed", weight_packed), as_array("weight_scale", weight_scale)
    check_dtype("weight_packed", packed, ("uint8",))
    check_dtype("weight_scale", scales, ("uint8",))
    _check_float4(packed.shape, scales.shape, MX_GROUP)
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
    packed, scales = as_array("weight_packed", weight_packed), as_array("weight_scale", weight_scale)
    check_dtype("weight_packed", packed, ("uint8",))
    if check_dtype("weight_scale", scales, ("uint8", "float8_e4m3fn")) != "uint8":
        scales = scales.view(np.uint8)
    divisor = _floats("weight_global_scale", weight_global_scale)
    n, k = _check_float4(packed.shape, scales.shape, NV_GROUP)
    if divisor.size != 1:
        raise ValueError(f"weight_global_scale must be one number, got shape {divisor.shape}")
    if not 0 < float(divisor.reshape(())) < np.inf:
        raise ValueError(f"weight_global_scale must be above 0 and finite, got {divisor.reshape(())}")
    floats = e4m3(scales)
    if np.isnan(floats).any():
        raise ValueError("weight_scale must be numbers, got NaN")
    codes = np.empty((n, k // 2, 2), np.uint8)
    np.bitwise_and(packed, 15, out=codes[..., 0])
    np.right_shift(packed, 4, out=codes[..., 1])
    with np.errstate(over="ignore"):  # the packed weight takes no infinite scales
        halves = floats / divisor.reshape(()).astype(np.float32) / 2
    return QuantizedWeight(codes.reshape(n, k), halves, table=E2M1_TWICE, group_size=NV_GROUP)


# ---- arrays ----------------------------------------------------------------------------------


def _check_num_bits(num_bits: Any) -> int:
    if isinstance(num_bits, bool) or not isinstance(num_bits, (int, np.integer)):
        raise TypeError(f"num_bits must be an int, got {type(num_bits).__name__}")
    if not 1 <= num_bits <= 8:
        raise ValueError(f"num_bits must be 1 to 8, got {num_bits}")
    return int(num_bits)


def _bits(num_bits: int) -> int:
    """Of the codes of a packed weight that can hold them."""
    return 8 if num_bits == 7 else max(num_bits, 4)


def _floats(name: str, value: npt.ArrayLike) -> npt.NDArray[Any]:
    return as_array_of(name, value, FLOATS)[0]


def _ints(name: str, array: npt.NDArray[Any]) -> _Shape:
    if array.dtype.kind not in "iu" or array.shape not in ((2,), (3,)) or (array < 1).any():
        raise ValueError(f"{name} must be (N, K), or (E, N, K) of experts, got {array.dtype} of shape {array.shape}")
    return tuple(map(int, array))


def _check_packed(
    packed: _Shape,
    scales: _Shape,
    shape: _Shape,
    zps: _Shape | None,
    g_idx: _Shape | None,
    *,
    zps_are_packed: bool,
    num_bits: int,
    group_size: int | None,
) -> tuple[int, int, int]:
    """Shapes of arrays -> N, K, and the group size."""
    if len(shape) != 2:
        raise ValueError(f"weight_shape must be (N, K), got {shape}")
    n, k = shape
    if packed != (n, _words(k, num_bits)):
        raise ValueError(
            f"weight_packed must have shape {(n, _words(k, num_bits))} for (N, K) = {shape} of {num_bits} bits, "
            f"got {packed}"
        )
    groups, group = _check_groups(scales, n, k, group_size)
    if zps_are_packed:
        if zps != (_words(n, num_bits), groups):
            raise ValueError(f"weight_zero_point of int32 must have shape {(_words(n, num_bits), groups)}, got {zps}")
    elif zps is not None:
        _check_per_row("weight_zero_point", zps, n, groups)
    if g_idx is not None and g_idx != (k,):
        raise ValueError(f"weight_g_idx must have shape ({k},), got {g_idx}")
    return n, k, group


def _check_plain(weight: _Shape, scales: _Shape, zps: _Shape | None, *, group_size: int | None) -> int:
    """Shapes of arrays -> the group size."""
    if len(weight) != 2 or 0 in weight:
        raise ValueError(f"weight must have shape (N, K), got {weight}")
    n, k = weight
    groups, group = _check_groups(scales, n, k, group_size)
    if zps is not None:
        _check_per_row("weight_zero_point", zps, n, groups)
    return group


def _check_float4(packed: _Shape, scales: _Shape, group: int) -> tuple[int, int]:
    """Shapes of arrays -> N, K."""
    if len(packed) != 2 or 0 in packed or packed[1] * 2 % group:
        raise ValueError(f"weight_packed must have shape (N, K / 2) with K a multiple of {group}, got {packed}")
    n, k = packed[0], packed[1] * 2
    if scales != (n, k // group):
        raise ValueError(f"weight_scale must have shape {(n, k // group)}, got {scales}")
    return n, k


def _check_e8m0(scales: npt.NDArray[np.uint8]) -> None:
    if scales.max() == 255:
        raise ValueError("weight_scale must be 0 to 254, got 255, which stands for NaN")


def _check_groups(scales: _Shape, n: int, k: int, group_size: int | None) -> tuple[int, int]:
    """-> groups of a row, and their size."""
    if group_size is None:
        groups = scales[1] if len(scales) == 2 and scales[1] else 1
        group = group_size_of(k, groups, "weight_scale")
    else:
        group = check_group_size(group_size, k)
        groups = group_count(k, group)
    _check_per_row("weight_scale", scales, n, groups)
    return groups, group


def _check_per_row(name: str, shape: _Shape, n: int, groups: int) -> None:
    """One for each group of a row; where that is one, it may be one of all rows."""
    if shape != (n, groups) and (groups > 1 or shape not in ((n,), (1, 1), (1,), ())):
        raise ValueError(f"{name} must have shape {(n, groups)}, got {shape}")


def _words(count: int, num_bits: int) -> int:
    """Of 32 bits."""
    return ceil_div(count * num_bits, 32)


def _unpacked(words: npt.NDArray[np.int32], num_bits: int, count: int) -> npt.NDArray[np.int8]:
    """(N, W) -> (N, count): fields without gaps, of signed numbers that half the range was added to."""
    n = len(words)
    data = np.ascontiguousarray(words, "<i4").view(np.uint8)
    # 8 fields take as many bytes as one has bits, and none lies in more than two bytes.
    data = np.pad(data, ((0, 0), (0, -data.shape[1] % num_bits))).reshape(n, -1, num_bits)
    codes = np.empty((n, data.shape[1], 8), np.uint8)
    step = max(1, _CACHED // codes[0].size)
    for begin in range(0, n, step):
        rows = slice(begin, begin + step)
        for field in range(8):
            byte, shift = divmod(field * num_bits, 8)
            found = data[rows, :, byte] >> shift
            if shift + num_bits > 8:
                found |= data[rows, :, byte + 1] << (8 - shift)
            np.bitwise_and(found, (1 << num_bits) - 1, out=codes[rows, :, field])
        codes[rows] -= 1 << (num_bits - 1)
    return codes.reshape(n, -1)[:, :count].view(np.int8)


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
_PARTS = frozenset(("weight", *(f"weight_{what}" for what in _WEIGHTS), *_ACTIVATIONS, *_SPARSE))
_MARKS = ("weight_packed", "weight_scale", "weight_shape", "bitmask", "scale_packed")  # that it is quantized

_SCALE_TYPES = ("F32", "F16", "BF16")


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
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part in _PARTS:
            modules.setdefault(module, {})[part] = tensor
    return {module: _layer(module, parts, schemes) for module, parts in modules.items() if _is_quantized(parts)}


def _is_quantized(tensors: dict[str, Tensor]) -> bool:
    has_codes = "weight" in tensors and tensors["weight"].dtype in ("I8", "F8_E4M3")
    return has_codes or any(mark in tensors for mark in _MARKS)


class _Parts:
    """The tensors of a module, which have a first dimension more where it is a stack of experts."""

    def __init__(self, tensors: dict[str, Tensor], main: str) -> None:
        self.tensors = tensors
        if main not in tensors:
            raise ValueError(f"{main} is missing")
        shape = tensors[main].shape
        if len(shape) not in (2, 3) or 0 in shape:
            raise ValueError(f"{main} must have shape (N, K), or (E, N, K) of experts, got {shape}")
        self.experts = shape[:-2]

    def type(self, name: str, *allowed: str) -> str:
        """Of a tensor that must be there."""
        if name not in self.tensors:
            raise ValueError(f"{name} is missing")
        found = self.tensors[name].dtype
        if found not in allowed:
            raise ValueError(f"{name} must be of {one_of(allowed)}, got {found}")
        return found

    def shape(self, name: str, *allowed: str) -> _Shape:
        """Of one matrix of a tensor that must be there."""
        self.type(name, *allowed)
        tensor = self.tensors[name]
        return tensor.shape[1:] if self._is_stack(name) else tensor.shape

    def weight_shape(self) -> _Shape:
        """(N, K), read."""
        self.type("weight_shape", "I64", "I32")
        shape = _ints("weight_shape", self.tensors["weight_shape"].array())
        if shape[:-2] != self.experts:
            raise ValueError(f"weight_shape must begin with the experts {self.experts}, got {shape}")
        return shape[-2:]

    def arrays(self, index: int, *names: str) -> dict[str, npt.NDArray[Any]]:
        """Of matrix `index`, those that are there. bfloat16 is float32."""
        found = {}
        for name in names:
            if name in self.tensors:
                tensor = self.tensors[name].part(index) if self._is_stack(name) else self.tensors[name]
                found[name] = tensor.floats() if tensor.is_float else tensor.array()
        return found

    def _is_stack(self, name: str) -> bool:
        shape = self.tensors[name].shape
        if self.experts and shape[:1] != self.experts and prod(shape) != 1:  # one number is that of all experts
            raise ValueError(f"{name} must be of {self.experts[0]} experts, got shape {shape}")
        return self.experts != () and shape[:1] == self.experts


class _Plan(NamedTuple):
    """How a matrix is read."""

    shape: _Shape  # (N, K)
    read: Callable[[int], QuantizedWeight] | None = None
    format: Format | None = None
    floats: Callable[[int], npt.NDArray[np.float32]] | None = None
    refusal: str | None = None


def _layer(module: str, tensors: dict[str, Tensor], schemes: Schemes) -> Layer:
    nbytes, names = sum(tensor.nbytes for tensor in tensors.values()), tuple(tensor.name for tensor in tensors.values())
    kind = "compressed-tensors"
    try:
        scheme = schemes.of(module)
        kind = scheme.type
        if schemes.refusal is not None:
            raise ValueError(schemes.refusal)
        if scheme.format in _OTHER_FORMATS or tensors.keys() & {"bitmask", "scale_packed"}:
            raise ValueError("its weight is stored without zeros, which is not read")
        if {"weight", "weight_packed"} <= tensors.keys():
            raise ValueError("weight and weight_packed are both there")
        parts = _Parts(tensors, "weight" if "weight" in tensors else "weight_packed")
        plan = _plan(module, parts, scheme)
    except ValueError as error:
        return Layer(kind, _claimed_shape(tensors), nbytes, names, refusal=str(error))
    return Layer(kind, parts.experts + plan.shape, nbytes, names, plan.read, plan.floats, plan.format, plan.refusal)


def _claimed_shape(tensors: dict[str, Tensor]) -> _Shape:
    """Of a weight that cannot be read, as far as its tensors tell."""
    if "weight_shape" in tensors:
        with suppress(ValueError):
            return _ints("weight_shape", tensors["weight_shape"].array())
    return next(tensors[part].shape for part in ("weight", "weight_packed", *_MARKS) if part in tensors)


def _plan(module: str, parts: _Parts, scheme: Scheme) -> _Plan:
    is_packed = "weight" not in parts.tensors
    if not scheme.is_float:
        if scheme.strategy == "block":
            raise ValueError("its strategy is block: scales of several rows are not read")
        return (_of_packed if is_packed else _of_int8)(module, parts, scheme)
    if "weight_zero_point" in parts.tensors:
        raise ValueError("weight_zero_point is there, which floats do not have")
    if is_packed and scheme.type.endswith(("MXFP4", "NVFP4")):
        return _of_mxfp4(parts) if scheme.group_size == MX_GROUP else _of_nvfp4(parts)
    if not is_packed and scheme.num_bits == 8:
        return _of_float8(parts, scheme)
    raise ValueError(f"its weights are floats of {scheme.num_bits} bits in groups of {scheme.group_size}, not read")


def _of_packed(module: str, parts: _Parts, scheme: Scheme) -> _Plan:
    shape = parts.weight_shape()
    zps = g_idx = None
    is_packed = False
    if "weight_zero_point" in parts.tensors or not scheme.symmetric:
        is_packed = parts.type("weight_zero_point", "I32", "I8") == "I32"
        zps = parts.shape("weight_zero_point", "I32", "I8")
    if "weight_g_idx" in parts.tensors or scheme.has_g_idx:
        g_idx = parts.shape("weight_g_idx", "I32", "I64")
    num_bits = _check_num_bits(scheme.num_bits)
    *_, group = _check_packed(
        parts.shape("weight_packed", "I32"),
        parts.shape("weight_scale", *_SCALE_TYPES),
        shape,
        zps,
        g_idx,
        zps_are_packed=is_packed,
        num_bits=num_bits,
        group_size=scheme.group_size or shape[1],
    )

    def read(index: int) -> QuantizedWeight:
        arrays = parts.arrays(index, "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx")
        weight = pack_quantized(**arrays, weight_shape=shape, num_bits=num_bits, group_size=group)
        _warn_if_clamped(module, weight, num_bits)
        return weight

    return _Plan(shape, read, _int_format(parts, scheme, shape, group, zps, has_perm=g_idx is not None))


def _of_int8(module: str, parts: _Parts, scheme: Scheme) -> _Plan:
    if parts.tensors["weight"].dtype in _SCALE_TYPES:
        raise ValueError("weight holds floats that the model rounds when it runs: it is not compressed")
    shape = parts.shape("weight", "I8")
    zps = None
    if "weight_zero_point" in parts.tensors or not scheme.symmetric:
        zps = parts.shape("weight_zero_point", "I8")
    num_bits = _check_num_bits(scheme.num_bits)
    group = _check_plain(
        shape, parts.shape("weight_scale", *_SCALE_TYPES), zps, group_size=scheme.group_size or shape[1]
    )

    def read(index: int) -> QuantizedWeight:
        arrays = parts.arrays(index, "weight", "weight_scale", "weight_zero_point")
        weight = int_quantized(**arrays, num_bits=num_bits, group_size=group)
        _warn_if_clamped(module, weight, num_bits)
        return weight

    return _Plan(shape, read, _int_format(parts, scheme, shape, group, zps))


def _int_format(
    parts: _Parts, scheme: Scheme, shape: _Shape, group: int, zps: _Shape | None, has_perm: bool = False
) -> Format:
    bits = _bits(scheme.num_bits)
    middle = 0 if bits == 8 else 1 << (bits - 1)
    return Format(
        n=shape[0],
        k=shape[1],
        group_size=group,
        scale_dtype=_scale_dtype(parts.tensors["weight_scale"]),
        zero_point=middle if zps is None or prod(zps) == 1 else None,
        bits=bits,
        has_perm=has_perm,
    )


def _scale_dtype(tensor: Tensor) -> str:
    """Of a packed weight; bfloat16 takes what float16 does."""
    return "float32" if tensor.dtype == "F32" else "float16"


def _warn_if_clamped(module: str, weight: QuantizedWeight, num_bits: int) -> None:
    """intel/auto-round#2273: zero points without a sign, to which weights were added and cut off."""
    greatest = (1 << (num_bits - 1)) - 1
    # Of less than 4 bits that is nothing special.
    if weight.zps is not None and num_bits >= 4 and np.count_nonzero(weight.codes == greatest) * 3 > weight.codes.size:
        warnings.warn(
            f"{module} has its greatest code, {greatest}, in more than a third of its weights: auto-round before "
            "September 2026 wrote asymmetric weights that were cut off there",
            stacklevel=2,
        )


def _of_mxfp4(parts: _Parts) -> _Plan:
    scales = parts.shape("weight_scale", "U8", "F8_E8M0")
    n, k = shape = _check_float4(parts.shape("weight_packed", "U8"), scales, MX_GROUP)

    def read(index: int) -> QuantizedWeight:
        return mxfp4_pack_quantized(**parts.arrays(index, "weight_packed", "weight_scale"))

    return _Plan(shape, read, predicted_format(n, k, MX_GROUP, 0, has_table=True))


def _of_nvfp4(parts: _Parts) -> _Plan:
    scales = parts.shape("weight_scale", "F8_E4M3")
    n, k = shape = _check_float4(parts.shape("weight_packed", "U8"), scales, NV_GROUP)
    divisor = parts.shape("weight_global_scale", *_SCALE_TYPES)
    if prod(divisor) != 1:
        raise ValueError(f"weight_global_scale must be one number, got shape {divisor}")

    def read(index: int) -> QuantizedWeight:
        return nvfp4_pack_quantized(**parts.arrays(index, "weight_packed", "weight_scale", "weight_global_scale"))

    format = Format(n=n, k=k, group_size=NV_GROUP, scale_dtype="float32", zero_point=0, has_table=True)
    return _Plan(shape, read, format)


def _of_float8(parts: _Parts, scheme: Scheme) -> _Plan:
    """E4M3, which no codes hold exactly: only as floats."""
    n, k = shape = parts.shape("weight", "F8_E4M3")
    scales = parts.shape("weight_scale", *_SCALE_TYPES, "U8", "F8_E8M0")
    height, width = scheme.block or (n if scheme.strategy == "tensor" else 1, scheme.group_size or k)
    height, width = min(height, n), min(width, k)
    wanted = (ceil_div(n, height), ceil_div(k, width))
    if scales != wanted and (prod(scales) != prod(wanted) or wanted[1] != 1):
        raise ValueError(f"weight_scale must have shape {wanted}, got {scales}")

    def floats(index: int) -> npt.NDArray[np.float32]:
        weight, scale = parts.arrays(index, "weight", "weight_scale").values()
        if scale.dtype == np.uint8:
            _check_e8m0(scale)
            scale = half_of_e8m0(scale) * np.float32(2)
        of_rows = scale.reshape(wanted).astype(np.float32, copy=False).repeat(height, axis=0)[:n]
        return e4m3(weight) * of_rows.repeat(width, axis=1)[:, :k]

    return _Plan(shape, floats=floats, refusal="its weights are floats of 8 bits, which no codes hold exactly")
