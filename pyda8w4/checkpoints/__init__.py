"""Checkpoints: the weights of whole models, from the files that people have, exactly.

>>> import pyda8w4.checkpoints
>>> checkpoint = pyda8w4.checkpoints.open("model.gguf")  # doctest: +SKIP
>>> checkpoint.packed("blk.0.ffn_up.weight")  # doctest: +SKIP
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from pyda8w4._filesystem import check_path, map_file
from pyda8w4._foreign import kind_of_file, missing
from pyda8w4.checkpoints._checkpoint import Checkpoint

__all__ = ["Checkpoint", "open", "read_imatrix"]


def open(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint, whatever its format: what the files say tells.

    Parameters
    ----------
    path : path-like
        A GGUF file, of a split one any part; a folder of Hugging Face with config.json and safetensors files;
        or a safetensors file that ``pyda8w4 convert`` or `pyda8w4.save` wrote.

    Returns
    -------
    Checkpoint
        Its files are mapped: a tensor is read when it is requested.

    Raises
    ------
    TypeError
        If `path` is not a path.
    OSError
        If a file cannot be read.
    ValueError
        If it is no such checkpoint, or a file of it is missing or damaged: the message names the file.
    ImportError
        If it is a GGUF file and the package gguf is not installed.
    """
    path = check_path(path)
    if path.is_dir():
        from pyda8w4.checkpoints import _folder

        return _folder.read(path)
    try:
        start = map_file(path)[:32].tobytes()
    except FileNotFoundError:
        raise missing(path) from None
    if start[:4] == b"GGUF":
        from pyda8w4.checkpoints import _gguf

        return _gguf.read(path)
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        from pyda8w4.checkpoints import _packed

        return _packed.read(path)
    raise ValueError(
        f"path must be a GGUF file, a folder or a safetensors file of packed weights, got {str(path)!r}"
        f"{kind_of_file(start)}"
    )


def read_imatrix(path: str | os.PathLike[str]) -> dict[str, npt.NDArray[np.float32]]:
    """Read an importance matrix of llama.cpp: what `pyda8w4.quantize` takes as `importance`.

    Parameters
    ----------
    path : path-like
        A file of ``llama-imatrix``, a GGUF file or one of those that it wrote before.

    Returns
    -------
    dict of str to ndarray of float32
        For each tensor of the model, by its name in GGUF files, the mean square of what each column was multiplied
        with: (K,), or (E, K) for experts; older files have those of experts side by side, (E * K,). Where nothing
        was, as with an expert that no token chose, all are 1.

    Raises
    ------
    TypeError
        If `path` is not a path.
    OSError
        If the file cannot be read.
    ValueError
        If it is no such file, or damaged.
    ImportError
        If the package gguf is not installed.

    Examples
    --------
    >>> import pyda8w4
    >>> from pyda8w4 import checkpoints
    >>> model = checkpoints.open("model-f16.gguf")  # doctest: +SKIP
    >>> importance = checkpoints.read_imatrix("model.imatrix.gguf")  # doctest: +SKIP
    >>> name = "blk.0.ffn_up.weight"
    >>> pyda8w4.quantize(model.array(name), 32, importance=importance[name])  # doctest: +SKIP
    """
    from pyda8w4.checkpoints import _imatrix

    return _imatrix.read(check_path(path))
