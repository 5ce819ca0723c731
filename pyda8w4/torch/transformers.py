"""A quantization config for transformers: models are quantized as they are loaded, saved, and loaded again.

Importing this module registers it. Needs transformers 5 or later.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import fields
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from pyda8w4._checks import SCHEMES, check_flag, check_scheme
from pyda8w4._format import ARRAYS, Format, check_group_size
from pyda8w4._layout import TYPED, format_from
from pyda8w4._packed_file import TYPES
from pyda8w4._quantize import Rounding
from pyda8w4.torch._act import set_act
from pyda8w4.torch._embedding import DA8W4Embedding
from pyda8w4.torch._experts import STACKS, empty_experts
from pyda8w4.torch._filling import Filling, check_sizes, scale_of, tied_layer
from pyda8w4.torch._float_experts import is_experts
from pyda8w4.torch._fuse import FusedPart
from pyda8w4.torch._gated import GatedMLP
from pyda8w4.torch._layer import PackedLayer
from pyda8w4.torch._module import DA8W4Linear
from pyda8w4.torch._names import Names, Transforms
from pyda8w4.torch._quantize import chooser, is_linear, replace_layers
from pyda8w4.torch._state import zeros_of

__all__ = ["DA8W4Config"]

METHOD = "pyda8w4"

# A module that is reloaded registers its new classes.
AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
AUTO_QUANTIZER_MAPPING.pop(METHOD, None)


@register_quantization_config(METHOD)
class DA8W4Config(QuantizationConfigMixin):
    """How `from_pretrained` quantizes a model with `pyda8w4.torch.quantize_`.

    Parameters
    ----------
    group_size : int
        Weights that share a scale: a multiple of 4.
    act : {'uint8', 'int8', 'int8_group', 'int16'}
        See `pyda8w4.torch.quantize_`.
    token_act : str, optional
        See `pyda8w4.torch.set_act`: the scheme of tokens that come one by one. Set when a model is loaded.
    method : {'search', 'minmax'}
        See `pyda8w4.quantize_weight`.
    zeros : {'float', 'integer', 'none'}
        See there.
    two_level : bool
        See there.
    rotate : int
        See there.
    modules_to_not_convert : list of str, optional
        Parts of names of layers to keep. None means the output head and what is tied to it.
    modules : dict, optional
        Not used. Earlier versions wrote it; now the file of the weights says which layers are packed.
    quant_method : str
        Written by transformers, too: ``"pyda8w4"``.
    symmetric_activation : bool, optional
        What earlier versions wrote in the place of `act`: True is ``"int8"``, False ``"uint8"``.
    symmetric_weight : bool, optional
        The same in the place of `zeros`: True is ``"none"``, False ``"integer"``.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If `group_size` is out of range, or there is no such `act`.

    Warns
    -----
    UserWarning
        When a model is loaded and more than a tenth of the bytes of its weights that multiply stays float: which
        weights, and why. When a `device_map` is not followed.

    Examples
    --------
    >>> from pyda8w4.torch.transformers import DA8W4Config
    >>> config = DA8W4Config(group_size=32)

    ``AutoModelForCausalLM.from_pretrained(path, quantization_config=config)`` quantizes. What ``save_pretrained``
    then writes, ``from_pretrained`` loads, once this module is imported. Of a checkpoint that is quantized already, in
    GPTQ or any other format, `pyda8w4.torch.from_checkpoint` makes a model: transformers takes no other config than
    the one in its config.json.
    """

    def __init__(
        self,
        group_size: int = 128,
        act: str = "uint8",
        *,
        token_act: str | None = None,
        method: str = "search",
        zeros: str = "float",
        two_level: bool = False,
        rotate: int = 0,
        modules_to_not_convert: list[str] | None = None,
        modules: dict[str, dict[str, Any]] | None = None,
        quant_method: str = METHOD,
        symmetric_activation: bool | None = None,
        symmetric_weight: bool | None = None,
    ) -> None:
        if symmetric_weight is not None:
            zeros = "none" if check_flag("symmetric_weight", symmetric_weight) else "integer"
        rounding = Rounding(check_group_size(group_size), method, zeros, two_level, rotate)
        self.quant_method: Any = quant_method
        self.group_size, self.method = rounding.group_size, rounding.method
        self.zeros, self.two_level, self.rotate = rounding.zeros, rounding.two_level, rounding.rotate
        if symmetric_activation is not None:
            act = "int8" if check_flag("symmetric_activation", symmetric_activation) else "uint8"
        self.act = check_scheme("act", act, tuple(SCHEMES))
        self.token_act = None if token_act is None else check_scheme("token_act", token_act, tuple(SCHEMES))
        self.modules_to_not_convert = modules_to_not_convert

    @property
    def rounding(self) -> Rounding:
        """What it says of float weights."""
        return Rounding(**{field.name: getattr(self, field.name) for field in fields(Rounding)})


_filling: ContextVar[Filling | None] = ContextVar("_filling", default=None)


@contextlib.contextmanager
def filled_by(filling: Filling) -> Iterator[None]:
    """Have `from_pretrained` call `filling` with the empty model.

    Parameters
    ----------
    filling : Filling
        For one call, in this thread.

    Yields
    ------
    None
        While it lasts.
    """
    token = _filling.set(filling)
    try:
        yield
    finally:
        _filling.reset(token)


def set_config(model: nn.Module, config: DA8W4Config) -> None:
    """Let models of transformers that have packed layers be saved with `save_pretrained`.

    Parameters
    ----------
    model : torch.nn.Module
        Such a model, or one that has such inside.
    config : DA8W4Config
        How they were quantized. The configs of parts get it too: a part can be loaded by itself.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            packed = {name for name, layer in module.named_modules() if isinstance(layer, PackedLayer)}
            other = getattr(module, "hf_quantizer", None)
            if packed and (other is None or isinstance(other, _Quantizer)):
                module.__dict__["hf_quantizer"] = _Quantizer(config)
                module.config.quantization_config = config
                _untie(module, packed)


