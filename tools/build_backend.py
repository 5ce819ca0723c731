"""The build backend: meson-python, which is told where Python has no limited API that serves us.

Extension modules are built against the limited API of Python 3.11, so that one wheel serves all later versions. In 3.10
it lacks buffers, and a free-threaded Python has none. A setting in pyproject.toml cannot depend on the version.
"""

from __future__ import annotations

import sys
import sysconfig
from typing import Any

import mesonpy
from mesonpy import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
)

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
    """The caller's, and one more for Meson where the limited API cannot be used."""
    changed = dict(given or {})
    if not HAS_LIMITED_API:
        options = changed.get("setup-args", [])
        options = [options] if isinstance(options, str) else list(options)
        changed["setup-args"] = [*options, "-Dpython.allow_limited_api=false"]
    return changed


def build_wheel(folder: str, given: dict[str, Any] | None = None, metadata: str | None = None) -> str:
    name: str = mesonpy.build_wheel(folder, settings(given), metadata)
    return name


def build_editable(folder: str, given: dict[str, Any] | None = None, metadata: str | None = None) -> str:
    name: str = mesonpy.build_editable(folder, settings(given), metadata)
    return name
