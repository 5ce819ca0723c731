"""AutoRound: the tensors of GPTQ or AWQ, with a config of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pyda8w4._checks import one_of
from pyda8w4._safetensors import Tensor
from pyda8w4.formats import _config, awq, gptq
from pyda8w4.formats._layer import Layer
from pyda8w4.formats._parts import Parts, modules

_METHOD = "AutoRound"

# The packing formats, and which checkpoint format of GPTQ has such tensors: that is, whether zero points are stored
# less one. AutoRound's export.py writes symmetric ones as auto_gptq whatever backend is wanted, and keeps its name.
_GPTQ = {
    "auto": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:exllamav2": "gptq_v2",
    "auto_round:tritonv2": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:gptq": "gptq",
    "auto_round:gptq:exllamav2": "gptq",
    "auto_round:auto_gptq": "gptq",
    "auto_round:auto_gptq:exllamav2": "gptq",
    "auto_round:auto_gptq:tritonv2": "gptq",
}
_AWQ = ("auto_round:awq", "auto_round:auto_awq")

# All that a module may have, its words first.
_PARTS = (
    *("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
    *("qweight", "qzeros", "scales", "g_idx", "act_scales", "w_bf16_to_fp8_scale"),
)


def layers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Layer]:
    """Find the layers of a checkpoint.

    Parameters
    ----------
    config : dict
        What config.json has as quantization_config.
    tensors : dict of str to Tensor
        All of the checkpoint.

    Returns
    -------
    dict of str to Layer
        By the path of the module.

    Raises
    ------
    ValueError
        If the config makes no sense: names the key.

    Notes
    -----
    AutoRound's export_to_autoround/export.py and inference/convert_model.py have the definition.
    """
    gptq.scheme_of(config)
    rules = _config.rules(config, "extra_config")
    patterns = [(pattern, rule) for key, rule in rules.items() if (pattern := _pattern(key)) is not None]
    found = {}
    for name in (*modules(tensors, ".qweight"), *modules(tensors, ".weight_packed")):
        rule = rules.get(name)
        if rule is None:
            rule = next((rule for pattern, rule in patterns if pattern.search(name)), {})
        given = {key: value for key, value in rule.items() if value is not None}
        found[name] = _layer(name, tensors, {**config, **given})
    return found


def _pattern(key: str) -> re.Pattern[str] | None:
    """Keys are names or patterns. AutoRound passes over what is none."""
    try:
        return re.compile(key)
    except (re.error, RecursionError, OverflowError):
        return None


def _layer(name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Layer:
    scheme = gptq.scheme_of({**config, "checkpoint_format": "gptq"})
    data_type = _config.word(config, "data_type", default="int")
    # The first releases had it in "backend", which may be another where there is both.
    packing = _config.word(config, "packing_format", default="") or _config.word(config, "backend", default="auto")
    refusal = scheme.refusal
    if data_type != "int":
        refusal = f"data_type must be int, got {data_type}"
    elif f"{name}.qweight" not in tensors:
        refusal = f"{name}.qweight is missing"
    elif _config.integer(config, "act_bits", default=16) <= 8:
        refusal = f"act_bits must be 16, got {config['act_bits']}: such layers have tensors that are not read"
    elif packing not in _GPTQ and packing not in _AWQ:
        refusal = f"packing_format must be {one_of((*_GPTQ, *_AWQ))}, got {packing}"
    for key in ("rotation_config", "spinquant_config"):
        if config.get(key):
            refusal = f"{key} changes its inputs"
    if refusal is not None:
        parts = Parts(tensors, f"{name}.", _PARTS)
        # That of the words: what they stand for is not known.
        shape = parts.take("weight_packed" if "weight_packed" in parts else "qweight").shape
        return parts.layer(f"{_METHOD} {data_type} {scheme.bits}-bit", shape, refusal=refusal)
    if packing in _AWQ:
        of_awq = awq.Scheme(scheme.bits, scheme.group_size, has_zeros=not scheme.sym, version="gemm")
        return awq.layer(name, tensors, of_awq, _METHOD)
    return gptq.layer(name, tensors, scheme._replace(checkpoint_format=_GPTQ[packing]), _METHOD)
