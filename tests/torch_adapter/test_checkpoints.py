"""Models of transformers from checkpoints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import Weight, assert_same_bits, pack

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from model_files import TEXT, Written, permuted, random_model, write_folders
from torch import nn
from torch_cases import MARKS, same

import pyda8w4
import pyda8w4.checkpoints
import pyda8w4.convert
from pyda8w4.torch import DA8W4Embedding, DA8W4Experts, DA8W4Linear, from_checkpoint

pytestmark = MARKS

IDS = torch.arange(24)[None] * 7 % 50 + 5


def linears(model: Any) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, DA8W4Linear))}


def experts_of(model: Any) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, DA8W4Experts)}


SWIGLUOAI = {"activation": "swigluoai", "interleaved": True, "alpha": 1.702, "limit": 7.0}


def assert_is(model: Any, want: Any, packed: set[str]) -> None:
    """A model has the weights of a float model, `packed` ones among them, and computes the same beside its layers."""
    assert type(model) is type(want) and not model.training
    state, found = want.state_dict(), set()
    for name, layer in model.named_modules():
        if isinstance(layer, (DA8W4Linear, DA8W4Embedding)):
            found.add(name)
            assert_same_bits(layer.packed.dequantize(), state[f"{name}.weight"].numpy(), name)
        elif isinstance(layer, DA8W4Experts):
            found.add(name)
            for stack in ("gate_up", "down"):
                weights = state[f"{name}.{stack}_proj"]
                weights = weights.mT if want.get_submodule(name).is_transposed else weights
                packed_stack = getattr(layer, stack).packed
                assert packed_stack.shape == weights.shape
                for one, weight in zip(packed_stack, weights):
                    assert_same_bits(one.dequantize(), weight.contiguous().numpy(), name)
    assert found == packed
    for name, parameter in model.named_parameters():
        assert same(parameter, state[name]), name
    first = model(IDS).logits
    for name, layer in linears(model).items():
        old = want.get_submodule(name)
        if isinstance(layer, DA8W4Linear):
            bias = None if old.bias is None else old.bias.float()
            want.set_submodule(name, DA8W4Linear.from_packed(layer.packed, bias, act=layer.act))
    for name, layer in experts_of(model).items():
        old = want.get_submodule(name)
        biases = [getattr(old, f"{stack}_proj_bias", None) for stack in ("gate_up", "down")]
        options = {} if biases[0] is None else SWIGLUOAI
        stacks = layer.gate_up.packed, layer.down.packed
        want.set_submodule(name, DA8W4Experts.from_packed(*stacks, *biases, **options, act=layer.act))
    assert same(first, want(IDS).logits)
    options = {"attention_mask": torch.ones_like(IDS), "min_new_tokens": 5, "max_new_tokens": 5, "do_sample": False}
    assert model.generate(IDS, **options).shape == (1, IDS.shape[1] + 5)


def assert_loads_again(model: Any, path: Path) -> Any:
    model.save_pretrained(path)
    again = type(model).from_pretrained(path)
    assert same(again(IDS).logits, model(IDS).logits)
    a, b = model.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return again


def shares_memory(one: Any, other: Any) -> bool:
    keys = [key for key, tensor in one._buffers.items() if tensor is not None and key != "bias"]
    return all(one._buffers[key].data_ptr() == other._buffers[key].data_ptr() for key in keys)


# ---- GGUF ------------------------------------------------------------------------------------


SOFTCAPS = {"attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0}
MULTIPLIERS = {
    "attention_multiplier": 0.25, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
}  # fmt: skip
GRANITE_VALUES = {"attention.scale": 0.25, "embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 2.0}
HEADS_OF_32 = {"head_dim": 32}
LENGTHS_OF_32 = {"attention.key_length": 32, "attention.value_length": 32}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
}
GEMMA3_VALUES = {
    "attention.sliding_window": 8, "rope.freq_base": 50000.0, "rope.freq_base_swa": 1000.0,
    "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 5000.0}
YARN_VALUES = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
    "rope.freq_base": 5000.0,
}  # fmt: skip

EXPERTS_5, INNER_32 = {"expert_count": 5, "expert_used_count": 2}, {"expert_feed_forward_length": 32}
MOE = {"num_experts": 5, "moe_intermediate_size": 32}
UP_2 = "model.layers.0.mlp.experts.2.up_proj.weight"
USUAL = {"attention.causal": True, "expert_count": 0, "attention.sliding_window": 0, "vocab_size": 96}

# Architecture, class, options of the config, options of the file.
GGUF_CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "Llama", {}, {"heads": True, "values": {"rope.dimension_count": 16, **USUAL}}),
    "llama-tied": ("llama", "Llama", {"tie_word_embeddings": True}, {"heads": True}),
    "llama-biases": ("llama", "Llama", {"attention_bias": True, "mlp_bias": True}, {"heads": True}),
    "llama-head-dim": ("llama", "Llama", HEADS_OF_32, {"heads": True, "values": LENGTHS_OF_32}),
    "llama-linear": (
        "llama", "Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
        {"heads": True, "values": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.freq_base": 500.0}},
    ),
    "qwen2": ("qwen2", "Qwen2", {"tie_word_embeddings": True}, {}),
    "qwen2-yarn": ("qwen2", "Qwen2", {"rope_parameters": YARN}, {"values": YARN_VALUES}),
    "qwen3": ("qwen3", "Qwen3", HEADS_OF_32, {"values": LENGTHS_OF_32}),
    "gemma": ("gemma", "Gemma", HEADS_OF_32, {"shift": True, "values": LENGTHS_OF_32}),
    "gemma2": (
        "gemma2", "Gemma2", {**HEADS_OF_32, **SOFTCAPS, "sliding_window": 8, "query_pre_attn_scalar": 32},
        {"shift": True, "values": {**LENGTHS_OF_32, **SOFTCAPS, "attention.sliding_window": 8}},
    ),
    "gemma3": (
        "gemma3", "Gemma3",
        {**HEADS_OF_32, "sliding_window": 8, "query_pre_attn_scalar": 32, "rope_parameters": GEMMA3_ROPE,
         "num_hidden_layers": 6},
        {"shift": True, "values": {**LENGTHS_OF_32, **GEMMA3_VALUES}},
    ),
    "phi3": (
        "phi3", "Phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
         "partial_rotary_factor": 0.5, "original_max_position_embeddings": 64, "sliding_window": 8},
        {"values": {"rope.dimension_count": 8, "rope.scaling.original_context_length": 64,
                    "attention.sliding_window": 8}},
    ),
    "granite": ("granite", "Granite", MULTIPLIERS, {"heads": True, "values": GRANITE_VALUES}),
    "olmo2": ("olmo2", "Olmo2", {}, {}),
    "smollm3": ("smollm3", "SmolLM3", {"num_hidden_layers": 4}, {"heads": True}),
    "mixtral": (
        "llama", "Mixtral", {"num_local_experts": 5, "head_dim": 16},
        {"heads": True, "values": {**EXPERTS_5, "vocab_size": 96}},
    ),
    "mixtral-float": (
        "llama", "Mixtral", {"num_local_experts": 5, "head_dim": 16},
        {"heads": True, "values": EXPERTS_5, "experts": dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "F16")},
    ),
    "qwen2moe": (
        "qwen2moe", "Qwen2Moe",
        {**MOE, "shared_expert_intermediate_size": 96, "num_experts_per_tok": 2, "norm_topk_prob": False},
        {"values": {**EXPERTS_5, **INNER_32, "expert_shared_feed_forward_length": 96},
         "experts": {"down_proj": "Q8_0"}},
    ),
    "qwen2moe-vector": (
        "qwen2moe", "Qwen2Moe",
        {**MOE, "shared_expert_intermediate_size": 32, "num_experts_per_tok": 2, "norm_topk_prob": False},
        {"values": {**EXPERTS_5, **INNER_32, "expert_shared_feed_forward_length": 32}, "gate_is_vector": True},
    ),
    "qwen3moe": (
        "qwen3moe", "Qwen3Moe", {**MOE, **HEADS_OF_32, "num_experts_per_tok": 3, "norm_topk_prob": True},
        {"values": {**EXPERTS_5, **INNER_32, **LENGTHS_OF_32, "expert_used_count": 3},
         "experts": {"down_proj": "Q5_1"}},
    ),
    "gpt-oss": (
        "gpt-oss", "GptOss",
        {**HEADS_OF_32, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 8, "rope_parameters":
         {**YARN, "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0}},
        {"values": {**EXPERTS_5, **LENGTHS_OF_32, **YARN_VALUES, "expert_feed_forward_length": 96,
                    "attention.sliding_window": 8},
         "experts": dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "MXFP4")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GGUF_CASES)
def test_gguf(case: str, tmp_path: Path) -> None:
    architecture, kind, options, more = GGUF_CASES[case]
    want = random_model(kind, **options)
    written = Written(tmp_path / "model.gguf", want, architecture, **more)
    model = from_checkpoint(written.path, act="int16")
    packed = [*linears(model).values(), *experts_of(model).values()]
    assert {layer.act for layer in packed if type(layer) is not nn.Linear} == {"int16"}
    assert model.name_or_path == str(written.path)
    ignored = ("quantization_config", "architectures", "_name_or_path", "rope_parameters")
    a, b = ({k: v for k, v in m.config.to_dict().items() if k not in ignored} for m in (model, want))
    assert {key: value for key, value in a.items() if key in b and value != b[key]} == {"dtype": "float32"}
    close = want(IDS).logits
    assert torch.allclose(model(IDS).logits, close, atol=2e-3 * float(close.abs().max()))
    assert_is(model, want, written.packed)
    again = assert_loads_again(model, tmp_path / "saved")
    if want.config.tie_word_embeddings:
        for one in (model, again):
            assert shares_memory(one.lm_head, one.get_input_embeddings())
            one.tie_weights()  # finds nothing to do


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 500.0,
}  # fmt: skip


def test_gguf_factors_of_llama3(tmp_path: Path) -> None:
    """Files have, for each frequency, what it is divided by."""
    want = random_model("Llama", rope_parameters=LLAMA3)
    factors = []
    for i in range(8):  # as generate_extra_tensors of convert_hf_to_gguf.py
        wavelength = 2 * np.pi * 500.0 ** (i / 8)
        if wavelength < 32 / 4:
            factors.append(1.0)
        elif wavelength > 32 / 1:
            factors.append(8.0)
        else:
            factors.append(1 / ((1 - (smooth := (32 / wavelength - 1) / (4 - 1))) / 8 + smooth))
    assert len(set(factors)) > 3
    tensors = {"rope_freqs.weight": np.array(factors, np.float32)}
    written = Written(tmp_path / "model.gguf", want, "llama", heads=True, tensors=tensors)
    model = from_checkpoint(written.path)
    rotary, other = model.model.rotary_emb, want.model.rotary_emb
    assert torch.allclose(rotary.inv_freq, other.inv_freq, rtol=1e-6) and rotary.attention_scaling == 1
    for ids in (IDS, torch.cat([IDS, IDS + 1], 1)):  # the second is longer than the original positions
        model(ids)
        assert torch.allclose(rotary.inv_freq, other.inv_freq, rtol=1e-6)
    want.model.rotary_emb = rotary
    assert_is(model, want, written.packed)
    assert_loads_again(model, tmp_path / "saved")


def test_gguf_factors_of_phi3(tmp_path: Path) -> None:
    short, long = [1.0 + i / 8 for i in range(8)], [2.0 + i for i in range(8)]
    rope = {"rope_type": "longrope", "short_factor": short, "long_factor": long, "rope_theta": 10000.0}
    options = {"original_max_position_embeddings": 16, "sliding_window": None}
    want = random_model("Phi3", rope_parameters=rope | {"partial_rotary_factor": 1.0}, **options)
    attention = float(np.float32((1 + np.log(64 / 16) / np.log(16)) ** 0.5))
    values = {
        "rope.dimension_count": 16, "rope.scaling.original_context_length": 16, "rope.scaling.attn_factor": attention,
        "attention.sliding_window": 0,
    }  # fmt: skip
    tensors = {
        "rope_factors_short.weight": np.array(short, np.float32),
        "rope_factors_long.weight": np.array(long, np.float32),
    }
    written = Written(tmp_path / "model.gguf", want, "phi3", values=values, tensors=tensors)
    model = from_checkpoint(written.path)
    assert abs(model.model.rotary_emb.attention_scaling - want.model.rotary_emb.attention_scaling) < 1e-7
    for count in (8, 24):
        model(IDS[:, :count]), want(IDS[:, :count])
        assert same(model.model.rotary_emb.inv_freq, want.model.rotary_emb.inv_freq)
    want.model.rotary_emb = model.model.rotary_emb
    assert_is(model, want, written.packed)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_gguf_fused_q_k_v(architecture: str, tmp_path: Path) -> None:
    """q, k and v of unequal sizes in one tensor, with a bias."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    llama = architecture == "llama"
    options = {"attention_bias": True} if llama else {}
    want = random_model("Llama" if llama else "Qwen2", num_hidden_layers=1, **options)
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    attention, fused = want.model.layers[0].self_attn, {}
    for last in ("weight", "bias"):
        parts = [getattr(layer, last) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
        if last == "weight":
            for part in parts:
                part.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(part.numpy(), q4_0), q4_0)))
        arrays = [part.numpy() for part in parts]
        if llama:
            arrays[:2] = permuted(arrays[0], 4), permuted(arrays[1], 2)
        fused[last] = np.concatenate(arrays)

    path = tmp_path / "model.gguf"
    tensors = {
        "blk.0.attn_qkv.weight": (gguf.quantize(fused["weight"], q4_0), q4_0),
        "blk.0.attn_qkv.bias": fused["bias"],
    }
    changes = {"without": r"attn_[qkv]\.", "tensors": tensors, "heads": llama, "types": ["Q4_0"]}
    written = Written(path, want, architecture, **changes)
    projections = {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}
    assert_is(from_checkpoint(path), want, written.packed | projections)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("types", [("F16", "Q4_0"), ("Q8_0", "F16"), ("BF16", "F16")])
