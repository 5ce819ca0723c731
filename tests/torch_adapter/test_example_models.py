"""The models of examples/model.py are those of transformers."""

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

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from model import DA8W4, Model, Weights

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
}  # fmt: skip
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


@pytest.mark.parametrize("make", [llama, gemma2, gemma3])
def test_logits(make: Any, tmp_path: Path) -> None:
    """Over several chunks and windows, and single tokens after them."""
    model, fields = make()
    path = tmp_path / "model.gguf"
    write(path, make.__name__, model.eval(), fields)
    tokens = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], 190)
    wanted = model(torch.tensor(tokens[None])).logits[0].numpy()

    def floats(weights: Weights, names: list[str], act: str) -> Any:
        w = np.concatenate([weights.array(name) for name in names])
        return lambda x, out: np.matmul(x, w.T, out=out)

    def int16(weights: Weights, names: list[str], act: str) -> Any:
        return DA8W4(weights, names, "int16")

    for layer, most in ((floats, 1e-4), (int16, 1e-2)):
        mine = Model(pyda8w4.checkpoints.open(path), len(tokens), layer)
        hidden = [mine.forward(part).copy() for part in np.split(tokens, [3, 170, *range(171, 190)])]
        logits = mine.logits(np.concatenate(hidden), np.empty_like(wanted))
        error = np.linalg.norm(logits - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
        assert error.max() < most


def write(path: Path, architecture: str, model: Any, fields: dict[str, Any]) -> None:
    """Write the model as llama.cpp's converter does, and give it the weights that the file has."""
    writer = ggml.GGUFWriter(path, architecture)
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_block_count(BLOCKS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(SIZE)
    writer.add_layer_norm_rms_eps(SHAPE["rms_norm_eps"])
    writer.add_sliding_window(WINDOW)
    for name, value in fields.items():
        writer.add_float32(f"{architecture}.{name}", value)
    q8_0 = ggml.GGMLQuantizationType.Q8_0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.copy_(torch.rand_like(parameter) * 2 - 0.5)  # most are 1, or 0 of Gemmas
            given = parameter.numpy() + np.float32(architecture != "llama")
            writer.add_tensor(gguf_name(name, architecture), given)
        else:
            parameter.mul_(8)
            blocks = ggml.quantize(parameter.numpy(), q8_0)
            parameter.copy_(torch.tensor(ggml.dequantize(blocks, q8_0)))
            if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
                blocks = blocks.reshape(-1, 2, SIZE // 2, blocks.shape[1]).swapaxes(1, 2).reshape(blocks.shape)
            writer.add_tensor(gguf_name(name, architecture), blocks, raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str, architecture: str) -> str:
    path = name.removeprefix("model.").removesuffix(".weight")
    if not path.startswith("layers."):
        return {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[path] + ".weight"
    _, block, layer = path.split(".", 2)
    names = LAYERS | (LLAMA_NORMS if architecture == "llama" else GEMMA_NORMS)
    return f"blk.{block}.{names[layer]}.weight"
