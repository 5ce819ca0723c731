"""PackedExperts: what is stacked comes out, whole and in parts, from memory, files and pickles."""

import copy
import json
import pickle
import struct
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
from cases import (
    KINDS,
    SOME,
    Weight,
    address,
    assert_same_bits,
    assert_same_weight,
    bits,
    floats,
    given,
    pack,
    pack_each,
    pack_experts,
    stored_arrays,
)
from safetensors import safe_open

import pyda8w4

F32 = np.float32
COUNT = 3


@pytest.fixture(params=SOME + KINDS, ids=str)
def weight(request):
    return request.param


def assert_same_experts(actual: pyda8w4.PackedExperts, expected: list[pyda8w4.PackedWeight]) -> None:
    assert type(actual) is pyda8w4.PackedExperts
    assert actual.shape == (len(expected), *expected[0].shape)
    for one, other in zip(actual, expected, strict=True):
        assert_same_weight(one, other)


# ---- whole --------------------------------------------------------------------------------------


def test_experts_are_the_weights(weight):
    weights = pack_each(weight, COUNT)
    experts = pyda8w4.stack(weights)
    assert_same_experts(experts, weights)
    assert len(experts) == COUNT
    for i in range(-COUNT, COUNT):
        assert_same_weight(experts[i], weights[i])
    assert_same_weight(experts[np.int64(1)], weights[1])
    for name in ("bits", "group_size", "groups", "super_size", "scale_dtype", "sub_scale_dtype", "zero_point"):
        assert getattr(experts, name) == getattr(weights[0], name), name
    for name in ("sub_offset_dtype", "has_offsets"):
        assert getattr(experts, name) == getattr(weights[0], name), name
    assert experts.nbytes == sum(packed.nbytes for packed in weights)
    for name in ("table", "perm", "factors"):
        stacked = getattr(experts, name)
        if getattr(weights[0], name) is None:
            assert stacked is None
        else:
            assert_same_bits(stacked, np.stack([getattr(packed, name) for packed in weights]))
    x = floats(weight.k)[:3]
    for one, packed in zip(experts, weights, strict=True):
        assert_same_bits(pyda8w4.linear(x, one), pyda8w4.linear(x, packed))


def test_parts_are_views(weight):
    weights = pack_each(weight, COUNT)
    experts = pyda8w4.stack(weights)
    assert_same_experts(experts[1:], weights[1:])
    assert_same_experts(experts[:-1][1:2], weights[1:2])
    for part in (experts[1], experts[1:], experts[:][1]):
        for name, array in stored_arrays(part).items():
            whole = stored_arrays(experts)[name]
            assert address(array) == address(whole) + whole.nbytes // COUNT
            assert not array.flags.writeable


def test_a_part_outlives_the_whole():
    weights = pack_each(SOME[2], COUNT)
    part = pyda8w4.stack(weights)[2]
    assert_same_weight(part, weights[2])


def test_copies(weight):
    weights = pack_each(weight, COUNT)
    experts = pyda8w4.stack(weights)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert_same_experts(pickle.loads(pickle.dumps(experts, protocol)), weights)
    assert_same_experts(copy.deepcopy(experts), weights)
    assert_same_experts(pickle.loads(pickle.dumps(experts[1:])), weights[1:])
    assert_same_experts(pyda8w4.stack(experts), weights)


def test_is_immutable():
    experts = pyda8w4.stack([pack(SOME[2])])
    for name in ("shape", "group_size", "nbytes", "other"):
        with pytest.raises(AttributeError, match=f"a PackedExperts is immutable; cannot set '{name}'"):
            setattr(experts, name, 1)
    with pytest.raises(AttributeError):
        del experts.shape
    for array in stored_arrays(experts).values():
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    with pytest.raises(TypeError, match="stack"):
        pyda8w4.PackedExperts()


def test_repr():
    experts = pyda8w4.stack([pack(Weight(33, 70, 32, "float16", 8))] * 5)
    assert repr(experts) == (
        "PackedExperts(shape=(5, 33, 70), bits=4, group_size=32, scales=float16, zero_point=8, "
        f"nbytes={5 * pack(Weight(33, 70, 32, 'float16', 8)).nbytes})"
    )


def test_arrays_are_aligned(weight):
    for array in stored_arrays(pack_experts(weight, COUNT)).values():
        assert address(array) % 64 == 0


