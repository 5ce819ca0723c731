"""Packed weights on disk: one safetensors file, mapped into memory when it is loaded."""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import FLOATS, check_flag, one_of, plain
from pyda8w4._format import LAYOUT, LAYOUT_VERSION, Format
from pyda8w4._packed import PackedWeight

# Element types as safetensors names them.
_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int8": "I8"}
_TYPES = {kind: type for type, kind in _KINDS.items()}


def save(path: str | os.PathLike[str], weights: Mapping[str, PackedWeight]) -> None:
    """Write packed weights to a safetensors file.

    Parameters
    ----------
    path : path-like
        Replaced only once the new file is complete.
    weights : mapping of str to PackedWeight
        The layers of a model, by name.

    Raises
    ------
    TypeError
        If `weights` is something else.
    ValueError
        If a name has characters that UTF-8 cannot hold.
    OSError
        If the file cannot be written.

    Notes
    -----
    The metadata has a checksum of every tensor, and one of itself, for `load` to verify.

    The file is plain safetensors: for each weight the tensors ``name.codes``, ``name.scales``,
    ``name.sums`` and, where zero points differ, ``name.zps``, where there are offsets,
    ``name.offsets``. It is written here rather than by the safetensors package because every array is
    to start at a multiple of 64 bytes, so that kernels can read a mapped file at full speed; that
    package orders tensors its own way.

    Examples
    --------
    >>> import numpy as np, os, pyda8w4, tempfile
    >>> packed = pyda8w4.prepack(np.zeros((64, 128), np.uint8), np.ones(64, np.float32))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "weights.safetensors")
    ...     pyda8w4.save(path, {"lm_head": packed})
    ...     pyda8w4.load(path)
    {'lm_head': PackedWeight(shape=(64, 128), group_size=128, scales=float16, zero_point=8, nbytes=4480)}
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
            "group_size": weight.group_size,
            "zero_point": weight.zero_point,
        }
        if weight.has_offsets:
            fields[name]["offsets"] = True
        kinds = {part: _KINDS[spec.type] for part, spec in weight._format.arrays.items()}
        fields[name]["crc32"] = {part: _crc32(kinds[part], array) for part, array in weight._arrays.items()}
        tensors += [(f"{name}.{part}", kinds[part], array) for part, array in weight._arrays.items()]
    # Zero points come last: theirs are the only sizes that need not be multiples of 64 bytes.
    tensors.sort(key=lambda tensor: tensor[1] == "I8")

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
    text += b" " * (-(len(text) + 8) % 64)

    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for _, _, array in tensors:
                file.write(_bytes(array))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


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
    ImportError
        If the package safetensors is missing.
    OSError
        If the file cannot be read.
    TypeError
        If `verify` is not a bool.
    ValueError
        If it is not a safetensors file, of another layout or layout version, its contents do not
        fit each other, or they do not have their checksums.

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
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError('load needs safetensors: pip install "pyda8w4[safetensors]"') from error
    verify = check_flag("verify", verify)
    path = Path(path)
    with open(path, "rb") as file:
        try:
            # Checks the whole header against the size of the file.
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from None
        # All else comes from the open file: another one may have taken its path by now.
        file_data = np.memmap(file, np.uint8, mode="r")
    try:
        data_begin = 8 + int.from_bytes(file_data[:8], "little")
        header = json.loads(file_data[8:data_begin].tobytes())
        metadata = header.get("__metadata__", {})
        found = (metadata.get("layout"), metadata.get("layout_version"))
        if found != (LAYOUT, str(LAYOUT_VERSION)):
            raise ValueError(
                f"{path} must hold layout {LAYOUT} version {LAYOUT_VERSION}, got {found[0]} version {found[1]}"
            )
        description = metadata["weights"]
        if verify and metadata["weights_crc32"] != str(zlib.crc32(description.encode())):
            raise ValueError(f"{path} is damaged: its list of weights does not have its checksum")
        weights = {}
        for name, fields in json.loads(description).items():
            weights[name] = _weight(name, fields, header, file_data[data_begin:], verify)
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} has a damaged header: {error!r}") from None
    return weights


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _crc32(kind: str, array: npt.NDArray[Any]) -> int:
    """Of the name of the type, since other types take the same bytes for other numbers, and then the data."""
    return zlib.crc32(_bytes(array), zlib.crc32(kind.encode()))


def _weight(
    name: str, fields: dict[str, Any], header: dict[str, Any], data: npt.NDArray[np.uint8], verify: bool
) -> PackedWeight:
    shape = fields["shape"]
    if not isinstance(shape, list) or len(shape) != 2:
        raise ValueError(f"{name} must have a shape [N, K], got {shape!r}")
    scale_kind = header[f"{name}.scales"]["dtype"]
    if _TYPES.get(scale_kind) not in FLOATS:
        raise ValueError(f"{name}.scales must be {one_of(tuple(_KINDS[type] for type in FLOATS))}, got {scale_kind}")
    try:
        format = Format(
            n=shape[0],
            k=shape[1],
            group_size=fields["group_size"],
            scale_dtype=_TYPES[scale_kind],
            zero_point=fields["zero_point"],
            has_offsets=fields.get("offsets", False),
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
        # A copy where the file has it at an odd place, which `save` never does.
        arrays[part] = plain(data[begin:end].view(spec.dtype).reshape(spec.shape))
        if verify and fields["crc32"][part] != _crc32(kind, arrays[part]):
            raise ValueError(f"{name}.{part} is damaged: it does not have its checksum")
    try:
        format.check(arrays)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None
    return PackedWeight._from_arrays(format, arrays)
