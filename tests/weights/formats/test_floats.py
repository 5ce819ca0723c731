"""Floats of 4 and 8 bits: every one, compared with the package ml_dtypes."""

import numpy as np
import pytest
from cases import assert_same_bits

from pyda8w4.formats._floats import E2M1_TWICE, e4m3, half_of_e8m0

ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
BYTES = np.arange(256, dtype=np.uint8)


def test_e2m1():
    # The table has no negative zero.
    np.testing.assert_array_equal(E2M1_TWICE, 2 * BYTES[:16].view(ml_dtypes.float4_e2m1fn).astype(np.float32))


def test_e8m0():
    wanted = BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert np.isnan(wanted[255]) and half_of_e8m0(BYTES[255]) == 2.0**127
    assert_same_bits(half_of_e8m0(BYTES[:255]), wanted[:255] / 2)


def test_e4m3():
    wanted = BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    numbers = ~np.isnan(wanted)
    assert numbers.sum() == 254
    assert np.isnan(e4m3(BYTES[~numbers])).all()
    assert_same_bits(e4m3(BYTES[numbers]), wanted[numbers])
