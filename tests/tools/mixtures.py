"""What part of the weights of published mixtures of experts `quantize_` packs, by bytes: the table of docs/torch.md.

    python tests/tools/mixtures.py            # all
    python tests/tools/mixtures.py OLMoE      # those with this in their name

Models have the sizes of the config.json that they were published with, and no memory. Counted are weights that
multiply: neither embeddings nor norms. What stays float is printed below each row. The exit status is 1 where less than
98 % is packed.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn

from pyda8w4.torch._quantize import Report, chooser, count_floats, layers_of, multiplied_bytes

# By name: the classes without their end, and the sizes. What is missing is transformers' default for the architecture.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-30B-A3B": ("Qwen3Moe", {
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "vocab_size": 151936,
    }),
    "Qwen1.5-MoE-A2.7B": ("Qwen2Moe", {
        "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
        "intermediate_size": 5632, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "num_experts": 60, "num_experts_per_tok": 4, "vocab_size": 151936,
    }),
    "Mixtral-8x7B": ("Mixtral", {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
    }),
    "gpt-oss-20b": ("GptOss", {
        "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4,
        "vocab_size": 201088,
    }),
    "DeepSeek-V3": ("DeepseekV3", {
        "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_group": 8, "topk_group": 4,
        "vocab_size": 129280,
    }),
    "DeepSeek-V2-Lite": ("DeepseekV2", {
        "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": None,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 102400,
    }),
    "OLMoE-1B-7B": ("Olmoe", {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
        "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50304,
    }),
    "Granite-3.0-3B-A800M": ("GraniteMoe", {
        "hidden_size": 1536, "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8,
        "intermediate_size": 512, "num_local_experts": 40, "num_experts_per_tok": 8, "vocab_size": 49155,
        "tie_word_embeddings": True,
    }),
    "Granite-3.0-1B-A400M": ("GraniteMoe", {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8,
        "intermediate_size": 512, "num_local_experts": 32, "num_experts_per_tok": 8, "vocab_size": 49155,
        "tie_word_embeddings": True,
    }),
    "Llama-4-Scout (text)": ("Llama4", {
        "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 8192, "intermediate_size_mlp": 16384, "num_local_experts": 16,
        "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "vocab_size": 202048,
    }),
    "Jamba-v0.1": ("Jamba", {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "num_experts": 16, "num_experts_per_tok": 2, "mamba_d_state": 16,
        "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 256, "attn_layer_period": 8, "attn_layer_offset": 4,
        "expert_layer_period": 2, "expert_layer_offset": 1, "vocab_size": 65536,
    }),
    "Phi-3.5-MoE": ("Phimoe", {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 6400, "num_local_experts": 16, "num_experts_per_tok": 2, "attention_bias": True,
        "lm_head_bias": True, "vocab_size": 32064,
    }),
    "GLM-4.5-Air": ("Glm4Moe", {
        "hidden_size": 4096, "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 128,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "vocab_size": 151552,
    }),
    "MiniMax-M2": ("MiniMaxM2", {
        "hidden_size": 3072, "num_hidden_layers": 62, "num_attention_heads": 48, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 1536, "num_local_experts": 256, "num_experts_per_tok": 8,
        "vocab_size": 200064,
    }),
}  # fmt: skip


def model_of(kind: str, sizes: dict[str, Any]) -> Any:
    config = getattr(transformers, "Llama4TextConfig" if kind == "Llama4" else f"{kind}Config")(**sizes)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    if config.tie_word_embeddings:  # as docs/torch.md has it
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach())
    return model


def report_of(model: Any, head: bool) -> Report:
    """What `quantize_` would do, with the output head or without."""

    def keep(module: nn.Module, name: str) -> str | None:
        return None if head or module is not model.get_output_embeddings() else "the output head"

    report, reason_of = Report(), chooser(model, keep)
    for name in layers_of(model):
        module = model.get_submodule(name)
        reason = reason_of(module, name)
        if reason is None:
            report.replaced_bytes += multiplied_bytes(module)
        else:
            report.kept[name] = reason
    count_floats(model, report)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names; all mixtures when none is given")
    names = parser.parse_args().names
    worst = 1.0
    print("| model | weights, billions | packed | packed, head float |")
    print("|---|---|---|---|")
    for name, (kind, sizes) in MIXTURES.items():
        if names and not any(part.lower() in name.lower() for part in names):
            continue
        model = model_of(kind, sizes)
        whole, without_head = report_of(model, True), report_of(model, False)
        count = sum(parameter.numel() for parameter in model.parameters()) / 1e9
        worst = min(worst, 1 - whole.float_share)
        print(f"| {name} | {count:.1f} | {1 - whole.float_share:.2%} | {1 - without_head.float_share:.2%} |")
        for line in whole.summary().splitlines()[1:]:
            print(re.sub(r"^", "    ", line), file=sys.stderr)
    return 0 if worst >= 0.98 else 1


if __name__ == "__main__":
    sys.exit(main())