def set_acts(model: nn.Module, act: str, token_act: str | None) -> None:
    """Have `save_pretrained` write these schemes.

    Parameters
    ----------
    model : torch.nn.Module
        Whose layers have them.
    act : str
        See `pyda8w4.torch.set_act`.
    token_act : str, optional
        See there.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            config = getattr(module.config, "quantization_config", None)
            if isinstance(config, DA8W4Config) and (config.act, config.token_act) != (act, token_act):
                config = copy.copy(config)  # the caller's may serve another model
                config.act, config.token_act = act, token_act
                set_config(module, config)


def _keep_names(model: Any) -> None:
    """Have a model saved under the names of its modules where those of its original format do not serve.

    transformers renames tensors as it saves, and joins some, such as q, k and v; it undoes that as it loads. Tensors of
    packed layers cannot be joined, and some of their names do not come back.
    """
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:  # as transformers does for a model that was not loaded
        transforms = [
            one for one in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(one, PrefixChange)
        ]
    forth, back = Transforms(transforms), Transforms([one.reverse_transform() for one in transforms[::-1]])
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLayer):
            stored, joined = back.rename(f"{name}.codes", reverse=True)
            if joined or forth.rename(stored) != (f"{name}.codes", False):
                model._weight_conversions = []
                return


def _ties(model: Any) -> dict[str, str]:
    """Modules whose weights the class declares to be those of others, where the config wants that."""
    declared = type(model)._tied_weights_keys
    if not isinstance(declared, dict) or not getattr(model.config, "tie_word_embeddings", False):
        return {}
    return {one.removesuffix(".weight"): other.removesuffix(".weight") for one, other in declared.items()}


def _untie(model: Any, packed: set[str]) -> None:
    """Forget ties of packed layers: these have no parameter that could be another's."""
    model.all_tied_weights_keys = {
        one: other
        for one, other in (getattr(model, "all_tied_weights_keys", None) or {}).items()
        if not packed & {one.removesuffix(".weight"), other.removesuffix(".weight")}
    }
    if isinstance(model._tied_weights_keys, dict):  # what `tie_weights` reads: a packed layer has nothing to give
        model._tied_weights_keys = {
            one: other for one, other in model._tied_weights_keys.items() if other.removesuffix(".weight") not in packed
        }


