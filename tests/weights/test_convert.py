"""Converted checkpoints: the file has everything that the checkpoint has, bit for bit, or there is no file."""

import json
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import (
    KINDS,
    SOME,
    Weight,
    address,
    assert_same_bits,
    assert_same_weight,
    given,
    pack,
    stored_arrays,
)
from safetensors import safe_open

import pyda8w4
from pyda8w4 import convert
from pyda8w4._safetensors import Tensor
from pyda8w4.checkpoints import Checkpoint
from pyda8w4.checkpoints import open as open_checkpoint
from pyda8w4.formats import QuantizedWeight
from pyda8w4.formats._layer import Layer, plain_layer

METADATA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "general.name": 'na\u00efve \U0001f600 \ud800 \x1b[31m"',
    "time_step_limit": [0.0, float("inf")],
    "tokens": ["a", "", '"', "\\"],
    "deep": {"a": [[1, 2], [], {"b": None}], "eps": 1e-5, "big": 2**70, "tied": True},
}


def quantized(weight):
    return QuantizedWeight(**given(weight), **weight.options)


def exact(*weights, type="GPTQ 4-bit"):
    """A matrix, or of several a stack."""
    shape = (weights[0].n, weights[0].k)
    shape = shape if len(weights) == 1 else (len(weights), *shape)
    return Layer(type, shape, 1000, (), read=lambda index: quantized(weights[index]))


def plain(name, kind, array):
    raw = np.frombuffer(array.tobytes(), np.uint8)
    return plain_layer(Tensor(name, Path("somewhere"), kind, array.shape, raw))


def floats(array, type="Q8_0", **more):
    """Dequantized only."""

    def read(index):
        return (array[index] if array.ndim == 3 else array).copy()

    return Layer(type, array.shape, array.size, (), floats=read, **more)


