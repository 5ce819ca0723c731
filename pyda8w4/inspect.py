"""What is in a checkpoint, and what this library makes of it: ``pyda8w4 inspect``. No tensor is read."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

from pyda8w4 import checkpoints
from pyda8w4._terminal import in_bytes, pattern_of, table
from pyda8w4.checkpoints import Checkpoint
from pyda8w4.formats._layer import Layer

__all__ = ["main"]

_VERDICTS = {"exact": "packed exactly", "kept": "left as they are", "refused": "refused"}


def main(path: Path) -> int:
    """Print what is in a checkpoint.

    Parameters
    ----------
    path : Path
        As `pyda8w4.checkpoints.open` takes it.

    Returns
    -------
    int
        Exit status: 0.

    Raises
    ------
    OSError, ValueError, ImportError
        As `pyda8w4.checkpoints.open` does.
    """
    for line in _lines(checkpoints.open(path)):
        print(line)
    return 0


def _lines(checkpoint: Checkpoint) -> Iterable[str]:
    layers = checkpoint._layers
    judged = {name: _verdict(layer) for name, layer in layers.items()}
    refused = sum(verdict == "refused" for verdict in judged.values())
    packed = sum(_kept_nbytes(layer) for name, layer in layers.items() if judged[name] != "refused")
    yield from table(
        [
            ("checkpoint", str(checkpoint.path)),
            ("format", _format(checkpoint)),
            ("model", _architecture(checkpoint.metadata)),
            ("tensors", f"{len(layers)}, {_parameters(layers.values()):,} parameters"),
            ("in files", in_bytes(sum(layer.nbytes for layer in layers.values()))),
            ("packed", in_bytes(packed) + (f", without {refused} that are refused" if refused else "")),
        ]
    )
    yield ""
    yield from table(list(_kinds(layers, judged)), right=(1, 2, 3, 4))
    for verdict, title in _VERDICTS.items():
        groups = _groups({name: layer for name, layer in layers.items() if judged[name] == verdict})
        if groups:
            yield ""
            yield f"{title}:"
            yield from (f"  {line}" for line in table(groups, right=(1,)))


def _verdict(layer: Layer) -> str:
    if layer.refused is not None:
        return "refused"
    return "kept" if layer.read is None else "exact"


def _format(checkpoint: Checkpoint) -> str:
    if checkpoint.path.is_dir():
        return "folder of safetensors"
    return "packed safetensors" if checkpoint.path.suffix == ".safetensors" else "GGUF"


def _architecture(metadata: dict[str, Any]) -> str:
    """As config.json or GGUF has it."""
    for key in ("architectures", "model_type", "general.architecture"):
        value = metadata.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str):
            return value
    return "unknown"


def _parameters(layers: Iterable[Layer]) -> int:
    return sum(prod(layer.shape) for layer in layers)


def _kept_nbytes(layer: Layer) -> int:
    """What it takes where it is packed, or kept as convert keeps it."""
    if layer.packed_nbytes is not None:
        return layer.packed_nbytes
    return layer.nbytes if layer.stored is not None else 4 * prod(layer.shape)


def _kinds(layers: dict[str, Layer], judged: dict[str, str]) -> Iterable[tuple[str, ...]]:
    """A row for each type and what becomes of it."""
    yield "stored as", "tensors", "parameters", "bits", "packed", ""
    kinds: dict[tuple[str, str], list[Layer]] = {}
    for name, layer in layers.items():
        kinds.setdefault((layer.type, judged[name]), []).append(layer)
    for (type, verdict), these in kinds.items():
        parameters = _parameters(these)
        packed = "" if verdict == "refused" else _bits(sum(map(_kept_nbytes, these)), parameters)
        bits = _bits(sum(layer.nbytes for layer in these), parameters)
        yield type, str(len(these)), f"{parameters:,}", bits, packed, _VERDICTS[verdict]


def _bits(nbytes: int, parameters: int) -> str:
    return f"{8 * nbytes / parameters:.2f}" if parameters else ""


def _groups(layers: dict[str, Layer]) -> list[tuple[str, ...]]:
    """A row for tensors whose names differ in numbers only."""
    groups: dict[tuple[str, ...], int] = {}
    for name, layer in layers.items():
        shape = " x ".join(map(str, layer.shape))
        key = pattern_of(name), shape, layer.type, pattern_of(layer.refused or "")
        groups[key] = groups.get(key, 0) + 1
    return [(name, str(count), shape, type, reason) for (name, shape, type, reason), count in groups.items()]
