"""Files: what is saved is loaded; what is damaged is refused."""

import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cases import (
    KINDS,
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
    with_stored,
)
from safetensors import safe_open

import pyda8w4

F32 = np.float32


# ---- save and load -----------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


def test_save_and_load(path):
    weights = {str(i): pack(weight) for i, weight in enumerate(SOME + KINDS)}
    pyda8w4.save(path, weights)
    loaded = pyda8w4.load(path)
    assert list(loaded) == list(weights)
    for name, weight in zip(weights, SOME + KINDS, strict=True):
        assert_same_weight(loaded[name], weights[name])
        if not weight.supers:
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
    pyda8w4.save(path, {str(i): pack(weight) for i, weight in enumerate(SOME + KINDS)})
    for weight in pyda8w4.load(path).values():
        for name, array in stored_arrays(weight).items():
            chain = [array]
            while chain[-1] is not None and hasattr(chain[-1], "base"):
                chain.append(chain[-1].base)
            assert any(isinstance(base, np.memmap) for base in chain), name
            assert array.nbytes % 64 or address(array) % 64 == 0, name
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
    weight = pack(Weight(33, 70, 32, "float16", bits=5, offsets=True, supers=2, perm=True, factors=True))
    pyda8w4.save(path, {"w": weight})
    parts = "codes", "scales", "sums", "zps", "offsets", "sub_scales", "sub_offsets", "perm", "factors"
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == {f"w.{part}" for part in parts}
        assert file.metadata()["layout"] == "da8w4-n32k4"
        for part, array in stored_arrays(weight).items():
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
    crc32 = {part: zlib.crc32(types[part] + array.tobytes()) for part, array in stored_arrays(pack(SOME[4])).items()}
    assert described == {"w": {"shape": [65, 259], "bits": 4, "group_size": 100, "zero_point": 8, "crc32": crc32}}
    assert metadata["weights_crc32"] == str(zlib.crc32(metadata["weights"].encode()))
    assert (8 + length) % 64 == 0
    pyda8w4.save(path, {"w": pack(SOME[6])})
    assert b'\\"zero_point\\": null, \\"offsets\\": true' in path.read_bytes()


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


# ---- damaged files -----------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.safetensors"
    pyda8w4.save(path, {"a": pack(Weight(33, 70, 32)), "b": pack(Weight(65, 64, 16, "bfloat16", 3, True))})
    return path


def parts_of(file):
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(file, header, data):
    """With the checksum of the description made right, so that what lies behind it is reached."""
    metadata = header["__metadata__"]
    metadata["weights_crc32"] = str(zlib.crc32(metadata["weights"].encode()))
    write_as_it_is(file, header, data)


def write_as_it_is(file, header, data):
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_a_file_that_is_written_again_loads(file):
    write(file, *parts_of(file))
    weights = pyda8w4.load(file)
    assert_same_weight(weights["a"], pack(Weight(33, 70, 32)))
    assert_same_weight(weights["b"], pack(Weight(65, 64, 16, "bfloat16", 3, True)))


@pytest.mark.parametrize("pad", [1, 2, 4])
def test_misaligned_tensors_are_copied(file, pad):
    header, data = parts_of(file)
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [pad + offset for offset in entry["data_offsets"]]
    header["pad"] = {"dtype": "U8", "shape": [pad], "data_offsets": [0, pad]}
    write(file, header, bytes(pad) + data)
    weights = pyda8w4.load(file)
    assert_same_weight(weights["a"], pack(Weight(33, 70, 32)))
    assert_same_weight(weights["b"], pack(Weight(65, 64, 16, "bfloat16", 3, True)))
    assert all(array.flags.aligned for packed in weights.values() for array in stored_arrays(packed).values())


@pytest.mark.pitfall("general", "truncated file")
def test_a_truncated_file_is_refused(file):
    whole = file.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, 500, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="safetensors"):
            pyda8w4.load(file)
    file.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="safetensors"):
        pyda8w4.load(file)


@pytest.mark.pitfall("general", "hostile header")
@pytest.mark.parametrize(
    "content", [b"text", b"\x00" * 64, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]"]
)
def test_another_kind_of_file_is_refused(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="file"):
        pyda8w4.load(path)


@pytest.mark.pitfall("torchao #1117, #1389", "packing changed, old files load wrong")
@pytest.mark.parametrize(
    "metadata",
    [
        {"layout_version": "3"},
        {"layout_version": 2},
        {"layout_version": "0"},
        {"layout_version": ""},
        {"layout": "da8w4-n64k4"},
    ],
    ids=str,
)
def test_another_layout_or_version_is_refused(file, metadata):
    header, data = parts_of(file)
    header["__metadata__"].update(metadata)
    write(file, header, data)
    with pytest.raises(ValueError, match=f"must hold layout .*{next(iter(metadata.values()))}"):
        pyda8w4.load(file)
    for name in ("layout", "layout_version"):
        header["__metadata__"].pop(name)
        write(file, header, data)
        with pytest.raises(ValueError, match="must hold layout"):
            pyda8w4.load(file)


