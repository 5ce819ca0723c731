"""PackedWeight: what goes in comes out, in every way it can travel."""

import copy
import json
import pickle
import re
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cases import (
    Weight,
    arrays,
    assert_gemm_exact,
    assert_same_bits,
    assert_same_weight,
    floats,
    pack,
)
from safetensors import safe_open

import pyda8w4

SOME = [
    Weight(1, 1),
    Weight(31, 5),
    Weight(33, 70, 32, "float16"),
    Weight(64, 64, 16, "bfloat16", "extreme"),
    Weight(65, 259, 100, zps=8),
    Weight(97, 520, 256, zps=-128),
    Weight(33, 70, 32, "float16", offsets=True),
    Weight(97, 130, 64, "bfloat16", 0, offsets=True),
]
some = pytest.mark.parametrize("weight", SOME, ids=str)


def assert_unpacks_to(packed, codes, scales, zps, *offsets):
    got = packed.unpack()
    assert [array.dtype for array in got] == [np.uint8, np.float32, np.int8, np.float32][: 3 + len(offsets)]
    np.testing.assert_array_equal(got[0], codes)
    assert_same_bits(got[1], scales.astype(np.float32))
    np.testing.assert_array_equal(got[2], zps)
    assert packed.has_offsets == bool(offsets)
    for array, given in zip(got[3:], offsets, strict=True):
        assert_same_bits(array, given.astype(np.float32))
    assert_same_weight(pyda8w4.prepack(*got, group_size=packed.group_size), packed)


# ---- unpack ----------------------------------------------------------------------------------


@some
def test_unpack_gives_back_unsigned_codes(weight):
    assert_unpacks_to(pack(weight), *arrays(weight))


