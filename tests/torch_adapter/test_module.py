"""The layer: its results, its memory, what it refuses."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import weakref
from typing import Any

import numpy as np
import pytest
from cases import (
    stored_arrays,
)

import pyda8w4

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn
from torch_cases import ACTS, FLOATS, GROUPS, MARKS, Attention, calls, compiled, expected, same

from pyda8w4.torch import DA8W4Linear, fuse_linears, quantize_

pytestmark = MARKS


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3), ()])
def test_layer_is_the_numpy_function(dtype: Any, bias: bool, act: str, shape: tuple[int, ...]) -> None:
    linear = nn.Linear(100, 70, bias=bias).to(dtype)
    layer = DA8W4Linear.from_linear(linear, 36, act=act)
    x = torch.randn(*shape, 100).to(dtype)
    assert same(layer(x), expected(layer, x))
    weight = pyda8w4.quantize(linear.weight.float().numpy(), 36)
    for have, want in zip(layer.packed.unpack(), weight.unpack()):
        assert (have == want).all()


def test_no_rows() -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(32, 8))
    assert layer(torch.empty(0, 32)).shape == (0, 8)
    assert layer(torch.empty(2, 0, 32)).shape == (2, 0, 8)


def test_non_contiguous_input() -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(64, 48))
    x = torch.randn(64, 6).t()
    assert same(layer(x), layer(x.contiguous()))
    x = torch.randn(6, 128)[:, ::2]
    assert same(layer(x), layer(x.contiguous()))
    x = torch.randn(64).expand(5, 64)
    assert same(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("act", ACTS)
def test_use_kernel(act: str, kernel: str) -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(130, 70), 32, act=act)
    x = torch.randn(9, 130)
    with pyda8w4.use_kernel("scalar"):
        want = layer(x)
    assert same(layer(x), want)


@pytest.mark.parametrize("rows", [4500, 3 * 4096, 3 * 4096 + 1])
def test_every_row_of_a_large_weight_is_quantized(rows: int) -> None:
    few = torch.randn(50, 1024).bfloat16()
    order = torch.arange(rows) % len(few)
    linear = nn.Linear(1024, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(few[order], requires_grad=False)
    unpacked = DA8W4Linear.from_linear(linear, 64).packed.unpack()
    for got, want in zip(unpacked, pyda8w4.quantize_weight(few.float().numpy(), 64), strict=True):
        np.testing.assert_array_equal(got, want[order.numpy()])


def test_from_int4() -> None:
    codes = torch.randint(0, 16, (40, 64), dtype=torch.uint8)
    scales, zps = torch.rand(40, 2).bfloat16(), torch.randint(0, 16, (40, 2), dtype=torch.int32)
    layer = DA8W4Linear.from_int4(codes, scales, zps, torch.arange(40.0))
    packed = pyda8w4.prepack(codes.numpy(), scales.float().numpy(), zps.numpy())
    x = torch.randn(3, 64)
    assert (layer(x).numpy() == pyda8w4.linear(x.numpy(), packed, np.arange(40, dtype=np.float32))).all()


def test_offsets() -> None:
    codes, zps = torch.randint(0, 16, (70, 64), dtype=torch.uint8), torch.zeros(70, 2, dtype=torch.int8)
    scales, offsets = torch.rand(70, 2).half(), torch.randn(70, 2).half()
    layer = DA8W4Linear.from_int4(codes, scales, zps, offsets=offsets)
    x = torch.randn(3, 64)
    assert same(layer(x), expected(layer, x))
    assert same(torch.from_numpy(layer.packed.unpack()[3]), offsets.float())
    plain = DA8W4Linear.from_int4(codes, scales, zps)
    assert not same(plain(x), layer(x))
    assert same(layer.columns(x, 32, 70), layer(x)[:, 32:])
    other = copy.deepcopy(plain)
    other.load_state_dict(layer.state_dict())
    assert same(other(x), layer(x))
    other.load_state_dict(plain.state_dict())
    assert same(other(x), plain(x)) and "offsets" not in other.state_dict()
    assert same(compiled(layer, x)[0], layer(x))


def test_from_packed_shares_memory() -> None:
    packed = pyda8w4.quantize(np.ones((64, 64), np.float32))
    layer = DA8W4Linear.from_packed(packed)
    assert layer.codes.data_ptr() == stored_arrays(packed)["codes"].ctypes.data
    assert stored_arrays(layer.packed)["scales"].ctypes.data == layer.scales.data_ptr()
    packed = pyda8w4.prepack(np.zeros((4, 4), np.uint8), np.array([2.0**-130, 1, 1, 1], np.float32))
    assert packed.scale_dtype == "bfloat16"
    layer = DA8W4Linear.from_packed(packed)
    assert (
        layer.scales.dtype is torch.bfloat16 and layer.scales.data_ptr() == stored_arrays(packed)["scales"].ctypes.data
    )


def test_mapped_weights_are_not_copied(tmp_path: Any) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    packed = pyda8w4.quantize(np.ones((64, 64), np.float32))
    pyda8w4.save(tmp_path / "w", {"w": packed})
    layer = DA8W4Linear.from_packed(pyda8w4.load(tmp_path / "w")["w"])
    x = torch.randn(2, 64)
    assert same(layer(x), DA8W4Linear.from_packed(packed)(x))


def test_output_and_input_are_not_copied() -> None:
    """Peak memory of a call: its output and the workspace, which the call before has left."""
    program = """
