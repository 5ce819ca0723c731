"""Codes of 4 to 8 bits, tables, two levels, permutations, factors, rotations: what goes in comes out, also in parts."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
from cases import (
    KINDS,
    SOME,
    Weight,
    assert_same_bits,
    assert_same_weight,
    floats,
    given,
    pack,
    quantized,
    reference_weight,
    stored_arrays,
)

import pyda8w4
from pyda8w4 import reference

F32 = np.float32
ALL = SOME + KINDS
kinds = pytest.mark.parametrize("weight", ALL, ids=str)


def one_level(weight: Weight, name: str) -> np.ndarray:
    found = reference_weight(weight)
    floats, subs = found[name + "s"], found.get(f"sub_{name}s")
    if subs is None:
        return floats
    return np.repeat(floats, weight.supers, axis=1)[:, : subs.shape[1]] * subs.astype(F32)


def prepacked(weight: Weight, **changed):
    """With some arguments changed."""
    return pyda8w4.prepack(**{**weight.options, **given(weight), **changed})


# ---- whole ------------------------------------------------------------------------------------------


@kinds
def test_unpack_gives_back_what_was_packed(weight):
    packed, found = pack(weight), given(weight)
    codes, scales, zps, *offsets = packed.unpack()
    assert codes.dtype == (np.int8 if weight.bits == 8 else np.uint8)
    np.testing.assert_array_equal(codes, found["codes"])
    np.testing.assert_array_equal(zps, found["zps"])
    assert_same_bits(scales, one_level(weight, "scale"))
    assert len(offsets) == weight.offsets == packed.has_offsets
    if offsets:
        assert_same_bits(offsets[0], one_level(weight, "offset"))
    for name in ("table", "perm", "factors"):
        stored = getattr(packed, name)
        if name in found:
            np.testing.assert_array_equal(stored, found[name])
            assert not stored.flags.writeable
        else:
            assert stored is None
    assert (packed.bits, packed.super_size) == (weight.bits, min(weight.supers, packed.groups))
    assert packed.rotation == weight.rotation
    assert packed.scale_dtype == weight.scales


@kinds
def test_dequantize(weight):
    packed = pack(weight)
    expected = reference.dequantize(**reference_weight(weight), group_size=weight.group_size)
    assert_same_bits(packed.dequantize(), expected)
    n = weight.n
    rng = np.random.default_rng(n)
    for rows in (
        slice(None), slice(1, None), slice(None, None, -2), slice(5, 5), slice(-3, None), 0, -1, n - 1, -n,
        np.int64(n // 2), [0], [], [-1, 0, n - 1, 0], range(n), rng.integers(-n, n, 50),
        rng.integers(0, n, (2, 3)).astype(np.uint8), np.zeros((0, 4), np.int32), np.uint64(n - 1),
    ):  # fmt: skip
        index = np.asarray(rows, int) if isinstance(rows, (list, range)) else rows
        got = packed.dequantize(rows)
        assert got.dtype == F32
        assert_same_bits(got, expected[index], rows)


def test_dequantize_refuses_other_rows():
    packed = pack(KINDS[1])
    for rows in (33, -34, [0, 33], np.array([-34]), 2**63, np.uint64(2**64 - 1)):
        with pytest.raises(IndexError, match="rows must be -33 to 32"):
            packed.dequantize(rows)
    for rows in (1.0, [0.5], "0", True, [True] * 33, np.ones(33, bool), object(), {}):
        with pytest.raises(TypeError, match="rows"):
            packed.dequantize(rows)
    with pytest.raises(ValueError, match="rows"):
        packed.dequantize([[0], [1, 2]])


def test_dequantize_is_what_products_approximate(kernel):
    for weight in ALL:
        x = floats(weight.k)[:9]
        w = pack(weight).dequantize().astype(np.float64)
        exact = x.astype(np.float64) @ w.T
        limit = 2e-4 * (np.abs(x).max(axis=1) * weight.k)[:, None] * np.abs(w).max(axis=1) + 1e-30
        assert (np.abs(pyda8w4.linear(x, pack(weight), act="int16") - exact) <= limit).all(), weight


@kinds
def test_copies(weight):
    packed = pack(weight)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert_same_weight(pickle.loads(pickle.dumps(packed, protocol)), packed)
    assert_same_weight(copy.deepcopy(packed), packed)


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_signed_and_unsigned_codes_are_the_same_weight(bits):
    half = 1 << (bits - 1)
    rng = np.random.default_rng(bits)
    unsigned = rng.integers(0, 2 * half, (33, 70)).astype(np.uint8)
    signed = (unsigned.astype(np.int16) - half).astype(np.int8)
    scales = np.ones((33, 3), F32)
    zps = rng.integers(half - 8, half + 8, (33, 3))
    for u, s in ((None, None), (zps, zps - half), (np.full((33, 3), half + 7), np.full((33, 3), 7))):
        one = pyda8w4.prepack(unsigned, scales, u, bits=bits, group_size=32)
        assert_same_weight(pyda8w4.prepack(signed, scales, s, bits=bits, group_size=32), one)
    w = pyda8w4.prepack(signed, scales, bits=bits, group_size=32).dequantize()
    np.testing.assert_array_equal(w, signed)


def test_packed_bytes_are_the_documented_ones():
    for weight in (
        Weight(40, 41, bits=5),
        Weight(40, 41, bits=6),
        Weight(40, 41, bits=8),
        Weight(40, 41, table=True, zps=0),
    ):
        quads, units = {5: (4, 5), 6: (2, 3), 8: (1, 2), 4: (1, 1)}[weight.bits]
        bits = weight.bits
        padded = np.zeros((64, -(-41 // (4 * quads)) * 4 * quads), np.uint8)
        padded[:40, :41] = given(weight)["codes"].astype(np.int16) + (128 if bits == 8 else 0)
        lines = np.zeros((2, padded.shape[1] // 4 // quads * units, 64), np.uint8)
        for n in range(64):
            for k in range(padded.shape[1]):
                block, quad, j, code = n // 32, k // 4, k % 4, int(padded[n, k])
                unit, column, half = quad // quads * units, n % 32 % 16, n % 32 // 16
                if bits == 8:
                    lines[block, unit + half, 4 * column + j] = code
                    continue
                lines[block, unit + quad % quads, 4 * column + j] |= (code & 15) << 4 * half
                if bits > 4:
                    field = (quad % quads * 2 + half) * (bits - 4)
                    lines[block, unit + quads, 4 * column + j] |= code >> 4 << field
        np.testing.assert_array_equal(stored_arrays(pack(weight))["codes"], lines)
    found = stored_arrays(pack(KINDS[9]))  # 40 columns, 3 groups of which 2 share a scale
    assert found["scales"].shape == (2, 2, 32) and found["sub_offsets"].shape == (2, 3, 32)
    for name in ("scales", "sub_scales", "sub_offsets", "zps", "offsets"):
        blocks = found[name].transpose(0, 2, 1).reshape(64, -1)
        np.testing.assert_array_equal(blocks[:40], given(KINDS[9])[name])
        assert not blocks[40:].any()


def test_size_of_super_groups_follows_from_the_shapes():
    def super_size_of(groups, supers):
        codes, subs = np.zeros((2, 4 * groups), np.uint8), np.ones((2, groups), np.uint8)
        return pyda8w4.prepack(codes, np.ones((2, supers), F32), sub_scales=subs).super_size

    assert [super_size_of(8, supers) for supers in (1, 2, 4, 8)] == [8, 4, 2, 1]
    assert super_size_of(7, 2) == 4
    for groups, supers in ((8, 3), (8, 5), (8, 9), (3, 2)):
        if -(-groups // -(-groups // supers)) == supers:
            super_size_of(groups, supers)
            continue
        with pytest.raises(ValueError, match="scales must have S super-groups"):
            super_size_of(groups, supers)


# ---- parts ------------------------------------------------------------------------------------------


def rows_of(weight: Weight, rows: slice):
    """The weight of some output features, packed anew."""
    changed = {name: array[rows] for name, array in given(weight).items() if name not in ("table", "perm", "factors")}
    return pack_with(weight, {**given(weight), **changed}, weight.supers)


def pack_with(weight: Weight, arguments, supers: int):
    packed = pyda8w4.prepack(**arguments, **weight.options)
    assert packed.super_size == min(supers, packed.groups)
    return packed


# Their scales are stored in the type of the whole, whichever rows are cut out.
CUT = [
    Weight(96, 128, 32, "float16", offsets=True, supers=2),
    Weight(96, 268, 20, "float16", bits=5, perm=True, factors=True),
    Weight(96, 72, 12, "bfloat16", 0, bits=6, supers=3),
    Weight(96, 70, None, "float16", "extreme", bits=8, offsets=True),
    Weight(96, 64, 16, "float16", 0, table=True),
    Weight(96, 100, 20, "float16", rotation=32),
]
cut = pytest.mark.parametrize("weight", CUT, ids=str)


@cut
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 32, 96])
def test_shards_of_output_features(weight, count):
    packed = pack(weight)
    x = floats(weight.k)[:5]
    whole = pyda8w4.linear(x, packed)
    shards = [packed.shard(i, count, 0) for i in range(count)]
    size = 96 // count
    for i, shard in enumerate(shards):
        rows = slice(size * i, size * i + size)
        assert shard.shape == (size, weight.k)
        assert_same_bits(pyda8w4.linear(x, shard), whole[:, rows])
        assert_same_bits(shard.dequantize(), packed.dequantize(rows))
        if size % 32 == 0:
            shared = [
                np.shares_memory(array, stored_arrays(packed)[name]) for name, array in stored_arrays(shard).items()
            ]
            assert all(shared)
        elif size > 3:  # enough to have all sorts of zero points and scales
            assert_same_weight(shard, rows_of(weight, rows))
    assert_same_bits(pyda8w4.linear(x, pyda8w4.concat(shards)), whole)
    if size > 3:
        assert_same_weight(pyda8w4.concat(shards), packed)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", [(4, False), (5, False), (6, False), (8, False), (4, True)], ids=str)
@pytest.mark.parametrize("supers", [0, 1, 3, 4, 8, 16])
@pytest.mark.parametrize("group", [4, 12, 32])
def test_shards_of_input_features(count, kind, supers, group):
    bits, table = kind
    k = 8 * group
    weight = Weight(
        33, k, group, "float16", 0 if table else "random", supers > 1, bits, table, supers=supers, factors=bits == 5
    )
    packed, found = pack(weight), given(weight)
    a = quantized(k, "int8")[0][:5]
    size = k // count
    total = np.zeros((5, 33))
    for i in range(count):
        shard = packed.shard(i, count, 1)
        part = slice(size * i, size * i + size)
        assert shard.shape == (33, size)
        assert shard.group_size == group and shard.bits == bits
        assert (shard.super_size > 0) == (supers > 0)
        assert_same_bits(shard.dequantize(), packed.dequantize()[:, part])
        for array, of in zip(shard.unpack()[1:], packed.unpack()[1:], strict=True):
            assert_same_bits(array, of[:, 8 // count * i : 8 // count * (i + 1)])
        # Column sums are those of the part.
        one = pyda8w4.prepack(
            *shard.unpack(), bits=bits, table=found.get("table"), factors=shard.factors, group_size=group
        )
        assert_same_bits(stored_arrays(shard)["sums"], stored_arrays(one)["sums"])
        if not weight.factors:
            zps = np.full(5, 3, np.int32)
            total += pyda8w4.gemm(np.ascontiguousarray(a[:, part]), shard, None, zps).astype(np.float64)
    if not weight.factors:
        np.testing.assert_allclose(total, pyda8w4.gemm(a, packed, None, zps), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    "k, group, supers, count, pieces",
    [
        (64, 64, 0, 2, 32),  # one group for a row
        (64, 64, 0, 16, 4),
        (64, 64, 1, 2, 32),
        (192, 64, 0, 2, 32),  # a border in the middle of the second group
        (192, 64, 2, 2, 32),
        (480, 32, 5, 4, 8),
        (480, 32, 15, 6, 16),
        (72, 32, 0, 2, 4),  # the last group is shorter
        (72, 32, 2, 3, 8),
        (96, 64, 1, 3, 32),
    ],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_shards_whose_borders_lie_in_groups(k, group, supers, count, pieces, bits):
    packed = pack(Weight(33, k, group, "float16", "random", supers > 1, bits, supers=supers))
    a, size = quantized(k, "int8")[0][:5], k // count
    zps = np.full(5, 3, np.int32)
    total = np.zeros((5, 33))
    for i in range(count):
        shard = packed.shard(i, count, axis=1)
        part = slice(size * i, size * i + size)
        assert (shard.shape, shard.group_size, shard.super_size > 0) == ((33, size), pieces, supers > 0)
        assert_same_bits(shard.dequantize(), packed.dequantize()[:, part])
        total += pyda8w4.gemm(np.ascontiguousarray(a[:, part]), shard, None, zps).astype(np.float64)
    np.testing.assert_allclose(total, pyda8w4.gemm(a, packed, None, zps), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("rotation", [8, 32, 64])
def test_shards_of_a_rotated_weight(rotation):
    weight = Weight(33, 192, 32, bits=5, factors=True, rotation=rotation)
    packed = pack(weight)
    for count in (1, 3, 192 // rotation):
        size = 192 // count
        for i in range(count):
            shard = packed.shard(i, count, axis=1)
            assert shard.rotation == rotation
            assert_same_bits(shard.dequantize(), packed.dequantize()[:, size * i : size * i + size])
    for weight, count in ((packed, 384 // rotation), (pack(Weight(33, 136, 4, rotation=rotation)), 2)):
        with pytest.raises(ValueError, match=r"count must cut K = .* into parts of whole blocks of the rotation"):
            weight.shard(0, count, axis=1)


def test_the_one_shard_of_a_rotated_weight_with_a_tail():
    tail = pack(Weight(33, 55, rotation=32))
    assert_same_weight(tail.shard(0, 1, axis=1), tail)


def test_shards_of_a_permuted_weight():
    weight = Weight(33, 64, 16, bits=6, factors=True)
    rng = np.random.default_rng(0)
    apart = np.concatenate([rng.permutation(32), 32 + rng.permutation(32)])
    packed = prepacked(weight, perm=apart)
    for i in range(2):
        part = slice(32 * i, 32 * i + 32)
        shard = packed.shard(i, 2, axis=1)
        np.testing.assert_array_equal(shard.perm, apart[part] - 32 * i)
        assert_same_bits(shard.dequantize(), packed.dequantize()[:, part])
    mixed = prepacked(weight, perm=rng.permutation(64))
    with pytest.raises(ValueError, match="cut the weight before it is permuted"):
        mixed.shard(0, 2, axis=1)
    assert_same_weight(mixed.shard(0, 1, axis=1), mixed)
    assert mixed.shard(0, 3, axis=0).shape == (11, 64)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ((0, 2, 2), ValueError, "axis must be 0 or 1, got 2"),
        ((0, 2, -1), ValueError, "axis"),
        ((0, 0, 0), ValueError, "count must be at least 1"),
        ((2, 2, 0), ValueError, "index must be 0 to 1"),
        ((-1, 2, 0), ValueError, "index"),
        ((0, 5, 0), ValueError, "count must divide N = 33, got 5"),
        ((0, 2, 1), ValueError, "groups of a multiple of 4, got 2, which cuts groups of 32 into pieces of 1"),
        ((0, 5, 1), ValueError, "of a multiple of 4, got 5, which cuts groups of 32 into pieces of 2"),
        ((0, 3, 1), ValueError, "count must divide K = 70, got 3"),
        ((0.0, 2, 0), TypeError, "index must be an int"),
        ((0, "2", 0), TypeError, "count"),
        ((0, 2, None), TypeError, "axis"),
        ((True, 2, 0), TypeError, "index"),
    ],
)
def test_bad_shards(arguments, error, match):
    with pytest.raises(error, match=match):
        pack(Weight(33, 70, 32)).shard(*arguments)
    assert_same_weight(pack(Weight(33, 70, 32)).shard(0, 1, 1), pack(Weight(33, 70, 32)))


@kinds
def test_slices_and_concat(weight):
    packed = pack(weight)
    if weight.n > 32:
        assert_same_weight(pyda8w4.concat([packed[:32], packed[32:]]), packed)
    twice = pyda8w4.concat([packed, packed, packed])
    assert_same_bits(twice.dequantize(), np.concatenate([packed.dequantize()] * 3))
    x = floats(weight.k)[:9]
    assert_same_bits(pyda8w4.linear(x, twice), np.concatenate([pyda8w4.linear(x, packed)] * 3, axis=1))
    assert twice.super_size == packed.super_size
    for name, array in stored_arrays(twice).items():
        if name in ("table", "perm", "factors"):
            np.testing.assert_array_equal(array, stored_arrays(packed)[name])


@pytest.mark.parametrize("sizes", [(32, 64, 5), (33, 31, 5)], ids=str)
def test_concat_of_two_levels_with_and_without_offsets(kernel, sizes):
    weights = [
        Weight(n, 268, 20, "float16", zps, offsets, 5, supers=4)
        for n, zps, offsets in zip(sizes, (3, "random", 4), (0, 1, 0))
    ]
    for order in (weights, weights[::-1], weights[:1] + weights[2:]):
        order = (
            order
            if all(weight.n % 32 == 0 for weight in order[:-1]) or sizes[0] == 33
            else sorted(order, key=lambda w: -w.n)
        )
        packed = pyda8w4.concat([pack(weight) for weight in order])
        assert packed.super_size == 4
        x = floats(268)[:9]
        parts = [pyda8w4.linear(x, pack(weight)) for weight in order]
        assert_same_bits(pyda8w4.linear(x, packed), np.concatenate(parts, axis=1))
        np.testing.assert_array_equal(packed.dequantize(), np.concatenate([pack(w).dequantize() for w in order]))


def test_concat_names_what_differs():
    base = Weight(33, 64, 16, "float16", 0, supers=2)
    cases = {
        "bits": replace(base, bits=5),
        "has_table": replace(base, table=True),
        "super_size": replace(base, supers=4),
        "has_perm": replace(base, perm=True),
        "has_factors": replace(base, factors=True),
        "rotation": replace(base, rotation=16),
        "K": replace(base, k=68),
        "group_size": replace(base, group=32),
    }
    for name, other in cases.items():
        with pytest.raises(ValueError, match=rf"^weights\[1\] must have {name} = .* like weights\[0\], got"):
            pyda8w4.concat([pack(base), pack(other)])
    sub_scales = given(base)["sub_scales"] // 2
    signed = prepacked(base, sub_scales=sub_scales.astype(np.int8))
    with pytest.raises(ValueError, match=r"^weights\[1\] must have sub_scale_dtype = uint8"):
        pyda8w4.concat([pack(base), signed])
    subs = np.ones_like(sub_scales)
    offsets = {"offsets": given(base)["scales"]}
    unlike = [prepacked(base, **offsets, sub_offsets=subs.astype(dtype)) for dtype in (np.uint8, np.int8)]
    with pytest.raises(ValueError, match="sub_offsets of one type"):
        pyda8w4.concat(unlike)
    for name in ("table", "perm", "factors"):
        weight = replace(base, supers=0, **{name: True})
        other = prepacked(weight, **{name: given(weight)[name][::-1]})
        with pytest.raises(ValueError, match=rf"^weights\[1\] must have the {name} of weights\[0\]"):
            pyda8w4.concat([pack(weight), other])
