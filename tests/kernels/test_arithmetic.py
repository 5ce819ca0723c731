"""Arithmetic at the edges of its types: integer sums, zero points, float control, rounding of outputs."""

from functools import cache

import ml_dtypes
import numpy as np
import pytest
from cases import (
    DTYPES,
    Weight,
    arrays,
    assert_same_bits,
    assert_same_weight,
    bias_of,
    bits,
    expected_linear,
    floats,
    pack,
    prepack,
    quantized,
)
from guard import DENORMALS_ARE_ZERO, FLUSH_TO_ZERO, ROUND_DOWN, ROUND_UP, TRUNCATE, float_control, get_float_control

import pyda8w4
from pyda8w4 import reference

F32 = np.float32
INT32_MAX = 2**31 - 1


def int_gemm(a, codes, zp):
    """The exact sums of an int8 product whose scales are 1, rounded to float32 once."""
    return (a.astype(object) @ (codes.astype(object) - zp).T).astype(np.float64).astype(F32)


# ---- integers ----------------------------------------------------------------------------------


@pytest.mark.pitfall("torchao", "zero point cast to int8, w - zp wraps below -112")
@pytest.mark.parametrize("zp", [-128, -127, -113, -112, 112, 113, 127])
def test_zero_points_at_the_edges_of_int8(kernel, zp):
    codes = np.arange(16, dtype=np.uint8).repeat(8).reshape(2, 64)
    few = np.array([[-128] * 64, [127] * 64, range(-32, 32)], np.int8)
    for a in (few, few.repeat(4, 0)):
        np.testing.assert_array_equal(pyda8w4.gemm(a, prepack(codes, [zp, zp])), int_gemm(a, codes, zp))
        # The same beside another zero point, so that it is stored for each group.
        packed = prepack(codes, [zp, 0])
        np.testing.assert_array_equal(pyda8w4.gemm(a, packed)[:, 0], int_gemm(a, codes[:1], zp)[:, 0])


@cache
def with_one_low_zero_point(zp, block, group):
    """Zero points of 0 to 15 but for one. -> arguments of prepack, and products of 70 rows by the oracle."""
    codes, scales, zps = (array.copy() for array in arrays(Weight(100, 640, 32)))
    column = min(32 * block + 17, 99)
    zps[column, group] = zp
    codes[column, 32 * group : 32 * group + 32] = np.arange(32) % 16
    return (codes, scales, zps), reference.gemm(*quantized(640, "int8")[:1], codes, scales, zps, group_size=32)


@pytest.mark.parametrize("group", [0, 9, 19])
@pytest.mark.parametrize("block", range(4))
@pytest.mark.parametrize("zp", [-128, -120, -114, -113, -112, -111, 127])
def test_one_low_zero_point_counts_wherever_it_is(kernel, zp, block, group):
    weight, expected = with_one_low_zero_point(zp, block, group)
    packed = pyda8w4.prepack(*weight)
    for rows in (1, 20, 70):
        assert_same_bits(pyda8w4.gemm(quantized(640, "int8")[0][:rows], packed), expected[:rows], rows)


@pytest.mark.pitfall("GPTQModel #2350", "zero point -1 wraps to 15")
def test_zero_point_minus_1_is_not_15(kernel):
    # -1 is -1, not 15: beside 0 (stored for each group), alone, and in any integer type.
    codes = np.zeros((2, 8), np.uint8)
    a = np.ones((1, 8), np.int8)
    for dtype in (np.int8, np.int16, np.int64):
        assert pyda8w4.gemm(a, prepack(codes, np.array([-1, 0], dtype))).tolist() == [[8, 0]]
        assert pyda8w4.gemm(a, prepack(codes, np.array([-1, -1], dtype))).tolist() == [[8, 8]]
    assert pyda8w4.gemm(a, prepack(codes, np.array([16, 0], np.uint8))).tolist() == [[-128, 0]]


@pytest.mark.pitfall("ik_llama.cpp #427, oneDNN #476, BitNet #629", "vpmaddubsw saturation")
@pytest.mark.parametrize("zp", [0, 8, 15, -128, 127])
def test_sums_of_two_products_do_not_saturate(kernel, zp):
    for k in (2, 4, 32, 33, 64, 256, 300):
        codes = np.full((33, k), 15, np.uint8)
        for act, value in (("uint8", 0), ("uint8", 255), ("int8", -128), ("int8", 127)):
            for rows in (1, 20):
                a = np.full((rows, k), value, act)
                y = pyda8w4.gemm(a, prepack(codes, np.full(33, zp)))
                assert (y == k * value * (15 - zp)).all()


