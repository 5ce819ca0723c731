"""Folders of Hugging Face as models of transformers."""

from __future__ import annotations

from typing import Any

from pyda8w4.checkpoints import Checkpoint
from pyda8w4.torch._parts import Part, Recipe, config_of, is_quantized

_QUANTIZATION = ("quantization_config", "quantization")


def recipe(checkpoint: Checkpoint) -> Recipe:
    """Of a folder, or what was converted from one. ValueError for what transformers has no class for."""
    import transformers

    values = _without_quantization(checkpoint.metadata)
    kind = values.get("model_type")
    if type(kind) is not str or kind not in transformers.CONFIG_MAPPING:
        raise ValueError(f"{checkpoint.path}: model_type must be one that transformers knows, got {kind!r}")
    names = values.get("architectures")
    model = getattr(transformers, names[0], None) if type(names) is list and names and type(names[0]) is str else None
    if not isinstance(model, type) or not issubclass(model, transformers.PreTrainedModel):
        raise ValueError(f"{checkpoint.path}: architectures must begin with a model of transformers, got {names!r}")
    config = config_of(checkpoint, transformers.CONFIG_MAPPING[kind], values)
    # Quantized matrices have the names of their modules.
    parts = {f"{name}.weight" if is_quantized(checkpoint, name) else name: Part(name) for name in checkpoint.types}
    generation = None
    if (checkpoint.path / "generation_config.json").exists():
        generation = transformers.GenerationConfig.from_pretrained(checkpoint.path)
    return Recipe(model, config, parts, generation)


def _without_quantization(values: dict[str, Any]) -> dict[str, Any]:
    """A config of the float model: layers are quantized, but not as transformers would read them."""
    kept = {key: value for key, value in values.items() if key not in _QUANTIZATION}
    if type(kept.get("text_config")) is dict:
        kept["text_config"] = _without_quantization(kept["text_config"])
    return kept
