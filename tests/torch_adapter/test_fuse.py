"""Fused layers: one product for layers that share an input."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
from cases import Weight, pack

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn
from torch_cases import GROUPS, MARKS, Attention, calls, compiled, same

from pyda8w4.torch import DA8W4Linear, FusedPart, fuse_linears, quantize_

pytestmark = MARKS


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_fused_layers(bias: bool, mode: Any) -> None:
    model = nn.Sequential(Attention(bias), Attention(bias))
    quantize_(model, 32)
    with mode():
        x = torch.randn(3, 5, 64)
        want = model(x)
        report = fuse_linears(model, GROUPS)
        assert report.replaced == ["0.(q_proj, k_proj, v_proj)", "1.(q_proj, k_proj, v_proj)"] and not report.kept
        assert isinstance(model[0].k_proj, FusedPart)
        assert same(model(x), want)
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


def _by_numpy(x: torch.Tensor, y: torch.Tensor) -> None:
    x.numpy()[:] = y.numpy()


CHANGES: dict[str, Any] = {
    "numpy": _by_numpy,
    "data": lambda x, y: x.data.copy_(y),
    "other memory": lambda x, y: setattr(x, "data", y.clone()),
    "other type": lambda x, y: setattr(x, "data", y.bfloat16()),
    "in place": lambda x, y: x.copy_(y),
    "one number": lambda x, y: x.data[-1, -1].add_(100),
    "view": lambda x, y: x.view(-1).numpy().fill(0.5),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_fused_layers_and_inputs_that_change(change: str, mode: Any) -> None:
    model = Attention()
    quantize_(model, 32)
    separate = copy.deepcopy(model)
    fuse_linears(model, GROUPS)
    with mode():
        x, y = torch.randn(3, 64), torch.randn(3, 64)
        model.q_proj(x)
        CHANGES[change](x, y)
        assert same(model.k_proj(x), separate.k_proj(x)) and same(model.v_proj(x), separate.v_proj(x))


@pytest.mark.parametrize("way", ["load", "assign", "in place", "data"])
def test_fused_layers_and_weights_that_change(way: str) -> None:
    model, other, x = Attention(bias=True), Attention(bias=True), torch.randn(3, 64)
    for each in (model, other):
        quantize_(each, 32)
        fuse_linears(each, GROUPS)
    want = other.k_proj(x.clone())
    model.q_proj(x)
    for name, tensor in other.state_dict().items():
        own = model.state_dict()[name]
        if way == "in place":
            own.copy_(tensor)
        elif way == "data":
            model.get_buffer(name).data = tensor.clone()
    if way in ("load", "assign"):
        model.load_state_dict(other.state_dict(), assign=way == "assign")
    assert same(model.k_proj(x), want)


def test_fused_layers_keep_no_input() -> None:
    model = Attention()
    quantize_(model, 32)
    fuse_linears(model, GROUPS)
    x = torch.randn(3, 64)
    model.q_proj(x)
    alive = weakref.ref(x)
    del x
    assert alive() is None and model.k_proj._sharing.traced is None


def test_compiled_fused_layer_that_is_called_alone() -> None:
    model, separate = Attention(), Attention()
    separate.load_state_dict(model.state_dict())
    quantize_(model, 32)
    quantize_(separate, 32)
    fuse_linears(model, GROUPS)
    x = torch.randn(3, 64)
    torch._dynamo.reset()
    function = torch.compile(model.q_proj, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert same(function(x), separate.q_proj(x))
        x.data.normal_()


def test_fused_layers_in_traces() -> None:
    model = Attention()
    quantize_(model, 32)
    x, other = torch.randn(3, 64), torch.randn(3, 64)
    want = model(other)
    fuse_linears(model, GROUPS)
    graph = torch.fx.symbolic_trace(model)
    assert same(graph(other), want) and str(graph.graph).count("pyda8w4.linear") == 2
    assert same(torch.jit.trace(model, x)(other), want)
    from torch.fx.experimental.proxy_tensor import make_fx

    assert same(make_fx(model)(x)(other), want)


@pytest.mark.pitfall("torchao", "concat pass overwrites the single Inductor hook")
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
            self.a, self.b, self.c = nn.Linear(64, 33), nn.Linear(64, 7), nn.Linear(64, 70)

    model = Model()
    quantize_(model, 32)
    x = torch.randn(3, 64)
    want = model.a(x), model.b(x), model.c(x)
    fuse_linears(model, [("a", "b", "c")])
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            for given in (x, x.clone().requires_grad_()):
                assert all(same(layer(given), one) for layer, one in zip(model.children(), want))
    assert model.b.forward(x).shape == (3, 7)


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


def test_fused_layers_of_other_kinds() -> None:
    def layer(act: str = "int8_group", n: int = 64, **kind: Any) -> DA8W4Linear:
        return DA8W4Linear.from_packed(pack(Weight(n, 64, 16, "float16", 0, **kind)), act=act)

    groups = {
        "two levels": [layer(bits=6, supers=2), layer(bits=6, supers=2, n=40)],
        "acts": [layer(bits=8), layer("int16", bits=8)],
        "bits": [layer(bits=8), layer(bits=5)],
        "levels": [layer(bits=6), layer(bits=6, supers=2)],
        "factors": [layer(bits=6, factors=True), layer(bits=6)],
        "rotations": [layer(rotation=16), layer(rotation=32)],
    }
    model = nn.ModuleDict({name: nn.ModuleDict(dict(zip("ab", pair))) for name, pair in groups.items()})
    x = torch.randn(3, 64)
    want = {name: [layer(x) for layer in pair] for name, pair in groups.items()}
    report = fuse_linears(model, [("a", "b")])
    assert report.replaced == ["two levels.(a, b)"]
    assert model["two levels"]["a"].fused.act == "int8_group"
    reasons = {
        "acts": "act differs",
        "bits": "bits",
        "levels": "super_size",
        "factors": "factors",
        "rotations": "rotation",
    }
    for name, what in reasons.items():
        assert what in report.kept[f"{name}.(a, b)"]
    for name, outs in want.items():
        assert all(same(layer(x), out) for layer, out in zip(model[name].values(), outs))
    model["two levels"]["a"].fused.act = "uint8"
    assert same(model["two levels"]["b"](x), layer("uint8", bits=6, supers=2, n=40)(x))


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
