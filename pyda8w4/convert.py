"""A whole model packed once, so that the next start maps it: ``pyda8w4 convert``.

The file has every tensor of the checkpoint: quantized matrices packed, each exactly as it was, and all others as they
are. `pyda8w4.checkpoints.open` and `pyda8w4.load` read it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4 import checkpoints
from pyda8w4._checks import check_flag
from pyda8w4._filesystem import check_path, replaced_file
from pyda8w4._packed import Packed
from pyda8w4._packed_file import MOST_CRC32, Expected, Writer, expected_weight, header_room
from pyda8w4._terminal import Bar, in_bytes, pattern_of, printable, table
from pyda8w4.checkpoints import Checkpoint
from pyda8w4.formats._layer import Layer

__all__ = ["Converted", "main", "run"]

_MOST_REASONS = 10
_QUANTIZED = "4-bit, from {}"  # the type of what was quantized again
_HOW = {
    "exact": "packed exactly",
    "quantized": "quantized to 4 bits, groups of 32",
    "stored": "left as they are",
    "float32": "dequantized to float32",
}


@dataclass(frozen=True)
class Converted:
    """What became of a tensor.

    Attributes
    ----------
    name, type : str
        As the checkpoint has them.
    shape : tuple of int
        Of its floats.
    how : {'exact', 'quantized', 'stored', 'float32'}
        Packed exactly; quantized to 4 bits, in groups of 32; left as it is; or dequantized, which is what becomes of
        a quantized tensor that is no matrix.
    nbytes : int
        In the file.
    error : float or None
        Of what was quantized: the root of the mean square, as a part of that of the tensor.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    how: str
    nbytes: int
    error: float | None = None


def run(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    *,
    requantize: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Converted]:
    """Pack a model into one file.

    Parameters
    ----------
    checkpoint : Checkpoint
        Any, but one that is packed already.
    out : path-like
        The file, replaced only once the new one is complete and on the disk: see `pyda8w4.save`.
    requantize : bool
        Whether a quantized matrix that cannot be packed exactly is quantized to 4 bits. Matrices of floats are
        left as they are.
    progress : callable, optional
        Called with the bytes of the checkpoint that are done.

    Returns
    -------
    list of Converted
        One for each tensor.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If `out` is a file of the checkpoint, or in its folder, whose files it would join. If something cannot be
        packed exactly and `requantize` does not allow otherwise, or the checkpoint is damaged: nothing is written
        then. All that shows without reading tensors is said at once, and before.
    OSError
        If a file cannot be read or written.

    Notes
    -----
    One matrix, or one stack of experts, is in memory at a time.
    """
    path = check_path(out)
    requantize = check_flag("requantize", requantize)
    _check_place(checkpoint, path)
    _check(checkpoint, requantize)
    room = _room(checkpoint)
    found: list[Converted] = []
    tensors: dict[str, Any] = {}
    done = 0
    with replaced_file(path) as file:
        writer = Writer(file, room)
        for name, layer in checkpoint._layers.items():
            convert = _pack if _is_matrix(layer) else _keep
            converted, tensors[name] = convert(checkpoint, name, layer, requantize, writer)
            found.append(converted)
            done += layer.nbytes
            if progress is not None:
                progress(done)
        writer.finish({"metadata": checkpoint.metadata, "tensors": tensors})
    return found


def _check_place(checkpoint: Checkpoint, out: Path) -> None:
    """Through links: the files of a folder may lie elsewhere, and `out` may be a link to one."""
    target, source = Path(os.path.realpath(out)), Path(os.path.realpath(checkpoint.path))
    files = [data.base.filename or source for data in checkpoint._mapped if isinstance(data.base, np.memmap)]
    is_one = target.exists() and any(target.samefile(file) for file in files)
    if is_one or (source.is_dir() and source == target.parent):
        raise ValueError(f"{out}: the file must not be one of the checkpoint, nor in its folder")


def _is_matrix(layer: Layer) -> bool:
    """Whether it, or each of its stack, becomes a packed weight."""
    return layer.read is not None or layer.refused is not None


def _check(checkpoint: Checkpoint, requantize: bool) -> None:
    reasons: Counter[str] = Counter()
    for name, layer in checkpoint._layers.items():
        if layer.packed is not None:
            raise ValueError(f"{checkpoint.path}: it is packed already")
        reason = layer.refused
        if _is_matrix(layer) and 0 in layer.shape:
            reasons[pattern_of(f"{name} of {layer.type}: it is empty")] += 1
        elif reason is not None and not (requantize and layer.floats is not None):
            reasons[pattern_of(f"{name} of {layer.type}: {reason}")] += 1
    if reasons:
        few = [f"{reason} ({count} such)" if count > 1 else reason for reason, count in reasons.items()]
        more = [f"and {len(few) - _MOST_REASONS} more"] if len(few) > _MOST_REASONS else []
        raise ValueError(
            f"{checkpoint.path}: it has what cannot be packed exactly: {'; '.join(few[:_MOST_REASONS] + more)}"
        )


