"""Tokens of vLLM with this library, beside those of transformers with the same packed weights.

vLLM generates greedily. Then transformers computes the logits of all positions of each prompt with the tokens that
vLLM chose. A token is equal if transformers chooses it, too, so that where all are equal both generate the same. Where
one is not, its logit must be close to the highest. At every position all logits are compared, in standard deviations
of the logits of that position.

vLLM and transformers add floats in other orders, of norms, rotary embeddings and residual sums. A last bit that differs
is a step where activations are quantized: with uint8 1/255 of a row, from which on logits of a random model differ in
the first digit, and one token in a hundred. So in float32 activations are int16, whose steps are 1/65024: what then
differs is a fault. In bfloat16, with uint8, steps are the rule. How much both libraries differ without this one is in
the rows "float".

A rank quantizes rows of its part of the inputs of some layers, so two ranks compute other numbers than one process.
They are compared with both: with one process, and with layers of transformers that are cut in the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import torch
from tiny import FORMATS, Served, cut
from transformers import AutoTokenizer

from pyda8w4.torch import DA8W4Experts, DA8W4Linear

# Of weights whose inputs are permuted over the borders of ranks.
REFUSED = "perm keeps inputs apart"
TOKENS = 32
PROMPTS = [
    "The quick brown fox jumps over the lazy dog; 0123456789.",
    "Hi",
    "Eine Zeile mit Umlauten: äöü, und eine zweite.\n" * 2,
    "tensor parallel ranks",
]


class Case(NamedTuple):
    format: str
    mode: str
    ranks: int
    dtype: str

    def __str__(self) -> str:
        return "-".join(map(str, self))

    @property
    def act(self) -> str:
        return "int16" if self.dtype == "float32" else "uint8"


class Comparison(NamedTuple):
    equal: int  # tokens
    margin: float  # the most by which the logit of another token is higher
    usual: float  # what logits differ by: the most of a position, at the median of positions
    most: float  # and at any position


# Above these, something else than rounding differs: of floats, of int16 in other rows, and of uint8.
SAME = Comparison(equal=0, margin=2e-3, usual=1e-3, most=5e-3)
CLOSE = Comparison(equal=0, margin=1e-2, usual=2e-3, most=1e-2)
ROUNDED = Comparison(equal=0, margin=0.5, usual=0.25, most=1)


def compare(model: Any, answer: dict[str, Any]) -> Comparison:
    equal, margin, errors = 0, 0.0, []
    for prompt, tokens, rows in zip(answer["prompts"], answer["tokens"], answer["logits"]):
        chosen = torch.tensor(tokens)[:, None]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :].float()
        logits, found = (one / one.std(-1, keepdim=True) for one in (logits, torch.tensor(rows)))
        best = logits.max(-1, keepdim=True)
        equal += int((best.indices == chosen).sum())
        margin = max(margin, float((best.values - logits.gather(-1, chosen)).max()))
        errors.append((logits - found).abs().amax(-1))
    all_errors = torch.cat(errors)
    return Comparison(equal, margin, float(all_errors.median()), float(all_errors.max()))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    found: dict[str, Served] = {}

    def model(name: str) -> Served:
        if name not in found:
            torch.manual_seed(0)
            found[name] = FORMATS[name](tmp_path_factory.mktemp("model"))
        return found[name]

    return model


# What CI runs; --matrix runs all.
SELECTED = [
    *(
        Case(format, "eager", 1, "float32")
        for format in (
            "GPTQ act-order, asymmetric", "AWQ Qwen2, tied", "auto-round", "compressed-tensors W4A8", "packed, tied",
            "on load", "GGUF Q4_K_M", "packed Qwen3-MoE",
        )
    ),
    Case("compressed-tensors W4A16 symmetric", "eager", 2, "float32"),
    Case("GPTQ Qwen2", "compiled", 1, "bfloat16"),
]  # fmt: skip
CASES = [
    pytest.param(case, id=str(case), marks=() if case in SELECTED else pytest.mark.matrix)
    for case in itertools.starmap(
        Case, itertools.product(FORMATS, ("eager", "compiled"), (1, 2), ("float32", "bfloat16"))
    )
]


@pytest.fixture
def answer(models: Any, engine: Any, tokenizer: Path) -> Callable[..., dict[str, Any]]:
    """What vLLM says to the prompts, by a case and more options."""

    def ask(case: Case, **more: Any) -> dict[str, Any]:
        served = models(case.format)
        ours = {**served.options.get("additional_config", {}).get("pyda8w4", {}), "act": case.act}
        options = {
            "dtype": case.dtype, "enforce_eager": case.mode == "eager", "tensor_parallel_size": case.ranks,
            "tokenizer": str(tokenizer), **served.options, "additional_config": {"pyda8w4": ours}, **more,
        }  # fmt: skip
        found = engine.generate({"model": str(served.path), "options": options, "prompts": PROMPTS, "tokens": TOKENS})
        assert found["prompts"] == [AutoTokenizer.from_pretrained(tokenizer)(prompt).input_ids for prompt in PROMPTS]
        assert [len(tokens) for tokens in found["tokens"]] == [TOKENS] * len(PROMPTS)
        return found

    return ask


@pytest.fixture
def reference(models: Any) -> Callable[[Case], Any]:
    """The model of transformers."""

    def load(case: Case) -> Any:
        model = models(case.format).reference(getattr(torch, case.dtype)).eval()
        for layer in model.modules():
            if isinstance(layer, (DA8W4Linear, DA8W4Experts)):
                layer.act = case.act
        return model

    return load


def check(comparison: Comparison, bound: Comparison) -> None:
    assert all(one <= limit for one, limit in zip(comparison[1:], bound[1:])), (comparison, bound)


@pytest.mark.parametrize("case", CASES)
def test_tokens(case: Case, answer: Any, reference: Any, record_property: Any) -> None:
    if "act-order" in case.format and case.ranks > 1:
        with pytest.raises(RuntimeError, match=REFUSED):
            answer(case)
        return
    found, model = answer(case), reference(case)
    comparisons = [compare(model, found)]
    if case.ranks > 1:
        cut(model, case.ranks)
        comparisons.append(compare(model, found))
    record_property("serving", (case, TOKENS * len(PROMPTS), comparisons))
    bounds = (SAME, CLOSE) if case.dtype == "float32" else (ROUNDED, ROUNDED)
    for comparison, bound in zip(reversed(comparisons), bounds):
        check(comparison, bound)


@pytest.mark.matrix
@pytest.mark.parametrize("format", ["GPTQ Mixtral", "packed Qwen3-MoE"])
def test_each_rank_has_some_of_the_experts(format: str, answer: Any, reference: Any) -> None:
    case = Case(format, "eager", 2, "float32")
    check(compare(reference(case), answer(case, enable_expert_parallel=True)), CLOSE)
