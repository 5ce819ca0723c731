"""What the config of a checkpoint says of its quantization: values by name, of the right type."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple


def integer(config: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    """Of the first of the keys that there is, which are synonyms. It must be there if it has no default."""
    found: int = _first(config, keys, int, "an int", default)
    return found


def word(config: Mapping[str, Any], *keys: str, default: str) -> str:
    """In lower case."""
    found: str = _first(config, keys, str, "a string", default)
    return found.lower()


def flag(config: Mapping[str, Any], key: str, *, default: bool) -> bool:
    found: bool = _first(config, (key,), bool, "a bool", default)
    return found


def rules(config: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """What differs for some modules, by their names or by patterns."""
    found = config.get(key) or {}
    if type(found) is not dict or not all(type(rule) in (dict, type(None)) for rule in found.values()):
        raise ValueError(f"{key} of the quantization must map modules to objects, got {str(found)[:80]}")
    return {name: rule or {} for name, rule in found.items()}


class Rule(NamedTuple):
    """What GPTQModel's "dynamic" changes for modules whose paths begin with what the pattern matches."""

    pattern: re.Pattern[str]
    changes: dict[str, Any]
    excludes: bool


def dynamic(config: Mapping[str, Any]) -> list[Rule]:
    """The first that matches counts, and those that exclude modules come first (GPTQModel's config.py)."""
    found = []
    for key, changes in rules(config, "dynamic").items():
        try:
            pattern = re.compile(key.removeprefix("-:").removeprefix("+:"))
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"dynamic of the quantization must have patterns, got {key[:80]!r}: {error}") from None
        found.append(Rule(pattern, changes, key.startswith("-:")))
    return sorted(found, key=lambda rule: not rule.excludes)


def of_module(name: str, config: Mapping[str, Any], dynamic: list[Rule]) -> tuple[dict[str, Any], str | None]:
    """-> what holds for a module, and why it cannot be read."""
    rule = next((rule for rule in dynamic if rule.pattern.match(name)), None)
    if rule is None:
        return dict(config), None
    refusal = f"dynamic has {rule.pattern.pattern!r}, which says that it is not quantized" if rule.excludes else None
    return {**config, **rule.changes}, refusal


def _first(config: Mapping[str, Any], keys: tuple[str, ...], kind: type, takes: str, default: Any) -> Any:
    for key in keys:
        value = config.get(key)
        if value is not None:
            if type(value) is not kind:
                raise ValueError(f"{key} of the quantization must be {takes}, got {str(value)[:80]!r}")
            return value
    if default is None:
        raise ValueError(f"the quantization must have {keys[0]}, got {', '.join(map(str, config))[:200] or 'nothing'}")
    return default
