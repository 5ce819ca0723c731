"""prepack and unpack: what goes in comes out, in one layout."""

import ml_dtypes
import numpy as np
import pytest
from cases import (
    SOME,
    Weight,
    arrays,
    assert_gemm_exact,
    assert_same_bits,
    assert_same_weight,
    assert_unpacks_to,
    pack,
    packed_bytes,
    prepack,
    stored_arrays,
)

import pyda8w4

F32 = np.float32


some = pytest.mark.parametrize("weight", SOME, ids=str)


# ---- what goes in comes out --------------------------------------------------------------------


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


@pytest.mark.pitfall("general", "nibble order")
def test_products_follow_the_nibble_order(kernel):
    two = np.array([[0x21, 0x43]], np.uint8)
    a = np.array([[1, 10, 100, 0]], np.int8)
    assert pyda8w4.gemm(a, prepack(two, [0], nibbles="low_first")).tolist() == [[321]]
    assert pyda8w4.gemm(a, prepack(two, [0], nibbles="high_first")).tolist() == [[412]]


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


@pytest.mark.pitfall("torchao", "prepack changes the caller's 1-D scales, unsqueeze_")
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("writeable", [False, True])
def test_inputs_stay_as_they_are(dtype, writeable):
    codes, scales, zps = arrays(Weight(33, 64))
    codes = codes.astype(dtype) - dtype(8 if dtype is np.int8 else 0)
    scales, zps = scales[:, 0], zps[:, 0].astype(np.int64)
    given = tuple(array.copy() for array in (codes, scales, zps))
    before = [array.copy() for array in given]
    for array in given:
        array.flags.writeable = writeable
    pyda8w4.prepack(*given)
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


@pytest.mark.pitfall("torchao", "codes > 15 masked on AMX, corrupt neighbours elsewhere")
@pytest.mark.parametrize("dtype, bad", [(np.uint8, 16), (np.uint8, 255), (np.int8, 8), (np.int8, -9), (np.int8, -128)])
def test_codes_out_of_range_are_refused_wherever_they_are(dtype, bad):
    # Every place in a quad, a line, a block, a tail.
    n, k = 67, 263
    for row in (0, 15, 16, 31, 32, 63, 64, 66):
        for column in (0, 1, 2, 3, 4, 255, 256, 259, 260, 262):
            codes = np.zeros((n, k), dtype)
            codes[row, column] = bad
            with pytest.raises(ValueError, match="codes"):
                prepack(codes)


# ---- one layout --------------------------------------------------------------------------------


@pytest.mark.pitfall("torchao #4309, torchchat #512", "packed layout of the packing machine, wrong elsewhere")
def test_every_kernel_and_thread_count_packs_the_same_bytes(kernel, threads):
    weights = [Weight(1, 1), Weight(33, 70, 32), Weight(65, 600, 100, "bfloat16"), Weight(97, 2050, None, "float16", 3)]
    for weight in [*weights, Weight(97, 2050, 64, offsets=True)]:
        for count in (1, 3):
            pyda8w4.set_num_threads(count)
            packed = pyda8w4.prepack(*arrays(weight), group_size=weight.group_size)
            assert_same_weight(packed, pack(weight))


def test_a_weight_that_was_packed_under_another_kernel(kernel):
    assert_gemm_exact(SOME[4], 13)
    codes, scales, zps = arrays(SOME[4])
    assert_same_weight(pyda8w4.prepack(codes, scales, zps, group_size=100), pack(SOME[4]))


def test_packed_bytes_are_the_documented_ones():
    # Byte 4 * n + j of line q: w[n, 4q + j] in the low nibble, w[n + 16, 4q + j] in the high one.
    weight = Weight(40, 10, 4)
    codes, scales, zps = arrays(weight)
    padded = np.zeros((64, 12), np.uint8)
    padded[:40, :10] = codes
    lines = stored_arrays(pack(weight))["codes"]
    assert lines.shape == (2, 3, 64)
    for block in range(2):
        for quad in range(3):
            part = padded[32 * block : 32 * block + 32, 4 * quad : 4 * quad + 4]
            np.testing.assert_array_equal(lines[block, quad], (part[:16] | part[16:] << 4).reshape(-1))
    for name, source in (("scales", scales), ("zps", zps)):
        stored = np.zeros((64, 3), source.dtype)
        stored[:40] = source
        np.testing.assert_array_equal(stored_arrays(pack(weight))[name], stored.reshape(2, 32, 3).transpose(0, 2, 1))


def every_other(array):
    wide = np.full(tuple(2 * size for size in array.shape), 1, array.dtype)
    part = wide[tuple(slice(None, None, 2) for _ in array.shape)]
    part[...] = array
    return part


@pytest.mark.pitfall("onnxruntime #29163", "packed bytes cannot be hashed, uninitialized padding")
def test_packed_bytes_depend_on_the_values_alone():
    weights = [Weight(1, 1), Weight(33, 67, 32), Weight(40, 5, 4, "float16", 3), Weight(31, 513, 512, "bfloat16")]
    for weight in [*weights, Weight(33, 67, 32, offsets=True)]:
        first = packed_bytes(pack(weight))
        for change in (np.copy, every_other, np.asfortranarray):
            # Memory that was used before must not show through.
            dirty = [np.full(array.nbytes, 0xAB, np.uint8) for array in stored_arrays(pack(weight)).values()]
            del dirty
            packed = pyda8w4.prepack(*map(change, arrays(weight)), group_size=weight.group_size)
            assert packed_bytes(packed) == first


def test_padding_is_zero():
    packed = pack(Weight(33, 67, 32, offsets=True))
    codes, scales, sums, zps, offsets = (
        stored_arrays(packed)[name] for name in ("codes", "scales", "sums", "zps", "offsets")
    )
    # Of the second block only column 0 is real: byte 0..3 of each line, low nibble; the last line has 3 of 4 k.
    assert not codes[1, :, 4:].any() and not (codes[1] >> 4).any() and not codes[:, -1, 3::4].any()
    for array in (scales[1, :, 1:], sums[1, 1:], zps[1, :, 1:], offsets[1, :, 1:]):
        assert not array.any()
