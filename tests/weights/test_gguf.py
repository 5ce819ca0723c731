"""Weights from GGUF files: what they stand for is what ggml says they do, exactly."""

import os
import re
import struct

import numpy as np
import pytest
from cases import (
    assert_same_bits,
)

from pyda8w4 import linear

ggml = pytest.importorskip("gguf", reason="gguf is not installed")
import pyda8w4.gguf

Q = ggml.GGMLQuantizationType
N, K = 40, 320


# Types that are packed exactly: bits, group size, and where a block has float16.
EXACT = {
    Q.Q4_0: (4, 32, [0]),
    Q.Q4_1: (4, 32, [0, 2]),
    Q.Q5_0: (5, 32, [0]),
    Q.Q5_1: (5, 32, [0, 2]),
    Q.Q8_0: (8, 32, [0]),
    Q.Q4_K: (4, 32, [0, 2]),
    Q.Q5_K: (5, 32, [0, 2]),
    Q.Q6_K: (6, 16, [208]),
    Q.IQ4_NL: (4, 32, [0]),
    Q.IQ4_XS: (4, 32, [0]),
    Q.MXFP4: (4, 32, []),
}
# The largest and smallest of either sign, subnormal ones, zeros, and some others.
HALVES = np.array([65504, -65504, 2.0**-24, -(2.0**-24), 0.0, -0.0, 1023 * 2.0**-24, 2.0**-14, 1, -0.3, 1e-3], "<f2")


def random_blocks(kind, n=N, k=K, seed=0):
    """Rows of any bytes, but for scales that are finite."""
    rng = np.random.default_rng(seed)
    block, size = ggml.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (n, k // block, size), np.uint8)
    for at in EXACT[kind][2]:
        data[:, :, at : at + 2] = rng.choice(HALVES, (n, k // block, 1)).view(np.uint8)
    if kind == Q.MXFP4:
        data[:, :, 0] = np.arange(data[:, :, 0].size).reshape(data.shape[:2]) % 253  # no 12 * 2**125, which is infinite
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


@pytest.mark.parametrize("kind", EXACT, ids=str)
def test_weights_are_exact(one, kernel, kind):
    n, k = 80, 768
    data = random_blocks(kind, n, k)
    file = one(data, kind)
    packed = file.packed("w")
    assert packed.shape == (n, k)
    assert (packed.bits, packed.group_size) == EXACT[kind][:2]
    assert_same_bits(packed.dequantize(), ggml.dequantize(data, kind))
    assert_same_bits(file.array("w"), ggml.dequantize(data, kind))
    if packed.bits in (4, 8):
        assert_same_bits(file.packed("w", packed.bits).dequantize(), packed.dequantize())

    x = np.random.default_rng(1).standard_normal((3, k), np.float32)
    data = mild_blocks(kind, n, k)
    w = ggml.dequantize(data, kind).astype(np.float64)
    y = linear(x, one(data, kind).packed("w"), act="int16")
    np.testing.assert_allclose(y, x @ w.T, rtol=0, atol=1e-3 * np.abs(w).max() * np.abs(x).sum(axis=1).max() / k**0.5)


def mild_blocks(kind, n, k):
    """With scales of one size, so that no weight hides another."""
    data = random_blocks(kind, n, k)
    blocks = data.reshape(n, -1, ggml.GGML_QUANT_SIZES[kind][1])
    for at in EXACT[kind][2]:
        blocks[:, :, at : at + 2] = np.array([0.011], "<f2").view(np.uint8)
    if kind == Q.MXFP4:
        blocks[:, :, 0] = 120
    return data


@pytest.mark.parametrize(
    "kind, most",
    [(Q.Q4_0, 4.5), (Q.Q8_0, 8.5), (Q.Q4_K, 4.65), (Q.Q5_K, 5.7), (Q.Q6_K, 6.7), (Q.IQ4_XS, 4.35), (Q.MXFP4, 4.51)],
    ids=str,
)
def test_weights_keep_their_size(one, kind, most):
    packed = one(random_blocks(kind, 64, 1024), kind).packed("w")
    assert 8 * (packed.nbytes - 4 * 64) / (64 * 1024) <= most


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q2_K, Q.NVFP4], ids=str)
def test_nothing_is_quantized_unless_bits_are_given(one, kind):
    data = np.zeros(ggml.quant_shape_to_byte_shape((N, 512), kind), np.uint8)
    file = one(data.view({Q.F32: np.float32, Q.F16: np.float16}.get(kind, np.uint8)), kind)
    with pytest.raises(ValueError, match=rf"Q4_0, .*MXFP4, got w of {kind.name}; bits=4 or bits=8"):
        file.packed("w")


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q6_K], ids=str)
def test_other_bits_are_quantized(one, kind):
    n, k = N, 512
    w = np.random.default_rng(2).standard_normal((n, k), np.float32)
    if kind == Q.Q6_K:
        file = one(mild_blocks(kind, n, k), kind)
    elif kind in (Q.F32, Q.F16):
        file = one(w if kind == Q.F32 else w.astype(np.float16), kind)
    else:
        file = one(ggml.quantize(w, kind), kind)
    array = file.array("w")
    assert (array.dtype, array.shape) == (np.float32, (n, k))
    if kind != Q.Q6_K:
        np.testing.assert_allclose(array, w, atol=0.03)
    for part, expected in zip(file.packed("w", bits=4).unpack(), pyda8w4.quantize_weight(array, 32)):
        assert_same_bits(part, expected)
    eight = file.packed("w", bits=8)
    assert eight.bits == 8
    most = np.abs(array).reshape(n, -1, 32).max(axis=2)
    error = np.abs(eight.dequantize() - array).reshape(n, -1, 32).max(axis=2)
    assert (error <= most / 200).all()  # half a step of 127, and the scale in float16


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
    with pytest.raises(ValueError, match="bits must be 4, 8 or None, got 5"):
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
    assert file.packed("w", bits=4).shape == (2, 40)
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
    data = mild_blocks(kind, 3, 512)
    data.reshape(3, -1, ggml.GGML_QUANT_SIZES[kind][1])[2, -1, at : at + 2] = np.array([value], "<u2").view(np.uint8)
    return data


