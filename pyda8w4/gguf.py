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
        If it is not a complete GGUF file.

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
    PackedWeight(shape=(64, 128), group_size=32, scales=float16, zero_point=8, nbytes=4864)
    """

    metadata: dict[str, Any]
    types: dict[str, str]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self.metadata, self._tensors = _read(np.asarray(np.memmap(path, mode="r")))
        except (ValueError, RecursionError) as error:  # arrays may hold arrays
            raise ValueError(f"path must be a GGUF file, got {os.fspath(path)!r}: {error}") from None
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
            return np.require(
                gguf.dequantize(tensor.data, tensor.type), np.float32, ["C", "W"]
            )  # F32 is the file itself
        except NotImplementedError:
            raise ValueError(f"name must be of a tensor of floats, got {name} of {self.types[name]}") from None

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
            If there is no such matrix, its type is not one of floats, its values are not finite, `bits` is
            neither 4 nor 8, or 8 with a K that is no multiple of 32.
        """
        tensor = self._tensor(name)
        if len(tensor.shape) != 2:
            raise ValueError(f"name must be of a matrix, got {name} of shape {tensor.shape}")
        if bits == 4:
            if tensor.type == _Type.Q4_0:
                return _q4_0(tensor.data)
            if tensor.type == _Type.Q4_1:
                return _q4_1(tensor.data)
            return prepack(*quantize_weight(self.array(name), _GROUP), group_size=_GROUP)
        if bits == 8:
            if tensor.type == _Type.Q8_0:
                return _q8_0(tensor.data)
            if tensor.shape[1] % _GROUP:
                raise ValueError(f"name must be of a matrix of whole groups of 32, got {name} of shape {tensor.shape}")
            return _q8_0(gguf.quantize(self.array(name), _Type.Q8_0))
        raise ValueError(f"bits must be 4 or 8, got {bits!r}")

    def _tensor(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise ValueError(f"name must be of a tensor in the file, got {name!r}")
        return self._tensors[name]


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
    metadata = {cursor.string(): cursor.value(cursor.number("<I")) for _ in range(count)}

    infos = {}
    for _ in range(tensor_count):
        name = cursor.string()
        shape = tuple(cursor.number("<Q") for _ in range(cursor.number("<I")))[::-1]
        infos[name] = (shape, _Type(cursor.number("<I")), cursor.number("<Q"))
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"its alignment is {alignment!r}")
    start = cursor.at + -cursor.at % alignment
    tensors = {}
    for name, (shape, kind, offset) in infos.items():
        if not shape:
            raise ValueError(f"{name!r} has no dimensions")
        data_shape = gguf.quant_shape_to_byte_shape(shape, kind)
        cursor.at = start + offset
        tensors[name] = _Tensor(kind, shape, np.frombuffer(cursor.take(prod(data_shape)), np.uint8).reshape(data_shape))
    return metadata, tensors


# ---- its blocks ------------------------------------------------------------------------------
# A block of 32 elements holds its scale in 2 bytes (Q4_1: and its minimum in 2 more), then the codes. Those
# of 4 bits lie in 16 bytes: elements 0..15 in the low nibbles, 16..31 in the high ones.


def _q4_0(data: npt.NDArray[Any]) -> PackedWeight:
    blocks = data.reshape(len(data), -1, 18)
    return prepack(_codes(blocks[:, :, 2:]), _halves(blocks)[:, :, 0])


def _q4_1(data: npt.NDArray[Any]) -> PackedWeight:
    blocks = data.reshape(len(data), -1, 20)
    halves = _halves(blocks)
    scales, offsets = halves[:, :, 0], halves[:, :, 1]
    return prepack(_codes(blocks[:, :, 4:]), scales, np.zeros(scales.shape, np.int8), offsets)


def _q8_0(data: npt.NDArray[Any]) -> PackedWeight:
    blocks = data.reshape(len(data), -1, 34)
    w = blocks[:, :, 2:].view(np.int8).reshape(len(data), -1)
    scales = _halves(blocks)[:, :, 0].astype(np.float32)
    high = (w >> 4) + np.int8(8)
    codes = np.concatenate([high, w & 15], axis=1).view(np.uint8)
    zps = np.repeat(np.array([8, 0], np.int8), scales.shape[1])
    return prepack(codes, np.concatenate([16 * scales, scales], axis=1), np.tile(zps, (len(data), 1)))


def _codes(nibbles: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate([nibbles & 15, nibbles >> 4], axis=2).reshape(len(nibbles), -1)


def _halves(blocks: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The first two bytes of each block, and the next two, as float16."""
    return np.ascontiguousarray(blocks[:, :, :4]).view("<f2")
