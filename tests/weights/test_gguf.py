"""Weights from GGUF files: what they stand for is what ggml says they do, exactly."""

import os
import re
import struct

import numpy as np
import pytest
from cases import (
    assert_same_bits,
)

from pyda8w4 import linear, reference

ggml = pytest.importorskip("gguf", reason="gguf is not installed")
import pyda8w4.gguf

Q = ggml.GGMLQuantizationType
N, K = 40, 320


def random_blocks(kind, n=N, k=K, seed=0):
    """Rows of any bytes, but for finite scales: the float16 at places that depend on the type."""
    rng = np.random.default_rng(seed)
    block, size = ggml.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (n, k // block, size), np.uint8)
    halves = {Q.Q4_0: [0], Q.Q4_1: [0, 2], Q.Q8_0: [0], Q.Q6_K: [208]}[kind]
    for at in halves:
        scales = rng.standard_normal((n, k // block, 1)).astype("<f2")
        data[:, :, at : at + 2] = scales.view(np.uint8)
    return data.reshape(n, -1)


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
    return lambda data, kind: pyda8w4.gguf.File(write(tmp_path / "one.gguf", ("w", data, kind)))


def unpacked(packed):
    """The weights as float64, and what the reference takes."""
    codes, scales, zps, *offsets = packed.unpack()
    size = packed.group_size
    codes64 = codes.astype(np.float64)
    spread = [np.repeat(part.astype(np.float64), size, axis=1)[:, : codes.shape[1]] for part in (scales, zps, *offsets)]
    w = (codes64 - spread[1]) * spread[0]
    return (w + spread[2] if offsets else w), (codes, scales, zps, *offsets)


def float64(kind, data):
    """Dequantized as ggml's formulas say, in float64: a float16 scale times a code fits."""
    blocks = data.reshape(len(data), -1, ggml.GGML_QUANT_SIZES[kind][1])
    d = blocks[:, :, :2].copy().view("<f2").astype(np.float64)
    if kind == Q.Q8_0:
        return (d * blocks[:, :, 2:].view(np.int8)).reshape(len(data), -1)
    codes = blocks[:, :, 2 if kind == Q.Q4_0 else 4 :].astype(np.float64)
    codes = np.concatenate([codes % 16, codes // 16], axis=2)
    if kind == Q.Q4_0:
        return (d * (codes - 8)).reshape(len(data), -1)
    return (d * codes + blocks[:, :, 2:4].copy().view("<f2")).reshape(len(data), -1)


@pytest.mark.parametrize("kind, bits", [(Q.Q4_0, 4), (Q.Q4_1, 4), (Q.Q8_0, 8)], ids=str)
def test_weights_are_exact(one, kernel, kind, bits):
    data = random_blocks(kind)
    file = one(data, kind)
    packed = file.packed("w", bits)
    assert packed.shape == (N, K * bits // 4)
    assert packed.group_size == 32
    assert packed.scale_dtype == "float16"
    w, parts = unpacked(packed)
    np.testing.assert_array_equal(w if bits == 4 else w[:, :K] + w[:, K:], float64(kind, data))
    np.testing.assert_array_equal(file.array("w"), ggml.dequantize(data, kind))

    x = np.random.default_rng(1).standard_normal((3, K), np.float32)
    x = np.concatenate([x] * (bits // 4), axis=1)
    codes, scales, zps, *offsets = parts
    expected = reference.linear(x, codes, scales, zps, **dict(zip(["offsets"], offsets)), group_size=32)
    assert_same_bits(linear(x, packed), expected)


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q6_K], ids=str)
def test_other_types_are_quantized(one, kind):
    n, k = N, 512
    w = np.random.default_rng(2).standard_normal((n, k), np.float32)
    if kind == Q.Q6_K:
        file = one(random_blocks(kind, n, k), kind)
    elif kind in (Q.F32, Q.F16):
        file = one(w if kind == Q.F32 else w.astype(np.float16), kind)
    else:
        file = one(ggml.quantize(w, kind), kind)
    array = file.array("w")
    assert (array.dtype, array.shape) == (np.float32, (n, k))
    if kind != Q.Q6_K:
        np.testing.assert_allclose(array, w, atol=0.03)
    for part, expected in zip(file.packed("w").unpack(), pyda8w4.quantize_weight(array, 32)):
        assert_same_bits(part, expected)
    eight = unpacked(file.packed("w", bits=8))[0]
    most = np.abs(array).reshape(n, -1, 32).max(axis=2)
    error = np.abs(eight[:, :k] + eight[:, k:] - array).reshape(n, -1, 32).max(axis=2)
    assert (error <= most / 200).all()  # half a step of 127, and the scale in float16


def test_scales_that_are_extreme(one):
    """The largest and smallest float16; 16 times that is still exact, though no float16."""
    data = random_blocks(Q.Q8_0)
    blocks = data.reshape(N, -1, 34)
    blocks[:, :, :2] = (
        np.array([65504, 2.0**-24, -(2.0**-24), 0, -65504], "<f2")
        .view(np.uint8)
        .reshape(5, 2)[[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    )
    w, _ = unpacked(one(data, Q.Q8_0).packed("w", bits=8))
    np.testing.assert_array_equal(w[:, :K] + w[:, K:], float64(Q.Q8_0, data))


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
    file = pyda8w4.gguf.File(write(tmp_path / "model.gguf", ("norm", norm, Q.F32), q4_0, **values))
    expected = {"general.architecture": "llama", **{key: value for key, (value, _) in values.items()}}
    assert file.metadata == expected
    assert file.types == {"norm": "F32", "w": "Q4_0"}
    array = file.array("norm")
    np.testing.assert_array_equal(array, norm)
    array += 1  # the caller's own
    np.testing.assert_array_equal(file.array("norm"), norm)


def test_what_is_refused(tmp_path):
    ints = ("ints", np.zeros((2, 32), np.int32), Q.I32)
    norm = ("norm", np.ones(32, np.float32), Q.F32)
    file = pyda8w4.gguf.File(write(tmp_path / "model.gguf", ints, norm))
    for read in (file.array, file.packed):
        with pytest.raises(ValueError, match="got ints of I32"):
            read("ints")
        with pytest.raises(ValueError, match="got 'nothing'"):
            read("nothing")
    with pytest.raises(ValueError, match="matrix, got norm of shape \\(32,\\)"):
        file.packed("norm")
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 5"):
        file.packed("ints", bits=5)


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
            pyda8w4.gguf.File(cut)


@pytest.mark.parametrize(
    "at, value, message", [(0, b"GGML", "begin"), (4, b"\0\0\0\3", "little-endian"), (4, b"\1\0\0\0", "not 1")]
)
def test_other_files(tmp_path, at, value, message):
    path = write(tmp_path / "model.gguf", ("w", random_blocks(Q.Q4_0), Q.Q4_0))
    data = bytearray(path.read_bytes())
    data[at : at + 4] = value
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        pyda8w4.gguf.File(path)


def test_a_type_that_is_not_known(tmp_path):
    path = write(tmp_path / "model.gguf", ("w", random_blocks(Q.Q4_0), Q.Q4_0))
    data = bytearray(path.read_bytes())
    at = data.index(b"\1\0\0\0\0\0\0\0w") + 9 + 4 + 2 * 8
    assert data[at] == Q.Q4_0
    data[at] = 199
    path.write_bytes(data)
    with pytest.raises(ValueError, match="199"):
        pyda8w4.gguf.File(path)


def test_arrays_of_arrays_of_arrays(tmp_path):
    data = write(tmp_path / "model.gguf", ("w", random_blocks(Q.Q4_0), Q.Q4_0)).read_bytes()
    at = data.index(b"general.architecture") + len("general.architecture")
    path = tmp_path / "nested.gguf"
    path.write_bytes(data[:at] + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100000 + data[at + 4 :])
    with pytest.raises(ValueError, match="recursion"):
        pyda8w4.gguf.File(path)


@pytest.mark.parametrize("alignment", [0, "32"])
def test_an_alignment_that_is_none(tmp_path, alignment):
    kind = ggml.GGUFValueType.STRING if isinstance(alignment, str) else ggml.GGUFValueType.UINT32
    changed = {"general.alignment": (alignment, kind)}
    path = write(tmp_path / "model.gguf", ("w", random_blocks(Q.Q4_0), Q.Q4_0), **changed)
    with pytest.raises(ValueError, match=f"its alignment is {alignment!r}"):
        pyda8w4.gguf.File(path)


def test_a_tensor_without_dimensions(tmp_path):
    path = write(tmp_path / "model.gguf", ("w", np.ones(32, np.float32), Q.F32))
    data = bytearray(path.read_bytes())
    at = data.index(b"\1\0\0\0\0\0\0\0w") + 9
    del data[at + 4 : at + 12]
    data[at] = 0
    path.write_bytes(data)
    with pytest.raises(ValueError, match="'w' has no dimensions"):
        pyda8w4.gguf.File(path)


def test_8_bits_take_whole_groups(tmp_path):
    file = pyda8w4.gguf.File(write(tmp_path / "model.gguf", ("w", np.ones((2, 40), np.float32), Q.F32)))
    assert file.packed("w").shape == (2, 40)
    with pytest.raises(ValueError, match="whole groups of 32"):
        file.packed("w", bits=8)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        pyda8w4.gguf.File(tmp_path / "nothing.gguf")


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
        pyda8w4.gguf.File(path)


def test_a_part_of_a_split_file_says_so(tmp_path):
    split = {"split.no": (1, ggml.GGUFValueType.UINT16), "split.count": (3, ggml.GGUFValueType.UINT16)}
    norm = ("norm", np.ones(32, np.float32), Q.F32)
    path = write(tmp_path / "model-00002-of-00003.gguf", norm, **split)
    for read in (pyda8w4.gguf.File(path).array, pyda8w4.gguf.File(path).packed):
        with pytest.raises(ValueError, match=rf"{path}: .*got 'w'; it is one of 3 parts \(split.no is 1\)"):
            read("w")
    split["split.count"] = (1, ggml.GGUFValueType.UINT16)
    with pytest.raises(ValueError, match=r"got 'w'$"):
        pyda8w4.gguf.File(write(path, norm, **split)).array("w")


def with_half(kind, at, value):
    data = random_blocks(kind, 3, 512)
    data.reshape(3, -1, ggml.GGML_QUANT_SIZES[kind][1])[2, -1, at : at + 2] = np.array([value], "<u2").view(np.uint8)
    return data


# Quiet and signalling NaN, infinities.
@pytest.mark.parametrize("value", [0x7E00, 0x7D01, 0xFFFF, 0x7C00, 0xFC00], ids=hex)
@pytest.mark.parametrize("kind, at", [(Q.Q4_0, 0), (Q.Q4_1, 0), (Q.Q4_1, 2), (Q.Q8_0, 0), (Q.Q6_K, 208)], ids=str)
def test_scales_that_are_not_finite(one, tmp_path, kind, at, value):
    # Also without a warning, which pytest makes an error.
    file = one(with_half(kind, at, value), kind)
    assert not np.isfinite(file.array("w")[2]).all()
    assert np.isfinite(file.array("w")[:2]).all()
    for bits in (4, 8):
        with pytest.raises(ValueError, match=rf"{tmp_path}/one.gguf: w of {kind.name} cannot be packed: .*finite"):
            file.packed("w", bits)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(one, tmp_path, dtype, value):
    w = np.ones((3, 64), dtype)
    w[1, 5] = value
    kind = {np.float32: Q.F32, np.float16: Q.F16, np.float64: Q.F64}[dtype]
    file = one(w, kind)
    for bits in (4, 8):
        with pytest.raises(ValueError, match=rf"{tmp_path}/one.gguf: w of {kind.name} cannot be packed: .*finite"):
            file.packed("w", bits)
    np.testing.assert_array_equal(file.array("w"), w.astype(np.float32))


@pytest.mark.parametrize("value", [3e38, 1e8])
def test_values_that_are_too_large(one, value):
    w = np.full((3, 64), value, np.float32)
    w[:, ::2] *= -1
    file = one(w, Q.F32)
    with pytest.raises(ValueError, match=r"one.gguf: w of F32 cannot be packed: scales must be finite"):
        file.packed("w", bits=8)
    if value > 1e38:
        with pytest.raises(ValueError, match=r"one.gguf: w of F32 cannot be packed: .*range"):
            file.packed("w")


def test_float64(one):
    w = np.random.default_rng(3).standard_normal((N, K)) * np.logspace(-300, 30, K)
    array = one(w, Q.F64).array("w")
    assert_same_bits(array, w.astype(np.float32))
    array += 1  # the caller's own
    w = np.random.default_rng(3).standard_normal((N, K))
    packed = one(w, Q.F64).packed("w")
    for part, expected in zip(packed.unpack(), pyda8w4.quantize_weight(w.astype(np.float32), 32)):
        assert_same_bits(part, expected)
    large = np.array([[1e300, -1e300, 1.0, 1e-320] * 8])
    np.testing.assert_array_equal(one(large, Q.F64).array("w"), [[np.inf, -np.inf, 1, 0] * 8])


@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q4_1, Q.Q8_0, Q.Q6_K, Q.F32, Q.F64], ids=str)
def test_a_matrix_without_rows(tmp_path, kind):
    # gguf has errors of its own for some.
    data = np.zeros(ggml.quant_shape_to_byte_shape((0, 512), kind), np.uint8)
    file = pyda8w4.gguf.File(write(tmp_path / "model.gguf", ("w", data, kind)))
    for bits in (4, 8):
        with pytest.raises(ValueError, match=rf"model.gguf: w of {kind.name} cannot be "):
            file.packed("w", bits)


def test_every_error_names_file_and_tensor(tmp_path):
    path = write(
        tmp_path / "model.gguf",
        ("norm", np.ones(32, np.float32), Q.F32),
        ("odd", np.ones((2, 40), np.float32), Q.F32),
        ("ints", np.ones((2, 32), np.int32), Q.I32),
    )
    file = pyda8w4.gguf.File(path)
    calls = [(file.array, "nothing"), (file.packed, "nothing"), (file.packed, "norm"), (file.array, "ints")]
    calls += [(file.packed, "ints"), (lambda name: file.packed(name, bits=8), "odd")]
    for read, name in calls:
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: .*\b{name}\b"):
            read(name)
    whole = path.read_bytes()
    for change in (lambda data: data[:-40], lambda data: data.replace(b"ints\2\0\0\0 ", b"ints\2\0\0\0\xff", 1)):
        path.write_bytes(change(whole))
        assert path.read_bytes() != whole
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))}.*its tensor 'ints': it ends too early"):
            pyda8w4.gguf.File(os.fspath(path))


@pytest.mark.parametrize("path", [None, 3, b"model.gguf"])
def test_a_path_that_is_none(path):
    with pytest.raises(TypeError, match="path must be a str or path-like"):
        pyda8w4.gguf.File(path)