def test_gguf_with_matrices_of_floats(types: tuple[str, str], tied: bool, tmp_path: Path) -> None:
    want = random_model("Llama", tie_word_embeddings=tied)
    written = Written(tmp_path / "model.gguf", want, "llama", heads=True, types=types)
    model = from_checkpoint(written.path)
    assert type(model.model.embed_tokens) is (DA8W4Embedding if types[0] == "Q8_0" else nn.Embedding)
    if tied:
        assert model.lm_head.weight is model.model.embed_tokens.weight or types[0] == "Q8_0"
    assert_is(model, want, written.packed)
    assert_loads_again(model, tmp_path / "saved")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(dtype: Any, tmp_path: Path) -> None:
    want = random_model("Gemma3", **HEADS_OF_32, sliding_window=8, query_pre_attn_scalar=32, tie_word_embeddings=True)
    values = {**LENGTHS_OF_32, "attention.sliding_window": 8, "rope.freq_base": 1e6}
    written = Written(tmp_path / "model.gguf", want, "gemma3", shift=True, values=values)
    model = from_checkpoint(written.path, dtype=dtype)
    assert model.dtype == dtype and model.config.dtype == dtype and model(IDS).logits.dtype == dtype
    want.to(dtype)
    want.model.rotary_emb = model.model.rotary_emb  # which stays float32
    for name, layer in linears(model).items():
        assert layer.weight.dtype == dtype
        want.set_submodule(name, DA8W4Linear.from_packed(layer.packed))
    packed = model.model.embed_tokens.packed
    want.model.embed_tokens.weight = nn.Parameter(torch.from_numpy(packed.dequantize()).to(dtype))
    assert same(model(IDS).logits, want(IDS).logits)
    again = assert_loads_again(model, tmp_path / "saved")
    assert again.model.embed_tokens.scale == 8.0