def test_other_indices_are_refused():
    experts = pyda8w4.stack([pack(SOME[2])] * COUNT)
    for index in (COUNT, -COUNT - 1, 2**70):
        with pytest.raises(IndexError, match="the expert must be -3 to 2"):
            experts[index]
    for index in (1.0, "1", True, None, [0], (0, 1)):
        with pytest.raises(TypeError, match="an int or a slice"):
            experts[index]
    for part in (slice(1, 1), slice(2, 1), slice(None, None, 2), slice(None, None, -1), slice(5, 9)):
        with pytest.raises(ValueError, match="slice must be non-empty with step 1"):
            experts[part]


# ---- what differs -------------------------------------------------------------------------------

LIKE = Weight(65, 100, 32, "float16", 8)
DIFFERENT = [
    replace(LIKE, scales="float32"),
    replace(LIKE, scales="bfloat16"),
    replace(LIKE, zps=3),
    replace(LIKE, zps="random"),
    replace(LIKE, offsets=True),
    replace(LIKE, scales="bfloat16", offsets=True, zps="extreme"),
]


@pytest.mark.parametrize("weight", DIFFERENT, ids=str)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_formats_are_unified(weight, place):
    # As concat does it: so the parts of what is joined are what experts are.
    weights = [pack(LIKE)] * 4
    weights[place] = pack(weight)
    experts = pyda8w4.stack(weights)
    joined = pyda8w4.concat([pack(LIKE)[:64], pack(weight)[:64]])
    for name in ("scale_dtype", "zero_point", "has_offsets"):
        assert getattr(experts, name) == getattr(joined, name), name
    x = floats(LIKE.k)[:5]
    for one, packed in zip(experts, weights, strict=True):
        np.testing.assert_array_equal(one.dequantize(), packed.dequantize())
        for act in ("uint8", "int8_group", "int16"):
            assert_same_bits(pyda8w4.linear(x, one, act=act), pyda8w4.linear(x, packed, act=act))
        if one.zero_point is None:  # those beyond N are zero, as packing leaves them
            assert not stored_arrays(one)["zps"][-1, :, 1:].any()


def test_formats_are_unified_at_several_places():
    weights = [pack(LIKE), *map(pack, DIFFERENT), pack(LIKE)]
    experts = pyda8w4.stack(weights)
    assert (experts.scale_dtype, experts.zero_point, experts.has_offsets) == ("float32", None, True)
    for one, packed in zip(experts, weights, strict=True):
        np.testing.assert_array_equal(one.dequantize(), packed.dequantize())
    assert experts.nbytes == sum(array.nbytes for array in stored_arrays(experts).values())


def test_sub_offsets_come_with_offsets():
    weights = [pack(Weight(33, 70, 8, "float16", 0, offsets, supers=2)) for offsets in (False, True)]
    for pair in (weights, weights[::-1]):
        experts = pyda8w4.stack(pair)
        assert experts.sub_offset_dtype == "int8"
        for one, packed in zip(experts, pair, strict=True):
            np.testing.assert_array_equal(one.dequantize(), packed.dequantize())


@pytest.mark.parametrize(
    "other, text",
    [
        (replace(LIKE, n=97), r"shape \(65, 100\) like weights\[0\], got \(97, 100\)"),
        (replace(LIKE, k=96), r"shape"),
        (replace(LIKE, group=16), "group_size = 32 .* got 16"),
        (replace(LIKE, bits=5), "bits = 4 .* got 5"),
        (replace(LIKE, table=True, zps=0), "has_table = False .* got True"),
        (replace(LIKE, supers=2), "super_size = 0 .* got 2"),
        (replace(LIKE, perm=True), "has_perm = False .* got True"),
        (replace(LIKE, factors=True), "has_factors = False .* got True"),
        (replace(LIKE, rotation=4), "rotation = 0 .* got 4"),
    ],
    ids=str,
)
def test_other_kinds_are_refused(other, text):
    with pytest.raises(ValueError, match=rf"weights\[2\] must have {text}"):
        pyda8w4.stack([pack(LIKE), pack(LIKE), pack(other)])


# ---- weights that are made one after another ----------------------------------------------------


class Lazy:
    """A sequence that makes each weight when it is wanted, and knows that the last is gone."""

    def __init__(self, weights, length=None):
        self.weights, self.length = weights, length

    def __len__(self):
        return len(self.weights) if self.length is None else self.length

    def __iter__(self):
        for weight in self.weights:
            packed = pyda8w4.prepack(**given(weight), **weight.options)
            codes = stored_arrays(packed)["codes"]
            yield packed
            del packed
            assert sys.getrefcount(codes) == 2  # of this frame, and of the call


