"""GGUF files: what they have is found, in one file or in several parts, and what is wrong with them is named."""

import os
import re
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from cases import assert_same_bits, assert_same_weight

import pyda8w4
from pyda8w4.checkpoints import _checkpoint
from pyda8w4.checkpoints import open as open_checkpoint

ggml = pytest.importorskip("gguf", reason="gguf is not installed")
from pyda8w4.formats import gguf

Q = ggml.GGMLQuantizationType
N, K = 40, 320


def random_blocks(kind, shape=(N, K), seed=0):
    """A random matrix, or a stack of them, in a type that the package can write."""
    return ggml.quantize(np.random.default_rng(seed).standard_normal(shape, np.float32), kind)


def small_blocks(kind, *shape, seed=0):
    """Of any type: random bytes, of which small ones make scales that are finite."""
    return np.random.default_rng(seed).integers(0, 64, ggml.quant_shape_to_byte_shape(shape, kind), np.uint8)


def write(path, *tensors, **metadata):
    writer = ggml.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        writer.add_key_value(key, *value)
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def one(tmp_path):
    """Makes a file of one tensor, w."""
    return lambda data, kind: open_checkpoint(write(tmp_path / "one.gguf", ("w", data, kind)))


def test_vectors_and_metadata(tmp_path):
    norm = np.arange(7, dtype=np.float32)
    values = {
        "an.int": (-3, ggml.GGUFValueType.INT16),
        "a.float": (0.5, ggml.GGUFValueType.FLOAT32),
        "a.flag": (True, ggml.GGUFValueType.BOOL),
        "some.text": ("Straße", ggml.GGUFValueType.STRING),
        "words": (["a", "", "日"], ggml.GGUFValueType.ARRAY),
        "numbers": ([1, 2, 3], ggml.GGUFValueType.ARRAY),
    }
    q4_0 = ("w", random_blocks(Q.Q4_0), Q.Q4_0)
    file = open_checkpoint(write(tmp_path / "model.gguf", ("norm", norm, Q.F32), q4_0, **values))
    expected = {"general.architecture": "llama", **{key: value for key, (value, _) in values.items()}}
    assert file.metadata == expected
    assert file.types == {"norm": "F32", "w": "Q4_0"}
    array = file.array("norm")
    np.testing.assert_array_equal(array, norm)
    array += 1  # the caller's own
    np.testing.assert_array_equal(file.array("norm"), norm)


# ---- types ---------------------------------------------------------------------------------------

EXACT = [Q[name] for name in gguf.TYPES if name in Q.__members__]
WITH_VECTORS = [Q.IQ1_S, Q.IQ1_M, Q.IQ2_XXS, Q.IQ2_XS, Q.IQ2_S, Q.IQ3_XXS, Q.IQ3_S]


def alike(kind, *shape):
    """Of any type: all bytes are 33, which makes small scales."""
    return np.full(ggml.quant_shape_to_byte_shape(shape, kind), 33, np.uint8)


