"""Defects that libraries like this one have had, each under a name that can be searched for."""

import json
import os
import struct
import zlib

import ml_dtypes
import numpy as np
import pytest
import safetensors
from cases import (
    DTYPES,
    Weight,
    arrays,
    assert_gemm_exact,
    assert_same_bits,
    assert_same_weight,
    bias_of,
    bits,
    expected_linear,
    floats,
    pack,
    packed_bytes,
    quantized,
)
from guard import (
    DENORMALS_ARE_ZERO,
    FLUSH_TO_ZERO,
    ROUND_DOWN,
    ROUND_UP,
    TRUNCATE,
    float_control,
    get_float_control,
    guarded,
)

import pyda8w4
from pyda8w4 import reference

F32 = np.float32
INT32_MAX = 2**31 - 1


def prepack(codes, zps=None, scales=None, offsets=None, **more):
    codes = np.asarray(codes)
    scales = np.ones(len(codes), F32) if scales is None else np.asarray(scales, F32)
    return pyda8w4.prepack(codes, scales, None if zps is None else np.asarray(zps), offsets, **more)


def int_gemm(a, codes, zp):
    """The exact sums of an int8 product whose scales are 1, rounded to float32 once."""
    return (a.astype(object) @ (codes.astype(object) - zp).T).astype(np.float64).astype(F32)


# ---- seen in the code this library descends from ----------------------------------------------


def test_m_zero(kernel):
    for shape in ((0, 64), (0, 3, 64), (3, 0, 64)):
        y = pyda8w4.linear(np.empty(shape, F32), pack(Weight(33, 64, 32)), bias_of(33))
        assert y.shape == (*shape[:-1], 33) and y.dtype == F32
        assert pyda8w4.gemm(np.empty(shape, np.uint8), pack(Weight(33, 64, 32))).shape == y.shape
        a, a_scales, a_zps = pyda8w4.quantize_activation(np.empty(shape, F32))
        assert a.shape == shape and a_scales.shape == a_zps.shape == shape[:-1]


@pytest.mark.parametrize("rows", [4, 5, 6, 8, 9])
def test_m5_no_amx(kernel, rows):
    assert_gemm_exact(Weight(64, 128, 32), rows)


def test_input_mutation():
    codes, scales, zps = (array.copy() for array in arrays(Weight(33, 64)))
    scales, zps = scales[:, 0], zps[:, 0]
    before = [array.copy() for array in (codes, scales, zps)]
    pyda8w4.prepack(codes, scales, zps)
    for array, was in zip((codes, scales, zps), before, strict=True):
        assert_same_bits(array, was)
    a, a_scales, a_zps = (array[:9].copy() for array in quantized(64, "uint8"))
    pyda8w4.gemm(a, pack(Weight(33, 64)), a_scales, a_zps, bias=bias_of(33))
    for array, was in zip((a, a_scales, a_zps), quantized(64, "uint8"), strict=True):
        assert_same_bits(array, was[:9])
    x = floats(64)[:9].copy()
    pyda8w4.linear(x, pack(Weight(33, 64)))
    assert_same_bits(x, floats(64)[:9])


@pytest.mark.parametrize("zp", [-128, -127, -113, -112, 112, 113, 127])
def test_zp_wrap(kernel, zp):
    codes = np.arange(16, dtype=np.uint8).repeat(8).reshape(2, 64)
    few = np.array([[-128] * 64, [127] * 64, range(-32, 32)], np.int8)
    for a in (few, few.repeat(4, 0)):
        np.testing.assert_array_equal(pyda8w4.gemm(a, prepack(codes, [zp, zp])), int_gemm(a, codes, zp))
        # The same beside another zero point, so that it is stored for each group.
        packed = prepack(codes, [zp, 0])
        np.testing.assert_array_equal(pyda8w4.gemm(a, packed)[:, 0], int_gemm(a, codes[:1], zp)[:, 0])


@pytest.mark.parametrize("dtype, bad", [(np.uint8, 16), (np.uint8, 255), (np.int8, 8), (np.int8, -9), (np.int8, -128)])
def test_codes_out_of_range(dtype, bad):
    # Every place in a quad, a line, a block, a tail.
    n, k = 67, 263
    for row in (0, 15, 16, 31, 32, 63, 64, 66):
        for column in (0, 1, 2, 3, 4, 255, 256, 259, 260, 262):
            codes = np.zeros((n, k), dtype)
            codes[row, column] = bad
            with pytest.raises(ValueError, match="w_int4"):
                prepack(codes)


def test_pack_portability(kernel, threads):
    weights = [Weight(1, 1), Weight(33, 70, 32), Weight(65, 600, 100, "bfloat16"), Weight(97, 2050, None, "float16", 3)]
    for weight in [*weights, Weight(97, 2050, 64, offsets=True)]:
        for count in (1, 3):
            pyda8w4.set_num_threads(count)
            packed = pyda8w4.prepack(*arrays(weight), group_size=weight.group_size)
            assert_same_weight(packed, pack(weight))