# Quiet and signalling NaN, infinities.
@pytest.mark.parametrize("value", [0x7E00, 0x7D01, 0xFFFF, 0x7C00, 0xFC00], ids=hex)
@pytest.mark.parametrize("kind, at", [(kind, at) for kind in EXACT for at in EXACT[kind][2]], ids=str)
def test_scales_that_are_not_finite(one, tmp_path, kind, at, value):
    # Also without a warning, which pytest makes an error.
    file = one(with_half(kind, at, value), kind)
    assert not np.isfinite(file.array("w")[2]).all()
    assert np.isfinite(file.array("w")[:2]).all()
    for bits in (None, 4, 8):
        with pytest.raises(ValueError, match=rf"{tmp_path}/one.gguf: w of {kind.name} cannot be packed: .*finite"):
            file.packed("w", bits)


def test_a_scale_that_mxfp4_has_for_nan(one):
    data = random_blocks(Q.MXFP4)
    data[3, 17] = 255
    with pytest.raises(ValueError, match=r"one.gguf: w of MXFP4 cannot be packed: scales must be finite"):
        one(data, Q.MXFP4).packed("w")


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
            file.packed("w", bits=4)


def test_float64(one):
    w = np.random.default_rng(3).standard_normal((N, K)) * np.logspace(-300, 30, K)
    array = one(w, Q.F64).array("w")
    assert_same_bits(array, w.astype(np.float32))
    array += 1  # the caller's own
    w = np.random.default_rng(3).standard_normal((N, K))
    packed = one(w, Q.F64).packed("w", bits=4)
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
    calls += [(file.packed, "ints"), (lambda name: file.packed(name, bits=8), "odd"), (file.packed, "odd")]
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