def test_act_and_default_dtype(tmp_path: Path) -> None:
    written = Written(tmp_path / "model.gguf", random_model("Llama", tie_word_embeddings=True), "llama", heads=True)
    model = from_checkpoint(str(written.path), act="int8_group")
    assert {layer.act for layer in linears(model).values()} == {"int8_group"} and model.dtype == torch.float32
    again = assert_loads_again(model, tmp_path / "saved")
    assert {layer.act for layer in linears(again).values()} == {"int8_group"}
    base = transformers.AutoModel.from_pretrained(tmp_path / "saved")
    assert same(base(IDS)[0], model.model(IDS)[0])
    with torch.enable_grad():  # then layers run as operators
        assert same(type(model).from_pretrained(tmp_path / "saved")(IDS).logits.detach(), model(IDS).logits.detach())


def test_gguf_that_cannot_be_packed_exactly(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    want = random_model("Llama", intermediate_size=256)
    kind = gguf.GGMLQuantizationType.IQ3_S
    blocks = np.random.default_rng(0).integers(0, 256, (64, 110), np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    tensors = {f"blk.{i}.ffn_down.weight": (blocks, kind) for i in range(2)}
    path = tmp_path / "model.gguf"
    Written(path, want, "llama", heads=True, without="ffn_down", tensors=tensors)
    why = r"blk.0.ffn_down.weight \(and 1 more such as blk.1.ffn_down.weight\) cannot be packed exactly: .*codebook"
    with pytest.raises(ValueError, match=why + r".*requantize=True"):
        from_checkpoint(path)
    with pytest.warns(UserWarning, match="was quantized to 4 bits") as caught:
        model = from_checkpoint(path, requantize=True)
    assert len(caught) == 2
    floats = gguf.dequantize(blocks, kind)
    packed = pyda8w4.quantize(floats, 32)
    for layer in model.model.layers:
        assert_same_bits(layer.mlp.down_proj.packed.dequantize(), packed.dequantize())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"without": "blk.1.attn_norm"}, r"model.layers.1.input_layernorm.weight is not in the checkpoint"),
        ({"without": "blk.1.ffn_(up|down)"}, r"layers.1.mlp.down_proj.weight \(and 1 more\) is not in the checkpoint"),
        ({"without": "token_embd"}, r"a matrix token_embd.weight of 64 columns, got none"),
        ({"tensors": {"blk.1.attn_sinks.weight": np.ones(4, np.float32)}}, r"blk.1.attn_sinks.weight has no place"),
        ({"tensors": {"blk.2.attn_norm.weight": np.ones(64, np.float32)}}, r"block_count must be 3, .*, got 2"),
        ({"tensors": {"mtp.x": np.ones(4, np.float32)}}, r"mtp.x has no place"),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(62, np.float32)}}, r"blk.0.attn_q.bias must have 64 rows, got"),
        ({"tensors": {"blk.0.ffn_up.bias": np.ones(90, np.float32)}}, r"up_proj.bias is \(96,\) by .*, \(90,\) in the"),
        ({"without": "blk.0.ffn_up", "tensors": {"blk.0.ffn_up.weight": np.ones((96, 32), np.float32)}},
         r"up_proj.weight is \(96, 64\) by the config of the model, \(96, 32\)"),
        ({"without": "blk.0.ffn_up", "tensors": {"blk.0.ffn_up.weight": np.ones((2, 96, 64), np.float32)}},
         r"up_proj.weight is \(96, 64\) by the config of the model, \(2, 96, 64\)"),
        ({"tensors": {"rope_freqs.weight": np.ones(5, np.float32)}}, r"must have 8 factors of rotary .*, got 5"),
        ({"tensors": {"rope_factors_long.weight": np.ones(8, np.float32)}}, r"factors of rotary embeddings"),
        ({"values": {"attention.clamp_kqv": 3.0}}, r"nothing is known of its value llama.attention.clamp_kqv = 3.0"),
        ({"values": {"attention.causal": False}}, r"nothing is known of its value llama.attention.causal = False"),
        ({"values": {"expert_count": 8}}, r"llama.expert_used_count"),
        ({"values": {"expert_count": 8, "expert_used_count": 2}}, r"blk.0.ffn_gate.weight is in no Mixtral"),
        ({"values": {"rope.dimension_count": 8}}, r"llama.rope.dimension_count must be 16, got 8"),
        ({"values": {"rope.scaling.type": "su"}}, r"llama.rope.scaling.type must be none, .*, got su"),
        ({"values": {"rope.scaling.type": "longrope"}}, r"must have tensors rope_factors_short.weight"),
        ({"values": {"attention.key_length": 32}}, r"blk.0.attn_q.weight must have 128 rows|value_length"),
        ({"values": {"attention.value_length": 8}}, r"llama.attention.value_length must be the key_length"),
        ({"values": {"embedding_length": 32}}, r"token_embd.weight of 32 columns, got \(96, 64\)"),
        ({"values": {"embedding_length": "x"}}, r"token_embd.weight of x columns"),
        ({"values": {"block_count": 1 << 30}}, r"llama.block_count must be 2, as there are, got 1073741824"),
        ({"values": {"attention.head_count": 0}}, r"make no config|cannot be made"),
        ({"values": {"attention.head_count": "4"}}, r"make no config|cannot be made"),
        ({"values": {"attention.head_count_kv": [2, 1]}}, r"must be the same for all layers, got \[2, 1\]"),
        ({"values": {"feed_forward_length": 128}}, r"gate_proj.weight is \(128, 64\) by the config"),
    ],
)  # fmt: skip
def test_gguf_that_is_no_such_model(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    Written(path, random_model("Llama"), "llama", heads=True, **changes)
    with pytest.raises(ValueError, match=match) as caught:
        from_checkpoint(path)
    assert str(path) in str(caught.value)


def test_gguf_of_other_architectures(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    Written(path, random_model("Llama"), "orion")
    with pytest.raises(ValueError, match=r"general.architecture must be one of gemma, gemma2, .*smollm3, got orion"):
        from_checkpoint(path)
    with pytest.raises(ValueError, match="act must be"):
        from_checkpoint(path, act="int4")
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16"):
        from_checkpoint(path, dtype=torch.float64)
    with pytest.raises(TypeError, match="requantize must be a bool"):
        from_checkpoint(path, requantize=1)
    with pytest.raises(TypeError, match="path"):
        from_checkpoint(3)


# ---- folders ---------------------------------------------------------------------------------


FOLDER_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("Llama", {"tie_word_embeddings": False}),
    "awq": ("Qwen2", {"tie_word_embeddings": True}),
    "compressed-tensors": (
        "Gemma3",
        {**HEADS_OF_32, "sliding_window": 8, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    ),
}


@pytest.mark.parametrize("method", FOLDER_CASES)
def test_folder(method: str, tmp_path: Path) -> None:
    kind, options = FOLDER_CASES[method]
    model = random_model(kind, **options)
    model.generation_config.temperature, model.generation_config.do_sample = 0.625, True
    want = write_folders(model, tmp_path, method)
    model = from_checkpoint(tmp_path / "quantized")
    assert model.generation_config.temperature == 0.625 and model.dtype == torch.float32
    packed = {name for name in linears(want) if name != "lm_head"}
    assert len(packed) == 14 and type(model.lm_head) is nn.Linear
    assert_is(model, want, packed)
    again = assert_loads_again(model, tmp_path / "again")
    assert type(again.model.embed_tokens) is type(want.model.embed_tokens)


def test_converted_folder_generates_as_the_folder(tmp_path: Path) -> None:
    model = random_model("Llama")
    model.generation_config.eos_token_id = [5, 6]
    write_folders(model, tmp_path, "gptq")
    pyda8w4.convert.run(pyda8w4.checkpoints.open(tmp_path / "quantized"), tmp_path / "out.safetensors")
    for name in ("quantized", "out.safetensors"):
        assert from_checkpoint(tmp_path / name).generation_config.eos_token_id == [5, 6]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_damaged_floats_of_a_converted_file(dtype: torch.dtype, tmp_path: Path) -> None:
    write_folders(random_model("Llama").to(dtype), tmp_path, "gptq")
    path = tmp_path / "out.safetensors"
    pyda8w4.convert.run(pyda8w4.checkpoints.open(tmp_path / "quantized"), path)
    tensor = pyda8w4.checkpoints.open(path)._layers["model.embed_tokens.weight"].stored
    data = bytearray(path.read_bytes())
    data[data.index(tensor.bytes.tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"out.safetensors: model.embed_tokens.weight .* does not have its checksum"):
        from_checkpoint(path)


@pytest.mark.parametrize("requantize", [False, True])
def test_layers_without_floats_cannot_be_quantized_again(requantize: bool, tmp_path: Path) -> None:
    write_folders(random_model("Llama"), tmp_path, "gptq")
    change_config(tmp_path / "quantized", lambda config: config["quantization_config"].update(bits=3))
    with pytest.raises(ValueError, match=r"_proj \(and 13 more .*cannot be packed exactly: [^;]*$"):
        from_checkpoint(tmp_path / "quantized", requantize=requantize)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BertModel"]}, r"architectures must be of the model_type llama, got \['BertModel'\]"),
        ({"dtype": "float64"}, r"dtype must be float32, bfloat16 or float16, got torch.float64"),
        ({"generation_config": [1]}, "generation_config.json must have a JSON object, got list"),
    ],
)
def test_configs_that_no_model_has(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_folders(random_model("Llama"), tmp_path, "gptq")
    if "generation_config" in change:
        (tmp_path / "quantized" / "generation_config.json").write_text(json.dumps(change["generation_config"]))
    else:
        change_config(tmp_path / "quantized", lambda config: config.update(change))
    with pytest.raises(ValueError, match=rf"quantized.*{message}"):
        from_checkpoint(tmp_path / "quantized")


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_folder_has_a_dtype(tmp_path: Path) -> None:
    write_folders(random_model("Llama").to(torch.bfloat16), tmp_path, "gptq")
    model = from_checkpoint(tmp_path / "quantized")
    assert model.dtype == torch.bfloat16 and model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert from_checkpoint(tmp_path / "quantized", dtype=torch.float32).dtype == torch.float32


def test_folder_of_a_mixture_has_a_dtype(tmp_path: Path) -> None:
    kind, options, names = MIXTURES["mixtral"]
    write_folders(random_model(kind, **options).to(torch.bfloat16), tmp_path, "gptq", names)
    model = from_checkpoint(tmp_path / "quantized")
    assert model.dtype == torch.bfloat16 and len(experts_of(model)) == 2
    assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize("names", ["embed_tokens$|lm_head$|_proj$", "embed_tokens$|_proj$", "lm_head$|_proj$"])
@pytest.mark.parametrize("tied", [False, True])
def test_quantized_embeddings_and_heads(names: str, tied: bool, tmp_path: Path) -> None:
    """A head that is in the file is not tied, whatever the config says, and one of them may stand for both."""
    want = write_folders(random_model("Llama", tie_word_embeddings=False), tmp_path, "gptq", names)
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    model = from_checkpoint(tmp_path / "quantized")
    packed = {name for name, module in want.named_modules() if re.search(names, name) and hasattr(module, "weight")}
    assert_is(model, want, packed)
    assert_loads_again(model, tmp_path / "again")


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_one_quantized_matrix_for_embedding_and_head(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    want = write_folders(random_model("Llama", tie_word_embeddings=False), tmp_path, "gptq", f"{name}$")
    file = tmp_path / "quantized" / "model.safetensors"
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    other = "lm_head" if name == "embed_tokens" else "model.embed_tokens"
    save_file({key: tensor for key, tensor in load_file(file).items() if not key.startswith(other)}, file)
    model = from_checkpoint(tmp_path / "quantized")
    weight = want.get_submodule("model.embed_tokens" if name == "embed_tokens" else name).weight
    want.model.embed_tokens.weight = want.lm_head.weight = weight
    assert_is(model, want, {"model.embed_tokens", "lm_head"})
    assert shares_memory(model.lm_head, model.model.embed_tokens)
    again = assert_loads_again(model, tmp_path / "again")
    assert shares_memory(again.lm_head, again.model.embed_tokens)


def logits_of(model: Any) -> Any:
    return model(IDS)[0]


def test_conv1d(tmp_path: Path) -> None:
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        )
    ).eval()
    want = write_folders(model, tmp_path, "gptq", r"(c_attn|c_proj|c_fc)$", transposed=True)
    model = from_checkpoint(tmp_path / "quantized", act="int16")
    for name, layer in linears(model).items():
        if name != "lm_head":
            assert_same_bits(layer.packed.dequantize(), want.get_submodule(name).weight.T.contiguous().numpy())
            assert same(layer.bias, want.get_submodule(name).bias)
    assert torch.allclose(logits_of(model), logits_of(want), atol=1e-3)
    assert_loads_again(model, tmp_path / "again")


def test_layers_whose_weight_is_read_stay_float(tmp_path: Path) -> None:
    config = transformers.MambaConfig(
        vocab_size=96, hidden_size=64, state_size=8, num_hidden_layers=2, time_step_rank=16
    )
    want = write_folders(transformers.MambaForCausalLM(config).eval(), tmp_path, "gptq", "(in|dt|out)_proj$")
    model = from_checkpoint(tmp_path / "quantized", act="int16")
    mixer = model.backbone.layers[0].mixer
    assert type(mixer.in_proj) is DA8W4Linear and type(mixer.dt_proj) is nn.Linear
    assert same(mixer.dt_proj.weight, want.backbone.layers[0].mixer.dt_proj.weight)
    assert torch.allclose(logits_of(model), logits_of(want), atol=1e-3)


def test_names_that_transformers_changes(tmp_path: Path) -> None:
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 16}, vision_config={**vision, "image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4, image_token_index=90, boi_token_index=91, eoi_token_index=92, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    want = write_folders(model, tmp_path, "gptq", "language_model.*(_proj|embed_tokens)$")
    model = from_checkpoint(tmp_path / "quantized", act="int16")
    assert len([name for name, layer in linears(model).items() if isinstance(layer, DA8W4Linear)]) == 15
    assert shares_memory(model.lm_head, model.model.language_model.embed_tokens)
    assert torch.allclose(logits_of(model), logits_of(want), atol=1e-3)
    again = assert_loads_again(model, tmp_path / "again")
    assert shares_memory(again.lm_head, again.model.language_model.embed_tokens)


def test_float_folder(tmp_path: Path) -> None:
    want = random_model("Llama")
    want.save_pretrained(tmp_path)
    assert_is(from_checkpoint(tmp_path), want, set())


MIXTURES: dict[str, tuple[str, dict[str, Any], str]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 12}, r"_proj$|experts.\d+.w\d$"),
    "qwen3": ("Qwen3Moe", {**MOE, "norm_topk_prob": True, "num_experts_per_tok": 2}, r"_proj$"),
    "deepseek": (
        "DeepseekV3",
        {"n_routed_experts": 4, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
         "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
         "num_experts_per_tok": 2, "num_key_value_heads": 4, "topk_method": "noaux_tc"},
        r"experts.*_proj$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", ["awq", "compressed-tensors", "gptq"])
