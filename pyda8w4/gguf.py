"""Weights from GGUF files, the model files of llama.cpp.

Needs the package gguf: ``pip install 'pyda8w4[gguf]'``.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyda8w4._filesystem import check_path, map_file
from pyda8w4._packed import PackedWeight
from pyda8w4._prepack import prepack
from pyda8w4._quantize import quantize_weight

try:
    import gguf
except ImportError as error:
    raise ImportError("pyda8w4.gguf needs gguf: pip install 'pyda8w4[gguf]'", name=error.name) from error

__all__ = ["File"]

_GROUP = 32  # elements that share a scale, in most types
_Type = gguf.GGMLQuantizationType
_Value = gguf.GGUFValueType


class File:
    """A GGUF file: metadata, and tensors as float arrays or packed weights.

    The file is mapped; a tensor is read when it is requested.

    Parameters
    ----------
    path : path-like
        Where the file is.

    Attributes
    ----------
    metadata : dict
        Values by name, such as ``"llama.block_count"`` or ``"tokenizer.ggml.tokens"``.
    types : dict of str to str
        Names of all tensors, and how each is stored: ``"Q4_0"``, ``"F32"``, ...

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is not a complete GGUF file, or has two tensors or two values of the same name.

    Examples
    --------
    >>> import gguf, os, tempfile
    >>> import numpy as np
    >>> import pyda8w4.gguf
    >>> path = os.path.join(tempfile.mkdtemp(), "model.gguf")
    >>> writer = gguf.GGUFWriter(path, "llama")
    >>> q4_0 = gguf.quantize(np.ones((64, 128), np.float32), gguf.GGMLQuantizationType.Q4_0)
    >>> writer.add_tensor("output.weight", q4_0, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    >>> writer.write_header_to_file()
    >>> writer.write_kv_data_to_file()
    >>> writer.write_tensors_to_file()
    >>> writer.close()
    >>> file = pyda8w4.gguf.File(path)
    >>> file.types
    {'output.weight': 'Q4_0'}
    >>> file.packed("output.weight")
    PackedWeight(shape=(64, 128), bits=4, group_size=32, scales=float16, zero_point=8, nbytes=4864)
    """

    metadata: dict[str, Any]
    types: dict[str, str]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = check_path(path)
        data = map_file(self._path)
        try:
            self.metadata, self._tensors = _read(data)
        except (ValueError, RecursionError) as error:  # arrays may hold arrays
            raise ValueError(f"path must be a GGUF file, got {str(path)!r}: {error}") from None
        self.types = {name: tensor.type.name for name, tensor in self._tensors.items()}

    def array(self, name: str) -> npt.NDArray[Any]:
        """A tensor as float32, dequantized as ggml does.

        Parameters
        ----------
        name : str
            One of `types`.

        Returns
        -------
        ndarray of float32
            Of the tensor's shape; may be written to.

        Raises
        ------
        ValueError
            If there is no such tensor, or its type is not one of floats.
        """
        tensor = self._tensor(name)
        try:
            # Scales that are not finite, and numbers beyond float32, give what such operations give.
            with np.errstate(all="ignore"):
                # F32 is the file itself, which cannot be written to.
                return np.require(_floats(tensor), np.float32, ["C", "W"])
        except NotImplementedError:
            raise self._refused(f"name must be of a tensor of floats, got {name} of {self.types[name]}") from None
        except ValueError as error:  # gguf's, such as for tensors without rows
            raise self._refused(f"{name} of {self.types[name]} cannot be dequantized: {error}") from None

    def packed(self, name: str, bits: int | None = None) -> PackedWeight:
        """A matrix as a packed weight.

        Parameters
        ----------
        name : str
            One of `types`; of a matrix (N, K).
        bits : {4, 8}, optional
            None takes the weights as they are in the file. With 4 or 8, a matrix that has other bits is
            dequantized and quantized again, in groups of 32: to 4 bits by `pyda8w4.quantize_weight`, to 8 as
            Q8_0.

        Returns
        -------
        PackedWeight
            Without `bits`, `PackedWeight.dequantize` gives what `array` gives.

        Raises
        ------
        ValueError
            If there is no such matrix, its values or scales are not finite or too large, or `bits` is none of
            these. Without `bits`, if its type is none of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, IQ4_NL,
            IQ4_XS and MXFP4; with `bits`, if it is not one of floats. With 8 bits, if K is no multiple of 32.
        """
        tensor = self._tensor(name)
        if len(tensor.shape) != 2:
            raise self._refused(f"name must be of a matrix, got {name} of shape {tensor.shape}")
        if bits not in (None, 4, 8):
            raise ValueError(f"bits must be 4, 8 or None, got {bits!r}")
        exact = _EXACT.get(tensor.type)
        if exact is not None and bits in (None, exact.bits):
            read = partial(_packed, tensor, exact.pack)
        elif bits is None:
            raise self._refused(
                f"name must be of a tensor of {', '.join(kind.name for kind in _EXACT)}, got {name} of "
                f"{self.types[name]}; bits=4 or bits=8 quantizes it"
            )
        elif bits == 8 and tensor.shape[1] % _GROUP:
            raise self._refused(f"name must be of a matrix of whole groups of 32, got {name} of shape {tensor.shape}")
        else:
            read = partial(_quantized, self.array(name), bits)
        try:
            return read()
        except ValueError as error:
            raise self._refused(f"{name} of {self.types[name]} cannot be packed: {error}") from None

    def _tensor(self, name: str) -> _Tensor:
        if name not in self._tensors:
            no, count = (self.metadata.get(f"split.{key}") for key in ("no", "count"))
            hint = "" if count in (None, 1) else f"; it is one of {count} parts (split.no is {no}): others may have it"
            raise self._refused(f"name must be of a tensor in the file, got {name!r}{hint}")
        return self._tensors[name]

    def _refused(self, why: str) -> ValueError:
        return ValueError(f"{self._path}: {why}")


# ---- the file --------------------------------------------------------------------------------
# gguf.GGUFReader makes arrays of each of the hundred thousand words of a tokenizer, which takes seconds.

_SCALARS = {
    _Value.UINT8: "u1", _Value.INT8: "i1", _Value.UINT16: "<u2", _Value.INT16: "<i2", _Value.UINT32: "<u4",
    _Value.INT32: "<i4", _Value.FLOAT32: "<f4", _Value.BOOL: "?", _Value.UINT64: "<u8", _Value.INT64: "<i8",
    _Value.FLOAT64: "<f8",
}  # fmt: skip


class _Tensor(NamedTuple):
    type: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    data: npt.NDArray[Any]  # of bytes, the last dimension those of a row


class _Cursor:
    """Reads values one after another."""

    def __init__(self, data: npt.NDArray[Any]) -> None:
        self.data, self.at = memoryview(data), 0  # type: ignore[arg-type]

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise ValueError("it ends too early")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(value)

    def string(self) -> str:
        return str(self.take(self.number("<Q")), "utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _Value.STRING:
            return self.string()
        if kind == _Value.ARRAY:
            kind, count = self.number("<I"), self.number("<Q")
            return self.scalars(kind, count) if kind in _SCALARS else [self.value(kind) for _ in range(count)]
        return self.scalars(kind, 1)[0]

    def scalars(self, kind: int, count: int) -> list[Any]:
        dtype = np.dtype(_SCALARS[_Value(kind)])
        values: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return values


def _read(data: npt.NDArray[Any]) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    cursor = _Cursor(data)
    if cursor.number("<I") != gguf.GGUF_MAGIC:
        raise ValueError("it does not begin like one")
    if (version := cursor.number("<I")) not in (2, 3):
        raise ValueError(f"version 2 or 3, little-endian, can be read, not {version}")
    tensor_count, count = cursor.number("<Q"), cursor.number("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(count):
        _add("value", metadata, cursor.string(), cursor.value(cursor.number("<I")))

    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensor_count):
        name = cursor.string()
        shape = tuple(cursor.number("<Q") for _ in range(cursor.number("<I")))[::-1]
        _add("tensor", infos, name, (shape, cursor.number("<I"), cursor.number("<Q")))
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"its alignment is {alignment!r}")
    start = cursor.at + -cursor.at % alignment
    tensors = {}
    for name, (shape, kind, offset) in infos.items():
        if not shape:
            raise ValueError(f"its tensor {name!r} has no dimensions")
        try:
            cursor.at = start + offset
            tensors[name] = _tensor(cursor, shape, _Type(kind))
        except ValueError as error:
            raise ValueError(f"its tensor {name!r}: {error}") from None
    return metadata, tensors


def _add(what: str, known: dict[str, Any], name: str, value: Any) -> None:
    if name in known:
        raise ValueError(f"it has a {what} {name!r} twice")
    known[name] = value


def _tensor(cursor: _Cursor, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> _Tensor:
    data_shape = gguf.quant_shape_to_byte_shape(shape, kind)
    return _Tensor(kind, shape, np.frombuffer(cursor.take(prod(data_shape)), np.uint8).reshape(data_shape))


# ---- its floats ------------------------------------------------------------------------------


def _floats(tensor: _Tensor) -> npt.NDArray[Any]:
    # gguf has no function for F64, the plain numbers.
    return tensor.data.view("<f8") if tensor.type == _Type.F64 else gguf.dequantize(tensor.data, tensor.type)


def _quantized(w: npt.NDArray[Any], bits: int) -> PackedWeight:
    if bits == 4:
        return prepack(*quantize_weight(w, _GROUP), group_size=_GROUP)
    if not np.isfinite(w).all():
        raise ValueError("values must be finite, got NaN or infinity")
    with np.errstate(over="ignore"):  # scales beyond float16, which prepack refuses
        return _packed(_Tensor(_Type.Q8_0, w.shape, gguf.quantize(w, _Type.Q8_0)), _q8_0)


# ---- its blocks ------------------------------------------------------------------------------
# A row is blocks of 32 or 256 elements: bytes with scales, and codes whose bits lie in one or two places. Functions
# take (N, blocks of a row, bytes of a block). Q4_K, Q5_K, Q6_K and IQ4_XS have scales of two levels: a float16 for the
# block, and for each group an integer.

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the values of 4-bit floats


def _packed(tensor: _Tensor, pack: Callable[[npt.NDArray[Any]], PackedWeight]) -> PackedWeight:
    n, k = tensor.shape
    elements, size = gguf.GGML_QUANT_SIZES[tensor.type]
    return pack(tensor.data.reshape(n, k // elements, size))


def _q4_0(blocks: npt.NDArray[Any]) -> PackedWeight:
    return prepack(_fields(blocks[:, :, 2:], 4, 16), _halves(blocks, 0))


def _q4_1(blocks: npt.NDArray[Any]) -> PackedWeight:
    return prepack(_fields(blocks[:, :, 4:], 4, 16), _halves(blocks, 0), _zeros(blocks), _halves(blocks, 2))


def _q5_0(blocks: npt.NDArray[Any]) -> PackedWeight:
    return prepack(_five_bits(blocks, 2), _halves(blocks, 0), bits=5)


def _q5_1(blocks: npt.NDArray[Any]) -> PackedWeight:
    return prepack(_five_bits(blocks, 4), _halves(blocks, 0), _zeros(blocks), _halves(blocks, 2), bits=5)


def _q8_0(blocks: npt.NDArray[Any]) -> PackedWeight:
    codes = blocks[:, :, 2:].reshape(len(blocks), -1).view(np.int8)
    return prepack(codes, _halves(blocks, 0), bits=8)


def _q4_k(blocks: npt.NDArray[Any]) -> PackedWeight:
    return _with_minima(_fields(blocks[:, :, 16:], 4, 32), blocks, bits=4)


def _q5_k(blocks: npt.NDArray[Any]) -> PackedWeight:
    codes = _fields(blocks[:, :, 48:], 4, 32) | _fields(blocks[:, :, 16:48], 1, 32) << 4
    return _with_minima(codes, blocks, bits=5)


def _with_minima(codes: npt.NDArray[Any], blocks: npt.NDArray[Any], bits: int) -> PackedWeight:
    """With the first 16 bytes of a block: two float16, and 6 bits twice for each of 8 groups."""
    scales, minima, both = (blocks[:, :, at : at + 4] for at in (4, 8, 12))  # both: lower bits of the last 4 groups

    def six_bits(part: npt.NDArray[Any], last: npt.NDArray[Any]) -> npt.NDArray[Any]:
        fields: npt.NDArray[Any] = np.concatenate([part & 63, last | part >> 2 & 48], axis=2)
        return fields.reshape(len(blocks), -1)

    return prepack(
        codes,
        _halves(blocks, 0),
        np.zeros((len(blocks), codes.shape[1] // _GROUP), np.int8),
        -_halves(blocks, 2),
        bits=bits,
        sub_scales=six_bits(scales, both & 15),
        sub_offsets=six_bits(minima, both >> 4),
    )


def _q6_k(blocks: npt.NDArray[Any]) -> PackedWeight:
    codes = _fields(blocks[:, :, :128], 4, 64) | _fields(blocks[:, :, 128:192], 2, 32) << 4
    sub_scales = blocks[:, :, 192:208].reshape(len(blocks), -1).view(np.int8)
    return prepack(codes, _halves(blocks, 208), bits=6, sub_scales=sub_scales)


def _iq4_nl(blocks: npt.NDArray[Any]) -> PackedWeight:
    return prepack(_fields(blocks[:, :, 2:], 4, 16), _halves(blocks, 0), table=_IQ4)


def _iq4_xs(blocks: npt.NDArray[Any]) -> PackedWeight:
    six_bits = _fields(blocks[:, :, 4:8], 4, 1) | _fields(blocks[:, :, 2:4], 2, 1) << 4
    sub_scales = six_bits.view(np.int8) - np.int8(32)
    return prepack(_fields(blocks[:, :, 8:], 4, 16), _halves(blocks, 0), table=_IQ4, sub_scales=sub_scales)


def _mxfp4(blocks: npt.NDArray[Any]) -> PackedWeight:
    exponents = blocks[:, :, 0]
    if (exponents == 255).any():
        raise ValueError("scales must be finite, got the exponent 255")
    scales = np.ldexp(np.float32(1), exponents.astype(np.int32) - 128)
    return prepack(_fields(blocks[:, :, 1:], 4, 16), scales, table=_E2M1)


def _fields(data: npt.NDArray[Any], width: int, run: int) -> npt.NDArray[Any]:
    """Fields of `width` bits of each byte: the lowest of `run` bytes, then the next of those bytes, and so on."""
    runs = data.reshape(*data.shape[:2], -1, 1, run)
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    fields: npt.NDArray[Any] = runs >> shifts & np.uint8((1 << width) - 1)
    return fields.reshape(len(data), -1)


def _five_bits(blocks: npt.NDArray[Any], at: int) -> npt.NDArray[Any]:
    """The codes of Q5_0 and Q5_1: 4 bytes with the fifth bits come before the nibbles."""
    codes: npt.NDArray[Any] = _fields(blocks[:, :, at + 4 :], 4, 16) | _fields(blocks[:, :, at : at + 4], 1, 1) << 4
    return codes


def _halves(blocks: npt.NDArray[Any], at: int) -> npt.NDArray[Any]:
    """A float16 of each block."""
    return np.ascontiguousarray(blocks[:, :, at : at + 2]).view("<f2")[:, :, 0]


def _zeros(blocks: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Zero points where there are offsets."""
    return np.zeros(blocks.shape[:2], np.int8)


class _Exact(NamedTuple):
    bits: int
    pack: Callable[[npt.NDArray[Any]], PackedWeight]


# What is read exactly.
_EXACT = {
    _Type.Q4_0: _Exact(4, _q4_0),
    _Type.Q4_1: _Exact(4, _q4_1),
    _Type.Q5_0: _Exact(5, _q5_0),
    _Type.Q5_1: _Exact(5, _q5_1),
    _Type.Q8_0: _Exact(8, _q8_0),
    _Type.Q4_K: _Exact(4, _q4_k),
    _Type.Q5_K: _Exact(5, _q5_k),
    _Type.Q6_K: _Exact(6, _q6_k),
    _Type.IQ4_NL: _Exact(4, _iq4_nl),
    _Type.IQ4_XS: _Exact(4, _iq4_xs),
    _Type.MXFP4: _Exact(4, _mxfp4),
}
