"""Hostile files and folders for `pyda8w4.load` and `pyda8w4.checkpoints.open`, and hostile contents of pickles.

    python tests/tools/fuzz_load.py [--format FORMAT] [--seed SEED] [--count COUNT] [--first NUMBER]

Input NUMBER depends on the seed and the number alone. Each one must load, or raise ValueError or OSError (what
a pickle holds also TypeError); what loads is used. The first that does something else is left in a file, with its
number. Address space is limited, so that no allocation can follow a size that the file merely claims.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import pickle
import random
import resource
import shutil
import struct
import sys
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where cases.py is

import numpy as np
from cases import Weight, pack, stored_arrays
from folders import EXAMPLES, write_example
from more_folders import more_examples

import pyda8w4
import pyda8w4.checkpoints
import pyda8w4.convert
import pyda8w4.inspect
from pyda8w4._safetensors import Tensor
from pyda8w4.checkpoints import Checkpoint
from pyda8w4.formats import QuantizedWeight
from pyda8w4.formats._layer import Layer, plain_layer

try:
    import gguf
except ImportError:
    gguf = None

ROOM = 2**30  # bytes of address space beyond those in use at the start

NUMBERS = [
    0, -1, 1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 2**15, 2**16, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
    2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**31), -(2**63), 0.5, -0.0,
    1e308, float("inf"), float("nan"),
]  # fmt: skip
OTHERS = [None, True, False, "", "8", "F32", "U8", "I64", "BOOL", "\x00", "\u20ac", [], {}, [[]], [0, 0], {"": 0}]
TEXTS = [
    b"[" * 300, b"[" * 50000, b'{"a":' * 2000 + b"1" + b"}" * 2000, b"9" * 5000, b"-", b"1e999999", b"0x10",
    b"\xff\xfe", b'"\\ud800"', b'{"a": 1, "a": 2}', b"NaN", b"[1," * 900 + b"1" + b"]" * 900, b" " * 1000,
    b"null", b'"' + b"x" * 70000 + b'"',
]  # fmt: skip


def change_bytes(rng: random.Random, data: bytes, header: int) -> bytes:
    """Wherever, but most often within the first `header` bytes."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        end = len(data) if rng.random() < 0.2 else min(header, len(data))
        at = rng.randrange(end) if end else 0
        size = rng.choice([1, 2, 4, 8, 64])
        match rng.randrange(7):
            case 0 if data:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + 1] = bytes([rng.choice(b'0123456789{}[]",:-eE\\ \xff\x00')])
            case 2:
                data[at : at + 8] = struct.pack(
                    "<q", rng.choice([0, -1, 1, 2**31, 2**40, 2**62, len(data), rng.getrandbits(62)])
                )
            case 3:
                del data[at : at + size]
            case 4:
                data[at:at] = data[at : at + size] if rng.random() < 0.5 else rng.randbytes(size)
            case 5:
                del data[rng.randrange(len(data) + 1) :]
            case 6:
                data[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.randrange(2**32) >> rng.randrange(32))
    return bytes(data)