def _room(checkpoint: Checkpoint) -> int:
    """What the header takes at most."""
    weights: dict[str, Any] = {}
    expected: list[Expected] = []
    tensors: dict[str, Any] = {}
    for name, layer in checkpoint._layers.items():
        # Reasons that are seen only where tensors are read may make any matrix one that is quantized again.
        tensors[name] = {"type": _QUANTIZED.format(layer.type), "shape": layer.shape}
        if _is_matrix(layer):
            weights[name], parts = expected_weight(name, layer.shape)
            expected += parts
        else:
            kind, shape, _ = _as_kept(layer)
            tensors[name]["crc32"] = MOST_CRC32
            expected.append(Expected(name, kind, shape))
    try:
        return header_room(weights, expected, {"metadata": checkpoint.metadata, "tensors": tensors})
    except (ValueError, RecursionError) as error:  # lists may hold lists
        raise ValueError(f"{checkpoint.path}: {error}") from None


def _pack(
    checkpoint: Checkpoint, name: str, layer: Layer, requantize: bool, writer: Writer
) -> tuple[Converted, dict[str, Any]]:
    packed: Packed
    if layer.is_stack:
        packed, errors = checkpoint._stack([name], requantize)
        error = errors.get(name)
    else:
        packed, error = checkpoint._pack(name, layer, 0, requantize)
    writer.add_weight(name, packed)
    how, type = ("exact", layer.type) if error is None else ("quantized", _QUANTIZED.format(layer.type))
    converted = Converted(name, layer.type, layer.shape, how, packed.nbytes, error)
    return converted, {"type": type, "shape": layer.shape}


def _keep(
    checkpoint: Checkpoint, name: str, layer: Layer, requantize: bool, writer: Writer
) -> tuple[Converted, dict[str, Any]]:
    kind, shape, nbytes = _as_kept(layer)
    parts: Iterable[npt.NDArray[Any]]
    if (stored := checkpoint._stored(name)) is not None:
        how, parts = "stored", [stored.bytes]
    else:
        indices = range(layer.shape[0] if layer.is_stack else 1)
        how, parts = "float32", (checkpoint._floats(name, layer, index) for index in indices)
    fields: dict[str, Any] = {"type": layer.type, "shape": layer.shape}
    writer.add_tensor(name, kind, shape, nbytes, parts, fields)
    return Converted(name, layer.type, layer.shape, how, nbytes), fields


def _as_kept(layer: Layer) -> tuple[str, tuple[int, ...], int]:
    """Type, shape and bytes of a tensor that is no packed weight."""
    if layer.stored is not None:
        return layer.stored.dtype, layer.stored.shape, layer.stored.nbytes
    return "F32", layer.shape, 4 * prod(layer.shape)


def main(path: Path, out: Path, requantize: bool = False) -> int:
    """Convert, show progress and print what was done.

    Parameters
    ----------
    path : Path
        Of a checkpoint.
    out : Path
        Of the file.
    requantize : bool
        See `run`.

    Returns
    -------
    int
        Exit status: 0.

    Raises
    ------
    OSError, ValueError, ImportError
        As `run` and `pyda8w4.checkpoints.open` do.
    """
    checkpoint = checkpoints.open(path)
    total = sum(layer.nbytes for layer in checkpoint._layers.values())
    with Bar(total) as bar:
        found = run(checkpoint, out, requantize=requantize, progress=bar)
    print(f"{printable(str(out))}: {in_bytes(out.stat().st_size)}")
    print(*table(_rows(found), right=(1,)), sep="\n")
    for tensor, error in _errors(found).items():
        print(f"quantized again: {printable(tensor)}, with an error of up to {error:.1%} of its root mean square")
    return 0


def _rows(found: list[Converted]) -> list[tuple[str, str, str]]:
    rows = []
    for how, what in _HOW.items():
        these = [converted for converted in found if converted.how == how]
        matrices = sum(len(converted.shape) > 1 for converted in these)
        if how == "stored" and matrices:
            what += f", {matrices} of them matrices of floats"
        if these:
            rows.append((what, str(len(these)), in_bytes(sum(converted.nbytes for converted in these))))
    return rows


def _errors(found: list[Converted]) -> dict[str, float]:
    """The largest of like tensors."""
    worst: dict[str, float] = {}
    for converted in found:
        if converted.error is not None:
            like = f"{pattern_of(converted.name)} of {converted.type}"
            worst[like] = max(worst.get(like, 0.0), converted.error)
    return worst
