"""The timing method: what pyda8w4/_timing.py of this tree defines.

It is loaded from its file, not imported from the installed package: compare_commits.py runs two packages of other
commits, and both must be timed by one method.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).parent.parent / "pyda8w4" / "_timing.py"
_spec = importlib.util.spec_from_file_location("timing_method", _path)
assert _spec is not None and _spec.loader is not None
_method = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _method  # Dataclasses look for their module there.
_spec.loader.exec_module(_method)

SETTLE_SECONDS = _method.SETTLE_SECONDS
Spread = _method.Spread
cold_bytes = _method.cold_bytes
count_copies = _method.count_copies
interleave = _method.interleave
last_level_cache_bytes = _method.last_level_cache_bytes
time_calls = _method.time_calls
