"""`calibrate`: GPTQ against its definition, and how it walks through models."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn
from torch_cases import MARKS, same

import pyda8w4
from pyda8w4.torch import DA8W4Linear, calibrate, quantize_
from pyda8w4.torch._gptq import round_weight
from pyda8w4.torch._quantize import Rounding

pytestmark = MARKS


def inputs(rows: int, k: int) -> Any:
    """Of few dimensions, beside some noise: where they go together, errors can be made up for."""
    return torch.randn(rows, k // 4) @ torch.randn(k // 4, k) + 0.3 * torch.randn(rows, k)


def by_definition(w: Any, h: Any, group: int, zeros: str) -> Any:
    """Optimal brain quantization in a fixed order: the moments of what is left are inverted for each input."""
    w, h = w.numpy().astype(float).copy(), h.numpy().astype(float)
    n, k = w.shape
    h = h + 0.01 * np.diag(h).mean() * np.eye(k)
    importance = np.diag(h)
    codes = np.empty((n, k), np.uint8)
    for i in range(k):
        if i % group == 0:
            part = slice(i, i + group)
            found = pyda8w4.quantize_weight(
                w[:, part].astype(np.float32), group, zeros=zeros, importance=importance[part]
            )
            s, z = found.scales[:, 0].astype(float), found.zps[:, 0].astype(float)
            o = 0 if found.offsets is None else found.offsets[:, 0].astype(float)
        inverse = np.linalg.inv(h[i:, i:])
        codes[:, i] = np.clip(np.rint((w[:, i] - o) / s) + z, 0, 15)
        error = (w[:, i] - ((codes[:, i] - z) * s + o)) / inverse[0, 0]
        w[:, i:] -= np.outer(error, inverse[0])
    return codes


@pytest.mark.parametrize("zeros", ["float", "integer", "none"])
@pytest.mark.parametrize("k, group", [(48, 16), (40, 16), (150, 150), (140, 68)])
def test_gptq(k: int, group: int, zeros: str) -> None:
    w, x = torch.randn(30, k), inputs(400, k)
    got = round_weight(w, x.T @ x, Rounding(group, zeros=zeros))
    want = by_definition(w, x.T @ x, group, zeros)
    # Near the middle between two codes float32 and float64 differ, and all that follows in such a row.
    assert (got.codes == want).all(1).mean() > 0.5
    nearest = pyda8w4.quantize(w.numpy(), group, zeros=zeros)
    exact = x.numpy() @ w.numpy().T
    errors = [np.linalg.norm(x.numpy() @ each.dequantize().T - exact) for each in (got.pack(), nearest)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize(
    "options", [{"two_level": True}, {"rotate": 32}, {"rotate": True, "two_level": True, "zeros": "none"}]
)
@pytest.mark.parametrize("k", [300, 1100])
def test_gptq_of_every_kind(k: int, options: dict[str, Any]) -> None:
    w, x = torch.randn(30, k), inputs(2000, k)
    got = round_weight(w, x.T @ x, Rounding(32, **options))
    plain = pyda8w4.quantize(w.numpy(), 32, **options)
    packed = got.pack()
    assert (packed.super_size, packed.rotation, packed.groups) == (plain.super_size, plain.rotation, plain.groups)
    exact = x.numpy() @ w.numpy().T
    errors = [np.linalg.norm(x.numpy() @ each.dequantize().T - exact) for each in (packed, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_inputs_that_are_never_seen() -> None:
    w, x = torch.randn(30, 64), inputs(300, 64)
    x[:, 16:48] = 0
    packed = round_weight(w, x.T @ x, Rounding(32)).pack()
    assert np.square(packed.dequantize() - w.numpy()).mean() < 0.1
    packed = round_weight(w, torch.zeros(64, 64), Rounding(32)).pack()
    np.testing.assert_array_equal(packed.dequantize(), pyda8w4.quantize(w.numpy(), 32).dequantize())


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 40), nn.Dropout())


@pytest.mark.parametrize(
    "make", [lambda x: x, lambda x: (x,), lambda x: {"input": x}], ids=["tensor", "tuple", "mapping"]
)
def test_a_model_without_blocks(make: Any) -> None:
    model, x = perceptron(), inputs(600, 64)
    model.train()
    searched = copy.deepcopy(model).eval()
    want = searched(x)
    quantize_(searched, 32, "int16")
    report = calibrate(model, [make(x[:300]), make(x[300:])], 32, "int16")
    assert report.replaced == ["0", "2"] and model.training and model[3].training
    assert all(isinstance(model[i], DA8W4Linear) and model[i].act == "int16" for i in (0, 2))
    model.eval()
    assert torch.norm(model(x) - want) < 0.8 * torch.norm(searched(x) - want)


def test_what_is_kept() -> None:
    model = perceptron()
    kept = model[2].weight
    report = calibrate(model, [inputs(300, 64)], 32, filter_fn=lambda module, name: name != "2")
    assert report.kept == {"2": "filter_fn"} and model[2].weight is kept


def test_what_is_refused() -> None:
    model = perceptron()
    before = copy.deepcopy(model.state_dict())
    for error, call in (
        (TypeError, lambda: calibrate(torch.zeros(1), [torch.zeros(1, 64)])),
        (ValueError, lambda: calibrate(nn.Linear(64, 64), [torch.zeros(1, 64)])),
        (ValueError, lambda: calibrate(model, [])),
        (TypeError, lambda: calibrate(model, ["text"])),
        (TypeError, lambda: calibrate(model, None)),
        (ValueError, lambda: calibrate(model, [torch.zeros(1, 64)], 6)),
        (ValueError, lambda: calibrate(model, [torch.zeros(1, 64)], act="int4")),
        (ValueError, lambda: calibrate(model, [torch.zeros(1, 64)], zeros="both")),
        (RuntimeError, lambda: calibrate(model, [torch.zeros(1, 65)])),
        (ValueError, lambda: calibrate(model, [torch.full((1, 64), torch.nan)])),
    ):
        with pytest.raises(error):
            call()
        assert all(same(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert not any(module._forward_pre_hooks for module in model.modules())


class Chain(nn.Module):
    """A list of layers, between which something happens."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layers, self.way = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)]), way

    def forward(self, x: Any) -> Any:
        if self.way == "heads":
            return torch.cat([layer(x) for layer in self.layers], -1)
        for layer in self.layers:
            if self.way == "keyword":
                x = torch.relu(layer(input=x))
            elif self.way == "in place":
                x = layer(x)
                x += 1
            else:
                x = x + torch.tanh(layer(nn.functional.layer_norm(x, (64,))))
        return x