@pytest.mark.parametrize("kind", EXACT, ids=str)
def test_large_matrices_are_packed_by_parts(one, kind, monkeypatch):
    """Of 64 rows here, the last of 40."""
    try:
        data = random_blocks(kind, (168, 512))
    except NotImplementedError:
        data = np.concatenate([alike(kind, 68, 512), alike(kind, 100, 512) // 2])
    file = one(data, kind)
    whole = file.packed("w")
    monkeypatch.setattr(_checkpoint, "_PART", 100 * 512)
    assert_same_weight(file.packed("w"), whole)


def test_packing_takes_little_memory_beside_the_result(one):
    file = one(np.tile(random_blocks(Q.Q8_0, (256, 1024)), (128, 1)), Q.Q8_0)  # 32 MiB of codes
    tracemalloc.start()
    file.packed("w")  # which is not traced
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12 << 20


@pytest.mark.parametrize("kind", EXACT, ids=str)
def test_exact_types(one, kind):
    data = alike(kind, 3, 512)
    file = one(data, kind)
    assert (file.types, file.shapes) == ({"w": kind.name}, {"w": (3, 512)})
    expected = gguf.unpack(data, kind.name).pack()
    assert expected.dequantize().any()
    assert_same_weight(file.packed("w"), expected)
    assert_same_weight(file.packed("w", requantize=True), expected)
    assert_same_weight(file.weight("w").pack(), expected)
    assert_same_bits(file.array("w"), expected.dequantize())


@pytest.mark.parametrize("kind", EXACT, ids=str)
def test_the_packed_size_is_known(one, kind):
    file = one(alike(kind, 3, 512), kind)
    layer = file._layers["w"]
    assert layer.packed_nbytes == file.packed("w").nbytes
    assert layer.nbytes == alike(kind, 3, 512).nbytes
    assert (layer.refusal, layer.tensors) == (None, ("w",))
    if kind.name == "Q4_K":
        stack = one(alike(kind, 2, 3, 512), kind)
        assert stack._layers["w"].packed_nbytes == 2 * layer.packed_nbytes


@pytest.mark.parametrize("kind", WITH_VECTORS, ids=str)
def test_codebooks_of_vectors_are_refused(one, kind):
    data = alike(kind, 3, 512)
    file = one(data, kind)
    reason = f"w of {kind.name} cannot be packed exactly: its codes stand for vectors of a codebook; requantize=True"
    with pytest.raises(ValueError, match=reason):
        file.packed("w")
    expected = ggml.dequantize(data, kind)
    assert expected.any()
    assert_same_bits(file.array("w"), expected)
    with pytest.warns(UserWarning, match=f"w of {kind.name} was quantized to 4 bits"):
        packed = file.packed("w", requantize=True)
    for part, wanted in zip(packed.unpack(), pyda8w4.quantize_weight(expected, 32)):
        assert_same_bits(part, wanted)


@pytest.mark.parametrize("kind", [Q.Q8_1, Q.Q8_K], ids=str)
def test_types_of_activations_are_refused(one, kind):
    file = one(alike(kind, 3, 512), kind)
    with pytest.raises(ValueError, match=f"w of {kind.name} cannot be packed exactly: ggml has the type for act"):
        file.packed("w")
    for read in (file.array, lambda name: file.packed(name, requantize=True)):
        with pytest.raises(ValueError, match=f"w of {kind.name} cannot be dequantized: Dequantization for {kind.name}"):
            read("w")


@pytest.mark.parametrize("kind", [Q.I8, Q.I16, Q.I32, Q.I64], ids=str)
def test_integers_are_refused(one, kind):
    file = one(np.ones((2, 32), {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[alike(kind, 1).size]), kind)
    for read in (file.array, file.packed, lambda name: file.packed(name, requantize=True)):
        with pytest.raises(ValueError, match=f"w of {kind.name} cannot be .*: its elements are integers$"):
            read("w")


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.F64], ids=str)
def test_floats(one, kind):
    w = np.random.default_rng(2).standard_normal((2, 3, 40), np.float32)
    w = (w.view(np.uint32) & 0xFFFF0000).view(np.float32)  # of few enough digits for bfloat16
    data = {
        Q.F32: w,
        Q.F16: w.astype(np.float16),
        Q.BF16: (w.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8),
        Q.F64: w.astype(np.float64),
    }[kind]
    expected = w.astype(np.float16).astype(np.float32) if kind == Q.F16 else w
    stack = one(data, kind)
    assert (stack.types, stack.shapes) == ({"w": kind.name}, {"w": (2, 3, 40)})
    assert_same_bits(stack.array("w"), expected)
    stack.array("w")[...] = 0  # the caller's own
    assert_same_bits(stack.array("w"), expected)
    matrix = one(data[0], kind)
    assert_same_bits(matrix.array("w"), expected[0])
    with pytest.raises(ValueError, match=f"w of {kind.name} cannot be packed exactly: it is not quantized; requanti"):
        matrix.packed("w")
    with pytest.warns(UserWarning, match=f"w of {kind.name} was quantized to 4 bits in groups of 32"):
        packed = matrix.packed("w", requantize=True)
    for part, wanted in zip(packed.unpack(), pyda8w4.quantize_weight(expected[0], 32)):
        assert_same_bits(part, wanted)


def test_quantized_vectors_are_no_matrices(one):
    data = random_blocks(Q.Q8_0, (64,))
    file = one(data, Q.Q8_0)
    assert_same_bits(file.array("w"), ggml.dequantize(data, Q.Q8_0))
    with pytest.raises(ValueError, match=r"name must be of a matrix, got w of shape \(64,\)"):
        file.packed("w")
    with pytest.raises(ValueError, match="w of Q8_0 cannot be packed exactly: it is no matrix"):
        file.weight("w")


@pytest.mark.parametrize("kind", [Q.Q4_0, Q.F32, Q.F64, Q.IQ3_S], ids=str)
@pytest.mark.parametrize("shape", [(0, 512), (2, 0, 512), (0, 2, 512), (1 << 62, 0, 0)])
def test_a_tensor_without_elements(tmp_path, kind, shape):
    path = write(tmp_path / "model.gguf", ("w", np.ones((2, 1, 512), np.float32), Q.F32))
    file = path.read_bytes()
    at = file.index(b"\1\0\0\0\0\0\0\0w") + 9
    dimensions = struct.pack(f"<I{len(shape)}QI", len(shape), *shape[::-1], kind)
    path.write_bytes(file[:at] + dimensions + file[at + 4 + 3 * 8 + 4 :])
    checkpoint = open_checkpoint(path)
    assert checkpoint.shapes == {"w": shape}
    for read in (checkpoint.array, checkpoint.weight, checkpoint.stack if len(shape) == 3 else checkpoint.packed):
        with pytest.raises(ValueError, match=rf"{path}: w of {kind.name} cannot be .*: it has no elements"):
            read("w")


# ---- stacks --------------------------------------------------------------------------------------


def test_stacks(one):
    data = random_blocks(Q.Q4_0, (4, 5, 64))
    file = one(data, Q.Q4_0)
    assert file.shapes == {"w": (4, 5, 64)}
    assert_same_bits(file.array("w"), ggml.dequantize(data, Q.Q4_0))
    experts = file.stack("w")
    assert type(experts) is pyda8w4.PackedExperts and experts.shape == (4, 5, 64)
    for index, expert in enumerate(experts):
        expected = gguf.unpack(data[index], "Q4_0").pack()
        assert_same_weight(expert, expected)
        assert_same_weight(file.weight("w", index).pack(), expected)
    with pytest.raises(ValueError, match=r"index must be of a matrix of w of shape \(4, 5, 64\), got 4"):
        file.weight("w", 4)


@pytest.mark.parametrize("kind", EXACT, ids=str)
def test_stacks_have_the_numbers_of_the_format(one, kind):
    """As the package reads them; and experts whose scales are packed in different types are stacked."""
    data = small_blocks(kind, 3, 5, 512)
    file = one(data, kind)
    experts = file.stack("w")
    assert experts.shape == (3, 5, 512)
    for expert, index in zip(experts, range(3), strict=True):
        assert_same_bits(expert.dequantize(), gguf.unpack(data[index], kind.name).pack().dequantize())
    try:
        want = ggml.dequantize(data, kind)
    except NotImplementedError:
        return
    np.testing.assert_array_equal(np.stack([expert.dequantize() for expert in experts]), want)


@pytest.mark.parametrize("n", [5, 64])
def test_gates_and_ups_of_two_stacks_are_joined(tmp_path, n):
    gates, ups = small_blocks(Q.Q4_K, 3, n, 512), small_blocks(Q.Q4_K, 3, n + 2, 512, seed=1)
    file = open_checkpoint(write(tmp_path / "model.gguf", ("gate", gates, Q.Q4_K), ("up", ups, Q.Q4_K)))
    experts = file.stack("gate", "up")
    assert experts.shape == (3, 2 * n + 2, 512)
    for index, expert in enumerate(experts):
        parts = [gguf.unpack(data[index], "Q4_K").pack() for data in (gates, ups)]
        assert_same_weight(expert, pyda8w4.concat(parts))
        want = np.concatenate([ggml.dequantize(data[index], Q.Q4_K) for data in (gates, ups)])
        np.testing.assert_array_equal(expert.dequantize(), want)


def test_one_matrix_of_a_stack(tmp_path):
    path = write(tmp_path / "model.gguf", ("gate", small_blocks(Q.Q4_K, 3, 5, 512), Q.Q4_K))
    file = open_checkpoint(path)
    for index, expert in enumerate(file.stack("gate")):
        assert_same_weight(file.packed("gate", index), expert)
    with pytest.raises(ValueError, match=f"^{path}: index must be of a matrix of gate of shape .*, got 3"):
        file.packed("gate", 3)
    with pytest.raises(TypeError, match="index must be an int, got str"):
        file.packed("gate", "0")
    with pytest.raises(ValueError, match=f"^{path}: name must be of a matrix, got gate .*; stack takes it"):
        file.packed("gate")


def test_stacks_that_cannot_be_joined(tmp_path):
    stacks = [("gate", (3, 5, 512), Q.Q4_K), ("up", (3, 5, 512), Q.Q6_K), ("down", (2, 5, 512), Q.Q4_K)]
    stacks.append(("one", (5, 512), Q.Q4_K))
    path = write(tmp_path / "model.gguf", *((name, small_blocks(kind, *shape), kind) for name, shape, kind in stacks))
    file = open_checkpoint(path)
    for names, message in (
        (("gate", "up"), r"gate and up cannot be joined: weights\[1\] must have group_size = 32 like weights\[0\]"),
        (("gate", "down"), "names must be of equally many experts, got 3 and 2"),
        (("gate", ["one"]), "names must be of equally many experts, got 3 and 1"),
        (("gate", "one"), r"names must be of a stack \(E, N, K\), got one of shape \(5, 512\)"),
        ((["one", "gate"],), r"name must be of a matrix, got gate of shape \(3, 5, 512\); stack takes it"),
        ((), "names must be of at least one stack, got none"),
    ):
        with pytest.raises(ValueError, match=f"^{path}: {message}"):
            file.stack(*names)


MANY_EXPERTS = """
import resource, sys
import pyda8w4.checkpoints
pyda8w4.set_num_threads(1)
file = pyda8w4.checkpoints.open(sys.argv[1])
file.stack("few", "few")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
experts = file.stack("many", "many")
print(experts.nbytes >> 10, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.process
def test_stacking_takes_the_memory_of_the_result(tmp_path):
    """And of one expert, which comes again."""
    one = random_blocks(Q.Q4_0, (1024, 2048))
    tensors = [(name, np.stack([one] * count), Q.Q4_0) for name, count in (("few", 2), ("many", 48))]
    path = write(tmp_path / "model.gguf", *tensors)
    done = subprocess.run([sys.executable, "-c", MANY_EXPERTS, path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    size, more = map(int, done.stdout.split())
    assert size > 96 << 10  # KiB
    assert more < size + (12 << 10)


def test_an_expert_is_read_alone(one):
    data = alike(Q.MXFP4, 3, 5, 64)
    data[1, 4, 17] = 255  # NaN
    file = one(data, Q.MXFP4)
    for index in (0, 2):
        assert_same_weight(file.weight("w", index).pack(), gguf.unpack(data[index], "MXFP4").pack())
    for read in (lambda: file.weight("w", 1), lambda: file.stack("w"), lambda: file.array("w")):
        with pytest.raises(ValueError, match=r"one.gguf: w of MXFP4 cannot be .*: scales must be finite"):
            read()


# ---- parts ---------------------------------------------------------------------------------------

TENSORS = [(f"w{i}", random_blocks(Q.Q4_0, seed=i), Q.Q4_0) for i in range(5)]


def split_file(folder, name="model"):
    """In parts of two tensors, as the package writes them."""
    writer = ggml.GGUFWriter(folder / f"{name}.gguf", "llama", split_max_tensors=2)
    writer.add_uint32("llama.block_count", 5)
    for each, data, kind in TENSORS:
        writer.add_tensor(each, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob(f"{name}-*.gguf"))


def test_parts_are_found_from_any_of_them(tmp_path):
    parts = split_file(tmp_path)
    split_file(tmp_path, "other")
    assert [part.name for part in parts] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for part in parts:
        file = open_checkpoint(part)
        assert list(file.types) == [f"w{i}" for i in range(5)]
        assert file.metadata["llama.block_count"] == 5
        assert file.metadata["split.no"] == 0
        for name, data, _ in TENSORS:
            assert_same_weight(file.packed(name), gguf.unpack(data, "Q4_0").pack())


@pytest.mark.parametrize("lost", range(3))
def test_a_part_that_is_missing(tmp_path, lost):
    parts = split_file(tmp_path)
    parts.pop(lost).unlink()
    for part in parts:
        with pytest.raises(ValueError, match=f"model-0000{lost + 1}-of-00003.gguf is missing: {part.name} is one of 3"):
            open_checkpoint(part)


def test_a_part_that_is_another(tmp_path):
    first, second, third = split_file(tmp_path)
    second.write_bytes(third.read_bytes())
    for part in (first, third):
        with pytest.raises(ValueError, match=rf"{second} must have split.no and split.count \(1, 3\), got \(2, 3\)"):
            open_checkpoint(part)
    with pytest.raises(ValueError, match=rf"{second}: its name must end in -00003-of-00003.gguf"):
        open_checkpoint(second)


def test_a_part_under_another_name(tmp_path):
    part = split_file(tmp_path)[0].rename(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=rf"{part}: its name must end in -00001-of-00003.gguf"):
        open_checkpoint(part)


def test_a_part_that_is_no_file_of_gguf(tmp_path):
    first, second, _ = split_file(tmp_path)
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"path must be a GGUF file, got '{second}': its tensor 'w3': it ends too"):
        open_checkpoint(first)


def test_a_part_of_another_model(tmp_path):
    first, second, _ = split_file(tmp_path)
    values = {"split.no": (1, ggml.GGUFValueType.UINT16), "split.count": (3, ggml.GGUFValueType.UINT16)}
    write(second, TENSORS[2], TENSORS[0], **values)
    with pytest.raises(ValueError, match=f"{second}: its tensor 'w0' is in another part, too"):
        open_checkpoint(first)
    write(second, TENSORS[2], **values)
    with pytest.raises(ValueError, match=f"{first}: its parts must have 5 tensors, got 4"):
        open_checkpoint(first)


@pytest.mark.parametrize("no, count", [(3, 3), (1, 0), (-1, 3), (None, 3), ("0", 3), (True, 3), (0, "3"), (0, -1)])
def test_numbers_of_parts_that_are_none(tmp_path, no, count):
    kinds = {bool: ggml.GGUFValueType.BOOL, int: ggml.GGUFValueType.INT32, str: ggml.GGUFValueType.STRING}
    values = {"split.no": no, "split.count": count}
    values = {key: (value, kinds[type(value)]) for key, value in values.items() if value is not None}
    path = write(tmp_path / "model-00001-of-00003.gguf", TENSORS[0], **values)
    message = f"{path}: its split.no must be from 0 to split.count - 1, got {no!r} and {count!r}"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(path)


def test_one_part_of_one(tmp_path):
    values = {"split.no": (0, ggml.GGUFValueType.UINT16), "split.count": (1, ggml.GGUFValueType.UINT16)}
    file = open_checkpoint(write(tmp_path / "any name", TENSORS[0], **values))
    assert file.types == {"w0": "Q4_0"}


# ---- files that are damaged -----------------------------------------------------------------------


def test_a_file_that_is_cut_off(tmp_path):
    whole = write(
        tmp_path / "whole.gguf", ("w", random_blocks(Q.Q4_0), Q.Q4_0), words=(["a", "b"], ggml.GGUFValueType.ARRAY)
    )
    data = whole.read_bytes()
    end = random_blocks(Q.Q4_0).nbytes
    size = data.index(b"words")
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, size + 100, 7), len(data) - end, len(data) - 32]:
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match="path must be a GGUF file"):
            open_checkpoint(cut)


@pytest.mark.parametrize(
    "at, value, message", [(0, b"GGML", "begin"), (4, b"\0\0\0\3", "little-endian"), (4, b"\1\0\0\0", "not 1")]
)
def test_other_files(tmp_path, at, value, message):
    path = write(tmp_path / "model.gguf", ("w", random_blocks(Q.Q4_0), Q.Q4_0))
    data = bytearray(path.read_bytes())
    data[at : at + 4] = value
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(path)


def test_a_type_that_is_not_known(tmp_path):
    path = write(tmp_path / "model.gguf", ("w", random_blocks(Q.Q4_0), Q.Q4_0))
    data = bytearray(path.read_bytes())
    at = data.index(b"\1\0\0\0\0\0\0\0w") + 9 + 4 + 2 * 8
    assert data[at] == Q.Q4_0
    data[at] = 199
    path.write_bytes(data)
    with pytest.raises(ValueError, match="199"):
        open_checkpoint(path)


def test_arrays_of_arrays_of_arrays(tmp_path):
    data = write(tmp_path / "model.gguf", ("w", random_blocks(Q.Q4_0), Q.Q4_0)).read_bytes()
    at = data.index(b"general.architecture") + len("general.architecture")
    path = tmp_path / "nested.gguf"
    path.write_bytes(data[:at] + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100000 + data[at + 4 :])
    with pytest.raises(ValueError, match="recursion"):
        open_checkpoint(path)


@pytest.mark.parametrize("alignment", [0, "32"])
def test_an_alignment_that_is_none(tmp_path, alignment):
    kind = ggml.GGUFValueType.STRING if isinstance(alignment, str) else ggml.GGUFValueType.UINT32
    changed = {"general.alignment": (alignment, kind)}
    path = write(tmp_path / "model.gguf", ("w", random_blocks(Q.Q4_0), Q.Q4_0), **changed)
    with pytest.raises(ValueError, match=f"its alignment is {alignment!r}"):
        open_checkpoint(path)


def test_a_tensor_without_dimensions(tmp_path):
    path = write(tmp_path / "model.gguf", ("w", np.ones(32, np.float32), Q.F32))
    data = bytearray(path.read_bytes())
    at = data.index(b"\1\0\0\0\0\0\0\0w") + 9
    del data[at + 4 : at + 12]
    data[at] = 0
    path.write_bytes(data)
    with pytest.raises(ValueError, match="tensor 'w' must have 1 to 4 dimensions, got 0"):
        open_checkpoint(path)


@pytest.mark.parametrize("dimensions", [5, 64, 2**32 - 1])
def test_a_tensor_of_many_dimensions(tmp_path, dimensions):
    path = write(tmp_path / "model.gguf", ("w", np.ones(32, np.float32), Q.F32))
    data = bytearray(path.read_bytes())
    at = data.index(b"\1\0\0\0\0\0\0\0w") + 9
    data[at : at + 4] = struct.pack("<I", dimensions)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"tensor 'w' must have 1 to 4 dimensions, got {dimensions}"):
        open_checkpoint(path)


@pytest.mark.parametrize("shape", [(0, 1 << 63), (0, 2**64 - 2), (1 << 63, 0), (0, 1 << 62)])
def test_dimensions_that_no_array_has(tmp_path, shape):
    path = write(tmp_path / "model.gguf", ("w", np.ones((1, 32), np.float32), Q.F32))
    data = bytearray(path.read_bytes())
    at = data.index(b"\1\0\0\0\0\0\0\0w") + 9 + 4
    data[at : at + 16] = struct.pack("<QQ", *shape[::-1])
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"its tensor 'w': it is too large: \("):
        open_checkpoint(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "nothing.gguf")


# ---- errors name the file and the tensor -------------------------------------------------------


def header_with_twice(path, what):
    """With the first value, or the only tensor, given a second time."""
    data = path.read_bytes()
    (tensors, values) = struct.unpack("<QQ", data[8:24])
    if what == "value":
        key = b"general.architecture"
        end = data.index(key) + len(key) + 4 + 8 + len("llama")
        return data[:8] + struct.pack("<QQ", tensors, values + 1) + data[24:end] + data[24:end] + data[end:]
    begin = data.index(b"\1\0\0\0\0\0\0\0w")
    end = begin + 9 + 4 + 2 * 8 + 4 + 8
    return data[:8] + struct.pack("<QQ", tensors + 1, values) + data[24:end] + data[begin:end] + data[end:]


@pytest.mark.parametrize("what, name", [("value", "general.architecture"), ("tensor", "w")])
def test_a_name_that_comes_twice(tmp_path, what, name):
    path = write(tmp_path / "model.gguf", ("w", random_blocks(Q.Q4_0), Q.Q4_0))
    path.write_bytes(header_with_twice(path, what))
    with pytest.raises(ValueError, match=rf"path must be a GGUF file, got '{path}': it has a {what} '{name}' twice"):
        open_checkpoint(path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(one, tmp_path, dtype, value):
    w = np.ones((3, 64), dtype)
    w[1, 5] = value
    kind = {np.float32: Q.F32, np.float16: Q.F16, np.float64: Q.F64}[dtype]
    file = one(w, kind)
    with pytest.raises(ValueError, match=rf"{tmp_path}/one.gguf: w of {kind.name} cannot be quantized: .*finite"):
        file.packed("w", requantize=True)
    np.testing.assert_array_equal(file.array("w"), w.astype(np.float32))


def test_values_that_are_too_large(one):
    w = np.full((3, 64), 3e38, np.float32)
    w[:, ::2] *= -1
    with pytest.raises(ValueError, match=r"one.gguf: w of F32 cannot be quantized: .*range"):
        one(w, Q.F32).packed("w", requantize=True)


@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q4_1, Q.Q8_0], ids=str)
def test_scales_that_are_not_finite(one, kind):
    data = random_blocks(kind)
    data[7, :2] = np.array([np.nan], "<f2").view(np.uint8)
    file = one(data, kind)
    for read in (file.packed, lambda name: file.packed(name, requantize=True), file.array):
        with pytest.raises(ValueError, match=rf"one.gguf: w of {kind.name} cannot be .*: scales must be finite"):
            read("w")


def test_float64(one):
    w = np.random.default_rng(3).standard_normal((N, K)) * np.logspace(-300, 30, K)
    array = one(w, Q.F64).array("w")
    assert_same_bits(array, w.astype(np.float32))
    array += 1  # the caller's own
    large = np.array([[1e300, -1e300, 1.0, 1e-320] * 8])
    np.testing.assert_array_equal(one(large, Q.F64).array("w"), [[np.inf, -np.inf, 1, 0] * 8])


def test_every_error_names_file_and_tensor(tmp_path):
    path = write(
        tmp_path / "model.gguf",
        ("norm", np.ones(32, np.float32), Q.F32),
        ("odd", np.ones((2, 40), np.float32), Q.F32),
        ("ints", np.ones((2, 32), np.int32), Q.I32),
    )
    file = open_checkpoint(path)
    calls = [(file.array, "nothing"), (file.packed, "nothing"), (file.packed, "norm"), (file.array, "ints")]
    calls += [(file.packed, "ints"), (file.packed, "odd"), (file.weight, "odd"), (file.stack, "odd")]
    for read, name in calls:
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: .*\b{name}\b"):
            read(name)
    whole = path.read_bytes()
    for change in (lambda data: data[:-40], lambda data: data.replace(b"ints\2\0\0\0 ", b"ints\2\0\0\0\xff", 1)):
        path.write_bytes(change(whole))
        assert path.read_bytes() != whole
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))}.*its tensor 'ints': it ends too early"):
            open_checkpoint(os.fspath(path))


@pytest.mark.parametrize("path", [None, 3, b"model.gguf"])
def test_a_path_that_is_none(path):
    with pytest.raises(TypeError, match="path must be a str or path-like"):
        open_checkpoint(path)


def test_the_package_that_is_missing(tmp_path):
    path = write(tmp_path / "model.gguf", TENSORS[0])
    code = """
import sys
sys.modules["gguf"] = None
import pyda8w4.checkpoints, pyda8w4.formats.gguf
pyda8w4.checkpoints.open(sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    expected = "ImportError: GGUF files need the package gguf: pip install 'pyda8w4[gguf]'"
    assert done.stderr.splitlines()[-1] == expected
