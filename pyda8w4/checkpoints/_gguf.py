"""GGUF, the files of llama.cpp: metadata and tensors in one file, or in several parts."""

from __future__ import annotations

import struct
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyda8w4._filesystem import map_file
from pyda8w4._quantized import QuantizedWeight
from pyda8w4._safetensors import Tensor
from pyda8w4.checkpoints._checkpoint import Checkpoint
from pyda8w4.formats._layer import Layer
from pyda8w4.formats.gguf import TYPES, format_of, unpack

try:
    import gguf
except ImportError as error:
    raise ImportError("GGUF files need the package gguf: pip install 'pyda8w4[gguf]'", name=error.name) from error

_Type = gguf.GGMLQuantizationType
_Value = gguf.GGUFValueType

_FLOATS = (_Type.F32, _Type.F16, _Type.BF16, _Type.F64)
_INTEGERS = (_Type.I8, _Type.I16, _Type.I32, _Type.I64)
_MOST_DIMENSIONS = 4  # of ggml


def read(path: Path) -> Checkpoint:
    """Open a file; if it is one of several parts, all of them."""
    found = read_contents(path)
    if found.metadata.get("split.count", 1) != 1:
        found = _read_parts(path, found.metadata)
    layers = {name: _layer(path, name, tensor) for name, tensor in found.tensors.items()}
    return Checkpoint(path, found.metadata, layers, found.mapped)


# ---- its parts -------------------------------------------------------------------------------


def _read_parts(path: Path, metadata: dict[str, Any]) -> _Contents:
    """Metadata of the first part, and tensors of all of them: files beside each other, which their names number."""
    no, count = metadata.get("split.no"), metadata["split.count"]
    if type(no) is not int or type(count) is not int or not 0 <= no < count:
        raise ValueError(f"{path}: its split.no must be from 0 to split.count - 1, got {no!r} and {count!r}")
    if not path.name.endswith(_ending(no, count)):
        raise ValueError(f"{path}: its name must end in {_ending(no, count)}: it says that it is part {no + 1}")
    prefix = path.name.removesuffix(_ending(no, count))
    whole = _Contents({}, {}, [])
    for index in range(count):
        part = path.with_name(prefix + _ending(index, count))
        try:
            found = read_contents(part)
        except FileNotFoundError:
            raise ValueError(f"{part} is missing: {path.name} is one of {count} parts") from None
        if (says := tuple(map(found.metadata.get, ("split.no", "split.count")))) != (index, count):
            raise ValueError(f"{part} must have split.no and split.count {(index, count)}, got {says}")
        if index == 0:
            whole.metadata.update(found.metadata)
        for name in found.tensors.keys() & whole.tensors.keys():
            raise ValueError(f"{part}: its tensor {name!r} is in another part, too")
        whole.tensors.update(found.tensors)
        whole.mapped.extend(found.mapped)
    if (total := whole.metadata.get("split.tensors.count", len(whole.tensors))) != len(whole.tensors):
        raise ValueError(f"{path}: its parts must have {total} tensors, got {len(whole.tensors)}")
    return whole


def _ending(index: int, count: int) -> str:
    return f"-{index + 1:05d}-of-{count:05d}.gguf"


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
    data: npt.NDArray[np.uint8]  # the last dimension is the bytes of a row

    def part(self, index: int) -> npt.NDArray[np.uint8]:
        """A matrix of a stack, or all of what is none."""
        return self.data[index] if len(self.shape) == 3 else self.data


class _Contents(NamedTuple):
    metadata: dict[str, Any]
    tensors: dict[str, _Tensor]
    mapped: list[npt.NDArray[np.uint8]]  # the files


class Cursor:
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


def read_contents(path: Path) -> _Contents:
    data = map_file(path)
    try:
        return _contents(data)
    except (ValueError, RecursionError) as error:  # arrays may hold arrays
        raise ValueError(f"path must be a GGUF file, got {str(path)!r}: {error}") from None


def _contents(data: npt.NDArray[np.uint8]) -> _Contents:
    cursor = Cursor(data)
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
        if not 1 <= (dimensions := cursor.number("<I")) <= _MOST_DIMENSIONS:
            raise ValueError(f"its tensor {name!r} must have 1 to {_MOST_DIMENSIONS} dimensions, got {dimensions}")
        shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
        _add("tensor", infos, name, (shape, cursor.number("<I"), cursor.number("<Q")))
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"its alignment is {alignment!r}")
    start = cursor.at + -cursor.at % alignment
    tensors = {}
    for name, (shape, kind, offset) in infos.items():
        try:
            cursor.at = start + offset
            tensors[name] = _tensor(cursor, shape, _Type(kind))
        except ValueError as error:
            raise ValueError(f"its tensor {name!r}: {error}") from None
    return _Contents(metadata, tensors, [data])


def _add(what: str, known: dict[str, Any], name: str, value: Any) -> None:
    if name in known:
        raise ValueError(f"it has a {what} {name!r} twice")
    known[name] = value


def _tensor(cursor: Cursor, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> _Tensor:
    data_shape = gguf.quant_shape_to_byte_shape(shape, kind)
    if max(data_shape) >= 1 << 63:  # beside a dimension of 0
        raise ValueError(f"it is too large: {shape}")
    return _Tensor(kind, shape, np.frombuffer(cursor.take(prod(data_shape)), np.uint8).reshape(data_shape))


# ---- its tensors -----------------------------------------------------------------------------


def _layer(path: Path, name: str, tensor: _Tensor) -> Layer:
    kind, shape, data = tensor
    about: dict[str, Any] = {"type": kind.name, "shape": shape, "nbytes": data.nbytes, "tensors": (name,)}
    if kind in _FLOATS + _INTEGERS:  # which have the same names in safetensors
        about["stored"] = Tensor(name, path, kind.name, shape, data.reshape(-1))
    if 0 in shape:
        return Layer(**about, refusal="it has no elements")
    if kind in _INTEGERS:
        return Layer(**about, refusal="its elements are integers")
    if kind in _FLOATS:
        return Layer(**about, floats=partial(_floats, tensor))
    if kind.name in TYPES and len(shape) in (2, 3):
        about |= {"read": partial(_weight, tensor), "format": format_of(kind.name, *shape[-2:])}
        # Which type the scales of these two are packed in depends on their values.
        return Layer(**about, read_rows=None if kind.name in ("MXFP4", "NVFP4") else partial(_rows, tensor))
    return Layer(**about, floats=partial(_floats, tensor), refusal=_refusal(kind.name))


def _refusal(kind: str) -> str:
    if kind in TYPES:
        return "it is no matrix"
    if kind.startswith("IQ"):
        return "its codes stand for vectors of a codebook"
    if kind in ("Q8_1", "Q8_K"):
        return "ggml has the type for activations only"
    return "the type is not known"


def _weight(tensor: _Tensor, index: int) -> QuantizedWeight:
    return unpack(tensor.part(index), tensor.type.name)


def _rows(tensor: _Tensor, index: int, rows: slice) -> QuantizedWeight:
    return unpack(tensor.part(index)[rows], tensor.type.name)


def _floats(tensor: _Tensor, index: int) -> npt.NDArray[np.float32]:
    data = tensor.part(index)
    if tensor.type == _Type.F64:  # which gguf has no function for
        return data.view("<f8").astype(np.float32)
    try:
        floats: npt.NDArray[np.float32] = gguf.dequantize(data, tensor.type)
    except NotImplementedError as error:
        raise ValueError(str(error)) from None
    return floats
