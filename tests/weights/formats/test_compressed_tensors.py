"""compressed-tensors: compared with unpackers that follow its definition number by number, and with its own."""

import itertools
import warnings
from fractions import Fraction

import numpy as np
import pytest
from cases import assert_same_bits

ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
from readers import reader
from stored import bfloat16, checkpoint

from pyda8w4.formats import _bits
from pyda8w4.formats import compressed_tensors as ct

E2M1 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


# ---- what is written, and what it stands for -------------------------------------------------


def packed_along_last(codes, num_bits):
    """Each row is one large number, whose digits are codes + half the range, cut into words of 32 bits."""
    words = -(-codes.shape[-1] * num_bits // 32)
    rows = []
    for row in codes.reshape(-1, codes.shape[-1]):
        number = sum((int(code) + (1 << num_bits - 1)) << num_bits * k for k, code in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(4 * words, "little"), "<i4"))
    return np.array(rows, np.int32).reshape(*codes.shape[:-1], words)


def packed_zero_points(zps, num_bits):
    """Along N, of each expert."""
    return np.ascontiguousarray(packed_along_last(zps.swapaxes(-1, -2), num_bits).swapaxes(-1, -2))


def defined(codes, scales, zps=None, group_of=None):
    """Fractions, number by number: float32 holds them, or they are rounded once."""
    n, k = codes.shape
    found = np.empty((n, k), np.float32)
    for row, column in itertools.product(range(n), range(k)):
        group = 0 if group_of is None else int(group_of[column])
        code = int(codes[row, column]) - (0 if zps is None else int(zps[row % len(zps), group]))
        found[row, column] = float(code * Fraction(float(scales[row % len(scales), group])))
    return found