@pytest.mark.parametrize("case", MIXTURES)
def test_folder_of_a_mixture_of_experts(case: str, method: str, tmp_path: Path) -> None:
    """A quantized matrix for each expert."""
    kind, options, names = MIXTURES[case]
    want = write_folders(random_model(kind, **options), tmp_path, method, names)
    model = from_checkpoint(tmp_path / "quantized", act="int16")
    packed = {name for name in linears(want) if re.search("experts" if case == "deepseek" else "_proj$", name)}
    mixtures = {name for name, module in want.named_modules() if name.endswith(".experts")}
    assert len(mixtures) == (1 if case == "deepseek" else 2) and not packed & mixtures
    close = want(IDS).logits
    assert torch.allclose(model(IDS).logits, close, atol=2e-3 * float(close.abs().max()))
    assert_is(model, want, packed | mixtures)
    assert_loads_again(model, tmp_path / "again")


def write_stacks(path: Path, model: Any, weights: dict[str, Any], stored: dict[str, Any], quantization: Any) -> Any:
    """A folder with quantized tensors in the place of weights, and the float model of the same numbers."""
    from safetensors.torch import save_file

    model.load_state_dict(weights, strict=False)
    model.save_pretrained(path)
    save_file({name: tensor for name, tensor in model.state_dict().items() if name not in weights} | stored,
              path / "model.safetensors", {"format": "pt"})  # fmt: skip
    change_config(path, lambda config: config.update(quantization_config=quantization))
    return model


