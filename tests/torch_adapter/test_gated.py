"""Gates and ups as one product: the operator, and MLPs that are replaced."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn
from torch_cases import FLOATS, MARKS, same

import pyda8w4
from pyda8w4.torch import DA8W4Linear, GatedMLP, fuse_gated, quantize_

pytestmark = MARKS

FUNCTIONS = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh")}


class MLP(nn.Module):
    def __init__(self, activation: nn.Module, bias: bool = False) -> None:
        super().__init__()
        self.down_proj = nn.Linear(96, 64, bias)  # the order and the names of layers do not tell what they are
        self.up_proj, self.gate_proj = nn.Linear(64, 96, bias), nn.Linear(64, 96, bias)
        self.act_fn = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def packed(activation: nn.Module, bias: bool = False, act: str = "uint8") -> Any:
    model = nn.Sequential(MLP(activation, bias)).eval()
    quantize_(model, 32, act)
    return model


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlps(name: str, bias: bool) -> None:
    model = packed(FUNCTIONS[name], bias, "int16")
    mlp = model[0]
    layers = {child: getattr(mlp, child) for child in ("gate_proj", "up_proj", "down_proj")}
    separate = copy.deepcopy(model)
    report = fuse_gated(model)
    assert report.replaced == ["0"] and not report.kept and f"activation={name}" in repr(model)
    assert isinstance(model[0], GatedMLP) and model[0].gate_up.act == "int16"
    whole = pyda8w4.concat([layers["gate_proj"].packed, layers["up_proj"].packed])
    bias_of_both = torch.cat([layers["gate_proj"].bias, layers["up_proj"].bias]).numpy() if bias else None
    for dtype in FLOATS:
        x = torch.randn(2, 5, 64).to(dtype)
        hidden = pyda8w4.linear_gated(x.float().numpy(), whole, bias_of_both, activation=name, act="int16")
        out = model(x)
        assert same(out, layers["down_proj"](torch.from_numpy(hidden).to(dtype)))
        want = separate(x).double()
        assert (out.double() - want).norm() / want.norm() < (1e-5 if dtype is torch.float32 else 1e-2)
    assert same(model(x[:0]), separate(x[:0]))


class Scaled(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Clamped(MLP):
    """As those of DeepSeek-V4 and GLM-5: what it clamps is seen with large inputs only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x).clamp(max=100), self.up_proj(x).clamp(-100, 100)
        return self.down_proj(self.act_fn(gate) * up)


class WithMore(MLP):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__(activation)
        self.norm = nn.LayerNorm(64)


class TwoInputs(MLP):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x + y)


def test_what_is_kept() -> None:
    silu = nn.SiLU()
    hooked, mixed, apart = MLP(silu), MLP(silu), MLP(silu)
    model = nn.ModuleDict({
        "good": MLP(silu), "relu": MLP(nn.ReLU()), "scaled": Scaled(silu), "clamped": Clamped(silu),
        "more": WithMore(silu), "two": TwoInputs(silu), "hooked": hooked, "mixed": mixed, "apart": apart,
        "dropout": MLP(nn.Sequential(silu, nn.Dropout(0.5))),
    }).eval()  # fmt: skip
    apart.up_proj = nn.Linear(64, 96)
    quantize_(model, 32)
    hooked.register_forward_hook(lambda *_: None)
    mixed.up_proj.act = "int16"
    model["dropout"].train()
    report = fuse_gated(model)
    assert report.replaced == ["good"]
    something_else = "it computes something else than down(activation(gate(x)) * up(x))"
    assert {name: reason[:50] for name, reason in report.kept.items()} == {
        "relu": something_else[:50],
        "scaled": something_else[:50],
        "clamped": something_else[:50],
        "dropout": something_else[:50],
        "more": "it has other tensors beside those of three layers"[:50],
        "two": "it raises TypeError: TwoInputs.forward() missing 1 required"[:50],
        "hooked": "it has hooks",
        "mixed": "act differs: ['uint8', 'int16']",
        "apart": "some have a bias, some have none",
    }
    assert isinstance(model["mixed"].up_proj, DA8W4Linear)
    with pytest.raises(TypeError, match="model must be a"):
        fuse_gated(3)  # type: ignore[arg-type]


def test_graphs_and_transforms() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = packed(FUNCTIONS["silu"], True)
    fuse_gated(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for rows in (3, 8):
        x = torch.randn(rows, 64)
        assert same(compiled(x), model(x))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    x = torch.randn(5, 64)
    assert same(program.module()(x), model(x))
    assert same(torch.vmap(model)(x[:, None])[:, 0], model(x))
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() == 2 * 5 * 64 * 96 * 3
    layer = model[0].gate_up
    arguments = (x, *layer._arguments()[:3], "silu", False, 1.0, 1.0, "uint8")
    torch.library.opcheck(torch.ops.pyda8w4.linear_gated.default, arguments)
    x.requires_grad_()
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="for inference"):
        model(x).sum().backward()
    with pytest.raises(ValueError, match="even N"):
        odd = DA8W4Linear(64, 33, False)
        torch.ops.pyda8w4.linear_gated(x.detach(), *odd._arguments()[:3], "silu", False, 1.0, 1.0, "uint8")


def test_models_of_transformers(tmp_path: Any) -> None:
    hf = pytest.importorskip("transformers", reason="transformers is not installed")
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    model = hf.LlamaForCausalLM(config).eval()
    quantize_(model, 32)
    ids = torch.arange(12)[None]
    want = model(ids, use_cache=False).logits
    report = fuse_gated(model)
    assert report.replaced == ["model.layers.0.mlp", "model.layers.1.mlp"] and not report.kept
    assert (model(ids, use_cache=False).logits - want).norm() / want.norm() < 1e-2
    with pytest.raises(ValueError, match="before fuse_linears and fuse_gated"):
        model.save_pretrained(tmp_path)
