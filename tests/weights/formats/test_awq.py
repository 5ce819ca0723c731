"""AWQ's tensors stand for what AutoAWQ's gemm.py, gemv.py and gemv_fast.py say."""

import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readers import reader
from stored import checkpoint, floats

from pyda8w4.formats import awq

N, K = 40, 256
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}


def random_layer(seed=0, n=N, k=K, group=64, dtype=np.float16):
    """-> codes (N, K), zero points (N, G), scales (N, G)."""
    rng = np.random.default_rng(seed)
    groups = k // group
    return rng.integers(0, 16, (n, k)), rng.integers(0, 16, (n, groups)), floats(rng, (n, groups), dtype)


def words(values, dtype=np.int32, order=range(8)):
    """Along the last axis: nibble i of a word is value ``order[i]`` of those that it holds."""
    per_word = 2 * np.dtype(dtype).itemsize
    out = np.zeros((*values.shape[:-1], values.shape[-1] // per_word), np.dtype(f"u{np.dtype(dtype).itemsize}"))
    for index in np.ndindex(out.shape):
        for nibble in range(per_word):
            value = int(values[(*index[:-1], index[-1] * per_word + order[nibble])])
            out[index] |= out.dtype.type(value << (4 * nibble))
    return out.view(dtype)


def gemm(codes, zeros, scales):
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return {"qweight": words(codes.T, order=order), "qzeros": words(zeros.T, order=order), "scales": scales.T}


def padded(values, width):
    return np.pad(values, [(0, 0), (0, width - values.shape[1])])


def gemv(codes, zeros, scales, width=8):
    return {
        "qweight": words(codes),
        "qzeros": words(padded(zeros, width)),
        "scales": padded(scales, width),
    }


def place(k):
    """Where pack_intweight puts one of 32 consecutive k: a permutation of pairs, and then one of 8 in each 8."""
    pairs = [pair for first in range(4) for pair in range(first, 16, 4)]  # 0, 4, 8, 12, 1, 5, ...
    position = 2 * pairs.index(k // 2) + k % 2
    return position // 8 * 8 + [0, 2, 4, 6, 1, 3, 5, 7].index(position % 8)


def gemv_fast(codes, zeros, scales, width=8):
    n, k = codes.shape
    nibbles = np.zeros((n // 4, 4 * k), int)
    for row, column in np.ndindex(n, k):
        block, inside = divmod(column, 64)
        at = inside // 32 * 32 + place(inside % 32)
        nibbles[row // 4, block * 256 + row % 4 * 64 + at] = codes[row, column]
    offsets = -(scales * zeros.astype(np.float32)).astype(np.float16)
    return {
        "qweight": words(nibbles, np.int16, range(4)),
        "qzeros": padded(offsets, width).T,
        "scales": padded(scales, width).T,
    }


WRITERS = {"gemm": gemm, "gemv": gemv, "gemv_fast": gemv_fast}


def expected(codes, zeros, scales):
    """scale * (code - zero), rounded once."""
    out = np.empty(codes.shape, np.float32)
    group = codes.shape[1] // scales.shape[1]
    for n, k in np.ndindex(codes.shape):
        out[n, k] = np.float32(scales[n, k // group]) * np.float32(int(codes[n, k]) - int(zeros[n, k // group]))
    return out


def expected_fast(codes, scales, offsets):
    """scale * code + offset, each rounded."""
    out = np.empty(codes.shape, np.float32)
    group = codes.shape[1] // scales.shape[1]
    for n, k in np.ndindex(codes.shape):
        product = np.float32(scales[n, k // group]) * np.float32(codes[n, k])
        out[n, k] = product + np.float32(offsets[k // group, n])
    return out


def wanted_of(version, drawn, parts):
    return expected_fast(drawn[0], drawn[2], parts["qzeros"]) if version == "gemv_fast" else expected(*drawn)


def assert_is(weight, wanted):
    np.testing.assert_array_equal(weight.pack().dequantize(), wanted, strict=True)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("group", [32, 64, 128, K], ids=lambda group: f"g{group}")
@pytest.mark.parametrize("version", WRITERS)
def test_versions(version, group, dtype):
    drawn = random_layer(group=group, dtype=dtype)
    if version == "gemm":
        parts = gemm(*drawn)
    else:
        width = {32: 32, 64: 16}.get(group, 8)  # of a multiple of 4 or 2 words
        parts = WRITERS[version](*drawn, width)
    if version == "gemv_fast" and dtype != np.float16:
        parts["qzeros"] = parts["qzeros"].astype(dtype)
    for group_size in (group, -1) if group == K else (group,):
        weight = awq.unpack(**parts, group_size=group_size, version=version)
        assert_is(weight, wanted_of(version, drawn, parts))


@pytest.mark.parametrize("version", ["gemv", "gemv_fast"])
@pytest.mark.parametrize(
    ("k", "group", "width"), [(2048, 128, 16), (2048, 64, 32), (1152, 128, 16), (64, 16, 64), (384, 192, 8)]
)
def test_rows_of_zero_points_are_padded(version, k, group, width):
    """To words, and a multiple of 2, 4 or 8 of them for groups of 64, 32 or 16. What is there does not count."""
    drawn = random_layer(n=8, k=k, group=group)
    parts = WRITERS[version](*drawn, width)
    wanted = wanted_of(version, drawn, parts)
    groups = k // group
    if version == "gemv":
        parts["scales"][:, groups:] = np.nan
        parts["qzeros"][:, -(-groups // 8) :] = -1
    else:
        parts["scales"][groups:] = np.nan
        parts["qzeros"][groups:] = np.inf
    assert_is(awq.unpack(**parts, group_size=group, version=version), wanted)
    parts["scales"] = parts["scales"].repeat(2, axis=1 if version == "gemv" else 0)
    with pytest.raises(ValueError, match=r"^scales must have shape "):
        awq.unpack(**parts, group_size=group, version=version)


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_without_zero_points(version):
    codes, zeros, scales = random_layer()
    parts = WRITERS[version](codes, zeros, scales, *((16,) if version == "gemv" else ()))
    weight = awq.unpack(parts["qweight"], None, parts["scales"], group_size=64, version=version)
    assert_is(weight, expected(codes, np.full_like(zeros, 8), scales))
    assert weight.pack().zero_point == 8


def test_offsets_of_gemv_fast_are_kept():
    """They are rounded to float16, and nothing is made of them but what they are."""
    codes, zeros, scales = random_layer(n=8)
    parts = gemv_fast(codes, zeros, scales, 16)
    offsets = np.random.default_rng(5).standard_normal(parts["qzeros"].shape).astype(np.float16)
    weight = awq.unpack(parts["qweight"], offsets, parts["scales"], group_size=64, version="gemv_fast")
    assert_is(weight, expected_fast(codes, scales, offsets))
    np.testing.assert_array_equal(weight.offsets, offsets[: K // 64].T)


# ---- checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("config", "version", "names"),
    [
        ({}, "gemm", {}),
        ({"version": "GEMM"}, "gemm", {}),
        ({"version": None, "format": "gemm", "checkpoint_format": "gemm"}, "gemm", {}),
        ({"version": None}, "gemm", {}),
        ({"version": "gemv"}, "gemv", {}),
        ({"version": "gemv_fast"}, "gemv_fast", {}),
        ({"version": "llm-awq"}, "gemv_fast", {"qzeros": "scaled_zeros"}),
        ({"version": "gemv", "backend": "llm-awq"}, "gemv_fast", {"qzeros": "scaled_zeros"}),
        ({"bits": None, "group_size": None, "w_bit": 4, "q_group_size": 64}, "gemm", {}),
        ({"modules_to_not_convert": ["visual"]}, "gemm", {}),
    ],
    ids=str,
)
def test_layer(config, version, names, dtype):
    drawn = random_layer(dtype=dtype)
    parts = WRITERS[version](*drawn, *(() if version == "gemm" else (16,)))
    wanted = wanted_of(version, drawn, parts)
    parts = {names.get(name, name): array for name, array in parts.items()}
    bias = np.zeros(N, np.float16)
    tensors = checkpoint({"model.q": {**parts, "bias": bias}, "visual": {"weight": bias}})
    ((name, one),) = awq.layers({**CONFIG, **config}, tensors).items()
    assert (name, one.type, one.shape, one.refusal) == ("model.q", "AWQ 4-bit", (N, K), None)
    assert set(one.tensors) == {f"model.q.{part}" for part in parts}
    assert one.nbytes == sum(array.nbytes for array in parts.values())
    weight = one.read(0)
    assert_is(weight, wanted)
    assert one.packed_nbytes == weight.pack().nbytes


@pytest.mark.parametrize("is_stored", [True, False])
def test_layer_without_zero_points(is_stored):
    codes, zeros, scales = random_layer()
    zeros[:] = 8
    parts = gemm(codes, zeros, scales)
    if not is_stored:
        del parts["qzeros"]
    one = awq.layers({**CONFIG, "zero_point": False}, checkpoint({"m": parts}))["m"]
    assert_is(one.read(0), expected(codes, zeros, scales))
    assert one.packed_nbytes == one.read(0).pack().nbytes


def test_rules_for_modules():
    """GPTQModel's "dynamic"."""
    tensors = checkpoint(
        {"a.up": gemm(*random_layer()), "a.down": gemm(*random_layer(group=32)), "b": gemm(*random_layer())}
    )
    found = awq.layers({**CONFIG, "dynamic": {"a.down": {"group_size": 32}, "-:b": {}}}, tensors)
    assert_is(found["a.up"].read(0), expected(*random_layer()))
    assert_is(found["a.down"].read(0), expected(*random_layer(group=32)))
    assert found["b"].refusal == "dynamic has 'b', which says that it is not quantized"


def changed(version="gemm", **arrays):
    parts = {**WRITERS[version](*random_layer(), *(() if version == "gemm" else (16,))), **arrays}
    return {name: array for name, array in parts.items() if array is not None}


FLOATS = "must be of F32, F16 or BF16"
WHY = "for K = 256, N = 40 and group_size"


@pytest.mark.parametrize(
    ("config", "parts", "refusal"),
    [
        ({}, changed(scales=None), "m.scales is missing"),
        ({}, changed(qzeros=None), "m.qzeros is missing"),
        ({"version": "gemv_fast", "zero_point": False}, changed("gemv_fast", qzeros=None), "m.qzeros is missing"),
        ({"bits": 8}, changed(), "bits must be 4, got 8"),
        ({"version": "marlin"}, changed(), "version must be 'gemm', 'gemv' or 'gemv_fast', got 'marlin'"),
        ({"group_size": 0}, changed(), "group_size must be a multiple of 4, or K = 256, got 0"),
        ({"group_size": 96}, changed(), "group_size must divide K = 256 of m.qweight, got 96"),
        ({"group_size": 32}, changed(), f"m.scales must have shape (8, 40) {WHY} 32, got (4, 40)"),
        (
            {"version": "gemv"},
            changed(),
            "group_size must be 16, 32, 64 or at least 128 in gemv and gemv_fast, got 40",
        ),
        (
            {"version": "gemv", "group_size": 4},
            changed("gemv"),
            "group_size must be 16, 32, 64 or at least 128 in gemv and gemv_fast, got 4",
        ),
        ({}, changed(qweight=np.zeros((K, N // 8), np.int16)), "m.qweight must be of I32 or U32, got I16"),
        ({}, changed(qzeros=np.zeros((4, 5), np.int16)), "m.qzeros must be of I32 or U32, got I16"),
        ({}, changed(qweight=np.zeros(8, np.int32)), "m.qweight must be a non-empty matrix, got shape (8,)"),
        ({}, changed(qweight=np.zeros((8, 0), np.int32)), "m.qweight must be a non-empty matrix, got shape (8, 0)"),
        ({}, changed(qweight=np.zeros((8, 8), np.float32)), "m.qweight must be of I32 or U32, got F32"),
        ({}, changed(qzeros=np.zeros((4, 40), np.float16)), "m.qzeros must be of I32 or U32, got F16"),
        ({}, changed(scales=np.zeros((4, 40), np.int32)), f"m.scales {FLOATS}, got I32"),
        ({}, changed(qzeros=np.zeros((4, 40), np.int32)), f"m.qzeros must have shape (4, 5) {WHY} 64, got (4, 40)"),
        (
            {"version": "gemv_fast"},
            changed("gemv_fast", qzeros=np.zeros((16, 40), np.int32)),
            f"m.qzeros {FLOATS}, got I32",
        ),
        (
            {"version": "gemv_fast"},
            changed("gemv_fast", qweight=np.zeros((10, 256), np.int32)),
            "m.qweight must be of I16 or U16, got I32",
        ),
        (
            {"version": "gemv_fast", "group_size": 32},
            changed("gemv_fast", qweight=np.zeros((10, 96), np.int16)),
            "m.qweight must have a multiple of 64 columns, got 96",
        ),
        ({}, changed(scaled_zeros=np.zeros((4, 40), np.float16)), "m.scaled_zeros and m.qzeros are both there"),
        (
            {"version": "gemv_fast"},
            changed("gemv_fast", qzeros=np.zeros((8, 40), np.float16)),
            f"m.qzeros must have shape (16, 40) {WHY} 64, got (8, 40)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refused(config, parts, refusal):
    tensors = checkpoint({"m": parts})
    one = awq.layers({**CONFIG, **config}, tensors)["m"]
    assert one.refusal == refusal
    assert one.read is None and one.floats is None and one.packed_nbytes is None
    assert set(one.tensors) == set(tensors)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": "4"}, "bits of the quantization must be an int, got '4'"),
        ({"bits": None}, "the quantization must have bits, got "),
        ({"group_size": None}, "the quantization must have group_size, got "),
        ({"zero_point": 1}, "zero_point of the quantization must be a bool, got '1'"),
        ({"version": 2}, "version of the quantization must be a string, got '2'"),
        ({"dynamic": 3}, "dynamic of the quantization must be an object, got '3'"),
    ],
    ids=str,
)
def test_config_that_makes_no_sense(config, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        awq.layers({**CONFIG, **config}, {})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qweight": np.zeros((256, 5))}, TypeError, "qweight must be an array of int32 or uint32, got float64"),
        ({"qzeros": np.zeros((4, 5))}, TypeError, "qzeros must be an array of int32 or uint32, got float64"),
        ({"scales": np.zeros((4, 40), int)}, TypeError, "scales must be an array of float32, float16 or bfloat16"),
        ({"group_size": None}, TypeError, "group_size must be an int, got NoneType"),
        ({"version": "v2"}, ValueError, "version must be 'gemm', 'gemv' or 'gemv_fast', got 'v2'"),
        ({"version": 2}, TypeError, "version must be 'gemm', 'gemv' or 'gemv_fast', got int"),
        ({"scales": np.ones((4, 41), np.float16)}, ValueError, f"scales must have shape (4, 40) {WHY} 64"),
        (
            {**changed("gemv_fast"), "version": "gemv_fast", "qzeros": None},
            ValueError,
            "qzeros must be given in gemv_fast",
        ),
        (
            {**changed("gemv_fast"), "version": "gemv_fast", "qzeros": np.zeros((16, 40), np.int32)},
            TypeError,
            "qzeros must be an array of float32, float16 or bfloat16",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_arguments(change, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        awq.unpack(**{**changed(), "group_size": 64, **change})


PARTS = {version: changed(version) for version in WRITERS}
SIZES = st.sampled_from([0, 1, 4, 5, 16, 40, 256])
SHAPES = st.lists(SIZES, min_size=0, max_size=2).map(tuple)
DTYPES = st.sampled_from([np.int32, np.int16, np.int64, np.uint8, np.float16, np.float32, np.float64])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_tensors(data):
    """Whatever the headers say, a layer is refused, or it is that of its shapes."""
    version = data.draw(st.sampled_from(list(WRITERS)))
    parts = dict(PARTS[version])
    for name in data.draw(st.sets(st.sampled_from(list(parts)), max_size=2)):
        dtype, shape = data.draw(DTYPES), data.draw(st.one_of(SHAPES, st.just(parts[name].shape)))
        size = np.prod(shape, dtype=int) * np.dtype(dtype).itemsize
        parts[name] = np.resize(np.frombuffer(parts[name].tobytes(), np.uint8), size).view(dtype).reshape(shape)
    config = {**CONFIG, "version": version, "group_size": data.draw(st.sampled_from([-1, 4, 64]))}
    (one,) = awq.layers(config, checkpoint({"m": parts})).values()
    if one.refusal is None:
        assert one.read(0).shape == one.shape


# ---- AutoAWQ's own code ----------------------------------------------------------------------


@pytest.fixture
def torch():
    return reader("torch")


@pytest.mark.filterwarnings("ignore")
def test_equals_autoawq(torch):
    packing = reader("awq.utils.packing_utils")
    drawn = random_layer()
    parts = gemm(*drawn)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in parts.items()}
    wanted = packing.dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"], 4, 64).numpy().T
    weight = awq.unpack(**parts, group_size=64)
    np.testing.assert_array_equal(weight.pack().dequantize().astype(np.float16), wanted)


@pytest.mark.filterwarnings("ignore")
def test_reads_what_autoawq_writes(torch):
    """It has no reader of these layouts for CPUs."""
    for version, module, kind in [
        ("gemv", "gemv", "WQLinear_GEMV"),
        ("gemv_fast", "gemv_fast", "WQLinear_GEMVFast"),
    ]:
        linear_of = getattr(reader(f"awq.modules.linear.{module}"), kind)
        codes, zeros, _ = random_layer()
        scales = 2.0 ** np.random.default_rng(3).integers(-5, 0, zeros.shape)
        drawn = codes, zeros, scales.astype(np.float16)
        linear = torch.nn.Linear(K, N, bias=False)
        linear.weight.data = torch.from_numpy(expected(*drawn))
        written = linear_of.from_linear(linear, 4, 64, scales=torch.from_numpy(drawn[2]), zeros=torch.from_numpy(zeros))
        parts = {name: getattr(written, name).numpy() for name in ("qweight", "qzeros", "scales")}
        assert_is(awq.unpack(**parts, group_size=64, version=version), expected(*drawn))
