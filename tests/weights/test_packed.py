"""PackedWeight: immutable, aligned, copied, joined and sliced without changing."""

import copy
import pickle
import re
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from cases import (
    DTYPES,
    SOME,
    Weight,
    address,
    arrays,
    assert_same_bits,
    assert_same_weight,
    assert_unpacks_to,
    floats,
    pack,
    stored_arrays,
)

import pyda8w4

F32 = np.float32


some = pytest.mark.parametrize("weight", SOME, ids=str)


# ---- immutability ------------------------------------------------------------------------------


def test_is_immutable():
    packed = pack(SOME[2])
    for name in ("shape", "group_size", "scale_dtype", "zero_point", "nbytes", "other"):
        with pytest.raises(AttributeError):
            setattr(packed, name, 1)
    with pytest.raises(AttributeError):
        del packed.shape
    for array in stored_arrays(packed).values():
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    with pytest.raises(TypeError, match="prepack"):
        pyda8w4.PackedWeight()


def test_repr_and_nbytes():
    packed = pack(Weight(33, 70, 32, "float16"))
    # 2 blocks of 18 lines; 2 x 3 groups of 32 scales and zero points; 2 x 32 sums.
    assert packed.nbytes == 2 * 18 * 64 + 2 * 3 * 32 * (2 + 1) + 2 * 32 * 4
    assert repr(packed) == (
        "PackedWeight(shape=(33, 70), bits=4, group_size=32, scales=float16, zero_point=per group, "
        f"nbytes={packed.nbytes})"
    )
    assert packed.groups == 3
    assert "zero_point=8" in repr(pack(SOME[4]))
    more = pack(Weight(33, 70, 32, "float16", offsets=True))
    assert more.nbytes == packed.nbytes + 2 * 3 * 32 * 2
    assert "scales=float16, offsets=float16, zero_point=per group" in repr(more)
    for weight, text in [
        (Weight(33, 70, 32, "float16", bits=5), "bits=5, group_size=32, scales=float16, zero_point=per group, nbytes="),
        (
            Weight(65, 520, 16, "bfloat16", 0, table=True, supers=5, perm=True, offsets=True),
            "bits=4, group_size=16, super_size=5, scales=bfloat16*uint8, offsets=bfloat16*int8, zero_point=0, table, "
            "perm, nbytes=",
        ),
        (
            Weight(35, 268, 24, "float32", supers=1, factors=True),
            "super_size=1, scales=float32*uint8, zero_point=per g",
        ),
        (Weight(35, 268, factors=True, rotation=64), "zero_point=per group, factors, rotation=64, nbytes="),
    ]:
        assert text in repr(pack(weight))
        assert pack(weight).nbytes == sum(array.nbytes for array in stored_arrays(pack(weight)).values())


def test_bits_per_weight():
    """Those of Q4_K, Q5_K and Q6_K, with their column sums."""
    for weight, most in [
        (Weight(64, 4096, 32, "float16", 0, offsets=True, supers=8), 4.65),
        (Weight(64, 4096, 32, "float16", 0, offsets=True, bits=5, supers=8), 5.7),
        (Weight(64, 4096, 16, "float16", 32, bits=6, supers=16), 6.7),
    ]:
        packed = pack(weight)
        assert packed.super_size == weight.supers
        assert most - 0.15 < 8 * packed.nbytes / (64 * 4096) <= most


# ---- memory ------------------------------------------------------------------------------------


@some
def test_arrays_are_aligned_to_64_bytes(weight):
    for array in stored_arrays(pack(weight)).values():
        assert address(array) % 64 == 0


def test_large_weights_are_aligned_to_huge_pages():
    codes = np.zeros((1024, 4096), np.uint8)
    packed = pyda8w4.prepack(codes, np.ones((1024, 32), np.float32))
    assert address(stored_arrays(packed)["codes"]) % 2**21 == 0
    again = pickle.loads(pickle.dumps(packed))
    assert address(stored_arrays(again)["codes"]) % 2**21 == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no huge pages that a program can ask for")
