"""Tiny models in every format that is served, and the models of transformers that they are compared with.

Weights are random, of a size that makes all of them matter: layers add more to the residual stream than the embedding
has, and attention looks at more than one token. The logits of a random model are close together: the highest two are a
fifth of a standard deviation apart, at the median.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from model_files import Written, random_model, write_folders
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

import pyda8w4
import pyda8w4.checkpoints
import pyda8w4.convert
from pyda8w4.torch import DA8W4Experts, DA8W4Linear, from_checkpoint
from pyda8w4.torch.transformers import DA8W4Config

GROUP = 32
SIZES = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "pad_token_id": 0,
}  # fmt: skip
QWEN3_MOE = {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 128, "norm_topk_prob": True}
MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 256}
PHI3 = {"tie_word_embeddings": False, "original_max_position_embeddings": 128}


class Served(NamedTuple):
    """A model as vLLM takes it, and what makes transformers' model of the same weights, of a type."""

    path: Path
    options: dict[str, Any]
    reference: Callable[[torch.dtype], Any]


def model_of(kind: str, **options: Any) -> Any:
    options = {name: value for name, value in {**SIZES, **options}.items() if kind != "Phi3" or name != "head_dim"}
    model = random_model(kind, std=0.1, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            # So that the last expert of a token, which rounding may exchange, has little weight.
            parameter.data *= 4
    return model.to(torch.bfloat16)  # in files, so that both types have the same numbers


def save_tokenizer(path: Path) -> None:
    """Bytes, and pairs of letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = "etaoinsrhldcumfp"
    pairs = [(a, b) for a in letters for b in letters][: SIZES["vocab_size"] - len(alphabet) - 3]
    words = ["<unk>", "<s>", "</s>", *alphabet, *map("".join, pairs)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=pairs, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(path)


# ---- formats -----------------------------------------------------------------------------------


def folder(method: str, kind: str = "Llama", *, group: int = GROUP, names: str = "_proj$", **options: Any) -> Any:
    """As another library's quantizer writes it."""

    def write(path: Path) -> Served:
        write_folders(model_of(kind, **options), path, method, names, group=group, scales=(0.008, 0.024))
        return Served(path / "quantized", {}, lambda dtype: from_checkpoint(path / "quantized", dtype=dtype))

    return write


def _config() -> DA8W4Config:
    return DA8W4Config(group_size=GROUP)


def floats(kind: str = "Llama", **options: Any) -> Any:
    """What vLLM serves without this library: how much both libraries differ by themselves."""

    def write(path: Path) -> Served:
        model_of(kind, **options).save_pretrained(path)
        return Served(path, {}, lambda dtype: transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype))

    return write


def on_load(kind: str = "Llama", **options: Any) -> Any:
    """A float model that is quantized as it is loaded."""

    def write(path: Path) -> Served:
        load = transformers.AutoModelForCausalLM.from_pretrained
        model_of(kind, **options).save_pretrained(path)
        given = {"quantization": "pyda8w4", "additional_config": {"pyda8w4": {"group_size": GROUP}}}
        return Served(path, given, lambda dtype: load(path, dtype=dtype, quantization_config=_config()))

    return write


def packed(kind: str = "Llama", **options: Any) -> Any:
    """What `save_pretrained` of a quantized model writes."""

    def write(path: Path) -> Served:
        load = transformers.AutoModelForCausalLM.from_pretrained
        model_of(kind, **options).save_pretrained(path / "float")
        load(path / "float", dtype=torch.bfloat16, quantization_config=_config()).save_pretrained(path / "packed")

        def reference(dtype: torch.dtype) -> Any:
            model = load(path / "packed", dtype=dtype)
            for parameter in model.parameters():  # transformers before 5.20 leaves Mixtral's routers in the file's type
                parameter.data = parameter.data.to(dtype)
            return model

        return Served(path / "packed", {}, reference)

    return write


def converted(path: Path) -> Served:
    """What `pyda8w4 convert` writes, of a GPTQ checkpoint."""
    served = folder("gptq asymmetric")(path)
    file = path / "converted.safetensors"
    pyda8w4.convert.run(pyda8w4.checkpoints.open(served.path), file)
    return Served(file, {"quantization": "pyda8w4"}, lambda dtype: from_checkpoint(file, dtype=dtype))


