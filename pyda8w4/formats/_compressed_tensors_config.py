"""The config of compressed-tensors: which scheme a module's weight has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pyda8w4._checks import one_of
from pyda8w4.formats import _config

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
    format: str

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
        for key, group in _config.rules(config, "config_groups").items():
            where, targets = f"config_groups.{key}", group.get("targets")
            if type(targets) is not list or not all(type(target) is str for target in targets):
                raise ValueError(f"targets of {where} must be a list of strings, got {str(targets)[:80]!r}")
            weights = _config.mapping(group, "weights", where)
            if weights:
                scheme = _scheme(f"{where}.weights", weights, {**config, **group})
                self.schemes |= dict.fromkeys(targets, scheme)
        self._regexes = [
            (_config.pattern(target.removeprefix("re:"), "targets of config_groups"), scheme)
            for target, scheme in sorted(self.schemes.items())
            if target.startswith("re:")
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
    if _config.mapping(config, "transform_config").get("config_groups"):
        return "transform_config has transforms of activations, without which its weights are not those of the model"
    return None


def _scheme(where: str, weights: dict[str, Any], group: dict[str, Any]) -> Scheme:
    group_size = _config.optional_integer(weights, "group_size", where)
    inferred = "tensor" if group_size is None else "group" if group_size > 0 else "channel"
    strategy = _one_of(_STRATEGIES, weights, "strategy", inferred, where)
    has_groups = strategy in ("group", "tensor_group")
    if has_groups and not (group_size or 0) > 0:
        raise ValueError(f"group_size of {where} must be above 0 for the strategy {strategy}, got {group_size!r}")
    return Scheme(
        num_bits=_config.integer(weights, "num_bits", default=8, where=where),
        is_float=_one_of(("int", "float"), weights, "type", "int", where) == "float",
        symmetric=_config.flag(weights, "symmetric", default=True, where=where),
        strategy=strategy,
        group_size=group_size if has_groups else None,
        block=_block(weights.get("block_structure"), where) if strategy == "block" else None,
        has_g_idx=weights.get("actorder") in ("group", "dynamic", True),
        format=_config.word(group, "format", default=""),
    )


def _one_of(allowed: tuple[str, ...], config: dict[str, Any], key: str, default: str, where: str) -> str:
    found = _config.word(config, key, default=default, where=where)
    if found not in allowed:
        raise ValueError(f"{key} of {where} must be {one_of(allowed)}, got {found!r}")
    return found


def _block(value: Any, where: str) -> tuple[int, int]:
    if type(value) is not list or len(value) != 2 or not all(type(size) is int and size > 0 for size in value):
        raise ValueError(f"block_structure of {where} must be two positive ints, got {str(value)[:80]}")
    rows, columns = value
    return rows, columns
