"""Weights from GGUF files, the model files of llama.cpp.

Needs the package gguf: ``pip install 'pyda8w4[gguf]'``.
"""

from __future__ import annotations

import os
import struct
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

_GROUP = 32  # elements of a block of Q4_0, Q4_1 and Q8_0
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

    def packed(self, name: str, bits: int = 4) -> PackedWeight:
        """A matrix as a packed weight.

        Parameters
        ----------
        name : str
            One of `types`; of a matrix (N, K).
        bits : {4, 8}
            8 makes two planes of 4 bits, ``w = 16 * high + low``: a packed weight of shape (N, 2 K),
            whose input is ``np.concatenate([x, x], axis=-1)``.

        Returns
        -------
        PackedWeight
            In groups of 32. The weights of the file, exactly, where it has them as Q4_0 or Q4_1, or with 8
            bits as Q8_0. All others are dequantized, and quantized by `pyda8w4.quantize_weight`, or with
            8 bits as Q8_0.

        Raises
        ------
        ValueError
            If there is no such matrix, its type is not one of floats, its values or scales are not finite or
            too large, `bits` is neither 4 nor 8, or 8 with a K that is no multiple of 32.
        """
        tensor = self._tensor(name)
        if len(tensor.shape) != 2:
            raise self._refused(f"name must be of a matrix, got {name} of shape {tensor.shape}")
        if bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {bits!r}")
        if bits == 8 and tensor.shape[1] % _GROUP:
            raise self._refused(f"name must be of a matrix of whole groups of 32, got {name} of shape {tensor.shape}")
        pack = _EXACT.get((tensor.type, bits))
        array = tensor.data if pack else self.array(name)
        try:
            return pack(array) if pack else _quantized(array, bits)
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


def _finite(what: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if not np.isfinite(array).all():
        raise ValueError(f"{what} must be finite, got NaN or infinity")
    return array


def _quantized(w: npt.NDArray[Any], bits: int) -> PackedWeight:
    if bits == 4:
        return prepack(*quantize_weight(w, _GROUP), group_size=_GROUP)
    with np.errstate(over="ignore"):  # scales beyond float16, which _q8_0 refuses
        return _q8_0(gguf.quantize(_finite("values", w), _Type.Q8_0))


# ---- its blocks ------------------------------------------------------------------------------
# A block of 32 elements holds its scale in 2 bytes (Q4_1: and its minimum in 2 more), then the codes. Those
# of 4 bits lie in 16 bytes: elements 0..15 in the low nibbles, 16..31 in the high ones.


def _q4_0(data: npt.NDArray[Any]) -> PackedWeight:
    blocks = data.reshape(len(data), -1, 18)
    return prepack(_codes(blocks[:, :, 2:]), _finite("scales", _halves(blocks)[:, :, 0]))


def _q4_1(data: npt.NDArray[Any]) -> PackedWeight:
    blocks = data.reshape(len(data), -1, 20)
    halves = _finite("scales and offsets", _halves(blocks)[:, :, :2])
    scales, offsets = halves[:, :, 0], halves[:, :, 1]
    return prepack(_codes(blocks[:, :, 4:]), scales, np.zeros(scales.shape, np.int8), offsets)


def _q8_0(data: npt.NDArray[Any]) -> PackedWeight:
    blocks = data.reshape(len(data), -1, 34)
    w = blocks[:, :, 2:].view(np.int8).reshape(len(data), -1)
    scales = _finite("scales", _halves(blocks)[:, :, 0]).astype(np.float32)
    high = (w >> 4) + np.int8(8)
    codes = np.concatenate([high, w & 15], axis=1).view(np.uint8)
    zps = np.repeat(np.array([8, 0], np.int8), scales.shape[1])
    return prepack(codes, np.concatenate([16 * scales, scales], axis=1), np.tile(zps, (len(data), 1)))


def _codes(nibbles: npt.NDArray[Any]) -> npt.NDArray[Any]:
    codes: npt.NDArray[Any] = np.concatenate([nibbles & 15, nibbles >> 4], axis=2)
    return codes.reshape(len(nibbles), -1)


def _halves(blocks: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The first two bytes of each block, and the next two, as float16."""
    return np.ascontiguousarray(blocks[:, :, :4]).view("<f2")


# What is read exactly, by type and bits.
_EXACT = {(_Type.Q4_0, 4): _q4_0, (_Type.Q4_1, 4): _q4_1, (_Type.Q8_0, 8): _q8_0}
