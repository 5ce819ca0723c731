"""Whole models: what quantize_ replaces, and what it keeps."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn
from torch_cases import MARKS, expected, same, sqnr

from pyda8w4.torch import DA8W4Linear, quantize_

pytestmark = MARKS


def test_report() -> None:
    class Plain(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input @ self.weight.T + self.bias

    class Other(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1e-3

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(16, 64)
            self.good, self.unwanted, self.other = nn.Linear(64, 64), nn.Linear(64, 8), Other(64, 64)
            self.plain, self.experts = Plain(64, 64), nn.Parameter(torch.randn(4, 64, 64))
            self.odd = nn.Linear(33, 3)
            self.bad, self.wide, self.hooked = nn.Linear(64, 8), nn.Linear(64, 8).double(), nn.Linear(64, 8)
            self.attention = nn.MultiheadAttention(64, 2)
            self.head = nn.Linear(64, 16)
            self.head.weight = self.embed.weight

    model = Model()
    model.bad.weight[0, 0] = float("nan")
    model.hooked.register_forward_hook(lambda *_: None)
    report = quantize_(model, 32, filter_fn=lambda module, name: name != "unwanted")
    assert report.replaced == ["good", "plain", "odd"]
    assert list(report.parameters) == ["experts", "attention.in_proj_weight"]
    assert report.replaced_bytes == 4 * (2 * 64 * 64 + 33 * 3)
    # Embeddings are not counted, but the head that is tied to one is.
    sizes = {"experts": 4 * 64 * 64, "attention.in_proj_weight": 3 * 64 * 64, "attention.out_proj": 64 * 64}
    sizes |= {"other": 64 * 64, "unwanted": 512, "bad": 512, "wide": 1024, "hooked": 512, "head": 1024}
    assert report.float_bytes == {name: 4 * size for name, size in sizes.items()}
    assert report.float_share == sum(sizes.values()) / (sum(sizes.values()) + report.replaced_bytes / 4)
    assert "experts: a parameter of Model" in report.summary().splitlines()[1]
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
    assert str(report).startswith("replaced 3 of 10 Linear layers")
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


@pytest.mark.slow
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
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
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


class _Functional(nn.Module):
    """Reads weights in many ways, of which some need numbers."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("called", "asked", "multiplied", "kept_in_a_name", "given", "trained", "unused"):
            setattr(self, name, nn.Linear(64, 64))
        self.listed = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
        self.indexed = nn.ModuleList([nn.Linear(64, 64)])
        self.some = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        self.others = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))

    def _init_weights(self) -> None:
        nn.init.zeros_(self.unused.weight)

    def _helper(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        return layer.weight.sum() + x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.called(x.to(self.asked.weight.dtype).to(self.asked.weight.device))
        if isinstance(self.asked.weight, torch.Tensor) and self.asked.weight.shape[0] == self.asked.weight.size(0):
            x = self.asked(x) + nn.functional.linear(x, self.multiplied.weight, self.multiplied.bias)
        layer = self.kept_in_a_name
        x = self._helper(x @ layer.weight.T, self.given)
        for _, one in enumerate(self.listed):
            x = torch.addmm(one.bias, x, one.weight)
        x = self.some(x.to(next(self.some.parameters()).dtype)).to(next(iter(self.others.parameters())).dtype)
        x = self.others(x.to(next(self.others.parameters()).dtype))
        if self.training and x.dim() > 1:
            return x @ self.trained.weight
        return self.trained(x) + x @ self.indexed[0].weight[:, :64]


def test_layers_whose_weight_is_read() -> None:
    model = _Functional().eval()
    x = torch.randn(3, 64)
    want = model(x)
    report = quantize_(model, 32)
    assert report.replaced == ["called", "asked", "trained", "unused", "some.2", "others.0"]
    assert report.kept.pop("given") == "_Functional._helper reads its weight"
    assert set(report.kept.values()) == {"_Functional.forward reads its weight"} and len(report.kept) == 6
    assert sqnr(want, model(x)) > 10


def test_encoder_layers_of_torch() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 64)
    want = model(x)
    assert len(quantize_(model, 32).replaced) == 4
    assert sqnr(want, model(x)) > 15


class _Odd(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return {
            "tuple": lambda: (super(_Odd, self).forward(input),),
            "clamped": lambda: super(_Odd, self).forward(input).clamp(-30, 30),
            "float64": lambda: super(_Odd, self).forward(input).double(),
            "scaled": lambda: super(_Odd, self).forward(input) * 1.001,
            "of three dimensions": lambda: super(_Odd, self).forward(input.reshape(1, -1, 64)),
            "raises": lambda: 1 / 0,
        }[self.kind]()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("kind", ["tuple", "clamped", "float64", "scaled", "of three dimensions", "raises"])
def test_subclasses_that_do_more(kind: str) -> None:
    layer = _Odd(64, 64)
    layer.kind = kind
    assert "may do more" in quantize_(nn.Sequential(layer), 32).kept["0"]


def test_subclasses_with_more_tensors() -> None:
    layer = type("Lora", (nn.Linear,), {})(64, 64)
    layer.register_buffer("delta", torch.zeros(64, 64))
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
    for one in (layer, parametrized):
        assert "may do more" in quantize_(nn.Sequential(one), 32).kept["0"]
