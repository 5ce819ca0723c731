"""The torch adapter. Results are compared with the numpy functions by equality."""

from __future__ import annotations

import copy
import io
import pickle
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pyda8w4

torch = pytest.importorskip("torch")

from torch import nn

from pyda8w4.torch import DA8W4Linear, FusedPart, fuse_linears, quantize_

# torch uses what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def expected(layer: DA8W4Linear, x: torch.Tensor) -> torch.Tensor:
    """By the numpy functions; through float32, which holds every half exactly, and one rounding."""
    k = x.shape[-1]
    out = pyda8w4.linear(
        x.float().reshape(-1, k).numpy(),
        layer.packed,
        None if layer.bias is None else layer.bias.numpy(),
        symmetric=layer.symmetric_activation,
    )
    return torch.from_numpy(out).to(x.dtype).reshape(*x.shape[:-1], -1)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


def sqnr(signal: torch.Tensor, noisy: torch.Tensor) -> float:
    signal, noisy = signal.double(), noisy.double()
    return float(20 * torch.log10(signal.norm() / (signal - noisy).norm()))


class Attention(nn.Module):
    """Layers that share an input, as models have them."""

    def __init__(self, bias: bool = False, k: int = 64) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(k, 64, bias), nn.Linear(k, 32, bias)
        self.v_proj, self.o_proj = nn.Linear(k, 32, bias), nn.Linear(32, k, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.q_proj(x)[..., :32] * self.k_proj(x) + self.v_proj(x))


GROUPS = [("q_proj", "k_proj", "v_proj")]


def calls(code: list[str]) -> int:
    return sum(text.count("torch.ops.pyda8w4.linear.default(") for text in code)


def compiled(model: nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, list[str], Callable[..., torch.Tensor]]:
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    function = torch.compile(model, fullgraph=True, dynamic=True)
    out, code = run_and_get_code(function, *inputs)
    return out, code, function


# ---- the layer -------------------------------------------------------------------------------


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
    assert layer.codes.data_ptr() == packed._arrays["codes"].ctypes.data
    assert layer.packed._arrays["scales"].ctypes.data == layer.scales.data_ptr()
    packed = pyda8w4.prepack(np.zeros((4, 4), np.uint8), np.array([2.0**-130, 1, 1, 1], np.float32))
    assert packed.scale_dtype == "bfloat16"
    layer = DA8W4Linear.from_packed(packed)
    assert layer.scales.dtype is torch.bfloat16 and layer.scales.data_ptr() == packed._arrays["scales"].ctypes.data


def test_mapped_weights_are_not_copied(tmp_path: Any) -> None:
    pytest.importorskip("safetensors")
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


# ---- what it refuses -------------------------------------------------------------------------


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


def test_operator_refuses_tensors_that_do_not_fit() -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(64, 40), 32)
    x = torch.zeros(2, 64)
    good = layer._arguments()
    assert torch.ops.pyda8w4.linear(x, *good).shape == (2, 40)
    codes, scales, sums, zps = good.weight
    bad = [
        *(good._replace(weight=[new, scales, sums, zps]) for new in (codes[:1], codes.char(), codes.transpose(0, 1))),
        *(good._replace(weight=[codes, new, sums, zps]) for new in (scales[:, :1], scales.double())),
        good._replace(weight=[codes, scales, sums[:1], zps]),
        *(good._replace(weight=[codes, scales, sums, new]) for new in (zps[:1], zps.int(), zps.to("meta"))),
        *(good._replace(weight=[*good.weight, new]) for new in (scales[:1], scales.double(), scales.half())),
        *(good._replace(weight=good.weight[:count]) for count in range(4)),
        *(good._replace(bias=new) for new in (good.bias[:39], good.bias.bfloat16())),
        *(good._replace(layout=[1, new, 64, 32]) for new in (0, 65, -40)),
        *(good._replace(layout=[1, 40, new, 32]) for new in (0, 63, 128, -64)),
        *(good._replace(layout=[1, 40, 64, new]) for new in (0, 4, 30, -32)),
        *(good._replace(layout=new) for new in ([2, 40, 64, 32], [], [1, 40, 64], [1, 40, 64, 32, 0])),
        good._replace(activation="int4"),
    ]
    for arguments in bad:
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.pyda8w4.linear(x, *arguments)


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


# ---- moving, copying, saving -----------------------------------------------------------------