@pytest.mark.pitfall("general", "hostile header")
@pytest.mark.parametrize(
    "offsets",
    [
        lambda begin, end: [begin + 1, end + 1],
        lambda begin, end: [begin, end + 64],
        lambda begin, end: [begin, end - 1],
        lambda begin, end: [begin - 64, end - 64],
        lambda begin, end: [end, begin],
        lambda begin, end: [begin, end, end],
        lambda begin, end: [float(begin), end],
        lambda begin, end: [begin, 2**70],
        lambda begin, end: [-1, end],
        lambda begin, end: str(begin),
        lambda begin, end: None,
    ],
)
def test_tensors_that_do_not_follow_each_other_are_refused(file, offsets):
    # Beyond the end, over each other, or with gaps between.
    header, data = parts_of(file)
    for name in ("a.codes", "b.offsets", "a.zps"):
        wrong = {**header[name], "data_offsets": offsets(*header[name]["data_offsets"])}
        write(file, {**header, name: wrong}, data)
        with pytest.raises(ValueError, match=str(file)):
            pyda8w4.load(file, verify=False)


@pytest.mark.pitfall("general", "hostile header")
@pytest.mark.parametrize("where", ["header", "weights", "weight"])
def test_a_name_that_comes_twice_is_refused(file, where):
    # Readers of JSON take the last one, or the first.
    header, data = parts_of(file)
    metadata = header["__metadata__"]
    if where == "weights":
        metadata["weights"] = '{"a": {}, ' + metadata["weights"][1:]
    elif where == "weight":
        metadata["weights"] = metadata["weights"].replace('"shape"', '"shape": [1, 1], "shape"', 1)
    metadata["weights_crc32"] = str(zlib.crc32(metadata["weights"].encode()))
    text = json.dumps(header)
    if where == "header":
        text = text.replace('"a.codes"', '"a.codes": {}, "a.codes"', 1)
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data)
    name = {"header": "a.codes", "weights": "a", "weight": "shape"}[where]
    with pytest.raises(ValueError, match=rf"{file}: its header has '{name}' twice"):
        pyda8w4.load(file)


@pytest.mark.pitfall("general", "hostile header")
@pytest.mark.parametrize(
    "text", [b'{"a": NaN}', b'{"a": -Infinity}', b"\xff{}", b'{"\xed\xa0\x80": {}}', "{}".encode("utf-16")]
)
def test_a_header_that_is_no_json_is_refused(tmp_path, text):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ValueError, match=str(path)):
        pyda8w4.load(path)


def test_every_error_names_the_file(file):
    header, data = parts_of(file)
    weights = header["__metadata__"]["weights"]
    for text, more in [(weights.replace("70", "74"), {}), (weights, {"a.codes": {}}), (weights, {"a.sums": None})]:
        header["__metadata__"]["weights"] = text
        write(file, {**header, **more}, data)
        with pytest.raises(ValueError, match=f"^{file}"):
            pyda8w4.load(file)


@pytest.mark.parametrize("name", ["a.codes", "a.scales", "a.sums", "a.zps", "b.codes", "b.offsets"])
def test_a_missing_tensor_is_refused(file, name):
    header, data = parts_of(file)
    header[name + ".elsewhere"] = header.pop(name)
    write(file, header, data)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        pyda8w4.load(file)


def test_a_tensor_of_another_type_or_shape_is_refused(file):
    header, data = parts_of(file)
    for name, change in [
        ("a.codes", {"dtype": "I8"}),
        ("a.scales", {"dtype": "I32"}),
        ("a.scales", {"dtype": "U32"}),
        ("a.zps", {"dtype": "U8"}),
        ("a.codes", {"shape": [2, 64, 18]}),
        ("a.codes", {"shape": [2 * 18 * 64]}),
        ("a.sums", {"shape": [64, 1]}),
        ("b.scales", {"dtype": "I16"}),
        ("b.offsets", {"dtype": "F16"}),
        ("b.offsets", {"shape": [3, 32, 4]}),
    ]:
        write(file, {**header, name: {**header[name], **change}}, data)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            pyda8w4.load(file)