import resource, torch, pyda8w4.torch
layer = pyda8w4.torch.DA8W4Linear.from_linear(torch.nn.Linear(1024, 64))
x = torch.zeros(1 << 16, 1024, dtype=torch.bfloat16)  # 128 MiB
with torch.no_grad():
    layer(x[:512])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = layer(x)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, out.nbytes / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    grown, out = map(float, done.stdout.split())
    assert grown < out + 8


def test_repr() -> None:
    text = repr(DA8W4Linear(64, 32, bias=False, group_size=32, act="int8"))
    assert text == ("DA8W4Linear(in_features=64, out_features=32, bias=False, group_size=32, act=int8)")


def test_lazily_negated_input() -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(64, 48))
    x = torch.randn(3, 64)
    assert same(layer(torch._neg_view(x)), layer(-x))


def test_buffers_that_others_replace() -> None:
    """As loaders of large models do: assigned one by one."""
    a, b = DA8W4Linear.from_linear(nn.Linear(64, 40), 32), DA8W4Linear.from_linear(nn.Linear(64, 40), 32)
    x = torch.randn(2, 64)
    a(x)
    for name, value in b.named_buffers():
        setattr(a, name, value)
    assert same(a(x), b(x))
    a.scales = a.scales[:1]
    with pytest.raises(ValueError, match="scales"):
        a(x)


@pytest.mark.slow
def test_torch_threads_are_used() -> None:
    program = """
import {first}
import {second}
import torch, pyda8w4, pyda8w4.torch
layer = pyda8w4.torch.DA8W4Linear.from_linear(torch.nn.Linear(512, 512))
x = torch.randn(64, 512)
with torch.no_grad():
    layer(x)
assert "libgomp" in pyda8w4.cpu_info()["thread_runtime"], pyda8w4.cpu_info()
torch.set_num_threads(1)
assert pyda8w4.get_num_threads() == 1
"""
    for first, second in (("torch", "pyda8w4"), ("pyda8w4", "torch")):
        subprocess.run([sys.executable, "-c", program.format(first=first, second=second)], check=True)


# ---- what it refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, error, text",
    [
        (torch.zeros(2, 64, dtype=torch.float64), TypeError, "float64"),
        (torch.zeros(2, 64, dtype=torch.int8), TypeError, "int8"),
        (torch.zeros(2, 63), ValueError, r"\(..., 64\), got \(2, 63\)"),
        (torch.zeros(()), ValueError, r"\(..., 64\)"),
        (torch.zeros(2, 64, device="meta"), ValueError, "meta"),
        (torch.zeros(2, 64).to_sparse(), (ValueError, NotImplementedError), "parse"),
    ],
)
def test_bad_input(x: torch.Tensor, error: Any, text: str) -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(64, 8))
    with pytest.raises(error, match=text):
        layer(x)


