"""bitsandbytes' weights: of 8 bits as they are, of 4 bits as floats."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from readers import reader
from stored import checkpoint, stored

from pyda8w4._filesystem import map_file
from pyda8w4._safetensors import read_file
from pyda8w4.formats import bitsandbytes

N, K = 24, 80
TABLES = {
    "nf4": [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    "fp4": [sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)],
}  # fmt: skip


def layer_of(kind="nf4", shape=(N, K), blocksize=64, nested=False, seed=0):
    """-> tensors of a layer, and its floats: each operation rounded to float32."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    codes = rng.integers(0, 16, count + count % 2)
    blocks, table = -(-count // blocksize), np.array(TABLES[kind], np.float32)
    state = {"quant_type": kind, "blocksize": blocksize, "dtype": "float16", "shape": list(shape)}
    if nested:
        quantized, quant_map = rng.integers(0, 256, blocks), rng.standard_normal(256).astype(np.float32)
        of_blocks = abs(rng.standard_normal(-(-blocks // 256))).astype(np.float32)
        absmax = np.empty(blocks, np.float32)
        for i in range(blocks):
            absmax[i] = quant_map[quantized[i]] * of_blocks[i // 256]
            absmax[i] += np.float32(0.1)
        parts = {"absmax": quantized.astype(np.uint8), "nested_absmax": of_blocks, "nested_quant_map": quant_map}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}
    else:
        absmax = abs(rng.standard_normal(blocks)).astype(np.float32)
        parts = {"absmax": absmax}
    wanted = np.array([table[codes[i]] * absmax[i // blocksize] for i in range(count)], np.float32).reshape(shape)
    weight = np.array([[16 * high + low] for high, low in zip(codes[::2], codes[1::2])], np.uint8)
    return {"weight": weight, **parts, "quant_map": table, "state": state}, wanted


def tensors_of(parts, name="m.weight"):
    parts = dict(parts)
    kind, state = "nf4", parts.pop("state")
    if isinstance(state, dict):
        kind, state = state["quant_type"], json.dumps(state).encode()
    weight = parts.pop("weight")
    found = {name: weight, **{f"{name}.{part}": array for part, array in parts.items()}}
    found[f"{name}.quant_state.bitsandbytes__{kind}"] = np.frombuffer(state, np.uint8)
    return stored(found)


def find(parts, name="m.weight"):
    tensors = tensors_of(parts, name)
    found = bitsandbytes.layers({}, tensors | stored({"m.bias": np.zeros(N, np.float16)}))
    (layer,) = found.values()
    assert sorted(layer.tensors) == sorted(tensors)
    assert layer.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    return layer


# ---- 4 bits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
@pytest.mark.parametrize("shape", [(N, K), (3, 7), (700, 64)])
@pytest.mark.parametrize("kind", TABLES)
def test_4_bits_are_refused_and_have_floats(kind, shape, nested):
    parts, wanted = layer_of(kind, shape, nested=nested)
    layer = find(parts)
    assert (layer.type, layer.shape, layer.read) == (f"bitsandbytes {kind.upper()}", shape, None)
    assert layer.refusal == f"{kind.upper()} has 16 floats for codes, which no table of integers holds"
    np.testing.assert_array_equal(layer.floats(0), wanted, strict=True)


@pytest.mark.parametrize("blocksize", [32, 4096])
def test_sizes_of_blocks(blocksize):
    parts, wanted = layer_of(blocksize=blocksize)
    np.testing.assert_array_equal(find(parts).floats(0), wanted)


@pytest.mark.parametrize("nested", [False, True])
def test_arrays(nested):
    parts, wanted = layer_of(nested=nested)
    absmax = parts["absmax"]
    if nested:
        more = parts["nested_absmax"], parts["nested_quant_map"]
        absmax = bitsandbytes.dequantize_absmax(absmax, *more, nested_offset=0.1)
    np.testing.assert_array_equal(bitsandbytes.dequantize_4bit(parts["weight"], absmax, shape=(N, K)), wanted)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_codes_stored_as_floats(dtype):
    """bnb_4bit_quant_storage."""
    parts, wanted = layer_of()
    parts["weight"] = parts["weight"].reshape(-1).view(dtype)[:, None]
    np.testing.assert_array_equal(find(parts).floats(0), wanted)


def test_stacks_whose_blocks_are_in_two_matrices():
    parts, wanted = layer_of(shape=(3, 5, 18))
    tensors = tensors_of(parts, "mlp.experts.up")
    found = bitsandbytes.layers({}, tensors)
    assert list(found) == ["mlp.experts.up"]
    for i in range(3):
        np.testing.assert_array_equal(found["mlp.experts.up"].floats(i), wanted[i], strict=True)


def test_large_weights_in_several_steps():
    """Of more than 2**20 bytes."""
    rng = np.random.default_rng(1)
    data, absmax = rng.integers(0, 256, (3 << 19) + 8, np.uint8), rng.random(3 * 2**14 + 1).astype(np.float32)
    table = np.array(TABLES["nf4"], np.float32)
    wanted = np.stack([table[data >> 4], table[data & 15]], 1).reshape(-1)
    wanted = wanted * absmax.repeat(64)[: len(wanted)]
    np.testing.assert_array_equal(
        bitsandbytes.dequantize_4bit(data, absmax, shape=(4, 2 * len(data) // 4)), wanted.reshape(4, -1)
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"absmax": None}, "absmax is missing"),
        ({"absmax": np.zeros(30, np.float16)}, "absmax must be of F32, got F16"),
        ({"absmax": np.zeros(29, np.float32)}, "m.weight.absmax must have 30 numbers, got shape \\(29,\\)"),
        ({"weight": np.zeros((959, 1), np.uint8)}, r"weight must have 960 bytes for shape \(24, 80\), got 959"),
        ({"quant_map": np.zeros(16, np.float32)}, "quant_map must be that of NF4, got another"),
        ({"nested_absmax": np.zeros(1, np.float32)}, "absmax must be of U8, got F32"),
        ({"state": b"{"}, "quant_state must be JSON"),
        ({"state": b"[" * 100_000}, "quant_state must be JSON"),
        ({"state": b"\xff"}, "quant_state must be JSON"),
        ({"state": b"3"}, "quant_state must be a JSON object, got 3"),
        ({"state": b"{}"}, "quant_type must be nf4, got None"),
        ({"blocksize": 48}, "blocksize must be 32, 64, .* or 4096, got 48"),
        ({"blocksize": [64]}, r"blocksize must be .*, got \[64\]"),
        ({"shape": None}, "shape must be two or three ints, got None"),
        ({"shape": [N * K]}, "shape must be two or three ints"),
        ({"shape": [-N, -K]}, "shape must be positive ints"),
        ({"shape": [1 << 70, K]}, "weight must have .* bytes"),
    ],
)
def test_refusals(change, why):
    parts, _ = layer_of()
    for name, value in change.items():
        if name in ("blocksize", "shape"):
            parts["state"][name] = value
        else:
            parts[name] = value
    layer = find({name: part for name, part in parts.items() if part is not None})
    assert layer.read is layer.floats is None
    assert re.search(why, layer.refusal), layer.refusal


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"nested_quant_map": None}, "nested_quant_map is missing"),
        (
            {"nested_quant_map": np.zeros(255, np.float32)},
            r"must have 256 numbers, got shape \(255,\)",
        ),
        ({"nested_absmax": np.zeros(2, np.float32)}, r"must have one number, got shape \(2,\)"),
        ({"nested_blocksize": 10**30}, "nested_blocksize must be 32, 64"),
        ({"nested_offset": None}, "nested_offset must be a finite float, got None"),
        ({"nested_offset": 10**400}, "nested_offset must be a finite float"),
    ],
)
def test_refusals_of_nested_maxima(change, why):
    parts, _ = layer_of(nested=True)
    for name, value in change.items():
        (parts["state"] if name in ("nested_blocksize", "nested_offset") else parts)[name] = value
    layer = find({name: part for name, part in parts.items() if part is not None})
    assert layer.floats is None
    assert re.search(why, layer.refusal), layer.refusal


def test_an_unknown_kind_is_refused():
    parts, _ = layer_of()
    parts["state"]["quant_type"] = "af4"
    assert find(parts).refusal == "quant_type must be nf4 or fp4, got 'af4'"


# ---- 8 bits ----------------------------------------------------------------------------------


def int8_layer(seed=0):
    rng = np.random.default_rng(seed)
    scb = abs(rng.standard_normal(N)).astype(np.float32)
    scb[3] = 0
    return {
        "weight": rng.integers(-127, 128, (N, K)).astype(np.int8),
        "SCB": scb,
        "weight_format": np.array(0, np.uint8),
    }


def find_int8(parts):
    tensors = checkpoint({"m": parts})
    layer = bitsandbytes.layers({}, tensors)["m"]
    assert sorted(layer.tensors) == sorted(tensors)
    return layer


def test_8_bits():
    parts = int8_layer()
    wanted = np.empty((N, K), np.float32)
    for n, k in np.ndindex(N, K):
        scale = np.float32(float(parts["SCB"][n]) / 127)
        wanted[n, k] = np.float32(parts["weight"][n, k]) * scale
    layer = find_int8(parts)
    assert (layer.type, layer.shape, layer.refusal) == ("bitsandbytes 8-bit", (N, K), None)
    for weight in layer.read(0), bitsandbytes.unpack_int8(parts["weight"], parts["SCB"]):
        np.testing.assert_array_equal(weight.pack().dequantize(), wanted, strict=True)
    assert layer.packed_nbytes == layer.read(0).pack().nbytes
    exact = parts["weight"] * parts["SCB"].astype(np.float64)[:, None] / 127
    assert (abs(wanted - exact) <= 2.0**-23 * abs(exact)).all()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"weight_format": np.array(2, np.uint8)}, "weight_format must be 0"),
        ({"weight": np.zeros((N, K), np.uint8)}, "weight must be of I8, got U8"),
        ({"weight": np.zeros(N, np.int8)}, "weight must be a non-empty matrix"),
        ({"weight": np.zeros((N, 0), np.int8)}, "weight must be a non-empty matrix"),
        ({"SCB": np.zeros(N - 1, np.float32)}, r"SCB must have shape \(24,\), got \(23,\)"),
        ({"SCB": np.zeros(N, np.float16)}, "SCB must be of F32, got F16"),
    ],
)
def test_refusals_of_8_bits(change, why):
    layer = find_int8(int8_layer() | change)
    assert layer.read is None
    assert re.search(why, layer.refusal), layer.refusal


