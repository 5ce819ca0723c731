"""Codes of 4 to 8 bits, tables, two levels, transforms of inputs; every scheme of activations: equal to the oracle."""

from dataclasses import replace

import numpy as np
import pytest
from cases import (
    DTYPES,
    KINDS,
    MOST_ROWS,
    SOME,
    Weight,
    assert_gemm_exact,
    assert_same_bits,
    bias_of,
    expected_linear,
    floats,
    given,
    pack,
    quantized,
    reference_weight,
)

import pyda8w4
from pyda8w4 import reference

F32 = np.float32
ACTS = ("uint8", "int8", "int8_group", "int16")
FINE = ACTS[2:]

kinds = pytest.mark.parametrize("weight", KINDS, ids=str)
schemes = pytest.mark.parametrize("act", ACTS)


@kinds
@schemes
def test_linear(kernel, weight, act):
    for x, out in (("float32", "float32"), ("float16", "bfloat16"), ("bfloat16", "float16")):
        for bias in (False, True):
            expected = expected_linear(weight, x, act=act, bias=bias, out=out)
            for rows in (1, 2, 3, 4, 5, 9, 33, MOST_ROWS):
                y = pyda8w4.linear(
                    floats(weight.k, x)[:rows],
                    pack(weight),
                    bias_of(weight.n) if bias else None,
                    act=act,
                    out_dtype=DTYPES[out],
                )
                assert_same_bits(y, expected[:rows], (weight, rows, x, bias))


@kinds
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_gemm(kernel, weight, dtype):
    weight = replace(weight, factors=False, rotation=0)
    for rows in (1, 2, 5, 8, MOST_ROWS):
        assert_gemm_exact(weight, rows, dtype, bias=rows > 2)


@pytest.mark.parametrize("group", [4, 8, 12, 16, 20, 32, 36, 64, 128, 256, 260, 512, 1000, None])
@pytest.mark.parametrize("kind", [(4, False), (5, False), (6, False), (8, False), (4, True)], ids=str)
@pytest.mark.parametrize("act", ["uint8", *FINE])
def test_groups(kernel, group, kind, act):
    bits, table = kind
    weight = Weight(35, 1044, group, zps=0 if table else "extreme", bits=bits, table=table, offsets=group in (12, 256))
    expected = expected_linear(weight, act=act)
    for rows in (1, 2, 6, MOST_ROWS):
        assert_same_bits(pyda8w4.linear(floats(1044)[:rows], pack(weight), act=act), expected[:rows], (weight, rows))


@pytest.mark.parametrize("kind", [(4, False), (5, False), (6, False), (8, False), (4, True)], ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8, 12, 15, 16, 17, 20, 31, 36, 60, 68, 132, 260, 333])
def test_tails(kernel, kind, k):
    """A unit of lines has up to 16 k; a step of a micro-kernel more."""
    bits, table = kind
    weight = Weight(33, k, None if k % 4 else 4, zps=0 if table else "random", bits=bits, table=table)
    for act in ("uint8", "int16"):
        expected = expected_linear(weight, act=act, rows=9)
        for rows in (1, 3, 9):
            y = pyda8w4.linear(floats(k, rows=9)[:rows], pack(weight), act=act)
            assert_same_bits(y, expected[:rows], (weight, rows))