def test_pack_portability_of_the_documented_bytes():
    # Byte 4 * n + j of line q: w[n, 4q + j] in the low nibble, w[n + 16, 4q + j] in the high one.
    weight = Weight(40, 10, 4)
    codes, scales, zps = arrays(weight)
    padded = np.zeros((64, 12), np.uint8)
    padded[:40, :10] = codes
    lines = pack(weight)._arrays["codes"]
    assert lines.shape == (2, 3, 64)
    for block in range(2):
        for quad in range(3):
            part = padded[32 * block : 32 * block + 32, 4 * quad : 4 * quad + 4]
            np.testing.assert_array_equal(lines[block, quad], (part[:16] | part[16:] << 4).reshape(-1))
    for name, source in (("scales", scales), ("zps", zps)):
        stored = np.zeros((64, 3), source.dtype)
        stored[:40] = source
        np.testing.assert_array_equal(pack(weight)._arrays[name], stored.reshape(2, 32, 3).transpose(0, 2, 1))


# ---- arithmetic --------------------------------------------------------------------------------


@pytest.mark.parametrize("zp", [0, 8, 15, -128, 127])
def test_maddubs_saturation(kernel, zp):
    for k in (2, 4, 32, 33, 64, 256, 300):
        codes = np.full((33, k), 15, np.uint8)
        for act, value in (("uint8", 0), ("uint8", 255), ("int8", -128), ("int8", 127)):
            for rows in (1, 20):
                a = np.full((rows, k), value, act)
                y = pyda8w4.gemm(a, prepack(codes, np.full(33, zp)))
                assert (y == k * value * (15 - zp)).all()


def test_dpbusd_not_dpbusds(kernel):
    # The difference fits int32, but neither sum a * code (-128 * 15 * k) nor sum (a + 128) * (code - zp)
    # does: a kernel that forms one of them must take parts in turn or wrap, and may never clamp.
    k = 2**21 - 1
    assert 128 * 15 * k > INT32_MAX
    codes = np.full((1, k), 15, np.uint8)
    packed = prepack(codes, [7])
    for rows, value in ((2, -128), (2, 127), (9, 127)):
        a = np.full((rows, k), value, np.int8)
        assert (pyda8w4.gemm(a, packed) == F32(value * 8 * k)).all()


@pytest.mark.parametrize("zp, most", [(8, 8), (0, 15), (127, 127), (-128, 143)])
def test_int32_limit(kernel, zp, most):
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


def test_float_exactness(kernel):
    rng = np.random.default_rng(1)
    k = 20001
    codes = rng.integers(12, 16, (33, k), np.uint8)
    a = rng.integers(100, 128, (9, k), np.int8)
    exact = a.astype(np.int64) @ codes.T.astype(np.int64)
    assert (exact > 2**24).all() and (exact % 2).any()
    packed = prepack(codes, np.zeros(33, np.int8))
    np.testing.assert_array_equal(pyda8w4.gemm(a, packed), exact.astype(F32))


def test_float_exactness_of_offsets(kernel):
    # Sums of activations that float32 cannot hold are rounded once, at the end of a group of many chunks.
    rng = np.random.default_rng(1)
    k = 200001
    a = rng.integers(100, 128, (30, k), np.int8)
    exact = a.astype(np.int64).sum(axis=1)
    assert (exact > 2**24).all() and (exact % 2).any()
    packed = prepack(np.full((33, k), 3, np.uint8), np.full(33, 3, np.int8), offsets=np.ones(33, F32))
    for rows in (1, 9, 30):
        np.testing.assert_array_equal(pyda8w4.gemm(a[:rows], packed), exact[:rows, None].astype(F32).repeat(33, 1))


def test_q4_1_minima(kernel):
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


def test_sign_trick_minus128(kernel):
    # abs(-128) is no int8, nor is -(-128): in activations, in zero points, in code - zp.
    k = 40
    for zp in (-128, 127, 120, 0):
        codes = np.tile(np.arange(16, dtype=np.uint8), (33, k))[:, :k]
        a = np.full((3, k), -128, np.int8)
        a[1, ::2], a[2, 1::2] = 127, 0
        packed = prepack(codes, np.full(33, zp))
        np.testing.assert_array_equal(pyda8w4.gemm(a, packed), int_gemm(a, codes, zp))


def both(test):
    return pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])(test)


@both
def test_all_zero_row(kernel, symmetric):
    x = floats(67)[:9].copy()
    x[4] = 0
    a, a_scales, a_zps = pyda8w4.quantize_activation(x, symmetric)
    assert (a[4] == 0).all() and a_scales[4] == 2.0**-23 and a_zps[4] == 0
    y = pyda8w4.linear(x, pack(Weight(33, 67, 32)), bias_of(33), symmetric=symmetric)
    assert_same_bits(y[4], bias_of(33))


@both
@pytest.mark.parametrize("value", [1.0, -1.0, 3.7e-5, -2.5e30])
def test_constant_row(kernel, symmetric, value):
    x = np.full((2, 67), value, F32)
    a, a_scales, a_zps = pyda8w4.quantize_activation(x, symmetric)
    restored = (a.astype(np.float64) - a_zps[:, None]) * a_scales[:, None]
    np.testing.assert_allclose(restored, x, rtol=1e-6)
    codes = np.full((1, 67), 9, np.uint8)
    np.testing.assert_allclose(pyda8w4.linear(x, prepack(codes), symmetric=symmetric), 67 * F32(value), rtol=1e-6)


