"""What somebody does who has not read the documentation: it works, or the error says what to do instead."""

from __future__ import annotations

import errno
import pickle
import sys
from array import array

import numpy as np
import pytest
from cases import assert_same_bits
from safetensors.numpy import save_file

import pyda8w4
import pyda8w4.checkpoints
from pyda8w4 import _checks

RNG = np.random.default_rng(0)
W = RNG.standard_normal((96, 64), dtype=np.float32)
X = RNG.standard_normal((3, 64), dtype=np.float32)
QUANTIZED = pyda8w4.quantize_weight(W, 32)
PACKED = QUANTIZED.pack()
EXPERTS = pyda8w4.stack([PACKED] * 2)
CODES, SCALES, ZPS, OFFSETS = QUANTIZED
A, A_SCALES, A_ZPS = pyda8w4.quantize_activation(X)
MAKES = "pyda8w4.quantize makes one of float weights, pyda8w4.prepack of codes and scales"


class Interface:
    def __init__(self, values):
        self.__array_interface__ = values.__array_interface__
        self.values = values  # which keeps the memory


class Method:
    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return self.values


class DLPack:
    def __init__(self, values):
        self.__dlpack__, self.__dlpack_device__ = values.__dlpack__, values.__dlpack_device__


# ---- what works ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [
        X.tolist(), tuple(X), list(X), [list(row) for row in X], Interface(X), Method(X), memoryview(X),
        np.asfortranarray(X), np.repeat(X, 2, axis=1)[:, ::2], X[::-1][::-1], np.ma.masked_array(X),
    ],
    ids=lambda x: type(x).__name__,
)  # fmt: skip
def test_what_numpy_takes_is_taken(x):
    assert_same_bits(np.asarray(pyda8w4.linear(x, PACKED)), pyda8w4.linear(X, PACKED))


def test_a_flat_buffer_is_a_row():
    assert_same_bits(pyda8w4.linear(array("f", X[0]), PACKED), pyda8w4.linear(X[0], PACKED))


def test_numbers_of_lists_have_the_type_that_is_wanted():
    """As numbers of Python have in the arithmetic of numpy. Codes are refused: uint8 and int8 mean other weights."""
    bias = np.linspace(-1, 1, 96, dtype=np.float32)
    whole = pyda8w4.linear(X, PACKED, bias)
    assert_same_bits(pyda8w4.linear(X.tolist(), PACKED, bias.tolist()), whole)
    assert pyda8w4.linear([[1] * 64], PACKED).dtype == np.float32
    assert_same_bits(
        pyda8w4.gemm(A, PACKED, A_SCALES.tolist(), A_ZPS.tolist()), pyda8w4.gemm(A, PACKED, A_SCALES, A_ZPS)
    )
    packed = pyda8w4.prepack(CODES, SCALES.tolist(), ZPS.tolist(), OFFSETS.tolist())
    assert_same_bits(packed.dequantize(), PACKED.dequantize())
    assert_same_bits(pyda8w4.quantize(W.tolist(), 32).dequantize(), PACKED.dequantize())
    gate_up, down = (
        pyda8w4.stack([pyda8w4.concat([PACKED] * 2)]),
        pyda8w4.stack([pyda8w4.quantize(np.eye(96, dtype="f"))]),
    )
    weights = np.full((3, 1), 0.3, np.float32)
    assert_same_bits(
        pyda8w4.moe(X, gate_up, down, [[0]] * 3, weights.tolist()),
        pyda8w4.moe(X, gate_up, down, np.zeros((3, 1), int), weights),
    )


@pytest.mark.parametrize("zps", [[2**32] * 3, [0.5] * 3, [True] * 3])
def test_numbers_of_lists_that_are_of_another_type_are_refused(zps):
    with pytest.raises(TypeError, match=r"^a_zps must be an array of int32, got list, which numpy makes "):
        pyda8w4.gemm(A, PACKED, None, zps)
    with pytest.raises(TypeError, match=r"^x must be an array of float32, float16 or bfloat16, got list, .* bool"):
        pyda8w4.linear([[True] * 64], PACKED)


@pytest.mark.parametrize(
    "x", [[np.ones(64)], (np.ones(64),), [list(np.ones(64))], [[1e300] * 64], [[0.0] * 63 + [-1e39]]]
)
def test_lists_keep_what_numpy_chose_and_what_float32_cannot_hold(x):
    with pytest.raises(
        TypeError, match=r"^x must be .*, got \w+, which numpy makes float64; np\.asarray\(x, np\.float32\)"
    ):
        pyda8w4.linear(x, PACKED)
    pyda8w4.linear([[np.inf, np.nan] * 32], PACKED)


