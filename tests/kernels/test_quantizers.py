"""Both quantizers against torchao's choose_qparams_affine and quantize_affine, written out here with a smaller eps."""

import numpy as np
import pytest
from cases import (
    DTYPES,
    Weight,
    assert_same_bits,
    bias_of,
    expected_linear,
    floats,
    pack,
    prepack,
    quantized,
)

import pyda8w4
from pyda8w4 import reference

F32 = np.float32
LEAST_SCALE = np.finfo(F32).tiny  # torchao: np.finfo(F32).eps


def choose_qparams(values, low, high, symmetric):
    """torchao: MappingType.ASYMMETRIC or SYMMETRIC, preserve_zero, ZeroPointDomain.INT, one block."""
    least = min(F32(values.min()), F32(0))
    most = max(F32(values.max()), F32(0))
    if symmetric:
        scale = max(-least, most) / F32((high - low) / 2)
        zero_point = (high + low + 1) // 2
    else:
        scale = (most - least) / F32(high - low)
        zero_point = None
    scale = max(scale, LEAST_SCALE)
    if zero_point is None:
        zero_point = low - int(np.rint(least / scale))
        zero_point = min(max(zero_point, low), high)
    return F32(scale), zero_point


def quantize_block(values, scale, zero_point, low, high):
    inverse = F32(1) / scale
    return np.array([min(max(int(np.rint(F32(v) * inverse)) + zero_point, low), high) for v in values])


def activation(row, act):
    low, high = (-127, 127) if act == "int8" else (0, 255)
    scale, zero_point = choose_qparams(row.astype(F32), low, high, act == "int8")
    return quantize_block(row.astype(F32), scale, zero_point, low, high), scale, zero_point


def assert_like_torchao(x, act):
    a, scales, zps = pyda8w4.quantize_activation(x, act)
    assert a.dtype == (np.int8 if act == "int8" else np.uint8)
    assert scales.dtype == np.float32 and zps.dtype == np.int32
    for m, row in enumerate(x):
        codes, scale, zero_point = activation(row, act)
        np.testing.assert_array_equal(a[m], codes)
        assert_same_bits(scales[m : m + 1], np.array([scale]))
        assert zps[m] == zero_point


both = pytest.mark.parametrize("act", ["uint8", "int8"])


@both
def test_k_tails(kernel, act):
    for k in range(1, 71):
        assert_like_torchao(floats(k)[:7], act)


@both
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_dtypes(kernel, act, dtype):
    for k in (1, 15, 16, 33, 300):
        assert_like_torchao(floats(k, dtype)[:20], act)


@both
def test_one_sided_rows(kernel, act):
    x = np.abs(floats(50))
    assert_like_torchao(x, act)
    assert_like_torchao(-x, act)
    assert_like_torchao(x + 1000, act)
    assert_like_torchao(-x - 1000, act)


@both
@pytest.mark.parametrize("place", [0, 7, 8, 15, 16, 31, 32, 36])
def test_the_extremes_are_found_wherever_they_are(kernel, act, place):
    x = np.full((2, 37), 0.25, F32)
    x[0, place], x[1, place] = 9, -9
    assert_like_torchao(x, act)


@both
def test_large_and_small_rows(kernel, act):
    x = floats(41)[:10].astype(np.float64)
    for exponent in range(-44, 37, 4):
        scaled = x * 10.0**exponent
        assert_like_torchao(np.clip(scaled, -1.6e38, 1.6e38).astype(F32), act)


@both
def test_rows_about_the_least_scale(kernel, act):
    x = floats(41)[:10].astype(np.float64)
    for exponent in range(-150, -105):
        assert_like_torchao(np.ldexp(x, exponent).astype(F32), act)


@both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_powers_of_two_change_no_code(kernel, act, dtype):
    # A row is as exact as any other of its direction, however small or large it is: only exponents differ.
    x = np.round(floats(67, dtype)[:7].astype(F32), 3).astype(DTYPES[dtype])  # no value so small that it loses bits
    weight = pack(Weight(33, 67, 32))
    a, scales, zps = pyda8w4.quantize_activation(x, act)
    y = pyda8w4.linear(x, weight, act=act, out_dtype=F32)
    for exponent in (*range(-100, 0, 9), *range(1, 100, 9)):
        power = F32(2.0**exponent)
        scaled = (x.astype(F32) * power).astype(x.dtype)
        got = pyda8w4.quantize_activation(scaled, act)
        for array, expected in zip(got, (a, scales * power, zps), strict=True):
            assert_same_bits(array, expected, exponent)
        assert_same_bits(pyda8w4.linear(scaled, weight, act=act, out_dtype=F32), y * power, exponent)


