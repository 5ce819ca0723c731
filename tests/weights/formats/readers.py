"""Other libraries that read the formats.

Tests that compare with one are skipped where it is not installed, unless the environment variable
PYDA8W4_REQUIRE_READERS is set: then they fail, so that a job that has installed them all cannot pass without them.
"""

import importlib
import os

import pytest


def reader(name):
    """-> the module."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if os.environ.get("PYDA8W4_REQUIRE_READERS"):
            pytest.fail(f"PYDA8W4_REQUIRE_READERS is set, but {name} cannot be imported: {error}")
        pytest.skip(f"{name} cannot be imported: {error}")
