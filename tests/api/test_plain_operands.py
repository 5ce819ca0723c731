"""Operands that C reads as they are skip the checks of all others, and give the same."""

import numpy as np
import pytest

import pyda8w4

K, N = 64, 34
RNG = np.random.default_rng(0)
PACKED = pyda8w4.prepack(
    RNG.integers(0, 16, (N, K), np.uint8), RNG.random((N, 2), np.float32), RNG.integers(0, 16, (N, 2)).astype(np.int8)
)
X = RNG.standard_normal((2, 3, K)).astype(np.float32)
A, A_SCALES, A_ZPS = pyda8w4.quantize_activation(X)
BIAS = RNG.standard_normal(N).astype(np.float32)


def try_plain(act=X, act_scales=None, act_zps=None, scheme=0, bias=None, out=None):
    return PACKED._view.try_plain(act, act_scales, act_zps, scheme, bias, None, out, 0, None)


# A dtype that is said goes the way of operands that are not plain.
def test_plain():
    for x in (X, X[0, 0], X.astype(np.float16)):
        found, other = try_plain(x, bias=BIAS), pyda8w4.linear(x, PACKED, BIAS, out_dtype=x.dtype)
        assert found.dtype == x.dtype and found.tobytes() == other.tobytes()
    out = np.empty((2, 3, N), np.float16)
    assert try_plain(X, out=out) is out
    assert out.tobytes() == pyda8w4.linear(X, PACKED, out_dtype="float16").tobytes()
    for scales, zps in ((None, None), (A_SCALES, A_ZPS)):
        found, other = try_plain(A, scales, zps, scheme=-1), pyda8w4.gemm(A, PACKED, scales, zps, out_dtype="float32")
        assert found.tobytes() == other.tobytes()


class Array(np.ndarray):
    pass


def read_only(array):
    array.flags.writeable = False
    return array


MEMORY = np.zeros(4 * 6 * K + 1, np.uint8)
SHARED = MEMORY[:-1].view(np.float32).reshape(X.shape), MEMORY[: 4 * 6 * N].view(np.float32).reshape(2, 3, N)
NOT_PLAIN = {
    "list": {"act": X.tolist()},
    "float64": {"act": X.astype(np.float64)},
    "big endian": {"act": X.astype(">f4")},
    "strided": {"act": np.repeat(X, 2, axis=-1)[..., ::2]},
    "quantized": {"act": A},
    "no dimension": {"act": np.array(1, np.float32)},
    "K": {"act": X[..., :-4].copy()},
    "subclass": {"act": X.view(Array)},
    "bias of float64": {"bias": BIAS.astype(np.float64)},
    "bias of another length": {"bias": BIAS[1:].copy()},
    "bias of a list": {"bias": BIAS.tolist()},
    "out of a list": {"out": [0.0]},
    "out of another shape": {"out": np.empty((6, N), np.float32)},
    "out of float64": {"out": np.empty((2, 3, N))},
    "strided out": {"out": np.empty((2, 3, 2 * N), np.float32)[..., ::2]},
    "read-only out": {"out": read_only(np.empty((2, 3, N), np.float32))},
    "unaligned out": {"out": MEMORY[1 : 4 * 6 * N + 1].view(np.float32).reshape(2, 3, N)},
    "out in the input": {"act": SHARED[0], "out": SHARED[1]},
    "floats with quantized activations": {"scheme": -1},
    "scales of another shape": {"act": A, "scheme": -1, "act_scales": A_SCALES.reshape(-1)},
    "scales of float64": {"act": A, "scheme": -1, "act_scales": A_SCALES.astype(np.float64)},
    "zero points of int64": {"act": A, "scheme": -1, "act_zps": A_ZPS.astype(np.int64)},
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_not_plain(case):
    assert try_plain(**NOT_PLAIN[case]) is None