# ---- what does not, and says what to do ------------------------------------------------------

LINEAR = {"x": X, "packed": PACKED}
GEMM = {"a": A, "packed": PACKED}
PREPACK = {"codes": CODES, "scales": SCALES}
QUANTIZE = {"w": W}
ERRORS = [
    # floats where quantized numbers are wanted, and the other way round
    ("prepack", PREPACK, {"codes": W}, "got float32; pyda8w4.quantize takes float weights"),
    ("prepack", PREPACK, {"codes": W.astype(float)}, "got float64; pyda8w4.quantize takes float weights"),
    ("quantize", QUANTIZE, {"w": CODES}, "got uint8; prepack takes codes, with their scales"),
    ("gemm", GEMM, {"a": X}, "got float32; linear takes floats"),
    ("gemm", {"packed": PACKED}, {"a": (A, A_SCALES, A_ZPS)}, "gemm(a, packed, a_scales, a_zps) takes the three that"),
    ("linear", LINEAR, {"x": A}, "got uint8; gemm takes activations that are quantized"),
    # other types
    ("linear", LINEAR, {"x": X.astype(float)}, "got float64; np.asarray(x, np.float32) makes one"),
    ("linear", LINEAR, {"x": Method(X.astype(float))}, "got Method, which numpy makes float64; np.asarray(x, np."),
    ("linear", LINEAR, {"x": X.astype(np.int64)}, "got int64; np.asarray(x, np.float32) makes one"),
    ("linear", LINEAR, {"x": X.astype(">f4")}, "got >f4; np.asarray(x, np.float32) makes one"),
    ("linear", LINEAR, {"x": X.astype(np.longdouble)}, "np.asarray(x, np.float32) makes one"),
    ("linear", LINEAR, {"x": X.astype(np.float16).view("V2")}, "x.view(ml_dtypes.bfloat16) takes its bits"),
    ("linear", LINEAR, {"x": X.view(np.uint16)[:, ::2]}, "x.view(ml_dtypes.bfloat16) takes its bits"),
    ("linear", LINEAR, {"x": X.astype(object)}, "x must be a numeric array, got an array of objects"),
    ("linear", LINEAR, {"x": DLPack(X)}, "got DLPack; np.from_dlpack(x) makes one"),
    ("linear", LINEAR, {"x": "text"}, "got str"),
    ("linear", LINEAR, {"x": 1.0}, "got float, which numpy makes float64"),
    ("linear", LINEAR, {"x": (number for number in X)}, "x must be a numeric array, got generator"),
    ("linear", LINEAR, {"bias": np.zeros(96, np.float16)}, "got float16; np.asarray(bias, np.float32) makes one"),
    ("linear", LINEAR, {"bias": "int8"}, "bias must be an array of float32, got str"),
    ("linear", LINEAR, {"out": np.zeros((3, 96))}, "out must be an array of float32, float16 or bfloat16, got float64"),
    ("quantize", QUANTIZE, {"w": W.astype(float)}, "got float64; np.asarray(w, np.float32) makes one"),
    ("prepack", PREPACK, {"codes": CODES.astype(int)}, "np.asarray(codes, np.uint8) makes one, or np.int8 for signed"),
    ("prepack", PREPACK, {"codes": CODES.tolist()}, "got list, which numpy makes int64; np.asarray(codes, np.uint8)"),
    ("prepack", PREPACK, {"zps": ZPS.astype(float)}, "got float64; offsets = -zps * scales, with zps of 0, takes"),
    ("gemm", GEMM, {"a_zps": A_ZPS.astype(np.int64)}, "got int64; np.asarray(a_zps, np.int32) makes one"),
    # no packed weight
    ("linear", LINEAR, {"packed": W}, f"packed must be a PackedWeight, got ndarray; {MAKES}"),
    ("linear", LINEAR, {"packed": W.tolist()}, f"packed must be a PackedWeight, got list; {MAKES}"),
    ("linear", LINEAR, {"packed": QUANTIZED}, "got QuantizedWeight; packed.pack() makes one"),
    ("linear", LINEAR, {"packed": EXPERTS}, "got PackedExperts; grouped_linear and moe take them, and packed[i] is"),
    ("linear", LINEAR, {"packed": [PACKED, PACKED]}, "got list; pyda8w4.concat joins several along N"),
    ("linear", LINEAR, {"packed": "layer.safetensors"}, "got str; pyda8w4.load gives those of a file, by name"),
    ("linear", LINEAR, {"packed": {"layer": PACKED}}, "got dict; load and state dicts have weights by name"),
    ("linear_gated", {"x": X}, {"gate_up": W}, f"gate_up must be a PackedWeight, got ndarray; {MAKES}"),
    ("explain", {}, {"packed": QUANTIZED}, "got QuantizedWeight; packed.pack() makes one"),
    ("concat", {}, {"weights": [QUANTIZED]}, "weights[0] must be a PackedWeight, got QuantizedWeight; weights[0]."),
    ("stack", {}, {"weights": [W]}, f"weights[0] must be a PackedWeight, got ndarray; {MAKES}"),
    ("quantize", {}, {"w": QUANTIZED}, "got QuantizedWeight; w.pack() packs it"),
    ("quantize", {}, {"w": PACKED}, "got PackedWeight: it is packed: dequantize() gives its floats"),
    ("grouped_linear", {"x": X, "rows_of_expert": [3]}, {"experts": PACKED}, "pyda8w4.stack makes some of packed"),
    ("grouped_linear", {"x": X, "rows_of_expert": [3]}, {"experts": [PACKED]}, "pyda8w4.stack makes some of packed"),
    # arguments in another order
    ("linear", {}, {"x": PACKED, "packed": X}, "x must be an array, got PackedWeight: it is packed: .* linear(x, "),
    ("gemm", {}, {"a": PACKED, "packed": A}, "a must be an array, got PackedWeight: it is packed: .* linear(x, "),
    # shapes
    ("linear", LINEAR, {"x": X.T.copy()}, "(..., 64) for packed of shape (96, 64), got (64, 3); x.T has it"),
    ("linear", LINEAR, {"x": W.T}, "a weight that is stored as (K, N) must be transposed before it is packed"),
    ("prepack", PREPACK, {"codes": CODES.T}, "must have shape (64,) or (64, G) for 64 rows of codes, got (96, 2)"),
    ("prepack", PREPACK, {"scales": SCALES.T}, "for 96 rows of codes, got (2, 96); scales.T has it"),
    ("prepack", PREPACK, {"zps": ZPS.T}, "for 96 rows of codes, got (2, 96); zps.T has it"),
    ("prepack", PREPACK, {"scales": SCALES.ravel()}, "for 96 rows of codes, got (192,)"),
    ("prepack", PREPACK, {"group_size": 64}, "group_size must make of K = 64 the 2 groups that scales has, got 64,"),
    ("prepack", PREPACK, {"group_size": 30}, "group_size must be a multiple of 4, or K = 64, got 30"),
    # codes of other bits
    ("prepack", PREPACK, {"codes": CODES + 16}, "; bits=8 takes codes of 8 bits, nibbles two codes a byte"),
    ("prepack", PREPACK, {"codes": CODES.view(np.int8) - 99}, "; bits=8 takes codes of 8 bits"),
    # options
    ("linear", LINEAR, {"act": "uint9"}, "act must be 'uint8', 'int8', 'int8_group' or 'int16', got 'uint9'"),
    ("linear", LINEAR, {"act": np.uint8}, "act must be 'uint8', 'int8', 'int8_group' or 'int16', got type"),
    ("quantize", QUANTIZE, {"method": "rtn"}, "method must be 'search' or 'minmax', got 'rtn'"),
    ("quantize", QUANTIZE, {"zeros": False}, "zeros must be 'none', 'integer' or 'float', got bool"),
    ("linear", LINEAR, {"out_dtype": "bf16"}, "out_dtype must be float32, float16 or bfloat16, as numpy has it"),
]  # fmt: skip