def gpt_oss(path: Path) -> Any:
    """MXFP4 as OpenAI has it; numbers are what transformers reads."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = random_model("GptOss", **HEADS_OF_32, num_local_experts=5, num_experts_per_tok=2, sliding_window=8)
    weights, stored, generator = {}, {}, torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            e, k, n = tensor.shape
            blocks = torch.randint(0, 256, (e, n, k // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(120, 126, (e, n, k // 32), generator=generator, dtype=torch.uint8)
            weights[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32) + 0.0  # -0 is 0
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return write_stacks(path, model, weights, stored, quantization)


def mlx(path: Path) -> Any:
    """Stacks of gates, ups and downs under the name of mlx-lm, and a router that is quantized, too."""
    model = random_model("Qwen3Moe", **MOE, norm_topk_prob=True, num_experts_per_tok=2)
    rng, weights, stored = np.random.default_rng(0), {}, {}

    def quantized(name: str, *shape: int) -> Any:
        codes, (scales, offsets) = rng.integers(0, 16, shape), rng.uniform(-0.3, 0.3, (2, *shape[:-1], shape[-1] // 32))
        words = sum(codes[..., i::8] << 4 * i for i in range(8)).astype(np.uint32)
        scales, offsets = scales.astype(np.float16), offsets.astype(np.float16)
        for part, array in (("weight", words), ("scales", scales), ("biases", offsets)):
            stored[f"{name}.{part}"] = torch.from_numpy(array)
        groups = codes.reshape(*scales.shape, 32).astype(np.float64)  # which is exact
        floats = groups * scales[..., None].astype(np.float64) + offsets[..., None].astype(np.float64)
        return torch.from_numpy(floats.reshape(shape).astype(np.float32))

    for name, tensor in model.state_dict().items():
        base, _, last = name.rpartition(".")
        switch = base.replace("experts", "switch_mlp")
        if last == "gate_up_proj":
            e, n, k = tensor.shape
            halves = [quantized(f"{switch}.{part}_proj", e, n // 2, k) for part in ("gate", "up")]
            weights[name] = torch.cat(halves, 1)
        elif last == "down_proj":
            weights[name] = quantized(f"{switch}.down_proj", *tensor.shape)
        elif base.endswith("mlp.gate"):
            weights[name] = quantized(base, *tensor.shape)
    return write_stacks(path, model, weights, stored, {"quant_method": "mlx", "bits": 4, "group_size": 32})


@pytest.mark.parametrize("write", [gpt_oss, mlx])
def test_folders_of_stacks(write: Callable[[Path], Any], tmp_path: Path) -> None:
    want = write(tmp_path / "quantized")
    model = from_checkpoint(tmp_path / "quantized", act="int16")
    close = want(IDS).logits
    assert torch.allclose(model(IDS).logits, close, atol=2e-3 * float(close.abs().max()))
    assert_is(model, want, {f"model.layers.{i}.mlp.experts" for i in range(2)})
    assert_loads_again(model, tmp_path / "again")
    pyda8w4.convert.run(pyda8w4.checkpoints.open(tmp_path / "quantized"), tmp_path / "out.safetensors")
    for path in (tmp_path / "again", tmp_path / "out.safetensors"):
        assert same(from_checkpoint(path, act="int16")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"without": r"layers.1.mlp.experts.3\."}, r"gate_up is \(5, 64, 64\) by .*, \(4, 32, 64\) and \(4, 32, 64\)"),
        ({"without": r"layers.1.mlp.experts.3.up_proj"}, r"gate_up is .*, \(5, 32, 64\) and \(4, 32, 64\) in the"),
        ({"without": r"layers.0.mlp.experts.*down_proj"}, r"layers.0.mlp.experts: down is \(5, 64, 32\) by .*, none"),
        ({"config": {"moe_intermediate_size": 64}}, r"gate_up is \(5, 128, 64\) by the config of .*, \(5, 32, 64\)"),
        (
            {"config": {"num_experts": 4, "num_local_experts": 4}, "without": r"mlp.gate.weight"},
            r"gate_up is \(4, 64, 64\) by the config of the model, \(5, 32, 64\) and \(5, 32, 64\) in the checkpoint",
        ),
        (
            {"without": r"layers.0.mlp.experts.2.up_proj", "tensors": {UP_2: torch.ones(32, 64)}},
            r"experts.\d.\w+_proj is quantized, but .*.mlp.experts.2.up_proj.weight of the same experts is float",
        ),
        ({"config": {"hidden_act": "relu"}}, r"mlp.experts cannot be packed: its gate with \w+ is none of silu, gelu"),
    ],
)  # fmt: skip
def test_experts_that_are_not_those_of_the_model(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    write_folders(random_model("Qwen3Moe", **MOE, num_experts_per_tok=2), tmp_path, "awq")
    path = edited(tmp_path, **changes)
    with pytest.raises(ValueError, match=match) as caught:
        from_checkpoint(path)
    assert str(path) in str(caught.value)


def test_gates_and_ups_of_two_kinds(tmp_path: Path) -> None:
    values, types = {**EXPERTS_5, **INNER_32}, {"gate_proj": "Q4_0", "up_proj": "Q8_0"}
    want = random_model("Qwen3Moe", **MOE, num_experts_per_tok=2)
    written = Written(tmp_path / "model.gguf", want, "qwen3moe", values=values, experts=types)
    match = r"blk.0.ffn_gate_exps.weight and blk.0.ffn_up_exps.weight cannot be joined: weights\[1\] must have bits = 4"
    with pytest.raises(ValueError, match=match):
        from_checkpoint(written.path)


def test_experts_that_cannot_be_packed_exactly(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    want = random_model("Qwen3Moe", **MOE | {"moe_intermediate_size": 256}, num_experts_per_tok=2)
    kind = gguf.GGMLQuantizationType.IQ3_S
    blocks = np.random.default_rng(0).integers(0, 256, (5, 64, 110), np.uint8)
    blocks[..., :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    values = {**EXPERTS_5, "expert_feed_forward_length": 256}
    tensors = {f"blk.{i}.ffn_down_exps.weight": (blocks, kind) for i in range(2)}
    path = tmp_path / "model.gguf"
    Written(path, want, "qwen3moe", without="ffn_down_exps", values=values, tensors=tensors)
    with pytest.raises(ValueError, match=r"blk.0.ffn_down_exps.weight \(and 1 more .*codebook.*requantize=True"):
        from_checkpoint(path)
    with pytest.warns(UserWarning, match="was quantized to 4 bits .* an error of up to") as caught:
        model = from_checkpoint(path, requantize=True)
    assert len(caught) == 2
    for one, floats in zip(model.model.layers[0].mlp.experts.down.packed, gguf.dequantize(blocks, kind)):
        packed = pyda8w4.quantize(floats, 32)
        assert_same_bits(one.dequantize(), packed.dequantize())


def test_layers_that_transformers_cuts(tmp_path: Path) -> None:
    config = transformers.NomicBertConfig(**TEXT)
    write_folders(transformers.NomicBertForMaskedLM(config).eval(), tmp_path, "gptq", "Wqkv$")
    with pytest.raises(ValueError, match=r"Wqkv is quantized: it cannot be cut or joined, which .* needs"):
        from_checkpoint(tmp_path / "quantized")


def edited(path: Path, tensors: dict[str, Any] | None = None, without: str = "^$", config: Any = None) -> Path:
    from safetensors.torch import load_file, save_file

    file = path / "quantized" / "model.safetensors"
    state = {name: tensor for name, tensor in load_file(file).items() if not re.search(without, name)}
    save_file(state | (tensors or {}), file)
    values = json.loads((path / "quantized" / "config.json").read_text()) | (config or {})
    (path / "quantized" / "config.json").write_text(json.dumps(values))
    return path / "quantized"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"without": "layers.1.input_layernorm"}, "layers.1.input_layernorm.weight is not in the checkpoint"),
        ({"without": "layers.1.mlp.up_proj"}, "layers.1.mlp.up_proj.weight is not in the checkpoint"),
        ({"without": "layers.1.mlp.up_proj.scales"}, "layers.1.mlp.up_proj"),
        ({"without": "0.*q_proj.bias"}, "layers.0.self_attn.q_proj must have a bias"),
        ({"tensors": {"model.layers.0.mlp.up_proj.input_scale": torch.ones(1)}}, "up_proj.input_scale is in no Qwen2"),
        ({"tensors": {"model.layers.0.foo.weight": torch.ones(3, 3)}}, "model.layers.0.foo.weight is in no Qwen2"),
        (
            {"config": {"intermediate_size": 64}},
            r"down_proj.weight is \(64, 64\) by the config of the model, \(64, 96\)",
        ),
        ({"config": {"vocab_size": 95}}, r"(embed_tokens|lm_head).weight is \(95, 64\) by the config"),
        (
            {"config": {"num_hidden_layers": 1, "layer_types": None}},
            r"model.layers.1.mlp.down_proj is in no Qwen2ForCausalLM",
        ),
        (
            {"config": {"num_hidden_layers": 3, "layer_types": None}},
            r"model.layers.2.\S* \(and \d+ more\) is not in the checkpoint",
        ),
        ({"config": {"model_type": "qwen0"}}, "model_type must be one that transformers knows, got 'qwen0'"),
        ({"config": {"model_type": ["qwen2"]}}, "model_type must be one that transformers knows"),
        (
            {"config": {"architectures": ["Qwen0"]}},
            "architectures must begin with a model of transformers, got .'Qwen0'",
        ),
        ({"config": {"architectures": "Qwen0"}}, "architectures must begin with a model of transformers"),
        ({"config": {"architectures": ["AutoModel"]}}, "architectures must begin with a model of transformers"),
        ({"config": {"hidden_size": "x"}}, "cannot be made of its config"),
    ],
)
def test_folder_that_is_no_such_model(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    write_folders(random_model("Qwen2"), tmp_path, "awq")
    path = edited(tmp_path, **changes)
    with pytest.raises(ValueError, match=match) as caught:
        from_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("part", ["model.norm.weight", "model.layers.0.mlp.up_proj.codes"])
def test_damaged_file(part: str, tmp_path: Path) -> None:
    """What is seen only when a tensor is read."""
    from safetensors import safe_open

    write_folders(random_model("Llama"), tmp_path, "gptq")
    path = tmp_path / "packed.safetensors"
    pyda8w4.convert.run(pyda8w4.checkpoints.open(tmp_path / "quantized"), path)
    with safe_open(path, "np") as file:
        found = file.get_tensor(part).tobytes()
    data = path.read_bytes()
    at = data.index(found)
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(ValueError, match=part.removesuffix(".codes")) as caught:
        from_checkpoint(path)
    assert str(path) in str(caught.value)


def test_bias_that_only_the_file_has(tmp_path: Path) -> None:
    """Early AutoGPTQ writes one for every layer."""
    want = write_folders(random_model("Llama"), tmp_path, "gptq")
    biases = torch.randn(96)
    model = from_checkpoint(edited(tmp_path, {"model.layers.0.mlp.up_proj.bias": biases}))
    assert same(model.model.layers[0].mlp.up_proj.bias, biases)
    want.model.layers[0].mlp.up_proj.bias = nn.Parameter(biases)
    assert_is(model, want, {name for name in linears(want) if name != "lm_head"})
    path = edited(tmp_path, {"model.layers.0.mlp.up_proj.bias": biases[:95]})
    with pytest.raises(ValueError, match=r"up_proj.bias must be of shape \(96,\), got \(95,\)"):
        from_checkpoint(path)


# ---- files that were converted ---------------------------------------------------------------


@pytest.mark.parametrize("source", ["gguf", "folder", "experts of gguf", "experts of a folder"])
def test_converted(source: str, tmp_path: Path) -> None:
    """A file of packed weights gives the model of what it was made of, and is mapped."""
    if source == "gguf":
        want = random_model("Llama", tie_word_embeddings=True)
        path = Written(tmp_path / "model.gguf", want, "llama", heads=True, types=("Q4_1", "F16", "Q8_0")).path
    elif source == "experts of gguf":
        want = random_model("Qwen3Moe", **MOE, num_experts_per_tok=2, norm_topk_prob=True)
        path = Written(tmp_path / "model.gguf", want, "qwen3moe", values={**EXPERTS_5, **INNER_32}).path
    elif source == "experts of a folder":
        want = write_folders(random_model("Mixtral", num_local_experts=5), tmp_path, "gptq", r"experts.\d+.w\d$")
        path = tmp_path / "quantized"
    else:
        want = write_folders(random_model("Qwen2"), tmp_path, "awq")
        path = tmp_path / "quantized"
    pyda8w4.convert.run(pyda8w4.checkpoints.open(path), tmp_path / "packed.safetensors")
    first, model = from_checkpoint(path), from_checkpoint(tmp_path / "packed.safetensors")
    kinds = (DA8W4Linear, DA8W4Embedding, DA8W4Experts)
    packed = {name for name, layer in first.named_modules() if isinstance(layer, kinds)}
    assert same(model(IDS).logits, first(IDS).logits)
    assert_is(model, want, packed)
    assert_loads_again(model, tmp_path / "again")


def test_saved_weights_are_no_model(tmp_path: Path) -> None:
    pyda8w4.save(tmp_path / "w.safetensors", {"w": pack(Weight(4, 8))})
    with pytest.raises(ValueError, match="model_type must be one that transformers knows, got None"):
        from_checkpoint(tmp_path / "w.safetensors")


# ---- memory ----------------------------------------------------------------------------------

LIMITED = """
import resource, sys
import torch
import transformers.models.llama.modeling_llama
import pyda8w4.torch.transformers
from pyda8w4.torch import from_checkpoint

