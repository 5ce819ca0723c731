"""MXFP4 of gpt-oss: compared with the numbers of its definition, one by one, and with transformers."""

from fractions import Fraction

import numpy as np
import pytest
from cases import assert_same_bits

pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
from readers import reader
from stored import checkpoint

from pyda8w4.formats import mxfp4

E2M1 = [Fraction(value) / 2 for value in (0, 1, 2, 3, 4, 6, 8, 12)]
E2M1 += [-value for value in E2M1]


def random(n, groups, seed=0):
    rng = np.random.default_rng(seed)
    scales = rng.integers(0, 253, (n, groups), np.uint8)  # 6 * 2**126 is finite
    scales[0, :2] = 0, 252
    return rng.integers(0, 256, (n, groups, 16), np.uint8), scales


def defined(blocks, scales):
    """Number by number, as fractions: those that float32 does not hold would not be equal."""
    n, groups, _ = blocks.shape
    found = np.zeros((n, groups * 32), np.float32)
    for row in range(n):
        for k in range(groups * 32):
            byte = int(blocks[row, k // 32, k % 32 // 2])
            value = E2M1[byte // 16 if k % 2 else byte % 16] * Fraction(2) ** (int(scales[row, k // 32]) - 127)
            found[row, k] = float(value)
            assert Fraction(float(found[row, k])) == value
    return found


def test_numbers():
    blocks, scales = random(37, 3)
    weight = mxfp4.unpack(blocks, scales)
    assert weight.shape == (37, 96)
    np.testing.assert_array_equal(weight.pack().dequantize(), defined(blocks, scales))


def test_transformers():
    torch = reader("torch")
    theirs = reader("transformers.integrations.mxfp4")
    blocks, scales = random(40, 2)
    scales = np.clip(scales, 40, 200)
    wanted = theirs.convert_moe_packed_tensors(
        torch.from_numpy(blocks)[None], torch.from_numpy(scales)[None], dtype=torch.float32
    )
    found = mxfp4.unpack(blocks, scales).pack().dequantize()
    assert_same_bits(found + np.float32(0), wanted[0].T.contiguous().numpy() + np.float32(0))  # -0 is 0


def test_layers_are_stacks_of_experts():
    experts = [random(34, 2, seed) for seed in range(3)]
    stack = {
        "gate_up_proj_blocks": np.stack([blocks for blocks, _ in experts]),
        "gate_up_proj_scales": np.stack([scales for _, scales in experts]),
        "gate_up_proj_bias": np.zeros((3, 34), np.float32),
    }
    one = {"proj_blocks": experts[0][0], "proj_scales": experts[0][1]}
    router = {"weight": np.zeros((3, 64), np.float32), "used_blocks": np.zeros(4, np.float32)}
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router"]}
    layers = mxfp4.layers(config, checkpoint({"mlp.experts": stack, "mlp.router": router, "one": one}))
    assert {name: (layer.type, layer.shape) for name, layer in layers.items()} == {
        "mlp.experts.gate_up_proj": ("MXFP4", (3, 34, 64)),
        "one.proj": ("MXFP4", (34, 64)),
    }
    layer = layers["mlp.experts.gate_up_proj"]
    assert layer.tensors == ("mlp.experts.gate_up_proj_blocks", "mlp.experts.gate_up_proj_scales")
    assert layer.nbytes == 3 * 34 * 2 * 17
    packed = [layer.read(index).pack() for index in range(3)]
    assert layer.packed_nbytes == sum(weight.nbytes for weight in packed)
    for weight, (blocks, scales) in zip(packed, experts, strict=True):
        np.testing.assert_array_equal(weight.dequantize(), defined(blocks, scales))
    np.testing.assert_array_equal(layers["one.proj"].read(0).pack().dequantize(), defined(*experts[0]))


BLOCKS, SCALES = random(4, 2)


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"p_blocks": BLOCKS}, "m.p_scales is missing"),
        ({"p_blocks": BLOCKS, "p_scales": SCALES[:, :1]}, r"scales must have shape \(4, 2\), got \(4, 1\)"),
        ({"p_blocks": BLOCKS, "p_scales": SCALES.view(np.int8)}, "m.p_scales must be of U8 or F8_E8M0, got I8"),
        ({"p_blocks": BLOCKS[:, :, 1:], "p_scales": SCALES}, r"blocks must have shape \(N, G, 16\), got \(4, 2, 15\)"),
        ({"p_blocks": BLOCKS[:0], "p_scales": SCALES[:0]}, r"got \(0, 2, 16\)"),
        ({"p_blocks": BLOCKS[0], "p_scales": SCALES[0]}, r"got \(2, 16\)"),
        (
            {"p_blocks": BLOCKS[None], "p_scales": SCALES},
            r"m.p_scales must have 1 matrices, got shape \(4, 2\)",
        ),
        ({"p_blocks": BLOCKS[None][:0], "p_scales": SCALES[None][:0]}, "stacks must have matrices, got none"),
        ({"p_blocks": BLOCKS[None, None], "p_scales": SCALES[None, None]}, r"got \(1, 1, 4, 2, 16\)"),
    ],
)
def test_damaged_layers_are_refused(parts, message):
    (layer,) = mxfp4.layers({}, checkpoint({"m": parts})).values()
    assert layer.read is None
    with pytest.raises(ValueError, match=message):
        raise ValueError(layer.refusal)


@pytest.mark.parametrize(
    "blocks, scales, error, message",
    [
        (BLOCKS.astype(np.int64), SCALES, TypeError, "blocks must be an array of uint8, got int64"),
        (BLOCKS, SCALES.astype(np.float32), TypeError, "scales must be an array of uint8, got float32"),
        (BLOCKS[0], SCALES, ValueError, r"blocks must have shape \(N, G, 16\)"),
        (BLOCKS, SCALES[:3], ValueError, r"scales must have shape \(4, 2\), got \(3, 2\)"),
        (BLOCKS, np.maximum(SCALES, np.uint8([[0], [0], [255], [0]])), ValueError, "scales .* NaN"),
    ],
)
def test_bad_arrays_are_refused(blocks, scales, error, message):
    with pytest.raises(error, match=message):
        mxfp4.unpack(blocks, scales)
