"""What vLLM asks about the quantization of a model: whether it is ours, and what serves each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from pyda8w4.vllm._embedding import EmbeddingMethod
from pyda8w4.vllm._experts import ExpertsMethod
from pyda8w4.vllm._linear import LinearMethod
from pyda8w4.vllm._options import Options

logger = init_logger(__name__)

NAME = "pyda8w4"

# Methods whose checkpoints are taken where nobody asks for another kernel, if their weights have 4 bits.
_TAKEN = ("gptq", "awq", "auto-round", "intel/auto-round", "compressed-tensors")


class ServingConfig(QuantizationConfig):
    """How a model is quantized.

    Parameters
    ----------
    checkpoint : mapping, optional
        What its config.json says of its quantization; nothing of a float model, which is quantized as it is loaded.
    """

    def __init__(self, checkpoint: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.checkpoint = checkpoint

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Say whether a quantized checkpoint is to be served by this library.

        Parameters
        ----------
        hf_quant_cfg : dict
            The quantization_config of its config.json.
        user_quant : str or None
            What ``--quantization`` says.
        hf_config : object, optional
            All of its config.json.

        Returns
        -------
        str or None
            The name of this config, or None.
        """
        if user_quant == NAME or (user_quant is None and _is_taken(hf_quant_cfg)):
            return NAME
        return None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ServingConfig:
        """Make one of what config.json says.

        Parameters
        ----------
        config : dict
            Its quantization_config; empty of a float model.

        Returns
        -------
        ServingConfig
            For the model.
        """
        return cls(config or None)

    def get_name(self) -> Any:
        """Return its name.

        Returns
        -------
        str
            As ``--quantization`` takes it.
        """
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return what layers multiply.

        Returns
        -------
        list of torch.dtype
            Types of activations.
        """
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return what GPU is needed.

        Returns
        -------
        int
            Less than any has.
        """
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return files that are read where config.json says nothing.

        Returns
        -------
        list of str
            None: such a model is float.
        """
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return what serves a layer.

        Parameters
        ----------
        layer : torch.nn.Module
            While it is made.
        prefix : str
            Its name in the model.

        Returns
        -------
        QuantizeMethodBase or None
            None of layers that hold no weights which could be packed, and of embeddings and heads of float models.
        """
        options = Options.of(get_current_vllm_config().additional_config)
        floats = self.checkpoint is None
        if isinstance(layer, LinearBase):
            return LinearMethod(options, prefix, floats and not options.keeps(prefix))
        if isinstance(layer, RoutedExperts):
            if ExpertsMethod.takes(layer.moe_config):
                return ExpertsMethod(options, prefix, layer.moe_config, floats)
            logger.warning("%s stays float: pyda8w4 has no %s", prefix, layer.moe_config.activation)
        if isinstance(layer, VocabParallelEmbedding) and not floats:
            return EmbeddingMethod(options, prefix)
        return None


def _is_taken(config: Mapping[str, Any]) -> bool:
    method = config.get("quant_method")
    if method == "compressed-tensors":
        groups = config.get("config_groups") or {}
        weights = [group.get("weights") or {} for group in groups.values()]
        return bool(weights) and all((one.get("num_bits"), one.get("type")) == (4, "int") for one in weights)
    return method == NAME or (method in _TAKEN and config.get("bits", config.get("w_bit")) == 4)


def register() -> None:
    """Make the config known. Again does nothing else."""
    register_quantization_config(NAME)(ServingConfig)