def test_bad_arguments() -> None:
    linear = nn.Linear(64, 8)
    for make, error in [
        (lambda: DA8W4Linear(0, 8), ValueError),
        (lambda: DA8W4Linear(8, 8.0), ValueError),
        (lambda: DA8W4Linear(64, 8, group_size=30), ValueError),
        (lambda: DA8W4Linear.from_linear(nn.Conv1d(1, 1, 1)), TypeError),
        (lambda: DA8W4Linear.from_linear(linear.double()), TypeError),
        (lambda: DA8W4Linear.from_linear(nn.Linear(64, 8, device="meta")), ValueError),
        (lambda: DA8W4Linear.from_packed(linear.weight), TypeError),
        (lambda: DA8W4Linear.from_packed(DA8W4Linear(64, 8).packed, torch.zeros(9)), ValueError),
        (lambda: quantize_(linear), ValueError),
        (lambda: quantize_(nn.Sequential(linear), group_size=6), ValueError),
        (lambda: quantize_(nn.Sequential(linear), two_level=1), TypeError),
        (lambda: quantize_(nn.Sequential(linear), zeros="both"), ValueError),
        (lambda: quantize_(nn.Sequential(linear), rotate=33), ValueError),
        (lambda: quantize_(nn.Sequential(linear), method="minmax", two_level=True), ValueError),
        (lambda: fuse_linears(nn.Sequential(linear), ["ab"]), TypeError),
        (lambda: fuse_linears(nn.Sequential(linear), [("a",)]), ValueError),
        (lambda: fuse_linears(nn.Sequential(linear), [("a", "b")]), ValueError),
    ]:
        with pytest.raises(error):
            make()


@pytest.mark.parametrize("where", ["eager", "compiled"])
def test_backward_is_an_error(where: str) -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(64, 8))
    x = torch.randn(2, 64, requires_grad=True)
    with torch.enable_grad():
        if where == "compiled":
            torch._dynamo.reset()
            with pytest.raises(Exception, match="inference"):  # dynamo wraps it: the backward is traced beforehand
                torch.compile(layer)(x).sum().backward()
            return
        y = layer(x)  # the forward is fine: embeddings make inputs that require gradients
        with pytest.raises(NotImplementedError, match="inference"):
            y.sum().backward()


def test_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import pyda8w4.torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.returncode == 1 and "ImportError: pyda8w4.torch needs torch: pip install 'pyda8w4[torch]'" in done.stderr
    )


def test_tensors_that_numpy_functions_cannot_read() -> None:
    packed = DA8W4Linear.from_linear(nn.Linear(64, 40)).packed
    with torch.enable_grad():
        for name, call in [
            ("x", lambda: pyda8w4.linear(torch.randn(3, 64).bfloat16(), packed)),
            ("w", lambda: pyda8w4.quantize_weight(nn.Linear(64, 40).weight)),
            ("bias", lambda: pyda8w4.linear(np.zeros((3, 64), np.float32), packed, nn.Linear(64, 40).bias)),
        ]:
            with pytest.raises(TypeError, match=rf"^{name} must be an array.*pyda8w4\.torch"):
                call()


