"""Weights from GGUF files, the model files of llama.cpp.

Needs the package gguf: ``pip install 'pyda8w4[gguf]'``.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

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


class File:
    """A GGUF file: metadata, and tensors as float arrays or packed weights.

    The file is mapped; a tensor is read when it is asked for.

    Parameters
    ----------
    path : path-like

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
            reader = gguf.GGUFReader(path)
            self.metadata = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError) as error:  # what the reader runs into
            raise ValueError(f"path must be a complete GGUF file, got {os.fspath(path)}: {error}") from None
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.types = {name: tensor.tensor_type.name for name, tensor in self._tensors.items()}

    def array(self, name: str) -> np.ndarray:
        """A tensor as float32, dequantized as ggml does.

        Parameters
        ----------
        name : str
            One of `types`.

        Returns
        -------
        ndarray of float32

        Raises
        ------
        ValueError
            If there is no such tensor, or its type is not one of floats.
        """
        tensor = self._tensor(name)
        try:
            return np.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
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
            If there is no such matrix, its type is not one of floats, or `bits` is neither 4 nor 8.
        """
        tensor = self._tensor(name)
        if len(tensor.shape) != 2:
            raise ValueError(f"name must be of a matrix, got {name} of shape {tuple(map(int, tensor.shape[::-1]))}")
        if bits == 4:
            if tensor.tensor_type == _Type.Q4_0:
                return _q4_0(tensor.data)
            if tensor.tensor_type == _Type.Q4_1:
                return _q4_1(tensor.data)
            return prepack(*quantize_weight(self.array(name), _GROUP), group_size=_GROUP)
        if bits == 8:
            if tensor.tensor_type == _Type.Q8_0:
                return _q8_0(tensor.data)
            return _q8_0(gguf.quantize(self.array(name), _Type.Q8_0))
        raise ValueError(f"bits must be 4 or 8, got {bits!r}")

    def _tensor(self, name: str) -> gguf.ReaderTensor:
        if name not in self._tensors:
            raise ValueError(f"name must be of a tensor in the file, got {name!r}")
        return self._tensors[name]


# A block of 32 elements holds its scale in 2 bytes (Q4_1: and its minimum in 2 more), then the codes. Those
# of 4 bits lie in 16 bytes: elements 0..15 in the low nibbles, 16..31 in the high ones.


def _q4_0(data: np.ndarray) -> PackedWeight:
    blocks = data.reshape(len(data), -1, 18)
    return prepack(_codes(blocks[:, :, 2:]), _halves(blocks)[:, :, 0])


def _q4_1(data: np.ndarray) -> PackedWeight:
    blocks = data.reshape(len(data), -1, 20)
    halves = _halves(blocks)
    scales, offsets = halves[:, :, 0], halves[:, :, 1]
    return prepack(_codes(blocks[:, :, 4:]), scales, np.zeros(scales.shape, np.int8), offsets)


def _q8_0(data: np.ndarray) -> PackedWeight:
    blocks = data.reshape(len(data), -1, 34)
    w = blocks[:, :, 2:].view(np.int8).reshape(len(data), -1)
    scales = _halves(blocks)[:, :, 0].astype(np.float32)
    high = (w >> 4) + np.int8(8)
    codes = np.concatenate([high, w & 15], axis=1).view(np.uint8)
    zps = np.repeat(np.array([8, 0], np.int8), scales.shape[1])
    return prepack(codes, np.concatenate([16 * scales, scales], axis=1), np.tile(zps, (len(data), 1)))


def _codes(nibbles: np.ndarray) -> np.ndarray:
    return np.concatenate([nibbles & 15, nibbles >> 4], axis=2).reshape(len(nibbles), -1)


def _halves(blocks: np.ndarray) -> np.ndarray:
    """The first two bytes of each block, and the next two, as float16."""
    return np.ascontiguousarray(blocks[:, :, :4]).view("<f2")