@pytest.mark.parametrize("way", ["heads", "keyword", "in place", "residual"])
def test_lists_that_are_no_blocks(way: str) -> None:
    model, x = Chain(way), inputs(800, 64)
    searched, want = copy.deepcopy(model), model(x)
    quantize_(searched, 32, "int16")
    calibrate(model, [x[:400], x[400:]], 32, "int16")
    assert torch.norm(model(x) - want) < 0.9 * torch.norm(searched(x) - want)


def test_an_input_that_is_changed_in_place() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 40)

        def forward(self, x: Any) -> Any:
            x = x.clone()
            x += torch.relu(self.a(x))
            return self.b(x)

    model, x = Changing(), inputs(800, 64)
    searched, want = copy.deepcopy(model), model(x)
    quantize_(searched, 32, "int16")
    calibrate(model, [x], 32, "int16")
    assert torch.norm(model(x) - want) < 0.9 * torch.norm(searched(x) - want)


def test_layers_that_stay_float_stay_as_they_are() -> None:
    model = perceptron().double()
    before = copy.deepcopy(model.state_dict())
    report = calibrate(model, [inputs(300, 64).double()], 32)
    assert set(report.kept) == {"0", "2"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model = perceptron()
    model[2].weight[0, :2] = torch.tensor([3e38, -3e38])
    report = calibrate(model, [torch.zeros(3, 64)], 32)
    assert report.replaced == ["0"] and "range fits float32" in report.kept["2"]


# ---- models of transformers ------------------------------------------------------------------


@pytest.fixture
def hf() -> Any:
    return pytest.importorskip("transformers", reason="transformers is not installed")


SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2}
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 120, (8, 64)))


