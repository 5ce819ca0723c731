"""Checkpoints in folders of Hugging Face: what they have is found, and what is wrong with them is named."""

import json
import pickle
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
from cases import assert_same_bits
from folders import EXAMPLES, FLOATS, entry, write_example, write_file, write_folder

import pyda8w4.checkpoints
import pyda8w4.convert
from pyda8w4.checkpoints import _folder
from pyda8w4.checkpoints import open as open_checkpoint

K, N, GROUP = 64, 24, 16


def gptq_tensors(name, seed=0):
    rng = np.random.default_rng(seed)
    return {
        f"{name}.qweight": entry(rng.integers(-(2**31), 2**31, (K // 8, N), np.int32)),
        f"{name}.qzeros": entry(np.full((K // GROUP, N // 8), 0x77777777, np.int32)),
        f"{name}.scales": entry(rng.uniform(0.5, 2, (K // GROUP, N)).astype(np.float16)),
        f"{name}.g_idx": entry(np.arange(K, dtype=np.int32) // GROUP),
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}


def floats(seed=1):
    rng = np.random.default_rng(seed)
    return {
        "embed.weight": entry(rng.standard_normal((10, K)).astype(np.float16)),
        "norm.weight": entry(rng.integers(0, 1 << 14, K).astype(np.uint16), "BF16"),
        "experts.weight": entry(rng.standard_normal((3, 8, K)).astype(np.float32)),
        "positions": entry(np.arange(5)),
    }


@pytest.fixture
def folder(tmp_path):
    shards = {
        "model-00001-of-00002.safetensors": {**gptq_tensors("layers.0.q"), **floats()},
        "model-00002-of-00002.safetensors": gptq_tensors("layers.1.q", 1),
    }
    return write_folder(tmp_path / "model", shards, {"quantization_config": GPTQ})


def test_names_types_and_shapes(folder):
    checkpoint = open_checkpoint(folder)
    assert checkpoint.metadata["model_type"] == "llama"
    assert checkpoint.types == {
        "layers.0.q": "GPTQ 4-bit",
        "layers.1.q": "GPTQ 4-bit",
        "embed.weight": "F16",
        "norm.weight": "BF16",
        "experts.weight": "F32",
        "positions": "I64",
    }
    assert checkpoint.shapes["layers.1.q"] == (N, K)
    assert checkpoint.shapes["experts.weight"] == (3, 8, K)


@pytest.mark.parametrize("where", ["one file", "shards", "quantize_config.json", "text_config"])
def test_weights_are_found_in(tmp_path, where):
    tensors = {**gptq_tensors("q"), **floats()}
    shards = {"model.safetensors": tensors}
    if where == "shards":
        shards = {f"model-{i}.safetensors": {name: value} for i, (name, value) in enumerate(tensors.items())}
    config = {"quantization_config": GPTQ}
    if where == "quantize_config.json":
        config = {}
    elif where == "text_config":
        config = {"text_config": config}
    path = write_folder(tmp_path / "model", shards, config, index=where == "shards")
    if where == "quantize_config.json":
        (path / where).write_text(json.dumps({key: value for key, value in GPTQ.items() if key != "quant_method"}))
    checkpoint = open_checkpoint(path)
    words, scales = tensors["q.qweight"][1], tensors["q.scales"][1]
    codes = np.stack([words >> 4 * i & 15 for i in range(8)], axis=1).reshape(K, N).T
    expected = (codes - 8).astype(np.float32) * np.repeat(scales.T, GROUP, axis=1).astype(np.float32)
    assert_same_bits(checkpoint.packed("q").dequantize(), expected)
    assert_same_bits(checkpoint.array("q"), expected)
    for name in ("embed.weight", "experts.weight"):
        assert_same_bits(checkpoint.array(name), tensors[name][1].astype(np.float32))
    bits = tensors["norm.weight"][1].astype(np.uint32) << 16
    assert_same_bits(checkpoint.array("norm.weight"), bits.view(np.float32))


def test_arrays_may_be_written_to(folder):
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.types.keys() - {"positions"}:
        first = checkpoint.array(name)
        first[...] = 7
        assert (checkpoint.array(name) != 7).any()


def test_what_is_not_there(folder):
    checkpoint = open_checkpoint(folder)
    for call in (checkpoint.array, checkpoint.packed, checkpoint.weight, checkpoint.stack):
        with pytest.raises(ValueError, match=r"model: name must be of a tensor in the checkpoint, got 'no'"):
            call("no")
    with pytest.raises(ValueError, match=r"positions of I64 cannot be dequantized: its elements are no floats"):
        checkpoint.array("positions")
    with pytest.raises(ValueError, match=r"embed.weight of F16 cannot be packed exactly: it is not quantized; requ"):
        checkpoint.packed("embed.weight")
    with pytest.raises(ValueError, match=r"must be of a matrix, got experts.weight of shape \(3, 8, 64\); stack"):
        checkpoint.packed("experts.weight")
    with pytest.raises(ValueError, match=r"must be of a stack \(E, N, K\), got embed.weight of shape \(10, 64\)"):
        checkpoint.stack("embed.weight")
    with pytest.raises(ValueError, match=r"must be of matrices of one shape, got \(24, 64\) and \(10, 64\)"):
        checkpoint.stack(["layers.0.q", "embed.weight"])
    for index in (-1, 1):
        with pytest.raises(ValueError, match=rf"index must be of a matrix of layers.0.q of shape .*, got {index}"):
            checkpoint.weight("layers.0.q", index)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.packed(["a"]), TypeError, "name must be a str, got list"),
        (lambda c: c.array(None), TypeError, "name must be a str, got NoneType"),
        (lambda c: c.weight("layers.0.q", 0.0), TypeError, "index must be an int, got float"),
        (lambda c: c.weight("layers.0.q", True), TypeError, "index must be an int, got bool"),
        (lambda c: c.packed("layers.0.q", requantize=1), TypeError, "requantize must be a bool, got int"),
        (lambda c: c.stack(["layers.0.q"], requantize=4), TypeError, "requantize must be a bool, got int"),
        (lambda c: c.stack(7), TypeError, "names must be a str or a sequence of str, got int"),
        (lambda c: c.stack([7]), TypeError, "name must be a str, got int"),
        (lambda c: c.stack([[7]]), TypeError, "name must be a str, got list"),
        (lambda c: c.stack([]), ValueError, "names must be of at least one matrix, got none"),
        (lambda c: c.stack("experts.weight", []), ValueError, "names must be of at least one matrix, got none"),
    ],
)
def test_arguments_of_other_types(folder, call, error, message):
    with pytest.raises(error, match=message):
        call(open_checkpoint(folder))


def test_one_file_comes_before_an_index(folder):
    """As transformers has it: an index may be of an earlier save."""
    write_file(folder / "model.safetensors", floats(seed=7))
    checkpoint = open_checkpoint(folder)
    assert "layers.0.q" not in checkpoint.types
    assert_same_bits(checkpoint.array("embed.weight"), floats(seed=7)["embed.weight"][1].astype(np.float32))


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 16}}])
@pytest.mark.parametrize("name", ["x.qweight", "x.weight_packed", "x.W_q", "x.weight"])
def test_codes_of_no_layer(tmp_path, config, name):
    if name == "x.qweight":
        config = {}  # which is a layer of AWQ, though a damaged one
    path = write_folder(
        tmp_path / "model", {"a.safetensors": {name: entry(np.ones((8, 8), np.int32))}}, config, index=False
    )
    with pytest.raises(
        ValueError, match=rf"model: {name} of I32 must be of a quantized layer, but the config (says|has)"
    ):
        open_checkpoint(path)


def test_a_method_that_has_no_name(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"config.json: quantization_config must have quant_method, got bits, group_size"
    ):
        open_checkpoint(folder)


def test_generation_config_is_part_of_the_metadata(folder, tmp_path):
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    checkpoint = open_checkpoint(folder)
    assert checkpoint.metadata["generation_config"] == {"eos_token_id": [5, 6]}
    pyda8w4.convert.run(checkpoint, tmp_path / "out.safetensors")
    assert open_checkpoint(tmp_path / "out.safetensors").metadata == checkpoint.metadata


def test_repr_and_pickle(folder):
    checkpoint = open_checkpoint(folder)
    assert repr(checkpoint) == f"Checkpoint('{folder}', 6 tensors)"
    again = pickle.loads(pickle.dumps(checkpoint))
    assert again.types == checkpoint.types
    assert_same_bits(again.array("layers.0.q"), checkpoint.array("layers.0.q"))


@pytest.mark.parametrize("out", ["model/new.safetensors", "model/model-00002-of-00002.safetensors", "link", "hard"])
def test_convert_leaves_its_source_alone(folder, tmp_path, out):
    shard = folder / "model-00002-of-00002.safetensors"
    (tmp_path / "link").symlink_to(shard)
    (tmp_path / "hard").hardlink_to(shard)
    before = shard.read_bytes()
    with pytest.raises(ValueError, match="the file must not be one of the checkpoint, nor in its folder"):
        pyda8w4.convert.run(open_checkpoint(folder), tmp_path / out)
    assert shard.read_bytes() == before


@pytest.mark.parametrize("name", ["x.gguf", "x", "config.json", "x.bin"])
def test_files_of_another_kind(tmp_path, name):
    (tmp_path / name).write_bytes(b"text" * 20)
    with pytest.raises(ValueError, match=rf"path must be a GGUF file, a folder or a safetensors .*{name}"):
        open_checkpoint(tmp_path / name)
    (tmp_path / "a.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=r"a.safetensors: it must hold layout .*; a model of Hugging Face is"):
        open_checkpoint(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "typo")


def test_stack_of_names(folder):
    checkpoint = open_checkpoint(folder)
    names = ["layers.1.q", "layers.0.q"]
    for name, packed in zip(names, checkpoint.stack(names), strict=True):
        assert_same_bits(packed.dequantize(), checkpoint.array(name))
    pairs = zip(names, names[::-1])
    for pair, packed in zip(pairs, checkpoint.stack(names, tuple(names[::-1])), strict=True):
        assert_same_bits(packed.dequantize(), np.concatenate([checkpoint.array(name) for name in pair]))


def test_requantize_says_what_it_costs(folder):
    checkpoint = open_checkpoint(folder)
    with pytest.warns(UserWarning, match=r"embed.weight of F16 was quantized to 4 bits in groups of 32, .* (\d+\.\d)%"):
        packed = checkpoint.packed("embed.weight", requantize=True)
    w = checkpoint.array("embed.weight")
    expected = pyda8w4.quantize(w, 32)
    assert_same_bits(packed.dequantize(), expected.dequantize())
    with pytest.warns(UserWarning) as caught:
        stack = checkpoint.stack("experts.weight", requantize=True)
    assert stack.shape == (3, 8, K)
    floats = checkpoint.array("experts.weight")
    squares = [
        np.square(one.dequantize() - floats[i]).sum() / np.square(floats[i]).sum() for i, one in enumerate(stack)
    ]
    assert len(caught) == 1 and f"error of up to {max(squares) ** 0.5:.1%} of" in str(caught[0].message)


def test_requantize_leaves_what_is_exact(folder):
    checkpoint = open_checkpoint(folder)
    assert_same_bits(checkpoint.packed("layers.0.q", requantize=True).dequantize(), checkpoint.array("layers.0.q"))


# ---- every method ----------------------------------------------------------------------------


def test_examples_of_all_methods():
    assert EXAMPLES.keys() == _folder._METHODS.keys()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("method", EXAMPLES)
def test_a_folder_of(method, parts, tmp_path):
    example = EXAMPLES[method]
    checkpoint = open_checkpoint(write_example(tmp_path / "model", example, parts=parts))
    assert checkpoint.shapes == {"m.q": (16, 64), "m.q.bias": (16,), "norm.weight": (2,)}
    np.testing.assert_array_equal(checkpoint.packed("m.q").dequantize(), example.floats, strict=True)
    np.testing.assert_array_equal(checkpoint.array("m.q"), example.floats, strict=True)
    for name, array in FLOATS.items():
        assert_same_bits(checkpoint.array(name), array.astype(np.float32))


def test_mlx_without_a_method(tmp_path):
    example = EXAMPLES["mlx"]
    config = {key: value for key, value in example.config.items() if key != "quant_method"}
    path = write_example(tmp_path / "model", replace(example, config=config), key="quantization")
    np.testing.assert_array_equal(open_checkpoint(path).array("m.q"), example.floats)


def test_a_mark_of_awq_beside_the_config(tmp_path):
    example = EXAMPLES["awq"]
    path = write_example(tmp_path / "model", example, key="other")
    config = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    (path / "quant_config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(open_checkpoint(path).array("m.q"), example.floats)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("auto-round", {"group_size": "32"}, "group_size of the quantization must be an int, got '32'"),
        ("auto-round", {"extra_config": {"m.q": 4}}, "m.q of extra_config of the quantization must be an object"),
        ("awq", {"bits": None}, "the quantization must have bits"),
        ("awq", {"version": 2}, "version of the quantization must be a string, got '2'"),
        ("compressed-tensors", {"config_groups": [4]}, "config_groups of the quantization must be an object"),
        ("gptq", {"sym": "yes"}, "sym of the quantization must be a bool, got 'yes'"),
        ("gptq", {"dynamic": {"(": {}}}, "dynamic of the quantization must have regular expressions"),
        (
            "gptq",
            {"checkpoint_format": "gptq", "format": "gptq_v2"},
            "checkpoint_format and format .*be the same",
        ),
        ("metal", {"bits": [4]}, r"bits of the quantization must be an int, got '\[4\]'"),
        ("mlx", {"m.q": {"group_size": 0.5}}, "group_size of m.q of the quantization must be an int, got '0.5'"),
    ],
)
def test_configs_that_make_no_sense(method, change, message, tmp_path):
    example = EXAMPLES[method]
    path = write_example(tmp_path / "model", replace(example, config={**example.config, **change}))
    with pytest.raises(ValueError, match=rf"^{path}: {message}"):
        open_checkpoint(path)


# ---- hostile folders -------------------------------------------------------------------------


def change_json(path, change):
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value)))