@both
def test_tiny_row(kernel, symmetric):
    x = np.array([[1e-40] * 9, [-1e-40] * 9, [1e-45, -1e-45, *[0] * 7], [2.0**-24] * 9], F32)
    a, a_scales, a_zps = pyda8w4.quantize_activation(x, symmetric)
    assert (a == 0).all() and (a_scales == 2.0**-23).all() and (a_zps == 0).all()
    assert_same_bits(pyda8w4.linear(x, prepack(np.full((1, 9), 15, np.uint8))), np.zeros((4, 1), F32))


def test_huge_row(kernel):
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
    assert np.isfinite(pyda8w4.quantize_activation(x, symmetric=True)[1]).all()
    x[3] = np.abs(x[3])
    assert np.isfinite(pyda8w4.quantize_activation(x)[1]).all()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_nan_inf_policy(kernel, bad):
    weight = Weight(33, 67, 32)
    for rows in (1, 7, 20):
        for symmetric in (False, True):
            for out, dtype in DTYPES.items():
                x = floats(67)[:rows].copy()
                x[rows // 2, 66] = bad
                y = pyda8w4.linear(x, pack(weight), bias_of(33), symmetric=symmetric, out_dtype=dtype)
                expected = expected_linear(weight, symmetric=symmetric, bias=True, out=out)[:rows].copy()
                expected[rows // 2] = {"float32": np.nan, "float16": np.nan, "bfloat16": 0x7FC0}[out]
                assert_same_bits(y, expected, (rows, symmetric, out))


def test_nan_inf_policy_of_scales_and_bias(kernel):
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


def test_subnormal_scale(kernel, threads):
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
def test_subnormal_scale_is_not_the_only_float_control(kernel, direction):
    # Rounding modes of the calling thread do not matter either.
    weight = Weight(33, 67, 32)
    x = floats(67)[:20]
    results = {}
    for out, dtype in DTYPES.items():
        with float_control(direction):
            results[out] = pyda8w4.linear(x, pack(weight), bias_of(33), out_dtype=dtype)
    for out, y in results.items():
        assert_same_bits(y, expected_linear(weight, bias=True, out=out)[:20])


def test_subnormal_scale_leaves_no_exception_flags(kernel):
    with float_control(0):
        before = get_float_control()
        pyda8w4.linear(floats(67)[:20], pack(Weight(33, 67, 32)))
        assert get_float_control() == before


@both
def test_round_half_even(kernel, symmetric):
    # The scale is exactly 1, so that halves are ties.
    values = np.arange(-126.5, 127, 1, dtype=F32)
    row = np.concatenate([values, F32([127, -127] if symmetric else [127, -128])])
    a, a_scales, a_zps = pyda8w4.quantize_activation(row[None], symmetric)
    assert a_scales[0] == 1 and a_zps[0] == (0 if symmetric else 128)
    np.testing.assert_array_equal(a[0].astype(int) - a_zps[0], np.rint(row))
    assert sorted(set(np.rint(values) % 2)) == [0]


@pytest.mark.parametrize("zp", [0, 15])
def test_zp_0_15_negative_float(kernel, zp):
    # Weights all of one sign put the zero point at an end of the codes.
    w = np.abs(floats(64)[:33]) + F32(0.1)
    if zp == 15:
        w = -w
    codes, scales, zps = pyda8w4.quantize_weight(w, 32)
    assert (zps == zp).all()
    a = quantized(64, "int8")[0][:9]
    y = pyda8w4.gemm(a, pyda8w4.prepack(codes, scales, zps))
    assert_same_bits(y, reference.gemm(a, codes, scales, zps, group_size=32))
    restored = (codes.astype(F32) - zps.repeat(32, 1)) * scales.repeat(32, 1)
    assert (np.sign(restored) == np.where(codes == zp, 0, np.sign(w))).all()


def test_zp_minus_one_wrap(kernel):
    # -1 is -1, not 15: beside 0 (stored for each group), alone, and in any integer type.
    codes = np.zeros((2, 8), np.uint8)
    a = np.ones((1, 8), np.int8)
    for dtype in (np.int8, np.int16, np.int64):
        assert pyda8w4.gemm(a, prepack(codes, np.array([-1, 0], dtype))).tolist() == [[8, 0]]
        assert pyda8w4.gemm(a, prepack(codes, np.array([-1, -1], dtype))).tolist() == [[8, 8]]
    assert pyda8w4.gemm(a, prepack(codes, np.array([16, 0], np.uint8))).tolist() == [[-128, 0]]


def test_nibble_order(kernel):
    two = np.array([[0x21, 0x43]], np.uint8)
    a = np.array([[1, 10, 100, 0]], np.int8)
    assert pyda8w4.gemm(a, prepack(two, [0], nibbles="low_first")).tolist() == [[321]]
    assert pyda8w4.gemm(a, prepack(two, [0], nibbles="high_first")).tolist() == [[412]]


def product_of(values):
    """Calls that give these float32 outputs: the bias is the output where everything else is 0."""
    values = np.asarray(values, F32)
    packed = prepack(np.full((len(values), 4), 8, np.uint8))

    def call(dtype):
        return pyda8w4.gemm(np.zeros((1, 4), np.int8), packed, bias=values, out_dtype=dtype)[0]

    return call


def test_f16_output_overflow(kernel):
    call = product_of([65504, 65519.996, 65520, 70000, 1e38, -65519.996, -65520, -3e38, np.inf, -np.inf])
    expected = np.array([65504, 65504, *[np.inf] * 3, -65504, *[-np.inf] * 2, np.inf, -np.inf], np.float16)
    assert_same_bits(call(np.float16), expected)


def test_f16_output_of_every_rounding_case(kernel):
    halves = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(F32)
    ties = (halves[:-1] + halves[1:]) / 2
    values = np.concatenate([halves, ties, np.nextafter(ties, F32(0)), np.nextafter(ties, F32(np.inf))])
    for sign in (1, -1):
        assert_same_bits(product_of(sign * values)(np.float16), (sign * values).astype(np.float16))


def test_bf16_rne_nan(kernel):
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


# ---- shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 5, 7, 9, 33, 99, 255, 257, 511, 513])
def test_odd_k(kernel, k):
    for rows in (1, 10):
        assert_gemm_exact(Weight(34, k), rows)
        assert_gemm_exact(Weight(34, k, 4), rows)


@pytest.mark.parametrize("k", [4, 8, 12, 20, 36, 100, 252, 260])
def test_k_mod_4(kernel, k):
    for rows in (1, 10):
        assert_gemm_exact(Weight(34, k), rows)
        assert_gemm_exact(Weight(34, k, 4), rows)


@pytest.mark.parametrize("k", [64, 128, 192, 256, 512, 576])
def test_k_mod_64(kernel, k):
    for rows in (1, 10):
        assert_gemm_exact(Weight(34, k), rows)
        assert_gemm_exact(Weight(34, k, 64), rows)


@pytest.mark.parametrize("n", [1, 31, 33])
def test_n_1_31_33(kernel, n):
    for rows in (1, 10, 64):
        assert_gemm_exact(Weight(n, 128, 32), rows, bias=True)
        assert_gemm_exact(Weight(n, 128, 32), rows, bias=True, out="bfloat16")


@pytest.mark.parametrize("group", [132, 160, 192, 384, 1024])
def test_group_gt_128(kernel, group):
    for rows in (1, 10):
        assert_gemm_exact(Weight(34, 2 * group, group), rows)


def test_group_512(kernel):
    for rows in (1, 10):
        assert_gemm_exact(Weight(34, 1024, 512), rows)


@pytest.mark.parametrize("k", [4, 64, 100, 300, 600])
def test_group_eq_k(kernel, k):
    codes, scales, zps = arrays(Weight(34, k))
    assert_same_weight(
        pyda8w4.prepack(codes, scales[:, 0], zps[:, 0]), pyda8w4.prepack(codes, scales, zps, group_size=k)
    )
    for rows in (1, 10):
        assert_gemm_exact(Weight(34, k), rows)


@pytest.mark.parametrize("k, group", [(100, 32), (65, 64), (67, 64), (513, 512), (1100, 512), (130, 128), (300, 256)])
def test_last_group_partial(kernel, k, group):
    for rows in (1, 10):
        assert_gemm_exact(Weight(34, k, group), rows)


@pytest.mark.skipif("PYDA8W4_LARGE_TESTS" not in os.environ, reason="needs 2 GiB: set PYDA8W4_LARGE_TESTS")
def test_nk_over_2_31():
    n, k = 2**15 + 33, 2**16
    codes = np.zeros((n, k), np.uint8)  # pages that are not written take no memory
    codes[-1], codes[0, -1] = 15, 3
    packed = pyda8w4.prepack(codes, np.ones(n, F32), np.zeros(n, np.int8))
    y = pyda8w4.gemm(np.ones((1, k), np.int8), packed)
    assert y[0, 0] == 3 and y[0, -1] == 15 * k and np.count_nonzero(y) == 2


# ---- memory ------------------------------------------------------------------------------------


def operands(weight, rows=9):
    a, a_scales, a_zps = (array[:rows] for array in quantized(weight.k, "uint8"))
    return {"a": a, "a_scales": a_scales, "a_zps": a_zps, "bias": bias_of(weight.n)}


def check_variants(variant):
    """Both products give the same bits when every operand is replaced by variant(operand)."""
    weight = Weight(33, 67, 32, zps="extreme")
    expected = pyda8w4.gemm(packed=pack(weight), **operands(weight))
    changed = {name: variant(array) for name, array in operands(weight).items()}
    for name, array in changed.items():
        np.testing.assert_array_equal(array, operands(weight)[name])
    assert_same_bits(pyda8w4.gemm(packed=pack(weight), **changed), expected)

    codes, scales, zps = (variant(array) for array in arrays(weight))
    packed = pyda8w4.prepack(codes, scales, zps, group_size=32)
    assert_same_weight(packed, pack(weight))

    for dtype in DTYPES:
        x = floats(67, dtype)[:9]
        assert_same_bits(pyda8w4.linear(variant(x), packed), pyda8w4.linear(x, packed))
        for got, wanted in zip(pyda8w4.quantize_activation(variant(x)), pyda8w4.quantize_activation(x), strict=True):
            assert_same_bits(got, wanted)
        w = floats(67, dtype)[:9]
        for got, wanted in zip(pyda8w4.quantize_weight(variant(w), 32), pyda8w4.quantize_weight(w, 32), strict=True):
            assert_same_bits(got, wanted)


def every_other(array):
    wide = np.full(tuple(2 * size for size in array.shape), 1, array.dtype)
    part = wide[tuple(slice(None, None, 2) for _ in array.shape)]
    part[...] = array
    return part


def reversed_memory(array):
    every = tuple(slice(None, None, -1) for _ in array.shape)
    return np.ascontiguousarray(array[every])[every]


def rows_apart(array):
    wide = np.ones((*array.shape[:-1], array.shape[-1] + 5), array.dtype)
    wide[..., :-5] = array
    return wide[..., :-5]


@pytest.mark.parametrize("variant", [every_other, reversed_memory, rows_apart, np.asfortranarray])
def test_noncontiguous(kernel, variant):
    check_variants(variant)


@pytest.mark.parametrize("offset", [1, 3])
def test_misaligned(kernel, offset):
    def shift(array):
        memory = bytes(offset) + array.tobytes()
        return np.frombuffer(memory, np.uint8)[offset:].view(array.dtype).reshape(array.shape)

    check_variants(shift)
    weight = Weight(33, 67, 32, zps="extreme")
    expected = pyda8w4.gemm(packed=pack(weight), **operands(weight))
    out = np.frombuffer(bytearray(offset + expected.nbytes), np.uint8)[offset:].view(F32).reshape(expected.shape)
    with pytest.raises(ValueError, match="out must be aligned to its 4 bytes"):
        pyda8w4.gemm(packed=pack(weight), **operands(weight), out=out)


def test_readonly(kernel):
    def locked(array):
        array = array.copy()
        array.flags.writeable = False
        return array

    check_variants(locked)
    check_variants(lambda array: np.frombuffer(array.tobytes(), np.uint8).view(array.dtype).reshape(array.shape))


def test_broadcast_strides(kernel):
    packed = pack(Weight(33, 67, 32))
    row = floats(67)[:1]
    assert_same_bits(
        pyda8w4.linear(np.broadcast_to(row, (9, 67)), packed), np.tile(pyda8w4.linear(row, packed), (9, 1))
    )
    same = np.broadcast_to(F32(0.5), (9, 67))
    assert_same_bits(pyda8w4.linear(same, packed), pyda8w4.linear(same.copy(), packed))
    a = quantized(67, "int8")[0][:9]
    half, one, zero = np.broadcast_to(F32(0.5), 9), np.broadcast_to(np.int32(1), 9), np.broadcast_to(F32(0), 33)
    assert_same_bits(
        pyda8w4.gemm(a, packed, half, one, bias=zero),
        pyda8w4.gemm(a, packed, half.copy(), one.copy(), bias=zero.copy()),
    )
    codes = np.broadcast_to(np.arange(64, dtype=np.uint8) % 16, (33, 64))
    scales, zps = np.broadcast_to(F32(0.3), (33, 2)), np.broadcast_to(np.int8(3), (33, 2))
    assert_same_weight(pyda8w4.prepack(codes, scales, zps), pyda8w4.prepack(codes.copy(), scales.copy(), zps.copy()))


def test_broadcast_strides_of_a_single_row(kernel):
    # numpy gives a dimension of length 1 any stride and still calls the array contiguous.
    codes = np.arange(8, dtype=np.uint8)
    scale = np.ones(1, F32)
    expected = pyda8w4.prepack(codes[None].copy(), scale)
    for stride in (0, 1, 8, 1000, -8):
        one = np.lib.stride_tricks.as_strided(codes, (1, 8), (stride, 1))
        assert_same_weight(pyda8w4.prepack(one, scale), expected)
        assert_same_weight(pyda8w4.prepack(np.broadcast_to(codes, (1, 8)), np.broadcast_to(scale, (1, 1))), expected)
    x = np.arange(8, dtype=F32)
    for stride in (0, 4, 1000, -32):
        one = np.lib.stride_tricks.as_strided(x, (1, 8), (stride, 4))
        assert_same_bits(pyda8w4.linear(one, expected), pyda8w4.linear(x, expected)[None])
        out = np.full(1, 7, F32)
        pyda8w4.linear(one, expected, out=np.lib.stride_tricks.as_strided(out, (1, 1), (stride, stride)))
        assert_same_bits(out, pyda8w4.linear(x, expected))


def test_out_alias(kernel):
    k = n = 32
    packed = pack(Weight(n, k, 16))
    memory = floats(k)[:9].copy()
    before = memory.copy()
    for x, out in ((memory, memory), (memory[1:], memory[:-1]), (memory[:5], memory[4:])):
        with pytest.raises(ValueError, match="out must not overlap"):
            pyda8w4.linear(x, packed, out=out)
    a, a_scales, a_zps = (array[:9].copy() for array in quantized(k, "uint8"))
    # An activation, 9 scales or 9 zero points that lie inside out.
    for name, array in {"a": a, "a_scales": a_scales, "a_zps": a_zps}.items():
        out = np.zeros((9, n), F32)
        inside = out.reshape(-1).view(array.dtype)[: array.size].reshape(array.shape)
        with pytest.raises(ValueError, match="out must not overlap"):
            pyda8w4.gemm(packed=packed, **{"a": a, "a_scales": a_scales, "a_zps": a_zps, name: inside}, out=out)
    bias = np.zeros(n, F32)
    with pytest.raises(ValueError, match="out must not overlap"):
        pyda8w4.linear(before[:1], packed, bias, out=bias[None])
    assert_same_bits(memory, before)
    # Neighbours are no overlap.
    pyda8w4.linear(memory[:4], packed, out=memory[4:8])
    assert_same_bits(memory[4:8], pyda8w4.linear(before[:4], packed))


def test_out_alias_of_the_weight_itself():
    memory = np.zeros(64, F32)
    arrays_of = {name: array.copy() for name, array in pack(Weight(32, 16, 16))._arrays.items()}
    arrays_of["sums"] = memory[:32].reshape(1, 32)
    packed = pyda8w4.PackedWeight._from_arrays(pack(Weight(32, 16, 16))._format, arrays_of)
    with pytest.raises(ValueError, match="out must not overlap"):
        pyda8w4.linear(np.zeros((1, 16), F32), packed, out=memory[None, :32])
    pyda8w4.linear(np.zeros((1, 16), F32), packed, out=memory[None, 32:])


def test_padding_deterministic():
    weights = [Weight(1, 1), Weight(33, 67, 32), Weight(40, 5, 4, "float16", 3), Weight(31, 513, 512, "bfloat16")]
    for weight in [*weights, Weight(33, 67, 32, offsets=True)]:
        first = packed_bytes(pack(weight))
        for change in (np.copy, every_other, np.asfortranarray):
            # Memory that was used before must not show through.
            dirty = [np.full(array.nbytes, 0xAB, np.uint8) for array in pack(weight)._arrays.values()]
            del dirty
            packed = pyda8w4.prepack(*map(change, arrays(weight)), group_size=weight.group_size)
            assert packed_bytes(packed) == first


def test_padding_deterministic_is_zero():
    packed = pack(Weight(33, 67, 32, offsets=True))
    codes, scales, sums, zps, offsets = (packed._arrays[name] for name in ("codes", "scales", "sums", "zps", "offsets"))
    # Of the second block only column 0 is real: byte 0..3 of each line, low nibble; the last line has 3 of 4 k.
    assert not codes[1, :, 4:].any() and not (codes[1] >> 4).any() and not codes[:, -1, 3::4].any()
    for array in (scales[1, :, 1:], sums[1, 1:], zps[1, :, 1:], offsets[1, :, 1:]):
        assert not array.any()


def test_padding_deterministic_whatever_it_holds(kernel):
    # Codes beyond k meet activations that are 0, not what an earlier call left in the workspace.
    weight = Weight(33, 65)
    packed = pack(weight)
    parts = {name: array.copy() for name, array in packed._arrays.items()}
    parts["codes"][:, -1, 1::4] = parts["codes"][:, -1, 2::4] = parts["codes"][:, -1, 3::4] = 0xFF
    dirty = pyda8w4.PackedWeight._from_arrays(packed._format, parts)
    for rows in (1, 6, 20):
        pyda8w4.gemm(np.full((rows, 190), -1, np.int8), pack(Weight(33, 190)))
        assert_same_bits(pyda8w4.linear(floats(65)[:rows], dirty), pyda8w4.linear(floats(65)[:rows], packed))


# ---- files -------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.safetensors"
    pyda8w4.save(path, {"a": pack(Weight(33, 70, 32)), "b": pack(Weight(65, 64, 16, "bfloat16", 3, True))})
    return path


def parts_of(file):
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(file, header, data):
    """With the checksum of the description made right, so that what lies behind it is reached."""
    metadata = header["__metadata__"]
    metadata["weights_crc32"] = str(zlib.crc32(metadata["weights"].encode()))
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_corrupt_file_is_only_so_by_what_the_tests_change(file):
    write(file, *parts_of(file))
    weights = pyda8w4.load(file)
    assert_same_weight(weights["a"], pack(Weight(33, 70, 32)))
    assert_same_weight(weights["b"], pack(Weight(65, 64, 16, "bfloat16", 3, True)))


@pytest.mark.parametrize("pad", [1, 2, 4])
def test_file_with_misaligned_tensors(file, pad):
    header, data = parts_of(file)
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [pad + offset for offset in entry["data_offsets"]]
    header["pad"] = {"dtype": "U8", "shape": [pad], "data_offsets": [0, pad]}
    write(file, header, bytes(pad) + data)
    weights = pyda8w4.load(file)
    assert_same_weight(weights["a"], pack(Weight(33, 70, 32)))
    assert_same_weight(weights["b"], pack(Weight(65, 64, 16, "bfloat16", 3, True)))
    assert all(array.flags.aligned for packed in weights.values() for array in packed._arrays.values())


def test_corrupt_file_truncated(file):
    whole = file.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, 500, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="safetensors"):
            pyda8w4.load(file)
    file.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="safetensors"):
        pyda8w4.load(file)