# ---- our files: a JSON header that holds another one --------------------------------------------------------


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container with every one of its keys."""
    found = []
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, (dict, list)):
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            found += [(node, key) for key in keys]
            stack += [node[key] for key in keys]
    return found


def change_tree(rng: random.Random, tree: Any) -> None:
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        node, key = rng.choice(places(tree) or [({}, "")])  # nothing is left where all has been removed
        match rng.randrange(8):
            case 0 | 1:
                node[key] = rng.choice(NUMBERS)
            case 2:
                node[key] = copy.deepcopy(rng.choice(OTHERS))  # it may be changed in its turn
            case 3 if isinstance(node, dict) and key in node:
                del node[key]
            case 4 if isinstance(node, dict) and key in node:
                node[rng.choice(["", "c", "a.codes", "b.offsets", "__metadata__"])] = copy.deepcopy(node[key])
            case 5:
                other, other_key = rng.choice(places(tree) or [([0], 0)])
                node[key] = copy.deepcopy(other[other_key])
            case 6 if isinstance(node.get(key) if isinstance(node, dict) else node[key], int):
                node[key] += rng.choice([-64, -32, -4, -1, 1, 4, 32, 64])
            case 7 if isinstance(node, list):
                rng.shuffle(node)


def change_header(rng: random.Random, data: bytes, _: int) -> bytes:
    """Numbers and structure of the header, and of one of its descriptions, whose checksum is kept right."""
    (length,) = struct.unpack("<Q", data[:8])
    header, payload = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    metadata = header["__metadata__"]
    name = rng.choice([name for name in ("weights", "checkpoint") if name in metadata])
    description = json.loads(metadata[name])
    which = rng.randrange(4)
    if which in (0, 2):
        change_tree(rng, description)
    metadata[name] = json.dumps(description)
    if which == 3:
        text = metadata[name].encode()
        metadata[name] = replaced(rng, text).decode(errors="replace")
    metadata[f"{name}_crc32"] = str(zlib.crc32(metadata[name].encode(errors="replace")))
    if which in (1, 2):
        change_tree(rng, header)
    if rng.random() < 0.2:  # tensors in another order, where none need be aligned
        payload = reordered(rng, header, payload)
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = replaced(rng, text)
    if rng.random() < 0.1:
        text = given_twice(rng, text)
    text += b" " * rng.randrange(70)
    if payload and rng.random() < 0.2:
        payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
    return struct.pack("<Q", len(text)) + text + payload


def reordered(rng: random.Random, header: dict[str, Any], payload: bytes) -> bytes:
    names = [
        name
        for name, entry in header.items()
        if isinstance(entry, dict)
        and isinstance(entry.get("data_offsets"), list)
        and len(entry["data_offsets"]) == 2
        and all(type(at) is int and 0 <= at <= len(payload) for at in entry["data_offsets"])
    ]
    rng.shuffle(names)
    moved = bytearray()
    for name in names:
        begin, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [len(moved), len(moved) + max(end - begin, 0)]
        moved += payload[begin:end]
    return moved


def replaced(rng: random.Random, text: bytes) -> bytes:
    """A piece of JSON in another one's place, or beside it."""
    at = rng.choice([i for i, byte in enumerate(text) if byte in b'{[:,"'] or [0])
    return text[: at + 1] + rng.choice(TEXTS) + text[at + rng.choice([1, 2, 3, len(text)]) :]


def given_twice(rng: random.Random, text: bytes) -> bytes:
    """A key of the header a second time, with another value."""
    keys = [b'"' + name + b'"' for name in (b"a.codes", b"b.scales", b"w.sums", b"__metadata__", b"dtype", b"shape")]
    key = rng.choice([key for key in keys if key in text] or [b"{"])
    return text.replace(key, key + b": " + rng.choice(TEXTS) + b", " + key, 1)


def saved(folder: Path) -> list[bytes]:
    path = folder / "seed"
    files = []
    for weights in (
        {"a": Weight(33, 70, 32), "b": Weight(65, 64, 16, "bfloat16", 3, True)},
        {"w": Weight(1, 1)},
        {"w": Weight(40, 100, None, "float16", "extreme")},
        {"a": Weight(33, 70, 12, "float16", 0, True, table=True, supers=2, perm=True, factors=True)},
        {"a": Weight(33, 70, 32, bits=5, perm=True), "b": Weight(40, 64, 16, "bfloat16", bits=6, supers=2)},
        {"w": Weight(40, 30, 12, "float16", "extreme", bits=8, factors=True, rotation=16)},
        {},
    ):
        pyda8w4.save(path, {name: pack(weight) for name, weight in weights.items()})
        files.append(path.read_bytes())
    return files


