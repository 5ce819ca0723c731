"""The oracle's fused multiply-add, which everything else rests on."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
from cases import (
    assert_same_bits,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyda8w4 import reference

F32 = np.float32


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
