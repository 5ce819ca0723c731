"""Loading: what vLLM's models are given of a checkpoint."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig, get_current_vllm_config
from vllm.model_executor import model_loader
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

import pyda8w4.checkpoints
from pyda8w4._packed import PackedWeight
from pyda8w4.checkpoints import Checkpoint
from pyda8w4.torch._checkpoint import recipe_of
from pyda8w4.torch._folder import parts_of
from pyda8w4.torch._parts import Floats, Part, is_quantized, packed_part
from pyda8w4.vllm._config import ServingConfig
from pyda8w4.vllm._options import Options
from pyda8w4.vllm._stored import Source, Stored

# Those that read safetensors files of a folder; vLLM has others for other places.
FORMATS = ("auto", "hf", "safetensors")


class Loader(DefaultModelLoader):
    """Gives models the weights of quantized checkpoints as `Stored`, under the names of float weights.

    So vLLM's models decide where each belongs, whatever the format. Checkpoints of others, and float ones, are loaded
    as by vLLM.
    """

    _config: object = None

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Make a model and load it.

        Parameters
        ----------
        vllm_config : VllmConfig
            Has the config of its quantization.
        model_config : ModelConfig
            Says where it is.
        prefix : str
            Of names in the model.

        Returns
        -------
        torch.nn.Module
            The model.
        """
        self._config = vllm_config.quant_config
        model = super().load_model(vllm_config, model_config, prefix)
        if isinstance(self._config, ServingConfig) and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
            trim(0)  # What packing took for a while, glibc keeps otherwise: of 400 M floats that were 300 MB.
        return model

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Give all tensors of a checkpoint.

        Parameters
        ----------
        model_config : ModelConfig
            Says where it is.
        model : torch.nn.Module
            What will be loaded.

        Yields
        ------
        name : str
            As in the checkpoint of a float model.
        tensor : torch.Tensor
            Floats, or a `Stored`.
        """
        if not isinstance(self._config, ServingConfig) or self._config.checkpoint is None:
            yield from super().get_all_weights(model_config, model)
            return
        file = self._config.checkpoint.get("checkpoint")
        path = file or self._prepare_weights(model_config.model, None, model_config.revision, False, None)[0]
        checkpoint = pyda8w4.checkpoints.open(path)
        parts = recipe_of(checkpoint).parts if file else parts_of(checkpoint)
        options = Options.of(get_current_vllm_config().additional_config)
        self.counter_before_loading_weights = time.perf_counter()
        names = ExpertNames(model)
        for key, part in parts.items():
            name = names(key)
            if not is_quantized(checkpoint, part.name):
                yield name, Floats(checkpoint, part)[...]
                continue
            stored = Stored.of(_source(checkpoint, part, options), model_config.dtype)
            yield from names.of_stack(name, stored) if stored.dim() == 3 else [(name, stored)]


class ExpertNames:
    """What a model of vLLM calls experts, and the module that they are in, where transformers has stacks in "mlp".

    Parameters
    ----------
    model : torch.nn.Module
        Of vLLM.
    """

    def __init__(self, model: nn.Module) -> None:
        first = next((module for module in model.modules() if isinstance(module, RoutedExperts)), None)
        self._place = "mlp"
        self._projections = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
        if first is not None:
            self._place = first.layer_name.split(".")[-2]
            given = (first.ckpt_gate_proj_name, first.ckpt_up_proj_name, first.ckpt_down_proj_name)
            self._projections = dict(zip(self._projections, given))

    def __call__(self, name: str) -> str:
        """Rename a tensor."""
        return name if self._place == "mlp" else name.replace(".mlp.", f".{self._place}.")

    def of_stack(self, name: str, stack: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Give the matrices of a stack one by one, gates and ups apart."""
        place, _, projection = name.removesuffix(".weight").rpartition(".")
        projection = {"gate_up": "gate_up_proj", "down": "down_proj"}.get(projection, projection)
        for expert, matrix in enumerate(stack.unbind()):
            parts = {projection: matrix}
            if projection == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2)))
            for one, part in parts.items():
                yield f"{place}.{expert}.{self._projections.get(one, one)}.weight", part


def _source(checkpoint: Checkpoint, part: Part, options: Options) -> Source:
    shape, rows = checkpoint.shapes[part.name], part.rows
    if rows is not None:
        shape = (len(np.arange(shape[0])[rows]), *shape[1:])

    def packed(index: int) -> PackedWeight:
        return packed_part(checkpoint, part, options.requantize, index if len(shape) == 3 else None)

    def floats() -> npt.NDArray[np.float32]:
        array = checkpoint.array(part.name)
        return array if rows is None else np.ascontiguousarray(array[rows])

    return Source(part.name, shape, packed, floats)


def register() -> None:
    """Put it in the place of vLLM's. Again does nothing else."""
    for format in FORMATS:
        if model_loader._LOAD_FORMAT_TO_MODEL_LOADER[format] is DefaultModelLoader:
            model_loader._LOAD_FORMAT_TO_MODEL_LOADER[format] = Loader