@register_quantizer(METHOD)
class _Quantizer(HfQuantizer):
    quantization_config: DA8W4Config
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: DA8W4Config, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._is_packed = self.pre_quantized or _filling.get() is not None
        self._tied: dict[str, tuple[nn.Module, str]] = {}  # float modules, and which module has their packed weight

    def is_serializable(self, **options: Any) -> bool:
        return True

    def update_device_map(self, device_map: Any) -> Any:
        if self._is_packed or device_map in (None, "cpu", {"": "cpu"}, {"": torch.device("cpu")}):
            return device_map
        if device_map != "auto":
            warnings.warn(
                f"device_map {device_map!r} is not followed while a model is quantized, which needs all of it on the "
                "CPU; save the model, and what is loaded again may be mapped",
                stacklevel=2,
            )
        return {"": "cpu"}

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        if _is_divided(model):
            raise ValueError("model has only the parts of this process: save it where it is whole")
        if any(isinstance(module, (FusedPart, GatedMLP)) for module in model.modules()):
            raise ValueError(
                "model must be saved before fuse_linears and fuse_gated; what is loaded again can be joined again"
            )
        _keep_names(model)
        state = model.state_dict()
        seen: set[int] = set()
        tied = {one: other for one, other in _ties(model).items() if _shares(model, one, other)}
        for name, layer in model.named_modules(remove_duplicate=False):
            for key in layer._buffers if isinstance(layer, PackedLayer) else ():
                tensor = state.get(f"{name}.{key}")
                if tensor is None or tensor.is_meta:
                    continue
                if name in tied:  # what is loaded is tied again
                    del state[f"{name}.{key}"]
                    continue
                if tensor.data_ptr() in seen:  # layers that share a weight: files cannot
                    state[f"{name}.{key}"] = tensor.clone()
                seen.add(tensor.data_ptr())
        return state, {}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **options: Any
    ) -> None:
        """Puts packed layers where the checkpoint has such: empty ones, or what `from_checkpoint` made."""
        _check_divided(model.config)
        if not self._is_packed:
            return
        filling = _filling.get()
        packed, floats = self._empty_layers(model, checkpoint_files) if filling is None else filling(model)
        for one, other in _ties(model).items():
            for name, source in ((one, other), (other, one)):
                if source not in packed or name in packed or f"{name}.weight" in floats:
                    continue
                module = model.get_submodule(name)
                if getattr(module, "bias", None) is None:
                    # It gets its weight after loading: until then it must not seem to miss one.
                    self._tied[name] = module, source
                    empty: Any = nn.Identity()
                    empty.out_features, empty.in_features = module.weight.shape  # which tensor parallelism asks for
                    model.set_submodule(name, empty)
        for name, layer in packed.items():
            model.set_submodule(name, layer)
        _untie(model, {*packed, *self._tied})

    def _empty_layers(self, model: Any, files: Sequence[str] | None) -> tuple[dict[str, nn.Module], set[str]]:
        """Layers to load the packed ones of files into, and the names of all other tensors, as the model has them."""
        own = {
            name: module
            for name, module in model.named_modules(remove_duplicate=False)
            if is_linear(module) or is_experts(module) or isinstance(module, nn.Embedding)
        }
        places = {
            f"{name}.{part}" if part else name: (name, part)
            for name, module in own.items()
            for part in (STACKS if is_experts(module) else ("",))
        }
        found: dict[int, nn.Module] = {}  # by the float module; modules that are one stay one
        stacks: dict[str, dict[str, tuple[Format, bool]]] = {}  # by the name of the mixture of experts
        foreign = []
        name_of = Names(model, [f"{place}.codes" for place in places])
        layers, others = _packed_layers(files)
        for stored, (format, bias) in layers.items():
            name, part = places.get(name_of(f"{stored}.codes").removesuffix(".codes"), ("", ""))
            if part:
                stacks.setdefault(name, {})[part] = format, bias
            elif name in own:
                found[id(own[name])] = self._empty(name, own[name], format, bias)
            else:
                foreign.append(stored)
        for name, parts in stacks.items():
            if len(parts) < len(STACKS):
                raise ValueError(f"{name} must have {' and '.join(STACKS)}, got only {', '.join(parts)}")
            found[id(own[name])] = empty_experts(own[name], name, parts, self.quantization_config.act)
        if foreign and not found and own:
            raise ValueError(
                f"{type(model).__name__} has none of the packed layers of the checkpoint, such as {foreign[0]}: it "
                "would have random weights; load it with the class that it was saved with"
            )
        packed = {name: found[id(module)] for name, module in own.items() if id(module) in found}
        return packed, set(map(name_of, others))

    def _empty(self, name: str, module: nn.Module, format: Format, bias: bool) -> PackedLayer:
        check_sizes(name, module, (format.n, format.k))
        layer: PackedLayer
        dtype: Any = module.weight.dtype
        if isinstance(module, nn.Embedding):
            layer = DA8W4Embedding(format.n, format.k, scale=scale_of(module), device="meta", dtype=dtype)
        else:
            act = self.quantization_config.act
            layer = DA8W4Linear(format.k, format.n, bias, act=act, device="meta", dtype=dtype)
        layer.set_tensors(zeros_of(format, "meta"), dtype)
        return layer

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        config = self.quantization_config
        for name, (module, source) in self._tied.items():
            model.set_submodule(name, tied_layer(module, model.get_submodule(source), config.act))
        parallel = _tensor_parallel(model)
        if self._is_packed and parallel is not None:
            parallel.cut(model)
        elif not self._is_packed:
            unwanted, float32 = config.modules_to_not_convert or [], list(model._keep_in_fp32_modules or [])
            kept = self.get_modules_to_not_convert(model, config.modules_to_not_convert, float32)

            def keep(module: nn.Module, name: str) -> str | None:
                if should_convert_module(name, kept):
                    return None
                if not should_convert_module(name, unwanted):
                    return "modules_to_not_convert"
                if not should_convert_module(name, float32):
                    return f"{type(model).__name__} keeps it in float32"
                return "the output head; modules_to_not_convert=[] includes it"

            how = config.rounding, config.act
            if parallel is None:
                report = replace_layers(model, *how, chooser(model, keep))
            else:
                report = parallel.replace_layers(model, *how, keep)
            if report.float_share > 0.1:
                warnings.warn(f"{type(model).__name__}: {report.summary()}", stacklevel=2)
        self.quantization_config = copy.copy(config)  # the caller's may serve another model
        model.config.quantization_config = self.quantization_config
        set_config(model, self.quantization_config)
        if config.token_act is not None:
            set_act(model, config.act, config.token_act)
        return model


