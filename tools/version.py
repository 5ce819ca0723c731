#!/usr/bin/env python3
"""Prints the version that include/pyda8w4/pyda8w4.h states, for meson.build."""

import re
from pathlib import Path

HEADER = Path(__file__).parent.parent / "include" / "pyda8w4" / "pyda8w4.h"
found = dict(re.findall(r"^#define DA8W4_VERSION_(MAJOR|MINOR|PATCH) (\d+)$", HEADER.read_text("utf-8"), re.MULTILINE))
print(found["MAJOR"], found["MINOR"], found["PATCH"], sep=".")