@pytest.mark.parametrize("bits, table", [(5, False), (6, False), (8, False), (4, True)])
@pytest.mark.parametrize("value", ["least", "most"])
@schemes
def test_extremes(kernel, bits, table, value, act):
    """All codes, zero points and activations at a limit: what saturates somewhere does it here."""
    n, k = 33, 516
    limits = (-128, 127) if bits == 8 else (0, (1 << bits) - 1)
    codes = np.full((n, k), limits[value == "most"], np.int8 if bits == 8 else np.uint8)
    for zp in (-128, 127) if not table else (0,):
        arguments = {"codes": codes, "scales": np.ones((n, 1), F32), "zps": np.full((n, 1), zp, np.int8)}
        if table:
            arguments["table"] = np.array([-128] * 8 + [127] * 8, np.int8)
        packed = pyda8w4.prepack(**arguments, bits=bits)
        for x in (np.ones((9, k), F32), -np.ones((9, k), F32), np.tile(F32([1, -1]), (9, k // 2))):
            expected = reference.linear(x, **arguments, act=act, group_size=k)
            for rows in (1, 9):
                assert_same_bits(pyda8w4.linear(x[:rows], packed, act=act), expected[:rows], (zp, rows))


# ---- what must not change a bit -----------------------------------------------------------------


@kinds
@pytest.mark.parametrize("act", ["uint8", *FINE])
def test_rows_and_threads_change_no_bit(kernel, threads, weight, act):
    x = floats(weight.k)
    together = pyda8w4.linear(x, pack(weight), act=act)
    for rows in (0, 1, 2, 3, 8, 33, 69):
        assert_same_bits(pyda8w4.linear(x[rows], pack(weight), act=act), together[rows], rows)
        assert_same_bits(pyda8w4.linear(x[: rows + 1], pack(weight), act=act), together[: rows + 1], rows)
    for count in (1, 2, 3, 7):
        pyda8w4.set_num_threads(count)
        for rows in (1, 2, MOST_ROWS):
            assert_same_bits(pyda8w4.linear(x[:rows], pack(weight), act=act), together[:rows], count)


@pytest.mark.parametrize("supers", [1, 3, 8])
@schemes
def test_two_levels_have_the_bits_of_one(kernel, supers, act):
    for weight in (
        Weight(65, 520, 32, "float16", offsets=True, supers=supers),
        Weight(33, 268, 20, "float16", bits=6, supers=supers),
    ):
        packed = pack(weight)
        one = pyda8w4.prepack(*packed.unpack(), bits=packed.bits, group_size=packed.group_size)
        assert one.super_size == 0
        for rows in (1, 5, 40):
            x = floats(weight.k)[:rows]
            assert_same_bits(pyda8w4.linear(x, packed, act=act), pyda8w4.linear(x, one, act=act))


@schemes
def test_a_permutation_and_factors_are_those_of_the_input(kernel, act):
    weight = Weight(47, 268, 36, bits=5, offsets=True, perm=True, factors=True)
    plain = pack(replace(weight, perm=False, factors=False))
    found = given(weight)
    for dtype in DTYPES:
        x = floats(268, dtype)[:9]
        moved = x.astype(F32)[:, found["perm"]] * found["factors"]
        expected = pyda8w4.linear(moved, plain, act=act)
        assert_same_bits(pyda8w4.linear(x, pack(weight), act=act, out_dtype=F32), expected)
    a, a_scales, a_zps = (array[:9] for array in quantized(268, "uint8"))
    y = pyda8w4.gemm(a, pack(replace(weight, factors=False)), a_scales, a_zps)
    assert_same_bits(y, pyda8w4.gemm(np.ascontiguousarray(a[:, found["perm"]]), plain, a_scales, a_zps))


def test_int8_of_two_planes_is_int8(kernel):
    """Weights of 8 bits are what two weights of 4 bits add up to."""
    weight = Weight(33, 128, 32, "float32", 0, bits=8)
    found = given(weight)
    high, low = (found["codes"] >> 4) + np.int8(8), found["codes"] & 15
    a = quantized(128, "int8")[0][:9]
    for g in range(4):  # one group, whose sums are exact in float32
        part = slice(32 * g, 32 * g + 32)
        ones = np.ones((33, 1), F32)
        both = 16 * pyda8w4.gemm(
            np.ascontiguousarray(a[:, part]), pyda8w4.prepack(high[:, part].astype(np.uint8), ones)
        )
        both += pyda8w4.gemm(
            np.ascontiguousarray(a[:, part]),
            pyda8w4.prepack(low[:, part].astype(np.uint8), ones, np.zeros((33, 1), np.int8)),
        )
        eight = pyda8w4.prepack(np.ascontiguousarray(found["codes"][:, part]), ones, bits=8)
        assert_same_bits(pyda8w4.gemm(np.ascontiguousarray(a[:, part]), eight), both)


# ---- activations ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", FINE)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_poisons_its_row_only(kernel, act, dtype, bad):
    for weight in (SOME[2], KINDS[4], KINDS[8]):
        x = floats(weight.k, dtype)[:9].copy()
        expected = pyda8w4.linear(x, pack(weight), act=act)
        for at in (0, weight.k // 2, weight.k - 1):
            poisoned = x.copy()
            poisoned[2, at] = bad
            for rows in (3, 9):
                y = pyda8w4.linear(poisoned[:rows], pack(weight), act=act)
                assert np.isnan(y[2].astype(F32)).all()
                good = [row for row in range(rows) if row != 2]
                assert_same_bits(y[good], expected[good])


@pytest.mark.parametrize("act", FINE)
def test_rows_of_any_size(kernel, act):
    weight = Weight(33, 268, 20, offsets=True)
    rng = np.random.default_rng(4)
    for exponent in (-149, -140, -127, -126, -120, -60, 0, 60, 120, 126, 127):
        x = np.ldexp(rng.uniform(-1, 1, (9, 268)), exponent).astype(F32)
        x[0], x[1], x[2, ::2], x[3] = 0, -0.0, 0, np.abs(x[3])
        for rows in (1, 9):
            y = pyda8w4.linear(x[:rows], pack(weight), act=act)
            assert_same_bits(
                y, reference.linear(x[:rows], **reference_weight(weight), act=act, group_size=20), exponent
            )


@pytest.mark.parametrize("act", FINE)
def test_ties_round_to_even(kernel, act):
    most = {"int8_group": 127, "int16": 32512}[act]
    values = np.arange(-20, 20) + F32(0.5)
    x = np.concatenate([values, [most, -most, 0, 0]]).astype(F32)[None]  # the scale is 1
    eye = pyda8w4.prepack(np.eye(44, dtype=np.int8), np.ones(44, F32), bits=8)
    np.testing.assert_array_equal(pyda8w4.linear(x, eye, act=act)[0, :40], np.rint(values))


def test_finer_schemes_are_finer(kernel):
    weight = Weight(97, 1024, 32, offsets=True)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((20, 1024)).astype(F32)
    x[:, 7] *= 50  # as activations of language models have them
    exact = x.astype(np.float64) @ pack(weight).dequantize().T.astype(np.float64)
    error = {act: np.abs(pyda8w4.linear(x, pack(weight), act=act) - exact).mean() for act in ACTS}
    assert error["int8_group"] < error["uint8"] / 2 and error["int8_group"] < error["int8"] / 2
    assert error["int16"] < error["uint8"] / 50
