"""Safetensors files of packed weights, which ``pyda8w4 convert`` and `pyda8w4.save` write."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from pyda8w4._filesystem import map_file
from pyda8w4._packed_file import Reader, errors_of
from pyda8w4.checkpoints._checkpoint import Checkpoint
from pyda8w4.formats._layer import Layer, packed_layer, plain_layer


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
    return _weight(file, name, f"packed {format.bits}-bit", format.shape)


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
    if len(shape) not in (2, 3):
        raise ValueError(f"{name} must have a shape (N, K) or (E, N, K), or a checksum, got {shape}")
    return _weight(file, name, type_, shape)


def _weight(file: Reader, name: str, type_: str, shape: tuple[int, ...]) -> Layer:
    format = file.format(name)
    if format.shape != shape:
        raise ValueError(f"{name} must be of shape {shape}, got {format.shape}")
    packed = partial(file.packed, name, format)
    tensors = tuple(f"{name}.{part}" for part in format.arrays)
    # Experts are requested one by one, but have their checksums together.
    return packed_layer(type_, format, tensors, packed if format.experts is None else cache(packed))