@pytest.mark.parametrize("name", ["codes", "scales", "sums", "zps", "bias"])
def test_buffers_that_are_given_other_memory(name: str) -> None:
    """As code does that offloads or shards: the tensor stays, its memory does not."""
    layer = DA8W4Linear.from_linear(nn.Linear(64, 40), 32, zeros="integer")
    x = torch.randn(2, 64)
    want, tensor = layer(x), getattr(layer, name)
    whole = tensor.clone()
    smaller = whole[: len(whole) // 2]
    for shrink in (lambda: setattr(tensor, "data", smaller.clone()), lambda: tensor.set_(smaller.clone())):
        shrink()
        for call in (lambda: layer(x), lambda: layer.packed if name != "bias" else layer(x)):
            with pytest.raises(ValueError, match=name):
                call()
        tensor.data = whole.clone()
        assert same(layer(x), want)
    # The same address, but less of it.
    tensor.data = tensor[:1]
    with pytest.raises(ValueError, match=name):
        layer(x)
    tensor.data = torch.zeros_like(whole)
    assert not same(layer(x), want)


def test_zero_point_that_is_changed_in_place() -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(64, 40), 32, zeros="none")
    x = torch.randn(2, 64)
    want = layer(x)
    layer.zps.fill_(7)
    assert not same(layer(x), want) and same(layer(x), expected(layer, x))


def test_a_layer_that_was_moved_keeps_no_memory() -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(64, 40), 32)
    layer(torch.randn(2, 64))
    codes = weakref.ref(layer.codes)
    layer.to("meta")
    assert codes() is None


@pytest.mark.parametrize("zeros", ["float", "integer", "none"])
def test_default_device(zeros: str) -> None:
    def make() -> tuple[nn.Module, torch.Tensor]:
        linear, x = nn.Linear(64, 64, device="cpu"), torch.ones(2, 64, device="cpu")
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        layer = DA8W4Linear.from_linear(linear, 32, zeros=zeros)
        codes, scales, zps, *offsets = map(torch.from_numpy, layer.packed.unpack())
        layers = {
            "linear": layer,
            "int4": DA8W4Linear.from_int4(codes, scales, zps, linear.bias, offsets=offsets[0] if offsets else None),
            "packed": DA8W4Linear.from_packed(layer.packed, linear.bias),
            "shared": layer.sharing_weight(linear.bias),
            "copy": copy.deepcopy(layer),
            "moved": copy.deepcopy(layer).half().share_memory(),
        }
        empty = DA8W4Linear(64, 64, device="cpu")
        empty.load_state_dict(layer.state_dict())
        model = nn.ModuleDict({**layers, "loaded": empty, "a": linear, "b": copy.deepcopy(linear)})
        quantize_(model, 32, zeros=zeros)
        fuse_linears(model, [("a", "b")])
        return model, torch.stack([layer(x) for layer in model.values()])

    weight, bias = torch.randn(64, 64), torch.randn(64)
    want = make()[1]
    assert all(same(row, want[0]) for row in want)
    with torch.device("meta"):
        model, out = make()
    assert same(out, want)
    assert all(tensor.is_cpu for tensor in model.state_dict().values())
    torch.set_default_device("meta")
    try:
        assert same(make()[1], want)
        assert DA8W4Linear(64, 64).codes.is_meta  # as nn.Linear is
    finally:
        torch.set_default_device(None)


def test_device_that_is_not_the_cpu() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(ValueError, match=r"device must be cpu or meta, got cuda"):
        DA8W4Linear(64, 64, device="cuda")


# ---- what it says of a weight -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_weight_says_what_that_of_a_linear_says(dtype: Any) -> None:
    linear = nn.Linear(64, 40).to(dtype)
    layer = DA8W4Linear.from_linear(linear, 32)
    weight, want = layer.weight, linear.weight
    assert isinstance(weight, torch.Tensor) and not weight.requires_grad
    for name in ("dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_meta", "itemsize", "grad"):
        assert getattr(weight, name) == getattr(want, name)
    for name in ("size", "dim", "numel", "element_size", "is_floating_point", "stride", "__len__"):
        assert getattr(weight, name)() == getattr(want, name)()
    assert weight.size(0) == 40 and weight.data.dtype is dtype and weight.detach().shape == (40, 64)
    assert weight.requires_grad_(False) is weight
    weight.requires_grad = False
    assert f"{weight}" == repr(weight) and "(40, 64)" in repr(weight)
    assert len({weight, weight}) == 1 and not hasattr(weight, "quant_state")
    for other in (copy.deepcopy(weight), copy.copy(weight), pickle.loads(pickle.dumps(weight))):
        assert (other.dtype, other.device, other.shape) == (weight.dtype, weight.device, weight.shape)
    assert "weight" not in layer.state_dict() and not list(layer.parameters())
    assert "weight" not in dict(layer.named_buffers()) and "_weight" not in layer.state_dict()


