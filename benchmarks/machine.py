"""This machine: what it is, and how much of its memory lies in huge pages. limits.py says what it can do."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from timing import last_level_cache_bytes

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def describe() -> dict[str, Any]:
    """Say what a reader of results has to know of this machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"),
        "cpus": len(os.sched_getaffinity(0)),
        "last_level_cache": last_level_cache_bytes(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def available_bytes() -> int:
    """Memory that new processes can have."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10


def page_policy() -> str:
    """Say what this system does about huge pages, and what workers.py does about them."""
    try:
        policy = _HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return "unknown to this system"
    if policy == "madvise":
        return "madvise: glibc's malloc asks for huge pages in every process (glibc.malloc.hugetlb=1), pyda8w4 always"
    return f"{policy}, for all alike"


def huge_page_share() -> float | None:
    """Share of this process's own memory that lies in huge pages; None where the system does not say."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    sizes = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
    return sizes["AnonHugePages"] / max(1, sizes["Anonymous"])