def test_small_weights_share_huge_pages():
    packed = pyda8w4.prepack(np.zeros((256, 1024), np.uint8), np.ones((256, 8), np.float32))
    start = address(stored_arrays(packed)["codes"])
    regions = re.findall(r"^(\w+)-(\w+) [^$]*?^VmFlags: (.*)", Path("/proc/self/smaps").read_text(), re.M)
    (flags,) = [flags.split() for low, high, flags in regions if int(low, 16) <= start < int(high, 16)]
    assert "hg" in flags  # requested; granting is up to the system


# ---- copies ------------------------------------------------------------------------------------


@some
def test_pickle(weight):
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(pack(weight), protocol))
        assert_same_weight(again, pack(weight))
        for array in stored_arrays(again).values():
            assert not array.flags.writeable and address(array) % 64 == 0
    y = pyda8w4.linear(floats(weight.k)[:9], again)
    assert_same_bits(y, pyda8w4.linear(floats(weight.k)[:9], pack(weight)))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies(duplicate):
    for weight in SOME:
        assert_same_weight(duplicate(pack(weight)), pack(weight))


# ---- concat and slices -------------------------------------------------------------------------


def all_arrays(weight):
    """With offsets of 0 where there are none."""
    found = arrays(weight)
    return found if weight.offsets else (*found, np.zeros(found[1].shape, np.float32))


def joined(*weights):
    """What concat should give, by way of the unpacked arrays."""
    parts = [all_arrays(weight) for weight in weights]
    codes, zps = (np.concatenate([part[i] for part in parts]) for i in (0, 2))
    scales, offsets = (np.concatenate([part[i].astype(np.float32) for part in parts]) for i in (1, 3))
    whole = (codes, scales, zps, offsets) if any(weight.offsets for weight in weights) else (codes, scales, zps)
    return pyda8w4.prepack(*whole, group_size=weights[0].group_size), whole