@pytest.mark.parametrize(
    "place",
    [
        "../secret.safetensors",
        "/etc/x.safetensors",
        "a/../b.safetensors",
        "model.bin",
        "..",
        "",
        "x\0.safetensors",
        7,
        None,
    ],
)
def test_a_shard_outside_the_folder(folder, place):
    shutil.copy(folder / "model-00002-of-00002.safetensors", folder.parent / "secret.safetensors")
    change_json(
        folder / "model.safetensors.index.json",
        lambda index: {"weight_map": {**index["weight_map"], "layers.1.q.scales": place}},
    )
    with pytest.raises(ValueError, match=r"index.json: layers.1.q.scales must be in a safetensors file of the same"):
        open_checkpoint(folder)


def test_a_shard_is_missing(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002.safetensors"):
        open_checkpoint(folder)


def test_an_index_that_lies(folder):
    index = folder / "model.safetensors.index.json"
    first, second = sorted(path.name for path in folder.glob("*.safetensors"))
    good = json.loads(index.read_text())["weight_map"]
    for name, place in (("more", first), ("layers.0.q.scales", second)):
        index.write_text(json.dumps({"weight_map": {**good, name: place}}))
        with pytest.raises(ValueError, match=rf"{place}: it has no tensor {name}, which model.safetensors.index.json"):
            open_checkpoint(folder)
    for bad in ({}, {"weight_map": {}}, {"weight_map": [1]}, [1]):
        index.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=r"index.json"):
            open_checkpoint(folder)