def _check_divided(config: Any) -> None:
    """Raise ValueError where a model is to be divided among processes in another way than by tensor parallelism."""
    for size in ("pp_size", "dp_size", "ep_size"):
        count = getattr(getattr(config, "distributed_config", None), size, 1)
        if count > 1:
            raise ValueError(
                f"distributed_config must have {size} = 1 for packed layers, which take tp_size, got {count}"
            )


def _is_divided(model: Any) -> bool:
    return (getattr(model, "_tp_size", None) or 1) > 1


def _tensor_parallel(model: Any) -> Any:
    """How transformers divides the model; None where one process has it."""
    if not _is_divided(model):
        return None
    if not hasattr(model, "_mesh_manager"):
        raise ValueError(f"tp_plan needs transformers 5.20 or later, got {transformers.__version__}")
    from pyda8w4.torch._parallel import TensorParallel

    return TensorParallel(model)


def _shares(model: Any, one: str, other: str) -> bool:
    """Whether a module without a bias has the packed weight of another, in one memory."""
    modules = dict(model.named_modules(remove_duplicate=False))
    a, b = modules.get(one), modules.get(other)
    if not isinstance(a, PackedLayer) or not isinstance(b, PackedLayer):
        return False
    if getattr(a, "bias", None) is not None or a.codes.is_meta:
        return False
    return bool(a.codes.data_ptr() == b.codes.data_ptr())


def _packed_layers(files: Sequence[str] | None) -> tuple[dict[str, tuple[Format, bool]], list[str]]:
    """The weights of packed layers in a checkpoint, and whether they have a bias; the names of all other tensors."""
    layers: dict[str, tuple[Format, bool]] = {}
    taken: set[str] = set()
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise ValueError("a packed checkpoint must be loaded from its safetensors files")
    with contextlib.ExitStack() as stack:
        tensors = {}  # by name: the file, as parts of a layer may be in several
        for file in files:
            opened = stack.enter_context(safe_open(file, framework="pt"))
            tensors.update(dict.fromkeys(opened.keys(), opened))
        for key in tensors:
            name, _, last = key.rpartition(".")
            names = {part: f"{name}.{part}" for part in (*ARRAYS, "bias") if f"{name}.{part}" in tensors}
            if last == "layout" and names.keys() >= {"codes", "scales", "zps"}:
                parts = {part: tensors[whole].get_slice(whole) for part, whole in names.items()}
                layout = tuple(tensors[key].get_tensor(key).tolist())
                zero_point = None if parts["zps"].get_shape() else 0
                types = (TYPES.get(parts[part].get_dtype(), "another") if part in parts else None for part in TYPED)
                codes = parts["codes"].get_shape()
                experts = codes[0] if len(codes) == 4 else None
                layers[name] = format_from(layout, zero_point, *types, experts), "bias" in parts
                taken |= {key, *names.values()}
    return layers, [key for key in tensors if key not in taken]