@pytest.mark.pitfall("general", "vpdpbusds instead of vpdpbusd")
def test_sums_that_leave_int32_on_the_way_are_exact(kernel):
    # The difference fits int32, but neither sum a * code (-128 * 15 * k) nor sum (a + 128) * (code - zp)
    # does: a kernel that forms one of them must take parts in turn or wrap, and may never clamp.
    k = 2**21 - 1
    assert 128 * 15 * k > INT32_MAX
    codes = np.full((1, k), 15, np.uint8)
    packed = prepack(codes, [7])
    for rows, value in ((2, -128), (2, 127), (9, 127)):
        a = np.full((rows, k), value, np.int8)
        assert (pyda8w4.gemm(a, packed) == F32(value * 8 * k)).all()


@pytest.mark.pitfall("general", "int32 overflow, 255 * 15 * K")
@pytest.mark.parametrize("zp, most", [(8, 8), (0, 15), (127, 127), (-128, 143)])
def test_int32_limit_is_reached_exactly(kernel, zp, most):
    limit = INT32_MAX // (128 * most)
    with pytest.raises(ValueError, match=r"group_size .* too large"):
        prepack(np.zeros((1, limit + 1), np.uint8), [zp])
    codes = np.zeros((1, limit), np.uint8)
    packed_low = prepack(codes, [zp])
    packed_high = prepack(codes + np.uint8(15), [zp])
    a = np.full((1, limit), -128, np.int8)
    assert pyda8w4.gemm(a, packed_low) == F32(-128 * (0 - zp) * limit)
    assert (pyda8w4.gemm(a.repeat(9, 0), packed_high) == F32(-128 * (15 - zp) * limit)).all()
    # As uint8 with zero point 0 the shift by 128 is added back, and all is 0 up to one rounding.
    a = np.zeros((1, limit), np.uint8)
    expected = reference.fma(F32(128), F32(-zp * limit), F32(-128 * (0 - zp) * limit))
    assert_same_bits(pyda8w4.gemm(a, packed_low), expected.reshape(1, 1))


def test_int32_limit_is_that_of_a_group():
    # The whole of k may be longer than one group may.
    k = 2**21
    packed = prepack(np.zeros((1, k), np.uint8), scales=np.ones((1, 2)))
    assert pyda8w4.gemm(np.full((1, k), -128, np.int8), packed) == F32(128 * 8 * k)
    with pytest.raises(ValueError, match="too large"):
        prepack(np.zeros((1, 2 * 132108), np.uint8), [[127, 0]], np.ones((1, 2)))
    prepack(np.zeros((1, 2 * 132104), np.uint8), [[127, 0]], np.ones((1, 2)))


@pytest.mark.pitfall("ggml #1393", "sign trick, abs(-128)")
def test_products_with_minus_128_are_exact(kernel):
    # abs(-128) is no int8, nor is -(-128): in activations, in zero points, in code - zp.
    k = 40
    for zp in (-128, 127, 120, 0):
        codes = np.tile(np.arange(16, dtype=np.uint8), (33, k))[:, :k]
        a = np.full((3, k), -128, np.int8)
        a[1, ::2], a[2, 1::2] = 127, 0
        packed = prepack(codes, np.full(33, zp))
        np.testing.assert_array_equal(pyda8w4.gemm(a, packed), int_gemm(a, codes, zp))


@pytest.mark.pitfall("general", "int32 to float32 above 2**24")
def test_sums_beyond_2_24_are_rounded_once(kernel):
    rng = np.random.default_rng(1)
    k = 20001
    codes = rng.integers(12, 16, (33, k), np.uint8)
    a = rng.integers(100, 128, (9, k), np.int8)
    exact = a.astype(np.int64) @ codes.T.astype(np.int64)
    assert (exact > 2**24).all() and (exact % 2).any()
    packed = prepack(codes, np.zeros(33, np.int8))
    np.testing.assert_array_equal(pyda8w4.gemm(a, packed), exact.astype(F32))


@pytest.mark.pitfall("general", "int32 to float32 above 2**24")
def test_sums_of_activations_beyond_2_24_are_rounded_once(kernel):
    # Sums of activations that float32 cannot hold are rounded once, at the end of a group of many chunks.
    rng = np.random.default_rng(1)
    k = 200001
    a = rng.integers(100, 128, (30, k), np.int8)
    exact = a.astype(np.int64).sum(axis=1)
    assert (exact > 2**24).all() and (exact % 2).any()
    packed = prepack(np.full((33, k), 3, np.uint8), np.full(33, 3, np.int8), offsets=np.ones(33, F32))
    for rows in (1, 9, 30):
        np.testing.assert_array_equal(pyda8w4.gemm(a[:rows], packed), exact[:rows, None].astype(F32).repeat(33, 1))


