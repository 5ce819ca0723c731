"""GPTQ's tensors stand for what AutoGPTQ's qlinear_cuda_old.py says."""

import re
import sys
import warnings
from unittest.mock import MagicMock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readers import reader
from stored import checkpoint, floats

from pyda8w4.formats import gptq

N, K = 40, 128
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"}


def field(word, bits, index):
    """Field `index` of a word, the lowest first."""
    return int(word) >> (bits * index) & ((1 << bits) - 1)


def packed(values, bits, dtype=np.int32):
    """Values along the first axis in words, as AutoGPTQ packs them; what is missing of the last word is 0."""
    per_word = np.dtype(dtype).itemsize * 8 // bits
    words = [[0] * values.shape[1] for _ in range(-(-len(values) // per_word))]
    for row, column in np.ndindex(values.shape):
        words[row // per_word][column] |= int(values[row, column]) << (bits * (row % per_word))
    return np.array(words, np.dtype(f"u{np.dtype(dtype).itemsize}")).view(dtype)


def layer(seed=0, n=N, k=K, group=32, bits=4, dtype=np.float16, word=np.int32, most=None, sym=None):
    """-> codes (K, N), zero points as stored (G, N), scales (G, N), and the words of the first two."""
    rng = np.random.default_rng(seed)
    groups = -(-k // group)
    codes = rng.integers(0, 1 << bits, (k, n))
    zeros = rng.integers(0, (1 << bits) if most is None else most + 1, (groups, n))
    if sym is not None:
        zeros[:] = sym
    scales = floats(rng, (groups, n), dtype)
    return codes, zeros, scales, packed(codes, bits, word), packed(zeros.T, bits, word).T


def expected(codes, zeros, scales, groups_of_k):
    """(N, K): scale * (code - zero), rounded once."""
    out = np.empty(codes.T.shape, np.float32)
    for k, n in np.ndindex(codes.shape):
        g = groups_of_k[k]
        out[n, k] = np.float32(scales[g, n]) * np.float32(int(codes[k, n]) - int(zeros[g, n]))
    return out


def assert_is(weight, wanted):
    np.testing.assert_array_equal(weight.pack().dequantize(), wanted, strict=True)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("group", [32, 128, 48], ids=lambda group: f"g{group}")  # of the last, the last is shorter
@pytest.mark.parametrize(("form", "added"), [("gptq", 1), ("gptq_v2", 0), ("gptq_p", 0)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_asymmetric(bits, form, added, group, dtype):
    codes, zeros, scales, qweight, qzeros = layer(group=group, bits=bits, dtype=dtype, most=(1 << bits) - 1 - added)
    weight = gptq.unpack(qweight, qzeros, scales, bits=bits, group_size=group, sym=False, checkpoint_format=form)
    assert_is(weight, expected(codes, zeros + added, scales, np.arange(K) // group))
    assert weight.perm is None and weight.pack().bits == max(bits, 4)


@pytest.mark.parametrize("word", [np.int8, np.int16, np.int32, np.int64, np.uint32])
def test_words_of_other_sizes(word):
    """GPTQModel's pack_dtype."""
    codes, zeros, scales, qweight, qzeros = layer(word=word, most=14)
    assert_is(
        gptq.unpack(qweight, qzeros, scales, group_size=32, sym=False),
        expected(codes, zeros + 1, scales, np.arange(K) // 32),
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_group(bits):
    codes, zeros, scales, qweight, qzeros = layer(group=K, bits=bits)
    weight = gptq.unpack(
        qweight, qzeros, scales, np.zeros(K, np.int32), bits=bits, group_size=-1, sym=False, checkpoint_format="gptq_v2"
    )
    assert_is(weight, expected(codes, zeros, scales, np.zeros(K, int)))
    assert weight.perm is None


def test_many_columns():
    codes, zeros, scales, qweight, qzeros = layer(n=136, k=64, most=14)
    g_idx = np.arange(64)[::-1] // 32
    weight = gptq.unpack(qweight, qzeros, scales, g_idx, group_size=32, sym=False)
    assert_is(weight, expected(codes, zeros + 1, scales, g_idx))


def test_last_words_are_padded():
    """K is what g_idx says, and N what scales say."""
    codes, zeros, scales, qweight, qzeros = layer(n=37, k=100, group=20)
    assert qweight.shape == (13, 37) and qzeros.shape == (5, 5)
    g_idx = np.arange(100) // 20
    weight = gptq.unpack(qweight, qzeros, scales, g_idx, group_size=20, sym=False, checkpoint_format="gptq_v2")
    assert_is(weight, expected(codes, zeros, scales, g_idx))


@pytest.mark.pitfall("gptqmodel", "zero point 0 wraps to 0xFFFFFFFF, convert_gptq_v1_to_v2_format, gptqmodel#2350")
def test_gptq_v1_zero_wrap():
    """AutoGPTQ's pack subtracts 1 in uint32 and ORs, so that a zero point of 0 sets all higher fields of its word."""
    codes, zeros, scales, qweight, _ = layer()
    zeros[:] = np.maximum(zeros, 1)
    zeros[1, 10] = 0
    qzeros = np.zeros((len(zeros), N // 8), np.uint32)
    for g, n in np.ndindex(zeros.shape):
        qzeros[g, n // 8] |= np.uint32(int(zeros[g, n]) - 1 & 0xFFFFFFFF) << np.uint32(4 * (n % 8))
    seen = zeros.copy()
    seen[1, 10:16] = 16  # that is what the kernels of AutoGPTQ multiply with
    with pytest.warns(UserWarning, match=r"^qzeros holds 15, .* 16, or .* of 0"):
        weight = gptq.unpack(qweight, qzeros.view(np.int32), scales, group_size=32, sym=False)
    assert_is(weight, expected(codes, seen, scales, np.arange(K) // 32))
    # 15 is a zero point like any other where it is stored as it is.
    weight = gptq.unpack(qweight, qzeros, scales, group_size=32, sym=False, checkpoint_format="gptq_v2")
    assert_is(weight, expected(codes, seen - 1, scales, np.arange(K) // 32))


def test_gptq_v1_zero_wrap_names_the_layer():
    _, _, scales, qweight, qzeros = layer(sym=15)
    tensors = checkpoint({"m.up": {"qweight": qweight, "qzeros": qzeros, "scales": scales}})
    found = gptq.layers({**CONFIG, "checkpoint_format": "gptq"}, tensors)
    with pytest.warns(UserWarning, match=r"^m\.up\.qzeros holds 15"):
        found["m.up"].read(0)


@pytest.mark.pitfall("vllm", "Qwen3.5-27B-GPTQ-Int4 stores zero points of gptq_v2 and says gptq, vllm#38966")
@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "gptq_p"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_mislabelled(bits, form):
    middle = 1 << (bits - 1)
    for stored_zero in middle - 1, middle:
        codes, zeros, scales, qweight, qzeros = layer(bits=bits, sym=stored_zero)
        weight = gptq.unpack(qweight, qzeros, scales, bits=bits, group_size=32, sym=True, checkpoint_format=form)
        assert_is(weight, expected(codes, np.full_like(zeros, middle), scales, np.arange(K) // 32))
        assert weight.pack().zero_point is not None
    weight = gptq.unpack(qweight, None, scales, bits=bits, group_size=32, sym=True, checkpoint_format=form)
    assert_is(weight, expected(codes, np.full_like(zeros, middle), scales, np.arange(K) // 32))


def test_symmetric_zeros_that_are_not():
    """Some readers would take what is stored, others 8."""
    _, zeros, scales, qweight, _ = layer(sym=7)
    for value in 8, 0:
        zeros[2, 3] = value
        with pytest.raises(ValueError, match=r"^qzeros must hold 7 or 8 everywhere where sym is true, got \d to \d$"):
            gptq.unpack(qweight, packed(zeros.T, 4).T, scales, group_size=32, sym=True)
    with pytest.raises(ValueError, match=r"^qzeros must hold 7 or 8 everywhere"):
        gptq.unpack(qweight, packed(np.full_like(zeros, 9).T, 4).T, scales, group_size=32, sym=True)


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_gptq_act_order(kind):
    codes, zeros, scales, qweight, qzeros = layer(most=14)
    g_idx = np.random.default_rng(1).permutation(np.arange(K) // 32).astype(kind)
    weight = gptq.unpack(qweight, qzeros, scales, g_idx, group_size=32, sym=False)
    # Stable: those of a group stay in order.
    wanted = [k for group in range(4) for k in range(K) if g_idx[k] == group]
    np.testing.assert_array_equal(weight.perm, wanted)
    assert_is(weight, expected(codes, zeros + 1, scales, g_idx))


def test_static_groups_have_no_permutation():
    codes, zeros, scales, qweight, qzeros = layer(most=14)
    g_idx = np.arange(K, dtype=np.int32) // 32
    weight = gptq.unpack(qweight, qzeros, scales, g_idx, group_size=32, sym=False)
    assert weight.perm is None
    assert_is(weight, expected(codes, zeros + 1, scales, g_idx))


@pytest.mark.parametrize(
    "change", [{0: 1}, {0: -1}, {0: 4}, {0: 2**31 - 1}, {0: -(2**31)}, dict.fromkeys(range(K), 0)], ids=str
)
def test_uneven_groups(change):
    """As in a part of a layer that was cut along K for tensor parallelism."""
    _, _, scales, qweight, qzeros = layer(most=14)
    g_idx = np.arange(K, dtype=np.int32) // 32
    for k, group in change.items():
        g_idx[k] = group
    with pytest.raises(ValueError, match=r"^g_idx must have 32 of each of 0 to 3, "):
        gptq.unpack(qweight, qzeros, scales, g_idx, group_size=32, sym=False)


# ---- checkpoints -----------------------------------------------------------------------------


def arrays(g_idx=None, **options):
    _, _, scales, qweight, qzeros = layer(**options)
    found = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    return found if g_idx is None else {**found, "g_idx": g_idx}


ORDER = np.random.default_rng(1).permutation(np.arange(K, dtype=np.int32) // 32)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("config", "zeros", "g_idx"),
    [
        ({}, {}, None),
        ({"sym": True}, {"sym": 1}, None),
        ({"sym": True, "desc_act": True}, {"sym": 1}, ORDER),
        ({"desc_act": True}, {}, ORDER),
        ({"desc_act": True, "static_groups": True}, {}, np.arange(K, dtype=np.int32) // 32),
        ({"desc_act": True, "group_size": -1}, {"group": K}, np.zeros(K, np.int32)),
    ],
    ids=str,
)
def test_layer(config, zeros, g_idx, bits, dtype):
    if "sym" in zeros:
        zeros = {"sym": 1 << (bits - 1)}
    codes, stored_zeros, scales, qweight, qzeros = layer(bits=bits, dtype=dtype, **zeros)
    parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    if g_idx is not None:
        parts["g_idx"] = g_idx
    bias = np.zeros(N, np.float16)
    tensors = checkpoint({"model.q": {**parts, "bias": bias}, "model.norm": {"weight": bias}})
    (found,) = gptq.layers({**CONFIG, "bits": bits, **config}, tensors).items()
    name, one = found
    assert (name, one.type, one.shape, one.refusal) == ("model.q", f"GPTQ {bits}-bit", (N, K), None)
    assert one.tensors == tuple(f"model.q.{part}" for part in parts)
    assert one.nbytes == sum(array.nbytes for array in parts.values())
    weight = one.read(0)
    groups_of_k = np.arange(K) // (K if "group" in zeros else 32) if g_idx is None else g_idx
    assert_is(weight, expected(codes, stored_zeros, scales, groups_of_k))
    assert one.packed_nbytes == weight.pack().nbytes


def test_format_is_that_of_autogptq_unless_the_config_says():
    codes, zeros, scales, qweight, qzeros = layer(most=14)
    tensors = checkpoint({"q": {"qweight": qweight, "qzeros": qzeros, "scales": scales}})
    one, two = (expected(codes, zeros + added, scales, np.arange(K) // 32) for added in (1, 0))
    config = {"bits": 4, "group_size": 32, "sym": False}
    for keys, wanted in [
        ({}, one),
        ({"checkpoint_format": "GPTQ"}, one),
        ({"format": "gptq"}, one),
        ({"checkpoint_format": "gptq", "format": "GPTQ"}, one),
        ({"checkpoint_format": "gptq_v2"}, two),
        ({"format": "gptq_v2", "checkpoint_format": None}, two),
    ]:
        assert_is(gptq.layers({**config, **keys}, tensors)["q"].read(0), wanted)


def test_symmetric_unless_the_config_says():
    """AutoGPTQ's default."""
    codes, zeros, scales, qweight, _ = layer(sym=8)
    tensors = checkpoint({"q": {"qweight": qweight, "scales": scales}})
    weight = gptq.layers({"bits": 4, "group_size": 32}, tensors)["q"].read(0)
    assert_is(weight, expected(codes, zeros, scales, np.arange(K) // 32))


def test_rules_for_modules():
    """GPTQModel's "dynamic": the first pattern that matches the beginning counts, and exclusions before all."""
    tensors = checkpoint(
        {
            "model.0.down": arrays(bits=8),
            "model.0.up": arrays(group=64),
            "model.1.up": arrays(),
            "lm_head": arrays(bits=8),
            "model.9.up": arrays(),
        }
    )
    dynamic = {
        r"+:.*\.0\.down": {"bits": 8},
        r".*\.0\..*": {"group_size": 64},
        "up": {"bits": 3},  # no path begins with it
        r"lm_head$": {"bits": 8},
        r".*\.9\..*": {"bits": 4},
        r"-:model\.9": {},
    }
    found = gptq.layers({**CONFIG, "lm_head": True, "dynamic": dynamic}, tensors)
    assert {name: one.type for name, one in found.items()} == {
        "model.0.down": "GPTQ 8-bit", "model.0.up": "GPTQ 4-bit", "model.1.up": "GPTQ 4-bit", "lm_head": "GPTQ 8-bit",
        "model.9.up": "GPTQ 4-bit",
    }  # fmt: skip
    assert found["model.9.up"].refusal == r"dynamic has 'model\\.9', which says that it is not quantized"
    for name, bits, group in [("model.0.down", 8, 32), ("model.0.up", 4, 64), ("model.1.up", 4, 32)]:
        codes, zeros, scales, _, _ = layer(bits=bits, group=group)
        assert_is(found[name].read(0), expected(codes, zeros, scales, np.arange(K) // group))


def without(parts, name):
    return {other: array for other, array in parts.items() if other != name}


WORDS = "int32, uint32, int64, uint64, int16, uint16, int8 or uint8"
INTEGERS = "must be of I32, U32, I64, U64, I16, U16, I8 or U8"


@pytest.mark.parametrize(
    ("config", "parts", "refusal"),
    [
        ({}, without(arrays(), "scales"), "m.scales is missing"),
        ({}, without(arrays(), "qzeros"), "m.qzeros is missing"),
        ({"bits": 3}, arrays(), "bits must be 2, 4 or 8, got 3"),
        ({"bits": 16}, arrays(), "bits must be 2, 4 or 8, got 16"),
        ({"bits": -4}, arrays(), "bits must be 2, 4 or 8, got -4"),
        ({"bits": 0}, arrays(), "bits must be 2, 4 or 8, got 0"),
        (
            {"checkpoint_format": "marlin"},
            arrays(),
            "checkpoint_format must be 'gptq', 'gptq_v2' or 'gptq_p', got 'marlin'",
        ),
        ({"rotation": "hadamard"}, arrays(), "rotation changes its inputs"),
        ({"group_size": 0}, arrays(), "group_size must be a multiple of 4, or K = 128, got 0"),
        ({"group_size": -2}, arrays(), "group_size must be a multiple of 4, or K = 128, got -2"),
        (
            {"group_size": 64},
            arrays(),
            "m.scales must have shape (2, 40) for K = 128, N = 40 and group_size 64, got (4, 40)",
        ),
        ({"bits": 8}, arrays(), "m.scales must have shape (2, 40) for K = 64, N = 40 and group_size 32, got (4, 40)"),
        ({"group_size": 6}, arrays(group=6), "group_size must be a multiple of 4, or K = 128, got 6"),
        ({}, {**arrays(), "qweight": np.zeros(8, np.int32)}, "m.qweight must be a non-empty matrix, got shape (8,)"),
        (
            {},
            {**arrays(), "qweight": np.zeros((0, 8), np.int32)},
            "m.qweight must be a non-empty matrix, got shape (0, 8)",
        ),
        (
            {},
            {**arrays(), "qweight": np.zeros((16, 40), np.float16)},
            f"m.qweight {INTEGERS}, got F16",
        ),
        (
            {},
            {**arrays(), "qzeros": np.zeros((4, 5), np.float16)},
            f"m.qzeros {INTEGERS}, got F16",
        ),
        ({}, {**arrays(), "scales": np.zeros((4, 40), np.int8)}, "m.scales must be of F32, F16 or BF16, got I8"),
        ({}, {**arrays(), "scales": np.zeros((4, 40))}, "m.scales must be of F32, F16 or BF16, got F64"),
        (
            {},
            {**arrays(), "qzeros": np.zeros((4, 6), np.int32)},
            "m.qzeros must have shape (4, 5) for K = 128, N = 40 and group_size 32, got (4, 6)",
        ),
        (
            {},
            {**arrays(), "g_idx": np.zeros(7, np.int32)},
            "m.g_idx must have shape (128,) for 16 rows of words, got (7,)",
        ),
        (
            {},
            {**arrays(), "g_idx": np.zeros((128, 1), np.int32)},
            "m.g_idx must have shape (128,) for 16 rows of words, got (128, 1)",
        ),
        ({"desc_act": True}, arrays(), "m.g_idx is missing, which desc_act needs"),
        (
            {},
            {**arrays(), "g_idx": np.zeros(128, np.float32)},
            f"m.g_idx {INTEGERS}, got F32",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refused(config, parts, refusal):
    tensors = checkpoint({"m": parts})
    one = gptq.layers({**CONFIG, **config}, tensors)["m"]
    assert one.refusal == refusal
    assert one.read is None and one.floats is None and one.packed_nbytes is None
    assert set(one.tensors) == set(tensors)
    assert one.nbytes == sum(array.nbytes for array in parts.values())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": "4"}, "bits of the quantization must be an int, got '4'"),
        ({"bits": None}, "the quantization must have bits, got quant_method, bits, group_size, sym, checkpoint_format"),
        ({"group_size": 32.0}, "group_size of the quantization must be an int, got '32.0'"),
        ({"sym": "yes"}, "sym of the quantization must be a bool, got 'yes'"),
        ({"desc_act": 1}, "desc_act of the quantization must be a bool, got '1'"),
        ({"checkpoint_format": 2}, "checkpoint_format of the quantization must be a string, got '2'"),
        ({"dynamic": ["lm_head"]}, "dynamic of the quantization must be an object, got \"['lm_head']\""),
        ({"dynamic": {"lm_head": 8}}, "lm_head of dynamic of the quantization must be an object, got '8'"),
        ({"dynamic": {"+:(": {}}}, "dynamic of the quantization must have regular expressions, got '(': "),
        ({"dynamic": {"m": {"bits": []}}}, "bits of the quantization must be an int, got '[]'"),
    ],
    ids=str,
)
def test_config_that_makes_no_sense(config, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        gptq.layers({**CONFIG, **config}, checkpoint({"m": arrays()}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"qweight": np.zeros((16, 40))},
            TypeError,
            f"qweight must be an array of {WORDS}, got float64",
        ),
        (
            {"qzeros": np.zeros((4, 5))},
            TypeError,
            f"qzeros must be an array of {WORDS}, got float64",
        ),
        (
            {"g_idx": np.zeros(128)},
            TypeError,
            f"g_idx must be an array of {WORDS}, got float64",
        ),
        ({"scales": np.zeros((4, 40), int)}, TypeError, "scales must be an array of float32, float16 or bfloat16"),
        ({"qzeros": None}, ValueError, "qzeros must be given where zero points are not symmetric, got None"),
        ({"bits": 3}, ValueError, "bits must be 2, 4 or 8, got 3"),
        ({"bits": 4.0}, TypeError, "bits must be an int, got float"),
        ({"bits": True}, TypeError, "bits must be an int, got bool"),
        ({"group_size": "32"}, TypeError, "group_size must be an int, got str"),
        ({"group_size": 0}, ValueError, "group_size must be a multiple of 4, or K = 128, got 0"),
        ({"sym": 1}, TypeError, "sym must be a bool, got int"),
        ({"checkpoint_format": "v2"}, ValueError, "checkpoint_format must be 'gptq', 'gptq_v2' or 'gptq_p', got 'v2'"),
        ({"checkpoint_format": 2}, TypeError, "checkpoint_format must be 'gptq', 'gptq_v2' or 'gptq_p', got int"),
        ({"scales": np.ones((4, 41), np.float16)}, ValueError, "scales must have shape (4, 40) for K = 128, N = 40"),
        ({"g_idx": np.zeros(129, int)}, ValueError, "g_idx must have shape (128,) for 16 rows of words, got (129,)"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_arguments(change, error, message):
    given = {**arrays(most=14), "group_size": 32, "sym": False, **change}
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        gptq.unpack(**given)


PARTS = arrays(most=14, g_idx=ORDER)
SIZES = st.sampled_from([0, 1, 4, 5, 16, 40])
SHAPES = st.lists(SIZES, min_size=0, max_size=3).map(tuple)
DTYPES = st.sampled_from([np.int32, np.int8, np.int64, np.uint8, np.float16, np.float32, np.float64])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_tensors(data):
    """Whatever the headers say, a layer is refused, or reading it raises ValueError, or it is that of its shapes."""
    parts = dict(PARTS)
    for name in data.draw(st.sets(st.sampled_from(list(parts)), max_size=2)):
        dtype, shape = data.draw(DTYPES), data.draw(st.one_of(SHAPES, st.just(parts[name].shape)))
        size = np.prod(shape, dtype=int) * np.dtype(dtype).itemsize
        parts[name] = np.resize(np.frombuffer(parts[name].tobytes(), np.uint8), size).view(dtype).reshape(shape)
    config = {
        **CONFIG,
        "bits": data.draw(st.sampled_from([2, 4, 8])),
        "group_size": data.draw(st.sampled_from([-1, 4, 32])),
    }
    (one,) = gptq.layers({**config, "sym": data.draw(st.booleans())}, checkpoint({"m": parts})).values()
    if one.refusal is None:
        try:
            weight = one.read(0)
        except ValueError as error:
            assert re.match(r"m\.(g_idx|qzeros) must ", str(error))
        else:
            assert weight.shape == one.shape


def test_equals_gptqmodel(monkeypatch):
    """GPTQModel's own reader."""
    torch = reader("torch")
    # Of pypcre, which has no wheels. What is used here has no regular expressions.
    monkeypatch.setitem(sys.modules, "pcre", MagicMock())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_linear = reader("gptqmodel.nn_modules.qlinear.torch")
    for bits in 2, 4, 8:
        _, _, scales, qweight, qzeros = layer(n=64, bits=bits)
        theirs = torch_linear.TorchLinear(
            bits=bits, group_size=32, sym=False, desc_act=True, in_features=K, out_features=64, bias=False,
            pack_dtype=torch.int32, register_buffers=True,
        )  # fmt: skip
        for name, array in [("qweight", qweight), ("qzeros", qzeros), ("scales", scales), ("g_idx", ORDER)]:
            theirs.register_buffer(name, torch.from_numpy(array.copy()))
        theirs.post_init()
        with torch.no_grad():
            wanted = theirs.dequantize_weight().float().numpy().T
        weight = gptq.unpack(
            qweight, qzeros, scales, ORDER, bits=bits, group_size=32, sym=False, checkpoint_format="gptq_v2"
        )
        # GPTQModel's product is float16.
        np.testing.assert_array_equal(weight.pack().dequantize().astype(np.float16), wanted.astype(np.float16))