@pytest.mark.parametrize(
    "content", [b"text", b"\x00" * 64, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]"]
)
def test_corrupt_file_that_is_something_else(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="file"):
        pyda8w4.load(path)


@pytest.mark.parametrize(
    "metadata",
    [{"layout_version": "2"}, {"layout_version": "0"}, {"layout_version": ""}, {"layout": "da8w4-n64k4"}],
    ids=str,
)
def test_corrupt_file_wrong_version(file, metadata):
    header, data = parts_of(file)
    header["__metadata__"].update(metadata)
    write(file, header, data)
    with pytest.raises(ValueError, match=f"must hold layout .*{next(iter(metadata.values()))}"):
        pyda8w4.load(file)
    for name in ("layout", "layout_version"):
        header["__metadata__"].pop(name)
        write(file, header, data)
        with pytest.raises(ValueError, match="must hold layout"):
            pyda8w4.load(file)


@pytest.mark.parametrize("name", ["a.codes", "a.scales", "a.sums", "a.zps", "b.codes", "b.offsets"])
def test_corrupt_file_missing_tensor(file, name):
    header, data = parts_of(file)
    header[name + ".elsewhere"] = header.pop(name)
    write(file, header, data)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        pyda8w4.load(file)


def test_corrupt_file_wrong_tensor(file):
    header, data = parts_of(file)
    for name, change in [
        ("a.codes", {"dtype": "I8"}),
        ("a.scales", {"dtype": "I32"}),
        ("a.scales", {"dtype": "U32"}),
        ("a.zps", {"dtype": "U8"}),
        ("a.codes", {"shape": [2, 64, 18]}),
        ("a.codes", {"shape": [2 * 18 * 64]}),
        ("a.sums", {"shape": [64, 1]}),
        ("b.scales", {"dtype": "I16"}),
        ("b.offsets", {"dtype": "F16"}),
        ("b.offsets", {"shape": [3, 32, 4]}),
    ]:
        write(file, {**header, name: {**header[name], **change}}, data)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            pyda8w4.load(file)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [33]},
        {"shape": [33, 70, 1]},
        {"shape": None},
        {"shape": "33"},
        {"shape": [0, 70]},
        {"shape": [-33, 70]},
        {"shape": [33.0, 70]},
        {"shape": [True, 70]},
        {"shape": [65, 70]},
        {"shape": [33, 73]},
        {"shape": [2**70, 70]},
        {"shape": [33, 2**70]},
        {"group_size": 0},
        {"group_size": -32},
        {"group_size": 33},
        {"group_size": 36.0},
        {"group_size": 16},
        {"group_size": 72},
        {"group_size": 2**70},
        {"group_size": None},
        {"zero_point": 128},
        {"zero_point": -129},
        {"zero_point": 2**70},
        {"zero_point": "8"},
        {"zero_point": 8.0},
        {"zero_point": False},
        {"offsets": True},
        {"offsets": 0},
        {"offsets": None},
    ],
    ids=str,
)  # fmt: skip
def test_corrupt_file_hostile_metadata(file, change):
    header, data = parts_of(file)
    weights = json.loads(header["__metadata__"]["weights"])
    weights["a"].update(change)
    header["__metadata__"]["weights"] = json.dumps(weights)
    write(file, header, data)
    with pytest.raises(ValueError):
        pyda8w4.load(file)


