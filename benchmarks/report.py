"""What programs here say of a run before its tables."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from typing import Any

from machine import describe, page_policy


def say_where(program: str, arguments: list[str] | None) -> dict[str, Any]:
    """What was called, when, and on what machine."""
    return {
        "command": shlex.join(["python", f"benchmarks/{program}", *(arguments or sys.argv[1:])]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe(),
        "pages": page_policy(),
    }


def start_report(
    program: str, arguments: list[str] | None, options: argparse.Namespace, cold_bytes: int
) -> dict[str, Any]:
    """A report without tables; `cold_bytes` of 0 means that weights may stay in cache."""
    return {
        **say_where(program, arguments),
        "cold_bytes": cold_bytes,
        "seconds": options.seconds,
        "rounds": options.rounds,
        "settle": options.settle,
        "libraries": {},
        "tables": [],
    }


def print_run(report: dict[str, Any]) -> None:
    """Print where and how all is measured."""
    machine, cold = report["machine"], report["cold_bytes"]
    print(f"cpu      {machine['cpu']}, {machine['cpus']} CPUs; load {machine['load_average']:.1f} in the minute before")
    print(
        f"weights  {f'cold: copies pass through {cold >> 20} MiB or more' if cold else 'hot: one copy'}; x and y warm"
    )
    print(f"pages    {report['pages']}")
    print(f"runs     {report['rounds']} of {report['seconds']} s each, interleaved, {report['settle']} s apart")
