"""Random calls against the oracle.

A few seconds by default. ``PYDA8W4_FUZZ=20000 pytest tests/kernels/test_fuzz.py`` takes that many examples of each
kind, and new ones each time; what fails is printed, and is tried first the next time.
"""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
from cases import (
    DTYPES,
    assert_same_bits,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyda8w4
from pyda8w4 import reference

EXAMPLES = int(os.environ.get("PYDA8W4_FUZZ", 0))
profile = settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    deadline=None,  # the machine may be busy
    suppress_health_check=list(HealthCheck),
)
F32 = np.float32
SPECIAL = np.array(
    [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 1e-40, 2.0**-126, 2.0**-24, 65504, 65520, 3.3e38,
     -3.3e38, np.finfo(F32).max, -np.finfo(F32).max, 1, -1, 0.5, 1 + 2.0**-23],
    F32,
)  # fmt: skip
FINITE = SPECIAL[np.isfinite(SPECIAL)]


@st.composite
def layouts(draw, array):
    """The same values in another place: contiguous, transposed, every other, reversed, not aligned, read-only."""
    way = draw(st.sampled_from(["as it is", "fortran", "strided", "reversed", "misaligned", "read-only"]))
    if way == "fortran":
        return np.asfortranarray(array)
    if way == "strided":
        wide = np.zeros(tuple(2 * size for size in array.shape), array.dtype)
        part = wide[tuple(slice(None, None, 2) for _ in array.shape)]
        part[...] = array
        return part
    if way == "reversed":
        every = tuple(slice(None, None, -1) for _ in array.shape)
        return np.ascontiguousarray(array[every])[every]
    if way == "misaligned":
        memory = np.zeros(array.nbytes + 1, np.uint8)
        part = memory[1:].view(array.dtype).reshape(array.shape)
        part[...] = array
        return part
    if way == "read-only":
        array.flags.writeable = False
    return array


def values(rng, shape, special, share, size=1.0):
    """Normal numbers, a share of them replaced by special ones."""
    found = (rng.standard_normal(shape) * size).astype(F32)
    where = rng.random(shape) < share
    found[where] = rng.choice(special, int(where.sum()))
    return found


sizes = st.one_of(st.integers(1, 40), st.integers(1, 300), st.sampled_from([1, 31, 32, 33, 64, 65]))
lengths = st.one_of(
    st.integers(1, 80), st.integers(1, 1200), st.sampled_from([4, 63, 64, 128, 255, 256, 257, 512, 513])
)