COMPUTING: list[Any] = [
    lambda w, x: nn.functional.linear(x, w),
    lambda w, x: x @ w.t(),
    lambda w, x: x @ w,
    lambda w, x: w @ x,
    lambda w, x: torch.matmul(x, w),
    lambda w, x: torch.einsum("mk,nk->mn", x, w),
    lambda w, x: torch.ops.aten.linear(x, w),
    lambda w, x: torch.ops.aten.mm.default(x, w),
    lambda w, x: torch.add(x, 1, out=w),
    lambda w, x: x.copy_(w),
    lambda w, x: w.to("meta"),
    lambda w, x: w.clone(),
    lambda w, x: w.numpy(),
    lambda w, x: w.tolist(),
    lambda w, x: w[0],
    lambda w, x: list(w),
    lambda w, x: w + 1,
    lambda w, x: w == w,
    lambda w, x: bool(w),
    lambda w, x: w.T,
    lambda w, x: w.view(-1),
    lambda w, x: w.sum(),
    lambda w, x: torch.cat([w, w]),
    lambda w, x: torch.empty_like(w),
    lambda w, x: w.new_empty(1),
    lambda w, x: nn.init.normal_(w),
    lambda w, x: w.data.normal_(),
    lambda w, x: w.data.zero_(),
    lambda w, x: w.set_(x),
    lambda w, x: w.__setitem__(0, 1.0),
    lambda w, x: np.asarray(w),
    lambda w, x: nn.functional.embedding(torch.tensor([0]), w),
    lambda w, x: torch.compile(nn.functional.linear, backend="eager")(x, w),
    lambda w, x: torch.vmap(lambda row: nn.functional.linear(row, w))(x),
]
READING: list[Any] = [
    lambda w, x: w.to(torch.float32),
    lambda w, x: w.float(),
    lambda w, x: w.data_ptr(),
    lambda w, x: w.untyped_storage(),
    lambda w, x: w.requires_grad_(),
    lambda w, x: setattr(w, "requires_grad", True),
    lambda w, x: setattr(w, "data", x),
]


@pytest.mark.parametrize("use", [*COMPUTING, *READING])
def test_weight_refuses_to_be_read(use: Any) -> None:
    weight, x = DA8W4Linear.from_linear(nn.Linear(64, 64), 32).weight, torch.randn(2, 64)
    with pytest.raises(Exception, match=r"is packed|no numbers|Unsupported|exception handler"):
        use(weight, x)


@pytest.mark.parametrize("use", COMPUTING)
def test_weight_refuses_to_be_computed_with_below_torch_function(use: Any) -> None:
    weight, x = DA8W4Linear.from_linear(nn.Linear(64, 64), 32).weight, torch.randn(2, 64)
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises((RuntimeError, TypeError, ValueError)):
        use(weight, x)


def test_weight_says_why_it_refuses() -> None:
    weight, x = DA8W4Linear.from_linear(nn.Linear(64, 40), 32).weight, torch.randn(2, 64)
    for use, what in [
        (lambda: nn.functional.linear(x, weight), "linear"),
        (lambda: weight.T, r"`\.T`"),
        (lambda: torch.ops.aten.mm.default(x, weight), "mm"),
    ]:
        with pytest.raises(NotImplementedError, match=rf"packed.*{what}.*filter_fn.*modules_to_not_convert"):
            use()