@pytest.mark.parametrize("n, k, group", [(1, 1, 1), (33, 7, 4), (40, 64, 32), (5, 600, 600)])
@pytest.mark.parametrize("zps", ["random", "extreme", 0, -136, 119])
def test_unpack_gives_signed_codes_8_higher(n, k, group, zps):
    rng = np.random.default_rng(n)
    groups = -(-k // group)
    codes = rng.integers(-8, 8, (n, k), np.int8)
    scales = rng.standard_normal((n, groups), np.float32)
    if zps == "random":
        zps = rng.integers(-8, 8, (n, groups), np.int8)
    elif zps == "extreme":
        zps = rng.choice(np.array([-128, 119], np.int16), (n, groups))
    else:
        zps = np.full((n, groups), zps, np.int16)
    packed = pyda8w4.prepack(codes, scales, zps, group_size=group)
    assert_unpacks_to(packed, (codes + 8).astype(np.uint8), scales, zps.astype(int) + 8)


def test_zps_default_to_8_and_for_signed_codes_to_0():
    codes, scales, _ = arrays(Weight(33, 70, 32))
    unsigned = pyda8w4.prepack(codes, scales, group_size=32)
    assert unsigned.zero_point == 8
    signed = pyda8w4.prepack(codes.astype(np.int8) - np.int8(8), scales, group_size=32)
    assert_same_weight(signed, unsigned)


@pytest.mark.parametrize("nibbles", ["low_first", "high_first"])
@pytest.mark.parametrize("k", [2, 6, 70, 600])
def test_nibbles(nibbles, k):
    weight = Weight(33, k, 4)
    codes, scales, zps = arrays(weight)
    even, odd = codes[:, ::2], codes[:, 1::2]
    two = even | odd << 4 if nibbles == "low_first" else odd | even << 4
    packed = pyda8w4.prepack(two, scales, zps, group_size=weight.group_size, nibbles=nibbles)
    assert packed.shape == (33, k)
    assert_same_weight(packed, pack(weight))


def test_ml_dtypes():
    codes, scales, zps = arrays(Weight(33, 64, 32))
    expected = pack(Weight(33, 64, 32))
    assert_same_weight(pyda8w4.prepack(codes.astype(ml_dtypes.uint4), scales, zps), expected)
    signed = (codes.astype(np.int8) - 8).astype(ml_dtypes.int4)
    assert_same_weight(pyda8w4.prepack(signed, scales, zps - np.int8(8)), expected)


def test_scales_are_stored_in_the_smallest_exact_type():
    codes = np.zeros((3, 8), np.uint8)

    def stored(*scales):
        packed = pyda8w4.prepack(codes, np.array(scales, np.float32))
        assert_unpacks_to(packed, codes, np.array(scales, np.float32)[:, None], np.full((3, 1), 8))
        return packed.scale_dtype

    assert stored(1, -0.0, 2.0**-24) == "float16"
    assert stored(65504, -65504, 0) == "float16"
    assert stored(1, 1, 65536) == "bfloat16"
    assert stored(1, 1, 2.0**-25) == "bfloat16"
    assert stored(1, 1, 2.0**-133) == "bfloat16"
    assert stored(1, 1 + 2.0**-10, 1) == "float16"
    assert stored(1, 1 + 2.0**-10, 65536) == "float32"
    assert stored(1, 1 + 2.0**-8, 65536) == "float32"
    assert stored(1, 1 + 2.0**-7, 65536) == "bfloat16"
    assert stored(1, 1, np.nextafter(np.float32(1), np.float32(2))) == "float32"
    assert stored(1, 1, 1e-45) == "float32"


def test_offsets_are_stored_in_the_type_of_the_scales():
    codes, zps = np.zeros((3, 8), np.uint8), np.full((3, 1), 8)

    def stored(scale, *offsets):
        scales, offsets = np.full((3, 1), scale, np.float32), np.array(offsets, np.float32)
        packed = pyda8w4.prepack(codes, scales, None, offsets)
        assert_unpacks_to(packed, codes, scales, zps, offsets[:, None])
        return packed.scale_dtype

    assert stored(1, 1, -0.0, 2.0**-24) == "float16"
    assert stored(65536, 1, 1, 1) == "bfloat16"
    assert stored(1, 1, 1, 65536) == "bfloat16"
    assert stored(1 + 2.0**-10, 65536, 1, 1) == "float32"
    assert stored(65536, 1, 1, 1 + 2.0**-10) == "float32"
    assert stored(1, 0, 0, 1e-45) == "float32"


def test_group_size_follows_from_the_shapes():
    def group_of(k, groups, **given):
        return pyda8w4.prepack(np.zeros((2, k), np.uint8), np.ones((2, groups), np.float32), **given).group_size

    assert group_of(100, 1) == 100
    assert group_of(7, 1) == 7
    assert group_of(100, 5) == 20
    assert group_of(100, 4, group_size=32) == 32
    assert group_of(100, 1, group_size=4096) == 100
    # The last group is shorter; 12 is the only multiple of 4 that makes 6 groups of 70, and 4 makes 25 of 98.
    assert group_of(70, 6) == 12
    assert group_of(98, 25) == 4


@pytest.mark.parametrize("k, groups, given", [(100, 3, None), (70, 2, None), (70, 20, None), (100, 3, 32), (6, 2, 3)])
def test_group_size_that_does_not_follow(k, groups, given):
    with pytest.raises(ValueError, match="group"):
        pyda8w4.prepack(np.zeros((2, k), np.uint8), np.ones((2, groups), np.float32), group_size=given)


# ---- immutability ----------------------------------------------------------------------------


def test_is_immutable():
    packed = pack(SOME[2])
    for name in ("shape", "group_size", "scale_dtype", "zero_point", "nbytes", "other"):
        with pytest.raises(AttributeError):
            setattr(packed, name, 1)
    with pytest.raises(AttributeError):
        del packed.shape
    for array in packed._arrays.values():
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    with pytest.raises(TypeError, match="prepack"):
        pyda8w4.PackedWeight()


def test_repr_and_nbytes():
    packed = pack(Weight(33, 70, 32, "float16"))
    # 2 blocks of 18 lines; 2 x 3 groups of 32 scales and zero points; 2 x 32 sums.
    assert packed.nbytes == 2 * 18 * 64 + 2 * 3 * 32 * (2 + 1) + 2 * 32 * 4
    assert repr(packed) == (
        f"PackedWeight(shape=(33, 70), group_size=32, scales=float16, zero_point=per group, nbytes={packed.nbytes})"
    )
    assert packed.groups == 3
    assert "zero_point=8" in repr(pack(SOME[4]))
    more = pack(Weight(33, 70, 32, "float16", offsets=True))
    assert more.nbytes == packed.nbytes + 2 * 3 * 32 * 2
    assert "scales=float16, offsets=float16, zero_point=per group" in repr(more)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_inputs_stay_as_they_are(dtype):
    codes, scales, zps = arrays(Weight(33, 64))  # read-only
    codes = codes.astype(dtype) - dtype(8 if dtype is np.int8 else 0)
    scales, zps = scales[:, 0], zps[:, 0].astype(np.int64)
    given = (codes, scales, zps)
    before = [array.copy() for array in given]
    for array in given:
        array.flags.writeable = False
    pyda8w4.prepack(codes, scales, zps)
    for array, was in zip(given, before, strict=True):
        assert array.shape == was.shape
        assert_same_bits(array, was)


def test_does_not_keep_its_inputs():
    codes, scales, zps = (array.copy() for array in arrays(SOME[2]))
    packed = pyda8w4.prepack(codes, scales, zps, group_size=32)
    codes[...], scales[...], zps[...] = 0, 0, 0
    assert_same_weight(packed, pack(SOME[2]))


def test_unpack_gives_arrays_of_its_own():
    packed = pack(SOME[2])
    for array in packed.unpack():
        array[...] = 0
    assert_unpacks_to(packed, *arrays(SOME[2]))


# ---- memory ----------------------------------------------------------------------------------


def address(array):
    return array.__array_interface__["data"][0]


@some
def test_arrays_are_aligned_to_64_bytes(weight):
    for array in pack(weight)._arrays.values():
        assert address(array) % 64 == 0


def test_large_weights_are_aligned_to_huge_pages():
    codes = np.zeros((1024, 4096), np.uint8)
    packed = pyda8w4.prepack(codes, np.ones((1024, 32), np.float32))
    assert address(packed._arrays["codes"]) % 2**21 == 0
    again = pickle.loads(pickle.dumps(packed))
    assert address(again._arrays["codes"]) % 2**21 == 0


def test_small_weights_share_huge_pages():
    packed = pyda8w4.prepack(np.zeros((256, 1024), np.uint8), np.ones((256, 8), np.float32))
    start = address(packed._arrays["codes"])
    regions = re.findall(r"^(\w+)-(\w+) [^$]*?^VmFlags: (.*)", Path("/proc/self/smaps").read_text(), re.M)
    (flags,) = [flags.split() for low, high, flags in regions if int(low, 16) <= start < int(high, 16)]
    assert "hg" in flags  # asked for; granting is up to the system


# ---- copies ----------------------------------------------------------------------------------


@some
def test_pickle(weight):
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(pack(weight), protocol))
        assert_same_weight(again, pack(weight))
        for array in again._arrays.values():
            assert not array.flags.writeable and address(array) % 64 == 0
    y = pyda8w4.linear(floats(weight.k)[:9], again)
    assert_same_bits(y, pyda8w4.linear(floats(weight.k)[:9], pack(weight)))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies(duplicate):
    for weight in SOME:
        assert_same_weight(duplicate(pack(weight)), pack(weight))