@st.composite
def packings(draw, factored=False):
    """-> arguments of prepack, more of them by name, and those of the oracle."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, k = draw(sizes), draw(lengths)
    group = min(k, draw(st.sampled_from([4, 8, 12, 32, 36, 64, 128, 256, k])))
    groups = -(-k // group)
    bits, table = draw(st.sampled_from([(4, False), (4, False), (5, False), (6, False), (8, False), (4, True)]))
    signed = not table and draw(st.booleans())
    half = 1 << (bits - 1)
    codes = rng.integers(0, 2 * half, (n, k)).astype(np.uint8)  # as unsigned numbers
    if draw(st.booleans()):
        codes[...] = draw(st.sampled_from([0, 2 * half - 1, half]))
    # Zero points of the oracle's codes, which are int8 if they have 8 bits.
    middle = 0 if bits == 8 or table else half
    kind = draw(st.sampled_from(["none", "same", "small", "extreme"]))
    if kind == "none" or table:
        zps = None
        oracle_zps = np.full((n, groups), middle, np.int8)
    else:
        low, high = {"small": (middle - 8, middle + 8), "extreme": (-128, 128), "same": (-128, 128)}[kind]
        oracle_zps = rng.integers(low, high, (n, groups)).astype(np.int8)
        if signed and kind == "extreme":  # those below -128 as given are taken only where all are the same
            oracle_zps = np.maximum(oracle_zps, np.int8(middle - 128))
        if kind == "same":
            oracle_zps[...] = draw(st.integers(-128, 127))
        shift = middle if signed else middle - half
        zps = oracle_zps.astype(draw(st.sampled_from([np.int16, np.int32, np.int64]))) - (0 if table else shift)
    dtype = DTYPES[draw(st.sampled_from(list(DTYPES)))]
    more = {"bits": bits, "group_size": group}
    super_size = draw(st.sampled_from([0, 0, 1, 3, 8]))
    supers = -(-groups // super_size) if super_size else groups
    super_size = super_size and -(-groups // supers)
    supers = -(-groups // super_size) if super_size else groups

    def floats():
        with np.errstate(over="ignore"):
            found = values(rng, (n, supers), FINITE, draw(st.sampled_from([0, 0.05, 0.5])), 0.01)
            if super_size:  # few enough digits, far from both ends, for exact products
                found = np.clip(np.nan_to_num(found), -60000, 60000).astype(np.float16).astype(F32)
            found = found.astype(dtype)
        found[~np.isfinite(found.astype(F32))] = 0  # those beyond the type
        return found

    def subs():
        type_of = draw(st.sampled_from([np.uint8, np.int8]))
        return rng.integers(np.iinfo(type_of).min, np.iinfo(type_of).max, (n, groups), type_of, endpoint=True)

    if table:
        more["table"] = rng.integers(-128, 127, 16, np.int8, endpoint=True)
    if super_size:
        more["sub_scales"] = subs()
    if draw(st.integers(0, 3)) == 0:
        more["perm"] = rng.permutation(k).astype(draw(st.sampled_from([np.int32, np.int64, np.uint32])))
    if factored and draw(st.integers(0, 3)) == 0:
        more["factors"] = values(rng, k, FINITE, draw(st.sampled_from([0, 0.05])))
    if factored and draw(st.integers(0, 3)) == 0:
        more["rotation"] = 1 << draw(st.integers(1, 10))

    scales = floats()
    offsets = floats() if draw(st.booleans()) else None
    if super_size and offsets is not None:
        more["sub_offsets"] = subs()
    given_codes = (codes.astype(np.int16) - half).astype(np.int8) if signed else codes
    if not signed and bits == 4 and k % 2 == 0 and draw(st.booleans()):
        first, second = (codes[:, ::2], codes[:, 1::2]) if draw(st.booleans()) else (codes[:, 1::2], codes[:, ::2])
        more["nibbles"] = "low_first" if np.shares_memory(first[:, :1], codes[:, :1]) else "high_first"
        given_codes = first | second << 4
    elif bits == 4 and not table and draw(st.integers(0, 5)) == 0:
        given_codes = given_codes.astype(ml_dtypes.int4 if signed else ml_dtypes.uint4)
    arguments = [given_codes, scales, zps, offsets]
    arguments = [None if array is None else draw(layouts(array)) for array in arguments]
    oracle = {
        **{name: array for name, array in more.items() if name not in ("bits", "group_size", "nibbles")},
        "codes": (codes ^ np.uint8(128)).view(np.int8) if bits == 8 else codes,
        "scales": scales.astype(F32),
        "zps": oracle_zps,
        "offsets": None if offsets is None else offsets.astype(F32),
        "group_size": group,
    }
    return (
        arguments,
        {name: draw(layouts(v)) if isinstance(v, np.ndarray) else v for name, v in more.items()},
        oracle,
        rng,
    )


@st.composite
def biases(draw, rng, n):
    return None if draw(st.booleans()) else draw(layouts(values(rng, n, SPECIAL, draw(st.sampled_from([0, 0.2])))))


def check_every_kernel(call, expected, threads):
    pyda8w4.set_num_threads(threads)
    for kernel in pyda8w4.kernels():
        with pyda8w4.use_kernel(kernel):
            assert_same_bits(call(), expected, kernel)


rows_of = st.one_of(st.integers(0, 12), st.integers(0, 70), st.sampled_from([240, 241]))


@profile
@given(st.data())
def test_gemm(threads, data):
    arguments, more, oracle, rng = data.draw(packings())
    n, k = oracle["codes"].shape
    rows = data.draw(rows_of)
    info = np.iinfo(data.draw(st.sampled_from([np.uint8, np.int8])))
    a = rng.integers(info.min, info.max, (rows, k), info.dtype, endpoint=True)
    if data.draw(st.booleans()):
        a[...] = data.draw(st.sampled_from([info.min, info.max]))
    scales = zps = None
    if data.draw(st.booleans()):
        scales = values(rng, rows, SPECIAL, data.draw(st.sampled_from([0, 0.3])))
    if data.draw(st.booleans()):
        zps = rng.integers(info.min, info.max, rows, np.int32, endpoint=True)
    bias = data.draw(biases(rng, n))
    out = data.draw(st.sampled_from(list(DTYPES)))
    expected = reference.gemm(a, a_scales=scales, a_zps=zps, bias=bias, out_dtype=out, **oracle)
    packed = pyda8w4.prepack(*arguments, **more)
    placed = [None if array is None else data.draw(layouts(array)) for array in (a, scales, zps)]
    check_every_kernel(
        lambda: pyda8w4.gemm(placed[0], packed, *placed[1:], bias=bias, out_dtype=DTYPES[out]),
        expected,
        data.draw(st.integers(1, 3)),
    )
    unpacked = packed.unpack()
    assert_same_bits(unpacked[0], oracle["codes"])
    assert_same_bits(unpacked[2], oracle["zps"])
    if not packed.super_size:
        assert_same_bits(unpacked[1], oracle["scales"])
        assert all(np.array_equal(array, oracle["offsets"]) for array in unpacked[3:])
    assert len(unpacked) == 3 + (oracle["offsets"] is not None)
    with np.errstate(over="ignore"):
        assert_same_bits(packed.dequantize(), reference.dequantize(**oracle))


@profile
@given(st.data())
def test_linear(threads, data):
    arguments, more, oracle, rng = data.draw(packings(factored=True))
    n, k = oracle["codes"].shape
    rows = data.draw(rows_of)
    size = data.draw(st.sampled_from([1.0, 1e-30, 1e-42, 1e30, 1e38]))
    with np.errstate(over="ignore"):
        x = values(rng, (rows, k), SPECIAL, data.draw(st.sampled_from([0, 0, 0.001, 0.1])), size)
        x = x.astype(DTYPES[data.draw(st.sampled_from(list(DTYPES)))])
    act = data.draw(st.sampled_from(["uint8", "int8", "int8_group", "int16"]))
    bias = data.draw(biases(rng, n))
    out = data.draw(st.sampled_from(list(DTYPES)))
    expected = reference.linear(x, bias=bias, act=act, out_dtype=out, **oracle)
    packed = pyda8w4.prepack(*arguments, **more)
    placed = data.draw(layouts(x))
    check_every_kernel(
        lambda: pyda8w4.linear(placed, packed, bias, act=act, out_dtype=DTYPES[out]),
        expected,
        data.draw(st.integers(1, 3)),
    )
    if act not in ("uint8", "int8"):
        return
    for kernel in pyda8w4.kernels():
        with pyda8w4.use_kernel(kernel):
            got = pyda8w4.quantize_activation(placed, act)
        for array, wanted in zip(got, reference.quantize_activation(x, act), strict=True):
            assert_same_bits(array, wanted, kernel)
