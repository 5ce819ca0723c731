"""GGUF files as models of transformers: configs, names of tensors, and what llama.cpp changes in them.

What is undone here is what ``convert_hf_to_gguf.py`` of llama.cpp does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pyda8w4.checkpoints import Checkpoint
from pyda8w4.torch._parts import Part, Recipe, config_of

_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_POST_NORM = {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
_POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SPLIT = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FUSED = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_gate_up_exps": "mlp.experts.gate_up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_GPT_OSS = {"attn_sinks": "self_attn.sinks", "ffn_gate_inp": "mlp.router"}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_ROPE_TENSORS = ("rope_factors_short.weight", "rope_factors_long.weight", "rope_freqs.weight")

# Of nothing that a model computes.
_IGNORED = ("context_length", "vocab_size", "tensor_data_layout", "rope.scaling.finetuned")
# What says that a model does nothing unusual.
_USUAL = {
    "attention.causal": True,
    "attention.sliding_window": 0,
    "attn_logit_softcapping": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "pooling_type": 0,
    "rope.scaling.attn_factor": 1,
}


class _Values:
    """Values that a file has under the name of its architecture; each is asked of once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.architecture = str(checkpoint.metadata["general.architecture"])
        prefix = f"{self.architecture}."
        self._left = {
            key.removeprefix(prefix): value for key, value in checkpoint.metadata.items() if key.startswith(prefix)
        }

    def take(self, key: str, default: Any = None) -> Any:
        """ValueError where it is missing and there is no default."""
        value = self._left.pop(key, default)
        if value is None:
            raise self.refused(f"must have a value, got none: {self.architecture}.{key}")
        if type(value) is list:  # one for each layer
            if len(set(map(str, value))) != 1:
                raise self.refused(f"must be the same for all layers, got {value}: {self.architecture}.{key}")
            value = value[0]
        return value

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def end(self) -> None:
        """ValueError where a value is left that may change what the model computes."""
        for key, value in self._left.items():
            if key not in _IGNORED and (key not in _USUAL or value != _USUAL[key]):
                raise self.refused(f"nothing is known of its value {self.architecture}.{key} = {str(value)[:60]}")

    def refused(self, why: str) -> ValueError:
        return ValueError(f"{self.checkpoint.path}: {why}")


