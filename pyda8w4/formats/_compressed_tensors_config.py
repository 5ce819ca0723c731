"""The config of compressed-tensors: which scheme a module's weight has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pyda8w4._checks import one_of

MX_GROUP, NV_GROUP = 32, 16  # of floats of 4 bits

_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")


class Scheme(NamedTuple):
    """How a module's weight is quantized: `weights` of a group in the config."""

    num_bits: int
    is_float: bool
    symmetric: bool
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None
    has_g_idx: bool
    format: str | None

    @property
    def type(self) -> str:
        """In a few words."""
        if not self.is_float:
            return f"compressed-tensors {self.num_bits}-bit"
        prefix = {MX_GROUP: "MX", NV_GROUP: "NV"}.get(self.group_size or 0, "")
        return f"compressed-tensors {prefix}FP{self.num_bits}"


class Schemes:
    """What the config says."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.refusal = _refusal(config)
        self.schemes: dict[str, Scheme] = {}  # by target; of two groups with one target the last counts
        groups = _object("config_groups", config.get("config_groups") or {})
        for key, value in groups.items():
            where = f"config_groups.{key}"
            group = _object(where, value)
            targets = group.get("targets")
            if type(targets) is not list or not all(type(target) is str for target in targets):
                raise ValueError(f"{where}.targets must be a list of strings, got {targets!r}")
            if group.get("weights") is not None:
                scheme = _scheme(f"{where}.weights", _object(f"{where}.weights", group["weights"]), group, config)
                self.schemes |= dict.fromkeys(targets, scheme)
        self._regexes = [
            (_compiled(target), scheme) for target, scheme in sorted(self.schemes.items()) if target.startswith("re:")
        ]

    def of(self, module: str) -> Scheme:
        """-> that of a module. A checkpoint does not say of which class a module is: its name has to do."""
        if module in self.schemes:
            return self.schemes[module]
        for regex, scheme in self._regexes:
            if regex.match(module):
                return scheme
        by_class = "Embedding" if "embed" in module.rpartition(".")[2] else "Linear"
        if by_class in self.schemes:
            return self.schemes[by_class]
        if len(set(self.schemes.values())) == 1:
            return next(iter(self.schemes.values()))
        raise ValueError(f"config_groups has no target for it, got {', '.join(self.schemes) or 'none'}")


def _refusal(config: Mapping[str, Any]) -> str | None:
    """Why none of its layers can be read."""
    transforms = config.get("transform_config")
    if transforms and _object("transform_config", transforms).get("config_groups"):
        return "transform_config has transforms of activations, without which its weights are not those of the model"
    return None


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, got {value!r}")
    return value


def _compiled(target: str) -> re.Pattern[str]:
    try:
        return re.compile(target.removeprefix("re:"))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"targets of config_groups must be regular expressions after re:, got {target!r}: {error}"
        ) from None


def _scheme(where: str, weights: dict[str, Any], group: dict[str, Any], config: Mapping[str, Any]) -> Scheme:
    num_bits, group_size = weights.get("num_bits", 8), weights.get("group_size")
    kind, symmetric = weights.get("type", "int"), weights.get("symmetric", True)
    for key, value in (("num_bits", num_bits), ("group_size", group_size)):
        if type(value) is not int and (key == "num_bits" or value is not None):
            raise ValueError(f"{where}.{key} must be an int, got {value!r}")
    if kind not in ("int", "float"):
        raise ValueError(f"{where}.type must be 'int' or 'float', got {kind!r}")
    if type(symmetric) is not bool:
        raise ValueError(f"{where}.symmetric must be true or false, got {symmetric!r}")
    strategy = weights.get("strategy") or ("tensor" if group_size is None else "group" if group_size > 0 else "channel")
    if strategy not in _STRATEGIES:
        raise ValueError(f"{where}.strategy must be {one_of(_STRATEGIES)}, got {strategy!r}")
    if strategy in ("group", "tensor_group") and not (group_size or 0) > 0:
        raise ValueError(f"{where}.group_size must be above 0 for the strategy {strategy}, got {group_size!r}")
    stored = group.get("format") or config.get("format")
    if stored is not None and type(stored) is not str:
        raise ValueError(f"format must be a string, got {stored!r}")
    return Scheme(
        num_bits,
        kind == "float",
        symmetric,
        strategy,
        group_size if strategy in ("group", "tensor_group") else None,
        _block(f"{where}.block_structure", weights.get("block_structure")) if strategy == "block" else None,
        weights.get("actorder") in ("group", "dynamic", True),
        stored,
    )


def _block(name: str, value: Any) -> tuple[int, int]:
    if type(value) is not list or len(value) != 2 or not all(type(size) is int and size > 0 for size in value):
        raise ValueError(f"{name} must be two positive ints, got {value!r}")
    rows, columns = value
    return rows, columns