@pytest.mark.pitfall("general", "hostile header")
@pytest.mark.parametrize(
    "change",
    [
        {"shape": [33]},
        {"shape": [33, 70, 1]},
        {"shape": None},
        {"shape": "33"},
        {"shape": [0, 70]},
        {"shape": [-33, 70]},
        {"shape": [33.0, 70]},
        {"shape": [True, 70]},
        {"shape": [65, 70]},
        {"shape": [33, 73]},
        {"shape": [2**70, 70]},
        {"shape": [33, 2**70]},
        {"group_size": 0},
        {"group_size": -32},
        {"group_size": 33},
        {"group_size": 36.0},
        {"group_size": 16},
        {"group_size": 72},
        {"group_size": 2**70},
        {"group_size": None},
        {"zero_point": 128},
        {"zero_point": -129},
        {"zero_point": 2**70},
        {"zero_point": "8"},
        {"zero_point": 8.0},
        {"zero_point": False},
        {"offsets": True},
        {"offsets": 0},
        {"offsets": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_description_that_fits_no_weight_is_refused(file, change):
    header, data = parts_of(file)
    weights = json.loads(header["__metadata__"]["weights"])
    weights["a"].update(change)
    header["__metadata__"]["weights"] = json.dumps(weights)
    write(file, header, data)
    with pytest.raises(ValueError):
        pyda8w4.load(file)


@pytest.mark.pitfall("general", "hostile header")
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        *({"bits": value} for value in (3, 5, 8, 4.0, "4", None, True, [])),
        *({"super_size": value} for value in (0, 1, 3, 7, -2, 2**70, 2.0, None, True, "2")),
        *({"table": value} for value in (False, None, 1)),
        *({"perm": value} for value in (False, 1)),
        *({"factors": value} for value in (False, "yes")),
        *({"rotation": value} for value in (1, 3, -2, 2048, 2**70, 16.0, True, False, None, "16")),
        {"rotated": 16},
        {"offsets": False},
        *({"zero_point": value} for value in (1, None)),
    ],
    ids=str,
)
def test_a_description_of_another_kind_is_refused(tmp_path, change, verify):
    file = tmp_path / "weights.safetensors"
    weight = Weight(33, 70, 12, "float16", 0, True, table=True, supers=2, perm=True, factors=True)
    pyda8w4.save(file, {"a": pack(weight)})
    header, data = parts_of(file)
    weights = json.loads(header["__metadata__"]["weights"])
    weights["a"].update(change)
    header["__metadata__"]["weights"] = json.dumps(weights)
    write(file, header, data)
    if any(
        value is False and name != "rotation" for name, value in change.items()
    ):  # an array more than it says that it has
        assert pyda8w4.load(file, verify=verify)["a"].unpack()[0].shape == (33, 70)
        return
    with pytest.raises(ValueError, match=str(file)):
        pyda8w4.load(file, verify=verify)


@pytest.mark.pitfall("general", "hostile header")
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("at", [0, 35, 69])
@pytest.mark.parametrize("value", [-1, 70, 2**31 - 1, "twice"])
def test_a_permutation_that_leads_elsewhere_is_refused(tmp_path, verify, at, value):
    file = tmp_path / "weights.safetensors"
    packed = pack(Weight(33, 70, 32, perm=True))
    perm = packed.perm.copy()
    perm[at] = perm[at - 1] if value == "twice" else value
    pyda8w4.save(file, {"a": with_stored(packed, perm=perm)})
    with pytest.raises(ValueError, match=r"a\.perm must have each of 0 to 69 once"):
        pyda8w4.load(file, verify=verify)


@pytest.mark.parametrize("group", [71, 72, 128, 2**16])
def test_a_group_longer_than_k_is_refused(tmp_path, group):
    # Every array has the shape of one group; only this number is wrong.
    file = tmp_path / "weights.safetensors"
    pyda8w4.save(file, {"a": pack(Weight(33, 70))})
    header, data = parts_of(file)
    weights = json.loads(header["__metadata__"]["weights"])
    weights["a"]["group_size"] = group
    header["__metadata__"]["weights"] = json.dumps(weights)
    write(file, header, data)
    for verify in (True, False):
        with pytest.raises(ValueError, match="group"):
            pyda8w4.load(file, verify=verify)


def test_a_weight_whose_sums_could_leave_int32_is_refused(tmp_path):
    file = tmp_path / "long.safetensors"
    k = 2**20
    packed = pyda8w4.prepack(np.zeros((1, k), np.uint8), np.ones(1, np.float32))
    pyda8w4.save(file, {"a": packed})
    pyda8w4.load(file)
    header, data = parts_of(file)
    weights = json.loads(header["__metadata__"]["weights"])
    weights["a"]["zero_point"] = 16
    header["__metadata__"]["weights"] = json.dumps(weights)
    write(file, header, data)
    with pytest.raises(ValueError, match="group_size"):
        pyda8w4.load(file)


@pytest.mark.pitfall("general", "hostile header")
@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", '"a"', '{"a": 3}', '{"a": []}', '{"a": {}}', "[" * 100000, "{"]
)
def test_a_list_of_weights_that_is_none_is_refused(file, text):
    header, data = parts_of(file)
    header["__metadata__"]["weights"] = text
    write(file, header, data)
    with pytest.raises(ValueError):
        pyda8w4.load(file)


@pytest.mark.parametrize(
    "name", ["a.codes", "a.scales", "a.sums", "a.zps", "b.codes", "b.scales", "b.sums", "b.offsets"]
)
def test_a_flipped_bit_is_found(file, name):
    header, data = parts_of(file)
    begin, end = header[name]["data_offsets"]
    for at in (begin, (begin + end) // 2, end - 1):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        write(file, header, bytes(changed))
        with pytest.raises(ValueError, match=rf"{name} is damaged".replace(".", r"\.")):
            pyda8w4.load(file)
        assert set(pyda8w4.load(file, verify=False)) == {"a", "b"}


@pytest.mark.parametrize("old, new", [('"zero_point": 3', '"zero_point": 4'), ("[65, 64]", "[66, 64]"), ("33", "34")])
def test_a_changed_description_is_found(file, old, new):
    whole = file.read_bytes()
    old, new = (text.replace('"', r"\"").encode() for text in (old, new))
    assert old in whole
    file.write_bytes(whole.replace(old, new, 1))
    with pytest.raises(ValueError, match="its list of weights does not have its checksum"):
        pyda8w4.load(file)
    pyda8w4.load(file, verify=False)


@pytest.mark.parametrize("checksum", [None, "", "0", "None"])
def test_a_description_without_its_checksum_is_refused(file, checksum):
    header, data = parts_of(file)
    del header["__metadata__"]["weights_crc32"]
    if checksum is not None:
        header["__metadata__"]["weights_crc32"] = checksum
    write_as_it_is(file, header, data)
    with pytest.raises(ValueError, match="damaged"):
        pyda8w4.load(file)
    assert set(pyda8w4.load(file, verify=False)) == {"a", "b"}


def test_a_changed_type_of_scales_is_found(tmp_path):
    file = tmp_path / "weights.safetensors"
    pyda8w4.save(file, {"a": pack(Weight(33, 70, 32, "float16"))})
    header, data = parts_of(file)
    header["a.scales"]["dtype"] = "BF16"
    write(file, header, data)
    with pytest.raises(ValueError, match=r"a\.scales is damaged"):
        pyda8w4.load(file)


@pytest.mark.parametrize("crc32", [None, 0, [], "codes", {}, {"codes": "1"}], ids=str)
def test_a_weight_without_checksums_is_refused(file, crc32):
    header, data = parts_of(file)
    weights = json.loads(header["__metadata__"]["weights"])
    weights["a"]["crc32"] = crc32
    header["__metadata__"]["weights"] = json.dumps(weights)
    write(file, header, data)
    with pytest.raises(ValueError, match="damaged"):
        pyda8w4.load(file)
    assert_same_weight(pyda8w4.load(file, verify=False)["a"], pack(Weight(33, 70, 32)))


def test_a_file_that_is_replaced_while_it_is_loaded(file, monkeypatch):
    # What is mapped is the file whose header was read.
    def replace_then_map(*arguments, **more):
        monkeypatch.undo()
        pyda8w4.save(file, {"c": pack(Weight(1, 1))})
        return np.memmap(*arguments, **more)

    monkeypatch.setattr(np, "memmap", replace_then_map)
    assert_same_weight(pyda8w4.load(file)["a"], pack(Weight(33, 70, 32)))
    assert list(pyda8w4.load(file)) == ["c"]


def test_random_changes_are_refused_or_harmless(file):
    # Any byte may be wrong: the file is refused, or what it gives can be used without a crash.
    whole = file.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(600):
        changed = bytearray(whole)
        for place in rng.integers(0, length, rng.integers(1, 3)):
            changed[place] = int(rng.choice([*b'0123456789{}[]",:-e', rng.integers(0, 256)]))
        file.write_bytes(changed)
        try:
            weights = pyda8w4.load(file, verify=False)
        except ValueError:
            refused += 1
            continue
        for weight in weights.values():
            weight.unpack()
            pyda8w4.linear(np.zeros((1, weight.shape[1]), F32), weight)
    assert 100 < refused < 600


@pytest.mark.parametrize("file_format", ["load", "safetensors", "gguf", "pickle", "folder"])
def test_hostile_files(file_format):
    if file_format == "gguf":
        pytest.importorskip("gguf", reason="gguf is not installed")
    script = Path(__file__).parents[1] / "tools" / "fuzz_load.py"
    process = subprocess.run(
        [sys.executable, str(script), "--format", file_format, "--count", str(os.environ.get("PYDA8W4_FUZZ", 500))],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "loaded" in process.stdout and "ValueError" in process.stdout
