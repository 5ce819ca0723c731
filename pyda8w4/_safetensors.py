"""Safetensors files: their headers, strictly read, and their tensors, mapped."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyda8w4._foreign import kind_of_file

MOST_HEADER_BYTES = 100_000_000  # that the package safetensors reads

# What numpy has no type for is bits: of bfloat16 in uint16, of floats of 8 bits in uint8.
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"), "F8_E4M3": np.dtype("u1"), "F8_E5M2": np.dtype("u1"), "F8_E8M0": np.dtype("u1"),
}  # fmt: skip
_FLOATS = ("F64", "F32", "F16", "BF16")


class Tensor(NamedTuple):
    """A tensor in a file."""

    name: str
    file: Path
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    bytes: npt.NDArray[np.uint8]  # mapped

    @property
    def nbytes(self) -> int:
        """In the file."""
        return self.bytes.nbytes

    @property
    def itemsize(self) -> int:
        """Bytes of a number; 0 of types that cannot be read."""
        return _DTYPES[self.dtype].itemsize if self.dtype in _DTYPES else 0

    @property
    def is_float(self) -> bool:
        """Whether `floats` gives its numbers."""
        return self.dtype in _FLOATS

    def array(self) -> npt.NDArray[Any]:
        """Its numbers, in the file; of types that numpy does not have the bits, in unsigned integers."""
        if self.dtype not in _DTYPES:
            raise ValueError(f"{self.name} has the type {self.dtype}, which cannot be read")
        # A view at an odd address is copied.
        return np.require(self.bytes.view(_DTYPES[self.dtype]), requirements=["A"]).reshape(self.shape)

    def part(self, index: int) -> Tensor:
        """One of the first dimension, which stacks have for experts."""
        size = self.nbytes // self.shape[0]
        return self._replace(shape=self.shape[1:], bytes=self.bytes[index * size : (index + 1) * size])

    def floats(self) -> npt.NDArray[Any]:
        """Its numbers: float16 and float32 in the file, bfloat16 as float32."""
        if not self.is_float:
            raise ValueError(f"{self.name} must be of floats, got {self.dtype}")
        array = self.array()
        if self.dtype == "BF16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32) if self.dtype == "F64" else array


def read_file(path: Path, data: npt.NDArray[np.uint8]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """-> metadata and tensors of a mapped file. ValueError without the path where it is no complete one."""
    header, data = read_header(data)
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise ValueError("its metadata must be strings")
    return metadata, {name: tensor_of(name, path, entry, data) for name, entry in header.items()}


def tensor_of(name: str, path: Path, entry: dict[str, Any], data: npt.NDArray[np.uint8]) -> Tensor:
    """The tensor that this entry of a header describes."""
    dtype, shape, (begin, end) = entry.get("dtype"), entry.get("shape"), entry["data_offsets"]
    if type(dtype) is not str:
        raise ValueError(f"{name} must have a dtype, got {dtype!r}")
    if type(shape) is not list or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
        raise ValueError(f"{name} must have a shape, got {shape!r}")
    if dtype in _DTYPES and prod(shape) * _DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"{name} of {dtype} {shape} must have its bytes, got {end - begin}")
    return Tensor(name, path, dtype, tuple(shape), data[begin:end])


def read_header(data: npt.NDArray[np.uint8]) -> tuple[dict[str, Any], npt.NDArray[np.uint8]]:
    """-> the header of a safetensors file, and its tensors: they follow each other to the end of the file."""
    begin = 8 + int.from_bytes(data[:8], "little")
    if not 8 < begin <= min(len(data), 8 + MOST_HEADER_BYTES):
        raise ValueError(f"it is not a safetensors file, or is cut off{kind_of_file(data[:32].tobytes())}")
    header, data = parse_json(data[8:begin].tobytes().decode()), data[begin:]
    end = 0
    for extent in sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"):
        begin, after = extent
        if type(begin) is not int or type(after) is not int or begin != end or after < end:
            raise ValueError(f"it is no safetensors file: after byte {end} comes a tensor at bytes {extent}")
        end = after
    if end != len(data):
        raise ValueError(f"it is no complete safetensors file: it must have {end} bytes of tensors, got {len(data)}")
    return header, data


def parse_json(text: str, *, constants: bool = False) -> Any:
    """Strictly: without names that come twice, of which readers may take one or the other.

    `constants` allows NaN and infinities, as Python writes them.
    """
    return json.loads(text, object_pairs_hook=_object, parse_constant=float if constants else _no_constant)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"its header has {name!r} twice")
        found[name] = value
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"its header has {name}, which is no JSON")