def test_a_tensor_in_two_files(folder):
    write_file(folder / "model-00002-of-00002.safetensors", {**gptq_tensors("layers.1.q", 1), **floats()})
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors: embed.weight is in model-00001"):
        open_checkpoint(folder)


def test_config(folder, tmp_path):
    config = folder / "config.json"
    good = json.loads(config.read_text())
    config.write_text(json.dumps({**good, "quantization_config": {"quant_method": "new"}}))
    with pytest.raises(ValueError, match=r"model: its quant_method must be one of auto-round, .*, got 'new'"):
        open_checkpoint(folder)
    config.write_text(json.dumps({**good, "quantization_config": [1]}))
    with pytest.raises(ValueError, match=r"config.json: quantization_config must be an object, got \[1\]"):
        open_checkpoint(folder)
    for text in ("", "[", "[]", "\x00", "1" * 5000, "[" * 100_000):
        config.write_text(text)
        with pytest.raises(ValueError, match=r"config.json must"):
            open_checkpoint(folder)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json"):
        open_checkpoint(folder)
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "none")


def test_files_beside_the_model(tmp_path):
    path = write_example(tmp_path / "model", EXAMPLES["gptq"])
    (path / "model-0.safetensors").rename(path / "model.safetensors")
    write_file(path / "consolidated.safetensors", {"other.weight": entry(np.ones((4, 4), np.float32))})
    assert open_checkpoint(path).types.keys() == {"m.q", "m.q.bias", "norm.weight"}


