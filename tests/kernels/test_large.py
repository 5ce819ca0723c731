"""Sizes that 32 bits do not hold. They run where PYDA8W4_LARGE_TESTS is set.

The limits of int32 sums within a group are in test_arithmetic.py.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from cases import (
    assert_same_bits,
    stored_arrays,
)

import pyda8w4


def available() -> int:
    found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("PYDA8W4_LARGE_TESTS" not in os.environ, reason="needs gigabytes: set PYDA8W4_LARGE_TESTS"),
]
needs_16_gb = pytest.mark.skipif(
    not os.path.exists("/proc/meminfo") or available() < 16e9, reason="needs 16 GB of free memory"
)


@needs_16_gb
def test_codes_beyond_2_32_bytes(tmp_path):
    rng = np.random.default_rng(0)
    n, k, copies = 2**15, 2**16, 5
    codes = np.zeros((n, k), np.uint8)  # pages that are not written take no memory
    codes[::7, ::4096] = 1 + np.arange(16, dtype=np.uint8) % 15
    codes[-1] = 15
    part = pyda8w4.prepack(codes, rng.uniform(0.5, 1, (n, 16)).astype(np.float32), np.zeros((n, 16), np.int8))
    del codes
    x = rng.integers(-128, 128, (9, k), np.int8)
    expected = np.tile(pyda8w4.gemm(x, part), copies)
    whole = pyda8w4.concat([part] * copies)
    assert stored_arrays(whole)["codes"].nbytes > 2**32 and whole.shape[0] * k > 2**33
    pyda8w4.save(tmp_path / "weights", {"w": whole})
    for weight in (whole, pyda8w4.load(tmp_path / "weights")["w"]):
        for rows in (1, 9):
            assert_same_bits(pyda8w4.gemm(x[:rows], weight), expected[:rows])
    # The last of them alone, beyond 4 GiB.
    assert_same_bits(pyda8w4.gemm(x, whole[-n:]), expected[:, :n])


@needs_16_gb
def test_outputs_beyond_2_31():
    n, rows = 2**15, 2**16 + 5
    packed = pyda8w4.prepack(np.tile(np.arange(16, dtype=np.uint8), n // 4).reshape(n, 4), np.ones(n, np.float32))
    a = np.resize(np.arange(-128, 128, dtype=np.int8), (rows, 4))
    y = pyda8w4.gemm(a, packed, out_dtype=np.float16)
    assert y.size > 2**31
    for row in (0, 1, 2**16 - 1, 2**16, rows - 1):
        assert_same_bits(y[row], pyda8w4.gemm(a[row], packed, out_dtype=np.float16))


@needs_16_gb
@pytest.mark.parametrize("dtype", [np.uint8, np.float16])
def test_activations_beyond_2_31(dtype):
    k, rows = 2**16, 2**15 + 9
    act = np.zeros((rows, k), dtype)
    act[-1], act[2**15] = 3, np.arange(k) % 5
    packed = pyda8w4.prepack(np.full((1, k), 9, np.uint8), np.ones(1, np.float32))
    assert act.size > 2**31
    call = pyda8w4.gemm if dtype is np.uint8 else pyda8w4.linear
    y = call(act, packed)
    assert np.count_nonzero(y) == 2
    for row in (2**15, rows - 1):
        assert y[row] != 0
        assert_same_bits(y[row], call(act[row], packed))


@pytest.mark.pitfall("bitsandbytes #1784, MLX #2143", "32-bit offsets, N * K > 2**31")
def test_weights_beyond_2_31():
    n, k = 2**15 + 33, 2**16
    codes = np.zeros((n, k), np.uint8)  # pages that are not written take no memory
    codes[-1], codes[0, -1] = 15, 3
    packed = pyda8w4.prepack(codes, np.ones(n, np.float32), np.zeros(n, np.int8))
    y = pyda8w4.gemm(np.ones((1, k), np.int8), packed)
    assert y[0, 0] == 3 and y[0, -1] == 15 * k and np.count_nonzero(y) == 2