def gguf(architecture: str, *types: str, kind: str = "Llama", **options: Any) -> Any:
    """A file of llama.cpp."""

    def write(path: Path) -> Served:
        file = path / "model.gguf"
        values = {"attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 64}
        model = model_of(kind, **options).float()
        Written(file, model, architecture, heads=architecture == "llama", types=types, values=values)
        return Served(file, {"quantization": "pyda8w4"}, lambda dtype: from_checkpoint(file, dtype=dtype))

    return write


FORMATS: dict[str, Callable[[Path], Served]] = {
    "float": floats(),
    "GPTQ symmetric": folder("gptq symmetric"),
    "GPTQ symmetric, one group": folder("gptq symmetric", group=-1),
    "GPTQ asymmetric": folder("gptq asymmetric", group=64),
    "GPTQ act-order": folder("gptq symmetric, ordered"),
    "GPTQ act-order, asymmetric": folder("gptq"),
    "GPTQ tied": folder("gptq asymmetric", tie_word_embeddings=True),
    "GPTQ Qwen2": folder("gptq symmetric", "Qwen2"),
    "GPTQ Phi-3": folder("gptq symmetric", "Phi3", **PHI3),
    "AWQ": folder("awq"),
    "AWQ Qwen2, tied": folder("awq", "Qwen2", tie_word_embeddings=True),
    "auto-round": folder("auto-round"),
    "compressed-tensors W4A16 symmetric": folder("compressed-tensors symmetric"),
    "compressed-tensors W4A16 asymmetric": folder("compressed-tensors", group=64),
    "compressed-tensors W4A16 act-order": folder("compressed-tensors ordered"),
    "compressed-tensors W4A8": folder("compressed-tensors W4A8"),
    "compressed-tensors Phi-3": folder("compressed-tensors symmetric", "Phi3", **PHI3),
    "packed": packed(),
    "packed, tied": packed(tie_word_embeddings=True),
    "packed Qwen2": packed("Qwen2"),
    "packed Phi-3": packed("Phi3", **PHI3),
    "converted": converted,
    "on load": on_load(),
    "on load, tied": on_load(tie_word_embeddings=True),
    "on load Qwen2": on_load("Qwen2"),
    "on load Phi-3": on_load("Phi3", **PHI3),
    "GGUF Q4_0": gguf("llama", "Q4_0"),
    "GGUF Q4_0, tied": gguf("llama", "Q4_0", tie_word_embeddings=True),
    "GGUF Q4_K_M": gguf("llama", "Q6_K", "Q4_K", "Q4_K", "Q4_K"),
    "GGUF Q4_0 Qwen2": gguf("qwen2", "Q4_0", kind="Qwen2"),
    "GPTQ Qwen3-MoE": folder("gptq symmetric", "Qwen3Moe", **QWEN3_MOE),
    "AWQ Qwen3-MoE": folder("awq", "Qwen3Moe", **QWEN3_MOE),
    "compressed-tensors Qwen3-MoE": folder("compressed-tensors symmetric", "Qwen3Moe", **QWEN3_MOE),
    "packed Qwen3-MoE": packed("Qwen3Moe", **QWEN3_MOE),
    "on load Qwen3-MoE": on_load("Qwen3Moe", **QWEN3_MOE),
    "GPTQ Mixtral": folder("gptq symmetric", "Mixtral", names=r"_proj$|experts.\d+.w\d$", **MIXTRAL),
    "AWQ Mixtral": folder("awq", "Mixtral", names=r"_proj$|experts.\d+.w\d$", **MIXTRAL),
    "compressed-tensors Mixtral": folder(
        "compressed-tensors", "Mixtral", names=r"_proj$|experts.\d+.w\d$", **MIXTRAL
    ),
    "packed Mixtral": packed("Mixtral", **MIXTRAL),
    "on load Mixtral": on_load("Mixtral", **MIXTRAL),
}  # fmt: skip


# ---- tensor parallelism ------------------------------------------------------------------------


class Ranks(nn.Module):
    """What ranks compute of a layer, added up: each quantizes the inputs, or the part of them, that its weight has."""

    def __init__(self, parts: list[nn.Module], cuts_inputs: bool) -> None:
        super().__init__()
        self.parts, self.cuts_inputs = nn.ModuleList(parts), cuts_inputs

    def forward(self, x: torch.Tensor, *more: Any) -> Any:
        count = len(self.parts)
        inputs = x.chunk(count, -1) if self.cuts_inputs else [x] * count
        return sum(part(piece, *more) for part, piece in zip(self.parts, inputs))


def cut(model: Any, count: int) -> None:
    """Have the layers of a model computed as by so many ranks."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, DA8W4Experts):
            experts = [part_of_experts(layer, i, count) for i in range(count)]
            model.set_submodule(name, Ranks(experts, cuts_inputs=False))
        elif isinstance(layer, DA8W4Linear) and name.endswith(("o_proj", "down_proj")):
            parts = [layer.packed.shard(i, count, 1) for i in range(count)]
            linears = [
                DA8W4Linear.from_packed(part, None if i else layer.bias, act=layer.act) for i, part in enumerate(parts)
            ]
            model.set_submodule(name, Ranks(linears, cuts_inputs=True))


def part_of_experts(layer: DA8W4Experts, i: int, count: int) -> DA8W4Experts:
    """Some gates, and their ups."""
    gate_up, down = layer.gate_up.packed, layer.down.packed
    width = gate_up.shape[1] // 2
    parts = [
        pyda8w4.concat([half.shard(i, count, 0) for half in (expert[:width], expert[width:])]) for expert in gate_up
    ]
    return DA8W4Experts.from_packed(pyda8w4.stack(parts), down.shard(i, count, 1), act=layer.act)
