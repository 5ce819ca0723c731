"""How much memory a process takes, and the most that it takes while something runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple, TypeVar

_SECONDS = 0.01
_Result = TypeVar("_Result")


class Memory(NamedTuple):
    """Bytes that are allocated, and all that are resident: with pages of files, which the system can take back."""

    anonymous: int
    resident: int

    def above(self, other: Memory) -> Memory:
        return Memory(*(mine - theirs for mine, theirs in zip(self, other)))


def memory_of(process: int | str = "self") -> Memory:
    """What the system says of it now."""
    return Memory(*_fields(process, "RssAnon", "VmRSS"))


def peak_of(call: Callable[[], _Result]) -> tuple[_Result, Memory, Memory]:
    """What a call returns, the growth of this process's memory while it ran at its peak, and after it."""
    start, done = memory_of(), threading.Event()
    (earlier,) = _fields("self", "VmHWM")
    peak = list(start)

    def watch() -> None:
        while not done.wait(_SECONDS):
            peak[:] = map(max, peak, memory_of())

    watcher = threading.Thread(target=watch, daemon=True)  # which a failure ends
    watcher.start()
    result = call()
    done.set()
    watcher.join()
    end = memory_of()
    highest = Memory(*map(max, peak, end))
    (exact,) = _fields("self", "VmHWM")
    if exact > earlier:
        highest = highest._replace(resident=exact)
    return result, highest.above(start), end.above(start)


def _fields(process: int | str, *names: str) -> list[int]:
    with open(f"/proc/{process}/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return [int(fields[name].split()[0]) * 1024 for name in names]
