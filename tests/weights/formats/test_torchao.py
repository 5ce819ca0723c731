"""torchao's tensors stand for what its own code says."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from readers import reader
from stored import floats, stored

from pyda8w4._filesystem import map_file
from pyda8w4._safetensors import read_file
from pyda8w4.formats import torchao

N, K = 48, 128
FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32]


def signed(rng, bits, shape):
    return rng.integers(-(1 << bits - 1), 1 << bits - 1, shape)


def expected(codes, zeros, scales, offsets, group):
    """(code - zero) * scale + offset of every element, in float32, which rounds product and sum."""
    out = np.empty(codes.shape, np.float32)
    for n, k in np.ndindex(codes.shape):
        g = k // group
        out[n, k] = np.float32(int(codes[n, k]) - int(zeros[g, n])) * np.float32(scales[g, n])
        out[n, k] += np.float32(offsets[g, n])
    return out


def metadata(kind, name="m.weight", **attributes):
    return {name: json.dumps({"_type": kind, "_data": attributes}), "tensor_names": json.dumps([name])}


def of_torch(name):
    return {"_type": "torch.dtype", "_data": name}


def one(found, name="m"):
    assert list(found) == [name]
    return found[name]


def check(layer, weight, wanted, bits=4):
    """A layer of a checkpoint gives what a function gives, and that is what is wanted."""
    assert layer.refusal is None
    assert (layer.type, layer.shape) == (f"torchao {bits}-bit", wanted.shape)
    for packed in weight.pack(), layer.read(0).pack():
        np.testing.assert_array_equal(packed.dequantize(), wanted, strict=True)
    assert layer.packed_nbytes == layer.read(0).pack().nbytes


# ---- Int4Tensor ------------------------------------------------------------------------------


def int4_tensor(rng, dtype, group, n=N, k=K):
    codes = signed(rng, 4, (n, k))
    qdata = np.zeros((n, k // 2), np.int8)
    for row, column in np.ndindex(qdata.shape):
        low, high = codes[row, 2 * column], codes[row, 2 * column + 1]
        qdata[row, column] = np.uint8(high % 16 * 16 + low % 16).view(np.int8)
    groups = -(-k // group)
    return codes, {
        "qdata": qdata,
        "scale": floats(rng, (groups, n), dtype),
        "zero_point": floats(rng, (groups, n), dtype),
    }


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group", [32, 128, 48])
def test_int4_tensor(dtype, group):
    codes, parts = int4_tensor(np.random.default_rng(0), dtype, group)
    wanted = expected(codes, np.zeros_like(parts["scale"]), parts["scale"], parts["zero_point"], group)
    tensors = stored({f"m._weight_{name}": part for name, part in parts.items()})
    layer = one(torchao.layers({}, tensors, metadata("Int4Tensor", block_size=[1, group], shape=[N, K])))
    check(layer, torchao.unpack_int4(**parts, group_size=group), wanted)
    assert sorted(layer.tensors) == sorted(tensors)
    assert layer.nbytes == sum(part.nbytes for part in parts.values())


def test_activations_are_scaled_first():
    rng = np.random.default_rng(1)
    codes, parts = int4_tensor(rng, np.float16, 32)
    parts["act_pre_scale"] = floats(rng, K, np.float16)
    wanted = expected(codes, np.zeros_like(parts["scale"]), parts["scale"], parts["zero_point"], 32)
    wanted *= parts["act_pre_scale"].astype(np.float32)
    tensors = stored({f"m._weight_{name}": part for name, part in parts.items()})
    found = torchao.layers({}, tensors, metadata("Int4Tensor", block_size=[1, 32], shape=[N, K]))
    check(one(found), torchao.unpack_int4(**parts, group_size=32), wanted)
    assert one(found).format.has_factors


def test_stacks_of_experts_are_not_weights_of_modules():
    rng = np.random.default_rng(2)
    experts = [int4_tensor(rng, ml_dtypes.bfloat16, 32) for _ in range(3)]
    parts = {name: np.stack([parts[name] for _, parts in experts]) for name in experts[0][1]}
    tensors = stored({f"mlp.experts._up_{name}": part for name, part in parts.items()})
    said = metadata("Int4Tensor", "mlp.experts.up", block_size=[1, 1, 32], shape=[3, N, K])
    layer = one(torchao.layers({}, tensors, said), "mlp.experts.up")
    assert layer.shape == (3, N, K)
    assert layer.packed_nbytes == sum(layer.read(i).pack().nbytes for i in range(3))
    for i, (codes, one_expert) in enumerate(experts):
        zeros = np.zeros_like(one_expert["scale"])
        wanted = expected(codes, zeros, one_expert["scale"], one_expert["zero_point"], 32)
        np.testing.assert_array_equal(layer.read(i).pack().dequantize(), wanted)


# ---- Int4PlainInt32Tensor --------------------------------------------------------------------


def plain_int32(rng, group):
    codes = rng.integers(0, 16, (N, K))
    qdata = np.zeros((N, K // 8), np.int64)
    for n, k in np.ndindex(codes.shape):
        qdata[n, k // 8] |= int(codes[n, k]) << 4 * (k % 8)
    scale = floats(rng, (K // group, N), np.float16)
    zero_point = rng.integers(0, 16, (K // group, N)).astype(np.int8)
    return codes, {"qdata": qdata.astype(np.uint32).view(np.int32), "scale": scale, "zero_point": zero_point}


def test_plain_int32():
    codes, parts = plain_int32(np.random.default_rng(3), 64)
    wanted = expected(codes, parts["zero_point"], parts["scale"], np.zeros_like(parts["scale"]), 64)
    tensors = stored({f"m._weight_{name}": part for name, part in parts.items()})
    found = torchao.layers({}, tensors, metadata("Int4PlainInt32Tensor", block_size=[1, 64], shape=[N, K]))
    check(one(found), torchao.unpack_plain_int32(**parts, group_size=64), wanted)


def test_tensors_for_ascend_are_refused():
    """Their zero points are floats, and their codes have signs."""
    _, parts = plain_int32(np.random.default_rng(3), 64)
    parts["zero_point"] = parts["zero_point"].astype(np.float16)
    tensors = stored({f"m._weight_{name}": part for name, part in parts.items()})
    layer = one(torchao.layers({}, tensors, metadata("Int4PlainInt32Tensor", block_size=[1, 64], shape=[N, K])))
    assert layer.refusal == "m._weight_zero_point must be of I8, got F16"
    with pytest.raises(TypeError, match="zero_point must be an array of int8, got float16"):
        torchao.unpack_plain_int32(**parts, group_size=64)


# ---- Int4TilePackedTo4dTensor ----------------------------------------------------------------


def tiles(codes, inner):
    """`codes`, padded, as the threads of matrix_to_m16n8k16_Bint4_layout pack them: int4mm.cu of PyTorch."""
    n, k = codes.shape
    out = np.zeros((n // 8, k // (16 * inner), 32, inner // 2), np.uint32)
    for tile, outer, lane, pair in np.ndindex(out.shape):
        row = 8 * tile + lane // 4
        first = 16 * (outer * inner + 2 * pair)
        of_lane = [
            first + 16 * half + 8 * eight + 2 * (lane % 4) + odd
            for half in (0, 1)
            for eight in (0, 1)
            for odd in (0, 1)
        ]
        v = [int(codes[row, column]) for column in of_lane]
        for place, value in zip(range(28, -1, -4), (v[7], v[5], v[3], v[1], v[6], v[4], v[2], v[0])):
            out[tile, outer, lane, pair] |= np.uint32(value << place)
    return out.view(np.int32)


@pytest.mark.parametrize(("shape", "inner"), [((48, 1024), 8), ((43, 900), 8), ((8, 128), 4), ((16, 64), 2)])
def test_tile_packed(shape, inner):
    rng = np.random.default_rng(4)
    n, k = shape
    all_n, all_k = -(-n // 8) * 8, -(-k // 128) * 128 if inner == 8 else k
    codes = rng.integers(0, 16, (all_n, all_k))
    both = floats(rng, (all_k // 32, all_n, 2), ml_dtypes.bfloat16)
    parts = {"qdata": tiles(codes, inner), "scale_and_zero": both}
    eights = np.full(both.shape[:2], 8)
    wanted = expected(codes[:n, :k], eights, both[:, :, 0], both[:, :, 1], 32)
    tensors = stored({f"m._weight_{name}": part for name, part in parts.items()})
    found = torchao.layers({}, tensors, metadata("Int4TilePackedTo4dTensor", block_size=[1, 32], shape=[n, k]))
    check(one(found), torchao.unpack_tile_packed(**parts, shape=shape, group_size=32), wanted)


# ---- IntxUnpackedToInt8Tensor, Int8Tensor ----------------------------------------------------


def intx(rng, bits, dtype, block, symmetric):
    blocks = N // block[0], K // block[1]
    parts = {"qdata": signed(rng, bits, (N, K)).astype(np.int8), "scale": floats(rng, blocks, dtype)}
    zeros = np.zeros(blocks, np.int8) if symmetric else signed(rng, bits, blocks).astype(np.int8)
    return parts | {"zero_point": zeros}


def expected_of_blocks(parts, block):
    """In exact arithmetic, then rounded to float32: codes, zero points and scales have few bits."""
    out = np.empty((N, K), np.float32)
    for n, k in np.ndindex(out.shape):
        at = n // block[0], k // block[1]
        out[n, k] = (float(parts["qdata"][n, k]) - float(parts["zero_point"][at])) * float(parts["scale"][at])
    return out


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_intx_unpacked(bits, dtype, symmetric):
    block = (1, 32)
    parts = intx(np.random.default_rng(bits), bits, dtype, block, symmetric)
    tensors = stored({f"m._weight_{name}": part for name, part in parts.items()})
    said = metadata("IntxUnpackedToInt8Tensor", target_dtype=of_torch(f"int{bits}"), block_size=[1, 32], dtype="x")
    weight = torchao.unpack_int8(**parts, block_size=block, bits=bits)
    kept = {5: 5, 6: 6, 7: 8, 8: 8}.get(bits, 4)
    assert weight.bits == kept
    check(one(torchao.layers({}, tensors, said)), weight, expected_of_blocks(parts, block), kept)


@pytest.mark.parametrize("block", [(1, K), (N, K), (4, 64)])
@pytest.mark.parametrize("with_zeros", [True, False])
def test_int8(block, with_zeros):
    parts = intx(np.random.default_rng(5), 8, np.float32, block, not with_zeros)
    wanted = expected_of_blocks(parts, block)
    if not with_zeros:
        del parts["zero_point"]
    tensors = stored({f"m._weight_{name}": part for name, part in parts.items()})
    layer = one(torchao.layers({}, tensors, metadata("Int8Tensor", block_size=list(block), dtype=of_torch("float16"))))
    check(layer, torchao.unpack_int8(**parts, block_size=block), wanted, 8)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_float_zero_points(dtype):
    rng = np.random.default_rng(6)
    block = (1, 64)
    parts = intx(rng, 4, dtype, block, True)
    parts["zero_point"] = floats(rng, parts["scale"].shape, dtype)
    weight = torchao.unpack_int8(**parts, block_size=block, bits=4)
    assert weight.offsets is not None
    tensors = stored({f"m._weight_{name}": part for name, part in parts.items()})
    said = metadata("IntxUnpackedToInt8Tensor", target_dtype=of_torch("int4"), block_size=[1, 64])
    check(one(torchao.layers({}, tensors, said)), weight, expected_of_blocks(parts, block))
    parts["zero_point"] = np.rint(parts["zero_point"].astype(np.float32)).astype(dtype)
    weight = torchao.unpack_int8(**parts, block_size=block, bits=4)
    assert weight.offsets is None
    np.testing.assert_array_equal(weight.pack().dequantize(), expected_of_blocks(parts, block))


def test_float_zero_points_that_are_not_exact():
    ones = np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match="the products of zero points and scales must be exact in float32"):
        torchao.unpack_int8(np.zeros((1, 4), np.int8), ones + ones / 3, ones / 3, block_size=(1, 4))


# ---- torchao itself --------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_what_torchao_itself_saves(tmp_path):
    torch = reader("torch")
    quantization = reader("torchao.quantization")
    support = reader("torchao.prototype.safetensors.safetensors_support")
    primitives = reader("torchao.quantization.quant_primitives")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weight = torch.randn(N, K)
    intx = quantization.IntxUnpackedToInt8Tensor.from_hp
    asymmetric = quantization.MappingType.ASYMMETRIC
    exact = {  # by name: torchao's tensors, which dequantize to float32
        "a": intx(weight, (1, 32), torch.int4),
        "b": intx(weight, (1, 64), torch.int4, mapping_type=asymmetric),
        "c": intx(weight, (1, K), torch.int8, mapping_type=asymmetric),
        "d": intx(weight, (1, 32), torch.int3, mapping_type=asymmetric),
        "e": quantization.Int8Tensor.from_hp(weight, quantization.PerRow()),
        "f": quantization.Int8Tensor.from_hp(weight, quantization.PerTensor()),
    }
    rounded = {  # and to bfloat16
        "g": intx(weight.bfloat16(), (1, 32), torch.int4, mapping_type=asymmetric),
        "h": intx(weight.bfloat16(), (1, 32), torch.int8),
    }
    rng = np.random.default_rng(7)
    _, parts = int4_tensor(rng, np.float16, 32)
    parts = {name: torch.from_numpy(part) for name, part in parts.items()}
    int4 = quantization.Int4Tensor(**parts, block_size=[1, 32], shape=torch.Size((N, K)))
    codes = rng.integers(0, 16, (48, 1024))
    both = torch.from_numpy(floats(rng, (16, 48, 2), np.float32)).bfloat16()
    tile_packed = quantization.Int4TilePackedTo4dTensor(
        torch.from_numpy(tiles(codes, 8)), both, block_size=[1, 64], shape=torch.Size((48, 1024))
    )
    state = {f"{name}.weight": tensor for name, tensor in {**exact, **rounded, "i": int4, "j": tile_packed}.items()}
    state["norm.weight"] = weight[0]
    flat, said = support.flatten_tensor_state_dict(state)
    save_file(flat, path := tmp_path / "model.safetensors", said)

    said, tensors = read_file(path, map_file(path))
    found = torchao.layers({"quant_method": "torchao"}, tensors, said)
    assert {name: layer.refusal for name, layer in found.items()} == dict.fromkeys("abcdefghij")
    assert tensors.keys() - {name for layer in found.values() for name in layer.tensors} == {"norm.weight"}
    ours = {name: layer.read(0).pack() for name, layer in found.items()}
    for name, layer in found.items():
        assert layer.packed_nbytes == ours[name].nbytes
    for name, tensor in exact.items():
        np.testing.assert_array_equal(ours[name].dequantize(), tensor.dequantize().numpy())
    for name, tensor in rounded.items():
        got = torch.from_numpy(ours[name].dequantize()).bfloat16()
        assert torch.equal(got, tensor.dequantize())
    scale, zero = both.transpose(0, 1).float().unbind(-1)
    theirs = primitives._dequantize_affine_tinygemm(
        torch.from_numpy(codes).int(), (1, 64), scale.contiguous(), zero.contiguous(), torch.int32, 0, 15
    )
    np.testing.assert_array_equal(ours["j"].dequantize(), theirs.numpy())


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"_type": "Float8Tensor"}, "Float8Tensor are no integers"),
        ({"_type": "Int4OpaqueTensor"}, "Int4OpaqueTensor are no integers"),
        ({"_data": None}, "metadata must have attributes, got None"),
        ({"_tensor_data_names": "qdata"}, "_tensor_data_names must be a list of strings, got qdata"),
        ({"_tensor_data_names": ["qdata", "act_pre_scale"]}, "m._weight_act_pre_scale is missing"),
        ({"_tensor_data_names": ["qdata", "rotation"]}, "its metadata has a tensor 'rotation', which is not known"),
        ({"block_size": "x"}, "block_size must be positive ints, got 'x'"),
        ({"block_size": [1]}, "block_size must be 1 and the size of a group"),
        ({"block_size": [2, 32]}, "block_size must be 1 and the size of a group"),
        ({"block_size": [1, 0]}, "block_size must be positive ints"),
        ({"block_size": [1, 30]}, "group_size must be a multiple of 4, or K = 128, got 30"),
        ({"block_size": [1, 16]}, r"scale must have shape \(8, 48\), got \(4, 48\)"),
        ({"block_size": [1, 10**30]}, r"scale must have shape \(1, 48\), got \(4, 48\)"),
        ({"shape": [N, K + 2]}, r"shape must be \(48, 128\) for this qdata"),
        ({"shape": [2, N, K]}, r"shape must be \(48, 128\) for this qdata"),
        ({"qdata": None}, "m._weight_qdata is missing"),
        ({"scale": None}, "m._weight_scale is missing"),
        ({"zero_point": None}, "m._weight_zero_point is missing"),
        ({"qdata": np.zeros((N, K // 2), np.int32)}, "qdata must be of I8 or U8, got I32"),
        ({"qdata": np.zeros(N, np.int8)}, "m._weight_qdata must be a non-empty matrix"),
        ({"qdata": np.zeros((N, 0), np.int8)}, "m._weight_qdata must be a non-empty matrix"),
        ({"qdata": np.zeros((2, N, K // 2), np.int8)}, "m._weight_zero_point must have 2 matrices"),
        ({"qdata": np.zeros((0, N, K // 2), np.int8)}, "stacks must have matrices, got none"),
        ({"scale": np.zeros((N, 4), np.float16)}, r"scale must have shape \(4, 48\), got \(48, 4\)"),
        ({"scale": np.zeros((4, N), np.int32)}, "scale must be of F32, F16 or BF16, got I32"),
        ({"act_pre_scale": np.zeros(K - 1, np.float16)}, r"act_pre_scale must have shape \(128,\), got \(127,\)"),
        ({"act_pre_scale": np.zeros((), np.float16)}, r"act_pre_scale must have shape \(128,\), got \(\)"),
    ],
)
def test_refusals(change, why):
    _, parts = int4_tensor(np.random.default_rng(8), np.float16, 32)
    entry = {"_type": "Int4Tensor", "_data": {"block_size": [1, 32], "shape": [N, K]}}
    for name, value in change.items():
        if name.startswith("_"):
            entry[name] = value
        elif name in ("block_size", "shape"):
            entry["_data"][name] = value
        else:
            parts[name] = value
    tensors = stored({f"m._weight_{name}": part for name, part in parts.items() if part is not None})
    layer = one(torchao.layers({}, tensors, {"m.weight": json.dumps(entry)}))
    assert layer.read is None
    assert re.search(why, layer.refusal), layer.refusal
    assert sorted(layer.tensors) == sorted(tensors)


def test_tensors_without_metadata_are_refused():
    _, parts = int4_tensor(np.random.default_rng(9), np.float16, 32)
    tensors = stored({f"m._weight_{name}": part for name, part in parts.items()})
    for text in ("no JSON", "[" * 100_000, "[]", "{}", '{"_type": 3}', '{"_type": "Tensor"}'):
        layer = one(torchao.layers({}, tensors, {"m.weight": text}))
        assert layer.refusal == "m._weight_qdata must have metadata in the header of a file, got none"
        assert sorted(layer.tensors) == sorted(tensors)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"target_dtype": of_torch("int9")}, "target_dtype must be int1, "),
        ({"target_dtype": "int4"}, "target_dtype must be int1, .*, got None"),
        ({"block_size": [1, 33]}, r"block_size must divide \(48, 128\), got \(1, 33\)"),
        ({"block_size": [1, 256]}, "block_size must be two ints from 1 to 48 and 128"),
        ({"block_size": [1, 64]}, "scale must have 96 numbers"),
        ({"block_size": [1, 2]}, "scale must have 3072 numbers"),
    ],
)
def test_refusals_of_blocks(change, why):
    parts = intx(np.random.default_rng(10), 4, np.float16, (1, 32), True)
    tensors = stored({f"m._weight_{name}": part for name, part in parts.items()})
    said = {"target_dtype": of_torch("int4"), "block_size": [1, 32], **change}
    layer = one(torchao.layers({}, tensors, metadata("IntxUnpackedToInt8Tensor", **said)))
    assert layer.read is None
    assert re.search(why, layer.refusal), layer.refusal


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"qdata": np.zeros((2, 1, 16, 4), np.int32)}, r"qdata must have shape \(N / 8, K / \(32 \* T\), 32, T\)"),
        (
            {"qdata": np.zeros((2, 1, 32), np.int32)},
            r"qdata must have shape .*, got \(2, 1, 32\)",
        ),
        ({"scale_and_zero": np.zeros((4, 16, 1), np.float16)}, r"scale_and_zero must have shape \(4, 16, 2\)"),
        ({"shape": (17, 128)}, "shape must be two ints from 1 to 16 and 128, got"),
        ({"shape": (16, 0)}, "shape must be two ints from 1 to 16 and 128, got"),
        ({"shape": (16, 128, 1)}, "shape must be two ints"),
        ({"group_size": 0}, "group_size must be a multiple of 4, or K = 128, got 0"),
    ],
)
def test_tiles_that_do_not_fit(change, why):
    given = {"qdata": np.zeros((2, 1, 32, 4), np.int32), "scale_and_zero": np.zeros((4, 16, 2), np.float16)}
    given |= {"shape": (16, 128), "group_size": 32}
    torchao.unpack_tile_packed(**given).pack()
    with pytest.raises(ValueError, match=why):
        torchao.unpack_tile_packed(**given | change)