def test_weight_follows_the_layer() -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(64, 40), 32)
    x = torch.randn(2, 64)
    want = layer(x)
    assert layer.to(torch.bfloat16).weight.dtype is torch.bfloat16 and same(layer(x), want)
    assert layer.half().weight.dtype is torch.float16
    assert layer.double().weight.dtype is torch.float16  # no input of the layer
    assert copy.deepcopy(layer).weight.dtype is torch.float16
    assert pickle.loads(pickle.dumps(layer)).weight.dtype is torch.float16
    empty = DA8W4Linear(64, 40, device="meta", dtype=torch.bfloat16)
    assert empty.weight.is_meta and empty.weight.dtype is torch.bfloat16
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert empty.weight.is_cpu and empty.weight.dtype is torch.bfloat16
    assert layer.to("meta").weight.is_meta
    torch.set_default_dtype(torch.float16)
    try:
        assert DA8W4Linear(64, 40).weight.dtype is torch.float16
    finally:
        torch.set_default_dtype(torch.float32)
    with pytest.raises(ValueError, match="dtype"):
        DA8W4Linear(64, 40, dtype=torch.float64)


def test_weight_in_compiled_models() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(64, 64), nn.Linear(64, 40)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if isinstance(self.outer.weight, torch.Tensor) and x.dtype != self.outer.weight.dtype:
                x = x.to(self.outer.weight.dtype)
            return self.outer(self.inner(x)) * self.outer.weight.shape[1]

    model = Model()
    quantize_(model, 32)
    x = torch.randn(3, 64).bfloat16()
    out, code, _ = compiled(model, x)
    assert out.dtype is torch.float32 and same(out, model(x)) and calls(code) == 2
    program = torch.export.export(model, (x,))
    assert same(program.module()(x), model(x))


def test_weight_of_fused_layers() -> None:
    model = Attention(bias=True).bfloat16()
    quantize_(model, 32)
    want = {name: (layer.weight.dtype, layer.weight.shape, layer.bias) for name, layer in model.named_children()}
    fuse_linears(model, GROUPS)
    for name, (dtype, shape, bias) in want.items():
        layer = getattr(model, name)
        assert (layer.weight.dtype, layer.weight.shape) == (dtype, shape) and same(layer.bias, bias)


def test_a_weight_that_is_assigned() -> None:
    """As code does that ties a head to an embedding."""
    layer = DA8W4Linear.from_linear(nn.Linear(64, 40), 32)
    x = torch.randn(2, 64)
    want, state = layer(x), layer.state_dict()
    with pytest.warns(UserWarning, match="keeps its packed weight"):
        layer.weight = nn.Parameter(torch.randn(40, 64))
    assert same(layer(x), want) and layer.state_dict().keys() == state.keys()
    with pytest.raises(ValueError, match=r"weight must have shape \(40, 64\), got \(70, 64\)"):
        layer.weight = nn.Parameter(torch.randn(70, 64))
    with pytest.raises(AttributeError):
        layer.weight = torch.randn(40, 64)
    layer.scale = nn.Parameter(torch.ones(1))  # any other name is as in every module
    assert dict(layer.named_parameters()).keys() == {"scale"}


def test_encoder_of_torch() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 64)
    want = model(x)
    quantize_(model, 32)
    assert model(x).shape == want.shape and bool((model(x) - want).abs().max() < 0.5)


def test_progress(monkeypatch: Any, capsys: Any) -> None:
    from pyda8w4.torch import _quantize

    now = iter([0.0, 1.0, 3.0, 9.0])
    monkeypatch.setattr(_quantize.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(_quantize.sys.stderr, "isatty", lambda: True, raising=False)
    progress = _quantize.Progress("quantize_", 3)
    for _ in range(3):
        progress.step()
    progress.end()
    first, second, last = capsys.readouterr().err.replace("\x1b[K", "").split("\r")[1:]
    assert first == f"quantize_: {'#' * 10}{'.' * 20} 1 of 3 layers, 6 s left"
    assert second == f"quantize_: {'#' * 20}{'.' * 10} 2 of 3 layers, 4 s left"
    assert last == f"quantize_: {'#' * 30} 3 of 3 layers\n"
