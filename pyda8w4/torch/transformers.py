"""A quantization config for transformers: models are quantized as they are loaded, saved, and loaded again.

Importing this module registers it. Needs transformers 5 or later.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from pyda8w4._checks import check_flag
from pyda8w4._format import Format, check_group_size
from pyda8w4.torch._fuse import FusedPart
from pyda8w4.torch._module import DA8W4Linear
from pyda8w4.torch._quantize import quantize_
from pyda8w4.torch._state import zeros_of

__all__ = ["DA8W4Config"]

METHOD = "pyda8w4"


@register_quantization_config(METHOD)
class DA8W4Config(QuantizationConfigMixin):
    """How `from_pretrained` quantizes a model with `pyda8w4.torch.quantize_`.

    Parameters
    ----------
    group_size : int
        Weights that share a scale: a multiple of 4.
    symmetric_activation, symmetric_weight : bool
        See `pyda8w4.torch.quantize_`.
    modules_to_not_convert : list of str, optional
        Parts of names of layers to keep. None means the output head and what is tied to it.
    modules : dict, optional
        Written by transformers when a quantized model is saved: its layers.
    quant_method : str
        Written by transformers, too: ``"pyda8w4"``.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If `group_size` is out of range.

    Examples
    --------
    >>> from pyda8w4.torch.transformers import DA8W4Config
    >>> config = DA8W4Config(group_size=32)

    ``AutoModelForCausalLM.from_pretrained(path, quantization_config=config)`` quantizes. What ``save_pretrained``
    then writes, ``from_pretrained`` loads, once this module is imported.
    """

    def __init__(
        self,
        group_size: int = 128,
        symmetric_activation: bool = False,
        symmetric_weight: bool = False,
        modules_to_not_convert: list[str] | None = None,
        modules: dict[str, dict[str, Any]] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        check_group_size(group_size, 1 << 31)
        self.quant_method: Any = quant_method
        self.group_size = group_size
        self.symmetric_activation = check_flag("symmetric_activation", symmetric_activation)
        self.symmetric_weight = check_flag("symmetric_weight", symmetric_weight)
        self.modules_to_not_convert = modules_to_not_convert
        self.modules = modules


@register_quantizer(METHOD)
class _Quantizer(HfQuantizer):
    quantization_config: DA8W4Config
    is_trainable = False
    is_compileable = True

    def is_serializable(self, **options: Any) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, Any]]:
        if any(isinstance(module, FusedPart) for module in model.modules()):
            raise ValueError("model must be saved before fuse_linears; what is loaded again can be joined again")
        return None, {}

    def _process_model_before_weight_loading(self, model: nn.Module, **options: Any) -> None:
        """Puts empty layers where the file has packed ones."""
        for name, fields in (self.quantization_config.modules or {}).items():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            n, k = linear.weight.shape
            layer = DA8W4Linear(
                k,
                n,
                linear.bias is not None,
                group_size=fields["group_size"],
                symmetric_activation=self.quantization_config.symmetric_activation,
                device="meta",
            )
            zero_point = None if fields["zps"] else 0
            format = Format(n, k, layer.group_size, fields["scales"], zero_point, has_offsets=False)
            layer._buffers.update(zeros_of(format, "meta"))
            model.set_submodule(name, layer)

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        config = self.quantization_config
        if not self.pre_quantized:
            kept = self.get_modules_to_not_convert(model, config.modules_to_not_convert)
            quantize_(
                model,
                config.group_size,
                config.symmetric_activation,
                config.symmetric_weight,
                lambda module, name: should_convert_module(name, kept),
            )
            layers = {name: module for name, module in model.named_modules() if isinstance(module, DA8W4Linear)}
            config.modules = {
                name: {
                    "group_size": layer.group_size,
                    "scales": str(layer.scales.dtype).removeprefix("torch."),
                    "zps": layer.zps.dim() > 0,
                }
                for name, layer in layers.items()
            }
        return model
