"""AutoRound's checkpoints have the tensors of GPTQ or AWQ, as export_to_autoround/export.py says."""

import re

import ml_dtypes
import numpy as np
import pytest
from readers import reader
from stored import checkpoint
from test_awq import gemm
from test_gptq import arrays, expected, layer

from pyda8w4.formats import _auto_round as auto_round

N, K = 40, 128
CONFIG = {
    "quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int", "act_bits": 16,
    "block_name_to_quantize": "model.layers", "packing_format": "auto_round",
}  # fmt: skip
GROUPS = np.arange(K) // 32


def assert_is(weight, wanted):
    np.testing.assert_array_equal(weight.pack().dequantize(), wanted, strict=True)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("packing", "added"),
    [
        ("auto_round", 0),
        ("auto_round:exllamav2", 0),
        ("auto_round:tritonv2", 0),
        ("auto_round:gptqmodel", 0),
        ("auto_round:auto_gptq", 1),
        ("auto_round:auto_gptq:exllamav2", 1),
        ("auto_round:gptq", 1),
        ("auto", 1),
        (None, 1),
    ],
)
def test_packing_formats_of_gptq(packing, added, bits, dtype):
    codes, zeros, scales, qweight, qzeros = layer(bits=bits, dtype=dtype, most=(1 << bits) - 1 - added)
    parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales, "bias": np.ones(N, np.float16)}
    tensors = checkpoint({"model.q": parts})
    ((name, one),) = auto_round.layers({**CONFIG, "bits": bits, "packing_format": packing}, tensors).items()
    assert (name, one.type, one.shape, one.refusal) == ("model.q", f"AutoRound {bits}-bit", (N, K), None)
    assert one.tensors == ("model.q.qweight", "model.q.qzeros", "model.q.scales")
    weight = one.read(0)
    assert_is(weight, expected(codes, zeros + added, scales, GROUPS))
    assert one.packed_nbytes == weight.pack().nbytes


def test_first_releases_name_the_packing_format_otherwise():
    codes, zeros, scales, _, _ = layer(most=14)
    tensors = checkpoint({"q": arrays(most=14)})
    for backend, added in ("auto_round:exllamav2", 0), ("auto_round:gptq:exllamav2", 1):
        config = {**CONFIG, "packing_format": None, "backend": backend}
        assert_is(auto_round.layers(config, tensors)["q"].read(0), expected(codes, zeros + added, scales, GROUPS))


@pytest.mark.parametrize("packing", ["auto_round", "auto_round:auto_gptq", "auto_round:gptqmodel"])
@pytest.mark.parametrize("stored_zero", [7, 8])
def test_symmetric(stored_zero, packing):
    codes, zeros, scales, _, _ = layer(sym=8)
    tensors = checkpoint({"q": arrays(GROUPS.astype(np.int32), sym=stored_zero)})
    one = auto_round.layers({**CONFIG, "sym": True, "packing_format": packing}, tensors)["q"]
    assert_is(one.read(0), expected(codes, zeros, scales, GROUPS))
    assert one.read(0).perm is None and "q.g_idx" in one.tensors
    assert one.packed_nbytes == one.read(0).pack().nbytes


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("packing", ["auto_round:auto_awq", "auto_round:awq"])
def test_packing_formats_of_awq(packing, sym):
    codes, zeros, scales, _, _ = layer(sym=8 if sym else None)
    tensors = checkpoint({"q": gemm(codes.T, zeros.T, scales.T)})
    one = auto_round.layers({**CONFIG, "packing_format": packing, "sym": sym}, tensors)["q"]
    assert one.type == "AutoRound 4-bit"
    assert_is(one.read(0), expected(codes, zeros, scales, GROUPS))
    assert one.packed_nbytes == one.read(0).pack().nbytes


