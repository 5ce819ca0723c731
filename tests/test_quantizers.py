"""Both quantizers against torchao's choose_qparams_affine and quantize_affine, written out here."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from cases import DTYPES, Weight, assert_same_bits, floats, pack
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pyda8w4
from pyda8w4 import reference

F32 = np.float32
EPS = np.finfo(F32).eps


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
    scale = max(scale, EPS)
    if zero_point is None:
        zero_point = low - int(np.rint(least / scale))
        zero_point = min(max(zero_point, low), high)
    return F32(scale), zero_point


def quantize_block(values, scale, zero_point, low, high):
    inverse = F32(1) / scale
    return np.array([min(max(int(np.rint(F32(v) * inverse)) + zero_point, low), high) for v in values])


def activation(row, symmetric):
    low, high = (-127, 127) if symmetric else (0, 255)
    scale, zero_point = choose_qparams(row.astype(F32), low, high, symmetric)
    return quantize_block(row.astype(F32), scale, zero_point, low, high), scale, zero_point


def assert_like_torchao(x, symmetric):
    a, scales, zps = pyda8w4.quantize_activation(x, symmetric)
    assert a.dtype == (np.int8 if symmetric else np.uint8)
    assert scales.dtype == np.float32 and zps.dtype == np.int32
    for m, row in enumerate(x):
        codes, scale, zero_point = activation(row, symmetric)
        np.testing.assert_array_equal(a[m], codes)
        assert_same_bits(scales[m : m + 1], np.array([scale]))
        assert zps[m] == zero_point


both = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])


@both
def test_k_tails(kernel, symmetric):
    for k in range(1, 71):
        assert_like_torchao(floats(k)[:7], symmetric)


@both
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_dtypes(kernel, symmetric, dtype):
    for k in (1, 15, 16, 33, 300):
        assert_like_torchao(floats(k, dtype)[:20], symmetric)


@both
def test_one_sided_rows(kernel, symmetric):
    x = np.abs(floats(50))
    assert_like_torchao(x, symmetric)
    assert_like_torchao(-x, symmetric)
    assert_like_torchao(x + 1000, symmetric)
    assert_like_torchao(-x - 1000, symmetric)


@both
@pytest.mark.parametrize("place", [0, 7, 8, 15, 16, 31, 32, 36])
def test_the_extremes_are_found_wherever_they_are(kernel, symmetric, place):
    x = np.full((2, 37), 0.25, F32)
    x[0, place], x[1, place] = 9, -9
    assert_like_torchao(x, symmetric)


@both
def test_large_and_small_rows(kernel, symmetric):
    x = floats(41)[:10].astype(np.float64)
    for exponent in range(-44, 37, 4):
        scaled = x * 10.0**exponent
        assert_like_torchao(np.clip(scaled, -1.6e38, 1.6e38).astype(F32), symmetric)


def test_multiplies_by_the_rounded_inverse(kernel):
    # x * (1 / s), both rounded, is not x / s.
    rng = np.random.default_rng(5)
    assert_like_torchao(rng.uniform(0.9, 1.1, (300, 9)).astype(F32), False)
    assert_like_torchao(rng.uniform(0.9, 1.1, (300, 9)).astype(F32), True)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", list(DTYPES))
@both
def test_a_bad_value_poisons_its_row_only(kernel, symmetric, dtype, bad):
    for k in (1, 9, 37):
        for place in {0, k // 2, k - 1}:
            x = floats(k, dtype)[:5].copy()
            x[2, place] = bad
            a, scales, zps = pyda8w4.quantize_activation(x, symmetric)
            assert (a[2] == (0 if symmetric else 128)).all()
            assert_same_bits(scales[2:3], np.array([np.nan], F32))
            assert zps[2] == (0 if symmetric else 128)
            good = [0, 1, 3, 4]
            for got, wanted in zip((a, scales, zps), pyda8w4.quantize_activation(x[good], symmetric), strict=True):
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
def test_negative_zero_is_zero(kernel, symmetric):
    x = np.zeros((3, 19), F32)
    x[0], x[1, ::2] = -0.0, -0.0
    a, scales, zps = pyda8w4.quantize_activation(x, symmetric)
    assert (a == 0).all() and (scales == EPS).all() and (zps == 0).all()


# ---- weights ---------------------------------------------------------------------------------


def assert_weight_like_torchao(w, group, symmetric):
    codes, scales, zps = pyda8w4.quantize_weight(w, group, symmetric)
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


@both
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("k, group", [(1, 1), (3, 4), (64, 32), (70, 32), (65, 64), (40, 40), (13, 1000)])
def test_weight(symmetric, dtype, k, group):
    assert_weight_like_torchao(floats(k, dtype)[:30], min(group, k), symmetric)
    scales = pyda8w4.quantize_weight(floats(k, dtype)[:30], group, symmetric)[1]
    assert scales.shape[1] == -(-k // group)


@both
def test_weight_groups_of_one_kind(symmetric):
    w = np.array([np.zeros(8), np.full(8, 3), np.full(8, -3), np.full(8, 1e-40), np.full(8, -0.0)], F32)
    assert_weight_like_torchao(w, 4, symmetric)


@both
def test_weight_ties_round_to_even(symmetric):
    # s is exactly 1: halves are ties.
    w = np.array([[-7.5, 7.5, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5, -3.5]], F32)
    assert_weight_like_torchao(w, 10, symmetric)
    codes, scales, _ = pyda8w4.quantize_weight(w, 10, True)
    assert scales[0, 0] == 1
    assert codes.tolist() == [[0, 15, 8, 10, 10, 8, 6, 6, 12, 4]]


def test_weight_in_several_pieces():
    # Rows are quantized some at a time; the borders must not show.
    w = np.tile(floats(70)[:1], (40000, 1))
    for part in pyda8w4.quantize_weight(w, 32):
        assert (part == part[0]).all()


def test_weight_is_not_changed_and_may_be_strided():
    w = floats(64)[:20].copy()
    before = w.copy()
    reversed_codes = pyda8w4.quantize_weight(w[::-1, ::2], 16)[0]
    assert_same_bits(w, before)
    assert_same_bits(reversed_codes, pyda8w4.quantize_weight(np.ascontiguousarray(w[::-1, ::2]), 16)[0])


def test_quantized_weight_is_near_its_weight():
    w = floats(128)[:33]
    codes, scales, zps = pyda8w4.quantize_weight(w, 32)
    restored = (codes.astype(F32) - np.repeat(zps, 32, 1)) * np.repeat(scales, 32, 1)
    assert (np.abs(restored - w) <= np.repeat(scales, 32, 1) * 0.5001).all()


# ---- the oracle's fused multiply-add, which everything else rests on ---------------------------


def exact_fma(a, b, c):
    """a * b + c in rational numbers, rounded once; the float64 sum has the right sign where it is 0."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:
        return F32(float(a) * float(b) + float(c))
    # Estimate the exponent, correct it by comparison, and do not go below the subnormals' unit.
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    if abs(exact) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(exact / unit) * unit  # to even
    if abs(rounded) >= Fraction(2) ** 128:
        return F32(math.copysign(math.inf, exact))
    return F32(math.copysign(float(rounded), exact))


