"""What users set, and which checkpoints are taken without a word."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

from pyda8w4.vllm._options import Options


def test_options() -> None:
    assert Options.of({}) == Options.of({"pyda8w4": {}}) == Options()
    given = {"act": "int16", "group_size": 64, "modules_to_not_convert": ["o_proj"]}
    options = Options.of({"other": 1, "pyda8w4": given})
    assert (options.act, options.group_size, options.modules_to_not_convert) == ("int16", 64, ("o_proj",))
    assert options.keeps("model.layers.0.self_attn.o_proj") and not options.keeps("model.layers.0.self_attn.qkv_proj")
    assert options.keeps("model.layers.0.mlp.gate") and not options.keeps("model.layers.0.mlp.gate_up_proj")


@pytest.mark.parametrize(
    "given, error, message",
    [
        (3, TypeError, "must be an object, got 3"),
        ({"acts": "int8"}, ValueError, "must have some of act, .*, got 'acts'"),
        ({"act": "int4"}, ValueError, "act of .* must be 'uint8', .*, got 'int4'"),
        ({"act": 8}, TypeError, "act of .* must be .*'int16', got int"),
        ({"group_size": 30}, ValueError, "group_size of .* must be a multiple of 4, got 30"),
        ({"group_size": True}, ValueError, "group_size of .* must be a multiple of 4, got True"),
        ({"two_level": 1}, TypeError, ": two_level must be a bool, got int"),
        ({"zeros": "both"}, ValueError, ": zeros must be .*, got 'both'"),
        ({"requantize": "yes"}, TypeError, "requantize of .* must be a bool, got str"),
        ({"modules_to_not_convert": "lm_head"}, TypeError, "modules_to_not_convert of .* must be a list of names"),
        ({"modules_to_not_convert": [1]}, TypeError, "modules_to_not_convert of .* must be a list of names"),
    ],
)
def test_bad_options(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Options.of({"pyda8w4": given})


_W4 = {"num_bits": 4, "type": "int"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports
@pytest.mark.parametrize(
    "config, taken",
    [
        ({"quant_method": "gptq", "bits": 4}, True),
        ({"quant_method": "gptq", "bits": 8}, False),
        ({"quant_method": "awq", "bits": 4}, True),
        ({"quant_method": "awq", "w_bit": 4}, True),
        ({"quant_method": "auto-round", "bits": 4}, True),
        ({"quant_method": "intel/auto-round", "bits": 4}, True),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": _W4}}}, True),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, False),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": _W4}, "b": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            False,
        ),
        ({"quant_method": "compressed-tensors"}, False),
        ({"quant_method": "pyda8w4"}, True),
        ({"quant_method": "fp8"}, False),
        ({"quant_method": "bitsandbytes", "bits": 4}, False),
    ],
)
def test_what_is_taken(config: dict[str, Any], taken: bool) -> None:
    pytest.importorskip("vllm")
    from pyda8w4.vllm._config import ServingConfig

    assert ServingConfig.override_quantization_method(config, None) == ("pyda8w4" if taken else None)
    assert ServingConfig.override_quantization_method(config, "pyda8w4") == "pyda8w4"
    assert ServingConfig.override_quantization_method(config, "gptq") is None
