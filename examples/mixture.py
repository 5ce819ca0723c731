"""A mixture of experts on the CPU: a model of Qwen3-MoE's shape with random weights, as none is small enough to carry.

    python examples/mixture.py

Its weights are quantized to 4 bits and packed, and it says the likeliest tokens, which mean nothing. numpy and pyda8w4
are all it needs. With torch and transformers (``pip install torch transformers``) its logits are compared with
those of Qwen3MoeForCausalLM in float32: with the same weights dequantized, where the difference is what comes from
quantizing activations; and with the weights from before they were quantized. Errors are large where they change which
experts are chosen.

Real mixtures are in GGUF files of architecture qwen3moe, which model.py reads as it reads other models.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from model import Model, generate

import pyda8w4
from pyda8w4.formats import QuantizedWeight

# As transformers names them.
CONFIG = {
    "vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}  # fmt: skip

# What GGUF files call the same.
FIELDS = {
    "embedding_length": "hidden_size", "block_count": "num_hidden_layers", "rope.freq_base": "rope_theta",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_used_count": "num_experts_per_tok",
}  # fmt: skip
MODEL = {"token_embd": "embed_tokens", "output_norm": "norm"}
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.gate",
}  # fmt: skip

GROUP_SIZE = 32
PROMPT, TOKENS = 64, 32
SEED = 20  # of the prompt: no two experts have scores so near that int16 could change which is chosen


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help=f"default: {TOKENS}")
    args = parser.parse_args()

    floats = random_tensors(CONFIG, np.random.default_rng(0))
    file = QuantizedCheckpoint(CONFIG, floats)
    prompt = np.random.default_rng(SEED).integers(0, CONFIG["vocab_size"], PROMPT).tolist()
    model = Model(file, PROMPT + args.tokens)
    mixture = model.blocks[0].mixture
    print(f"gates and ups: {mixture.gate_up}\ndown: {mixture.down}\n")
    print("tokens:", *generate(model, prompt, args.tokens))

    try:
        quantized = transformers_logits(CONFIG, {name: file.array(name) for name in floats}, prompt)
        original = transformers_logits(CONFIG, floats, prompt)
    except ImportError:
        print("\ntorch and transformers are not installed: there is nothing to compare with")
        return
    print("\nerror of logits, as a part of their norm: median and largest of tokens\n")
    print("| activations | weights dequantized | original weights |\n|---|---|---|")
    for act in ("int16", "int8_group", "uint8", "int8"):
        found = logits(Model(file, PROMPT, act=act), prompt)
        errors = [relative_error(found, wanted) for wanted in (quantized, original)]
        print(f"| {act} | " + " | ".join(f"{np.median(each):.2g}, {each.max():.2g}" for each in errors) + " |")


def random_tensors(config: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Float weights by the names that GGUF files have."""
    hidden, inner, experts = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]
    size = config["head_dim"]
    q, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (config["vocab_size"], hidden), "output_norm": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {
            f"blk.{i}.{name}": shape
            for name, shape in {
                "attn_norm": (hidden,), "attn_q": (q, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
                "attn_output": (hidden, q), "attn_q_norm": (size,), "attn_k_norm": (size,), "ffn_norm": (hidden,),
                "ffn_gate_inp": (experts, hidden), "ffn_gate_exps": (experts, inner, hidden),
                "ffn_up_exps": (experts, inner, hidden), "ffn_down_exps": (experts, hidden, inner),
            }.items()
        }  # fmt: skip
    shapes["output"] = shapes["token_embd"]

    def random(shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    return {f"{name}.weight": random(shape) for name, shape in shapes.items()}


class QuantizedCheckpoint:
    """Float weights, quantized: what model.py needs of a `pyda8w4.checkpoints.Checkpoint`.

    Norms and routers are no weights of pyda8w4, and stay as they are.
    """

    def __init__(self, config: dict[str, Any], floats: dict[str, np.ndarray]) -> None:
        self.metadata = {f"qwen3moe.{field}": config[name] for field, name in FIELDS.items()}
        self.metadata["general.architecture"] = "qwen3moe"
        self.floats = {name: w for name, w in floats.items() if w.ndim == 1 or "ffn_gate_inp" in name}
        self.weights = {
            name: [quantize(matrix) for matrix in w.reshape(-1, *w.shape[-2:])]
            for name, w in floats.items()
            if name not in self.floats
        }
        self.types = {name: "F32" if name in self.floats else "quantized" for name in floats}

    def array(self, name: str) -> np.ndarray:
        if name in self.floats:
            return self.floats[name]
        w = np.stack([weight.pack().dequantize() for weight in self.weights[name]])
        return w if name.endswith("_exps.weight") else w[0]

    def weight(self, name: str) -> QuantizedWeight:
        (weight,) = self.weights[name]
        return weight

    def packed(self, name: str) -> pyda8w4.PackedWeight:
        return self.weight(name).pack()

    def stack(self, *names: str) -> pyda8w4.PackedExperts:
        """The experts of these stacks; what an expert has of several is one weight."""
        experts = zip(*(self.weights[name] for name in names))
        return pyda8w4.stack([pyda8w4.concat([part.pack() for part in parts]) for parts in experts])


def quantize(w: np.ndarray) -> QuantizedWeight:
    return pyda8w4.quantize_weight(w, GROUP_SIZE)


def logits(model: Model, tokens: list[int]) -> np.ndarray:
    """After each token: (M, vocabulary)."""
    return model.logits(model.forward(tokens), np.empty((len(tokens), model.embeddings.shape[0]), np.float32))


def relative_error(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Of each row."""
    return np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)


def transformers_logits(config: dict[str, Any], tensors: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """Of the model of transformers that has these weights, in float32."""
    import torch
    import transformers

    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    sizes = {name: value for name, value in config.items() if name != "rope_theta"}
    qwen3moe = transformers.Qwen3MoeConfig(**sizes, rope_parameters=rope, norm_topk_prob=True)
    model = transformers.Qwen3MoeForCausalLM(qwen3moe)
    w = {name.removesuffix(".weight"): torch.from_numpy(tensor) for name, tensor in tensors.items()}
    state = {f"model.{theirs}.weight": w[ours] for ours, theirs in MODEL.items()} | {"lm_head.weight": w["output"]}
    for i in range(config["num_hidden_layers"]):
        block, layer = f"blk.{i}", f"model.layers.{i}"
        state |= {f"{layer}.{theirs}.weight": w[f"{block}.{ours}"] for ours, theirs in LAYER.items()}
        gate_up = [w[f"{block}.ffn_{part}_exps"] for part in ("gate", "up")]
        state[f"{layer}.mlp.experts.gate_up_proj"] = torch.cat(gate_up, dim=1)
        state[f"{layer}.mlp.experts.down_proj"] = w[f"{block}.ffn_down_exps"]
    model.load_state_dict(state)
    with torch.no_grad():
        return model.eval()(torch.tensor([tokens])).logits[0].numpy()


if __name__ == "__main__":
    main()
