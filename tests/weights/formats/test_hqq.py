"""HQQ's weights stand for (code - zero) * scale, however they are packed."""

import re

import ml_dtypes
import numpy as np
import pytest
from readers import reader
from stored import checkpoint, floats, stored

from pyda8w4._filesystem import map_file
from pyda8w4._safetensors import read_file
from pyda8w4.formats import hqq

N, K, GROUP = 20, 192, 32
DTYPES = [np.float16, ml_dtypes.bfloat16]
NBITS = [8, 6, 5, 4, 3, 2, 1.58, 1]
# Codes in a word, bits of each, and the name: hqq/core/bitpack.py.
PACKING = {
    8: (1, 8, "8bit_u8"), 6: (1, 8, "8bit_u8"), 5: (1, 8, "8bit_u8"), 4: (2, 4, "4bit_u8"), 3: (10, 3, "3bit_32"),
    2: (4, 2, "2bit_u8"), 1.58: (4, 2, "2bit_u8"), 1: (8, 1, "1bit_u8"),
}  # fmt: skip


def pack(matrix, nbits):
    """Row r of the packed matrix has rows r, r + step, r + 2 * step, ...: the first in the highest bits."""
    per, bits, _ = PACKING[nbits]
    step = -(-len(matrix) // per)
    packed = np.zeros((step, matrix.shape[1]), np.int32 if per == 10 else np.uint8)
    for row, column in np.ndindex(matrix.shape):
        packed[row % step, column] |= int(matrix[row, column]) << bits * (per - 1 - row // step)
    return packed


def layer_of(nbits=4, axis=1, dtype=np.float16, seed=0, round_zero=False, group=GROUP):
    """-> tensors of a layer, as arrays by name, and its floats: rounded once from float64."""
    rng = np.random.default_rng(seed)
    groups = N * K // group
    codes = rng.integers(0, round(2**nbits), (N, K))
    scale, zero = floats(rng, groups, dtype), (rng.random(groups) * (2**nbits - 1)).astype(dtype)
    if round_zero:
        zero = np.rint(zero.astype(np.float32)).astype(dtype)
    wanted = np.empty((N, K), np.float32)
    for at, (n, k) in enumerate(np.ndindex(N, K)):
        g = at // group if axis == 1 else at % groups
        wanted[n, k] = (float(codes[n, k]) - float(zero[g])) * float(scale[g])
    matrix = codes.reshape(groups, group) if axis == 1 else codes.reshape(group, groups)
    of_groups = (groups, 1) if axis == 1 else (1, groups)
    return {
        "W_q": pack(matrix, nbits),
        "scale": scale.reshape(of_groups),
        "zero": zero.reshape(of_groups),
        "shape": np.array([N, K]),
        "nbits": np.array(nbits, np.float32 if nbits == 1.58 else np.int32),
        "group_size": np.array(group, np.int32),
        "axis": np.array(axis, np.int32),
        "packing": np.frombuffer(PACKING[nbits][2].encode(), np.uint8),
        "view_as_float": np.array(0, np.uint8),
        "quant_scale": np.array(0, np.uint8),
        "quant_zero": np.array(0, np.uint8),
    }, wanted


def read(parts):
    tensors = checkpoint({"a.b": parts})
    found = hqq.layers(
        {}, {**tensors, **stored({"a.b.bias": np.zeros(N, np.float16), "a.weight": np.zeros(1, np.int8)})}
    )
    assert list(found) == ["a.b"]
    assert sorted(found["a.b"].tensors) == sorted(tensors)
    return found["a.b"]


def arguments(parts, nbits=4):
    return {"w_q": parts["W_q"], "scale": parts["scale"], "zero": parts["zero"], "shape": (N, K), "nbits": nbits}


@pytest.mark.parametrize("round_zero", [False, True], ids=["zeros", "integer-zeros"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nbits", NBITS)
def test_axis_1(nbits, dtype, round_zero):
    parts, wanted = layer_of(nbits, dtype=dtype, round_zero=round_zero)
    layer = read(parts)
    assert (layer.type, layer.shape, layer.refusal) == (f"HQQ {nbits}-bit", (N, K), None)
    assert layer.nbytes == sum(part.nbytes for part in parts.values())
    weight = hqq.unpack(**arguments(parts, nbits))
    assert weight.bits == {8: 8, 6: 6, 5: 5}.get(nbits, 4)
    assert (weight.offsets is None) == round_zero
    for packed in weight.pack(), layer.read(0).pack():
        np.testing.assert_array_equal(packed.dequantize(), wanted, strict=True)
    np.testing.assert_array_equal(hqq.dequantize(**arguments(parts, nbits)), wanted, strict=True)
    assert layer.packed_nbytes == layer.read(0).pack().nbytes


@pytest.mark.parametrize("nbits", NBITS)
def test_axis_0(nbits):
    parts, wanted = layer_of(nbits, axis=0)
    layer = read(parts)
    assert layer.read is None
    assert layer.refusal == "axis must be 1, got 0: the groups of axis 0 are not of consecutive inputs"
    np.testing.assert_array_equal(layer.floats(0), wanted, strict=True)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("nbits", [4, 3])
def test_view_as_float(nbits, dtype):
    parts, wanted = layer_of(nbits)
    parts["W_q"] = parts["W_q"].view(dtype)
    weight = hqq.unpack(**arguments(parts, nbits))
    assert read(parts).refusal.startswith("a.b.W_q must be of ")
    parts["view_as_float"] = np.array(1, np.uint8)
    for found in weight, read(parts).read(0):
        np.testing.assert_array_equal(found.pack().dequantize(), wanted)


def test_groups_in_two_rows():
    parts, wanted = layer_of(group=128)
    layer = read(parts)
    assert layer.read is None
    assert re.search("groups must be .* and divide the 192 inputs, got 128", layer.refusal)
    np.testing.assert_array_equal(layer.floats(0), wanted, strict=True)
    with pytest.raises(ValueError, match="divide the 192 inputs, got 128"):
        hqq.unpack(**arguments(parts))


def test_groups_of_whole_rows():
    parts, wanted = layer_of(group=K)
    np.testing.assert_array_equal(read(parts).read(0).pack().dequantize(), wanted)


def test_float32_that_float16_holds():
    parts, wanted = layer_of()
    parts["scale"], parts["zero"] = parts["scale"].astype(np.float32), parts["zero"].astype(np.float32)
    layer = read(parts)
    np.testing.assert_array_equal(layer.read(0).pack().dequantize(), wanted)
    assert layer.packed_nbytes == layer.read(0).pack().nbytes


def test_zeros_that_are_large():
    """Integers that are no zero points of packed weights."""
    parts, wanted = layer_of()
    parts["zero"][:] = 1000
    codes = hqq.unpack(**arguments(parts)).codes
    scale = parts["scale"].reshape(N, -1).astype(np.float64).repeat(GROUP, 1)
    wanted = ((codes - 1000.0) * scale).astype(np.float32)
    np.testing.assert_array_equal(read(parts).read(0).pack().dequantize(), wanted)


def test_the_last_product_counts():
    parts, _ = layer_of()
    groups = 5000
    parts |= {"W_q": np.zeros((groups // 2, 4), np.uint8), "shape": np.array([groups, 4])}
    parts |= {"group_size": np.array(4, np.int32)}
    parts |= {"scale": np.full(groups, 0.5, np.float32), "zero": np.full(groups, 0.25, np.float32)}
    assert read(parts).refusal is None
    parts["scale"][-1] = parts["zero"][-1] = np.float32(1) / 3
    assert "must be exact in float32" in read(parts).refusal


def test_float32_with_integer_zeros():
    parts, wanted = layer_of(dtype=np.float32, round_zero=True)
    np.testing.assert_array_equal(read(parts).read(0).pack().dequantize(), wanted)


def test_products_of_float32_are_refused():
    parts, wanted = layer_of(dtype=np.float32)
    layer = read(parts)
    assert layer.read is None
    assert "the products of zero points and scales must be exact in float32" in layer.refusal
    np.testing.assert_array_equal(layer.floats(0), wanted, strict=True)
    with pytest.raises(ValueError, match="must be exact in float32"):
        hqq.unpack(**arguments(parts))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"nbits": np.array(7, np.int32)}, "nbits must be 8, 6, 5, 4, 3, 2, 1.58 or 1, got 7"),
        ({"nbits": np.array(np.nan, np.float32)}, "nbits must be .*, got nan"),
        ({"nbits": np.array([4, 4], np.int32)}, r"nbits must have one number, got shape \(2,\)"),
        ({"nbits": None}, "nbits is missing"),
        ({"packing": None}, "packing is missing"),
        ({"packing": np.frombuffer(b"3bit_32", np.uint8)}, "packing must be 4bit_u8 for 4 bits, got '3bit_32'"),
        ({"packing": np.zeros(10**6, np.uint8)}, "packing must be 4bit_u8"),
        ({"axis": np.array(2, np.int32)}, "axis must be 0 or 1, got 2"),
        ({"axis": None}, "axis is missing"),
        ({"quant_zero": np.array(1, np.uint8)}, "quant_zero must be 0"),
        ({"quant_scale": np.array(1, np.uint8)}, "quant_scale must be 0"),
        ({"scale": None}, "scale is missing"),
        ({"zero": np.zeros(120, np.int8)}, "zero must be of F32, F16 or BF16, got I8"),
        ({"zero": np.zeros(119, np.float16)}, r"zero must have 120 numbers, got shape \(119,\)"),
        ({"scale": np.zeros(1, np.float16)}, "scale must have 120 numbers"),
        ({"shape": np.array([N, K + 1])}, "W_q must have the codes of 20 x 193 weights"),
        ({"shape": np.array([2 * N, K])}, "W_q must have the codes of 40 x 192 weights"),
        ({"shape": np.array([1 << 62, K])}, "shape must be two positive ints"),
        ({"shape": np.array([-N, -K])}, "shape must be two positive ints"),
        ({"shape": np.array([N, K, 1])}, "shape must have 2 numbers"),
        ({"W_q": np.zeros(4, np.uint8)}, "a.b.W_q must be a non-empty matrix"),
        ({"W_q": np.zeros((60, 0), np.uint8)}, "a.b.W_q must be a non-empty matrix"),
        ({"W_q": np.zeros((60, 32), np.int32)}, "W_q must be of U8, got I32"),
        ({"W_q": np.zeros((59, 32), np.uint8)}, "W_q must have the codes of 20 x 192 weights"),
    ],
)
def test_refusals(change, why):
    parts, _ = layer_of()
    parts = {name: part for name, part in {**parts, **change}.items() if part is not None}
    layer = read(parts)
    assert layer.read is layer.floats is None
    assert re.search(why, layer.refusal), layer.refusal


def test_rows_of_3_bits_are_padded_by_less_than_a_word():
    parts, _ = layer_of(3)
    parts["W_q"] = np.concatenate([parts["W_q"], parts["W_q"][:1]])
    assert "W_q must have the codes" in read(parts).refusal


def test_arguments():
    parts, _ = layer_of()
    given = arguments(parts)
    for change, error, why in [
        ({"w_q": parts["W_q"].astype(np.int64)}, TypeError, "w_q must be an array of uint8"),
        ({"scale": parts["scale"].astype(np.float64)}, TypeError, "scale must be an array of"),
        ({"nbits": "4"}, ValueError, "nbits must be .*, got '4'"),
        ({"shape": (N,)}, ValueError, "shape must be two positive ints"),
        ({"w_q": np.zeros((60, 3), np.float16), "nbits": 3}, ValueError, "w_q must have rows of int32"),
    ]:
        with pytest.raises(error, match=why):
            hqq.unpack(**given | change)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("axis", [0, 1])
def test_what_hqq_itself_saves(tmp_path, axis):
    torch = reader("torch")
    quantize = reader("hqq.core.quantize")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    layers, state = {}, {}
    for nbits in NBITS:
        for as_float in (False, True):
            linear = torch.nn.Linear(192, 40)
            config = quantize.BaseQuantizeConfig(nbits=nbits, group_size=64, axis=axis, view_as_float=as_float)
            config["weight_quant_params"]["optimize"] = nbits == 4  # which takes a second
            name = f"{nbits:g}{as_float}".replace(".", "_")
            layers[name] = quantize.HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
            state |= {f"{name}.{key}": value for key, value in layers[name].state_dict().items()}
    save_file(state, path := tmp_path / "model.safetensors")
    _, tensors = read_file(path, map_file(path))
    found = hqq.layers({"quant_method": "hqq"}, tensors)
    assert found.keys() == layers.keys()
    assert tensors.keys() - {name for layer in found.values() for name in layer.tensors} == {
        f"{name}.bias" for name in layers
    }
    for name, theirs in layers.items():
        theirs.meta["compute_dtype"] = torch.float32  # so that hqq rounds to no less
        theirs.meta["scale"], theirs.meta["zero"] = theirs.meta["scale"].double(), theirs.meta["zero"].double()
        wanted = theirs.dequantize().float().numpy()
        ours = found[name].read(0).pack().dequantize() if axis == 1 else found[name].floats(0)
        np.testing.assert_array_equal(ours, wanted)