# ---- offsets -----------------------------------------------------------------------------------


@pytest.mark.pitfall("llama.cpp #16315", "AMX garbage on Q4_1")
def test_offsets_give_the_weights_of_q4_1(kernel):
    # One activation of 1 after the other gives the weights back, as GGUF's Q4_1 has them: code * d + m.
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, (33, 96), np.uint8)
    d, m = (rng.standard_normal((33, 3)).astype(np.float16) for _ in range(2))
    weight = (codes.reshape(33, 3, 32) * d.astype(F32)[..., None] + m.astype(F32)[..., None]).reshape(33, 96)
    packed = prepack(codes, np.zeros((33, 3), np.int8), d, m)
    assert packed.scale_dtype == "float16" and packed.zero_point == 0
    assert_same_bits(pyda8w4.gemm(np.eye(96, dtype=np.int8), packed), weight.T)


def test_zero_offsets_change_no_bit(kernel):
    # concat relies on it. Sums that are 0 or cancel, products below and beyond float32, with either sign.
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, (66, 128), np.uint8)
    scales = rng.choice(np.array([-1e-45, 1e-45, -3e38, 3e38, -1, 1], F32), (66, 4))
    zps = rng.integers(0, 16, (66, 4), np.int8)
    codes[::2] = zps[::2].repeat(32, 1)
    a = rng.integers(-128, 128, (30, 128), np.int8)
    a[0], a[1, ::2], a[1, 1::2] = 0, 127, -127
    a_zps = rng.integers(-128, 128, 30, np.int32)
    for rows in (1, 9, 30):
        part = (a[:rows], None, a_zps[:rows])
        y = pyda8w4.gemm(part[0], prepack(codes, zps, scales), *part[1:])
        assert np.isnan(y).any() or rows == 1
        assert_same_bits(pyda8w4.gemm(part[0], prepack(codes, zps, scales, np.zeros((66, 4), F32)), *part[1:]), y)


# ---- NaN, infinity, subnormals, and the caller's float control ---------------------------------


@pytest.mark.pitfall("general", "NaN and Inf policy")
def test_nan_scales_and_infinite_biases_reach_their_outputs_only(kernel):
    weight = Weight(33, 67, 32)
    a, a_scales, a_zps = (array[:3].copy() for array in quantized(67, "uint8"))
    a_scales[1] = np.nan
    bias = bias_of(33).copy()
    bias[:3] = np.nan, np.inf, -np.inf
    expected = reference.gemm(a, *arrays(weight), a_scales, a_zps, bias, group_size=32)
    y = pyda8w4.gemm(a, pack(weight), a_scales, a_zps, bias=bias)
    assert_same_bits(y, expected)
    assert (bits(y)[1] == 0x7FC00000).all() and (y[0, 1], y[0, 2]) == (np.inf, -np.inf)


def subnormal_case():
    """A product whose weight scales, activation scales, sums and results are subnormal."""
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 16, (33, 40), np.uint8)
    scales = (rng.integers(1, 1000, (33, 2)) * 2.0**-149).astype(F32)
    zps = rng.integers(0, 16, (33, 2), np.int8)
    a = rng.integers(0, 256, (9, 40), np.uint8)
    a_scales = rng.uniform(0.001, 1, 9).astype(F32)
    a_zps = rng.integers(0, 256, 9, np.int32)
    return a, codes, scales, zps, a_scales, a_zps