def test_a_folder_without_safetensors(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must have safetensors files, got config.json, pytorch_model.bin"):
        open_checkpoint(tmp_path)


def set_to(name, **values):
    return lambda header: header[name].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_to("embed.weight", shape=[10, K + 1]), "embed.weight of F16"),
        (set_to("embed.weight", shape=[-10, -K]), "embed.weight must have a shape"),
        (set_to("embed.weight", shape=[1 << 64, 0]), "embed.weight must have a shape"),
        (set_to("embed.weight", shape="x"), "embed.weight must have a shape"),
        (set_to("embed.weight", dtype=7), "embed.weight must have a dtype"),
        (set_to("embed.weight", dtype="F32"), "embed.weight of F32"),
        (set_to("embed.weight", data_offsets=[0, 1]), "no safetensors file"),
        (set_to("embed.weight", data_offsets=[0, 1 << 70]), "no safetensors file"),
        (set_to("embed.weight", data_offsets=[0.5, 2]), "no safetensors file"),
        (lambda header: header.update(more={}), "damaged header"),
        (lambda header: header.update(more=7), "damaged header"),
        (lambda header: header.update(__metadata__=[1]), "its metadata must be strings"),
        (lambda header: header.update(__metadata__={"a": 1}), "its metadata must be strings"),
    ],
)
def test_a_header_that_lies(tmp_path, change, message):
    path = write_folder(tmp_path / "model", {}, index=False)
    write_file(path / "model.safetensors", floats(), change=change)
    with pytest.raises(ValueError, match=rf"model.safetensors.*{message}"):
        open_checkpoint(path)


