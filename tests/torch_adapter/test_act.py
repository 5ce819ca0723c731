"""`set_act`: one scheme for all layers, or another for tokens that come one by one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn
from torch_cases import MARKS, same

from pyda8w4.torch import DA8W4Linear, quantize_, set_act

pytestmark = MARKS
IDS = torch.arange(24).reshape(2, 12) * 7 % 60


def perceptron() -> Any:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 40))
    quantize_(model, 32)
    return model


def acts(model: nn.Module) -> set[str]:
    return {module.act for module in model.modules() if isinstance(module, DA8W4Linear)}


def test_tokens_and_prompts() -> None:
    model, x = perceptron(), torch.randn(3, 5, 64)
    plain = {}
    for act in ("int8_group", "int16", "uint8"):
        set_act(model, act)
        assert acts(model) == {act} and not model._forward_pre_hooks
        plain[act] = model(x), model(x[:, :1])
    set_act(model, "int8_group", "int16")
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for _ in range(2):
            assert same(each(x), plain["int8_group"][0])
            assert same(each(x[:, :1]), plain["int16"][1]) and acts(each) == {"int8_group"}
            assert same(each(x[1:2, :1]), plain["int16"][1][1:2])  # a sequence alone and in a batch
            assert same(each(x[:, 0]), plain["int8_group"][0][:, 0])  # rows without positions
    set_act(model, "uint8", "int8")
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    set_act(nn.Sequential(nn.Identity(), model), "uint8")
    hooks = {name: value for name, value in vars(model).items() if "hooks" in name and name.startswith("_forward")}
    assert len(hooks) > 4 and not any(hooks.values())
    assert same(model(x[:, :1]), plain["uint8"][1])
    set_act(model, "int16", "int16")
    assert not model._forward_pre_hooks


def test_what_is_refused() -> None:
    model = perceptron()
    for error, arguments in (
        (TypeError, (torch.zeros(1), "uint8")),
        (TypeError, (model, None)),
        (ValueError, (model, "int4")),
        (ValueError, (model, "uint8", "int4")),
        (TypeError, (model, "uint8", 16)),
        (ValueError, (nn.Linear(4, 4), "uint8")),
    ):
        with pytest.raises(error):
            set_act(*arguments)
        assert acts(model) == {"uint8"} and not model._forward_pre_hooks


def test_generate(tmp_path: Any) -> None:
    hf = pytest.importorskip("transformers", reason="transformers is not installed")
    from pyda8w4.torch.transformers import DA8W4Config

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = hf.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    how = DA8W4Config(32, "int8_group", token_act="int16")
    load = hf.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "float", quantization_config=how)
    seen: list[tuple[int, set[str]]] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["input_ids"].shape[1], acts(model))), with_kwargs=True
    )
    model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert seen == [(12, {"int8_group"}), *[(1, {"int16"})] * 3]
    assert acts(model) == {"int8_group"}
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    for ids in (IDS[:, :1], IDS):
        assert same(again(ids).logits, model(ids).logits)
    embedded = model.get_input_embeddings()(IDS[:, :1])
    assert same(again(inputs_embeds=embedded).logits, model(IDS[:, :1]).logits)
    set_act(again, "int8", "uint8")
    again.save_pretrained(tmp_path / "set")
    config = load(tmp_path / "set").config.quantization_config
    assert (config.act, config.token_act) == ("int8", "uint8")
    assert (how.act, how.token_act) == ("int8_group", "int16")
    with pytest.raises(ValueError, match="token_act must be"):
        DA8W4Config(token_act="int4")


def test_an_encoder_is_called_by_itself() -> None:
    hf = pytest.importorskip("transformers", reason="transformers is not installed")
    config = hf.T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    config.decoder_start_token_id = 0
    model = hf.T5ForConditionalGeneration(config).eval()
    quantize_(model, 32)
    set_act(model, "int8", "int16")
    options = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    first, second = (model.generate(input_ids=IDS, **options).logits for _ in range(2))
    assert all(same(a, b) for a, b in zip(first, second))


def test_an_error_leaves_no_scheme() -> None:
    model = perceptron()
    set_act(model, "int8", "int16")
    with pytest.raises(ValueError):
        model(torch.randn(2, 1, 65))
    assert acts(model) == {"int8"}


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled(dynamic: bool | None) -> None:
    model = perceptron()
    set_act(model, "int8_group", "int16")
    compiled = torch.compile(model, backend="eager", dynamic=dynamic)
    for count in (5, 7, 1, 5, 1, 9):
        x = torch.randn(2, count, 64)
        assert same(compiled(x), model(x))