def case(n=40, k=96, *, num_bits=4, group=32, symmetric=True, scales=np.float16, seed=0):
    """Codes, scales and zero points: of a group, of a row (None), or of the tensor (0)."""
    rng = np.random.default_rng(seed)
    half = 1 << num_bits - 1
    codes = rng.integers(-half, half, (n, k)).astype(np.int8)
    shape = (1, 1) if group == 0 else (n, -(-k // (group or k)))
    zps = None if symmetric else rng.integers(-half, half, shape).astype(np.int8)
    return codes, rng.normal(size=shape).astype(scales), zps


def parts_packed(codes, scales, zps=None, *, num_bits=4, tensor=False):
    parts = {
        "weight_packed": packed_along_last(codes, num_bits),
        "weight_scale": scales.reshape(-1) if tensor else scales,
        "weight_shape": np.array(codes.shape, np.int64),
    }
    if zps is not None:
        parts["weight_zero_point"] = zps.reshape(-1) if tensor else packed_zero_points(zps, num_bits)
    return parts


def config(*, format="pack-quantized", targets=("Linear",), **weights):
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | weights
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": format,
        "config_groups": {"group_0": {"targets": list(targets), "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
        "sparsity_config": {"format": "dense"},
        "transform_config": {},
    }


def only(config, parts, module="model.layers.0.mlp.up_proj"):
    layers = ct.layers(config, checkpoint({module: parts}))
    assert list(layers) == [module]
    return layers[module]


def groups(k, group):
    return np.arange(k) // (group or k)


# ---- pack-quantized --------------------------------------------------------------------------


STRATEGIES = [("group", 32), ("channel", None), ("tensor", 0)]
TYPES = [np.float16, np.float32, ml_dtypes.bfloat16]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy, group", STRATEGIES)
@pytest.mark.parametrize("num_bits", range(1, 9))
def test_packed(num_bits, strategy, group, symmetric):
    codes, scales, zps = case(num_bits=num_bits, group=group, symmetric=symmetric, scales=TYPES[num_bits % 3])
    parts = parts_packed(codes, scales, zps, num_bits=num_bits, tensor=strategy == "tensor")
    how = config(num_bits=num_bits, strategy=strategy, group_size=group or None, symmetric=symmetric)
    layer = only(how, parts)
    assert (layer.type, layer.shape, layer.refusal) == (f"compressed-tensors {num_bits}-bit", codes.shape, None)
    weight = layer.read(0)
    assert weight.bits == {1: 4, 2: 4, 3: 4, 7: 8}.get(num_bits, num_bits)
    packed = weight.pack()
    np.testing.assert_array_equal(packed.dequantize(), defined(codes, scales, zps, groups(96, group)))
    assert layer.packed_nbytes == packed.nbytes
    of_arrays = ct.pack_quantized(**parts, num_bits=num_bits, group_size=group or None)
    np.testing.assert_array_equal(of_arrays.pack().dequantize(), packed.dequantize())


@pytest.mark.parametrize("n, k, group", [(33, 36, 12), (9, 37, None), (31, 44, 32), (2, 1, None)])
def test_rows_and_columns_that_do_not_fill_words(n, k, group, monkeypatch):
    monkeypatch.setattr(_bits, "_CACHED", 250)  # some rows at once, and the rest
    codes, scales, zps = case(n, k, group=group, symmetric=False)
    how = config(strategy="group" if group else "channel", group_size=group, symmetric=False)
    layer = only(how, parts_packed(codes, scales, zps))
    assert layer.shape == (n, k)
    np.testing.assert_array_equal(layer.read(0).pack().dequantize(), defined(codes, scales, zps, groups(k, group)))


def test_group_order():
    """`weight_g_idx` says which scale each column has."""
    codes, scales, zps = case(symmetric=False)
    parts = parts_packed(codes, scales, zps)
    for order in (np.random.default_rng(1).permutation(96), np.arange(96)):
        g_idx = groups(96, 32)[order].astype(np.int32)
        layer = only(config(actorder="group", symmetric=False), parts | {"weight_g_idx": g_idx})
        weight = layer.read(0)
        np.testing.assert_array_equal(weight.pack().dequantize(), defined(codes, scales, zps, g_idx))
        if (order == np.arange(96)).all():
            assert weight.perm is None
        else:
            assert layer.packed_nbytes == weight.pack().nbytes
    unset = only(config(symmetric=False), parts | {"weight_g_idx": np.full(96, -1, np.int32)})
    np.testing.assert_array_equal(unset.read(0).pack().dequantize(), defined(codes, scales, zps, groups(96, 32)))
    for at, wrong in (0, -1), (0, 3), (5, 1), (95, 2**31 - 1):
        g_idx = groups(96, 32).astype(np.int32)
        g_idx[at] = wrong
        with pytest.raises(ValueError, match="weight_g_idx must have each of 0 to 2 32 times"):
            only(config(symmetric=False), parts | {"weight_g_idx": g_idx}).read(0)


@pytest.mark.pitfall("tpu-inference #3487", "zero points of experts along another axis")
@pytest.mark.parametrize("n, k, group", [(24, 96, 32), (20, 64, None), (16, 32, 8)])
def test_stacks_of_experts(n, k, group):
    """Zero points of experts are packed along N, as those of matrices."""
    experts = [case(n, k, group=group, symmetric=False, seed=seed) for seed in range(3)]
    codes, scales, zps = (np.stack(arrays) for arrays in zip(*experts, strict=True))
    how = config(symmetric=False, strategy="group" if group else "channel", group_size=group)
    layer = only(how, parts_packed(codes, scales, zps))
    assert layer.shape == (3, n, k)
    packed = [layer.read(index).pack() for index in range(3)]
    assert layer.packed_nbytes == sum(weight.nbytes for weight in packed)
    for weight, expert in zip(packed, experts, strict=True):
        np.testing.assert_array_equal(weight.dequantize(), defined(*expert, groups(k, group)))


def test_kimi_k2():
    """Experts one by one: 4 bits in groups of 32, without zero points, scales of bfloat16, a shape of int32."""
    codes, scales, _ = case(scales=ml_dtypes.bfloat16)
    scales[0, 0] = 1e-30  # not in float16
    parts = parts_packed(codes, scales) | {"weight_shape": np.array(codes.shape, np.int32)}
    ignore = {"ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|down)_proj.*"]}
    layer = only(config() | ignore, parts, "model.layers.1.mlp.experts.383.down_proj")
    packed = layer.read(0).pack()
    np.testing.assert_array_equal(packed.dequantize(), defined(codes, scales, None, groups(96, 32)))
    assert (packed.scale_dtype, packed.zero_point, packed.nbytes) == ("bfloat16", 8, layer.packed_nbytes)


# ---- int-quantized ---------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy, group", STRATEGIES)
@pytest.mark.parametrize("num_bits", [2, 4, 5, 6, 7, 8])
def test_int8(num_bits, strategy, group, symmetric):
    codes, scales, zps = case(num_bits=num_bits, group=group, symmetric=symmetric, scales=TYPES[num_bits % 3])
    shape = (1,) if group == 0 else scales.shape
    parts = {"weight": codes, "weight_scale": scales.reshape(shape)}
    parts |= {} if symmetric else {"weight_zero_point": zps.reshape(shape)}
    how = config(format="int-quantized", num_bits=num_bits, strategy=strategy, group_size=group or None)
    layer = only(how, parts)
    packed = layer.read(0).pack()
    assert (layer.type, layer.shape) == (f"compressed-tensors {num_bits}-bit", codes.shape)
    np.testing.assert_array_equal(packed.dequantize(), defined(codes, scales, zps, groups(96, group)))
    assert packed.nbytes == layer.packed_nbytes
    of_arrays = ct.int_quantized(**parts, num_bits=num_bits, group_size=group or None)
    np.testing.assert_array_equal(of_arrays.pack().dequantize(), packed.dequantize())


def test_stacks_of_int8():
    experts = [case(num_bits=8, group=None, seed=seed) for seed in range(2)]
    parts = {"weight": np.stack([e[0] for e in experts]), "weight_scale": np.stack([e[1] for e in experts])}
    layer = only(config(num_bits=8, strategy="channel", group_size=None, format="int-quantized"), parts)
    for index, (codes, scales, _) in enumerate(experts):
        np.testing.assert_array_equal(
            layer.read(index).pack().dequantize(), defined(codes, scales, None, groups(96, None))
        )


@pytest.mark.pitfall("auto-round #2273", "zero points without a sign, weights cut off")
def test_asymmetric_zero_points_out_of_range():
    codes, scales, zps = case(symmetric=False)
    unsigned = np.clip(zps.astype(int) + 8, 0, 15).astype(np.int8)
    parts = {"weight": codes, "weight_scale": scales, "weight_zero_point": unsigned}
    layer = only(config(format="int-quantized", symmetric=False), parts)
    with pytest.raises(ValueError, match="weight_zero_point must hold -8 to 7 of 4 bits, got 0 to 15"):
        layer.read(0)
    # Of 8 bits zero points wrap, and of packed ones nothing tells: but most weights are cut off.
    floats = np.random.default_rng(0).normal(size=codes.shape).astype(np.float32)
    clamped = np.clip(np.rint(floats * 3) + 8, -8, 7).astype(np.int8)
    with pytest.warns(UserWarning, match=r"layers.0.mlp.up_proj has its greatest code, 7, in more than a third"):
        only(config(symmetric=False), parts_packed(clamped, scales, zps)).read(0)
    with pytest.warns(UserWarning, match="up_proj has its greatest code, 127"):
        clamped = np.clip(np.rint(floats * 40) + 128, -128, 127).astype(np.int8)
        parts = {"weight": clamped, "weight_scale": scales, "weight_zero_point": np.full_like(zps, -128)}
        only(config(symmetric=False, num_bits=8), parts).read(0)


def test_codes_of_more_bits_are_refused():
    codes, scales, _ = case(num_bits=5)
    layer = only(config(format="int-quantized"), {"weight": codes, "weight_scale": scales})
    with pytest.raises(ValueError, match="weight must hold -8 to 7 of 4 bits, got -16 to 15"):
        layer.read(0)


# ---- floats of 4 bits ------------------------------------------------------------------------


def nibbles(packed):
    """Column 2i is the low nibble of byte i."""
    codes = np.empty((len(packed), 2 * packed.shape[1]), int)
    for k in range(codes.shape[1]):
        codes[:, k] = packed[:, k // 2] // 16 if k % 2 else packed[:, k // 2] % 16
    return codes


def case_nvfp4(n=40, k=96, seed=0):
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (n, k // 2), np.uint8)
    scales = rng.permutation(np.resize(np.delete(np.arange(256), [127, 255]), n * k // 16)).astype(np.uint8)
    return packed, scales.reshape(n, -1).view(ml_dtypes.float8_e4m3fn), np.float32([rng.uniform(100, 30000)])


def defined_nvfp4(packed, scales, divisor):
    return E2M1[nibbles(packed)] * np.repeat(scales.astype(np.float32) / divisor, 16, axis=1)


def test_nvfp4():
    packed, scales, divisor = case_nvfp4()
    how = config(format="nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)
    parts = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": divisor}
    layer = only(how, parts | {"input_global_scale": np.float32([3])})
    assert (layer.type, layer.shape, len(layer.tensors)) == ("compressed-tensors NVFP4", (40, 96), 4)
    weight = layer.read(0).pack()
    np.testing.assert_array_equal(weight.dequantize(), defined_nvfp4(packed, scales, divisor))
    assert layer.packed_nbytes == weight.nbytes
    of_arrays = ct.nvfp4_pack_quantized(packed, scales, divisor)
    np.testing.assert_array_equal(of_arrays.pack().dequantize(), weight.dequantize())


@pytest.mark.parametrize("shared", [False, True])
def test_stacks_of_nvfp4(shared):
    experts = [case_nvfp4(seed=seed) for seed in range(3)]
    packed, scales, divisors = (np.stack(arrays) for arrays in zip(*experts, strict=True))
    divisors = divisors[0] if shared else divisors
    how = config(format="nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)
    layer = only(how, {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": divisors})
    assert layer.shape == (3, 40, 96)
    for index in range(3):
        wanted = defined_nvfp4(packed[index], scales[index], divisors[0] if shared else divisors[index])
        np.testing.assert_array_equal(layer.read(index).pack().dequantize(), wanted)


@pytest.mark.parametrize("stored_as", [np.uint8, ml_dtypes.float8_e8m0fnu])
def test_mxfp4(stored_as):
    rng = np.random.default_rng(0)
    packed, scales = rng.integers(0, 256, (40, 48), np.uint8), rng.integers(0, 253, (40, 3), np.uint8)
    how = config(format="mxfp4-pack-quantized", type="float")
    layer = only(how, {"weight_packed": packed, "weight_scale": scales.view(stored_as)})
    assert (layer.type, layer.shape) == ("compressed-tensors MXFP4", (40, 96))
    weight = layer.read(0).pack()
    powers = np.repeat(scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64), 32, axis=1)
    np.testing.assert_array_equal(weight.dequantize(), (E2M1[nibbles(packed)] * powers).astype(np.float32))
    assert layer.packed_nbytes == weight.nbytes
    np.testing.assert_array_equal(ct.mxfp4_pack_quantized(packed, scales).pack().dequantize(), weight.dequantize())


def test_scales_that_are_no_numbers():
    packed = np.zeros((1, 16), np.uint8)
    with pytest.raises(ValueError, match="weight_scale must be 0 to 254, got 255, which stands for NaN"):
        ct.mxfp4_pack_quantized(packed, np.uint8([[255]]))
    with pytest.raises(ValueError, match="weight_scale must be numbers, got NaN"):
        ct.nvfp4_pack_quantized(packed, np.uint8([[1, 255]]), np.float32([1]))
    for divisor in (0, -1, np.inf, np.nan):
        with pytest.raises(ValueError, match="weight_global_scale must be above 0 and finite, got"):
            ct.nvfp4_pack_quantized(packed, np.uint8([[1, 2]]), np.float32([divisor]))
    with pytest.raises(ValueError, match="scales must be finite"):
        ct.nvfp4_pack_quantized(packed, np.uint8([[1, 120]]), np.float32([1e-44])).pack()


# ---- floats of 8 bits ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scales, weights",
    [
        ((), {"strategy": "tensor", "group_size": None}),
        ((1,), {"strategy": "tensor", "group_size": None}),
        ((40, 1), {"strategy": "channel", "group_size": None}),
        ((40,), {"strategy": "channel", "group_size": None}),
        ((3, 2), {"strategy": "block", "block_structure": [16, 64], "group_size": None}),
        ((1, 1), {"strategy": "block", "block_structure": [10**12, 10**12], "group_size": None}),
        ((40, 3), {"strategy": "group"}),
    ],
)
def test_float8_is_refused_but_for_floats(scales, weights):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(40, 96)).astype(ml_dtypes.float8_e4m3fn)
    scale = bfloat16(rng.uniform(0.1, 1, scales))
    how = config(type="float", num_bits=8, format="float-quantized", **weights)
    layer = only(how, {"weight": weight, "weight_scale": scale})
    assert layer.type == ("compressed-tensors MXFP8" if weights["strategy"] == "group" else "compressed-tensors FP8")
    assert (layer.shape, layer.read, "floats of 8 bits" in layer.refusal) == ((40, 96), None, True)
    height, width = {(3, 2): (16, 64), (40, 3): (1, 32), (40, 1): (1, 96), (40,): (1, 96)}.get(scales, (40, 96))
    wanted = np.empty((40, 96), np.float32)
    table = scale.astype(np.float32).reshape(-(-40 // height), -1)
    for n, k in itertools.product(range(40), range(96)):
        wanted[n, k] = np.float32(weight[n, k]) * table[n // height, k // width]
    assert_same_bits(layer.floats(0), wanted)


def test_mxfp8():
    rng = np.random.default_rng(0)
    weight, scale = rng.normal(size=(4, 64)).astype(ml_dtypes.float8_e4m3fn), rng.integers(100, 150, (4, 2), np.uint8)
    parts = {"weight": weight, "weight_scale": scale}
    layer = only(config(type="float", num_bits=8, format="mxfp8-quantized"), parts)
    assert layer.type == "compressed-tensors MXFP8"
    powers = np.repeat(scale.view(ml_dtypes.float8_e8m0fnu).astype(np.float32), 32, axis=1)
    assert_same_bits(layer.floats(0), weight.astype(np.float32) * powers)
    scale[3, 1] = 255
    with pytest.raises(ValueError, match="which stands for NaN"):
        only(config(type="float", num_bits=8), {"weight": weight, "weight_scale": scale}).floats(0)


# ---- configs ---------------------------------------------------------------------------------


def test_mixed_precision():
    """Targets: a module's name before expressions, these before classes; embeddings, heads and biases."""
    four, eight = {"num_bits": 4, "group_size": 32}, {"num_bits": 8, "strategy": "channel"}
    two = {"num_bits": 2, "group_size": 32}
    groups_of = {
        "a": (["Linear"], four, "pack-quantized"),
        "b": (["re:.*mlp.*", "Embedding"], eight, "pack-quantized"),
        "c": (["layers.1.mlp.up_proj", "lm_head"], two, "pack-quantized"),
        "d": (["re:.*v_proj$"], eight, "int-quantized"),
        "e": (["Attention"], None, None),
    }
    how = {
        "format": "mixed-precision",
        "config_groups": {
            key: {"targets": targets, "weights": weights, "format": format}
            for key, (targets, weights, format) in groups_of.items()
        },
        "ignore": ["re:.*k_proj"],
    }

    def packed(num_bits, group):
        codes, scales, _ = case(num_bits=num_bits, group=group)
        return parts_packed(codes, scales, num_bits=num_bits)

    codes, scales, _ = case(num_bits=8, group=None)
    floats = {"weight": np.zeros((4, 8), np.float16)}
    layers = ct.layers(
        how,
        checkpoint(
            {
                "embed_tokens": packed(8, None),
                "layers.0.q_proj": packed(4, 32) | {"bias": np.zeros(40, np.float16)},
                "layers.0.k_proj": floats | {"bias": np.zeros(40, np.float16), "output_scale": np.float32([1])},
                "layers.0.v_proj": {"weight": codes, "weight_scale": scales, "input_scale": np.float32([1])},
                "layers.0.mlp.up_proj": packed(8, None),
                "layers.1.mlp.up_proj": packed(2, 32),
                "lm_head": packed(2, 32),
                "norm": floats,
            }
        ),
    )
    bits = {"embed_tokens": 8, "layers.0.q_proj": 4, "layers.0.v_proj": 8, "layers.0.mlp.up_proj": 8}
    bits |= {"layers.1.mlp.up_proj": 2, "lm_head": 2}
    assert {name: layer.type for name, layer in layers.items()} == {
        name: f"compressed-tensors {bits}-bit" for name, bits in bits.items()
    }
    assert all(layer.refusal is None for layer in layers.values())
    taken = {name for layer in layers.values() for name in layer.tensors}
    assert "layers.0.v_proj.input_scale" in taken
    assert not any(name.endswith(("bias", "output_scale")) for name in taken)


def test_a_module_without_a_target():
    codes, scales, _ = case()
    parts = parts_packed(codes, scales)
    # One scheme is that of every quantized module, whatever its class.
    assert only(config(targets=["Llama4TextExperts"]), parts).refusal is None
    two = config(targets=["re:.*down_proj"])
    two["config_groups"]["b"] = {"targets": ["re:.*q_proj"], "weights": {"num_bits": 8, "strategy": "channel"}}
    assert only(two, parts).refusal == "config_groups has no target for it, got re:.*down_proj, re:.*q_proj"
    assert only({"kv_cache_scheme": {"num_bits": 8}}, parts).refusal == "config_groups has no target for it, got none"


def test_the_first_of_several_expressions_in_order_of_the_alphabet():
    codes, scales, _ = case(num_bits=8)
    how = config(targets=["re:.*up_proj"])
    how["config_groups"]["b"] = {"targets": ["re:.*mlp"], "weights": {"num_bits": 8, "group_size": 32}}
    assert only(how, parts_packed(codes, scales, num_bits=8)).type == "compressed-tensors 8-bit"


@pytest.mark.parametrize("group_size, group", [(None, 0), (-1, None), (32, 32)])
def test_a_strategy_that_follows_from_the_group_size(group_size, group):
    codes, scales, _ = case(group=group)
    how = config(group_size=group_size)
    del how["config_groups"]["group_0"]["weights"]["strategy"]
    layer = only(how, parts_packed(codes, scales, tensor=group == 0))
    np.testing.assert_array_equal(layer.read(0).pack().dequantize(), defined(codes, scales, None, groups(96, group)))


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("config_groups", [1], "config_groups of the quantization must be an object, got"),
        ("config_groups.W4A16", ["Linear"], "W4A16 of config_groups of the quantization must be an object"),
        ("config_groups.group_0.targets", "Linear", "targets of config_groups.group_0 must be a list of strings"),
        (
            "config_groups.group_0.targets",
            ["re:("],
            r"targets of config_groups must have .*, got '\('",
        ),
        ("config_groups.group_0.weights", 4, "weights of config_groups.group_0 must be an object"),
        (
            "config_groups.group_0.weights.num_bits",
            "4",
            "num_bits of config_groups.group_0.weights must be an int, got '4'",
        ),
        (
            "config_groups.group_0.weights.group_size",
            32.0,
            "group_size of config_groups.group_0.weights must be an int, got '32.0'",
        ),
        (
            "config_groups.group_0.weights.group_size",
            0,
            "group_size of config_groups.group_0.weights must be above 0 for the strategy group",
        ),
        (
            "config_groups.group_0.weights.type",
            "nf",
            "type of config_groups.group_0.weights must be int or float, got 'nf'",
        ),
        (
            "config_groups.group_0.weights.symmetric",
            1,
            "symmetric of config_groups.group_0.weights must be a bool, got '1'",
        ),
        (
            "config_groups.group_0.weights.strategy",
            "token",
            "strategy of config_groups.group_0.weights must be tensor, .* got 'token'",
        ),
        (
            "config_groups.group_0.weights.strategy",
            "block",
            "block_structure of config_groups.group_0.weights must be two positive ints, got None",
        ),
        ("config_groups.group_0.format", ["pack-quantized"], "format of the quantization must be a string"),
        ("transform_config", [1], "transform_config of the quantization must be an object"),
    ],
)
def test_configs_that_make_no_sense(path, value, message):
    how = inner = config()
    *keys, last = path.split(".")
    for key in keys:
        inner = inner[key]
    inner[last] = value
    with pytest.raises(ValueError, match=message):
        ct.layers(how, {})


# ---- what is refused -------------------------------------------------------------------------


CODES, SCALES, ZPS = case(symmetric=False)
PACKED = parts_packed(CODES, SCALES, ZPS)
INT8 = {"weight": CODES, "weight_scale": SCALES, "weight_zero_point": ZPS}


NVFP4 = dict(zip(("weight_packed", "weight_scale", "weight_global_scale"), case_nvfp4(), strict=True))


def of_nvfp4():
    return config(format="nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)


def without(parts, *names):
    return {name: array for name, array in parts.items() if name not in names}


ROTATED = {"transform_config": {"config_groups": {"u": {"type": "hadamard", "apply": []}}}}


@pytest.mark.parametrize(
    "parts, how, message",
    [
        (without(PACKED, "weight_scale"), config(), "weight_scale is missing"),
        (without(PACKED, "weight_packed"), config(), "weight_packed is missing"),
        (without(PACKED, "weight_shape"), config(), "weight_shape is missing"),
        (without(PACKED, "weight_zero_point"), config(symmetric=False), "weight_zero_point is missing"),
        *((PACKED, config(actorder=how), "weight_g_idx is missing") for how in ("group", "dynamic", True)),
        (PACKED, config(num_bits=8), r"weight_packed must have shape \(40, 24\) for \(N, K\) = \(40, 96\) of 8 bits"),
        (PACKED, config(group_size=48), r"weight_scale must have shape \(40, 2\), got \(40, 3\)"),
        (PACKED, config(group_size=30), "group_size must be a multiple of 4"),
        (PACKED, config(num_bits=9), "num_bits must be 1, 2, 3, 4, 5, 6, 7 or 8, got 9"),
        (PACKED, config(num_bits=-1), "num_bits must be 1, 2, 3, 4, 5, 6, 7 or 8, got -1"),
        (PACKED, config() | ROTATED, "transform_config has transforms of activations"),
        (PACKED, config(format="marlin-24"), "stored without zeros"),
        (PACKED, config(strategy="block", block_structure=[1, 32]), "its strategy is block"),
        (PACKED, config(type="float"), "weight_zero_point is there"),
        (without(PACKED, "weight_zero_point"), config(type="float"), "weight_packed must be of U8, got I32"),
        (without(PACKED, "weight_zero_point"), config(type="float", num_bits=6), "floats of 6 bits in groups of 32"),
        (PACKED | {"weight": CODES}, config(), "weight and weight_packed are both there"),
        (PACKED | {"weight_shape": np.int64([2**62, 96])}, config(), "weight_packed must have shape"),
        (PACKED | {"weight_shape": np.int64([40, 2**62])}, config(), "weight_packed must have shape"),
        (PACKED | {"weight_shape": np.int64([40, -96])}, config(), r"weight_shape must be \(N, K\)"),
        (PACKED | {"weight_shape": np.int64([3, 40, 96])}, config(), r"weight_shape must be \(N, K\), got"),
        (PACKED | {"weight_shape": np.float32([40, 96])}, config(), "weight_shape must be of I64 or I32, got F32"),
        (PACKED | {"weight_packed": PACKED["weight_packed"][None, None]}, config(), "weight_packed must have shape"),
        (PACKED | {"weight_packed": PACKED["weight_packed"].view(np.uint8)}, config(), "must be of I32, got U8"),
        (PACKED | {"weight_scale": SCALES.astype(np.float64)}, config(), "weight_scale must be of F32, F16 or BF16"),
        (PACKED | {"weight_scale": SCALES[0]}, config(), r"weight_scale must have shape \(40, 3\), got \(3,\)"),
        (PACKED | {"weight_zero_point": ZPS[:, 0]}, config(), r"weight_zero_point must have shape \(40, 3\)"),
        (
            PACKED | {"weight_zero_point": PACKED["weight_zero_point"].T},
            config(),
            r"weight_zero_point must have shape \(5, 3\) as int32, got \(3, 5\)",
        ),
        (PACKED | {"weight_zero_point": ZPS.astype(np.float16)}, config(), "weight_zero_point must be of I32 or I8"),
        (PACKED | {"weight_g_idx": np.zeros(95, np.int32)}, config(), r"weight_g_idx must have shape \(96,\)"),
        (PACKED | {"weight_g_idx": np.zeros(96, np.float32)}, config(), "weight_g_idx must be of I32 or I64"),
        (without(INT8, "weight_scale"), config(), "weight_scale is missing"),
        (without(INT8, "weight"), config(), "weight_packed is missing"),
        (INT8 | {"weight": CODES.astype(np.float16)}, config(), "weight holds floats that the model rounds"),
        (INT8 | {"weight": CODES.view(np.uint8)}, config(), "weight must be of I8, got U8"),
        (INT8 | {"weight": CODES[:0]}, config(), "weight must be a non-empty matrix"),
        (INT8 | {"weight_scale": SCALES[:, :2]}, config(), r"weight_scale must have shape \(40, 3\)"),
        (without(INT8, "weight_zero_point"), config(symmetric=False), "weight_zero_point is missing"),
        (without(NVFP4, "weight_global_scale"), of_nvfp4(), "weight_global_scale is missing"),
        (
            NVFP4 | {"weight_global_scale": np.ones(40, np.float32)},
            of_nvfp4(),
            "weight_global_scale must have one number",
        ),
        (NVFP4, config(type="float"), "weight_scale must be of U8 or F8_E8M0, got F8_E4M3"),
        (INT8 | {"bitmask": CODES.view(np.uint8)}, config(), "stored without zeros"),
        ({"compressed": SCALES, "bitmask": CODES.view(np.uint8)}, config(), "stored without zeros"),
        (
            without(INT8, "weight_zero_point") | {"weight_scale": SCALES[None], "weight": CODES[None][[0, 0]]},
            config(),
            r"up_proj.weight_scale must have 2 matrices, got shape \(1, 40, 3\)",
        ),
    ],
)
def test_damaged_layers_are_refused(parts, how, message):
    tensors = checkpoint({"up_proj": parts})
    layer = ct.layers(how, tensors)["up_proj"]
    assert layer.read is None and set(layer.tensors) == set(tensors)
    with pytest.raises(ValueError, match=message):
        raise ValueError(layer.refusal)


def test_a_refused_layer_has_the_shape_of_its_weight():
    assert only(config() | ROTATED, PACKED).shape == (40, 96)


@pytest.mark.parametrize(
    "parts, how",
    [
        (PACKED, config()),
        (PACKED | {"weight_g_idx": np.arange(96, dtype=np.int32) // 32}, config()),
        ({name: np.stack([array] * 2) for name, array in INT8.items()}, config()),
        (INT8, config()),
        (NVFP4, of_nvfp4()),
        (
            {"weight_packed": np.zeros((4, 32), np.uint8), "weight_scale": np.zeros((4, 2), np.uint8)},
            config(type="float"),
        ),
        ({"weight": np.zeros((4, 32), ml_dtypes.float8_e4m3fn), "weight_scale": np.float32([1])},
         config(type="float", num_bits=8, strategy="tensor", group_size=None)),
    ],
)  # fmt: skip
def test_any_shape_and_type_is_refused_or_read(parts, how):
    """Headers that lie: a ValueError or a refusal, and nothing else."""
    types = (np.int8, np.uint8, np.int32, np.int64, np.float16, np.float64, ml_dtypes.float8_e4m3fn)
    changes = [lambda a, type=type: a.astype(type) for type in types]
    changes += [lambda a: a[..., :-1], lambda a: a[:-1], lambda a: a[..., :0], lambda a: a[0], lambda a: a[None]]
    changes += [lambda a: a.T, lambda a: a.reshape(-1)]
    changes += [lambda a, axis=axis: np.concatenate([a, a], axis) for axis in (0, -1)]
    read = refused = 0
    for name, change in itertools.product(parts, changes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            changed = np.asarray(change(parts[name]))
        layer = ct.layers(how, checkpoint({"m": parts | {name: changed}}))["m"]
        try:
            if layer.refusal is not None and layer.floats is None:
                raise ValueError(layer.refusal)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                found = layer.floats(0) if layer.read is None else layer.read(0).pack().dequantize()
            assert found.shape == layer.shape[-2:]
            read += 1
        except ValueError:
            refused += 1
    assert read and refused


@pytest.mark.parametrize(
    "function, arguments, error, message",
    [
        (ct.pack_quantized, PACKED | {"num_bits": 4.0}, TypeError, "num_bits must be an int, got float"),
        (ct.pack_quantized, PACKED | {"num_bits": 0}, ValueError, "num_bits must be 1, 2, 3, 4, 5, 6, 7 or 8, got 0"),
        (ct.pack_quantized, PACKED | {"weight_packed": CODES}, TypeError, "weight_packed must be an array of int32"),
        (ct.pack_quantized, PACKED | {"weight_scale": CODES}, TypeError, "weight_scale must be an array of float32"),
        (ct.pack_quantized, PACKED | {"weight_shape": (40, 96, 1)}, ValueError, r"weight_shape must be \(N, K\)"),
        (ct.pack_quantized, PACKED | {"weight_shape": (40, 9.6)}, ValueError, r"weight_shape must be \(N, K\)"),
        (ct.pack_quantized, PACKED | {"weight_g_idx": SCALES}, TypeError, "weight_g_idx must be an array of int32"),
        (ct.pack_quantized, PACKED | {"weight_zero_point": SCALES}, TypeError, "weight_zero_point must be an array of"),
        (ct.pack_quantized, PACKED | {"weight_scale": SCALES[:, [0] * 7]}, ValueError, "weight_scale"),
        (ct.int_quantized, INT8 | {"num_bits": 4, "group_size": 32.0}, TypeError, "group_size must be an int"),
        (ct.int_quantized, INT8 | {"weight": SCALES}, TypeError, "weight must be an array of int8, got float16"),
        (ct.int_quantized, INT8 | {"weight_zero_point": SCALES}, TypeError, "weight_zero_point must be .* int8"),
        (ct.nvfp4_pack_quantized, NVFP4 | {"weight_global_scale": SCALES}, ValueError, "one number"),
        (ct.nvfp4_pack_quantized, NVFP4 | {"weight_scale": SCALES}, TypeError, "weight_scale must be"),
    ],
)  # fmt: skip
def test_bad_arrays_are_refused(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(**arguments)


# ---- the package compressed-tensors ----------------------------------------------------------


@pytest.fixture(scope="module")
def theirs():
    """(format, weight, scheme) -> the tensors that the package writes, and what it makes of them in float32."""
    torch = reader("torch")
    reader("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    def compressed(format, weights, **state):
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
        compressor = BaseCompressor.get_value_from_registry(format)
        tensors = compressor.compress({name: torch.from_numpy(array) for name, array in state.items()}, scheme)
        wanted = compressor.decompress(tensors, scheme)["weight"]
        return {name: _array(torch, tensor) for name, tensor in tensors.items()}, wanted

    return compressed


def _array(torch, tensor):
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return tensor.numpy()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy, group, experts", [*((*how, ()) for how in STRATEGIES), ("group", 32, (3,))])
@pytest.mark.parametrize("num_bits", range(2, 9))
@pytest.mark.parametrize("format", ["pack-quantized", "int-quantized"])
def test_the_package_on_integers(theirs, format, num_bits, strategy, group, symmetric, experts):
    rng = np.random.default_rng(0)
    half = 1 << num_bits - 1
    shape = (1,) if group == 0 else (*experts, 40, 3 if group else 1)
    weights = {"num_bits": num_bits, "strategy": strategy, "group_size": group or None, "symmetric": symmetric}
    tensors, wanted = theirs(
        format,
        weights,
        weight=rng.normal(size=(*experts, 40, 96)).astype(np.float32),
        weight_scale=rng.uniform(0.5, 1.5, shape).astype(np.float32) * 2 / half,
        weight_zero_point=(np.zeros(shape) if symmetric else rng.integers(-half, half, shape)).astype(np.int8),
    )
    layer = only(config(format=format, **weights), tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = np.stack([layer.read(index).pack().dequantize() for index in range(*experts or (1,))])
    np.testing.assert_array_equal(found.reshape(wanted.shape), wanted.numpy())


def test_the_package_on_floats_of_4_bits(theirs):
    torch = reader("torch")
    weight = np.random.default_rng(0).normal(size=(40, 96)).astype(np.float32)
    greatest = np.abs(weight.reshape(40, -1, 32)).max(2)
    mx = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    scale = np.exp2(np.floor(np.log2(greatest)) - 2).astype(np.float32)
    tensors, wanted = theirs("mxfp4-pack-quantized", mx, weight=weight, weight_scale=scale)
    found = only(config(format="mxfp4-pack-quantized", type="float"), tensors).read(0).pack().dequantize()
    np.testing.assert_array_equal(found, wanted.float().numpy())

    nv = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    scale = (np.abs(weight.reshape(40, -1, 16)).max(2) / 6 * 300).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    tensors, wanted = theirs(
        "nvfp4-pack-quantized", nv, weight=weight, weight_scale=scale, weight_global_scale=np.float32([300])
    )
    how = config(format="nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)
    found = only(how, tensors).read(0).pack().dequantize()
    # The package rounds what it gives to bfloat16.
    np.testing.assert_array_equal(torch.from_numpy(found).bfloat16().float().numpy(), wanted.float().numpy())