def test_a_type_that_nobody_knows(tmp_path):
    path = write_folder(tmp_path / "model", {}, index=False)
    write_file(path / "model.safetensors", floats(), change=set_to("norm.weight", dtype="F3"))
    checkpoint = open_checkpoint(path)
    assert checkpoint.types["norm.weight"] == "F3"
    with pytest.raises(ValueError, match=r"norm.weight of F3 cannot be dequantized"):
        checkpoint.array("norm.weight")


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_a_file_that_is_cut_off(folder, size):
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors: it is no"):
        open_checkpoint(folder)


def test_a_header_without_end(folder):
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors: it is not a safetensors file"):
        open_checkpoint(folder)


@pytest.mark.parametrize("seed", range(20))
def test_any_other_byte(folder, seed):
    """Whatever a byte is changed to: an error that names the file, or a checkpoint that can be used."""
    rng = random.Random(seed)
    files = sorted(path for path in folder.iterdir())
    for _ in range(10):
        file = rng.choice(files)
        good = file.read_bytes()
        bad = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 8])):
            bad[rng.randrange(min(len(bad), 1500))] = rng.randrange(256)
        file.write_bytes(bad)
        try:
            checkpoint = open_checkpoint(folder)
            for name in checkpoint.types:
                try:
                    checkpoint.array(name)
                except ValueError as error:
                    assert str(folder) in str(error) and name in str(error)
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error)
        file.write_bytes(good)