def use_loaded(rng: random.Random, path: Path) -> None:
    kernel = rng.choice(pyda8w4.kernels())
    for weight in pyda8w4.load(path, verify=rng.random() < 0.3).values():
        n, k = weight.shape
        blocks = [part for part in stored_arrays(weight).values() if part.ndim > 1]
        assert all(len(part) * 32 >= n for part in blocks)
        assert weight.unpack()[0].shape == weight.dequantize().shape == (n, k)
        act = rng.choice(["uint8", "int8", "int8_group", "int16"])
        with pyda8w4.use_kernel(kernel):
            for rows in (1, 9):
                assert pyda8w4.linear(np.ones((rows, k), np.float32), weight, act=act).shape == (rows, n)
        if rng.random() < 0.1:
            assert pyda8w4.concat([weight, weight[: 32 if n > 32 else n]]).shape[1] == k
            assert weight.shard(0, n, 0).shape == (1, k)
            pickle.loads(pickle.dumps(weight))
            pyda8w4.save(path, {"again": weight})
            pyda8w4.load(path)


# ---- what convert writes ------------------------------------------------------------------------------------


def converted(folder: Path) -> list[bytes]:
    path = folder / "seed"
    weights = [Weight(33, 70, 32), Weight(33, 70, 32, "float16", offsets=True), Weight(65, 64, 16, bits=5, perm=True)]
    quantized = [QuantizedWeight.from_packed(pack(weight)) for weight in weights]
    layers = {
        "a": Layer("Q4_0", (33, 70), 1, (), read=lambda index: quantized[0]),
        "b": Layer("MXFP4", (2, 33, 70), 1, (), read=lambda index: quantized[index]),
        "c": Layer("Q5_0", (65, 64), 1, (), read=lambda index: quantized[2]),
    }
    for name, kind, shape in (("d", "F32", (5,)), ("e", "BF16", (2, 3, 4)), ("f", "I64", (2, 4))):
        size = int(np.prod(shape)) * {"F32": 4, "BF16": 2, "I64": 8}[kind]
        layers[name] = plain_layer(Tensor(name, path, kind, shape, np.arange(size, dtype=np.uint8)))
    files = []
    for names in ("abcdef", "ad", "b", "e"):
        metadata = {"general.architecture": "llama", "words": ["a", "b"], "limit": float("inf")}
        pyda8w4.convert.run(Checkpoint(path, metadata, {name: layers[name] for name in names}), path)
        files.append(path.read_bytes())
    return files


def use_converted(rng: random.Random, path: Path) -> None:
    checkpoint = pyda8w4.checkpoints.open(path)
    for name, layer in checkpoint._layers.items():
        assert layer.packed_nbytes is None or layer.packed_nbytes <= path.stat().st_size * max(layer.shape)
        for read in (checkpoint.array, checkpoint.packed, checkpoint.stack, checkpoint.weight):
            try:
                result = read(name)
            except ValueError as error:
                assert str(path) in str(error) and name in str(error), error
                continue
            if isinstance(result, pyda8w4.PackedWeight):
                assert result.shape == checkpoint.shapes[name]
                pyda8w4.linear(np.ones((1, result.shape[1]), np.float32), result)


# ---- GGUF ---------------------------------------------------------------------------------------------------


