"""Safetensors files of packed weights, which ``pyda8w4 convert`` and `pyda8w4.save` write."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pyda8w4._filesystem import map_file
from pyda8w4._format import Format
from pyda8w4._packed import PackedWeight
from pyda8w4._packed_file import Reader, errors_of, member
from pyda8w4.checkpoints._checkpoint import Checkpoint
from pyda8w4.formats._layer import Layer, plain_layer
from pyda8w4.formats._weight import QuantizedWeight


def read(path: Path) -> Checkpoint:
    """Open a file. What is requested of it is mapped, once it has its checksum."""
    data = map_file(path)
    with errors_of(path):
        file = Reader(path, data, verify=True)
        found = file.checkpoint()
        if found is None:  # of pyda8w4.save
            return Checkpoint(path, {}, {name: _saved(file, name) for name in file.weights})
        metadata, tensors = found["metadata"], found["tensors"]
        if type(metadata) is not dict:
            raise ValueError(f"its metadata must be an object, got {type(metadata).__name__}")
        return Checkpoint(path, metadata, {name: _layer(file, name, fields) for name, fields in tensors.items()})


def _saved(file: Reader, name: str) -> Layer:
    format = file.format(name)
    return _weights(file, f"packed {format.bits}-bit", (format.n, format.k), [name])


def _layer(file: Reader, name: str, fields: dict[str, Any]) -> Layer:
    type_, sizes = fields["type"], fields["shape"]
    if type(type_) is not str or type(sizes) is not list or not all(type(size) is int for size in sizes):
        raise ValueError(f"{name} must have a type and a shape, got {type_!r} and {sizes!r}")
    shape = tuple(sizes)
    if "crc32" in fields:
        tensor = file.tensor(name)
        if tensor.shape != shape:
            raise ValueError(f"{name} must be of shape {shape}, got {tensor.shape}")
        return replace(plain_layer(tensor), type=type_, verify=partial(file.check_tensor, tensor, fields))
    if len(shape) == 2:
        return _weights(file, type_, shape, [name])
    if len(shape) != 3 or shape[0] < 1:
        raise ValueError(f"{name} must have a shape (N, K) or (E, N, K), or a checksum, got {shape}")
    # However many it claims to be, the first that is missing ends this.
    names = []
    for index in range(shape[0]):
        names.append(member(name, index))
        if names[-1] not in file.weights:
            raise ValueError(f"{name} of shape {shape} must have its matrices, got no {names[-1]}")
    return _weights(file, type_, shape, names)


def _weights(file: Reader, type_: str, shape: tuple[int, ...], names: list[str]) -> Layer:
    formats = [file.format(name) for name in names]
    for name, format in zip(names, formats):
        if (format.n, format.k) != shape[-2:]:
            raise ValueError(f"{name} must be of shape {shape[-2:]}, got {(format.n, format.k)}")
    return Layer(
        type_,
        shape,
        sum(format.nbytes for format in formats),
        tuple(f"{name}.{part}" for name, format in zip(names, formats) for part in format.arrays),
        read=lambda index: QuantizedWeight.from_packed(_packed(file, names, formats, index)),
        format=formats[0],
        packed=partial(_packed, file, names, formats),
    )


def _packed(file: Reader, names: list[str], formats: list[Format], index: int) -> PackedWeight:
    return file.weight(names[index], formats[index])