@pytest.mark.pitfall("ik_llama.cpp #2503", "fp16 scale product vanished; FTZ, DAZ")
def test_subnormals_survive_flush_to_zero(kernel, threads):
    a, codes, scales, zps, a_scales, a_zps = subnormal_case()
    half = (np.random.default_rng(3).integers(1, 1023, (33, 2)) * 2.0**-24).astype(np.float16)
    x = (floats(40)[:9] * F32(1e-37)).astype(F32)
    large = Weight(330, 600, 100)
    for few in (1, 3):
        pyda8w4.set_num_threads(few)
        expected = reference.gemm(a, codes, scales, zps, a_scales, a_zps, group_size=20)
        assert np.count_nonzero(np.abs(expected) < np.finfo(F32).tiny) > 200 and np.count_nonzero(expected) > 200
        expected_half = reference.gemm(a, codes, half.astype(F32), zps, a_scales, a_zps, group_size=20)
        expected_rows = reference.quantize_activation(x)
        expected_large = expected_linear(large)[:20]
        flush = FLUSH_TO_ZERO | DENORMALS_ARE_ZERO
        with float_control(flush):
            assert F32(1e-40) * F32(1) == 0, "this thread does not flush subnormals"
            packed = pyda8w4.prepack(codes, scales, zps)
            y = pyda8w4.gemm(a, packed, a_scales, a_zps)
            y_half = pyda8w4.gemm(a, pyda8w4.prepack(codes, half, zps), a_scales, a_zps)
            rows = pyda8w4.quantize_activation(x)
            y_large = pyda8w4.linear(floats(600)[:20], pack(large))
            assert get_float_control() & flush == flush, "the caller's float control was changed"
        assert_same_bits(y, expected)
        assert_same_bits(y_half, expected_half)
        assert_same_bits(y_large, expected_large)
        for got, wanted in zip(rows, expected_rows, strict=True):
            assert_same_bits(got, wanted)
        assert_same_weight(packed, pyda8w4.prepack(codes, scales, zps))
        assert_same_bits(packed.unpack()[1], scales)


@pytest.mark.parametrize("direction", [ROUND_DOWN, ROUND_UP, TRUNCATE])
def test_rounding_mode_of_the_caller_does_not_matter(kernel, direction):
    # Rounding modes of the calling thread do not matter either.
    weight = Weight(33, 67, 32)
    x = floats(67)[:20]
    results = {}
    for out, dtype in DTYPES.items():
        with float_control(direction):
            results[out] = pyda8w4.linear(x, pack(weight), bias_of(33), out_dtype=dtype)
    for out, y in results.items():
        assert_same_bits(y, expected_linear(weight, bias=True, out=out)[:20])


def test_a_product_leaves_no_exception_flags(kernel):
    with float_control(0):
        before = get_float_control()
        pyda8w4.linear(floats(67)[:20], pack(Weight(33, 67, 32)))
        assert get_float_control() == before


# ---- rounding of outputs -----------------------------------------------------------------------


def product_of(values):
    """Calls that give these float32 outputs: the bias is the output where everything else is 0."""
    values = np.asarray(values, F32)
    packed = prepack(np.full((len(values), 4), 8, np.uint8))

    def call(dtype):
        return pyda8w4.gemm(np.zeros((1, 4), np.int8), packed, bias=values, out_dtype=dtype)[0]

    return call


@pytest.mark.pitfall("general", "float16 overflow of outputs")
def test_float16_outputs_overflow_to_infinity(kernel):
    call = product_of([65504, 65519.996, 65520, 70000, 1e38, -65519.996, -65520, -3e38, np.inf, -np.inf])
    expected = np.array([65504, 65504, *[np.inf] * 3, -65504, *[-np.inf] * 2, np.inf, -np.inf], np.float16)
    assert_same_bits(call(np.float16), expected)


def test_float16_outputs_round_to_nearest_even(kernel):
    halves = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(F32)
    ties = (halves[:-1] + halves[1:]) / 2
    values = np.concatenate([halves, ties, np.nextafter(ties, F32(0)), np.nextafter(ties, F32(np.inf))])
    for sign in (1, -1):
        assert_same_bits(product_of(sign * values)(np.float16), (sign * values).astype(np.float16))


@pytest.mark.pitfall("general", "bfloat16 truncation, NaN becomes infinity")
def test_bfloat16_outputs_round_to_nearest_even_and_have_one_nan(kernel):
    rng = np.random.default_rng(1)
    high = rng.integers(0, 0xFF80, 5000, np.uint32) << 16
    low = rng.choice(np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32), 5000)
    values = (high | low).view(F32)
    values = values[~np.isnan(values)]
    edges = F32([np.inf, -np.inf, np.finfo(F32).max, -np.finfo(F32).max, 1e-45, -0.0])
    values = np.concatenate([values, edges])
    assert_same_bits(product_of(values)(ml_dtypes.bfloat16) + 0, values.astype(ml_dtypes.bfloat16) + 0)
    # NaNs of any sign and payload become the one NaN, never an infinity.
    nans = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0xFFC00000], np.uint32).view(F32)
    call = product_of(nans)
    assert bits(call(ml_dtypes.bfloat16)).tolist() == [0x7FC0] * 6
    assert bits(call(np.float16)).tolist() == [0x7E00] * 6
    assert bits(call(F32)).tolist() == [0x7FC00000] * 6