def test_any_iterable_with_a_length():
    weights = [LIKE, *DIFFERENT]
    expected = pyda8w4.stack([pack(weight) for weight in weights])
    assert_same_experts(pyda8w4.stack(Lazy(weights)), list(expected))
    assert_same_experts(pyda8w4.stack({i: pack(weight) for i, weight in enumerate(weights)}.values()), list(expected))
    assert_same_experts(pyda8w4.stack(tuple(expected)), list(expected))


@pytest.mark.parametrize("length", [1, 3])
def test_a_length_that_is_wrong_is_refused(length):
    with pytest.raises(ValueError, match=f"weights must have the length {length} that they say, got"):
        pyda8w4.stack(Lazy([LIKE, LIKE], length))


# ---- shards -------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "weight",
    [Weight(96, 128, 32, "float16", bits=5, offsets=True), Weight(66, 64, 16, "bfloat16", factors=True)],
    ids=str,
)
def test_shards(weight, axis):
    weights = pack_each(weight, COUNT)
    experts = pyda8w4.stack(weights)
    for index in range(2):
        shard = experts.shard(index, 2, axis)
        assert_same_experts(shard, [packed.shard(index, 2, axis) for packed in weights])


def test_shards_that_cannot_be_are_refused():
    experts = pyda8w4.stack([pack(Weight(33, 70, 32))])
    for arguments, error in [((0, 2, 0), ValueError), ((2, 2, 0), ValueError), ((0, 1, 2), ValueError)]:
        with pytest.raises(error):
            experts.shard(*arguments)
    with pytest.raises(TypeError):
        experts.shard(0.0, 1, 0)


# ---- files --------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


def test_save_and_load(path):
    weights = {str(weight): pack_each(weight, COUNT) for weight in SOME + KINDS}
    saved = {}
    for name, several in weights.items():
        saved[name] = pyda8w4.stack(several)
        saved[f"one of {name}"] = several[0]
    pyda8w4.save(path, saved)
    for verify in (True, False):
        loaded = pyda8w4.load(path, verify=verify)
        assert list(loaded) == list(saved)
        for name, several in weights.items():
            assert_same_experts(loaded[name], several)
            assert_same_weight(loaded[f"one of {name}"], several[0])
    for found in loaded.values():
        for array in stored_arrays(found).values():
            chain = [array]
            while chain[-1] is not None and hasattr(chain[-1], "base"):
                chain.append(chain[-1].base)
            assert any(isinstance(base, np.memmap) for base in chain)
            assert array.nbytes % 64 or address(array) % 64 == 0
    part = loaded[str(SOME[2])][1:]
    pyda8w4.save(path, {"part": part})
    assert_same_experts(pyda8w4.load(path)["part"], weights[str(SOME[2])][1:])


def test_safetensors_reads_the_file(path):
    weight = Weight(33, 70, 32, "float16", 8, perm=True)
    experts = pack_experts(weight, COUNT)
    pyda8w4.save(path, {"e": experts})
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == {f"e.{part}" for part in ("codes", "scales", "sums", "perm")}
        for part, array in stored_arrays(experts).items():
            assert array.shape[0] == COUNT
            assert_same_bits(file.get_tensor(f"e.{part}"), array)
        described = json.loads(file.metadata()["weights"])["e"]
    assert described.pop("crc32").keys() == stored_arrays(experts).keys()
    assert described == {"shape": [3, 33, 70], "bits": 4, "group_size": 32, "zero_point": 8, "perm": True}


def parts_of(file):
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(file, header, data):
    metadata = header["__metadata__"]
    metadata["weights_crc32"] = str(zlib.crc32(metadata["weights"].encode()))
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    "shape",
    [
        [2, 33, 70], [4, 33, 70], [0, 33, 70], [-3, 33, 70], [True, 33, 70], [3.0, 33, 70], [None, 33, 70],
        ["3", 33, 70], [33, 70], [3, 1, 33, 70], [3, 65, 70], [2**70, 33, 70], [3], [],
    ],
    ids=str,
)  # fmt: skip
def test_a_description_that_fits_no_experts_is_refused(path, shape):
    pyda8w4.save(path, {"e": pack_experts(Weight(33, 70, 32), COUNT)})
    header, data = parts_of(path)
    weights = json.loads(header["__metadata__"]["weights"])
    weights["e"]["shape"] = shape
    header["__metadata__"]["weights"] = json.dumps(weights)
    write(path, header, data)
    with pytest.raises(ValueError, match=str(path)):
        pyda8w4.load(path)


