"""Models of transformers."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
from cases import Weight, address, assert_same_bits, pack, packed_bytes, stored_arrays

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn
from torch_cases import GROUPS, MARKS, same

import pyda8w4.checkpoints
from pyda8w4.torch import DA8W4Linear, fuse_linears, quantize_

pytestmark = MARKS

# Tiny models are mostly output heads and convolutions: loading them warns.
STAYS_FLOAT = pytest.mark.filterwarnings("ignore:.*stay float:UserWarning")


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


@STAYS_FLOAT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zeros", ["float", "integer", "none"])
def test_transformers_config(dtype: Any, zeros: str, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from pyda8w4.torch.transformers import DA8W4Config

    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, attention_bias=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path / "float")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "float", dtype=dtype)
    config = DA8W4Config(32, zeros=zeros, act="int16")
    first = load(tmp_path / "float", dtype=dtype, quantization_config=config)
    quantize_(model, 32, "int16", zeros=zeros)
    prompt = torch.arange(10)[None]
    assert same(first(prompt).logits, model(prompt).logits)
    first.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed", dtype=dtype)
    assert same(again(prompt).logits, model(prompt).logits)
    assert again.model.layers[1].self_attn.q_proj.act == "int16"
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


IDS = torch.arange(12)[None] % 9 + 5
SMALL = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def hf() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import pyda8w4.torch.transformers

    transformers.C = pyda8w4.torch.transformers.DA8W4Config
    return transformers


def llama(hf: Any, **options: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2, **options)).eval()


def t5(hf: Any) -> Any:
    config = hf.T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return hf.T5ForConditionalGeneration(config).eval()


def gpt2(hf: Any) -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=4)).eval()


def falcon(hf: Any) -> Any:
    return hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    ).eval()


def mixtral(hf: Any) -> Any:
    config = hf.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    return hf.MixtralForCausalLM(config).eval()


def mamba(hf: Any) -> Any:
    return hf.MambaForCausalLM(hf.MambaConfig(vocab_size=64, hidden_size=64, state_size=8, num_hidden_layers=2)).eval()


def modernbert(hf: Any) -> Any:
    return hf.ModernBertForMaskedLM(hf.ModernBertConfig(**SMALL, pad_token_id=0)).eval()


def gemma3(hf: Any) -> Any:
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.Gemma3Config(
        text_config={**SMALL, "num_key_value_heads": 2, "head_dim": 16},
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4, image_token_index=60, boi_token_index=61, eoi_token_index=62,
    )  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config).eval()


def run(model: Any) -> Any:
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS[:, :4]
    return model(**inputs)[0]


def packed_names(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, DA8W4Linear)]


@STAYS_FLOAT
@pytest.mark.parametrize("make", [llama, t5, gpt2, falcon, mixtral, mamba, modernbert, gemma3])
@pytest.mark.parametrize("on_load", [True, False])
def test_what_is_saved_loads(make: Callable[..., Any], on_load: bool, hf: Any, tmp_path: Any) -> None:
    model = make(hf)
    if on_load:
        model.save_pretrained(tmp_path / "float")
        model = type(model).from_pretrained(tmp_path / "float", quantization_config=hf.C(32))
    else:
        quantize_(model, 32)
    assert len(packed_names(model)) >= 6
    want = run(model)
    model.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed")
    assert packed_names(again) == packed_names(model)
    assert torch.allclose(run(again), want, rtol=1e-5, atol=1e-6)  # float layers of another alignment round otherwise
    for name in packed_names(model):
        a, b = model.get_submodule(name).state_dict(), again.get_submodule(name).state_dict()
        assert a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    again.save_pretrained(tmp_path / "twice")
    assert packed_names(type(model).from_pretrained(tmp_path / "twice")) == packed_names(model)


@STAYS_FLOAT
def test_layers_that_the_class_keeps_in_float32(hf: Any, tmp_path: Any) -> None:
    t5(hf).save_pretrained(tmp_path / "float")
    load = hf.T5ForConditionalGeneration.from_pretrained
    model = load(tmp_path / "float", quantization_config=hf.C(32))
    assert not any(name.endswith("wo") for name in packed_names(model))
    model = load(tmp_path / "float", quantization_config=hf.C(32, modules_to_not_convert=["SelfAttention.q"]))
    names = [name.rpartition(".")[2] for name in packed_names(model)]
    assert names.count("q") == 2 and names.count("k") == 6 and "wo" not in names


@STAYS_FLOAT
def test_loading_into_another_class(hf: Any, tmp_path: Any) -> None:
    model = llama(hf)
    quantize_(model, 32)
    model.save_pretrained(tmp_path / "lm")
    want = model.model(IDS)[0]
    base = hf.AutoModel.from_pretrained(tmp_path / "lm")
    assert len(packed_names(base)) == 14 and same(base(IDS)[0], want)
    base.save_pretrained(tmp_path / "base")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert same(again.model(IDS)[0], want) and type(again.lm_head) is nn.Linear
    classifier = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm")
    assert same(classifier.model(IDS)[0], want) and type(classifier.score) is nn.Linear
    with pytest.raises(ValueError, match=r"down_proj is \(64, 32\) by the config"):
        hf.AutoModel.from_pretrained(tmp_path / "lm", intermediate_size=32)
    with pytest.raises(ValueError, match="none of the packed layers"):
        hf.BertModel.from_pretrained(tmp_path / "lm", config=hf.BertConfig(
            **SMALL, quantization_config=model.config.quantization_config.to_dict()
        ))  # fmt: skip


def test_composite_as_its_text_model(hf: Any, tmp_path: Any) -> None:
    model = gemma3(hf)
    quantize_(model, 32)
    model.save_pretrained(tmp_path / "packed")
    # transformers gives this class random weights without an error, of a float checkpoint, too.
    with pytest.raises(ValueError, match="Gemma3ForCausalLM has none of the packed layers"):
        hf.Gemma3ForCausalLM.from_pretrained(tmp_path / "packed")
    model.model.language_model.save_pretrained(tmp_path / "text")
    text = hf.Gemma3TextModel.from_pretrained(tmp_path / "text")
    assert len(packed_names(text)) == 14
    assert torch.allclose(text(IDS)[0], model.model.language_model(IDS)[0], rtol=1e-5, atol=1e-5)


def test_config_warns_of_what_stays_float(hf: Any, tmp_path: Any) -> None:
    mixtral(hf).save_pretrained(tmp_path / "float")
    config = hf.C(32, modules_to_not_convert=["experts", "lm_head"])
    with pytest.warns(UserWarning, match="stay float") as caught:
        hf.MixtralForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    text = str(caught[0].message)
    assert "model.layers.*.mlp.experts (2 times): modules_to_not_convert" in text
    assert "lm_head: modules_to_not_convert" in text


@STAYS_FLOAT
def test_config_of_earlier_versions(hf: Any, tmp_path: Any) -> None:
    """With `symmetric_activation` and `symmetric_weight`, and tensors of layout version 1."""
    import json

    from safetensors.torch import load_file, save_file

    model = llama(hf)
    quantize_(model, 32, "int8", method="minmax", zeros="none")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"].pop("act") == "int8"
    for name in ("method", "zeros", "two_level"):
        del config["quantization_config"][name]
    config["quantization_config"] |= {"symmetric_activation": True, "symmetric_weight": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = load_file(tmp_path / "model.safetensors")
    for name, tensor in state.items():
        if name.endswith(".layout"):
            assert tensor.shape == (4,)
            tensor[0] = 1
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.model.layers[0].mlp.up_proj.act == "int8" and same(again(IDS)[0], model(IDS)[0])
    assert again.config.quantization_config.to_dict()["act"] == "int8"
    assert again.config.quantization_config.zeros == "none"
    with pytest.raises(TypeError, match="symmetric_activation"):
        hf.C(symmetric_activation=1)
    with pytest.raises(TypeError, match="symmetric_weight"):
        hf.C(symmetric_weight=1)
    with pytest.raises(ValueError, match="act must be"):
        hf.C(act="int4")


@STAYS_FLOAT
def test_kinds_of_weights(hf: Any, tmp_path: Any) -> None:
    model = llama(hf)
    quantize_(model, 32, "int8_group")
    mlp = model.model.layers[1].mlp
    mlp.up_proj = DA8W4Linear.from_packed(pack(Weight(96, 64, 16, "float16", 0, bits=6, supers=2)), act="int8_group")
    mlp.down_proj = DA8W4Linear.from_packed(
        pack(Weight(64, 96, 32, table=True, zps=0, perm=True, factors=True)), act="int8_group"
    )
    mlp.gate_proj = DA8W4Linear.from_packed(pack(Weight(96, 64, 32, bits=8, offsets=True)), act="int8_group")
    model.save_pretrained(tmp_path)
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    assert same(again(IDS)[0], model(IDS)[0]) and again.model.layers[1].mlp.up_proj.packed.bits == 6


@pytest.fixture
def kinds_of_weights(hf: Any, tmp_path: Any) -> tuple[dict[str, Any], Any]:
    """Packed weights by name, and a folder of the model that has them."""
    model = llama(hf)
    quantize_(model, 32)
    mlp = model.model.layers[1].mlp
    mlp.up_proj = DA8W4Linear.from_packed(pack(Weight(96, 64, 16, "float16", 0, bits=6, supers=2)))
    mlp.down_proj = DA8W4Linear.from_packed(pack(Weight(64, 96, 32, table=True, zps=0, perm=True, factors=True)))
    mlp.gate_proj = DA8W4Linear.from_packed(pack(Weight(96, 64, 32, "bfloat16", bits=8, offsets=True)))
    model.save_pretrained(tmp_path / "packed")
    return {name: model.get_submodule(name).packed for name in packed_names(model)}, tmp_path / "packed"


def test_checkpoints_without_torch(kinds_of_weights: Any) -> None:
    weights, path = kinds_of_weights
    checkpoint = pyda8w4.checkpoints.open(path)
    assert len(weights) == 15
    for name, packed in weights.items():
        assert checkpoint.types[name] == f"packed {packed.bits}-bit"
        assert packed_bytes(checkpoint.packed(name)) == packed_bytes(packed)
        assert_same_bits(checkpoint.array(name), packed.dequantize())
        assert packed_bytes(checkpoint.weight(name).pack()) == packed_bytes(packed)
    # They are in the mapped file, and only there.
    codes = stored_arrays(checkpoint.packed("model.layers.0.mlp.up_proj"))["codes"]
    assert address(codes) == address(stored_arrays(checkpoint.packed("model.layers.0.mlp.up_proj"))["codes"])
    assert not codes.flags.owndata and not codes.flags.writeable


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("up_proj.codes", None, "is missing"),
        ("up_proj.zps", None, "is missing"),
        ("up_proj.sub_scales", None, "must be uint8 or int8, got None"),
        ("up_proj.codes", lambda tensor: tensor[:-1], r"must have shape \(3, \d+, \d+\), got \(2, \d+, \d+\)"),
        ("up_proj.codes", lambda tensor: tensor.view(torch.int8), "must be of U8, got I8"),
        (
            "up_proj.scales",
            lambda tensor: tensor.to(torch.float64),
            "must be float32, float16 or bfloat16, got another",
        ),
        ("up_proj.scales", lambda tensor: tensor[..., :-1].contiguous(), "must have shape"),
        ("up_proj.sums", lambda tensor: tensor.to(torch.float16), "must be of F32, got F16"),
        ("up_proj.layout", lambda tensor: tensor[:5], r"must have 4, 7 or 8 numbers, got shape \(5,\)"),
        ("up_proj.layout", lambda tensor: tensor + 1, r"must be \[2, N, K, group size\]"),
        ("up_proj.layout", lambda tensor: tensor * 0 + 2, ".* is that of no packed weight"),
        ("down_proj.perm", lambda tensor: tensor * 0, "must have each of 0 to 95 once"),
        ("down_proj.factors", lambda tensor: tensor * float("nan"), "must be finite"),
        ("down_proj.zps", lambda tensor: tensor + 1, "must be 0 without dimensions where there is a table"),
    ],
)
def test_hostile_checkpoints_without_torch(name: str, change: Any, why: str, kinds_of_weights: Any) -> None:
    from safetensors.torch import load_file, save_file

    _, path = kinds_of_weights
    whole = f"model.layers.1.mlp.{name}"
    state = load_file(path / "model.safetensors")
    tensor = state.pop(whole)
    if change is not None:
        state[whole] = change(tensor)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    layer, _, _ = whole.rpartition(".")
    with pytest.raises(ValueError, match=rf"{whole} {why}"):
        pyda8w4.checkpoints.open(path).packed(layer)


@STAYS_FLOAT
def test_config_serves_twice(hf: Any, tmp_path: Any) -> None:
    llama(hf).save_pretrained(tmp_path / "float")
    config = hf.C(np.int64(32))
    before = copy.deepcopy(config.to_dict())
    load = hf.LlamaForCausalLM.from_pretrained
    first = load(tmp_path / "float", quantization_config=config)
    second = load(tmp_path / "float", quantization_config=config)
    assert config.to_dict() == before and first.config.quantization_config is not config
    assert same(first(IDS)[0], second(IDS)[0]) and len(packed_names(second)) == 14
    second.save_pretrained(tmp_path / "packed")  # a group size of numpy is written as JSON
    third = load(tmp_path / "float", quantization_config=second.config.quantization_config)
    assert same(first(IDS)[0], third(IDS)[0])


@STAYS_FLOAT
def test_device_map(hf: Any, tmp_path: Any) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    llama(hf).save_pretrained(tmp_path / "float")
    load = hf.LlamaForCausalLM.from_pretrained
    want = load(tmp_path / "float", quantization_config=hf.C(32))
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    devices |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    options = {"device_map": devices, "offload_folder": tmp_path / "offload"}
    with pytest.warns(UserWarning, match="device_map .* is not followed"):
        model = load(tmp_path / "float", quantization_config=hf.C(32), **options)
    assert len(packed_names(model)) == 14 and same(model(IDS)[0], want(IDS)[0])
    model.save_pretrained(tmp_path / "packed")
    mapped = load(tmp_path / "packed", **options)
    assert mapped.model.layers[1].input_layernorm.weight.is_meta and same(mapped(IDS)[0], want(IDS)[0])
    assert len(packed_names(load(tmp_path / "float", quantization_config=hf.C(32), device_map="auto"))) == 14


def test_declared_ties(hf: Any, tmp_path: Any) -> None:
    class Model(hf.LlamaPreTrainedModel):  # type: ignore[misc, name-defined]
        _tied_weights_keys: ClassVar[Any] = {"heads.1.weight": "heads.0.weight"}

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.heads = nn.ModuleList([nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)])
            self.again, self.norm = self.heads[0], nn.LayerNorm(64)
            self.post_init()

        def forward(self, x: Any) -> Any:
            return self.heads[1](self.heads[0](self.norm(x))) + self.again(x)

    model = Model(hf.LlamaConfig(**SMALL, tie_word_embeddings=True)).eval()
    assert model.heads[0].weight is model.heads[1].weight
    assert len(quantize_(model, 32).replaced) == 3
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 64)
    again = Model.from_pretrained(tmp_path)
    assert len(packed_names(again)) == 2 and same(again(x), model(x))


def test_lora(hf: Any) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = llama(hf)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])).eval()
    report = quantize_(model, 32)
    assert len(report.replaced) == 15
    assert all("reads its weight" in reason for reason in report.kept.values())  # to merge an adapter
    assert model(IDS)[0].isfinite().all()


def test_reload() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    code = "import importlib, pyda8w4.torch.transformers as t; importlib.reload(t); t.DA8W4Config(32)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
