"""The importance matrices of llama.cpp: GGUF files of sums, and the files that it wrote before those."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from pyda8w4._filesystem import map_file
from pyda8w4.checkpoints._gguf import Cursor, read_contents

_SUMS, _COUNTS = ".in_sum2", ".counts"


def read(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """By tensor: the mean squares of what its columns are multiplied with."""
    data = map_file(path)
    try:
        means = _read_gguf(path) if data[:4].tobytes() == b"GGUF" else _read_legacy(Cursor(data))
        for name, mean in means.items():
            if not (np.isfinite(mean).all() and (mean >= 0).all()):
                raise ValueError(f"the mean squares of {name!r} must be finite, 0 or more")
    except ValueError as error:
        raise ValueError(f"path must be an importance matrix of llama.cpp, got {str(path)!r}: {error}") from None
    return means


def _read_gguf(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Sums of squares of each matrix, and over how many rows of activations they go."""
    contents = read_contents(path)
    if (kind := contents.metadata.get("general.type")) != "imatrix":
        raise ValueError(f"its general.type must be 'imatrix', got {kind!r}")
    means = {}
    for key, tensor in contents.tensors.items():
        if not key.endswith(_SUMS):
            continue
        name = key.removesuffix(_SUMS)
        counts = contents.tensors.get(name + _COUNTS)
        if counts is None:
            raise ValueError(f"it has no {name + _COUNTS!r}")
        if tensor.type.name != "F32" or counts.type.name != "F32":
            raise ValueError(f"sums and counts of {name!r} must be F32, got {tensor.type.name} and {counts.type.name}")
        sums = tensor.data.view("<f4").reshape(-1, tensor.shape[-1])
        count = counts.data.view("<f4").reshape(-1)
        if len(count) != len(sums):
            raise ValueError(f"{name!r} must have a count for each of {len(sums)} matrices, got {len(count)}")
        means[name] = _means(sums, count).reshape(tensor.shape if len(sums) > 1 else -1)
    return means


def _read_legacy(cursor: Cursor) -> dict[str, npt.NDArray[np.float32]]:
    """Of each tensor the number of calls, and mean squares times that; those of experts side by side."""
    means = {}
    for _ in range(cursor.number("<i")):
        name = str(cursor.take(_length(cursor)), "utf-8", "replace")
        calls = cursor.number("<i")
        values = np.frombuffer(cursor.take(4 * _length(cursor)), "<f4")
        means[name] = _means(values[None], np.array([calls], np.float32))[0]
    if not means:
        raise ValueError("it has no tensors")
    return means


def _length(cursor: Cursor) -> int:
    length = cursor.number("<i")
    if length < 1:
        raise ValueError(f"it has a length of {length}")
    return length


def _means(sums: npt.NDArray[np.float32], counts: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """All the same for a matrix that nothing was multiplied with, such as an expert that no token chose."""
    seen = counts > 0
    return np.where(seen[:, None], sums / np.where(seen, counts, 1)[:, None], np.float32(1)).astype(np.float32)