def assert_fma_exact(a, b, c):
    a, b, c = (np.asarray(value, F32) for value in np.broadcast_arrays(a, b, c))
    expected = np.array([exact_fma(*values) for values in zip(a.flat, b.flat, c.flat, strict=True)], F32)
    assert_same_bits(reference.fma(a, b, c).reshape(-1), expected)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(finite, finite, finite)
@example(1 + 2.0**-23, 1 + 2.0**-23, -1.0)
@example(1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60)
@example(3.4028234663852886e38, 1.0, 2.0**103)
def test_reference_fma_of_any_floats(a, b, c):
    assert_fma_exact(a, b, c)


def test_reference_fma_near_ties():
    # A product with 48 significant bits whose lower half is exactly a tie, and a tiny third term
    # that decides which way it goes: rounding twice gets these wrong.
    rng = np.random.default_rng(3)
    a = (rng.integers(2**11, 2**12, 2000) * 2 + 1).astype(F32)
    b = (rng.integers(2**11, 2**12, 2000) * 2 + 1).astype(F32)
    tiny = rng.choice(F32([0, 2**-30, -(2**-30), 2**-60, -(2**-60), 1e-38, -1e-38, 1e-45, -1e-45]), 2000)
    assert_fma_exact(a, b, tiny)
    assert_fma_exact(-a, b, tiny)


def test_reference_fma_of_subnormals():
    rng = np.random.default_rng(4)
    bits = rng.integers(0, 2**23, 1000, np.uint32)
    small = bits.view(F32)
    assert_fma_exact(small, F32(0.75), small[::-1])
    assert_fma_exact(F32(2.0**-70) * rng.integers(1, 4096, 1000), F32(-(2.0**-78)), small)


def test_reference_fma_at_overflow():
    most = np.finfo(F32).max
    unit = F32(2.0**104)
    for c in (0, unit / 2, np.nextafter(unit / 2, F32(0)), np.nextafter(unit / 2, unit), unit):
        assert_fma_exact(most, F32(1), c)
        assert_fma_exact(-most, F32(1), -F32(c))
    assert_fma_exact(most, most, -most)
    assert_fma_exact(most, F32(2), -most)


def test_reference_fma_cancels_to_zero_of_the_right_sign():
    assert_fma_exact(F32([2, -2, 0, -0.0, 0]), F32([3, 3, 5, 5, -5]), F32([-6, 6, 0, -0.0, 0]))


def test_reference_convert_to_bfloat16_is_ml_dtypes():
    bits = np.random.default_rng(6).integers(0, 2**32, 100000, np.uint32)
    y = bits.view(F32)
    y = y[~np.isnan(y)]
    assert_same_bits(reference.convert(y, "bfloat16"), y.astype(ml_dtypes.bfloat16))
