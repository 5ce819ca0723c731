"""Rotations of the inputs: equal to a Hadamard matrix, with every kernel, whatever is left of K behind whole blocks."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from cases import DTYPES, Weight, assert_same_bits, floats, pack, prepack

import pyda8w4
from pyda8w4 import reference

F32 = np.float32
SIZES = [1 << i for i in range(1, 11)]
ACTS = ("uint8", "int8", "int8_group", "int16")
ROWS = 5

sizes = pytest.mark.parametrize("rotation", SIZES)


@cache
def matrix(k: int, rotation: int) -> np.ndarray:
    """Sylvester's matrices along the diagonal: blocks of the size, and what is left by its binary digits."""
    blocks = [rotation] * (k // rotation) + [rotation >> i for i in range(1, 11) if k % rotation & rotation >> i]
    found, begin = np.zeros((k, k)), 0
    for block in blocks:
        hadamard = np.ones((1, 1))
        while len(hadamard) < block:
            hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
        found[begin : begin + block, begin : begin + block] = hadamard
        begin += block
    assert begin == k
    return found


# ---- the reference ----------------------------------------------------------------------------------


@sizes
@pytest.mark.parametrize("k", [1, 2, 3, 7, 16, 31, 55, 100, 128, 1000, 1024, 1999, 3071])
def test_the_reference_is_a_hadamard_transform(rotation, k):
    h = matrix(k, rotation)
    rng = np.random.default_rng(k)
    whole = rng.integers(-1000, 1000, (3, k)).astype(F32)  # whose sums are exact
    assert_same_bits(reference.rotate(whole, rotation) + F32(0), (whole @ h).astype(F32))
    x = rng.standard_normal((3, k)).astype(F32)
    bound = 12 * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(h))
    assert (np.abs(reference.rotate(x, rotation) - x.astype(np.float64) @ h) <= bound).all()
    twice = reference.rotate(reference.rotate(whole, rotation), rotation)
    np.testing.assert_array_equal(twice, whole * np.diag(h @ h))
    assert_same_bits(reference.rotate(x, 0), x)
    assert reference.rotate(x[:0], rotation).shape == (0, k)
    assert_same_bits(reference.rotate(x[1], rotation), reference.rotate(x, rotation)[1])


def test_sums_have_one_order():
    """As many as there are stages are rounded, one after the other: strides ascend."""
    x = np.array([2**24, 1, 1, 1], F32)
    assert reference.rotate(x, 4)[0] == F32(F32(2**24) + F32(1)) + F32(2)
    assert reference.rotate(x, 4)[0] != F32(F32(2**24) + F32(1) + F32(1)) + F32(1)


# ---- products ---------------------------------------------------------------------------------------


@sizes
@pytest.mark.parametrize("k", [*range(1, 41), 55, 63, 100, 127, 129, 500, 1023, 1024, 1040, 2047, 3100])
def test_every_tail(kernel, rotation, k):
    """Codes that are an identity give back what was rotated, in 16 bits."""
    x = floats(k, rows=ROWS)
    some = np.unique(np.linspace(0, k - 1, 40).astype(int))
    codes = (np.arange(k) == some[:, None]).astype(np.int8)
    rotated = pyda8w4.linear(x, prepack(codes, bits=8, rotation=rotation), act="int16")
    expected = reference.linear(
        reference.rotate(x, rotation), codes, np.ones((len(some), 1), F32), np.zeros((len(some), 1), np.int8),
        group_size=k, act="int16",
    )  # fmt: skip
    assert_same_bits(rotated, expected)