# ---- concat and slices -----------------------------------------------------------------------


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
        for name, array in part._arrays.items():
            assert np.shares_memory(array, packed._arrays[name])
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


# ---- files -----------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


def test_save_and_load(path):
    weights = {str(i): pack(weight) for i, weight in enumerate(SOME)}
    pyda8w4.save(path, weights)
    loaded = pyda8w4.load(path)
    assert list(loaded) == list(weights)
    for name, weight in zip(weights, SOME, strict=True):
        assert_same_weight(loaded[name], weights[name])
        assert_unpacks_to(loaded[name], *arrays(weight))
        x = floats(weight.k)[:13]
        assert_same_bits(pyda8w4.linear(x, loaded[name]), pyda8w4.linear(x, pack(weight)))


def test_scale_dtypes_survive_a_file(path):
    for scales in ("float32", "float16", "bfloat16"):
        pyda8w4.save(str(path), {"w": pack(Weight(33, 70, 32, scales))})
        loaded = pyda8w4.load(str(path))["w"]
        assert loaded.scale_dtype == scales
        assert_same_weight(loaded, pack(Weight(33, 70, 32, scales)))


def test_no_weights(path):
    pyda8w4.save(path, {})
    assert pyda8w4.load(path) == {}


def test_odd_names(path):
    weights = {
        "": pack(SOME[0]),
        "model.layers.0.q\N{LATIN SMALL LETTER E WITH ACUTE}": pack(SOME[1]),
        '"': pack(SOME[2]),
    }
    pyda8w4.save(path, weights)
    for name, loaded in pyda8w4.load(path).items():
        assert_same_weight(loaded, weights[name])


def test_loaded_arrays_are_mapped_and_aligned(path):
    pyda8w4.save(path, {str(i): pack(weight) for i, weight in enumerate(SOME)})
    for weight in pyda8w4.load(path).values():
        for name, array in weight._arrays.items():
            chain = [array]
            while chain[-1] is not None and hasattr(chain[-1], "base"):
                chain.append(chain[-1].base)
            assert any(isinstance(base, np.memmap) for base in chain), name
            assert address(array) % (1 if name == "zps" else 64) == 0, name
            assert not array.flags.writeable


def test_a_loaded_weight_outlives_its_file(path):
    pyda8w4.save(path, {"w": pack(SOME[2])})
    loaded = pyda8w4.load(path)["w"]
    path.unlink()
    assert_same_weight(loaded, pack(SOME[2]))
    assert_same_weight(pickle.loads(pickle.dumps(loaded)), pack(SOME[2]))


