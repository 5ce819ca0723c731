"""Folders of Hugging Face as models of transformers."""

from __future__ import annotations

from typing import Any

from pyda8w4.checkpoints import Checkpoint
from pyda8w4.torch._parts import Part, Recipe, config_of, is_quantized
from pyda8w4.torch._tensors import FLOATS

_QUANTIZATION = ("quantization_config", "quantization")
_GENERATION = "generation_config"


def recipe(checkpoint: Checkpoint) -> Recipe:
    """Of a folder, or what was converted from one. ValueError for what transformers has no class for."""
    import transformers

    values = _without_quantization(checkpoint.metadata)
    kind = values.get("model_type")
    if type(kind) is not str or kind not in transformers.CONFIG_MAPPING:
        raise ValueError(f"{checkpoint.path}: model_type must be one that transformers knows, got {kind!r}")
    names = values.get("architectures")
    model: Any = (
        getattr(transformers, names[0], None) if type(names) is list and names and type(names[0]) is str else None
    )
    if not isinstance(model, type) or not issubclass(model, transformers.PreTrainedModel):
        raise ValueError(f"{checkpoint.path}: architectures must begin with a model of transformers, got {names!r}")
    config = config_of(checkpoint, transformers.CONFIG_MAPPING[kind], values)
    if not isinstance(config, getattr(model, "config_class", None) or object):
        raise ValueError(f"{checkpoint.path}: architectures must be of the model_type {kind}, got {names}")
    if (dtype := getattr(config, "dtype", None)) not in (None, *FLOATS):
        raise ValueError(f"{checkpoint.path}: dtype must be float32, bfloat16 or float16, got {dtype}")
    generation = None
    if _GENERATION in checkpoint.metadata:
        generation = config_of(checkpoint, transformers.GenerationConfig, checkpoint.metadata[_GENERATION])
    return Recipe(model, config, parts_of(checkpoint), generation)


def parts_of(checkpoint: Checkpoint) -> dict[str, Part]:
    """All that it has: quantized matrices have the names of their modules."""
    return {f"{name}.weight" if is_quantized(checkpoint, name) else name: Part(name) for name in checkpoint.types}


def _without_quantization(values: dict[str, Any]) -> dict[str, Any]:
    """A config of the float model: layers are quantized, but not as transformers would read them."""
    kept = {key: value for key, value in values.items() if key not in (*_QUANTIZATION, _GENERATION)}
    if type(kept.get("text_config")) is dict:
        kept["text_config"] = _without_quantization(kept["text_config"])
    return kept