@pytest.mark.parametrize("sizes", [(32,), (64, 32), (32, 64, 33), (96, 1), (1, 32), (33, 31), (5, 6, 7, 8)], ids=str)
@pytest.mark.parametrize("scales", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("zps", ["random", 8])
def test_concat_is_prepack_of_the_concatenated(sizes, scales, zps):
    weights = [Weight(n, 70, 32, scales, zps) for n in sizes]
    assert_same_weight(pyda8w4.concat([pack(weight) for weight in weights]), joined(*weights)[0])


@pytest.mark.parametrize("sizes", [(32, 64, 33), (33, 31, 2)], ids=str)
def test_concat_of_mixed_scale_dtypes_and_zero_points(sizes):
    weights = [
        Weight(sizes[0], 70, 32, "float16", 7),
        Weight(sizes[1], 70, 32, "bfloat16", -128),
        Weight(sizes[2], 70, 32, "float32", "random"),
    ]
    whole, unpacked = joined(*weights)
    for order in (weights, weights[:2], weights[:1]):
        packed = pyda8w4.concat(pack(weight) for weight in order)
        n = sum(weight.n for weight in order)
        assert_unpacks_to(packed, *(array[:n] for array in unpacked))
        x = floats(70)[:13]
        assert_same_bits(pyda8w4.linear(x, packed), np.concatenate([pyda8w4.linear(x, pack(w)) for w in order], axis=1))
    assert_same_weight(pyda8w4.concat([pack(weight) for weight in weights]), whole)


@pytest.mark.parametrize("sizes", [(32, 64, 33), (33, 31, 2)], ids=str)
@pytest.mark.parametrize("scales", [("float16", "float16"), ("bfloat16", "float16")], ids=str)
def test_concat_of_parts_with_and_without_offsets(kernel, sizes, scales):
    weights = [Weight(n, 70, 32, scales[i % 2], offsets=i % 2 == 1) for i, n in enumerate(sizes)]
    x = floats(70)[:30]
    for order in (weights, weights[1:], weights[1:2]):
        packed = pyda8w4.concat(pack(weight) for weight in order)
        whole, unpacked = joined(*order)
        assert_same_weight(packed, whole)
        assert_unpacks_to(packed, *unpacked)
        for rows in (1, 9, 30):
            parts = [pyda8w4.linear(x[:rows], pack(weight)) for weight in order]
            assert_same_bits(pyda8w4.linear(x[:rows], packed), np.concatenate(parts, axis=1))


@pytest.mark.parametrize("sizes", [(32, 64, 33), (33, 31, 2)], ids=str)
@pytest.mark.parametrize("scales", [*permutations(DTYPES), ("bfloat16", "bfloat16", "float16")], ids=str)
def test_concat_of_offsets_that_are_stored_in_different_types(sizes, scales):
    weights = [Weight(n, 70, 32, dtype, offsets=True) for n, dtype in zip(sizes, scales)]
    packed = pyda8w4.concat(pack(weight) for weight in weights)
    whole, unpacked = joined(*weights)
    assert_same_weight(packed, whole)
    assert_unpacks_to(packed, *unpacked)


def test_concat_padding_of_mixed_zero_points_is_deterministic():
    # The last part is padded, and its zero points are written out only for the sake of the others.
    weights = [Weight(32, 70, 32, zps="random"), Weight(33, 70, 32, zps=5)]
    assert_same_weight(pyda8w4.concat([pack(weight) for weight in weights]), joined(*weights)[0])


@pytest.mark.parametrize("weight", [Weight(97, 70, 32), Weight(128, 70, 32, "float16", 8), SOME[-1]], ids=str)
def test_slices(weight):
    packed = pack(weight)
    x = floats(weight.k)[:9]
    whole = pyda8w4.linear(x, packed)
    for begin, end in ((0, 32), (32, 96), (64, None), (-weight.n, 64), (None, None), (96, weight.n)):
        rows = slice(begin, end)
        part = packed[rows]
        assert_unpacks_to(part, *(array[rows] for array in arrays(weight)))
        assert_same_bits(pyda8w4.linear(x, part), whole[:, rows])
        for name, array in stored_arrays(part).items():
            assert np.shares_memory(array, stored_arrays(packed)[name])
    assert_same_weight(pyda8w4.concat([packed[:32], packed[32:]]), packed)
    assert_same_weight(pickle.loads(pickle.dumps(packed[32:64])), packed[32:64])


@pytest.mark.parametrize(
    "rows", [slice(1, 32), slice(0, 33), slice(32, 32), slice(0, 64, 2), slice(64, 32), slice(None, None, -1)], ids=str
)
def test_bad_slices(rows):
    with pytest.raises(ValueError, match="slice"):
        pack(SOME[-1])[rows]


@pytest.mark.parametrize("rows", [0, (slice(0, 32), 0), "codes", None, np.arange(32)], ids=str)
def test_things_that_are_no_slice(rows):
    with pytest.raises(TypeError, match="slice"):
        pack(SOME[-1])[rows]


# ---- hostile pickles -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        *({"n": value} for value in (32, 65, 2**70, 0, -33, 33.0, True, None)),
        *({"k": value} for value in (64, 80, 2**70, 0)),
        *({"group_size": value} for value in (0, -32, 16, 30, 72, 2**70, 32.0)),
        *({"scale_dtype": value} for value in ("float16", "bfloat16", "int8", None, [])),
        *({"zero_point": value} for value in (8, 1000, "8")),
        *({"has_offsets": value} for value in (False, None)),
        *({"bits": value} for value in (3, 5, 6, 7, 8, 4.0, True, None, [])),
        *({"has_table": value} for value in (True, 1, None)),
        *({"super_size": value} for value in (1, 3, -1, 4, 2**70, None, 1.0, True)),
        *({"sub_scale_dtype": value} for value in ("uint8", "float32", [])),
        *({"has_perm": value} for value in (True, None)),
        *({"has_factors": value} for value in (True, 0)),
        *({"rotation": value} for value in (1, 3, -2, 2048, 2**70, 16.0, True, False, None, [])),
        {"more": 1},
        *({"arrays": {name: None}} for name in ("codes", "scales", "sums", "zps", "offsets")),
        {"arrays": {"codes": np.zeros((2, 17, 64), np.uint8)}},
        {"arrays": {"codes": np.zeros((1, 18, 64), np.uint8)}},
        {"arrays": {"codes": np.zeros((2, 18, 64), np.int8)}},
        {"arrays": {"codes": [0]}},
        {"arrays": {"scales": np.zeros((2, 2, 32), np.float32)}},
        {"arrays": {"sums": np.zeros((2, 31), np.float32)}},
        {"arrays": {"zps": np.zeros((2, 3, 32), np.uint8)}},
        {"arrays": {"offsets": np.zeros((2, 3, 32), np.float16)}},
        {"version": 3},
        *({"version": value} for value in (None, "1", [])),
        *({"whole": {name: value}} for name in ("fields", "arrays") for value in (None, 3, [], (), "codes")),
    ],
)
def test_hostile_pickle(change):
    rebuild, (version, fields, arrays) = pack(Weight(33, 70, 32, offsets=True)).__reduce__()
    rebuild(version, fields, arrays)
    change = dict(change)
    version, array_changes = change.pop("version", version), change.pop("arrays", {})
    whole = change.pop("whole", {})
    arrays = {name: array for name, array in {**arrays, **array_changes}.items() if array is not None}
    with pytest.raises((TypeError, ValueError)):
        rebuild(version, whole.get("fields", {**fields, **change}), whole.get("arrays", arrays))