torch.set_num_threads(1)
torch.ones(64, 64) @ torch.ones(64, 64)
small, large, allowance = sys.argv[1], sys.argv[2], int(sys.argv[3])
from_checkpoint(small)  # loads what is loaded once
data = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (data + allowance,) * 2)
model = from_checkpoint(large)
print(sum(buffer.nbytes for buffer in model.buffers()))
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("more", [1.25, 0.9])
def test_layers_are_never_dense(more: float, tmp_path: Path) -> None:
    """With the memory of the packed weights and a quarter more; not with less than they take."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    total = 0
    for name, layers, hidden, inner in (("small", 1, 64, 64), ("large", 24, 1024, 2048)):
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        for key, value in (
            ("block_count", layers), ("embedding_length", hidden), ("feed_forward_length", inner),
            ("attention.head_count", 4), ("context_length", 64),
        ):  # fmt: skip
            writer.add_uint32(f"llama.{key}", value)
        writer.add_layer_norm_rms_eps(1e-6)
        sizes = {"token_embd": (256, hidden), "output": (256, hidden)}
        norms = ["output_norm"]
        for i in range(layers):
            block = f"blk.{i}."
            norms += [f"{block}attn_norm", f"{block}ffn_norm"]
            sizes |= {f"{block}attn_{which}": (hidden, hidden) for which in ("q", "k", "v", "output")}
            sizes |= {f"{block}ffn_gate": (inner, hidden), f"{block}ffn_up": (inner, hidden)}
            sizes |= {f"{block}ffn_down": (hidden, inner)}
        for key in norms:
            writer.add_tensor(f"{key}.weight", np.ones(hidden, np.float32))
        for key, (n, k) in sizes.items():
            writer.add_tensor(f"{key}.weight", np.full((n, k // 32 * 18), 60, np.uint8), raw_dtype=q4_0)
        total = sum(n * k // 32 * 18 for n, k in sizes.values())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    command = [sys.executable, "-c", LIMITED, tmp_path / "small", tmp_path / "large", str(int(more * total))]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert (done.returncode == 0) == (more > 1) and ("MemoryError" in done.stderr) == (more < 1), done.stderr
    if more > 1:
        assert total < int(done.stdout) < 1.02 * total
