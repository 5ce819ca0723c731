"""The safetensors file of packed weights, as docs/packed-format.md has it: what writes one, and what reads one."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import FLOATS, INTEGERS, one_of, plain
from pyda8w4._experts import PackedExperts
from pyda8w4._format import ARRAYS, LAYOUT, LAYOUT_VERSION, LAYOUT_VERSIONS, ROTATIONS, Format
from pyda8w4._packed import Packed, PackedWeight
from pyda8w4._safetensors import MOST_HEADER_BYTES, Tensor, parse_json, read_header, tensor_of

# Element types as safetensors names them.
KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int8": "I8", "int32": "I32"}
TYPES = {kind: type for type, kind in KINDS.items()}

# Arrays that a weight says it has; of the others its numbers tell.
_OPTIONAL = ("offsets", "table", "perm", "factors")

# All that a weight may say. What a reader does not know may change what the weight stands for.
_FIELDS = {"shape", "bits", "group_size", "zero_point", "super_size", *_OPTIONAL, "rotation", "crc32"}

# For the room of a header whose numbers are not known yet.
_MOST_BYTES = 10**15 - 1  # of a file
MOST_CRC32 = 2**32 - 1


class Expected(NamedTuple):
    """A tensor of which a file will have no more than this."""

    name: str
    kind: str
    shape: Sequence[int]


def expected_weight(
    name: str, shape: tuple[int, ...], parts: Iterable[str] = ARRAYS
) -> tuple[dict[str, Any], list[Expected]]:
    """The longest description of such a weight or of experts, and its tensors."""
    fields = {
        "shape": shape,
        "bits": 4,
        "group_size": shape[-1],
        "zero_point": -128,
        "super_size": shape[-1],
        **dict.fromkeys(_OPTIONAL, True),
        "rotation": ROTATIONS[-1],
        "crc32": dict.fromkeys(parts, MOST_CRC32),
    }
    return fields, [Expected(f"{name}.{part}", "BF16", [_MOST_BYTES] * (len(shape) + 1)) for part in parts]


def header_room(
    weights: Mapping[str, Any], tensors: Iterable[Expected], checkpoint: Mapping[str, Any] | None = None
) -> int:
    """The bytes in which the header of a file with no more than this fits.

    ValueError if no file can have these tensors.
    """
    entries: dict[str, Any] = {}
    for name, kind, shape in tensors:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"weights must have names that UTF-8 can hold, got {name!r}") from None
        if name in entries or name == "__metadata__":
            raise ValueError(f"weights must have names of which each gives tensors of its own, got {name!r} twice")
        entries[name] = _entry(kind, shape, _MOST_BYTES, _MOST_BYTES)
    size = len(_header(entries, weights, checkpoint))
    if size > MOST_HEADER_BYTES - 64:
        raise ValueError(f"weights must have names for a header of at most 100 MB, got {size} bytes")
    return size + -(size + 8) % 64


def _entry(kind: str, shape: Sequence[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}


def _header(entries: Mapping[str, Any], weights: Mapping[str, Any], checkpoint: Mapping[str, Any] | None) -> bytes:
    metadata = {"layout": LAYOUT, "layout_version": str(LAYOUT_VERSION)}
    for name, described in (("weights", weights), ("checkpoint", checkpoint)):
        if described is not None:
            metadata[name] = json.dumps(described)
            metadata[f"{name}_crc32"] = str(zlib.crc32(metadata[name].encode()))
    return json.dumps({"__metadata__": metadata, **entries}).encode()


class Writer:
    """Writes weights and other tensors one after another, and the header, which comes first, in the end.

    What it is given is in the file at once and need not be kept, but for arrays whose size is no multiple of 64 bytes:
    they come last, so that all others start at such multiples.

    Parameters
    ----------
    file : binary file
        Empty.
    room : int
        What `header_room` gives.
    """

    def __init__(self, file: BinaryIO, room: int) -> None:
        self._file, self._room, self._end = file, room, 0
        self._entries: dict[str, Any] = {}
        self._weights: dict[str, Any] = {}
        self._rest: list[tuple[Any, ...]] = []
        file.seek(8 + room)

    def add_weight(self, name: str, weight: Packed) -> None:
        """Write a packed weight, or experts."""
        fields: dict[str, Any] = {
            "shape": weight._format.shape,
            "bits": weight.bits,
            "group_size": weight.group_size,
            "zero_point": weight.zero_point,
        }
        if weight.super_size:
            fields["super_size"] = weight.super_size
        fields |= {part: True for part in _OPTIONAL if part in weight._arrays}
        if weight.rotation:
            fields["rotation"] = weight.rotation
        fields["crc32"] = dict.fromkeys(weight._arrays, 0)
        self._weights[name] = fields
        for part, spec in weight._format.arrays.items():
            array = weight._arrays[part]
            # A part of a weight's memory keeps all of it alive; a copy does not.
            parts = [array.copy() if array.nbytes % 64 else array]
            self._add(f"{name}.{part}", KINDS[spec.type], spec.shape, array.nbytes, parts, fields["crc32"], part)

    def add_tensor(
        self,
        name: str,
        kind: str,
        shape: Sequence[int],
        nbytes: int,
        parts: Iterable[npt.NDArray[Any]],
        fields: dict[str, Any],
    ) -> None:
        """Write a tensor, whose bytes are those of all parts; `fields` gets its checksum as "crc32", in the end."""
        self._add(name, kind, shape, nbytes, parts, fields, "crc32")

    def _add(self, name: str, kind: str, shape: Sequence[int], nbytes: int, *more: Any) -> None:
        if nbytes % 64:
            self._rest.append((name, kind, shape, nbytes, *more))
        else:
            self._write(name, kind, shape, nbytes, *more)

    def _write(
        self,
        name: str,
        kind: str,
        shape: Sequence[int],
        nbytes: int,
        parts: Iterable[npt.NDArray[Any]],
        crc32s: dict[str, Any],
        key: str,
    ) -> None:
        begin, crc32 = self._end, zlib.crc32(kind.encode())
        for array in parts:
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            crc32 = zlib.crc32(data, crc32)
            self._file.write(data)
            self._end += len(data)
        if self._end - begin != nbytes:
            raise ValueError(f"{name} must have {nbytes} bytes, got {self._end - begin}")
        crc32s[key] = crc32
        self._entries[name] = _entry(kind, shape, begin, self._end)

    def finish(self, checkpoint: Mapping[str, Any] | None = None) -> int:
        """Write what is left; -> the size of the file."""
        for tensor in self._rest:
            self._write(*tensor)
        header = _header(self._entries, self._weights, checkpoint)
        assert len(header) <= self._room
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little"))
        self._file.write(header + b" " * (self._room - len(header)))
        return 8 + self._room + self._end


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Whatever a damaged file raises becomes a ValueError that names it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged header: {error!r}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


class Reader:
    """What a file has. It is to be made and used in `errors_of`.

    Weights and tensors that `format` and `tensor` have seen may be read later: that raises ValueError only.

    Parameters
    ----------
    path : Path
        Where the file is.
    data : ndarray of uint8
        What is in it, mapped.
    verify : bool
        Whether to compare what is read with its checksum.

    Attributes
    ----------
    weights : dict
        Descriptions of packed weights by name, unchecked.
    """

    def __init__(self, path: Path, data: npt.NDArray[np.uint8], verify: bool) -> None:
        self._path, self._verify = path, verify
        self._header, self._data = read_header(data)
        metadata = self._header.get("__metadata__", {})
        layout, version = metadata.get("layout"), metadata.get("layout_version")
        if layout != LAYOUT or version not in map(str, LAYOUT_VERSIONS):
            got = f"{layout} version {version}"
            if layout is None:
                got = "no packed weights; a model of Hugging Face is opened by its folder (pyda8w4.checkpoints.open)"
            raise ValueError(f"it must hold layout {LAYOUT} version {one_of(LAYOUT_VERSIONS)}, got {got}")
        if verify:
            for name in ("weights", "checkpoint"):
                if name in metadata and metadata[f"{name}_crc32"] != str(zlib.crc32(metadata[name].encode())):
                    raise ValueError(f"it is damaged: its list of {name} does not have its checksum")
        self.weights: dict[str, Any] = parse_json(metadata["weights"])
        if type(self.weights) is not dict:
            raise ValueError(f"its list of weights must be an object, got {type(self.weights).__name__}")
        if version == "1":
            self.weights = {name: {"bits": 4, **fields} for name, fields in self.weights.items()}
        self._checkpoint: str | None = metadata.get("checkpoint")

    def checkpoint(self) -> dict[str, Any] | None:
        """The description of a checkpoint that was converted, unchecked."""
        # Its metadata has the constants that Python's JSON has: configs of Mamba have Infinity.
        return None if self._checkpoint is None else parse_json(self._checkpoint, constants=True)

    def format(self, name: str) -> Format:
        """What kind of weight it is. All that its header says is checked."""
        fields, header = self.weights[name], self._header
        if unknown := fields.keys() - _FIELDS:
            raise ValueError(f"{name} must have no more than this version knows, got {', '.join(sorted(unknown))}")
        shape = fields["shape"]
        if not isinstance(shape, list) or len(shape) not in (2, 3) or None in shape:
            raise ValueError(f"{name} must have a shape [N, K] or [E, N, K], got {shape!r}")
        super_size, has = fields.get("super_size", 0), {part: fields.get(part, False) for part in _OPTIONAL}
        scale_dtype = _dtype(f"{name}.scales", header, FLOATS)
        sub_scale_dtype = _dtype(f"{name}.sub_scales", header, INTEGERS) if super_size else None
        sub_offset_dtype = _dtype(f"{name}.sub_offsets", header, INTEGERS) if super_size and has["offsets"] else None
        try:
            format = Format(
                n=shape[-2],
                k=shape[-1],
                experts=shape[0] if len(shape) == 3 else None,
                group_size=fields["group_size"],
                scale_dtype=scale_dtype,
                zero_point=fields["zero_point"],
                bits=fields["bits"],
                super_size=super_size,
                sub_scale_dtype=sub_scale_dtype,
                sub_offset_dtype=sub_offset_dtype,
                rotation=fields.get("rotation", 0),
                **{f"has_{part}": value for part, value in has.items()},
            )
        except ValueError as error:
            raise ValueError(f"{name} is no packed weight: {error}") from None
        for part, spec in format.arrays.items():
            entry = header[f"{name}.{part}"]
            kind, size = KINDS[spec.type], list(spec.shape)
            if entry["dtype"] != kind or entry["shape"] != size:
                raise ValueError(f"{name}.{part} must be {kind} {size}, got {entry['dtype']} {entry['shape']}")
            begin, end = entry["data_offsets"]
            if end - begin != spec.nbytes:
                raise ValueError(f"{name}.{part} must be {kind} {size}, got {end - begin} bytes")
        return format

    def packed(self, name: str, format: Format) -> PackedWeight | PackedExperts:
        """A weight, or experts, of the format that it has."""
        data = {}
        for part, spec in format.arrays.items():
            begin, end = self._header[f"{name}.{part}"]["data_offsets"]
            data[part] = self._data[begin:end]
            crc32s = self.weights[name].get("crc32")
            self._check(f"{name}.{part}", KINDS[spec.type], data[part], crc32s, part)
        return mapped(name, format, data)

    def tensor(self, name: str) -> Tensor:
        """A tensor that is no part of a weight, of which only the header is checked."""
        return tensor_of(name, self._path, self._header[name], self._data)

    def check_tensor(self, tensor: Tensor, fields: dict[str, Any]) -> None:
        """Raise ValueError if it has not the checksum in its description."""
        self._check(tensor.name, tensor.dtype, tensor.bytes, fields, "crc32")

    def _check(self, name: str, kind: str, array: npt.NDArray[Any], crc32s: Any, key: str) -> None:
        if not self._verify:
            return
        # The type counts, since other types take the same bytes for other numbers.
        crc32 = zlib.crc32(array.reshape(-1).view(np.uint8).data, zlib.crc32(kind.encode()))
        if type(crc32s) is not dict or crc32s.get(key) != crc32:
            raise ValueError(f"{name} is damaged: it does not have its checksum")


def mapped(name: str, format: Format, data: Mapping[str, npt.NDArray[np.uint8]]) -> PackedWeight | PackedExperts:
    """What has arrays of these bytes, as many as the format needs. ValueError names the array."""
    # A copy where the file has it at an odd place, which the writer never does.
    arrays = {part: plain(data[part].view(spec.dtype).reshape(spec.shape)) for part, spec in format.arrays.items()}
    try:
        format.check(arrays)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None
    return (PackedWeight if format.experts is None else PackedExperts)._from_arrays(format, arrays)


def _dtype(key: str, header: dict[str, Any], allowed: tuple[str, ...]) -> str:
    """The element type of a tensor, which its weight may have as it likes."""
    kind = header[key]["dtype"]
    if TYPES.get(kind) not in allowed:
        raise ValueError(f"{key} must be {one_of(tuple(KINDS[type] for type in allowed))}, got {kind}")
    return TYPES[kind]