def test_saving_over_a_loaded_file_leaves_the_loaded_weight_alone(path):
    pyda8w4.save(path, {"w": pack(SOME[2])})
    loaded = pyda8w4.load(path)["w"]
    pyda8w4.save(path, {"w": pack(SOME[3])})
    assert_same_weight(loaded, pack(SOME[2]))
    assert_same_weight(pyda8w4.load(path)["w"], pack(SOME[3]))
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_file(path):
    pyda8w4.save(path, {"w": pack(SOME[2])})
    with pytest.raises(TypeError, match="weights"):
        pyda8w4.save(path, {"w": pack(SOME[3]), "v": None})
    assert_same_weight(pyda8w4.load(path)["w"], pack(SOME[2]))
    folder = path.parent / "folder"
    folder.mkdir()
    with pytest.raises(OSError):
        pyda8w4.save(folder, {"w": pack(SOME[2])})
    assert sorted(path.parent.iterdir()) == [folder, path]


def test_safetensors_reads_the_file(path):
    weight = pack(Weight(33, 70, 32, "float16", offsets=True))
    pyda8w4.save(path, {"w": weight})
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == {"w.codes", "w.scales", "w.sums", "w.zps", "w.offsets"}
        assert file.metadata()["layout"] == "da8w4-n32k4"
        for part, array in weight._arrays.items():
            assert_same_bits(file.get_tensor(f"w.{part}"), array)


def test_a_sliced_weight_saves_its_slice(path):
    weight = pack(Weight(97, 70, 32))
    pyda8w4.save(path, {"w": weight[32:]})
    assert_same_weight(pyda8w4.load(path)["w"], weight[32:])


def test_safetensors_metadata_describes_the_weights(path):
    pyda8w4.save(path, {"w": pack(SOME[4])})
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    described = json.loads(metadata["weights"])
    types = {"codes": b"U8", "scales": b"F32", "sums": b"F32"}
    crc32 = {part: zlib.crc32(types[part] + array.tobytes()) for part, array in pack(SOME[4])._arrays.items()}
    assert described == {"w": {"shape": [65, 259], "group_size": 100, "zero_point": 8, "crc32": crc32}}
    assert metadata["weights_crc32"] == str(zlib.crc32(metadata["weights"].encode()))
    assert (8 + length) % 64 == 0
    pyda8w4.save(path, {"w": pack(SOME[6])})
    assert b'\\"zero_point\\": null, \\"offsets\\": true' in path.read_bytes()


def test_a_weight_that_was_packed_under_another_kernel(kernel):
    assert_gemm_exact(SOME[4], 13)
    codes, scales, zps = arrays(SOME[4])
    assert_same_weight(pyda8w4.prepack(codes, scales, zps, group_size=100), pack(SOME[4]))


def test_save_to_one_path_from_several_threads(tmp_path):
    path = tmp_path / "weights.safetensors"
    packed = pyda8w4.prepack(np.zeros((32, 64), np.uint8), np.ones(32, np.float32))
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(pyda8w4.save, path, {"a": packed}) for _ in range(40)]:
            done.result()
    assert pyda8w4.load(path)["a"].shape == (32, 64)
    assert list(tmp_path.iterdir()) == [path]


def test_save_refuses_a_name_that_utf8_cannot_hold(tmp_path):
    packed = pyda8w4.prepack(np.zeros((32, 64), np.uint8), np.ones(32, np.float32))
    with pytest.raises(ValueError, match="weights must have names"):
        pyda8w4.save(tmp_path / "weights.safetensors", {"\ud800": packed})
    assert not list(tmp_path.iterdir())


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
        {"version": 2},
    ],
)
def test_hostile_pickle(change):
    rebuild, (version, fields, arrays) = pack(Weight(33, 70, 32, offsets=True)).__reduce__()
    rebuild(version, fields, arrays)
    version, array_changes = change.pop("version", version), change.pop("arrays", {})
    arrays = {name: array for name, array in {**arrays, **array_changes}.items() if array is not None}
    with pytest.raises((TypeError, ValueError)):
        rebuild(version, {**fields, **change}, arrays)


def test_hostile_pickle_whose_sums_could_leave_int32():
    rebuild, (version, fields, arrays) = pack(Weight(1, 2**20, zps=8)).__reduce__()
    with pytest.raises(ValueError, match="too large"):
        rebuild(version, {**fields, "zero_point": 16}, arrays)
    zps = np.zeros((1, 1, 32), np.int8)
    with pytest.raises(ValueError, match="too large"):
        rebuild(version, {**fields, "zero_point": None}, {**arrays, "zps": zps + np.int8(16)})
    zps[0, 0, 0] = 8  # columns beyond N do not count
    rebuild(version, {**fields, "zero_point": None}, {**arrays, "zps": zps})
