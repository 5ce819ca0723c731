"""Packed weights on disk: one safetensors file, mapped into memory when it is loaded."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import FLOATS, INTEGERS, check_flag, one_of, plain
from pyda8w4._filesystem import check_path, map_file, replaced_file
from pyda8w4._format import LAYOUT, LAYOUT_VERSION, LAYOUT_VERSIONS, Format
from pyda8w4._packed import PackedWeight
from pyda8w4._safetensors import MOST_HEADER_BYTES, parse_json, read_header

# Element types as safetensors names them.
_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int8": "I8", "int32": "I32"}
_TYPES = {kind: type for type, kind in _KINDS.items()}

# Arrays that a weight says it has; of the others its numbers tell.
_OPTIONAL = ("offsets", "table", "perm", "factors")


def save(path: str | os.PathLike[str], weights: Mapping[str, PackedWeight]) -> None:
    """Write packed weights to a safetensors file.

    Parameters
    ----------
    path : path-like
        Replaced only once the new file is complete and on the disk. A symbolic link stays: its target is
        replaced. A file that exists keeps its owner and permissions, and must be writable.
    weights : mapping of str to PackedWeight
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
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must be a mapping of names to PackedWeight, got {type(weights).__name__}")
    tensors: list[tuple[str, str, npt.NDArray[Any]]] = []
    fields: dict[str, Any] = {}
    for name, weight in weights.items():
        if not isinstance(name, str) or not isinstance(weight, PackedWeight):
            raise TypeError(
                f"weights must map str to PackedWeight, got {type(name).__name__} to {type(weight).__name__}"
            )
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"weights must have names that UTF-8 can hold, got {name!r}") from None
        fields[name] = {
            "shape": weight.shape,
            "bits": weight.bits,
            "group_size": weight.group_size,
            "zero_point": weight.zero_point,
        }
        if weight.super_size:
            fields[name]["super_size"] = weight.super_size
        fields[name] |= {part: True for part in _OPTIONAL if part in weight._arrays}
        kinds = {part: _KINDS[spec.type] for part, spec in weight._format.arrays.items()}
        fields[name]["crc32"] = {part: _crc32(kinds[part], array) for part, array in weight._arrays.items()}
        tensors += [(f"{name}.{part}", kinds[part], array) for part, array in weight._arrays.items()]
    # Those whose sizes are no multiples of 64 bytes come last.
    tensors.sort(key=lambda tensor: tensor[2].nbytes % 64 != 0)

    description = json.dumps(fields)
    header: dict[str, Any] = {
        "__metadata__": {
            "layout": LAYOUT,
            "layout_version": str(LAYOUT_VERSION),
            "weights": description,
            "weights_crc32": str(zlib.crc32(description.encode())),
        }
    }
    end = 0
    for key, kind, array in tensors:
        begin, end = end, end + array.nbytes
        header[key] = {"dtype": kind, "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    if len(text) > MOST_HEADER_BYTES - 64:
        raise ValueError(f"weights must have names for a header of at most 100 MB, got {len(text)} bytes")
    text += b" " * (-(len(text) + 8) % 64)

    with replaced_file(check_path(path)) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, _, array in tensors:
            file.write(_bytes(array))


def load(path: str | os.PathLike[str], *, verify: bool = True) -> dict[str, PackedWeight]:
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
    dict of str to PackedWeight
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
    data = map_file(path)
    try:
        return _weights(data, verify)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged header: {error!r}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _crc32(kind: str, array: npt.NDArray[Any]) -> int:
    """Of the name of the type, since other types take the same bytes for other numbers, and then the data."""
    return zlib.crc32(_bytes(array), zlib.crc32(kind.encode()))


def _weights(data: npt.NDArray[np.uint8], verify: bool) -> dict[str, PackedWeight]:
    header, data = read_header(data)
    metadata = header.get("__metadata__", {})
    layout, version = metadata.get("layout"), metadata.get("layout_version")
    if layout != LAYOUT or version not in map(str, LAYOUT_VERSIONS):
        raise ValueError(
            f"it must hold layout {LAYOUT} version {one_of(LAYOUT_VERSIONS)}, got {layout} version {version}"
        )
    description = metadata["weights"]
    if verify and metadata["weights_crc32"] != str(zlib.crc32(description.encode())):
        raise ValueError("it is damaged: its list of weights does not have its checksum")
    return {
        name: _weight(name, {"bits": 4, **fields} if version == "1" else fields, header, data, verify)
        for name, fields in parse_json(description).items()
    }


def _dtype(key: str, header: dict[str, Any], allowed: tuple[str, ...]) -> str:
    """The element type of a tensor, which its weight may have as it likes."""
    kind = header[key]["dtype"]
    if _TYPES.get(kind) not in allowed:
        raise ValueError(f"{key} must be {one_of(tuple(_KINDS[type] for type in allowed))}, got {kind}")
    return _TYPES[kind]


def _weight(
    name: str, fields: dict[str, Any], header: dict[str, Any], data: npt.NDArray[np.uint8], verify: bool
) -> PackedWeight:
    shape = fields["shape"]
    if not isinstance(shape, list) or len(shape) != 2:
        raise ValueError(f"{name} must have a shape [N, K], got {shape!r}")
    super_size, has = fields.get("super_size", 0), {part: fields.get(part, False) for part in _OPTIONAL}
    scale_dtype = _dtype(f"{name}.scales", header, FLOATS)
    sub_scale_dtype = _dtype(f"{name}.sub_scales", header, INTEGERS) if super_size else None
    sub_offset_dtype = _dtype(f"{name}.sub_offsets", header, INTEGERS) if super_size and has["offsets"] else None
    try:
        format = Format(
            n=shape[0],
            k=shape[1],
            group_size=fields["group_size"],
            scale_dtype=scale_dtype,
            zero_point=fields["zero_point"],
            bits=fields["bits"],
            super_size=super_size,
            sub_scale_dtype=sub_scale_dtype,
            sub_offset_dtype=sub_offset_dtype,
            **{f"has_{part}": value for part, value in has.items()},
        )
    except ValueError as error:
        raise ValueError(f"{name} is no packed weight: {error}") from None
    arrays = {}
    for part, spec in format.arrays.items():
        entry = header[f"{name}.{part}"]
        kind, size = _KINDS[spec.type], list(spec.shape)
        if entry["dtype"] != kind or entry["shape"] != size:
            raise ValueError(f"{name}.{part} must be {kind} {size}, got {entry['dtype']} {entry['shape']}")
        begin, end = entry["data_offsets"]
        if end - begin != prod(size) * spec.dtype.itemsize:
            raise ValueError(f"{name}.{part} must be {kind} {size}, got {end - begin} bytes")
        # A copy where the file has it at an odd place, which `save` never does.
        arrays[part] = plain(data[begin:end].view(spec.dtype).reshape(spec.shape))
        if verify and fields["crc32"][part] != _crc32(kind, arrays[part]):
            raise ValueError(f"{name}.{part} is damaged: it does not have its checksum")
    try:
        format.check(arrays)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None
    return PackedWeight._from_arrays(format, arrays)