def test_corrupt_file_whose_sums_could_leave_int32(tmp_path):
    file = tmp_path / "long.safetensors"
    k = 2**20
    packed = pyda8w4.prepack(np.zeros((1, k), np.uint8), np.ones(1, np.float32))
    pyda8w4.save(file, {"a": packed})
    pyda8w4.load(file)
    header, data = parts_of(file)
    weights = json.loads(header["__metadata__"]["weights"])
    weights["a"]["zero_point"] = 16
    header["__metadata__"]["weights"] = json.dumps(weights)
    write(file, header, data)
    with pytest.raises(ValueError, match="group_size"):
        pyda8w4.load(file)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", '"a"', '{"a": 3}', '{"a": []}', '{"a": {}}', "[" * 100000, "{"]
)
def test_corrupt_file_hostile_list_of_weights(file, text):
    header, data = parts_of(file)
    header["__metadata__"]["weights"] = text
    write(file, header, data)
    with pytest.raises(ValueError):
        pyda8w4.load(file)


@pytest.mark.parametrize(
    "name", ["a.codes", "a.scales", "a.sums", "a.zps", "b.codes", "b.scales", "b.sums", "b.offsets"]
)
def test_corrupt_file_with_a_flipped_bit(file, name):
    header, data = parts_of(file)
    begin, end = header[name]["data_offsets"]
    for at in (begin, (begin + end) // 2, end - 1):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        write(file, header, bytes(changed))
        with pytest.raises(ValueError, match=rf"{name} is damaged".replace(".", r"\.")):
            pyda8w4.load(file)
        assert set(pyda8w4.load(file, verify=False)) == {"a", "b"}


@pytest.mark.parametrize("old, new", [('"zero_point": 3', '"zero_point": 4'), ("[65, 64]", "[66, 64]"), ("33", "34")])
def test_corrupt_file_with_another_description(file, old, new):
    whole = file.read_bytes()
    old, new = (text.replace('"', r"\"").encode() for text in (old, new))
    assert old in whole
    file.write_bytes(whole.replace(old, new, 1))
    with pytest.raises(ValueError, match="its list of weights does not have its checksum"):
        pyda8w4.load(file)
    pyda8w4.load(file, verify=False)


def test_corrupt_file_with_another_type_of_scales(tmp_path):
    file = tmp_path / "weights.safetensors"
    pyda8w4.save(file, {"a": pack(Weight(33, 70, 32, "float16"))})
    header, data = parts_of(file)
    header["a.scales"]["dtype"] = "BF16"
    write(file, header, data)
    with pytest.raises(ValueError, match=r"a\.scales is damaged"):
        pyda8w4.load(file)


@pytest.mark.parametrize("crc32", [None, 0, [], "codes", {}, {"codes": "1"}], ids=str)
def test_corrupt_file_without_checksums(file, crc32):
    header, data = parts_of(file)
    weights = json.loads(header["__metadata__"]["weights"])
    weights["a"]["crc32"] = crc32
    header["__metadata__"]["weights"] = json.dumps(weights)
    write(file, header, data)
    with pytest.raises(ValueError, match="damaged"):
        pyda8w4.load(file)
    assert_same_weight(pyda8w4.load(file, verify=False)["a"], pack(Weight(33, 70, 32)))


def test_a_file_that_is_replaced_while_it_is_loaded(file, monkeypatch):
    # What is mapped is the file whose header was read.
    def replace_then_open(*arguments, **more):
        pyda8w4.save(file, {"c": pack(Weight(1, 1))})
        return safe_open(*arguments, **more)

    safe_open = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", replace_then_open)
    assert_same_weight(pyda8w4.load(file)["a"], pack(Weight(33, 70, 32)))


def test_corrupt_file_of_random_changes(file):
    # Any byte may be wrong: the file is refused, or what it gives can be used without a crash.
    whole = file.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(600):
        changed = bytearray(whole)
        for place in rng.integers(0, length, rng.integers(1, 3)):
            changed[place] = int(rng.choice([*b'0123456789{}[]",:-e', rng.integers(0, 256)]))
        file.write_bytes(changed)
        try:
            weights = pyda8w4.load(file, verify=False)
        except ValueError:
            refused += 1
            continue
        for weight in weights.values():
            weight.unpack()
            pyda8w4.linear(np.zeros((1, weight.shape[1]), F32), weight)
    assert 100 < refused < 600


# ---- guard pages -------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize(
    "weight",
    [
        Weight(1, 1),
        Weight(3, 5, 4, "float16"),
        Weight(31, 63, 32, zps=8),
        Weight(32, 64, 64, "bfloat16"),
        Weight(33, 67, 32, "float16"),
        Weight(65, 513, 256, zps="extreme"),
        Weight(47, 600),
        Weight(16, 131, 128),
        Weight(33, 67, 32, "float16", offsets=True),
        Weight(3, 600, offsets=True),
        Weight(31, 64, 32, "bfloat16", 0, offsets=True),
    ],
    ids=str,
)
def test_guard_page(kernel, side, weight):
    """No kernel reads or writes a byte beside its operands: the pages there kill the process."""
    packed = pack(weight)
    parts = {name: guarded(array, side) for name, array in packed._arrays.items()}
    guarded_weight = pyda8w4.PackedWeight._from_arrays(packed._format, parts)
    bias = guarded(bias_of(weight.n), side)
    for rows in (1, 2, 5, 6, 8, 9, 13):
        for act in ("uint8", "int8"):
            a, a_scales, a_zps = (guarded(array[:rows], side) for array in quantized(weight.k, act))
            for out, dtype in DTYPES.items():
                y = guarded(np.zeros((rows, weight.n), dtype), side)
                pyda8w4.gemm(a, guarded_weight, a_scales, a_zps, bias=bias, out=y)
                if (rows, act) == (9, "uint8"):
                    assert_gemm_exact(weight, rows, act, bias=True, out=out)
                    assert_same_bits(y, pyda8w4.gemm(a, packed, a_scales, a_zps, bias=bias, out_dtype=dtype))
        for dtype in DTYPES:
            x = guarded(floats(weight.k, dtype)[:rows], side)
            y = guarded(np.zeros((rows, weight.n), F32), side)
            pyda8w4.linear(x, guarded_weight, out=y)
            assert_same_bits(y, pyda8w4.linear(x, packed, out_dtype=F32))
            pyda8w4.quantize_activation(x)
            pyda8w4.quantize_activation(x, symmetric=True)
    codes, *rest = (guarded(array, side) for array in arrays(weight))
    assert_same_weight(pyda8w4.prepack(codes, *rest, group_size=weight.group_size), packed)
    assert guarded_weight.unpack()[0].shape == packed.shape
    if weight.k % 2 == 0:
        two = guarded(codes[:, ::2] | codes[:, 1::2] << 4, side)
        again = pyda8w4.prepack(two, *rest, group_size=weight.group_size, nibbles="low_first")
        assert_same_weight(again, packed)


def test_guard_page_canaries(kernel):
    """Nothing is written beside `out`, even inside its page."""
    for n in (1, 31, 33, 47):
        for dtype in DTYPES.values():
            memory = np.full(2000 + 9 * n, 77, dtype)
            out = memory[1000 : 1000 + 9 * n].reshape(9, n)
            pyda8w4.linear(floats(40)[:9], pack(Weight(n, 40, 20)), out=out)
            assert (memory[:1000] == 77).all() and (memory[1000 + 9 * n :] == 77).all()