def alike(model: Any) -> Any:
    """With embeddings of few dimensions, beside some noise, as those of real models are."""
    weight = model.get_input_embeddings().weight
    weight.copy_(inputs(*weight.shape) / weight.shape[1] ** 0.5)
    return model


def divergence(model: Any, want: Any) -> float:
    found, want = model(TOKENS).logits.float().log_softmax(-1), want.float()
    return float((want.softmax(-1) * (want.log_softmax(-1) - found)).sum(-1).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_language_model(hf: Any, dtype: Any, tmp_path: Any) -> None:
    alike(hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=True))).save_pretrained(tmp_path)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    want, searched = model(TOKENS).logits, copy.deepcopy(model)
    quantize_(searched, 32, "int16")
    calibrate(model, [{"input_ids": TOKENS[:5]}, {"input_ids": TOKENS[5:]}], 32, "int16")
    assert divergence(model, want) < 0.9 * divergence(searched, want)
    assert model.config.use_cache and isinstance(model.lm_head, nn.Linear)
    model.save_pretrained(tmp_path / "packed")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=dtype)
    assert same(again(TOKENS).logits, model(TOKENS).logits)


def test_masked_tokens_do_not_count(hf: Any) -> None:
    model = hf.BertModel(hf.BertConfig(**SIZES, intermediate_size=96))
    mask = torch.ones_like(TOKENS)
    mask[:, 20:] = 0
    other = TOKENS.where(mask.bool(), 1)
    models = [copy.deepcopy(model) for _ in range(2)]
    for each, ids in zip(models, (TOKENS, other)):
        calibrate(each, [{"input_ids": ids, "attention_mask": mask}], 32)
    found = [each.encoder.layer[2].output.dense.packed.dequantize() for each in models]
    assert np.abs(found[0] - found[1]).max() < 1e-6


def test_encoder_and_decoder(hf: Any) -> None:
    config = hf.T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    model = alike(hf.T5ForConditionalGeneration(config)).eval()
    searched, batch = copy.deepcopy(model), {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :9]}
    want = model(**batch).logits
    quantize_(searched, 32, "int16")
    calibrate(model, [batch], 32, "int16")
    assert torch.norm(model(**batch).logits - want) < torch.norm(searched(**batch).logits - want)
    assert isinstance(model.decoder.block[1].layer[2].DenseReluDense.wo, DA8W4Linear)


def test_transposed_weights(hf: Any) -> None:
    config = hf.GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    model = alike(hf.GPT2LMHeadModel(config)).eval()
    searched, want = copy.deepcopy(model), model(TOKENS).logits
    quantize_(searched, 32, "int16")
    calibrate(model, [TOKENS], 32, "int16")
    assert torch.norm(model(TOKENS).logits - want) < torch.norm(searched(TOKENS).logits - want)


def test_a_mixture_of_experts(hf: Any) -> None:
    config = hf.Qwen3MoeConfig(**LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)
    model = hf.Qwen3MoeForCausalLM(config)
    report = calibrate(model, [{"input_ids": TOKENS}], 32)
    assert "model.layers.0.mlp.experts" in report.replaced
    assert torch.isfinite(model(TOKENS).logits).all()


def test_a_wrapper_that_knows_nothing_of_caches(hf: Any) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **arguments: Any) -> Any:
            return self.inner(**arguments)

    model = alike(hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)))
    batch = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    wrapped = Wrapper(copy.deepcopy(model))
    calibrate(wrapped, [batch | {"use_cache": True}], 32, "int16")
    calibrate(model, [batch], 32, "int16")
    assert same(wrapped(**batch).logits, model(**batch).logits) and model.config.use_cache


def test_a_block_that_stays_float(hf: Any) -> None:
    model = alike(hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)))
    seen = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    report = calibrate(
        model, [TOKENS], 32, filter_fn=lambda module, name: "layers.0." not in name and "head" not in name
    )
    assert len(report.kept) == 8 and not seen  # the blocks were rounded one by one, without the head