def _common(values: _Values) -> dict[str, Any]:
    metadata, shapes = values.checkpoint.metadata, values.checkpoint.shapes
    heads, hidden, layers = (values.take(key) for key in ("attention.head_count", "embedding_length", "block_count"))
    embedding = shapes.get("token_embd.weight", ())
    if len(embedding) != 2 or embedding[1] != hidden:
        raise values.refused(f"must have a matrix token_embd.weight of {hidden} columns, got {embedding or 'none'}")
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
    if layers != len(blocks):
        raise values.refused(f"{values.architecture}.block_count must be {len(blocks)}, as there are, got {layers}")
    head_dim = values.take("attention.key_length", hidden // heads)
    if values.take("attention.value_length", head_dim) != head_dim or head_dim % 2:
        raise values.refused(f"{values.architecture}.attention.value_length must be the key_length, and even")
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    return {
        "vocab_size": embedding[0],
        "hidden_size": hidden,
        "intermediate_size": values.take("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": values.take("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": values.take("context_length"),
        "rms_norm_eps": values.take("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _rope(values: _Values, config: dict[str, Any], partial: bool = False) -> dict[str, Any]:
    """Frequencies of rotary embeddings."""
    head_dim, positions = config["head_dim"], config["max_position_embeddings"]
    found = {"rope_type": "default", "rope_theta": values.take("rope.freq_base", 10000.0)}
    dimensions = values.take("rope.dimension_count", head_dim)
    if partial:
        found["partial_rotary_factor"] = dimensions / head_dim
    elif dimensions != head_dim:
        raise values.refused(f"{values.architecture}.rope.dimension_count must be {head_dim}, got {dimensions}")
    factor = values.take("rope.scaling.factor", values.take("rope.scale_linear", 1.0))
    kind = values.take("rope.scaling.type", "none" if factor == 1.0 else "linear")
    original = values.take("rope.scaling.original_context_length", positions)
    if kind == "linear":
        found |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        found |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for key in ("beta_fast", "beta_slow"):
            if f"rope.scaling.yarn_{key}" in values:
                found[key] = values.take(f"rope.scaling.yarn_{key}")
    elif kind not in ("none", "longrope"):
        key = f"{values.architecture}.rope.scaling.type"
        raise values.refused(f"{key} must be none, linear, yarn or longrope, got {kind}")
    return found | _rope_factors(values, dimensions // 2, kind, original)


def _rope_factors(values: _Values, count: int, kind: str, original: int) -> dict[str, Any]:
    """What files divide frequencies by, one by one: for short and for long inputs, or, for Llama 3, for all."""
    short, long, both = (
        values.checkpoint.array(name).tolist() if name in values.checkpoint.types else None for name in _ROPE_TENSORS
    )
    if both is None and short is None and long is None:
        if kind == "longrope":
            raise values.refused("must have tensors rope_factors_short.weight and rope_factors_long.weight")
        return {}
    if kind not in ("none", "longrope") or (both is None) == (short is None) or (short is None) != (long is None):
        raise values.refused(f"has tensors with factors of rotary embeddings that do not fit the scaling {kind}")
    lengths = {len(factors) for factors in (short, long, both) if factors is not None}
    if lengths != {count}:
        raise values.refused(f"must have {count} factors of rotary embeddings, got {', '.join(map(str, lengths))}")
    return {
        "rope_type": "longrope",
        "short_factor": both or short,
        "long_factor": both or long,
        "factor": 1.0,
        "attention_factor": values.take("rope.scaling.attn_factor", 1.0),
        "original_max_position_embeddings": original,
    }


def _plain(values: _Values) -> dict[str, Any]:
    config = _common(values)
    return config | {"rope_parameters": _rope(values, config)}


def _llama(values: _Values) -> dict[str, Any]:
    there = values.checkpoint.types
    biases = {"attention_bias": "blk.0.attn_q.bias" in there, "mlp_bias": "blk.0.ffn_up.bias" in there}
    return _plain(values) | biases


def _mixture(values: _Values) -> dict[str, Any]:
    """What configs of mixtures call the numbers of experts differs; each class knows one of the names."""
    count, used = (values.take(key) for key in ("expert_count", "expert_used_count"))
    return _plain(values) | {"num_experts": count, "num_local_experts": count, "num_experts_per_tok": used}


def _qwen2_moe(values: _Values) -> dict[str, Any]:
    shared = values.take("expert_shared_feed_forward_length")
    # No file says whether weights of experts are divided by their sum: llama.cpp knows it by the architecture.
    return _qwen_moe(values, divides=False) | {"shared_expert_intermediate_size": shared}


def _qwen3_moe(values: _Values) -> dict[str, Any]:
    return _qwen_moe(values, divides=True)


def _qwen_moe(values: _Values, divides: bool) -> dict[str, Any]:
    inner = values.take("expert_feed_forward_length")
    return _mixture(values) | {"moe_intermediate_size": inner, "norm_topk_prob": divides}


def _gpt_oss(values: _Values) -> dict[str, Any]:
    inner, window = values.take("expert_feed_forward_length"), values.take("attention.sliding_window")
    config = _mixture(values) | {"intermediate_size": inner, "sliding_window": window}
    config["rope_parameters"]["truncate"] = False  # as all of its models have it
    return config


def _granite(values: _Values) -> dict[str, Any]:
    config = _llama(values)
    return config | {
        "attention_multiplier": values.take("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": values.take("embedding_scale", 1.0),
        "residual_multiplier": values.take("residual_scale", 1.0),
        "logits_scaling": values.take("logit_scale", 1.0),
    }


def _gemma2(values: _Values) -> dict[str, Any]:
    config = _plain(values)
    more = {
        "sliding_window": values.take("attention.sliding_window"),
        "attn_logit_softcapping": values.take("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": values.take("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scalar(config, layers_of_27b=46),
    }
    return config | more


def _gemma3(values: _Values) -> dict[str, Any]:
    config = _plain(values)
    pattern = values._left.pop("attention.sliding_window_pattern", 6)
    if type(pattern) is int:
        pattern = [bool((i + 1) % pattern) for i in range(config["num_hidden_layers"])]
    more = {
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": values.take("rope.freq_base_swa", 10000.0)},
        },
        "sliding_window": values.take("attention.sliding_window"),
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern],
        "final_logit_softcapping": values.take("final_logit_softcapping", 0) or None,
        "query_pre_attn_scalar": _query_scalar(config, layers_of_27b=62),
    }
    return config | more


def _query_scalar(config: dict[str, Any], layers_of_27b: int) -> int:
    """No file says it: llama.cpp knows the one model that differs by its layers."""
    if config["num_hidden_layers"] == layers_of_27b:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _phi3(values: _Values) -> dict[str, Any]:
    config = _common(values)
    del config["head_dim"]  # which the class computes
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    original = values._left.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    window = values.take("attention.sliding_window", 0) or None
    rope = _rope(values, {**config, "head_dim": head_dim}, partial=True)
    return config | {
        "rope_parameters": rope,
        "original_max_position_embeddings": original,
        "sliding_window": window,
        "partial_rotary_factor": rope["partial_rotary_factor"],
    }


class _Architecture(NamedTuple):
    model: str  # the class in transformers
    config: Callable[[_Values], dict[str, Any]]
    names: dict[str, str]  # of layers in a block
    permuted: bool = False  # whether rows of q and k are in the order of llama.cpp's rotary embeddings
    shifted_norms: bool = False  # whether files have 1 more than the model


_ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", _llama, _SPLIT | _NORMS, permuted=True),
    "qwen2": _Architecture("Qwen2ForCausalLM", _plain, _SPLIT | _NORMS),
    "qwen3": _Architecture("Qwen3ForCausalLM", _plain, _SPLIT | _NORMS | _QK_NORMS),
    "gemma": _Architecture("GemmaForCausalLM", _plain, _SPLIT | _NORMS, shifted_norms=True),
    "gemma2": _Architecture("Gemma2ForCausalLM", _gemma2, _SPLIT | _FOUR_NORMS, shifted_norms=True),
    "gemma3": _Architecture("Gemma3ForCausalLM", _gemma3, _SPLIT | _FOUR_NORMS | _QK_NORMS, shifted_norms=True),
    "phi3": _Architecture("Phi3ForCausalLM", _phi3, _FUSED | _NORMS),
    "granite": _Architecture("GraniteForCausalLM", _granite, _SPLIT | _NORMS, permuted=True),
    "olmo2": _Architecture("Olmo2ForCausalLM", _plain, _SPLIT | _POST_NORMS | _QK_NORMS),
    "smollm3": _Architecture("SmolLM3ForCausalLM", _llama, _SPLIT | _NORMS, permuted=True),
}


_MIXTURES = {
    "llama": _Architecture("MixtralForCausalLM", _mixture, _SPLIT | _NORMS | _EXPERTS, permuted=True),
    "qwen2moe": _Architecture("Qwen2MoeForCausalLM", _qwen2_moe, _SPLIT | _NORMS | _EXPERTS | _SHARED_EXPERT),
    "qwen3moe": _Architecture("Qwen3MoeForCausalLM", _qwen3_moe, _SPLIT | _NORMS | _QK_NORMS | _EXPERTS),
    "gpt-oss": _Architecture("GptOssForCausalLM", _gpt_oss, _SPLIT | _POST_NORM | _EXPERTS | _GPT_OSS),
}


def recipe(checkpoint: Checkpoint) -> Recipe:
    """Of a GGUF file, or what was converted from one. ValueError for what is not known to be complete and exact."""
    import transformers

    values = _Values(checkpoint)
    has_experts = checkpoint.metadata.get(f"{values.architecture}.expert_count", 0) != 0
    architecture = (_MIXTURES if has_experts else _ARCHITECTURES).get(values.architecture)
    if architecture is None:
        known, kind = (_MIXTURES, " of a mixture of experts") if has_experts else (_ARCHITECTURES, "")
        raise values.refused(
            f"general.architecture{kind} must be one of {', '.join(sorted(known))}, got {values.architecture}"
        )
    model = getattr(transformers, architecture.model)
    try:
        found = architecture.config(values)
    except (TypeError, ArithmeticError) as error:
        raise values.refused(f"has values of {values.architecture} that make no config: {error}") from None
    values.end()
    config = config_of(checkpoint, model.config_class, found)
    parts: dict[str, Part] = {}
    for name in checkpoint.types:
        if name not in _ROPE_TENSORS:
            parts |= _parts(name, checkpoint, architecture, found)
    return Recipe(model, config, parts)


def _parts(
    name: str, checkpoint: Checkpoint, architecture: _Architecture, config: Mapping[str, Any]
) -> dict[str, Part]:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    block, layer, kind = match.groups() if match else (None, "", "")
    names = _OUTER if block is None else architecture.names
    place = "" if block is None else f"model.layers.{block}."
    if block is not None and int(block) >= config["num_hidden_layers"]:
        names = {}
    is_cut = layer == "attn_qkv" and "attn_q" in names  # fused in the file only
    if not is_cut and layer not in names:
        raise ValueError(f"{checkpoint.path}: {name} has no place in a model of {config['num_hidden_layers']} layers")
    rotary = ("attn_q", "attn_k") if architecture.permuted else ()
    if not is_cut and layer not in rotary:
        shifted = architecture.shifted_norms and layer.endswith("norm") and kind == "weight"
        is_row = layer == "ffn_gate_inp_shexp" and len(checkpoint.shapes[name]) == 1  # older converters drop that
        target = f"{place}{names[layer]}" + (f".{kind}" if layer != "attn_sinks" else "")
        return {target: Part(name, minus=1.0 if shifted else 0.0, is_row=is_row)}
    parts, end = {}, 0
    for one in ("attn_q", "attn_k", "attn_v") if is_cut else (layer,):
        heads = config["num_attention_heads" if one == "attn_q" else "num_key_value_heads"]
        rows = np.arange(end, end := end + heads * config["head_dim"])
        if one in rotary:  # llama.cpp turns neighbours, transformers the halves of a head
            rows = rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
        parts[f"{place}{names[one]}.{kind}"] = Part(name, rows)
    if checkpoint.shapes[name][0] != end:
        raise ValueError(f"{checkpoint.path}: {name} must have {end} rows, got {checkpoint.shapes[name]}")
    return parts
