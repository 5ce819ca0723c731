"""The layer: its results, its memory, what it refuses."""

from __future__ import annotations

import copy
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
from torch_cases import FLOATS, MARKS, compiled, expected, same

from pyda8w4.torch import DA8W4Linear, fuse_linears, quantize_

pytestmark = MARKS


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3), ()])
def test_layer_is_the_numpy_function(dtype: Any, bias: bool, symmetric: bool, shape: tuple[int, ...]) -> None:
    linear = nn.Linear(100, 70, bias=bias).to(dtype)
    layer = DA8W4Linear.from_linear(linear, 36, symmetric_activation=symmetric)
    x = torch.randn(*shape, 100).to(dtype)
    assert same(layer(x), expected(layer, x))
    weight = pyda8w4.prepack(*pyda8w4.quantize_weight(linear.weight.float().numpy(), 36), group_size=36)
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


@pytest.mark.parametrize("symmetric", [False, True])
def test_use_kernel(symmetric: bool, kernel: str) -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(130, 70), 32, symmetric_activation=symmetric)
    x = torch.randn(9, 130)
    with pyda8w4.use_kernel("scalar"):
        want = layer(x)
    assert same(layer(x), want)


@pytest.mark.parametrize("rows", [4500, 3 * 4096, 3 * 4096 + 1])
def test_every_row_of_a_large_weight_is_quantized(rows: int) -> None:
    # Rows are quantized some at a time, 4096 of this length.
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
    packed = pyda8w4.prepack(*pyda8w4.quantize_weight(np.ones((64, 64), np.float32)))
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
    packed = pyda8w4.prepack(*pyda8w4.quantize_weight(np.ones((64, 64), np.float32)))
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
    text = repr(DA8W4Linear(64, 32, bias=False, group_size=32, symmetric_activation=True))
    assert text == (
        "DA8W4Linear(in_features=64, out_features=32, bias=False, group_size=32, symmetric_activation=True)"
    )


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
        (lambda: quantize_(nn.Sequential(linear), symmetric_weight=1), TypeError),
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
    layer = DA8W4Linear.from_linear(nn.Linear(64, 40), 32)
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
    layer = DA8W4Linear.from_linear(nn.Linear(64, 40), 32, symmetric_weight=True)
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


def test_default_device() -> None:
    linear, x = nn.Linear(64, 40), torch.randn(2, 64)
    want = DA8W4Linear.from_linear(linear, 32, symmetric_weight=True)(x)
    with torch.device("meta"):
        layer = DA8W4Linear.from_linear(linear, 32, symmetric_weight=True)
        assert same(layer(x), want)
