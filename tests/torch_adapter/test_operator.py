"""The operator and compilers."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import Any

import pytest
from cases import KINDS, Weight, pack

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn
from torch_cases import ACTS, FLOATS, GROUPS, MARKS, Attention, calls, compiled, operator_arguments, same, sqnr

from pyda8w4.torch import DA8W4Linear, fuse_linears, quantize_

pytestmark = MARKS


def replaced(value: Any, old: Any, new: Any) -> Any:
    """The arguments with another tensor or number in the place of one, alone or in a list."""
    if isinstance(value, dict):
        return {name: replaced(each, old, new) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [replaced(each, old, new) for each in value]
    if isinstance(old, torch.Tensor):
        return new if isinstance(value, torch.Tensor) and value.data_ptr() == old.data_ptr() else value
    return new if type(value) is int and value == old else value


def test_operator_refuses_what_does_not_fit() -> None:
    codes, zps = torch.randint(0, 16, (40, 64), dtype=torch.uint8), torch.arange(80, dtype=torch.int8).reshape(40, 2)
    scales, offsets = torch.rand(40, 2).half(), torch.randn(40, 2).half()
    layer = DA8W4Linear.from_int4(codes, scales, zps, torch.zeros(40), offsets=offsets)
    x = torch.randn(2, 64)
    good = operator_arguments(layer)
    assert same(torch.ops.pyda8w4.linear(x, **good), layer(x))
    bad: list[tuple[Any, list[Any]]] = [
        (layer.codes, [layer.codes[:1], layer.codes.to(torch.int8), layer.codes.transpose(0, 1)]),
        (layer.scales, [layer.scales[:, :1], layer.scales.double()]),
        (layer.sums, [layer.sums[:1], layer.sums.double()]),
        (layer.zps, [layer.zps[:1], layer.zps.int()]),
        (layer.offsets, [layer.offsets[:1], layer.offsets.float(), layer.offsets.bfloat16()]),
        (layer.bias, [layer.bias[:39], layer.bias.bfloat16()]),
        (layer.in_features, [0, 63, 128, -64]),
        (layer.out_features, [0, 65, -40]),
        (layer.group_size, [0, 4, 30, -32]),
    ]
    for old, values in bad:
        for new in values:
            with pytest.raises((ValueError, RuntimeError)):
                torch.ops.pyda8w4.linear(x, **replaced(good, old, new))
    whole = [
        *({"weight": good["weight"][:count]} for count in range(4)),
        {"weight": [*good["weight"], layer.offsets]},
        *({"layout": layout} for layout in ([3, 40, 64, 32], [], [1, 40, 64], [1, 40, 64, 32, 0])),
        {"activation": "int4"},
    ]
    for new in whole:
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.pyda8w4.linear(x, **{**good, **new})


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", ACTS)
def test_opcheck(dtype: Any, bias: bool, act: str) -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(64, 40, bias=bias), act=act)
    for shape in ((3, 64), (2, 3, 64), (64,)):
        arguments = (torch.randn(shape).to(dtype), *operator_arguments(layer).values())
        torch.library.opcheck(torch.ops.pyda8w4.linear, arguments)


@pytest.mark.parametrize("weight", KINDS, ids=str)
def test_operator_takes_every_kind(weight: Weight) -> None:
    layer = DA8W4Linear.from_packed(pack(weight), act="int8_group")
    x = torch.randn(3, weight.k)
    arguments = operator_arguments(layer)
    assert same(torch.ops.pyda8w4.linear(x, **arguments), layer(x))
    fewer = {**arguments, "weight": arguments["weight"][:-1]}
    if len(arguments["layout"]) > 4:
        with pytest.raises(ValueError, match="weight must be codes, scales, sums, zps"):
            torch.ops.pyda8w4.linear(x, **fewer)
        for i in range(4):
            layout = list(arguments["layout"])
            layout[6] ^= 1 << i
            weight_without = [tensor for j, tensor in enumerate(arguments["weight"]) if j != i]
            with pytest.raises(ValueError, match=r"layout|must be"):
                torch.ops.pyda8w4.linear(x, weight_without, None, layout, "uint8")
    torch.library.opcheck(torch.ops.pyda8w4.linear, (x, *arguments.values()), test_utils=("test_faketensor",))


def test_graphs_of_layout_version_1() -> None:
    """As exported graphs hold it."""
    for offsets in (False, True):
        layer = DA8W4Linear.from_packed(pack(Weight(40, 64, 32, offsets=offsets)))
        x, arguments = torch.randn(3, 64), operator_arguments(layer)
        assert same(torch.ops.pyda8w4.linear(x, **{**arguments, "layout": [1, 40, 64, 32]}), layer(x))
    assert str(torch.ops.pyda8w4.linear.default._schema) == (
        "pyda8w4::linear(Tensor input, Tensor[] weight, Tensor? bias, int[] layout, str activation) -> Tensor"
    )


def test_compile_and_export_of_kinds(tmp_path: Any) -> None:
    kinds = [
        Weight(64, 96, 32, "float16", bits=8, zps=0),
        Weight(96, 64, 32, bits=5, offsets=True, supers=1, perm=True, factors=True),
        Weight(40, 96, 16, "bfloat16", 0, table=True, supers=2, rotation=64),
    ]
    model = nn.Sequential(*(DA8W4Linear.from_packed(pack(weight), act="int16") for weight in kinds))
    x = torch.randn(4, 96)
    out, code, function = compiled(model, x)
    assert calls(code) == 3 and same(out, model(x))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "p.pt2")
    program = torch.export.load(tmp_path / "p.pt2")
    for batch in (2, 9):
        x = torch.randn(batch, 96)
        assert same(program.module()(x), model(x)) and same(function(x), model(x))


@pytest.mark.pitfall("torchao", "fake kernel with another shape or stride")
def test_fake_shapes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils import _pytree as pytree

    layer = DA8W4Linear.from_linear(nn.Linear(64, 40))
    arguments = operator_arguments(layer)
    for dtype in FLOATS:
        x = torch.randn(2, 3, 64).transpose(0, 1).to(dtype)
        with FakeTensorMode() as mode:
            fake = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (x, *arguments.values()))
            found = torch.ops.pyda8w4.linear(*fake)
        real = layer(x)
        assert (found.shape, found.stride(), found.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [1, 160])
@pytest.mark.parametrize("act", ACTS)
def test_scenarios_of_torchao(dtype: Any, dims: int, bias: bool, batch: int, act: str) -> None:
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
    quantize_(model, 32, act=act)
    out, code, function = compiled(model, inputs[0])
    assert calls(code) == 2
    assert same(out, model(inputs[0]))
    assert sqnr(float_out, torch.stack([function(x) for x in inputs])) > (20 if dtype is torch.float32 else 15)


@pytest.mark.slow
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


# ---- differentiation, function transforms, autocast ----------------------------------------------


def test_vmap() -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(64, 40))
    x = torch.randn(5, 3, 64)
    want = layer(x)
    assert same(torch.vmap(layer)(x), want)
    assert same(torch.vmap(layer, in_dims=1, out_dims=1)(x), want)
    assert same(torch.vmap(torch.vmap(layer))(x), want)
    assert same(torch.vmap(layer, in_dims=-2, out_dims=1, chunk_size=2)(x), want)
    assert torch.vmap(layer)(torch.empty(5, 0, 64)).shape == (5, 0, 40)
    scale = torch.randn(3, 40)
    assert same(torch.vmap(lambda row: layer(x) * row)(scale)[1], want * scale[1])  # an input that is not mapped
    assert same(torch.func.functionalize(layer)(x), want)
    torch._dynamo.reset()
    assert same(torch.compile(torch.vmap(layer), fullgraph=True, backend="aot_eager")(x), want)
    model = Attention()
    quantize_(model)
    want = model(x)
    fuse_linears(model, GROUPS)
    assert same(torch.vmap(model)(x), want)
    weights = torch.stack([layer.scales, layer.scales])

    def scaled(scales: torch.Tensor) -> torch.Tensor:
        arguments = operator_arguments(layer)
        return torch.ops.pyda8w4.linear(x, **replaced(arguments, layer.scales, scales))

    with pytest.raises(NotImplementedError, match="vmap over the weights"):
        torch.vmap(scaled)(weights)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("called", ["layer", "fused", "operator"])
def test_forward_mode_and_transforms_refuse(grad: bool, called: str) -> None:
    import torch.autograd.forward_ad as forward_ad

    model: nn.Module = Attention()
    quantize_(model)
    if called == "fused":
        fuse_linears(model, GROUPS)
    layer = model.v_proj if called == "fused" else model.o_proj
    f: Any = partial(torch.ops.pyda8w4.linear, **operator_arguments(layer)) if called == "operator" else layer
    x = torch.randn(2, layer.in_features)
    want = f(x)
    with torch.set_grad_enabled(grad):
        with forward_ad.dual_level():
            assert same(f(x), want)  # no tangent
            dual = forward_ad.make_dual(x, x)
            for call in (lambda: f(dual), lambda: torch.vmap(f)(dual)):
                with pytest.raises(NotImplementedError, match="no gradients"):
                    call()
        for transform in (
            lambda: torch.func.jvp(f, (x,), (x,)),
            lambda: torch.func.jvp(torch.vmap(f), (x,), (x,)),
            lambda: torch.vmap(lambda x: torch.func.jvp(f, (x,), (x,)))(x),
            lambda: torch.func.linearize(f, x),
            lambda: torch.func.jacfwd(f)(x),
            lambda: torch.func.jacrev(f)(x),
            lambda: torch.func.vjp(f, x),
            lambda: torch.func.grad(lambda x: f(x).sum())(x),
            lambda: torch.func.grad(lambda x: torch.vmap(f)(x).sum())(x),
            lambda: torch.vmap(torch.func.grad(lambda x: f(x).sum()))(x),
            lambda: torch.autograd.functional.jvp(f, x, x),
        ):
            with pytest.raises(NotImplementedError, match="no gradients"):
                transform()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("called", ["layer", "fused", "operator"])
@pytest.mark.parametrize("nested_layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
def test_nested_tensors(nested_layout: torch.layout, called: str) -> None:
    model: nn.Module = Attention()
    quantize_(model)
    if called == "fused":
        fuse_linears(model, GROUPS)
    layer = model.v_proj if called == "fused" else model.o_proj
    f: Any = partial(torch.ops.pyda8w4.linear, **operator_arguments(layer)) if called == "operator" else layer
    k = layer.in_features
    parts = [torch.randn(3, k), torch.randn(0, k), torch.randn(5, k)]
    for grad in (False, True):
        nested = torch.nested.nested_tensor(parts, layout=nested_layout, requires_grad=grad)
        with torch.set_grad_enabled(grad):
            out = f(nested)
        assert out.is_nested and out.layout is nested_layout
        assert all(same(got, layer(part)) for got, part in zip(out.unbind(), parts, strict=True))
        assert out.requires_grad == grad
    assert f(nested.bfloat16()).dtype is torch.bfloat16
    with torch.inference_mode(), torch.profiler.profile():  # where fused layers call the operator of all
        inner = torch.nested.nested_tensor(parts, layout=nested_layout)
        assert all(same(got, layer(part)) for got, part in zip(f(inner).unbind(), parts))
    with torch.autocast("cpu"):
        assert layer(nested).dtype is torch.bfloat16
    with pytest.raises(TypeError, match="input must be float32"):
        f(nested.detach().double())
    with pytest.raises(ValueError, match=rf"input must have shape \(\.\.\., {k}\)"):
        f(torch.nested.nested_tensor([part[:, :-4] for part in parts], layout=nested_layout))
    if nested_layout is torch.jagged:
        assert (out + f(nested)).is_nested  # as residual branches are added: the ragged sizes are the same one
        ragged = torch.nested.nested_tensor([part.T for part in parts], layout=torch.jagged)
        assert all(same(got, layer(part)) for got, part in zip(f(ragged.transpose(1, 2)).unbind(), parts))
        with pytest.raises(ValueError, match="input must have shape"):
            f(ragged)
        torch._dynamo.reset()
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        assert all(same(got, layer(part)) for got, part in zip(compiled(nested.detach()).unbind(), parts))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_gradients_enabled(backend: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.linear, self.head = nn.Embedding(16, 64), nn.Linear(64, 48), nn.Linear(48, 16)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.linear(self.embed(ids))))

    model, ids = Model(), torch.arange(6)
    quantize_(model, 32)
    with torch.enable_grad():
        torch._dynamo.reset()
        function = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
        for _ in range(2):
            out = function(ids)
            assert same(out, model(ids)) and out.requires_grad
        for out in (function(ids), model(ids)):
            with pytest.raises(NotImplementedError, match="no gradients"):
                out.sum().backward()


@pytest.mark.parametrize("fused", [False, True])
def test_autocast(fused: bool) -> None:
    linear, model = nn.Linear(64, 64, bias=False), Attention()
    quantize_(model)
    x = torch.randn(3, 64)
    want = {dtype: model.q_proj(x.to(dtype)) for dtype in FLOATS}
    if fused:
        fuse_linears(model, GROUPS)
    layer = model.q_proj
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            for given in FLOATS:
                out = layer(x.to(given))
                assert out.dtype == linear(x.to(given)).dtype == dtype
            assert same(layer(x), want[dtype])
            cache = torch.zeros(3, 64, dtype=dtype)
            cache.index_put_((torch.arange(3),), layer(x))
            assert same(cache, want[dtype])
            with torch.inference_mode():
                assert same(layer(x), want[dtype])
            with torch.autocast("cpu", enabled=False):
                assert same(layer(x), want[torch.float32])
            torch._dynamo.reset()
            assert same(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), want[dtype])
        with torch.autocast("cuda", dtype=dtype, enabled=False):
            assert same(layer(x), want[torch.float32])
    # Parts that are called inside and outside.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.k_proj(x)
    assert same(layer(x), want[torch.float32])


# ---- tools of torch ------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_profiler_and_flop_counter(fused: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, x = Attention(), torch.randn(2, 3, 64)
    with FlopCounterMode(display=False) as counter:
        model(x)
    wanted = counter.get_total_flops()
    quantize_(model)
    if fused:
        fuse_linears(model, GROUPS)
    want = model(x)
    with FlopCounterMode(display=False) as counter:
        assert same(model(x), want)
    assert counter.get_total_flops() == wanted > 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert same(model(x), want)
    assert "pyda8w4::linear" in {event.key for event in profile.key_averages()}


def test_reload() -> None:
    import importlib

    from pyda8w4.torch import _ops

    layer = DA8W4Linear.from_linear(nn.Linear(64, 40))
    x = torch.randn(2, 64)
    want, arguments = layer(x), operator_arguments(layer)
    for _ in range(2):
        importlib.reload(_ops)
        assert same(torch.ops.pyda8w4.linear(x, **arguments), want) and same(layer(x), want)


def test_import_again() -> None:
    """As some reloaders do: the modules are forgotten and imported once more."""
    program = """
import gc, sys, torch, pyda8w4.torch
old = pyda8w4.torch.DA8W4Linear.from_linear(torch.nn.Linear(64, 40))
x = torch.randn(2, 64)
for name in [name for name in sys.modules if name.startswith("pyda8w4.torch")]:
    del sys.modules[name]
del pyda8w4.torch
import pyda8w4.torch
gc.collect()
new = pyda8w4.torch.DA8W4Linear.from_packed(old.packed, old.bias)
assert type(new) is not type(old)
for layer in old, new:
    assert torch.equal(layer(x), torch.ops.pyda8w4.linear(x, *new._arguments())), layer
    assert torch.equal(layer(x), torch.vmap(layer)(x))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_script_says_what_to_do() -> None:
    model = Attention()
    quantize_(model)
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script has no DA8W4Linear; use torch\.compile"):
        torch.jit.script(model)
    fuse_linears(model, GROUPS)
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script has no"):
        torch.jit.script(model)
