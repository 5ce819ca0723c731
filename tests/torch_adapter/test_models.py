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
