"""Packed weights on disk: one safetensors file, mapped into memory when it is loaded."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

from pyda8w4 import _advice
from pyda8w4._checks import check_flag
from pyda8w4._experts import PackedExperts
from pyda8w4._filesystem import check_path, map_file, replaced_file
from pyda8w4._packed import Packed, PackedWeight
from pyda8w4._packed_file import Reader, Writer, errors_of, expected_weight, header_room


def save(path: str | os.PathLike[str], weights: Mapping[str, PackedWeight | PackedExperts]) -> None:
    """Write packed weights to a safetensors file.

    Parameters
    ----------
    path : path-like
        Replaced only once the new file is complete and on the disk. A symbolic link stays: its target is
        replaced. A file that exists keeps its owner and permissions, and must be writable.
    weights : mapping of str to PackedWeight or PackedExperts
        The layers of a model, by name.

    Raises
    ------
    TypeError
        If `path` is not a path, or `weights` something else.
    ValueError
        If `path` is a device, a FIFO or a socket, a name has characters that UTF-8 cannot hold, or names and
        numbers take more than 100 MB.
    OSError
        If the file cannot be written.

    Notes
    -----
    The metadata has a checksum of every tensor, and one of itself, for `load` to verify.

    The file is plain safetensors: for each weight the tensors ``name.codes``, ``name.scales``,
    ``name.sums``, and those of ``name.zps``, ``name.offsets``, ``name.sub_scales``,
    ``name.sub_offsets``, ``name.table``, ``name.perm`` and ``name.factors`` that it has. It is written
    here rather than by the safetensors package because arrays are to start at multiples of 64 bytes, so
    that kernels can read a mapped file at full speed; that package orders tensors its own way.

    Examples
    --------
    >>> import numpy as np, os, pyda8w4, tempfile
    >>> packed = pyda8w4.prepack(np.zeros((64, 128), np.uint8), np.ones(64, np.float32))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "weights.safetensors")
    ...     pyda8w4.save(path, {"lm_head": packed})
    ...     pyda8w4.load(path)
    {'lm_head': PackedWeight(shape=(64, 128), bits=4, group_size=128, scales=float16, zero_point=8, nbytes=4480)}
    """
    path = check_path(path)
    if not isinstance(weights, Mapping):
        hint = '; save(path, {"name": packed}) gives it a name' if isinstance(weights, Packed) else ""
        raise TypeError(
            f"weights must be a mapping of names to PackedWeight or PackedExperts, got {type(weights).__name__}{hint}"
        )
    expected = {}
    for name, weight in weights.items():
        if not isinstance(name, str) or not isinstance(weight, (PackedWeight, PackedExperts)):
            raise TypeError(
                "weights must map str to PackedWeight or PackedExperts, got "
                f"{type(name).__name__} to {type(weight).__name__}{_advice.for_packed(f'weights[{name!r}]', weight)}"
            )
        expected[name] = expected_weight(name, weight.shape, weight._arrays)
    room = header_room(
        {name: fields for name, (fields, _) in expected.items()},
        [tensor for _, tensors in expected.values() for tensor in tensors],
    )
    with replaced_file(path) as file:
        writer = Writer(file, room)
        for name, weight in weights.items():
            writer.add_weight(name, weight)
        writer.finish()


def load(path: str | os.PathLike[str], *, verify: bool = True) -> dict[str, PackedWeight | PackedExperts]:
    """Load packed weights from a file that `save` wrote, on this or another machine.

    Parameters
    ----------
    path : path-like
        Where the file is.
    verify : bool
        Whether to compare the contents with their checksums. That reads the whole file: about half a
        second per GB that is in memory already, and the time of reading the rest.

    Returns
    -------
    dict of str to PackedWeight or PackedExperts
        They are mapped: processes share their pages, and without `verify` each comes from the file
        when a kernel first needs it. The file must not be changed in place while they live.

    Raises
    ------
    OSError
        If the file cannot be read.
    TypeError
        If `path` is not a path, or `verify` not a bool.
    ValueError
        If `path` is a device, a FIFO or a socket. If the file is not a safetensors file, of another layout or
        layout version, its contents do not fit each other, or they do not have their checksums.

    Notes
    -----
    Checksums find damage, not malice. But no file leads out of the memory of its arrays: with or without
    `verify`, every size is compared with the extent of the tensors, and those with the size of the file.

    Examples
    --------
    >>> import numpy as np, os, pyda8w4, tempfile
    >>> packed = pyda8w4.prepack(np.zeros((64, 128), np.uint8), np.ones(64, np.float32))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "weights.safetensors")
    ...     pyda8w4.save(path, {"lm_head": packed})
    ...     list(pyda8w4.load(path))
    ['lm_head']
    """
    verify = check_flag("verify", verify)
    path = check_path(path)
    if path.is_dir():
        why = "Is a directory (pyda8w4.checkpoints.open takes those of models)"
        raise IsADirectoryError(errno.EISDIR, why, str(path))
    data = map_file(path)
    with errors_of(path):
        file = Reader(path, data, verify)
        formats = {name: file.format(name) for name in file.weights}
        return {name: file.packed(name, format) for name, format in formats.items()}
