"""Gates: every kernel equals the reference, and the reference is within 2 units in the last place of float64."""

import math

import numpy as np
import pytest
from cases import DTYPES, assert_same_bits

import pyda8w4
from pyda8w4 import reference

F32 = np.float32
ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "swigluoai"]
SPECIAL = F32([0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-38, -1e-38, 3.4e38, -3.4e38])


def any_gates(count: int) -> np.ndarray:
    """Floats of all sizes, and more of those where activations are no straight lines."""
    rng = np.random.default_rng(count)
    parts = [rng.integers(0, 2**32, count, dtype=np.uint32).view(F32), SPECIAL]
    parts += [rng.uniform(-most, most, count).astype(F32) for most in (1, 8, 15, 110)]
    gates = rng.permutation(np.concatenate(parts))
    gates[gates == 0] = 0  # no -0, which a product never gives
    return gates


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > -700 else 0.0


EXACT = {
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: x * math.erfc(-x * math.sqrt(0.5)) / 2,
    "gelu_tanh": lambda x: x * sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x)),
    "swigluoai": lambda x: min(x, 7.0) * sigmoid(float(F32(1.702)) * min(x, 7.0)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_is_near_float64(activation):
    gates = any_gates(5000)
    gates = gates[np.isfinite(gates)]
    got = reference.gate(gates, np.full_like(gates, activation != "swigluoai"), activation)
    exact = np.array([EXACT[activation](float(x)) for x in gates])
    unit = np.ldexp(1.0, np.maximum(np.frexp(exact)[1] - 1, -126) - 23)
    unit[exact == 0] = 2.0**-149
    assert (np.abs(got - exact) / unit).max() < 2


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_limits(activation):
    ones = np.full(5, activation != "swigluoai", F32)
    got = reference.gate(F32([-np.inf, np.inf, -1e30, np.nan, 7]), ones, activation)
    highest = got[4] if activation == "swigluoai" else np.inf
    assert_same_bits(got[:4], F32([-0.0, highest, -0.0, np.nan]))


@pytest.mark.parametrize("interleaved", [False, True], ids=["apart", "interleaved"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernels_equal_the_reference(kernel, activation, interleaved):
    # Rows of zeros make the results of the product its bias.
    for count in (1, 5, 17, 3000):
        gates, ups = any_gates(count), any_gates(count + 1)[: 5 * count + 10]
        gates = gates[: len(ups)]
        ups = ups[: len(gates)]
        n = len(gates)
        bias = np.stack([gates, ups], axis=1).reshape(-1) if interleaved else np.concatenate([gates, ups])
        packed = pyda8w4.prepack(np.full((2 * n, 4), 9, np.uint8), np.ones((2 * n, 1), F32))
        for alpha, limit in ((1.702, 7.0), (-0.5, 2.5), (3.0, 100.0)):
            options = {"activation": activation, "alpha": alpha, "limit": limit}
            expected = reference.gate(gates, ups, **options)
            for name, dtype in DTYPES.items():
                y = pyda8w4.linear_gated(
                    np.zeros((2, 4), F32), packed, bias, act="int8", interleaved=interleaved, out_dtype=dtype, **options
                )
                for row in y:
                    assert_same_bits(row, reference.convert(expected, name), (count, options))


def test_sum_slots():
    rng = np.random.default_rng(1)
    results = rng.standard_normal((3, 5, 7), dtype=F32)
    weights = rng.standard_normal((3, 5), dtype=F32)
    ids = rng.integers(-1, 3, (3, 5))
    got = reference.sum_slots(results, weights, 2.5, ids=ids)
    for t in range(3):
        acc = np.zeros(7, F32)
        for s in range(5):
            if ids[t, s] >= 0:
                acc = reference.fma(results[t, s], np.full(7, weights[t, s] * F32(2.5)), acc)
        assert_same_bits(got[t], acc)
    results[0, 0] = np.nan
    ids[0] = -1
    assert_same_bits(reference.sum_slots(results, weights, ids=ids)[0], np.zeros(7, F32))
