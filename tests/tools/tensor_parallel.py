"""One of the processes that divide models of transformers: what test_tensor_parallel.py compares.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 python tests/tools/tensor_parallel.py FOLDER

FOLDER has models as the test makes them, and gets what they gave in this process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from transformers.distributed import DistributedConfig

from pyda8w4 import concat, stack
from pyda8w4.torch import DA8W4Experts, DA8W4Linear, fuse_gated, fuse_linears
from pyda8w4.torch._layer import PackedLayer
from pyda8w4.torch.transformers import DA8W4Config

IDS = torch.arange(12)[None] % 9 + 5
CUT_K = ("o_proj", "down_proj", "mlp.down")
CUT_N = {
    f"model.layers.*.{name}_proj": "colwise_gather_output"
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
}
SPLIT = {**CUT_N, **{key: "rowwise_split_input" for key in CUT_N if key.endswith(("o_proj", "down_proj"))}}
AUTO: dict[str, Any] = {"tp_plan": "auto"}
EXPERTS = {"tp_plan": {"model.layers.*.mlp.experts": "moe_tp_experts"}}


class Terms(nn.Module):
    """What both processes together compute of a layer whose K is cut, in one."""

    def __init__(self, layer: DA8W4Linear) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            DA8W4Linear.from_packed(layer.packed.shard(i, 2, 1), None if i else layer.bias, act=layer.act)
            for i in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = (part(part_of_x) for part, part_of_x in zip(self.parts, x.chunk(2, -1)))
        return one + two


class ExpertTerms(nn.Module):
    """The same of a mixture."""

    def __init__(self, experts: DA8W4Experts) -> None:
        super().__init__()
        self.parts = nn.ModuleList(self.part(experts, i) for i in range(2))

    def part(self, experts: DA8W4Experts, i: int) -> DA8W4Experts:
        size = experts.intermediate_features
        if experts.interleaved:
            gate_up = experts.gate_up.packed.shard(i, 2, 0)
            columns = slice(size * i, size * (i + 1))
        else:
            gate_up = stack(
                [concat([one[:size].shard(i, 2, 0), one[size:].shard(i, 2, 0)]) for one in experts.gate_up.packed]
            )
        down = experts.down.packed.shard(i, 2, 1)
        biases = []
        if experts.interleaved:
            biases = [
                experts.gate_up.bias[:, columns],
                experts.down.bias if i == 0 else torch.zeros_like(experts.down.bias),
            ]
        return DA8W4Experts.from_packed(gate_up, down, *biases, **experts._gating._asdict(), act=experts.act)

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        one, two = (part(*arguments) for part in self.parts)
        return one + two


def load(path: Path, plan: dict[str, Any] | None = None, **options: Any) -> Any:
    config = None if plan is None else DistributedConfig(**plan)
    return transformers.AutoModelForCausalLM.from_pretrained(path, distributed_config=config, **options)


def outputs(model: Any) -> dict[str, Any]:
    tokens = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, min_new_tokens=12, do_sample=False
    )
    layers = [module for module in model.modules() if isinstance(module, PackedLayer)]
    seen = {buffer.data_ptr(): buffer.nbytes for layer in layers for buffer in layer.buffers(recurse=False)}
    return {"logits": model(IDS).logits, "tokens": tokens, "bytes": sum(seen.values()), "layers": len(layers)}


def with_terms(model: Any, cut_k: tuple[str, ...] = CUT_K) -> Any:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, DA8W4Experts):
            model.set_submodule(name, ExpertTerms(layer))
        elif name.endswith(cut_k):
            model.set_submodule(name, Terms(layer))
    return model


def fused(model: Any, count: int = 2) -> Any:
    assert len(fuse_linears(model, [("q_proj", "k_proj", "v_proj")]).replaced) == count
    assert len(fuse_gated(model).replaced) == count
    return model


def error_of(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> int:
    folder = Path(sys.argv[1])
    transformers.logging.set_verbosity_error()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    quantized = {"quantization_config": DA8W4Config(32, modules_to_not_convert=[])}
    found: dict[str, Any] = {}
    with torch.no_grad():
        for name in ("llama", "qwen3", "qwen3_moe", "tied"):
            found[f"{name} whole"] = outputs(load(folder / name / "packed"))
            found[f"{name} packed"] = outputs(load(folder / name / "packed", AUTO))
            if name != "tied":
                found[f"{name} float"] = outputs(load(folder / name / "float", AUTO, **quantized))
            found[f"{name} terms"] = outputs(with_terms(load(folder / name / "packed")))
        for name in ("llama", "qwen3"):
            found[f"{name} n"] = outputs(load(folder / name / "packed", {"tp_plan": CUT_N}))
            found[f"{name} split"] = outputs(fused(load(folder / name / "packed", {"tp_plan": SPLIT}), 0))
            found[f"{name} n float"] = outputs(load(folder / name / "float", {"tp_plan": CUT_N}, **quantized))
        found["head kept whole"] = outputs(load(folder / "llama/float", quantization_config=DA8W4Config(32)))
        found["head kept"] = outputs(load(folder / "llama/float", AUTO, quantization_config=DA8W4Config(32)))
        found["gpt_oss packed"] = outputs(load(folder / "gpt_oss/packed", EXPERTS))
        found["gpt_oss terms"] = outputs(with_terms(load(folder / "gpt_oss/packed"), ()))
        found["half whole"] = outputs(load(folder / "llama/packed", dtype=torch.bfloat16))
        found["half"] = outputs(load(folder / "llama/packed", AUTO, dtype=torch.bfloat16))
        found["groups terms"] = outputs(with_terms(load(folder / "groups")))
        found["groups"] = outputs(load(folder / "groups", AUTO))
        found["fused terms"] = outputs(with_terms(fused(load(folder / "llama/packed"))))
        found["fused"] = outputs(fused(load(folder / "llama/packed", AUTO)))
        model = load(folder / "tied/packed", AUTO)
        found["errors"] = {
            "save": error_of(model.save_pretrained, folder / f"saved{dist.get_rank()}"),
            "row": error_of(model, torch.tensor([[64]])),
            "groups": error_of(load, folder / "llama/float", AUTO, quantization_config=DA8W4Config(128)),
            "n": error_of(load, folder / "odd/float", {"tp_plan": {"lm_head": "colwise"}}, **quantized),
            "n packed": error_of(load, folder / "odd/packed", AUTO),
            "parameters": error_of(load, folder / "gpt_oss/float", EXPERTS, **quantized),
            "perm": error_of(load, folder / "perm", AUTO),
            "style": error_of(load, folder / "tied/packed", {"tp_plan": {"model.embed_tokens": "all_reduce"}}),
            "experts": error_of(load, folder / "qwen3_moe/packed", {"tp_size": 2, "ep_size": 2}),
            "stages": error_of(load, folder / "llama/packed", {"pp_size": 2}),
        }
    torch.save(found, folder / f"found{dist.get_rank()}.pt")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    sys.exit(main())
