"""MLX's weights stand for code * scale + bias, or for floats of 4 bits."""

import re

import ml_dtypes
import numpy as np
import pytest
from readers import reader
from stored import checkpoint, floats

from pyda8w4.formats import mlx

N, K = 24, 256
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]
BITS = [1, 2, 3, 4, 5, 6, 8]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def words(codes, bits):
    """Each row as one large integer: its first code in the lowest bits."""
    rows = []
    for row in codes:
        number = sum(int(code) << bits * i for i, code in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(len(row) * bits // 8, "little"), "<u4"))
    return np.array(rows, np.uint32)


def affine(bits, dtype, group=64, seed=0, n=N, k=K):
    """-> tensors of a layer, and its floats: each operation rounded to float32."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (n, k))
    scales, biases = floats(rng, (n, k // group), dtype), floats(rng, (n, k // group), dtype)
    wanted = np.empty((n, k), np.float32)
    for at in np.ndindex(n, k):
        g = at[0], at[1] // group
        wanted[at] = np.float32(codes[at]) * np.float32(scales[g]) + np.float32(biases[g])
    return {"weight": words(codes, bits), "scales": scales, "biases": biases}, wanted


def find(config, **modules):
    tensors = checkpoint(modules)
    return mlx.layers(config, tensors), tensors


def check(layer, weight, wanted):
    assert layer.refusal is None
    assert layer.shape == wanted.shape
    for found in weight, layer.read(0):
        np.testing.assert_array_equal(found.pack().dequantize(), wanted, strict=True)
    assert layer.packed_nbytes == layer.read(0).pack().nbytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_affine(bits, dtype):
    parts, wanted = affine(bits, dtype)
    found, tensors = find({"group_size": 64, "bits": bits}, m=parts)
    weight = mlx.unpack(*parts.values(), bits=bits)
    assert weight.bits == max(bits, 4)
    check(found["m"], weight, wanted)
    assert found["m"].type == f"MLX {bits}-bit"
    assert sorted(found["m"].tensors) == sorted(tensors)
    assert found["m"].nbytes == sum(part.nbytes for part in parts.values())


@pytest.mark.parametrize("group", [8, 32, 128])
def test_group_sizes(group):
    parts, wanted = affine(4, np.float16, group)
    check(
        find({"group_size": group, "bits": 4}, m=parts)[0]["m"], mlx.unpack(*parts.values(), group_size=group), wanted
    )


def test_negative_scales():
    parts, wanted = affine(4, np.float16)
    parts["scales"] = -abs(parts["scales"])
    weight = mlx.unpack(*parts.values())
    assert (weight.pack().unpack()[1] <= 0).all()
    codes, biases = weight.codes.astype(np.float64), parts["biases"].astype(np.float64).repeat(64, 1)
    wanted = (codes * parts["scales"].astype(np.float64).repeat(64, 1) + biases).astype(np.float32)
    np.testing.assert_array_equal(weight.pack().dequantize(), wanted)


def test_modules_of_their_own():
    """Defaults of a module's own settings are those of MLX, not those of the checkpoint."""
    four, of_four = affine(4, np.float16, 32)
    eight, of_eight = affine(8, np.float16, 32)
    default, of_default = affine(4, np.float16, 64)
    norm = {"weight": np.ones(K, np.float16), "scales": np.ones(1, np.float16)}
    config = {"group_size": 32, "bits": 4, "b": {"group_size": 32, "bits": 8}, "c": {}, "d": True, "e": False}
    found, _ = find(config, a=four, b=eight, c=default, d=four, e=eight, norm=norm)
    wanted = {"a": of_four, "b": of_eight, "c": of_default, "d": of_four}
    assert found.keys() == wanted.keys()
    for name, layer in found.items():
        np.testing.assert_array_equal(layer.read(0).pack().dequantize(), wanted[name])


def test_stacks_of_experts():
    experts = [affine(4, ml_dtypes.bfloat16, seed=seed) for seed in range(3)]
    parts = {name: np.stack([parts[name] for parts, _ in experts]) for name in experts[0][0]}
    layer = find({"group_size": 64, "bits": 4}, switch=parts)[0]["switch"]
    assert layer.shape == (3, N, K)
    assert layer.packed_nbytes == sum(layer.read(i).pack().nbytes for i in range(3))
    for i, (_, wanted) in enumerate(experts):
        np.testing.assert_array_equal(layer.read(i).pack().dequantize(), wanted)


def test_names_of_transformers():
    parts, wanted = affine(4, np.float16)
    parts["qbiases"] = parts.pop("biases")
    found, tensors = find({"quant_method": "metal", "group_size": 64, "bits": 4}, m=parts)
    np.testing.assert_array_equal(found["m"].read(0).pack().dequantize(), wanted)
    assert sorted(found["m"].tensors) == sorted(tensors)


# ---- floats for codes ------------------------------------------------------------------------


def e4m3(bits):
    sign, exponent, mantissa = bits >> 7, bits >> 3 & 15, bits & 7
    return (-1) ** sign * ((1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6)


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4"])
def test_floats_of_4_bits(mode):
    rng = np.random.default_rng(1)
    group = {"mxfp4": 32, "nvfp4": 16}[mode]
    codes = rng.integers(0, 16, (N, K))
    scales = rng.integers(0, 256 if mode == "nvfp4" else 252, (N, K // group)).astype(np.uint8)
    if mode == "nvfp4":
        scales[scales % 128 == 127] = 0  # NaN
    wanted = np.empty((N, K), np.float32)
    for n, k in np.ndindex(N, K):
        scale = int(scales[n, k // group])
        scale = 2.0 ** (scale - 127) if mode == "mxfp4" else e4m3(scale)
        wanted[n, k] = (-1) ** int(codes[n, k] >> 3) * E2M1[codes[n, k] & 7] * scale
    parts = {"weight": words(codes, 4), "scales": scales}
    found, _ = find({"group_size": group, "bits": 4, "mode": mode}, m=parts)
    check(found["m"], mlx.unpack(*parts.values(), mode=mode), wanted)
    assert found["m"].type == f"MLX {mode.upper()}"


@pytest.mark.parametrize(("mode", "nan"), [("mxfp4", 255), ("nvfp4", 127), ("nvfp4", 255)])
def test_scales_that_are_nan(mode, nan):
    parts = {
        "weight": np.zeros((1, 4), np.uint32),
        "scales": np.full((1, {"mxfp4": 1, "nvfp4": 2}[mode]), nan, np.uint8),
    }
    layer = find({"mode": mode}, m=parts)[0]["m"]
    with pytest.raises(ValueError, match="scales must be finite"):
        layer.read(0).pack()


def test_floats_of_8_bits_are_refused():
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 256, (N, K))
    codes[codes % 128 == 127] = 0
    scales = rng.integers(1, 246, (N, K // 32)).astype(np.uint8)
    wanted = np.empty((N, K), np.float32)
    for n, k in np.ndindex(N, K):
        wanted[n, k] = e4m3(int(codes[n, k])) * 2.0 ** (int(scales[n, k // 32]) - 127)
    found, _ = find({"mode": "mxfp8"}, m={"weight": words(codes, 8), "scales": scales})
    layer = found["m"]
    assert layer.read is None
    assert layer.refusal == "the codes of mode mxfp8 are floats"
    np.testing.assert_array_equal(layer.floats(0), wanted, strict=True)
    with pytest.raises(ValueError, match="the codes of mode mxfp8 are floats"):
        mlx.unpack(words(codes, 8), scales, mode="mxfp8")


# ---- MLX itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_what_mlx_itself_dequantizes(bits):
    mx = reader("mlx.core")
    weight = mx.array(np.random.default_rng(3).standard_normal((N, K)).astype(np.float32))
    found = mx.quantize(weight, group_size=32, bits=bits)
    assert bits == 1 or (np.array(found[1]) < 0).any()
    wanted = np.array(mx.dequantize(*found, group_size=32, bits=bits))
    ours = mlx.unpack(*map(np.array, found), group_size=32, bits=bits)
    np.testing.assert_array_equal(ours.pack().dequantize(), wanted)


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_what_mlx_itself_dequantizes_from_floats(mode):
    mx = reader("mlx.core")
    weight = mx.array(np.random.default_rng(4).standard_normal((N, K)).astype(np.float32))
    found = mx.quantize(weight, mode=mode)
    wanted = np.array(mx.dequantize(*found, mode=mode, dtype=mx.float32))
    parts = dict(zip(("weight", "scales"), map(np.array, found)))
    layer = find({"mode": mode}, m=parts)[0]["m"]
    ours = layer.floats(0) if mode == "mxfp8" else layer.read(0).pack().dequantize()
    np.testing.assert_array_equal(ours, wanted)


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "change", "why"),
    [
        ({"mode": "int4"}, {}, "mode must be affine, mxfp4, nvfp4 or mxfp8, got 'int4'"),
        ({"bits": 7}, {}, "bits must be 1, 2, 3, 4, 5, 6 or 8, got 7"),
        ({"bits": 5}, {}, "weight must have rows of whole groups of 64 codes of 5 bits"),
        ({"bits": 8}, {}, r"scales must have shape \(24, 2\), got \(24, 4\)"),
        ({"group_size": 32}, {}, r"scales must have shape \(24, 8\), got \(24, 4\)"),
        ({"group_size": -64}, {}, "group_size must be a positive multiple of 4, got -64"),
        ({"group_size": 6}, {}, "group_size must be a positive multiple of 4, got 6"),
        ({"mode": "mxfp4"}, {}, "group_size and bits must be .*32, 4.* in the mode mxfp4, got .*64, 4"),
        ({"mode": "mxfp4", "group_size": 32}, {}, "scales must be of U8, got F16"),
        ({}, {"biases": None}, "biases are missing"),
        ({}, {"qbiases": np.zeros((N, 4), np.float16)}, "biases and qbiases are both there"),
        ({}, {"biases": np.zeros((N, 3), np.float16)}, r"biases must have shape \(24, 4\), got \(24, 3\)"),
        ({}, {"biases": np.zeros((N, 4), np.int8)}, "biases must be of F32, F16 or BF16, got I8"),
        ({}, {"scales": np.zeros((N, 4), np.uint8)}, "scales must be of F32, F16 or BF16, got U8"),
        ({}, {"weight": np.zeros((N, 32), np.int32)}, "weight must be of U32, got I32"),
        ({}, {"weight": np.zeros(32, np.uint32)}, "weight must be a non-empty matrix"),
        ({}, {"weight": np.zeros((N, 0), np.uint32)}, "weight must be a non-empty matrix"),
        ({}, {"weight": np.zeros((0, N, 32), np.uint32)}, "stacks must have matrices, got none"),
        ({}, {"weight": np.zeros((2, N, 32), np.uint32)}, "scales must have 2 matrices"),
    ],
)
def test_refusals(config, change, why):
    parts, _ = affine(4, np.float16)
    parts = {name: part for name, part in {**parts, **change}.items() if part is not None}
    found, tensors = find({"group_size": 64, "bits": 4, **config}, m=parts)
    layer = found["m"]
    assert layer.read is layer.floats is None
    assert re.search(why, layer.refusal), layer.refusal
    assert sorted(layer.tensors) == sorted(tensors)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"bits": "4"}, "bits of the quantization must be an int, got '4'"),
        ({"group_size": 64.0}, "group_size of the quantization must be an int, got '64.0'"),
        ({"mode": 3}, "mode of the quantization must be a string, got '3'"),
        ({"m": 8}, "m of the quantization must be an object, got '8'"),
        ({"m": {"bits": 4.0}}, "bits of m of the quantization must be an int, got '4.0'"),
    ],
)
def test_configs_without_sense(config, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        find(config, m=affine(4, np.float16)[0])


def test_arguments():
    parts, _ = affine(4, np.float16)
    for change, error, why in [
        ({"weight": parts["weight"].view(np.int32)}, TypeError, "weight must be an array of uint32, got int32"),
        ({"scales": parts["scales"].astype(np.float64)}, TypeError, "scales must be an array of .*, got float64"),
        ({"biases": None}, ValueError, "biases are missing"),
        ({"bits": 16}, ValueError, "bits must be"),
    ]:
        with pytest.raises(error, match=why):
            mlx.unpack(**parts | change)
    with pytest.raises(ValueError, match="biases must not be given in the mode nvfp4"):
        mlx.unpack(parts["weight"], np.zeros((N, 16), np.uint8), parts["biases"], mode="nvfp4")