@sizes
@pytest.mark.parametrize("act", ACTS)
def test_a_rotation_is_that_of_the_input(kernel, rotation, act):
    """After the permutation and the factors."""
    for k in (268, 1099):
        weight = Weight(47, k, 4 * (k // 8) if k % 4 == 0 else k, bits=5, offsets=True, perm=True, factors=True)
        rotated, packed = pack(replace(weight, rotation=rotation)), pack(weight)
        plain = pyda8w4.prepack(*packed.unpack(), bits=5, group_size=weight.group_size)
        for dtype in DTYPES:
            x = floats(k, dtype)[:ROWS]
            moved = reference.rotate(x.astype(F32)[:, packed.perm] * packed.factors, rotation)
            y = pyda8w4.linear(x, rotated, act=act, out_dtype=F32)
            assert_same_bits(y, pyda8w4.linear(moved, plain, act=act), (k, dtype))


@sizes
def test_dequantized_weights_are_those_of_the_inputs(rotation):
    """``rotated inputs . stored weights`` is ``inputs . dequantized weights``, exactly where all are whole."""
    rng = np.random.default_rng(rotation)
    for k in (1, 2, 5, 16, 100, 1000, 1055):
        codes = rng.integers(-128, 127, (33, k), np.int8, endpoint=True)
        perm, factors = rng.permutation(k), rng.integers(-4, 5, k).astype(F32)
        for more in ({}, {"perm": perm}, {"factors": factors}, {"perm": perm, "factors": factors}):
            packed = prepack(codes, bits=8, rotation=rotation, **more)
            expected = codes @ matrix(k, rotation) * more.get("factors", 1)
            restored = np.empty_like(expected)
            restored[:, more.get("perm", slice(None))] = expected
            np.testing.assert_array_equal(packed.dequantize(), restored)
            np.testing.assert_array_equal(packed.dequantize([5, -1]), restored[[5, -1]])
    for x in rng.integers(-9, 10, (3, k)).astype(F32):
        exact = x.astype(np.float64) @ restored.T
        moved = reference.rotate(x[perm] * factors, rotation)
        np.testing.assert_array_equal(moved.astype(np.float64) @ codes.T, exact)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, "both", "beyond"])
def test_a_bad_value_poisons_its_row_only(kernel, act, bad):
    """Also where infinities meet, or finite numbers add up to one."""
    for k, rotation in ((55, 32), (268, 4), (1108, 1024)):
        packed = pack(Weight(33, k, rotation=rotation))
        x = floats(k)[:ROWS].copy()
        expected = pyda8w4.linear(x, packed, act=act)
        for at in (0, k // 2, k - 2, k - 1):
            poisoned = x.copy()
            if bad == "both":
                poisoned[2, at] = np.inf
                poisoned[2, at ^ 1 if at ^ 1 < k else 0] = -np.inf
            elif bad == "beyond":  # in a whole block
                poisoned[2, :2] = 3e38
            else:
                poisoned[2, at] = bad
            y = pyda8w4.linear(poisoned, packed, act=act)
            assert np.isnan(y[2]).all()
            good = [0, 1, 3, 4]
            assert_same_bits(y[good], expected[good])


@pytest.mark.parametrize("act", ACTS)
def test_signed_zeros_and_subnormals(kernel, act):
    weight = Weight(33, 71, rotation=64)
    x = np.ldexp(np.random.default_rng(1).integers(-9, 10, (ROWS, 71)), -149).astype(F32)
    x[0], x[1], x[2, ::2] = 0, -0.0, -0.0
    plain = pack(replace(weight, rotation=0))
    assert_same_bits(pyda8w4.linear(x, pack(weight), act=act), pyda8w4.linear(reference.rotate(x, 64), plain, act=act))


def test_experts_share_rotated_tokens(kernel, threads):
    """A token is quantized once for all of its experts, with any number of rows and threads."""
    gate_up, down = Weight(64, 100, 20, rotation=32), Weight(100, 32, rotation=16)
    more = {name: pyda8w4.stack([pack(weight)] * 3) for name, weight in (("gate_up", gate_up), ("down", down))}
    x = floats(100)[:40]
    ids = np.random.default_rng(0).integers(-1, 3, (40, 2), np.int32)
    weights = np.ones((40, 2), F32)
    together = pyda8w4.moe(x, **more, topk_ids=ids, topk_weights=weights)
    hidden = pyda8w4.linear_gated(x, pack(gate_up))
    once = pyda8w4.linear(hidden, pack(down))
    chosen = (ids >= 0).sum(axis=1)
    assert_same_bits(together[chosen == 1], once[chosen == 1])
    for count in (1, 2, 3):
        pyda8w4.set_num_threads(count)
        for rows in (1, 3, 9, 40):
            y = pyda8w4.moe(x[:rows], **more, topk_ids=ids[:rows], topk_weights=weights[:rows])
            assert_same_bits(y, together[:rows])