@pytest.mark.parametrize(
    "function, good, bad, message",
    [pytest.param(*case, id=f"{case[0]}-{'-'.join(case[2])}-{i}") for i, case in enumerate(ERRORS)],
)
def test_errors_say_what_to_do(function, good, bad, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        getattr(pyda8w4, function)(**{**good, **bad})
    found = str(caught.value)
    assert found.startswith(next(iter(bad))) or function == "prepack"
    begin, _, end = message.partition(" .* ")
    assert begin in found and end in found


def test_packed_weights_are_no_arrays():
    for packed in (PACKED, EXPERTS):
        with pytest.raises(TypeError, match="packed: "):
            np.asarray(packed)
        with pytest.raises(TypeError, match="packed: "):
            X @ packed
        with pytest.raises(TypeError, match="packed: "):
            packed @ X


def test_constructors_say_what_makes_one():
    with pytest.raises(TypeError, match=r"pyda8w4\.quantize or pyda8w4\.prepack"):
        pyda8w4.PackedWeight()
    with pytest.raises(TypeError, match=r"pyda8w4\.stack"):
        pyda8w4.PackedExperts()


def test_a_kernel_that_does_not_exist_is_refused_without_with_too():
    with pytest.raises(ValueError, match=r"kernel 'avx512' is not a kernel of this build; this CPU runs: "):
        pyda8w4.use_kernel("avx512")


def test_bfloat16_without_ml_dtypes_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    monkeypatch.delitem(_checks._dtypes, "bfloat16", raising=False)  # of an array that was seen before
    with pytest.raises(ImportError, match=r'pip install "pyda8w4\[bfloat16\]"'):
        pyda8w4.linear(X, PACKED, out_dtype="bfloat16")


def test_modules_that_are_not_imported_say_so():
    with pytest.raises(AttributeError, match=r"has no attribute 'torch': `import pyda8w4\.torch` comes first"):
        pyda8w4.__getattr__("torch")
    with pytest.raises(AttributeError, match=r"has no attribute 'matmul'$"):
        pyda8w4.matmul  # noqa: B018


# ---- torch -----------------------------------------------------------------------------------


@pytest.mark.torch
def test_tensors():
    torch = pytest.importorskip("torch")
    x, linear = torch.from_numpy(X), torch.nn.Linear(64, 96)
    assert_same_bits(pyda8w4.linear(x, PACKED), pyda8w4.linear(X, PACKED))
    weight, bias = linear.weight, linear.bias
    end = r"\.numpy\(\) makes one, and pyda8w4\.torch has layers for tensors$"
    for call, message in (
        (lambda: pyda8w4.quantize(weight), rf"^w must be .* Parameter: .*; w\.detach\(\){end}"),
        (lambda: pyda8w4.linear(x.bfloat16(), PACKED), rf"^x must be .* Tensor: .*; x\.float\(\){end}"),
        (lambda: pyda8w4.linear(x, PACKED, bias.bfloat16()), rf"^bias must be .*; bias\.detach\(\)\.float\(\){end}"),
        (lambda: pyda8w4.linear(x.to("meta"), PACKED), r"^x must be an array, got Tensor: can't convert meta"),
        (lambda: pyda8w4.linear(x.double(), PACKED), r"got float64; np\.asarray\(x, np\.float32\) makes one$"),
        (lambda: pyda8w4.linear(x, weight), f"^packed must be a PackedWeight, got Parameter; {MAKES}"),
        (lambda: pyda8w4.linear(x, linear), r"got Linear; layers and models of torch are called, and .*quantize_"),
        (lambda: pyda8w4.linear(x, PACKED, out=torch.empty(3, 96)), r"^out must be .* Tensor; out\.numpy\(\) shares"),
        (lambda: pyda8w4.linear(x, PACKED, out_dtype=torch.bfloat16), r"^out_dtype must be .* got torch\.bfloat16"),
        (lambda: pyda8w4.quantize(linear), r"^w must be .* Linear; pyda8w4\.torch\.quantize_ takes models"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


@pytest.mark.torch
def test_models():
    torch = pytest.importorskip("torch")
    adapter = pytest.importorskip("pyda8w4.torch")
    for model, message in (
        (
            "Qwen/Qwen3-8B",
            r"got str; transformers loads one, and pyda8w4\.torch\.from_checkpoint one that is quantized",
        ),
        (torch.nn.Linear(64, 96).weight, r"got Parameter; pyda8w4\.quantize takes the array of a weight"),
        (W, r"got ndarray; pyda8w4\.quantize takes the array of a weight"),
    ):
        with pytest.raises(TypeError, match=rf"^model must be a torch\.nn\.Module, {message}"):
            adapter.quantize_(model)


@pytest.mark.torch
def test_layers():
    torch = pytest.importorskip("torch")
    adapter = pytest.importorskip("pyda8w4.torch")
    layer = adapter.DA8W4Linear.from_linear(torch.nn.Linear(64, 96), 32)
    for x in (X, X.tolist()):
        with pytest.raises(TypeError, match=r"^input must be a tensor, got .*; torch\.as_tensor\(input\) makes one"):
            layer(x)
    with pytest.raises(TypeError, match=r"^packed must be a PackedWeight, got DA8W4Linear; packed\.packed is the one"):
        pyda8w4.linear(X, layer)


# ---- files -----------------------------------------------------------------------------------


def onnx_file():
    return b"\x08\x07\x12\x07pytorch" + bytes(99)


FILES = {
    "model.bin": (b"PK\3\4" + bytes(60), "it is a zip archive: torch.load reads"),
    "model.pt": (pickle.dumps({"w": [1.0] * 40}), "it is a pickle: torch.load reads"),
    "w.npy": (b"\x93NUMPY" + bytes(60), "it is an array of numpy: pyda8w4.quantize takes what numpy.load gives"),
    "model.onnx": (onnx_file(), "it seems to be an ONNX model"),
    "model.gguf": (b"version https://git-lfs.github.com/spec/v1\n", "it is a pointer of Git LFS: `git lfs pull`"),
    "old.bin": (b"lmgg" + bytes(60), "it is a file of ggml from before GGUF"),
    "config.json": (b'{"architectures": ["LlamaForCausalLM"]}', "the folder of a model is opened, not its config.json"),
    "page.safetensors": (b"<!DOCTYPE html><html></html>", "it is a web page: a download that has failed"),
    "empty": (b"", "it is empty"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("read", [pyda8w4.checkpoints.open, pyda8w4.load])
def test_files_of_other_kinds_are_named(name, read, tmp_path):
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read(tmp_path / name)
    assert name in str(caught.value) and str(caught.value).count(message) == 1


@pytest.mark.parametrize("length", [0x80, 0x280, 0x121008])
def test_a_safetensors_file_that_is_cut_off_is_nothing_else(length, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"w":{"dtype":"F32"')
    with pytest.raises(ValueError, match=r"it is not a safetensors file, or is cut off$"):
        pyda8w4.load(tmp_path / "model.safetensors")


def test_load_says_what_opens_other_models(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ValueError, match=r"it is a GGUF file, which pyda8w4\.checkpoints\.open reads"):
        pyda8w4.load(tmp_path / "model.gguf")
    save_file({"w": W}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"got no packed weights; .* by its folder \(pyda8w4\.checkpoints\.open\)"):
        pyda8w4.load(tmp_path / "model.safetensors")
    with pytest.raises(IsADirectoryError, match=r"pyda8w4\.checkpoints\.open takes those of models"):
        pyda8w4.load(tmp_path)


DOWNLOAD = "a model of huggingface.co is downloaded first: hf download Qwen/Qwen3-8B --local-dir Qwen3-8B"


@pytest.mark.parametrize(
    "path, hint",
    [
        ("Qwen/Qwen3-8B", f" ({DOWNLOAD})"),
        ("https://huggingface.co/Qwen/Qwen3-8B", " (what is on the web must be downloaded first)"),
        ("model.gguf", ""),
        ("models/model.gguf", ""),
        ("../models/llama", ""),
        ("/no/such/model", ""),
    ],
)
def test_models_that_are_not_here(path, hint):
    with pytest.raises(FileNotFoundError) as caught:
        pyda8w4.checkpoints.open(path)
    assert (caught.value.errno, caught.value.strerror) == (errno.ENOENT, f"No such file or directory{hint}")


def test_folders_that_are_no_model(tmp_path):
    def found(error, message):
        with pytest.raises(error) as caught:
            pyda8w4.checkpoints.open(tmp_path)
        assert message in str(caught.value)

    found(FileNotFoundError, "the folder has nothing")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\3\4")
    found(FileNotFoundError, "the folder has pytorch_model.bin")
    (tmp_path / "snapshots" / "0123").mkdir(parents=True)
    found(FileNotFoundError, f"in a cache of Hugging Face the model is the folder {tmp_path}/snapshots/0123")
    (tmp_path / "model.gguf").touch()
    found(FileNotFoundError, f"a GGUF file is opened itself: {tmp_path}/model.gguf")
    (tmp_path / "config.json").write_text("{}")
    found(ValueError, "got config.json, model.gguf, pytorch_model.bin, snapshots; save_pretrained of")


def test_names_that_a_checkpoint_does_not_have(tmp_path):
    pyda8w4.save(tmp_path / "model.safetensors", {"layers.0.q": PACKED, "layers.0.k": PACKED, "head": PACKED})
    checkpoint = pyda8w4.checkpoints.open(tmp_path / "model.safetensors")
    names = r"layers\.0\.[qk], layers\.0\.[qk]"
    with pytest.raises(ValueError, match=rf"got 'layers\.0\.v' \(it has {names}; checkpoint\.types has all\)"):
        checkpoint.packed("layers.0.v")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("file", PACKED), '^weights must be a mapping .*, got PackedWeight; save\\(path, {"name": packed}\\)'),
        (({"layer": PACKED}, "file"), "^path must be a str or path-like, got dict"),
        (("file", {"layer": W}), f"^weights must map str to .*, got str to ndarray; {MAKES}"),
        (("file", {"layer": QUANTIZED}), r"got str to QuantizedWeight; weights\['layer'\]\.pack\(\) makes one"),
    ],
)
def test_save_says_what_to_do(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=message):
        pyda8w4.save(*arguments)
    assert not list(tmp_path.iterdir())