def test_a_number_of_experts_is_one(path):
    pyda8w4.save(path, {"w": pack(Weight(33, 70, 32))})
    header, data = parts_of(path)
    weights = header["__metadata__"]["weights"]
    header["__metadata__"]["weights"] = weights.replace("[33, 70]", "[null, 33, 70]")
    write(path, header, data)
    with pytest.raises(ValueError, match=r"w must have a shape \[N, K\] or \[E, N, K\], got \[None, 33, 70\]"):
        pyda8w4.load(path)


def test_numbers_that_could_lead_kernels_astray_are_refused(path):
    # In the arrays of the last expert only.
    weight = Weight(33, 70, 32, perm=True, factors=True)
    pyda8w4.save(path, {"e": pack_experts(weight, COUNT)})
    header, data = parts_of(path)
    for name, wrong in (("perm", 70), ("perm", -1), ("factors", 0x7FC00000)):
        end = header[f"e.{name}"]["data_offsets"][1]
        changed = data[: end - 4] + struct.pack("<I", wrong & 0xFFFFFFFF) + data[end:]
        path.write_bytes(b"")
        write(path, header, changed)
        with pytest.raises(ValueError, match=rf"e\.{name} must"):
            pyda8w4.load(path, verify=False)
        with pytest.raises(ValueError, match=rf"e\.{name} is damaged"):
            pyda8w4.load(path)


def test_zero_points_that_could_overflow_are_refused():
    # 32767 inputs in a group: zero points near the codes only.
    weight = Weight(33, 200_000, None, zps="random")
    experts = pyda8w4.stack([pack(weight)] * 2)
    fields, arrays = experts._pickled()[1:]
    arrays["zps"] = arrays["zps"].copy()
    arrays["zps"][1, 0, 0, 0] = -128
    with pytest.raises(ValueError, match="too large for a group_size"):
        rebuild(fields, arrays)


def rebuild(fields, arrays, version=2):
    function = pyda8w4.stack([pack(SOME[2])]).__reduce__()[0]
    return function(version, fields, arrays)


def test_pickles_are_checked():
    experts = pyda8w4.stack(pack_each(SOME[2], COUNT))
    fields, arrays = experts._pickled()[1:]
    assert_same_experts(rebuild(fields, arrays), list(experts))
    one, one_arrays = pack(SOME[2])._pickled()[1:]
    for changed in ({"experts": 2}, {"experts": None}, {"experts": 0}, {"experts": True}, {"experts": 3.0}):
        with pytest.raises(ValueError, match="must be"):
            rebuild({**fields, **changed}, arrays)
    with pytest.raises(ValueError, match="experts must be an int"):
        rebuild(one, one_arrays)
    with pytest.raises(ValueError, match="experts must be None"):
        pack(SOME[2]).__reduce__()[0](2, fields, arrays)
    with pytest.raises(ValueError, match="layout_version"):
        rebuild(fields, arrays, 3)
    with pytest.raises(ValueError, match="codes must be"):
        rebuild(fields, {**arrays, "codes": arrays["codes"][:2]})


# ---- arguments ----------------------------------------------------------------------------------


def test_what_is_no_sequence_of_weights_is_refused():
    packed = pack(SOME[2])
    for weights in (
        None,
        3,
        packed,
        iter([packed]),
        [None],
        [packed, 0],
        [pyda8w4.stack([packed])],
        {"a": packed},
        "a",
    ):
        with pytest.raises(TypeError, match="weights"):
            pyda8w4.stack(weights)
    for weights in ([], {}, np.zeros((0, 3))):
        with pytest.raises(ValueError, match="weights must hold at least one PackedWeight"):
            pyda8w4.stack(weights)


def test_experts_are_no_weight(path):
    experts = pyda8w4.stack([pack(SOME[2])])
    with pytest.raises(TypeError, match="packed must be a PackedWeight, got PackedExperts"):
        pyda8w4.linear(floats(70)[:2], experts)
    with pytest.raises(TypeError, match=r"weights\[0\] must be a PackedWeight, got PackedExperts"):
        pyda8w4.concat([experts])
    with pytest.raises(TypeError, match="weights must map str to PackedWeight or PackedExperts, got str to list"):
        pyda8w4.save(path, {"a": experts, "b": [pack(SOME[2])]})
    assert bits(experts[0].dequantize()).any()