def normal(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


PLAIN = {
    "embed.weight": ("F16", normal(10, 64).astype(np.float16)),
    "norm.weight": ("F32", normal(70)),
    "norm.bf16": ("BF16", (normal(33).view(np.uint32) >> 16).astype(np.uint16)),
    "odd": ("F16", normal(3, 5, 7).astype(np.float16)),
    "stacked": ("F32", normal(2, 8, 16)),
    "double": ("F64", normal(5).astype(np.float64)),
    "positions": ("I64", np.arange(9)),
    "mask": ("BOOL", np.array([True, False, True])),
    "scale": ("F32", np.float32(3.5).reshape(())),
    "nothing": ("F32", np.empty((0, 4), np.float32)),
    "eight": ("F8_E4M3", np.arange(64, dtype=np.uint8)),
}
STACK = [Weight(33, 70, 32, "float16"), Weight(33, 70, 32, "bfloat16", 8), Weight(33, 70, 32, "float32", "extreme")]


def model():
    layers = {f"model.layers.{i}.\u00e9": exact(weight, type=f"type {i}") for i, weight in enumerate(KINDS + SOME)}
    layers["experts"] = exact(*STACK, type="MXFP4")
    layers |= {name: plain(name, *value) for name, value in PLAIN.items()}
    layers["a quantized norm"] = floats(normal(48), refusal="it is no matrix")
    layers["odd, quantized"] = floats(normal(3, 3, 3))
    layers["last"] = exact(SOME[2])
    return Checkpoint(Path("source"), METADATA, layers)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.safetensors"


@pytest.fixture
def converted(out):
    convert.run(model(), out)
    return out


# ---- what is written is read -----------------------------------------------------------------


def test_a_converted_checkpoint_is_the_checkpoint(converted):
    source, found = model(), open_checkpoint(converted)
    assert found.metadata == METADATA
    assert list(found.types.items()) == list(source.types.items())
    assert found.shapes == source.shapes
    for name, layer in source._layers.items():
        if layer.floats is not None or layer.read is not None:
            assert_same_bits(found.array(name), source.array(name), name)
            found.array(name)[...] = 0  # may be written to
        else:
            with pytest.raises(ValueError, match=f"{name} of {layer.type} cannot be dequantized"):
                found.array(name)


@pytest.mark.parametrize("number", range(len(KINDS + SOME)))
def test_weights_are_those_of_prepack(converted, number):
    weight, name = (KINDS + SOME)[number], f"model.layers.{number}.\u00e9"
    found = open_checkpoint(converted)
    assert_same_weight(found.packed(name), pack(weight))
    assert_same_weight(found.weight(name).pack(), pack(weight))
    assert_same_weight(pyda8w4.load(converted)[name], pack(weight))
    assert found._layers[name].packed_nbytes == pack(weight).nbytes


def test_a_stack_comes_back_as_a_stack(converted):
    found = open_checkpoint(converted)
    expected = pyda8w4.stack([pack(weight) for weight in STACK])
    for experts in (found.stack("experts"), model().stack("experts"), pyda8w4.load(converted)["experts"]):
        assert type(experts) is pyda8w4.PackedExperts
        for packed, one in zip(experts, expected, strict=True):
            assert_same_weight(packed, one)
    for index, weight in enumerate(STACK):
        assert_same_bits(found.weight("experts", index).pack().dequantize(), pack(weight).dequantize())
    assert found._layers["experts"].packed_nbytes == expected.nbytes
    assert found.array("experts").shape == (3, 33, 70)
    for index in (-1, 3):
        with pytest.raises(ValueError, match="index must be of a matrix of experts"):
            found.weight("experts", index)
    with pytest.raises(ValueError, match="name must be of a matrix, got experts"):
        found.packed("experts")


def test_load_gives_the_packed_weights_and_nothing_else(converted):
    names = [f"model.layers.{i}.\u00e9" for i in range(len(KINDS + SOME))]
    assert list(pyda8w4.load(converted)) == [*names, "experts", "last"]


def test_weights_are_mapped_and_aligned(converted):
    found = open_checkpoint(converted)
    packed = [found.packed(f"model.layers.{i}.\u00e9") for i in range(len(KINDS + SOME))]
    for weight in [*packed, found.stack("experts")]:
        for name, array in stored_arrays(weight).items():
            chain = [array]
            while chain[-1] is not None and hasattr(chain[-1], "base"):
                chain.append(chain[-1].base)
            assert any(isinstance(base, np.memmap) for base in chain), name
            assert array.nbytes % 64 or address(array) % 64 == 0, name


def test_tensors_are_stored_as_they_were(converted):
    with safe_open(converted, framework="numpy") as file:
        for name, (kind, array) in PLAIN.items():
            assert file.get_slice(name).get_dtype() == kind
            if kind not in ("BF16", "F8_E4M3"):  # which numpy has not
                assert_same_bits(file.get_tensor(name), array, name)
        assert_same_bits(file.get_tensor("odd, quantized"), normal(3, 3, 3))
        assert set(file.metadata()) == {
            "layout", "layout_version", "weights", "weights_crc32", "checkpoint", "checkpoint_crc32"
        }  # fmt: skip
    stored = open_checkpoint(converted)._layers["norm.bf16"].stored
    assert (stored.dtype, stored.bytes.tobytes()) == ("BF16", PLAIN["norm.bf16"][1].tobytes())


def test_what_became_of_each_tensor_is_told(out):
    done = []
    found = {converted.name: converted for converted in convert.run(model(), out, progress=done.append)}
    assert list(found) == list(model().types)
    assert done == list(np.cumsum([layer.nbytes for layer in model()._layers.values()]))
    assert found["last"] == convert.Converted("last", "GPTQ 4-bit", (33, 70), "exact", pack(SOME[2]).nbytes)
    assert found["experts"].nbytes == pyda8w4.stack([pack(weight) for weight in STACK]).nbytes
    assert found["odd"] == convert.Converted("odd", "F16", (3, 5, 7), "stored", 3 * 5 * 7 * 2)
    assert found["a quantized norm"] == convert.Converted("a quantized norm", "Q8_0", (48,), "float32", 48 * 4)


def test_the_description_is_that_of_the_documentation(converted):
    header, data = parts_of(converted)
    described = json.loads(header["__metadata__"]["checkpoint"])
    assert described["metadata"] == METADATA
    assert described["tensors"]["experts"] == {"type": "MXFP4", "shape": [3, 33, 70]}
    assert described["tensors"]["last"] == {"type": "GPTQ 4-bit", "shape": [33, 70]}
    crc32 = zlib.crc32(b"F16" + PLAIN["odd"][1].tobytes())
    assert described["tensors"]["odd"] == {"type": "F16", "shape": [3, 5, 7], "crc32": crc32}
    begin, end = header["odd"]["data_offsets"]
    assert data[begin:end] == PLAIN["odd"][1].tobytes()


def test_what_save_wrote_is_a_checkpoint(out):
    weights = {"a": pack(SOME[2]), "b": pack(KINDS[2])}
    pyda8w4.save(out, {**weights, "c": pyda8w4.stack([pack(SOME[2])] * 3)})
    found = open_checkpoint(out)
    assert (found.metadata, found.types) == ({}, {"a": "packed 4-bit", "b": "packed 5-bit", "c": "packed 4-bit"})
    assert found.shapes == {"a": (33, 70), "b": (65, 259), "c": (3, 33, 70)}
    for weight in found.stack("c"):
        assert_same_weight(weight, pack(SOME[2]))
    for name, weight in weights.items():
        assert_same_weight(found.packed(name), weight)
        assert_same_bits(found.array(name), weight.dequantize())


def test_a_checkpoint_without_tensors(out):
    convert.run(Checkpoint(Path("source"), {}, {}), out)
    assert open_checkpoint(out).types == {}


def test_a_gguf_file(out):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    path = out.with_suffix(".gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokens", ["a", "b"])
    writer.add_float32("epsilon", 1e-5)
    rng = np.random.default_rng(0)
    shapes = {"Q4_K": (3, 512), "Q8_0": (2, 3, 64), "MXFP4": (3, 64), "F16": (3, 5), "BF16": (2, 3, 4), "I32": (7,)}
    for name, shape in {**shapes, "Q5_0": (64,)}.items():
        kind = gguf.GGMLQuantizationType[name]
        data = rng.integers(0, 32, gguf.quant_shape_to_byte_shape(shape, kind), np.uint8)
        writer.add_tensor(f"blk.0.{name}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_checkpoint(path)
    how = {converted.type: converted.how for converted in convert.run(source, out)}
    assert how == {
        **dict.fromkeys(["Q4_K", "Q8_0", "MXFP4"], "exact"), **dict.fromkeys(["F16", "BF16", "I32"], "stored"),
        "Q5_0": "float32",
    }  # fmt: skip
    found = open_checkpoint(out)
    assert (found.metadata, found.shapes) == (source.metadata, source.shapes)
    assert list(found.types.items()) == list(source.types.items())
    for name in source.types:
        if not name.endswith("I32"):
            assert_same_bits(found.array(name), source.array(name), name)
    for name in ("blk.0.Q4_K", "blk.0.MXFP4"):
        assert_same_weight(found.packed(name), source.packed(name))
    for packed, expected in zip(found.stack("blk.0.Q8_0"), source.stack("blk.0.Q8_0"), strict=True):
        assert_same_weight(packed, expected)


# ---- what cannot be packed -------------------------------------------------------------------


def refusing():
    layers = {f"blk.{i}.up": floats(normal(32, 64), "IQ2_XS", refusal="its grid is no table") for i in range(3)}
    layers["blk.0.mlp"] = floats(normal(2, 32, 64), "IQ2_XS", refusal="its grid is no table")
    return Checkpoint(Path("source"), {}, {"fine": exact(SOME[2]), **layers, "head": plain("head", *PLAIN["stacked"])})


def test_refused_tensors_are_named_and_nothing_is_written(out):
    with pytest.raises(ValueError) as error:
        convert.run(refusing(), out)
    assert str(error.value) == (
        "source: it has what cannot be packed exactly: blk.*.up of IQ2_XS: its grid is no table (3 such); "
        "blk.*.mlp of IQ2_XS: its grid is no table"
    )
    assert not list(out.parent.iterdir())


def test_refused_tensors_are_quantized_where_that_is_wanted(out):
    found = {converted.name: converted for converted in convert.run(refusing(), out, requantize=True)}
    quantized_again = dict.fromkeys(["blk.0.up", "blk.1.up", "blk.2.up", "blk.0.mlp"], "quantized")
    assert {name: each.how for name, each in found.items()} == {"fine": "exact", **quantized_again, "head": "stored"}
    w = normal(32, 64)
    expected = pyda8w4.quantize(w, 32)
    back = open_checkpoint(out)
    assert_same_weight(back.packed("blk.1.up"), expected)
    assert back.types["blk.1.up"] == "4-bit, from IQ2_XS"
    assert back.stack("blk.0.mlp").shape == (2, 32, 64)
    w = normal(2, 32, 64)
    squares = [
        np.square(one.dequantize() - w[i]).sum() / np.square(w[i]).sum()
        for i, one in enumerate(back.stack("blk.0.mlp"))
    ]
    assert found["blk.0.mlp"].error == pytest.approx(max(squares) ** 0.5, rel=1e-5)
    w = normal(32, 64)
    error = np.sqrt(np.square(expected.dequantize() - w).sum() / np.square(w).sum())
    assert found["blk.1.up"].error == pytest.approx(error, rel=1e-5)
    assert found["fine"].error is None


def test_what_has_no_floats_is_refused_even_so(out):
    for layer in (
        Layer("IQ1_S", (32, 64), 10, (), refusal="who knows"),
        Layer("odd", (32,), 10, ()),
        Layer("Q4_0", (0, 32, 64), 0, (), read=lambda index: quantized(SOME[2])),
    ):
        with pytest.raises(ValueError, match=f"source: it has what cannot be packed exactly: bad of {layer.type}: "):
            convert.run(Checkpoint(Path("source"), {}, {"bad": layer}), out, requantize=True)
    assert not list(out.parent.iterdir())


def test_what_is_packed_is_not_converted(converted):
    with pytest.raises(ValueError, match=f"{converted}: it is packed already"):
        convert.run(open_checkpoint(converted), converted.parent / "again.safetensors")
    assert list(converted.parent.iterdir()) == [converted]


@pytest.mark.parametrize("requantize", [False, True])
def test_a_reason_that_shows_when_a_tensor_is_read(out, requantize):
    def damaged(index):
        raise ValueError("its scales are not finite")

    layer = replace(floats(normal(32, 64)), read=damaged)
    source = Checkpoint(Path("source"), {}, {"fine": exact(SOME[2]), "bad": layer})
    if requantize:
        (_, bad) = convert.run(source, out, requantize=True)
        assert bad.how == "quantized"
        assert open_checkpoint(out).types["bad"] == "4-bit, from Q8_0"
        return
    with pytest.raises(ValueError, match="source: bad of Q8_0 cannot be read: its scales are not finite"):
        convert.run(source, out)
    assert not list(out.parent.iterdir())


# ---- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("w", "w.codes"), ("w", "w.factors"), ("experts", "experts.sums")])
def test_names_that_collide_are_refused(out, names):
    layers = {"w": exact(SOME[2]), "experts": exact(*STACK)}
    layers = {names[0]: layers[names[0]]}
    layers[names[1]] = plain(names[1], "F32", normal(3))
    with pytest.raises(ValueError, match="source: weights must have names of which each gives tensors of its own, got"):
        convert.run(Checkpoint(Path("source"), {}, layers), out)
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_names_that_no_file_can_have(out, name):
    with pytest.raises(ValueError, match="source: weights must have names"):
        convert.run(Checkpoint(Path("source"), {}, {name: plain(name, "F32", normal(3))}), out)
    assert not list(out.parent.iterdir())


def test_metadata_that_is_nested_too_deeply(out):
    deep = []
    for _ in range(100000):
        deep = [deep]
    with pytest.raises(ValueError, match="source: "):
        convert.run(Checkpoint(Path("source"), {"deep": deep}, {"w": exact(SOME[2])}), out)
    assert not list(out.parent.iterdir())


# ---- interruptions ---------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), ValueError])
@pytest.mark.parametrize("exists", [False, True])
def test_what_ends_early_leaves_what_was_there(out, error, exists):
    if exists:
        out.write_bytes(b"old")
    calls = []

    def progress(done):
        calls.append(done)
        if len(calls) == 5:
            raise error

    with pytest.raises(error if isinstance(error, type) else OSError):
        convert.run(model(), out, progress=progress)
    assert [path.name for path in out.parent.iterdir()] == ["out.safetensors"] * exists
    assert not exists or out.read_bytes() == b"old"


def test_a_file_that_is_replaced_is_whole(out):
    convert.run(Checkpoint(Path("source"), {}, {"w": exact(SOME[2])}), out)
    old = open_checkpoint(out)
    convert.run(model(), out)
    assert_same_weight(old.packed("w"), pack(SOME[2]))
    assert "experts" in open_checkpoint(out).types
    assert list(out.parent.iterdir()) == [out]


MANY_LAYERS = """
import resource, sys
from pathlib import Path
import numpy as np
from pyda8w4 import convert
from pyda8w4.checkpoints import Checkpoint
from pyda8w4.formats import QuantizedWeight
from pyda8w4.formats._layer import Layer
import pyda8w4

# The zero points of a matrix, 33 KB, are no multiple of 64 bytes, nor is a matrix of floats.
N, K, COUNT = 992, 1056, int(sys.argv[2])
pyda8w4.set_num_threads(1)

def read(index):
    rng = np.random.default_rng(0)
    zps = rng.integers(0, 15, (N, K // 32), np.int8)
    return QuantizedWeight(rng.integers(0, 15, (N, K), np.uint8), np.ones((N, K // 32), np.float32), zps)

def floats(index):
    return np.ones((1023, 513), np.float32)

layers = {}
for i in range(COUNT):
    layers[f"layers.{i}.w"] = Layer("GPTQ 4-bit", (N, K), 1, (), read=read)
    layers[f"layers.{i}.experts"] = Layer("GPTQ 4-bit", (4, N, K), 1, (), read=read)
    layers[f"layers.{i}.embed"] = Layer("Q8_0", (1023, 513), 1, (), floats=floats)
convert.run(Checkpoint(Path("source"), {}, layers), sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_is_that_of_one_layer(out):
    def peak(count):
        command = [sys.executable, "-c", MANY_LAYERS, str(out), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return int(done.stdout), out.stat().st_size

    (few, small), (many, large) = peak(2), peak(40)
    assert large - small > 150 << 20
    assert many - few < 10 << 10  # KiB


# ---- damaged files ---------------------------------------------------------------------------


def parts_of(file):
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(file, header, data):
    """With the checksums of the descriptions made right, so that what lies behind them is reached."""
    metadata = header["__metadata__"]
    for name in ("weights", "checkpoint"):
        if name in metadata:
            metadata[f"{name}_crc32"] = str(zlib.crc32(metadata[name].encode()))
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    "name", ["last.codes", "last.sums", "experts.scales", "experts.zps", "norm.weight", "odd, quantized"]
)
def test_a_flipped_bit_is_found_when_the_tensor_is_requested(converted, name):
    header, data = parts_of(converted)
    begin, end = header[name]["data_offsets"]
    for at in (begin, end - 1):
        changed = bytearray(data)
        changed[at] ^= 4
        write(converted, header, bytes(changed))
        found = open_checkpoint(converted)
        with pytest.raises(ValueError) as error:
            found.array(name if name in found.types else name.rpartition(".")[0])
        assert str(error.value).startswith(f"{converted}: ")
        assert f"{name} is damaged: it does not have its checksum" in str(error.value)


@pytest.mark.parametrize("old, new", [("MXFP4", "MXFP5"), ("llama", "lamma"), ("33, 70", "70, 33")])
def test_a_changed_description_is_found(converted, old, new):
    whole = converted.read_bytes()
    at = whole.index(b'"checkpoint"')
    assert old.encode() in whole[at:]
    converted.write_bytes(whole[:at] + whole[at:].replace(old.encode(), new.encode(), 1))
    with pytest.raises(ValueError, match=f"{converted}: it is damaged: its list of checkpoint does not have its"):
        open_checkpoint(converted)


@pytest.mark.pitfall("general", "hostile header")
@pytest.mark.parametrize(
    "name, fields",
    [
        ("last", None),
        ("last", []),
        ("last", "type shape"),
        ("last", {}),
        ("last", {"type": "Q4_0"}),
        ("last", {"type": 4, "shape": [33, 70]}),
        ("last", {"type": "Q4_0", "shape": "33"}),
        ("last", {"type": "Q4_0", "shape": [33.0, 70]}),
        ("last", {"type": "Q4_0", "shape": [70, 33]}),
        ("last", {"type": "Q4_0", "shape": [33]}),
        ("last", {"type": "Q4_0", "shape": []}),
        ("last", {"type": "Q4_0", "shape": [1, 33, 70]}),
        ("last", {"type": "Q4_0", "shape": [33, 70], "crc32": 1}),
        ("experts", {"type": "Q4_0", "shape": [2**62, 33, 70]}),
        ("experts", {"type": "Q4_0", "shape": [4, 33, 70]}),
        ("experts", {"type": "Q4_0", "shape": [0, 33, 70]}),
        ("experts", {"type": "Q4_0", "shape": [-1, 33, 70]}),
        ("experts", {"type": "Q4_0", "shape": [3, 70, 33]}),
        ("experts", {"type": "Q4_0", "shape": [33, 70]}),
        ("odd", {"type": "F16", "shape": [3, 5, 7]}),
        ("odd", {"type": "F16", "shape": [5, 7]}),
        ("odd", {"type": "F16", "shape": [105], "crc32": 1}),
        ("nowhere", {"type": "F16", "shape": [3], "crc32": 1}),
    ],
    ids=str,
)
def test_a_description_that_fits_no_tensor_is_refused(converted, name, fields):
    header, data = parts_of(converted)
    described = json.loads(header["__metadata__"]["checkpoint"])
    described["tensors"][name] = fields
    header["__metadata__"]["checkpoint"] = json.dumps(described)
    write(converted, header, data)
    with pytest.raises(ValueError, match=str(converted)):
        open_checkpoint(converted)
    assert "last" in pyda8w4.load(converted)


@pytest.mark.pitfall("general", "hostile header")
@pytest.mark.parametrize(
    "text",
    ["", "3", "[]", "{", "{}", '{"metadata": 1, "tensors": {}}', '{"metadata": {}, "tensors": []}', "[" * 100000,
     '{"metadata": {}, "tensors": {}, "tensors": {}}'],
)  # fmt: skip
def test_a_list_of_tensors_that_is_none_is_refused(converted, text):
    header, data = parts_of(converted)
    header["__metadata__"]["checkpoint"] = text
    write(converted, header, data)
    with pytest.raises(ValueError, match=str(converted)):
        open_checkpoint(converted)


@pytest.mark.pitfall("general", "hostile header")
@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "I16"},
        {"dtype": "F9"},
        {"dtype": 3},
        {"shape": [3, 5, 8]},
        {"shape": [2**70]},
        {"data_offsets": [0, 2**70]},
        {"data_offsets": None},
    ],
    ids=str,
)
def test_a_tensor_that_lies_is_refused(converted, change):
    header, data = parts_of(converted)
    header["odd"] = {**header["odd"], **change}
    write(converted, header, data)
    with pytest.raises(ValueError, match=str(converted)) as error:
        open_checkpoint(converted).array("odd")
    assert "data_offsets" in change or "odd" in str(error.value)


def test_a_tensor_of_another_type_is_found(converted):
    header, data = parts_of(converted)
    header["odd"]["dtype"] = "BF16"
    write(converted, header, data)
    with pytest.raises(ValueError, match="odd is damaged: it does not have its checksum"):
        open_checkpoint(converted).array("odd")


def test_other_safetensors_files_are_refused(out):
    from safetensors.numpy import save_file

    save_file({"w": normal(3)}, out)
    with pytest.raises(ValueError, match=f"{out}: it must hold layout da8w4-n32k4"):
        open_checkpoint(out)
