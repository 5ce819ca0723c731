"""The build backend: meson-python, which is told whether to use the limited API of Python.

`pip wheel -Cabi3=true .` uses that of 3.11, so that the wheel serves all later versions, where Python has it: 3.10
lacks buffers in it, and a free-threaded Python has none. A setting in pyproject.toml cannot depend on the version.
Without abi3=true a build is for its own Python, whose calls take about 0.2 us less.
"""

from __future__ import annotations

import sys
import sysconfig
from typing import Any

import mesonpy
from mesonpy import get_requires_for_build_editable, get_requires_for_build_sdist, get_requires_for_build_wheel

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]

HAS_LIMITED_API = sys.version_info >= (3, 11) and not sysconfig.get_config_var("Py_GIL_DISABLED")


def settings(given: dict[str, Any] | None) -> dict[str, Any]:
    """The caller's, in meson-python's words."""
    changed = dict(given or {})
    if changed.pop("abi3", "false") != "true" or not HAS_LIMITED_API:
        options = changed.get("setup-args", [])
        options = [options] if isinstance(options, str) else list(options)
        changed["setup-args"] = [*options, "-Dpython.allow_limited_api=false"]
    return changed


def build_sdist(folder: str, given: dict[str, Any] | None = None) -> str:
    name: str = mesonpy.build_sdist(folder, settings(given))
    return name


def build_wheel(folder: str, given: dict[str, Any] | None = None, metadata: str | None = None) -> str:
    name: str = mesonpy.build_wheel(folder, settings(given), metadata)
    return name


def build_editable(folder: str, given: dict[str, Any] | None = None, metadata: str | None = None) -> str:
    name: str = mesonpy.build_editable(folder, settings(given), metadata)
    return name
