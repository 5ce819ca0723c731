"""Models of transformers."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn
from torch_cases import GROUPS, MARKS, same

from pyda8w4.torch import fuse_linears, quantize_

pytestmark = MARKS


def test_llama(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
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
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
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
