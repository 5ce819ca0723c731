"""The models of examples/model.py and examples/mixture.py are those of transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
ggml = pytest.importorskip("gguf", reason="gguf is not installed")

from torch_cases import MARKS

import pyda8w4.checkpoints
from pyda8w4 import convert

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import mixture
from model import DA8W4, Model, Weights, gate, generate

pytestmark = MARKS

HEADS, KV_HEADS, SIZE, WINDOW, BLOCKS = 4, 2, 32, 40, 7
SHAPE = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": BLOCKS, "head_dim": SIZE,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-3, "max_position_embeddings": 256,
}  # fmt: skip
GEMMA = {"query_pre_attn_scalar": SIZE, "sliding_window": WINDOW, "tie_word_embeddings": True}

LAYERS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "mlp.gate": "ffn_gate_inp", "mlp.experts.gate_up_proj": "ffn_gate_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}  # fmt: skip
OTHERS = ("model.layers.0.self_attn.v_proj.weight", "model.layers.0.mlp.up_proj.weight")  # of another type
LLAMA_NORMS = {"post_attention_layernorm": "ffn_norm"}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def llama() -> tuple[Any, dict[str, Any]]:
    config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False, rope_theta=50_000.0)
    return transformers.LlamaForCausalLM(config), {"rope.freq_base": 50_000.0}


def gemma2() -> tuple[Any, dict[str, Any]]:
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SHAPE, **GEMMA, **caps)), caps


def gemma3() -> tuple[Any, dict[str, Any]]:
    # Base frequencies of "rope_parameters" by default: 1e6, and 1e4 of windows.
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SHAPE, **GEMMA)), {"rope.freq_base": 1e6}


def qwen3moe() -> tuple[Any, dict[str, Any]]:
    # With few blocks: where two experts have nearly the same score, errors decide which is chosen.
    sizes = SHAPE | {"num_hidden_layers": 2, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    rope = {"rope_type": "default", "rope_theta": 50_000.0}
    config = transformers.Qwen3MoeConfig(**sizes, norm_topk_prob=True, rope_parameters=rope)
    return transformers.Qwen3MoeForCausalLM(config), {"rope.freq_base": 50_000.0, "expert_used_count": 2}


@pytest.mark.parametrize(
    ("make", "most_float", "most_int16"),
    [(llama, 1e-4, 1e-2), (gemma2, 1e-4, 1e-2), (gemma3, 1e-4, 1e-2), (qwen3moe, 1e-3, 1e-3)],
)
def test_logits(make: Any, most_float: float, most_int16: float, tmp_path: Path) -> None:
    """Over several chunks and windows, and single tokens after them. Experts have int16 activations in both models."""
    torch.manual_seed(0)
    model, fields = make()
    path = tmp_path / "model.gguf"
    write(path, make.__name__, model.eval(), fields)
    tokens = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], 190)
    wanted = model(torch.tensor(tokens[None])).logits[0].numpy()

    def floats(weights: Weights, names: list[str], activation: str | None = None) -> Any:
        w = np.concatenate([weights.array(name) for name in names])
        if activation is None:
            return lambda x, out, act: np.matmul(x, w.T, out=out)
        return lambda x, out, act: gate(*np.split(x @ w.T, 2, axis=1), activation, out)

    for layer, most in ((floats, most_float), (DA8W4, most_int16)):
        mine = Model(pyda8w4.checkpoints.open(path), len(tokens), layer, "int16")
        hidden = [mine.forward(part).copy() for part in np.split(tokens, [3, 170, *range(171, 190)])]
        logits = mine.logits(np.concatenate(hidden), np.empty_like(wanted))
        error = np.linalg.norm(logits - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
        assert error.max() < most


def test_mixture_of_a_converted_file(tmp_path: Path) -> None:
    """The same bits as from the GGUF file."""
    torch.manual_seed(0)
    model, fields = qwen3moe()
    path, converted = tmp_path / "model.gguf", tmp_path / "model.safetensors"
    write(path, "qwen3moe", model, fields)
    convert.run(pyda8w4.checkpoints.open(path), converted)
    models = [Model(pyda8w4.checkpoints.open(each), 40) for each in (path, converted)]
    first, second = (list(generate(each, list(range(20)), 20)) for each in models)
    assert first == second and len(set(first)) > 1
    for array, other in zip((models[0].keys, models[0].values), (models[1].keys, models[1].values)):
        np.testing.assert_array_equal(array, other)


def test_mixture_example() -> None:
    """With tokens for which no two experts have scores so near that errors could change which is chosen."""
    config = mixture.CONFIG | {"num_hidden_layers": 2, "hidden_size": 96, "moe_intermediate_size": 64, "head_dim": 32}
    floats = mixture.random_tensors(config, np.random.default_rng(0))
    file, tokens = mixture.QuantizedCheckpoint(config, floats), np.random.default_rng(23).integers(0, 512, 32).tolist()
    dequantized = {name: file.array(name) for name in floats}
    found = mixture.logits(Model(file, len(tokens), act="int16"), tokens)
    assert mixture.relative_error(found, mixture.transformers_logits(config, dequantized, tokens)).max() < 1e-3
    # Four bits of random numbers are far from them, but not anywhere.
    assert 0.05 < np.median(mixture.relative_error(found, mixture.transformers_logits(config, floats, tokens))) < 0.6


def write(path: Path, architecture: str, model: Any, fields: dict[str, Any]) -> None:
    """Write the model as llama.cpp's converter does, and give it the weights that the file has."""
    writer = ggml.GGUFWriter(path, architecture)
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_block_count(model.config.num_hidden_layers)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(SIZE)
    writer.add_layer_norm_rms_eps(SHAPE["rms_norm_eps"])
    writer.add_sliding_window(WINDOW)
    for name, value in fields.items():
        (writer.add_uint32 if type(value) is int else writer.add_float32)(f"{architecture}.{name}", value)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.copy_(torch.rand_like(parameter) * 2 - 0.5)  # most are 1, or 0 of Gemmas
            given = parameter.numpy() + np.float32("gemma" in architecture)
            writer.add_tensor(gguf_name(name, architecture), given)
            continue
        parameter.mul_(8)
        if name.endswith("mlp.gate.weight"):
            writer.add_tensor(gguf_name(name, architecture), parameter.numpy())
            continue
        kind = ggml.GGMLQuantizationType.Q5_0 if name in OTHERS else ggml.GGMLQuantizationType.Q8_0
        blocks = ggml.quantize(parameter.numpy(), kind)
        parameter.copy_(torch.tensor(ggml.dequantize(blocks, kind)))
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            blocks = blocks.reshape(-1, 2, SIZE // 2, blocks.shape[1]).swapaxes(1, 2).reshape(blocks.shape)
        if name.endswith("experts.gate_up_proj"):
            block = gguf_name(name, architecture).removesuffix("ffn_gate_up_exps.weight")
            for part, half in zip(("gate", "up"), np.split(blocks, 2, axis=1)):
                writer.add_tensor(f"{block}ffn_{part}_exps.weight", np.ascontiguousarray(half), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name, architecture), blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str, architecture: str) -> str:
    path = name.removeprefix("model.").removesuffix(".weight")
    if not path.startswith("layers."):
        return {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[path] + ".weight"
    _, block, layer = path.split(".", 2)
    names = LAYERS | (GEMMA_NORMS if "gemma" in architecture else LLAMA_NORMS)
    return f"blk.{block}.{names[layer]}.weight"