def test_to_dtype_keeps_the_weights() -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(64, 40), 32)
    x = torch.randn(2, 64)
    want = layer(x)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for move in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.cpu, lambda m: m.type(torch.half)):
        assert move(layer) is layer
        assert all(same(value, before[name]) for name, value in layer.state_dict().items())
    assert same(layer.to(torch.bfloat16)(x), want)


def test_to_another_device_is_an_error() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = DA8W4Linear.from_linear(nn.Linear(64, 8))
    x = torch.randn(2, 64)
    want = layer(x)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=r"CPU only.*cuda"):
        layer._apply(lambda t: torch.empty_like(t, device="cuda"))  # what .to("cuda") does, without a GPU
    assert same(layer(x), want)


def test_meta_and_back() -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(64, 40), 32)
    x = torch.randn(2, 64)
    with torch.device("meta"):
        empty = DA8W4Linear(64, 40)
    assert empty.codes.is_meta
    with pytest.raises(ValueError, match="meta"):
        empty(x)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert same(empty(x), layer(x)) and empty.codes.data_ptr() == layer.codes.data_ptr()
    moved = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    moved.load_state_dict(layer.state_dict())
    assert same(moved(x), layer(x))


@pytest.mark.parametrize("symmetric_weight", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("way", ["torch", "safetensors"])
def test_state_dict(symmetric_weight: bool, assign: bool, way: str, tmp_path: Any) -> None:
    model = Attention(bias=True)
    quantize_(model, 32, symmetric_weight=symmetric_weight)
    x = torch.randn(2, 64)
    if way == "torch":
        torch.save(model.state_dict(), tmp_path / "s")
        state = torch.load(tmp_path / "s", weights_only=True)
    else:
        from safetensors.torch import load_file, save_file

        save_file(model.state_dict(), tmp_path / "s")
        state = load_file(tmp_path / "s")
    other = Attention(bias=True)
    quantize_(other, 16, symmetric_weight=not symmetric_weight)  # the state says what its groups are
    assert not same(other(x), model(x))
    other.load_state_dict(state, strict=True, assign=assign)
    assert same(other(x), model(x))
    assert (other.q_proj.codes.data_ptr() == state["q_proj.codes"].data_ptr()) == assign


def test_state_dict_that_does_not_fit() -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(64, 40), 32)
    x = torch.randn(2, 64)
    want, good = layer(x), layer.state_dict()
    changes: dict[str, Any] = {
        "layout": [torch.tensor([2, 40, 64, 32]), torch.tensor([1, 40, 60, 32]), torch.tensor([1, 40, 64, 30])],
        "codes": [good["codes"][:1], good["codes"].char(), good["codes"].to_sparse()],
        "scales": [good["scales"][:, :1], good["scales"].double()],
        "sums": [good["sums"].half()],
        "zps": [good["zps"][:1], good["zps"].int()],
        "bias": [torch.zeros(1)],
    }
    for name, values in changes.items():
        for value in values:
            with pytest.raises(RuntimeError, match=name):
                layer.load_state_dict({**good, name: value})
            assert same(layer(x), want)  # nothing was taken of it
    with pytest.raises(RuntimeError, match=r"Missing key.*zps"):
        layer.load_state_dict({name: value for name, value in good.items() if name != "zps"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight"):
        layer.load_state_dict({**good, "weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        DA8W4Linear(64, 40, bias=False).load_state_dict(good)
    layer.load_state_dict({"codes": good["codes"]}, strict=False)
    assert same(layer(x), want)


def test_group_too_large_for_its_zero_points() -> None:
    k = 1 << 18
    layer = DA8W4Linear(k, 1, group_size=k)
    state = layer.state_dict() | {"zps": torch.tensor(-128, dtype=torch.int8)}
    with pytest.raises(RuntimeError, match="too large"):
        layer.load_state_dict(state)


def test_deepcopy_pickle_and_save() -> None:
    model = Attention()
    quantize_(model)
    fuse_linears(model, GROUPS)
    x = torch.randn(2, 64)
    want = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert same(other(x), want)
        assert other.k_proj._sharing.whole is other.q_proj.fused
        other.q_proj.fused.codes.zero_()
        assert not same(other(x), want)
    assert same(model(x), want)


def _child(model: nn.Module, x: torch.Tensor, queue: Any) -> None:
    with torch.no_grad():
        queue.put(model(x).numpy())


def test_torch_multiprocessing() -> None:
    import torch.multiprocessing as multiprocessing

    layer = DA8W4Linear.from_linear(nn.Linear(64, 40))
    x = torch.randn(2, 64)
    want = layer(x)
    model = nn.Sequential(layer).share_memory()  # moves the memory under the tensors
    assert layer.codes.is_shared() and layer.scales.is_shared()
    assert same(model(x), want)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_child, args=(model, x, queue))
    process.start()
    assert (queue.get(timeout=120) == want.numpy()).all()
    process.join()
    assert process.exitcode == 0


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


# ---- operators and compilers -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_opcheck(dtype: Any, bias: bool, symmetric: bool) -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(64, 40, bias=bias), symmetric_activation=symmetric)
    for shape in ((3, 64), (2, 3, 64), (64,)):
        torch.library.opcheck(torch.ops.pyda8w4.linear, (torch.randn(shape).to(dtype), *layer._arguments()))


def test_fake_shapes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils import _pytree as pytree

    layer = DA8W4Linear.from_linear(nn.Linear(64, 40))
    for dtype in FLOATS:
        x = torch.randn(2, 3, 64).transpose(0, 1).to(dtype)
        with FakeTensorMode() as mode:
            fake = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (x, *layer._arguments()))
            found = torch.ops.pyda8w4.linear(*fake)
        real = layer(x)
        assert (found.shape, found.stride(), found.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [1, 160])
@pytest.mark.parametrize("symmetric", [False, True])
def test_scenarios_of_torchao(dtype: Any, dims: int, bias: bool, batch: int, symmetric: bool) -> None:
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear1, self.linear2 = nn.Linear(256, 128, bias), nn.Linear(128, 256, bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear2(self.linear1(x))

    model = Toy().eval().to(dtype)
    shape = (batch, *([2] if dims == 3 else []), 256)
    # The error of one row alone is a matter of luck.
    inputs = [torch.randn(shape).to(dtype) for _ in range(100 if batch == 1 else 1)]
    float_out = torch.stack([model(x) for x in inputs])
    quantize_(model, 32, symmetric_activation=symmetric)
    out, code, function = compiled(model, inputs[0])
    assert calls(code) == 2
    assert same(out, model(inputs[0]))
    assert sqnr(float_out, torch.stack([function(x) for x in inputs])) > (20 if dtype is torch.float32 else 15)


def test_one_compilation_for_all_batch_sizes() -> None:
    model = Attention()
    quantize_(model)
    _, _, function = compiled(model, torch.randn(4, 64))
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (2, 3, 7, 160, 1000):
            x = torch.randn(batch, 64)
            assert same(function(x), model(x))


def test_export(tmp_path: Any) -> None:
    model = nn.Sequential(Attention())
    quantize_(model)
    fuse_linears(model, GROUPS)
    x = torch.randn(4, 64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert str(program.graph).count("torch.ops.pyda8w4.linear.default") == 2
    torch.export.save(program, tmp_path / "p.pt2")
    program = torch.export.load(tmp_path / "p.pt2")
    for batch in (2, 9):
        x = torch.randn(batch, 64)
        assert same(program.module()(x), model(x))


def test_tracers_see_the_operator() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    layer = DA8W4Linear.from_linear(nn.Linear(64, 40))
    x, other = torch.randn(2, 64), torch.randn(2, 64)
    assert same(make_fx(layer)(x)(other), layer(other))
    assert same(torch.fx.symbolic_trace(layer)(other), layer(other))


# ---- whole models ----------------------------------------------------------------------------


def test_report() -> None:
    class Other(nn.Linear):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(16, 64)
            self.good, self.unwanted, self.other = nn.Linear(64, 64), nn.Linear(64, 8), Other(64, 64)
            self.odd = nn.Linear(33, 3)
            self.bad, self.wide, self.hooked = nn.Linear(64, 8), nn.Linear(64, 8).double(), nn.Linear(64, 8)
            self.attention = nn.MultiheadAttention(64, 2)
            self.head = nn.Linear(64, 16)
            self.head.weight = self.embed.weight

    model = Model()
    model.bad.weight[0, 0] = float("nan")
    model.hooked.register_forward_hook(lambda *_: None)
    report = quantize_(model, 32, filter_fn=lambda module, name: name != "unwanted")
    assert report.replaced == ["good", "odd"]
    reasons = {
        "unwanted": "filter_fn",
        "other": "subclass",
        "bad": "NaN",
        "wide": "float64",
        "hooked": "hooks",
        "attention.out_proj": "subclass",
        "head": r"embed \(Embedding\)",
    }
    assert report.kept.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert re.search(reason, report.kept[name])
        assert isinstance(model.get_submodule(name), nn.Linear)
    assert str(report).startswith("replaced 2 of 9 Linear layers")
    assert isinstance(model.good, DA8W4Linear) and model.odd.group_size == 32


def test_tied_weights_stay_tied() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(64, 32, bias=False)
            self.b.weight = self.c.weight = self.a.weight
            self.again = self.a

    model = Model()
    biases = model.a.bias.clone(), model.b.bias.clone()
    report = quantize_(model)
    assert report.replaced == ["a", "b", "c", "again"]
    assert model.again is model.a and model.b is not model.a
    for other in (model.b, model.c):
        assert other.codes.data_ptr() == model.a.codes.data_ptr()
    assert same(model.a.bias, biases[0]) and same(model.b.bias, biases[1]) and model.c.bias is None
    x = torch.randn(2, 64)
    assert same(model.c(x), expected(model.c, x)) and same(model.b(x), expected(model.b, x))


def test_float_weights_are_freed_one_by_one() -> None:
    program = """
import resource, sys, torch, pyda8w4.torch
layers, size = 12, 2048
model = torch.nn.Sequential(*(torch.nn.Linear(size, size, bias=False) for _ in range(layers)))
pyda8w4.torch.quantize_(torch.nn.Sequential(torch.nn.Linear(64, 64)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pyda8w4.torch.quantize_(model)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (size * size * 4))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # All packed weights together take one and a half float ones, and each is made before its float one goes.
    assert float(done.stdout) < 2


def test_train_mode_and_generic_helpers() -> None:
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    quantize_(model)
    assert not model[0].training
    assert not list(model.parameters())
    model.requires_grad_(False).train()
    assert model[0].training


def test_weights_of_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup

    for mapping in quantization.MappingType.SYMMETRIC, quantization.MappingType.ASYMMETRIC:
        model = nn.Sequential(nn.Linear(128, 48))
        config = quantization.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=PerGroup(32), weight_mapping_type=mapping
        )
        quantization.quantize_(model, config)
        dense, x = model[0].weight.dequantize(), torch.randn(100, 128)
        float_out = nn.functional.linear(x, dense, model[0].bias)
        assert quantize_(model).replaced == ["0"]
        assert model[0].group_size == 32
        assert sqnr(float_out, model(x)) > 35  # only activations were quantized
    model = nn.Sequential(nn.Linear(128, 48))
    quantization.quantize_(model, quantization.Float8WeightOnlyConfig())
    assert "no plain int4" in quantize_(model).kept["0"]


def test_llama(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip

    def make() -> nn.Module:
        model = transformers.LlamaForCausalLM(config).eval()
        report = quantize_(model, 32)
        assert len(report.replaced) == 14 and list(report.kept) == ["lm_head"]
        fuse_linears(model, [*GROUPS, ("gate_proj", "up_proj")])
        return model

    prompt = torch.arange(10)[None]
    model = make()
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
    want = model.generate(prompt, **options)
    assert want.shape == (1, 22)
    torch.save(model.state_dict(), tmp_path / "s")
    other = make()
    other.load_state_dict(torch.load(tmp_path / "s", weights_only=True), strict=True)
    assert same(other(prompt).logits, model(prompt).logits)
    assert same(
        other.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False), want
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric_weight", [False, True])
def test_transformers_config(dtype: Any, symmetric_weight: bool, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    from pyda8w4.torch.transformers import DA8W4Config

    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, attention_bias=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path / "float")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "float", dtype=dtype)
    config = DA8W4Config(32, symmetric_weight=symmetric_weight, symmetric_activation=True)
    first = load(tmp_path / "float", dtype=dtype, quantization_config=config)
    quantize_(model, 32, True, symmetric_weight)
    prompt = torch.arange(10)[None]
    assert same(first(prompt).logits, model(prompt).logits)
    first.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed", dtype=dtype)
    assert same(again(prompt).logits, model(prompt).logits)
    assert again.model.layers[1].self_attn.q_proj.symmetric_activation
    fuse_linears(again, GROUPS)
    assert same(again(prompt).logits, model(prompt).logits)
    with pytest.raises(ValueError, match="before fuse_linears"):
        again.save_pretrained(tmp_path / "fused")
    for keep in (["up_proj"], []):
        config = DA8W4Config(32, modules_to_not_convert=keep)
        other = load(tmp_path / "float", quantization_config=config)
        assert isinstance(other.model.layers[0].mlp.up_proj, nn.Linear) == bool(keep)
    with pytest.raises(ValueError, match="group_size"):
        DA8W4Config(6)


# ---- joined layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fused_layers(bias: bool, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Attention(bias), Attention(bias))
    quantize_(model, 32)
    with mode():
        x = torch.randn(3, 5, 64)
        want = model(x)
        report = fuse_linears(model, GROUPS)
        assert report.replaced == ["0.(q_proj, k_proj, v_proj)", "1.(q_proj, k_proj, v_proj)"] and not report.kept
        assert isinstance(model[0].k_proj, FusedPart)
        counted = []
        forward = DA8W4Linear.forward
        monkeypatch.setattr(DA8W4Linear, "forward", lambda self, x: counted.append(1) or forward(self, x))
        assert same(model(x), want)
        assert len(counted) == (4 if mode is torch.no_grad else 2)  # in inference mode parts do not go through it
    assert model[0].k_proj._sharing.entry is None
    assert [key for key in model.state_dict() if key.startswith("0.k_proj")] == []
    other = nn.Sequential(Attention(bias), Attention(bias))
    quantize_(other, 32)
    fuse_linears(other, GROUPS)
    other.load_state_dict(model.state_dict())
    x = x.clone()
    assert same(other(x), model(x))


def test_fused_layers_in_any_order() -> None:
    model = Attention()
    quantize_(model, 32)
    x, y = torch.randn(3, 64), torch.randn(3, 64)
    want = {(name, i): getattr(model, name)(v) for name in GROUPS[0] for i, v in enumerate((x, y))}
    fuse_linears(model, GROUPS)
    for name, i in [("v_proj", 0), ("q_proj", 1), ("q_proj", 1), ("k_proj", 0), ("v_proj", 0), ("k_proj", 1)] * 3:
        assert same(getattr(model, name)((x, y)[i]), want[name, i])
    for mode in (torch.no_grad, torch.inference_mode):  # an input that changes in between
        with mode():
            z = x.clone()
            q = model.q_proj(z)
            z.copy_(y)
            assert same(q, want["q_proj", 0]) and same(model.k_proj(z), want["k_proj", 1])


def test_fused_layers_leave_one_call() -> None:
    model = Attention()
    quantize_(model)
    x = torch.randn(3, 64)
    want = model(x)
    assert calls(compiled(model, x)[1]) == 4
    fuse_linears(model, GROUPS)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out, code, function = compiled(model, x)
            assert calls(code) == 2 and same(out, want)
            x = torch.randn(7, 64)
            assert same(function(x), model(x))
            x, want = torch.randn(3, 64), None
            want = model(x)


def test_fused_layers_of_odd_sizes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 33), nn.Linear(64, 7)

    model = Model()
    quantize_(model, 32)
    with torch.inference_mode():
        x = torch.randn(3, 64)
        want = model.a(x), model.b(x)
        fuse_linears(model, [("a", "b")])
        assert same(model.a(x), want[0]) and same(model.b(x), want[1])


def test_layers_that_cannot_be_fused() -> None:
    model = nn.ModuleList(Attention() for _ in range(5))
    model[1].q_proj = nn.Linear(64, 64, bias=True)
    model[2].q_proj = nn.Linear(32, 64, bias=False)
    quantize_(model, 32, filter_fn=lambda module, name: name != "0.k_proj")
    model[3].v_proj = DA8W4Linear.from_linear(nn.Linear(64, 32, bias=False), 16)
    report = fuse_linears(model, GROUPS)
    assert report.replaced == ["4.(q_proj, k_proj, v_proj)"]
    for number, reason in enumerate(["Linear", "bias", "in_features", "group_size"]):
        assert reason in report.kept[f"{number}.(q_proj, k_proj, v_proj)"]


def test_fused_layers_from_several_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = Attention()
    quantize_(model, 32)
    inputs = [torch.randn(3, 64) for _ in range(200)]
    want = [model(x) for x in inputs]
    fuse_linears(model, GROUPS)

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(x)

    with ThreadPoolExecutor(4) as pool:
        assert all(same(a, b) for a, b in zip(pool.map(run, inputs), want))


# ---- threads ---------------------------------------------------------------------------------


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