@both
def test_the_relative_error_does_not_depend_on_the_size_of_rows(kernel, act):
    x = floats(256)[:5].astype(np.float64)
    w = floats(256)[5:40]
    packed = pyda8w4.quantize(w, 32)
    restored = packed.dequantize().astype(np.float64)
    for exponent in range(-30, 31):
        scaled = (x * 10.0**exponent).astype(F32)
        expected = scaled.astype(np.float64) @ restored.T
        error = pyda8w4.linear(scaled, packed, act=act) - expected
        assert np.linalg.norm(error) < 0.02 * np.linalg.norm(expected), exponent


@both
def test_subnormal_float16_rows_keep_their_values(kernel, act):
    values = np.arange(128, dtype=np.uint16) | np.where(np.arange(128) % 2, 0x8000, 0).astype(np.uint16)
    x = values.view(np.float16)[None]
    a, scales, zps = pyda8w4.quantize_activation(x, act)
    restored = (a.astype(np.float64) - zps[:, None]) * scales[:, None]
    np.testing.assert_allclose(restored, x.astype(np.float64), atol=0.51 * scales[0])
    assert scales[0] < 2.0**-23


def test_multiplies_by_the_rounded_inverse(kernel):
    # x * (1 / s), both rounded, is not x / s.
    rng = np.random.default_rng(5)
    assert_like_torchao(rng.uniform(0.9, 1.1, (300, 9)).astype(F32), "uint8")
    assert_like_torchao(rng.uniform(0.9, 1.1, (300, 9)).astype(F32), "int8")


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", list(DTYPES))
@both
def test_a_bad_value_poisons_its_row_only(kernel, act, dtype, bad):
    for k in (1, 9, 37):
        for place in {0, k // 2, k - 1}:
            x = floats(k, dtype)[:5].copy()
            x[2, place] = bad
            a, scales, zps = pyda8w4.quantize_activation(x, act)
            assert (a[2] == (0 if act == "int8" else 128)).all()
            assert_same_bits(scales[2:3], np.array([np.nan], F32))
            assert zps[2] == (0 if act == "int8" else 128)
            good = [0, 1, 3, 4]
            for got, wanted in zip((a, scales, zps), pyda8w4.quantize_activation(x[good], act), strict=True):
                assert_same_bits(got[good], wanted)


def test_linear_of_a_bad_row_is_one_nan(kernel):
    weight = Weight(33, 37, 16)
    for out in DTYPES.values():
        x = floats(37)[:11].copy()
        x[4, 3], x[9, 36] = np.nan, np.inf
        y = pyda8w4.linear(x, pack(weight), out_dtype=out)
        nan = np.full((2, 33), np.nan, F32).astype(out)
        assert_same_bits(y[[4, 9]], nan)
        good = [0, 1, 2, 3, 5, 6, 7, 8, 10]
        assert_same_bits(y[good], pyda8w4.linear(x[good], pack(weight), out_dtype=out))


@both
def test_negative_zero_is_zero(kernel, act):
    x = np.zeros((3, 19), F32)
    x[0], x[1, ::2] = -0.0, -0.0
    a, scales, zps = pyda8w4.quantize_activation(x, act)
    assert (a == 0).all() and (scales == LEAST_SCALE).all() and (zps == 0).all()


@pytest.mark.pitfall("torchao #4713", "all-zero row")
@both
def test_a_row_of_zeros(kernel, act):
    x = floats(67)[:9].copy()
    x[4] = 0
    a, a_scales, a_zps = pyda8w4.quantize_activation(x, act)
    assert (a[4] == 0).all() and a_scales[4] == LEAST_SCALE and a_zps[4] == 0
    y = pyda8w4.linear(x, pack(Weight(33, 67, 32)), bias_of(33), act=act)
    assert_same_bits(y[4], bias_of(33))


@pytest.mark.pitfall("general", "constant row, scale 0")
@both
@pytest.mark.parametrize("value", [1.0, -1.0, 3.7e-5, -2.5e30])
def test_a_constant_row_is_restored(kernel, act, value):
    x = np.full((2, 67), value, F32)
    a, a_scales, a_zps = pyda8w4.quantize_activation(x, act)
    restored = (a.astype(np.float64) - a_zps[:, None]) * a_scales[:, None]
    np.testing.assert_allclose(restored, x, rtol=1e-6)
    codes = np.full((1, 67), 9, np.uint8)
    np.testing.assert_allclose(pyda8w4.linear(x, prepack(codes), act=act), 67 * F32(value), rtol=1e-6)


@pytest.mark.pitfall("general", "subnormal row, 1 / scale overflows")
@both
def test_a_tiny_row_is_zero(kernel, act):
    x = np.array([[1e-40] * 9, [-1e-40] * 9, [1e-45, -1e-45, *[0] * 7], [2.0**-127] * 9], F32)
    a, a_scales, a_zps = pyda8w4.quantize_activation(x, act)
    assert (a == 0).all() and (a_scales == LEAST_SCALE).all() and (a_zps == 0).all()
    assert_same_bits(pyda8w4.linear(x, prepack(np.full((1, 9), 15, np.uint8))), np.zeros((4, 1), F32))


@pytest.mark.pitfall("general", "max - min overflows to Inf")
def test_a_row_whose_range_exceeds_float32_is_nan(kernel):
    weight = Weight(33, 67, 32)
    most = np.finfo(F32).max
    x = floats(67)[:9].copy()
    x[3, 5], x[3, 6] = most, -most  # each finite, their distance is not
    a, a_scales, a_zps = pyda8w4.quantize_activation(x)
    assert np.isnan(a_scales[3]) and (a[3] == 128).all() and a_zps[3] == 128
    y = pyda8w4.linear(x, pack(weight))
    assert np.isnan(y[3]).all()
    assert_same_bits(np.delete(y, 3, 0), np.delete(expected_linear(weight)[:9], 3, 0))
    # The symmetric range is max |x|, which fits; and so does half the range.
    assert np.isfinite(pyda8w4.quantize_activation(x, act="int8")[1]).all()
    x[3] = np.abs(x[3])
    assert np.isfinite(pyda8w4.quantize_activation(x)[1]).all()


@pytest.mark.pitfall("general", "NaN and Inf policy")
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_in_their_row(kernel, bad):
    weight = Weight(33, 67, 32)
    for rows in (1, 7, 20):
        for act in ("uint8", "int8"):
            for out, dtype in DTYPES.items():
                x = floats(67)[:rows].copy()
                x[rows // 2, 66] = bad
                y = pyda8w4.linear(x, pack(weight), bias_of(33), act=act, out_dtype=dtype)
                expected = expected_linear(weight, act=act, bias=True, out=out)[:rows].copy()
                expected[rows // 2] = {"float32": np.nan, "float16": np.nan, "bfloat16": 0x7FC0}[out]
                assert_same_bits(y, expected, (rows, act, out))


@pytest.mark.pitfall("general", "round half away from zero")
@both
def test_ties_round_to_even(kernel, act):
    # The scale is exactly 1, so that halves are ties.
    values = np.arange(-126.5, 127, 1, dtype=F32)
    row = np.concatenate([values, F32([127, -127] if act == "int8" else [127, -128])])
    a, a_scales, a_zps = pyda8w4.quantize_activation(row[None], act)
    assert a_scales[0] == 1 and a_zps[0] == (0 if act == "int8" else 128)
    np.testing.assert_array_equal(a[0].astype(int) - a_zps[0], np.rint(row))
    assert sorted(set(np.rint(values) % 2)) == [0]


# ---- weights ---------------------------------------------------------------------------------


both_weights = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])


def minmax(w, group, symmetric):
    return pyda8w4.quantize_weight(w, group, method="minmax", zeros="none" if symmetric else "integer")


def assert_weight_like_torchao(w, group, symmetric):
    codes, scales, zps = minmax(w, group, symmetric)
    assert codes.dtype == np.uint8 and scales.dtype == np.float32 and zps.dtype == np.int8
    assert scales.shape == zps.shape == (w.shape[0], -(-w.shape[1] // group))
    for n, row in enumerate(w):
        for g, begin in enumerate(range(0, w.shape[1], group)):
            values = row[begin : begin + group].astype(F32)
            scale, zero_point = choose_qparams(values, 0, 15, symmetric)
            np.testing.assert_array_equal(
                codes[n, begin : begin + group], quantize_block(values, scale, zero_point, 0, 15)
            )
            assert_same_bits(scales[n, g : g + 1], np.array([scale]))
            assert zps[n, g] == zero_point


@both_weights
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("k, group", [(1, 1), (3, 4), (64, 32), (70, 32), (65, 64), (40, 40), (13, 1000)])
def test_weight(symmetric, dtype, k, group):
    assert_weight_like_torchao(floats(k, dtype)[:30], min(group, k), symmetric)
    scales = minmax(floats(k, dtype)[:30], group, symmetric).scales
    assert scales.shape[1] == -(-k // group)


@both_weights
def test_weight_groups_of_one_kind(symmetric):
    w = np.array([np.zeros(8), np.full(8, 3), np.full(8, -3), np.full(8, 1e-40), np.full(8, -0.0)], F32)
    assert_weight_like_torchao(w, 4, symmetric)


@both_weights
def test_powers_of_two_change_no_code_of_a_weight(symmetric):
    w = np.round(floats(70)[:30], 3)
    codes, scales, zps = minmax(w, 32, symmetric)
    for exponent in (*range(-100, 0, 9), *range(1, 100, 9)):
        power = F32(2.0**exponent)
        got = minmax(w * power, 32, symmetric)
        for array, expected in zip(got, (codes, scales * power, zps), strict=True):
            assert_same_bits(array, expected, exponent)


@both_weights
def test_weight_groups_about_the_least_scale(symmetric):
    for exponent in range(-150, -115):
        assert_weight_like_torchao(np.ldexp(floats(8)[:5].astype(np.float64), exponent).astype(F32), 4, symmetric)


@pytest.mark.parametrize("k, group", [(1, 4), (64, 32), (70, 32), (13, 1000)])
def test_minmax_with_offsets(k, group):
    """Both ends of each group are exact, up to the rounding of one step."""
    w = floats(k)[:30]
    weight = pyda8w4.quantize_weight(w, group, method="minmax")
    assert not weight.zps.any() and weight.scales.dtype == weight.offsets.dtype == F32
    for begin in range(0, k, group):
        part = w[:, begin : begin + group]
        s, o = (array[:, begin // group, None] for array in (weight.scales, weight.offsets))
        codes = weight.codes[:, begin : begin + group]
        assert_same_bits(o[:, 0], part.min(1))
        assert_same_bits(s[:, 0], np.maximum((part.max(1) - part.min(1)) / F32(15), LEAST_SCALE))
        np.testing.assert_array_equal(codes, np.clip(np.rint((part - o) * (F32(1) / s)), 0, 15))


@both_weights
def test_weight_ties_round_to_even(symmetric):
    # s is exactly 1: halves are ties.
    w = np.array([[-7.5, 7.5, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5, -3.5]], F32)
    assert_weight_like_torchao(w, 10, symmetric)
    codes, scales, _ = minmax(w, 10, True)
    assert scales[0, 0] == 1
    assert codes.tolist() == [[0, 15, 8, 10, 10, 8, 6, 6, 12, 4]]


@pytest.mark.parametrize("method", ["search", "minmax"])
def test_weight_in_several_pieces(method):
    # Rows are quantized some at a time; the borders must not show.
    w = np.tile(floats(70)[:1], (40000, 1))
    for part in pyda8w4.quantize_weight(w, 32, method=method):
        assert (part == part[0]).all()


# Rows are quantized some at a time, 1024 of this length: pieces that are full, one row short, one row long.
@pytest.mark.parametrize("rows", [3000, 8191, 8192, 8193])
@pytest.mark.parametrize("method", ["search", "minmax"])
def test_every_row_of_a_large_weight_is_quantized(rows, method):
    few = floats(1024)
    order = np.arange(rows) % len(few)
    weights = (pyda8w4.quantize_weight(w, 64, method=method) for w in (few[order], few))
    for got, expected in zip(*weights, strict=True):
        np.testing.assert_array_equal(got, expected[order])


def test_weight_is_not_changed_and_may_be_strided():
    w = floats(64)[:20].copy()
    before = w.copy()
    reversed_codes = pyda8w4.quantize_weight(w[::-1, ::2], 16).codes
    assert_same_bits(w, before)
    assert_same_bits(reversed_codes, pyda8w4.quantize_weight(np.ascontiguousarray(w[::-1, ::2]), 16).codes)


def test_quantized_weight_is_near_its_weight():
    w = floats(128)[:33]
    codes, scales, zps = minmax(w, 32, False)
    restored = (codes.astype(F32) - np.repeat(zps, 32, 1)) * np.repeat(scales, 32, 1)
    assert (np.abs(restored - w) <= np.repeat(scales, 32, 1) * 0.5001).all()


@pytest.mark.pitfall("general", "zero point 0 or 15, negative float zero")
@pytest.mark.parametrize("zp", [0, 15])
def test_weights_of_one_sign_put_the_zero_point_at_an_end(kernel, zp):
    # Weights all of one sign put the zero point at an end of the codes.
    w = np.abs(floats(64)[:33]) + F32(0.1)
    if zp == 15:
        w = -w
    codes, scales, zps = minmax(w, 32, False)
    assert (zps == zp).all()
    a = quantized(64, "int8")[0][:9]
    y = pyda8w4.gemm(a, pyda8w4.prepack(codes, scales, zps))
    assert_same_bits(y, reference.gemm(a, codes, scales, zps, group_size=32))
    restored = (codes.astype(F32) - zps.repeat(32, 1)) * scales.repeat(32, 1)
    assert (np.sign(restored) == np.where(codes == zp, 0, np.sign(w))).all()
