"""Models that two processes divide, as transformers has it, compared with one process."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from torch_cases import MARKS, same

import pyda8w4
from pyda8w4.torch import DA8W4Embedding, DA8W4Linear

with warnings.catch_warnings():  # by libraries that transformers imports where they are installed
    warnings.simplefilter("ignore")
    from pyda8w4.torch.transformers import DA8W4Config

pytestmark = [
    *MARKS,
    pytest.mark.process,
    pytest.mark.skipif(not hasattr(transformers.PreTrainedModel, "_mesh_manager"), reason="transformers is too old"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed"),
]

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "tied": transformers.LlamaConfig(**SIZES),
    "odd": transformers.LlamaConfig(**{**SIZES, "vocab_size": 63}),
    "qwen3": transformers.Qwen3Config(**SIZES),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SIZES, **MIXTURE, moe_intermediate_size=128),
    "gpt_oss": transformers.GptOssConfig(**SIZES, **TOKENS, **MIXTURE),
}


def make(folder: Path, name: str) -> Any:
    """A float model, and of that a packed one. Biases are seen in the outputs."""
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    for key, parameter in model.named_parameters():
        if "bias" in key or "sinks" in key:
            parameter.data.normal_(0, 0.5)
    model.save_pretrained(folder / "float")
    config = DA8W4Config(32, modules_to_not_convert=["router"])
    packed = transformers.AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config)
    if name == "tied":  # as from_checkpoint makes it
        weight = packed.lm_head.packed
        packed.model.embed_tokens = DA8W4Embedding.from_packed(weight)
        packed.lm_head.share_tensors(packed.model.embed_tokens)
        packed.config.tie_word_embeddings = True
    packed.save_pretrained(folder / "packed")
    return packed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What tests/tools/tensor_parallel.py finds, by process."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    with torch.no_grad():
        for name in CONFIGS:
            packed = make(folder / name, name)
            if name == "llama":
                save_others(packed, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(__file__).parents[1] / "tools" / "tensor_parallel.py"
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "TQDM_DISABLE": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"found{rank}.pt") for rank in range(2)]


def save_others(model: Any, folder: Path) -> None:
    """Models with a layer whose groups end elsewhere than its parts, and with one that cannot be cut."""
    layer = model.model.layers[1].mlp.down_proj
    codes, scales, *_ = layer.packed.unpack()
    for name, options in {
        "groups": {"scales": scales[:, 0]},
        "perm": {"scales": scales, "perm": np.roll(np.arange(128, dtype=np.int32), 1)},
    }.items():
        packed = pyda8w4.prepack(codes, **options)
        model.model.layers[1].mlp.down_proj = DA8W4Linear.from_packed(packed, layer.bias)
        model.save_pretrained(folder / name)


def assert_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert same(one["logits"], two["logits"]) and same(one["tokens"], two["tokens"])


def assert_close(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Rows are quantized in parts where K is cut."""
    difference = (one["logits"] - two["logits"]).abs().max()
    assert 0 < difference < 0.02 * one["logits"].abs().max() and same(one["tokens"], two["tokens"])


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_where_n_is_cut_every_bit_is_the_same(name: str, found: Any) -> None:
    for one in found:
        assert_equal(one[f"{name} n"], one[f"{name} whole"])
        assert_equal(one[f"{name} n float"], one[f"{name} whole"])


@pytest.mark.parametrize("name", ["llama", "tied", "qwen3", "qwen3_moe"])
def test_the_whole_plan(name: str, found: Any) -> None:
    for one in found:
        assert_equal(one[f"{name} packed"], one[f"{name} terms"])
        assert_close(one[f"{name} packed"], one[f"{name} whole"])
        if f"{name} float" in one:
            assert_equal(one[f"{name} float"], one[f"{name} packed"])


def test_experts_with_biases(found: Any) -> None:
    for one in found:
        assert_equal(one["gpt_oss packed"], one["gpt_oss terms"])


def test_a_float_head_is_cut_by_transformers(found: Any) -> None:
    for one in found:
        assert_close(one["head kept"], one["head kept whole"])
        assert one["head kept"]["layers"] == one["llama packed"]["layers"] - 1


def test_half_precision(found: Any) -> None:
    for one in found:
        assert one["half"]["logits"].dtype == torch.bfloat16
        assert (one["half"]["logits"] - one["half whole"]["logits"]).abs().max() < 0.03 * one["half"][
            "logits"
        ].abs().max()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_inputs_that_come_whole(name: str, found: Any) -> None:
    for one in found:
        assert_equal(one[f"{name} split"], one[f"{name} terms"])


def test_a_border_inside_a_group(found: Any) -> None:
    for one in found:
        assert_equal(one["groups"], one["groups terms"])


def test_fused_layers(found: Any) -> None:
    for one in found:
        assert_equal(one["fused"], one["fused terms"])


@pytest.mark.parametrize("name", ["llama packed", "llama float", "qwen3 packed", "tied packed", "qwen3_moe packed"])
def test_each_process_has_half(name: str, found: Any) -> None:
    whole = found[0][f"{name.split()[0]} whole"]
    for one in found:
        assert one[name]["layers"] == whole["layers"]
        assert one[name]["bytes"] < 0.52 * whole["bytes"]


PLACED = "ValueError: model.layers.1.mlp.down_proj, 'rowwise' in tp_plan, cannot be cut: "
REFUSALS = {
    "save": "ValueError: model has only the parts of this process",
    "row": "IndexError",
    "n": "ValueError: lm_head, 'colwise' in tp_plan, cannot be cut: N must be a multiple of 2, got 63",
    "n packed": "ValueError: lm_head, .* cannot be cut: count must divide N = 63, got 2",
    "parameters": "ValueError: .*experts, 'moe_tp_experts' in .* cannot be cut: tp_plan does not cut its parameters",
    "groups": "ValueError: .*self_attn.o_proj, 'rowwise' in tp_plan, cannot be cut: K = 128 must be 2 times .* got 128",
    "perm": f"{PLACED}count must cut K where perm keeps inputs apart, got 2",
    "style": "ValueError: model.embed_tokens, 'all_reduce' in tp_plan, cannot be cut: a DA8W4Embedding",
    "experts": "ValueError: distributed_config must have ep_size = 1 .* got 2",
    "stages": "ValueError: distributed_config must have pp_size = 1 .* got 2",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_is_refused(name: str, found: Any) -> None:
    for one in found:
        assert re.match(REFUSALS[name], one["errors"][name]), one["errors"][name]