def written(folder: Path) -> list[bytes]:
    types = gguf.GGMLQuantizationType
    path = folder / "seed"
    rng = np.random.default_rng(0)
    files = []
    for kinds in (
        (types.Q4_0, types.F32, types.F64),
        (types.Q4_1, types.F16, types.Q8_0),
        (types.BF16, types.Q6_K, types.Q5_0, types.I32),
        (types.Q2_K, types.Q3_K, types.MXFP4, types.IQ2_XS),
        (types.Q4_K, types.IQ4_XS, types.TQ1_0, types.Q8_1),
    ):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_array("words", ["a", "b", "c"])
        writer.add_array("numbers", [1, 2, 3])
        writer.add_float32("epsilon", 1e-5)
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", 1)
        writer.add_custom_alignment(32)
        for kind in kinds:
            stack = (2, 3, 256) if kind in (types.F16, types.Q2_K, types.Q4_K) else (3, 256)
            shape = gguf.quant_shape_to_byte_shape(stack, kind)
            writer.add_tensor(kind.name, rng.integers(0, 32, shape, np.uint8), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        files.append(path.read_bytes())
    return files


def change_numbers(rng: random.Random, data: bytes, header: int) -> bytes:
    """Sizes, counts, types and offsets of the header."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.randrange(4, header)
        value = rng.choice([0, 1, 2, 3, 8, 9, 30, 31, 255, 2**20, 2**31, 2**32 - 1])
        if rng.random() < 0.5:
            data[at : at + 4] = struct.pack("<I", value)
        else:
            data[at : at + 8] = struct.pack("<Q", rng.choice([value, 2**40, 2**62, 2**63, 2**64 - 1]))
    return bytes(data)


def nest(rng: random.Random, data: bytes, _: int) -> bytes:
    """An array of arrays of arrays ... in the place of the first value."""
    at = data.index(b"general.architecture") + len("general.architecture")
    depth = rng.choice([2, 100, 1000, 5000])
    return data[:at] + struct.pack("<I", 9) + struct.pack("<IQ", 9, rng.choice([1, 2])) * depth + data[at + 4 :]


def repeat(rng: random.Random, data: bytes, _: int) -> bytes:
    """Some value or tensor twice, or more often."""
    what = rng.choice([b"words", b"epsilon", b"split.count", b"Q4_0", b"F16", b"BF16", b"F64"])
    at = data.find(struct.pack("<Q", len(what)) + what)
    if at < 0:
        return data
    size = rng.choice([len(what) + 8 + 4 + size for size in (2, 4, 16, 28, 4 + 8 + 3 * 9)])
    copies = rng.choice([1, 1, 2, 100])
    counts = list(struct.unpack("<QQ", data[8:24]))
    counts[what in (b"words", b"epsilon", b"split.count")] += copies
    return data[:8] + struct.pack("<QQ", *counts) + data[24:at] + data[at : at + size] * copies + data[at:]


def change_scales(rng: random.Random, data: bytes, _: int) -> bytes:
    """NaN, infinities, the largest and the least, as float16, float32 or float64, somewhere in the tensors."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 5, 50])):
        form = rng.choice("efd")
        size = struct.calcsize(form)
        at = rng.randrange(500, len(data) - size) // 2 * 2
        value = rng.choice(["nan", "-nan", "inf", "-inf", "65504", "6e-8", "-0.0"])
        data[at : at + size] = rng.choice(
            [struct.pack("<" + form, float(value)), b"\xff" * size, b"\x01\x7d" * (size // 2)]
        )
    return bytes(data)


def use_gguf(rng: random.Random, path: Path) -> None:
    file = pyda8w4.checkpoints.open(path)
    for name in [*file.types, "nothing"]:
        for read in (file.array, file.packed, file.stack, lambda name: file.packed(name, requantize=True)):
            try:
                result = read(name)
            except ValueError as error:
                assert str(path) in str(error) and name in str(error), error
                continue
            for weight in result if isinstance(result, pyda8w4.PackedExperts) else [result]:
                if isinstance(weight, pyda8w4.PackedWeight):
                    pyda8w4.linear(np.ones((1, weight.shape[1]), np.float32), weight)


# ---- folders of Hugging Face --------------------------------------------------------------------------------
# An input is a pickle of the files by name.


def folders(folder: Path) -> list[bytes]:
    found = []
    for parts in (1, 2):
        for example in [*EXAMPLES.values(), *more_examples()]:
            path = folder / "seed"
            key = "quantization" if example.config.get("quant_method") == "mlx" else "quantization_config"
            write_example(path, example, key, parts=parts)
            use_files(path, must_load=True)
            found.append(pickle.dumps({file.name: file.read_bytes() for file in sorted(path.iterdir())}))
            shutil.rmtree(path)
    return found


def change_config(rng: random.Random, files: dict[str, bytes]) -> None:
    name = rng.choice([name for name in files if name.endswith(".json")])
    tree = json.loads(files[name])
    change_tree(rng, tree[rng.choice([key for key in tree if isinstance(tree[key], dict)])])
    text = json.dumps(tree).encode()
    files[name] = replaced(rng, text) if rng.random() < 0.1 else text


def change_any_bytes(rng: random.Random, files: dict[str, bytes]) -> None:
    name = rng.choice(list(files))
    files[name] = change_bytes(rng, files[name], 2000)


def change_files(rng: random.Random, files: dict[str, bytes]) -> None:
    """One is missing, or is another one, or has another name."""
    name, other = rng.choice(list(files)), rng.choice(list(files))
    files[rng.choice([other, other, "quantize_config.json", "model.safetensors.index.json", "x"])] = files[name]
    if rng.random() < 0.7:
        files.pop(name, None)


def change_tensors(rng: random.Random, files: dict[str, bytes]) -> None:
    """Tensors of a file are missing, or have other names, types, shapes, sizes or numbers; the file is right."""
    name = rng.choice([name for name in files if name.endswith(".safetensors")])
    header, payload = split(files[name])
    metadata = header.pop("__metadata__", None)
    tensors = {
        name: [entry["dtype"], list(entry["shape"]), payload[slice(*entry["data_offsets"])]]
        for name, entry in header.items()
    }
    for _ in range(rng.choice([1, 1, 2, 3])):
        if tensors:
            change_tensor(rng, tensors, rng.choice(list(tensors)))
    if metadata is not None and rng.random() < 0.5:
        key = rng.choice(list(metadata))
        said = json.loads(metadata[key])
        change_tree(rng, said)
        metadata[key] = json.dumps(said)
    files[name] = joined(tensors, metadata)


def change_tensor(rng: random.Random, tensors: dict[str, list[Any]], name: str) -> None:
    kind, shape, data = tensor = tensors[name]
    size = max(len(data) // max(prod(shape), 1), 1)
    match rng.randrange(10):
        case 0:
            del tensors[name]
        case 1:
            module, _, last = name.rpartition(".")
            to = rng.choice([*tensors, f"{module}.weight", f"{module}.{last}s", last, "", f"{module}2.{last}"])
            tensors[to] = tensors.pop(name)
        case 2:  # another type of the same size
            tensor[0] = rng.choice(
                {1: "U8 I8 BOOL F8_E4M3", 2: "F16 BF16 I16 U16", 4: "F32 I32 U32"}.get(size, "I64 F64 U64").split()
            )
        case 3:  # or of another
            tensor[0] = rng.choice(["U8", "I8", "F16", "BF16", "F32", "I32", "F64", "I64", "F8_E4M3", "F8_E8M0", "X"])
            tensor[2] = resized(data, prod(shape) * sizes_of(tensor[0]))
        case 4:
            rng.shuffle(shape)
        case 5:
            tensor[1] = rng.choice([[], [1, *shape], [*shape, 1], [prod(shape)], shape[1:], shape[:-1]])
            tensor[2] = resized(data, prod(tensor[1]) * size)
        case 6 if shape:
            at = rng.randrange(len(shape))
            shape[at] = rng.choice([0, 1, shape[at] - 1, shape[at] + 1, 2 * shape[at], 64])
            shape[at] = max(shape[at], 0)
            tensor[2] = resized(data, prod(shape) * size)
        case 7:  # numbers: NaN, infinity, the greatest, -1, 0
            numbers = bytearray(data)
            for _ in range(rng.choice([1, 3, len(numbers) // size])):
                at = rng.randrange(max(len(numbers) // size, 1)) * size
                value = rng.choice(
                    [b"\xff" * size, b"\0" * size, b"\xff" * (size - 1) + b"\x7f", b"\1" + b"\0" * (size - 1)]
                )
                nans = {"F16": b"\1\x7c", "BF16": b"\x80\x7f", "F32": b"\0\0\x80\x7f"}
                numbers[at : at + size] = nans.get(kind, value) if rng.random() < 0.5 else value
            tensor[2] = bytes(numbers[: len(data)])
        case 8:
            other = tensors[rng.choice(list(tensors))]
            tensor[2], other[2] = resized(other[2], len(tensor[2])), resized(tensor[2], len(other[2]))
        case 9:  # small integers, as those that say sizes are
            if size > 1 and kind[0] in "IU":
                values = [
                    rng.choice([value for value in NUMBERS if isinstance(value, int)]) for _ in range(len(data) // size)
                ]
                tensor[2] = b"".join((value % (1 << 8 * size)).to_bytes(size, "little") for value in values)


def sizes_of(kind: str) -> int:
    return {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}.get(kind, 1)


def resized(data: bytes, size: int) -> bytes:
    return (data * (size // max(len(data), 1) + 1))[:size].ljust(size, b"\0")


def split(file: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def joined(tensors: dict[str, list[Any]], metadata: Any) -> bytes:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    payload = b""
    for name, (kind, shape, data) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(payload), len(payload) + len(data)]}
        payload += data
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def change_header_of(rng: random.Random, files: dict[str, bytes]) -> None:
    name = rng.choice([name for name in files if name.endswith(".safetensors")])
    header, payload = split(files[name])
    change_tree(rng, header)
    text = json.dumps(header).encode()
    text = replaced(rng, text) if rng.random() < 0.1 else text
    files[name] = struct.pack("<Q", len(text)) + text + payload


def change_folder(rng: random.Random, data: bytes, _: int) -> bytes:
    files = pickle.loads(data)
    changes = [change_config, change_config, change_tensors, change_tensors, change_tensors, change_header_of]
    rng.choice([*changes, change_any_bytes, change_files])(rng, files)
    return pickle.dumps(files)


def use_folder(rng: random.Random, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        for file, data in pickle.loads(path.read_bytes()).items():
            Path(name, file or "empty").write_bytes(data)
        use_files(Path(name))


def use_files(path: Path, must_load: bool = False) -> None:
    checkpoint = pyda8w4.checkpoints.open(path)
    assert list(pyda8w4.inspect._lines(checkpoint))
    for name, layer in checkpoint._layers.items():
        for read in (checkpoint.array, checkpoint.packed, checkpoint.stack, checkpoint.weight):
            try:
                result = read(name)
            except ValueError as error:
                assert str(path) in str(error) and name in str(error), error
                assert not must_load or layer.floats or layer.is_stack or read == checkpoint.stack or layer.stored, (
                    error
                )
                continue
            assert not isinstance(result, np.ndarray) or result.shape == layer.shape
            for weight in result if isinstance(result, pyda8w4.PackedExperts) else [result]:
                if isinstance(weight, pyda8w4.PackedWeight):
                    assert weight.shape == layer.shape[-2:]
                    pyda8w4.linear(np.ones((1, weight.shape[1]), np.float32), weight)


# ---- pickles ------------------------------------------------------------------------------------------------


class Rebuilt:
    """Pickled as a packed weight with these contents."""

    def __init__(self, *state: Any) -> None:
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return self.state


def pickled(folder: Path) -> list[bytes]:
    weights = [
        Weight(33, 70, 32),
        Weight(65, 64, 16, "bfloat16", 3, True),
        Weight(1, 1),
        Weight(40, 100, None, "float16"),
        Weight(33, 70, 12, "float16", 0, True, table=True, supers=2, perm=True, factors=True),
        Weight(40, 64, 16, "bfloat16", bits=6, supers=2),
        Weight(33, 70, 32, bits=5, factors=True, rotation=16),
    ]
    return [pickle.dumps(pack(weight).__reduce__()) for weight in weights]


def change_array(rng: random.Random, array: Any) -> Any:
    """Another shape, type, byte order, memory layout or kind of array."""
    match rng.randrange(9):
        case 0:
            return array[tuple(slice(rng.choice([0, 0, 1]), size - rng.choice([0, 0, 1])) for size in array.shape)]
        case 1:
            return array.reshape(rng.choice([(-1,), array.shape[::-1], (1, *array.shape)]))
        case 2:
            return array.astype(rng.choice(["i1", "u1", "<u2", ">u2", "<f2", "<f4", ">f4", "<f8", "O", "S4", "?"]))
        case 3:
            return array.astype(array.dtype.newbyteorder())
        case 4:
            return rng.choice([None, 0, "", [], array.tolist(), bytes(array), np.float32(1), np.zeros(())])
        case 5:
            return array.view(np.recarray) if array.itemsize == 1 else np.ma.masked_array(array)
        case 6:
            return np.asfortranarray(array)[::-1]
        case 7:
            return np.broadcast_to(array[:1], (rng.choice([0, 1, 2**10]), *array.shape[1:]))
        case _:
            changed = array.copy()
            if not changed.dtype.hasobject:
                changed.reshape(-1).view(np.uint8)[rng.randrange(array.nbytes)] = rng.randrange(256)
            return changed


def change_pickle(rng: random.Random, data: bytes, _: int) -> bytes:
    rebuild, (version, fields, arrays) = pickle.loads(data)
    for _ in range(rng.choice([1, 1, 2])):
        match rng.randrange(5):
            case 0 | 1:
                change_tree(rng, fields)
            case 2 | 3:
                name = rng.choice(list(arrays) or ["codes"])
                if isinstance(arrays.get(name), np.ndarray) and arrays[name].size:
                    arrays[name] = change_array(rng, arrays[name])
            case 4:
                change_tree(rng, arrays)
    if rng.random() < 0.1:
        version, fields, arrays = (
            rng.choice([part, part, None, 1, 3, [], {}, "1"]) for part in (version, fields, arrays)
        )
    return pickle.dumps(Rebuilt(rebuild, (version, fields, arrays)))


def use_pickle(rng: random.Random, path: Path) -> None:
    try:
        weight = pickle.loads(path.read_bytes())
    except TypeError as error:
        raise ValueError(error) from None
    n, k = weight.shape
    assert weight.unpack()[0].shape == (n, k)
    results = []
    act = rng.choice(["uint8", "int8", "int8_group", "int16"])
    for kernel in pyda8w4.kernels():
        with pyda8w4.use_kernel(kernel):
            results.append(pyda8w4.linear(np.ones((3, k), np.float32), weight, act=act))
    for result in results:
        np.testing.assert_array_equal(result, results[0])
    pickle.loads(pickle.dumps(weight))


# ---- the loop -----------------------------------------------------------------------------------------------

FORMATS: dict[str, tuple[Callable, list[Callable], Callable]] = {
    "load": (saved, [change_header, change_header, change_bytes], use_loaded),
    "safetensors": (converted, [change_header, change_header, change_bytes], use_converted),
    "gguf": (written, [change_numbers, change_numbers, nest, repeat, change_scales, change_bytes], use_gguf),
    "pickle": (pickled, [change_pickle], use_pickle),
    "folder": (folders, [change_folder], use_folder),
}


def fuzz(file_format: str, folder: Path, seed: int, count: int, first: int = 0) -> Counter[str]:
    """-> how many loaded, and how many were refused with what."""
    seeds, changes, use = FORMATS[file_format]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        files = seeds(folder)
    path = folder / f"input.{file_format}"
    outcomes: Counter[str] = Counter()
    for number in range(first, first + count):
        rng = random.Random(f"{seed} {number}")
        data = rng.choice(files)
        header = {"load": 1200, "safetensors": 4000}.get(file_format, 500)
        data = rng.choice(changes)(rng, data, header)
        path.write_bytes(data)
        try:
            # Values that are not finite are no surprise in a file that was changed, nor is what quantizing costs.
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                use(rng, path)
            outcomes["loaded"] += 1
        except (ValueError, OSError) as error:
            outcomes[type(error).__name__] += 1
        except BaseException:
            path.write_bytes(data)
            print(f"input {number} of seed {seed}, left in {path}:", file=sys.stderr)
            raise
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=FORMATS, default="load")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    faulthandler.enable()
    pyda8w4.set_num_threads(2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    folder = Path(tempfile.mkdtemp())  # stays behind where this process crashes
    outcomes = fuzz(arguments.format, folder, arguments.seed, arguments.count, arguments.first)
    shutil.rmtree(folder)
    print(", ".join(f"{name} {count}" for name, count in sorted(outcomes.items())))


if __name__ == "__main__":
    main()