RICH = Weight(33, 70, 12, "float16", 0, True, supers=2, table=True, perm=True, factors=True)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 8},
        {"zero_point": 1},
        {"zero_point": None},
        {"has_table": False},
        *({"super_size": value} for value in (0, 1, 3, 7, 2**70)),
        *({"sub_scale_dtype": value} for value in ("int8", None, "float16")),
        *({"sub_offset_dtype": value} for value in ("uint8", None)),
        *({"arrays": {name: None}} for name in ("sub_scales", "sub_offsets", "table", "perm", "factors")),
        {"arrays": {"sub_scales": np.zeros((2, 3, 32), np.uint8)}},
        {"arrays": {"table": np.zeros(15, np.int8)}},
        {"arrays": {"table": np.zeros(16, np.uint8)}},
        {"arrays": {"perm": np.arange(70)}},
        {"arrays": {"perm": np.arange(69, dtype=np.int32)}},
        {"arrays": {"perm": np.zeros(70, np.int32)}},
        *({"arrays": {"perm": np.r_[np.arange(69), at].astype(np.int32)}} for at in (-1, 70, 2**31 - 1, -(2**31))),
        {"arrays": {"factors": np.full(70, np.nan, np.float32)}},
        {"arrays": {"factors": np.r_[np.ones(69), np.inf].astype(np.float32)}},
        {"arrays": {"factors": np.ones(71, np.float32)}},
    ],
)
def test_hostile_pickle_of_a_weight_that_has_everything(change):
    rebuild, (version, fields, arrays) = pack(RICH).__reduce__()
    assert_same_weight(rebuild(version, fields, arrays), pack(RICH))
    change = dict(change)
    changed = {name: array for name, array in {**arrays, **change.pop("arrays", {})}.items() if array is not None}
    with pytest.raises(ValueError):
        rebuild(version, {**fields, **change}, changed)


@pytest.mark.parametrize("super_size", [4, 2**31, 2**70])
def test_hostile_pickle_of_a_super_group_beyond_the_last_group(super_size):
    """Every array has the shape of one super-group; only this number is wrong."""
    rebuild, (version, fields, arrays) = pack(Weight(33, 70, 32, "float16", supers=3)).__reduce__()
    rebuild(version, fields, arrays)
    with pytest.raises(ValueError, match="super_size must be an int from 0 to 3 groups"):
        rebuild(version, {**fields, "super_size": super_size}, arrays)


def test_hostile_pickle_whose_sums_could_leave_int32():
    rebuild, (version, fields, arrays) = pack(Weight(1, 2**20, zps=8)).__reduce__()
    with pytest.raises(ValueError, match="too large"):
        rebuild(version, {**fields, "zero_point": 16}, arrays)
    zps = np.zeros((1, 1, 32), np.int8)
    with pytest.raises(ValueError, match="too large"):
        rebuild(version, {**fields, "zero_point": None}, {**arrays, "zps": zps + np.int8(16)})
    zps[0, 0, 0] = 8  # columns beyond N do not count
    rebuild(version, {**fields, "zero_point": None}, {**arrays, "zps": zps})
