"""Folders as Hugging Face has them: config.json, and safetensors files in one or several parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4._filesystem import map_file
from pyda8w4._foreign import instead_of_safetensors, missing_config
from pyda8w4._safetensors import Tensor, read_file
from pyda8w4.checkpoints import _state
from pyda8w4.checkpoints._checkpoint import Checkpoint
from pyda8w4.formats import _auto_round, awq, bitsandbytes, compressed_tensors, gptq, hqq, mlx, mxfp4, torchao
from pyda8w4.formats._layer import Layer, plain_layer

_INDEX = "model.safetensors.index.json"
_GENERATION = "generation_config.json"

# How the tensors end that hold codes, of which some layer must be found.
_CODES = (".qweight", ".weight_packed", ".W_q", ".weight")

# What finds the quantized layers of a checkpoint, by the name of the method in its config: of the config, the tensors
# and the metadata of the files.
_Finder = Callable[[dict[str, Any], Mapping[str, Tensor], dict[str, str]], dict[str, Layer]]


def _of_tensors(layers: Callable[[dict[str, Any], Mapping[str, Tensor]], dict[str, Layer]]) -> _Finder:
    return lambda config, tensors, metadata: layers(config, tensors)


_METHODS: dict[str, _Finder] = {
    "auto-round": _of_tensors(_auto_round.layers),
    "awq": _of_tensors(awq.layers),
    "bitsandbytes": _of_tensors(bitsandbytes.layers),
    "compressed-tensors": _of_tensors(compressed_tensors.layers),
    "gptq": _of_tensors(gptq.layers),
    "hqq": _of_tensors(hqq.layers),
    "intel/auto-round": _of_tensors(_auto_round.layers),
    "metal": _of_tensors(mlx.layers),
    "mlx": _of_tensors(mlx.layers),
    "mxfp4": _of_tensors(mxfp4.layers),
    "pyda8w4": _of_tensors(_state.layers),
    "torchao": torchao.layers,
}


def read(path: Path) -> Checkpoint:
    """Open a folder."""
    if not (path / "config.json").exists():
        raise missing_config(path)
    config = _json(path / "config.json")
    metadata, tensors, mapped = _tensors(path)
    quantization = _quantization(path, config)
    layers: dict[str, Layer] = {}
    if quantization is not None:
        method, says = quantization
        if method not in _METHODS:
            raise ValueError(f"{path}: its quant_method must be one of {', '.join(sorted(_METHODS))}, got {method!r}")
        try:
            layers |= _METHODS[method](says, tensors, metadata)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    taken = {name for layer in layers.values() for name in layer.tensors}
    for name, tensor in tensors.items():
        if name not in taken:
            if name in layers:
                raise ValueError(f"{path}: {name} is a tensor and a quantized layer")
            if name.endswith(_CODES) and not tensor.is_float and len(tensor.shape) > 1:
                raise ValueError(
                    f"{path}: {name} of {tensor.dtype} must be of a quantized layer, but the config "
                    + ("says nothing of that" if quantization is None else f"has quant_method {quantization[0]}")
                )
            layers[name] = plain_layer(tensor)
    if (path / _GENERATION).exists():
        config["generation_config"] = _json(path / _GENERATION)
    return Checkpoint(path, config, layers, mapped)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(map_file(path).tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON file: {error}") from None
    if type(found) is not dict:
        raise ValueError(f"{path} must have a JSON object, got {type(found).__name__}")
    return found


# ---- its tensors -----------------------------------------------------------------------------


def _tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor], list[npt.NDArray[np.uint8]]]:
    """Metadata and tensors of all parts, and these parts, mapped."""
    whole, index = path / "model.safetensors", path / _INDEX
    places: dict[str, str] = {}
    if whole.exists():
        # As transformers, which takes nothing else then: an index may be of before, other files may be adapters.
        files = [whole]
    elif index.exists():
        places = _places(index)
        files = [path / name for name in dict.fromkeys(places.values())]
    else:
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{path} must have safetensors files, got {instead_of_safetensors(path)}")
    mapped = [map_file(file) for file in files]
    metadata: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for file, data in zip(files, mapped):
        try:
            of_file, found = read_file(file, data)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file} has a damaged header: {error!r}") from None
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        for name, tensor in found.items():
            if name in tensors:
                raise ValueError(f"{file}: {name} is in {tensors[name].file.name}, too")
            tensors[name] = tensor
        metadata |= of_file
    for name, part in places.items():
        if name not in tensors or tensors[name].file.name != part:
            raise ValueError(f"{path / part}: it has no tensor {name}, which {_INDEX} says")
    return metadata, tensors, mapped


def _places(index: Path) -> dict[str, str]:
    """Names of tensors, and of the files that have them: these lie beside the index."""
    places = _json(index).get("weight_map")
    if type(places) is not dict or not places:
        raise ValueError(f"{index}: weight_map must map tensors to files, got {str(places)[:80]!r}")
    for name, part in places.items():
        if type(part) is not str or not part.endswith(".safetensors") or Path(part).name != part or "\0" in part:
            raise ValueError(f"{index}: {name} must be in a safetensors file of the same folder, got {part!r}")
    return places


# ---- its quantization ------------------------------------------------------------------------


def _quantization(path: Path, config: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The method and what is said of it, in config.json or in the file that some methods write beside it."""
    text = config.get("text_config")
    for where in (config, text if type(text) is dict else {}):
        found = {key: where[key] for key in ("quantization_config", "quantization") if where.get(key) is not None}
        for key, says in found.items():
            if type(says) is not dict:
                raise ValueError(f"{path / 'config.json'}: {key} must be an object, got {says!r}")
        says = found.get("quantization_config", {})
        if "quant_method" in says:
            return str(says["quant_method"]), says
        if "quantization" in found:  # MLX writes this, and a copy under the other name
            return "mlx", found["quantization"]
        if says:
            raise ValueError(
                f"{path / 'config.json'}: quantization_config must have quant_method, got {', '.join(says)}"
            )
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (path / name).exists():
            says = _json(path / name)
            return str(says.get("quant_method", method)), says
    return None
