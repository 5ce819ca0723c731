"""What the config of a checkpoint says of its quantization: values by name, of the right type."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

# What a config is called in messages, but for objects in it.
WHOLE = "the quantization"


def integer(config: Mapping[str, Any], *keys: str, default: int | None = None, where: str = WHOLE) -> int:
    """Of the keys, which are synonyms: those that are there must say the same. One must be if there is no default."""
    found: int = _first(config, keys, int, "an int", default, where)
    return found


def optional_integer(config: Mapping[str, Any], key: str, where: str = WHOLE) -> int | None:
    return None if config.get(key) is None else integer(config, key, where=where)


def word(config: Mapping[str, Any], *keys: str, default: str, where: str = WHOLE) -> str:
    """In lower case."""
    found: str = _first(config, keys, str, "a string", default, where)
    return found


def flag(config: Mapping[str, Any], key: str, *, default: bool, where: str = WHOLE) -> bool:
    found: bool = _first(config, (key,), bool, "a bool", default, where)
    return found


def mapping(config: Mapping[str, Any], key: str, where: str = WHOLE) -> dict[str, Any]:
    """Empty if it is not there."""
    found: dict[str, Any] = _first(config, (key,), dict, "an object", {}, where)
    return found


def rules(config: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """What differs for some modules, by their names or by patterns."""
    found = mapping(config, key)
    return {name: mapping(found, name, f"{key} of {WHOLE}") for name in found}


def pattern(text: str, where: str) -> re.Pattern[str]:
    """What is written as a regular expression."""
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{where} must have regular expressions, got {text[:80]!r}: {error}") from None


class Rule(NamedTuple):
    """What GPTQModel's "dynamic" changes for modules whose paths begin with what the pattern matches."""

    pattern: re.Pattern[str]
    changes: dict[str, Any]
    excludes: bool


def by_module(config: Mapping[str, Any], modules: Iterable[str]) -> Iterator[tuple[str, Mapping[str, Any], str | None]]:
    """-> a module, the config that holds for it, and why it cannot be read."""
    # The first that matches counts, and those that exclude modules come first (GPTQModel's config.py).
    found = sorted(_dynamic(config), key=lambda rule: not rule.excludes)
    for name in modules:
        rule = next((rule for rule in found if rule.pattern.match(name)), None)
        if rule is None:
            yield name, config, None
        else:
            why = f"dynamic has {rule.pattern.pattern!r}, which says that it is not quantized"
            yield name, {**config, **rule.changes}, why if rule.excludes else None


def _dynamic(config: Mapping[str, Any]) -> Iterator[Rule]:
    for key, changes in rules(config, "dynamic").items():
        text = key.removeprefix("-:").removeprefix("+:")
        yield Rule(pattern(text, f"dynamic of {WHOLE}"), changes, key.startswith("-:"))


def _first(config: Mapping[str, Any], keys: tuple[str, ...], kind: type, takes: str, default: Any, where: str) -> Any:
    found = {key: config[key] for key in keys if config.get(key) is not None}
    for key, value in found.items():
        if type(value) is not kind:
            raise ValueError(f"{key} of {where} must be {takes}, got {str(value)[:80]!r}")
    values = [value.lower() if kind is str else value for value in found.values()]
    if any(value != values[0] for value in values):
        # Which one counts is not the same in all libraries.
        raise ValueError(f"{' and '.join(found)} of {where} must be the same, got {str(values)[:80]}")
    if not values and default is None:
        raise ValueError(f"{where} must have {keys[0]}, got {', '.join(map(str, config))[:200] or 'nothing'}")
    return values[0] if values else default
