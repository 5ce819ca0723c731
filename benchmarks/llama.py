"""A random Llama in folders as Hugging Face has them: the same numbers in float and in formats of 4 bits.

Codes and scales are drawn so that the product of both has 8 bits: bfloat16 holds each weight exactly, and what the
folders give differs by what engines do only. Embeddings and the output head are float everywhere.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 32, 4, 32000  # TinyLlama-1.1B, which has 22 layers
GROUP = 128
_KV = HIDDEN // HEADS * KV_HEADS
_OF_LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (_KV, HIDDEN),
    "self_attn.v_proj": (_KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Tensors = dict[str, torch.Tensor]


def write(folder: Path, form: str, layers: int) -> None:
    """Write the model, unless it is there.

    Parameters
    ----------
    folder : Path
    form : {'float', 'gptq', 'awq', 'compressed-tensors', 'packed'}
    layers : int
    """
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True)
    if form == "packed":
        _write_packed(folder, layers)
        return
    tensors_of, quantization = _FORMS[form]
    tensors = _floats(layers)
    for name, codes, scales in _matrices(layers):
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in tensors_of(codes, scales).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = _config(layers) | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def parameters(layers: int) -> int:
    """How many weights the model has."""
    return 2 * VOCABULARY * HIDDEN + layers * sum(n * k for n, k in _OF_LAYER.values())


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes: what a server needs to take and give text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


# ---- what all folders have in common ---------------------------------------------------------


def _config(layers: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _floats(layers: int) -> Tensors:
    rng = torch.Generator().manual_seed(0)
    ends = ("model.embed_tokens", "lm_head")
    found = {f"{name}.weight": 0.02 * torch.randn(VOCABULARY, HIDDEN, generator=rng) for name in ends}
    norms = [f"model.layers.{i}.{name}_layernorm" for i in range(layers) for name in ("input", "post_attention")]
    found |= {f"{name}.weight": torch.ones(HIDDEN) for name in (*norms, "model.norm")}
    return {name: tensor.bfloat16() for name, tensor in found.items()}


def _matrices(layers: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Names, codes 0..15 (N, K) and scales (N, K / GROUP); the zero point is 8."""
    for layer in range(layers):
        for part, (n, k) in _OF_LAYER.items():
            name = f"model.layers.{layer}.{part}"
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            codes = rng.integers(0, 16, (n, k), np.uint8)
            scales = rng.integers(8, 12, (n, k // GROUP)).astype(np.float32) / 2048  # 4 bits of mantissa
            yield name, codes, scales


# ---- formats ---------------------------------------------------------------------------------


def _words(codes: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight codes of a row in an int32, of which nibble i holds the one at order[i]."""
    eights = codes.reshape(codes.shape[0], -1, 8).astype(np.uint32)
    words = sum(eights[..., at] << np.uint32(4 * i) for i, at in enumerate(order))
    return torch.from_numpy(words.view(np.int32))


def _float(codes: np.ndarray, scales: np.ndarray) -> Tensors:
    groups = codes.reshape(*scales.shape, GROUP).astype(np.float32) - 8
    return {"weight": torch.from_numpy((groups * scales[..., None]).reshape(codes.shape)).bfloat16()}


def _gptq(codes: np.ndarray, scales: np.ndarray) -> Tensors:
    n, k = codes.shape
    return {
        "qweight": _words(codes).T,
        "qzeros": _words(np.full((k // GROUP, n), 7, np.uint8)),  # the zero point less 1
        "scales": torch.from_numpy(scales.T).half(),
        "g_idx": torch.arange(k, dtype=torch.int32) // GROUP,
    }


def _awq(codes: np.ndarray, scales: np.ndarray) -> Tensors:
    n, k = codes.shape
    return {
        "qweight": _words(np.ascontiguousarray(codes.T), _AWQ_ORDER),
        "qzeros": _words(np.full((k // GROUP, n), 8, np.uint8), _AWQ_ORDER),
        "scales": torch.from_numpy(scales.T).half(),
    }


def _compressed_tensors(codes: np.ndarray, scales: np.ndarray) -> Tensors:
    return {
        "weight_packed": _words(codes),
        "weight_scale": torch.from_numpy(scales).bfloat16(),
        "weight_shape": torch.tensor(codes.shape),
    }


_FORMS: dict[str, tuple[Callable[[np.ndarray, np.ndarray], Tensors], dict[str, Any] | None]] = {
    "float": (_float, None),
    "gptq": (_gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}),
    "awq": (_awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "compressed-tensors": (
        _compressed_tensors,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "group",
                        "group_size": GROUP,
                    },
                }
            },
        },
    ),
}


def _write_packed(folder: Path, layers: int) -> None:
    """What `save_pretrained` writes of the GPTQ folder, which lies beside this one."""
    import pyda8w4.torch

    gptq = folder.with_name("gptq")
    write(gptq, "gptq", layers)
    pyda8w4.torch.from_checkpoint(gptq).save_pretrained(folder)