def test_rules_for_modules():
    """Names count before patterns, which may match anywhere, and of patterns the first."""
    modules = {
        "model.0.down": arrays(bits=8),
        "model.0.up": arrays(group=64),
        "model.1.up": arrays(),
        "lm_head": arrays(bits=8, group=64),
    }
    rules = {
        ".*up": {"bits": 3, "group_size": 64},
        "0.down": {"bits": 8, "group_size": None},
        ".*down": {"bits": 2},
        "model.0.up": {"group_size": 64, "bits": None},
        "model.1.up": {},
        "head": {"bits": 2},
        "lm_head": {"bits": 8, "group_size": 64, "act_bits": None, "data_type": "int"},
        "(": {"bits": 16},
    }
    found = auto_round.layers({**CONFIG, "extra_config": rules}, checkpoint(modules))
    wanted = {"model.0.down": (8, 32), "model.0.up": (4, 64), "model.1.up": (4, 32), "lm_head": (8, 64)}
    assert found.keys() == wanted.keys()
    for name, (bits, group) in wanted.items():
        codes, zeros, scales, _, _ = layer(bits=bits, group=group)
        assert_is(found[name].read(0), expected(codes, zeros, scales, np.arange(K) // group))


PACKING = "packing_format must be auto, auto_round, auto_round:exllamav2, auto_round:tritonv2, auto_round:gptqmodel, "


@pytest.mark.parametrize(
    ("config", "refusal"),
    [
        ({"bits": 3}, "bits must be 2, 4 or 8, got 3"),
        ({"bits": 5, "packing_format": "auto_round:auto_awq"}, "bits must be 4, got 5"),
        ({"data_type": "mx_int"}, "data_type must be int, got mx_int"),
        ({"act_bits": 8}, "act_bits must be 16, got 8: such layers have tensors that are not read"),
        ({"packing_format": "mlx"}, f"{PACKING}"),
        ({"packing_format": "auto_round:llm_compressor"}, PACKING),
        ({"rotation_config": {"hadamard_type": "hadamard"}}, "rotation_config changes its inputs"),
        ({"spinquant_config": {"r1": True}}, "spinquant_config changes its inputs"),
        ({"group_size": 64}, "q.scales must have shape (2, 40) for K = 128, N = 40 and group_size 64, got (4, 40)"),
        ({"extra_config": {"q": {"bits": 16}}}, "bits must be 2, 4 or 8, got 16"),
    ],
    ids=str,
)
def test_refused(config, refusal):
    tensors = checkpoint({"q": arrays()})
    one = auto_round.layers({**CONFIG, **config}, tensors)["q"]
    assert one.refusal.startswith(refusal)
    assert one.read is None and one.floats is None and one.packed_nbytes is None
    assert set(one.tensors) == set(tensors)


def test_mx_int4_is_refused():
    """It has other tensors: codes that are sign and magnitude, and powers of 2."""
    parts = {
        "weight_packed": np.zeros((N, K // 2), np.uint8),
        "weight_scale": np.zeros((N, K // 32), np.uint8),
        "bias": np.zeros(N, np.float16),
    }
    tensors = checkpoint({"m": parts})
    one = auto_round.layers({**CONFIG, "data_type": "mx_int", "act_bits": 4}, tensors)["m"]
    assert (one.type, one.refusal) == ("AutoRound mx_int 4-bit", "data_type must be int, got mx_int")
    assert set(one.tensors) == {"m.weight_packed", "m.weight_scale"}
    one = auto_round.layers(CONFIG, tensors)["m"]
    assert one.refusal == "m.qweight is missing"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": "4"}, "bits of the quantization must be an int, got '4'"),
        ({"group_size": [128, 128]}, "group_size of the quantization must be an int, got '[128, 128]'"),
        ({"sym": 1}, "sym of the quantization must be a bool, got '1'"),
        ({"act_bits": "8"}, "act_bits of the quantization must be an int, got '8'"),
        ({"packing_format": 1}, "packing_format of the quantization must be a string, got '1'"),
        ({"extra_config": ["lm_head"]}, "extra_config of the quantization must be an object, got "),
        ({"extra_config": {"q": {"bits": "8"}}}, "bits of the quantization must be an int, got '8'"),
    ],
    ids=str,
)
def test_config_that_makes_no_sense(config, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        auto_round.layers({**CONFIG, **config}, checkpoint({"q": arrays()}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("packing", "module", "added"),
    [("auto_round", "qlinear_torch", 0), ("auto_round:auto_gptq", "qlinear_torch_zp", 1)],
)
def test_equals_auto_round(packing, module, added, bits):
    """AutoRound's own reader."""
    torch = reader("torch")
    linear_of = reader(f"auto_round_extension.torch.{module}").QuantLinear
    _, _, scales, qweight, qzeros = layer(n=64, bits=bits, most=(1 << bits) - 1 - added)
    theirs = linear_of(bits, 32, K, 64, bias=False)
    for name, array in ("qweight", qweight), ("qzeros", qzeros), ("scales", scales):
        setattr(theirs, name, torch.from_numpy(np.ascontiguousarray(array)))
    wanted = theirs(torch.eye(K)).numpy().T
    tensors = checkpoint({"q": {"qweight": qweight, "qzeros": qzeros, "scales": scales}})
    weight = auto_round.layers({**CONFIG, "bits": bits, "packing_format": packing}, tensors)["q"].read(0)
    # AutoRound's product is float16.
    np.testing.assert_array_equal(weight.pack().dequantize().astype(np.float16), wanted.astype(np.float16))