def test_arguments():
    parts = int8_layer()
    four, _ = layer_of()
    with pytest.raises(TypeError, match="weight must be an array of int8, got uint8"):
        bitsandbytes.unpack_int8(parts["weight"].view(np.uint8), parts["SCB"])
    with pytest.raises(ValueError, match=r"scb must have shape \(24,\), got \(23,\)"):
        bitsandbytes.unpack_int8(parts["weight"], parts["SCB"][1:])
    with pytest.raises(TypeError, match="absmax must be an array of float32, got float16"):
        bitsandbytes.dequantize_4bit(four["weight"], four["absmax"].astype(np.float16), shape=(N, K))
    with pytest.raises(ValueError, match="quant_type must be nf4 or fp4, got 'int4'"):
        bitsandbytes.dequantize_4bit(four["weight"], four["absmax"], shape=(N, K), quant_type="int4")


# ---- bitsandbytes itself ---------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_what_bitsandbytes_itself_saves(tmp_path):
    torch = reader("torch")
    bnb = reader("bitsandbytes")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    given, wanted, state = {}, {}, {}
    for kind in TABLES:
        for nested in (False, True):
            for n, k in ((48, 128), (40, 2048), (16, 96)):
                name = f"{kind}{nested}{k}"
                layer = bnb.nn.Linear4bit(k, n, bias=False, quant_type=kind, compress_statistics=nested)
                given[name] = torch.randn(n, k)
                packed, said = bnb.functional.quantize_4bit(given[name], quant_type=kind, compress_statistics=nested)
                layer.weight.data, layer.weight.quant_state = packed, said
                state |= {f"{name}.{key}": value.contiguous() for key, value in layer.state_dict().items()}
                wanted[name] = bnb.functional.dequantize_4bit(packed, said).numpy()
    codes, scb, _ = bnb.functional.int8_vectorwise_quant(torch.randn(48, 96).half())
    state |= {"eight.weight": codes, "eight.SCB": scb}
    save_file(state, path := tmp_path / "model.safetensors")
    _, tensors = read_file(path, map_file(path))
    found = bitsandbytes.layers({"quant_method": "bitsandbytes"}, tensors)
    assert found.keys() == {*wanted, "eight"}
    for name, floats in wanted.items():
        ours = found[name].floats(0)
        assert abs(ours - given[name].numpy()).max() < 0.17 * abs(given[name].numpy()).max()
        if ours.shape[1] % 64 == 0:  # else its kernel for CPUs takes other blocks than those that it quantizes in
            np.testing.assert_array_equal(ours, floats)
    eight = bnb.functional.int8_vectorwise_dequant(codes, scb).numpy()
    np.testing.assert_array_almost_equal_nulp(found["eight"].read(0).pack().dequantize(), eight, 2)
