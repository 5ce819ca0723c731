"""What commands show of files whose names and contents anybody may have made."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

_MOST_CHARACTERS = 100  # of a cell, but for the last one
_BAR_CHARACTERS = 40


def printable(text: str) -> str:
    """Without what a terminal would take for a command, or cannot show."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def pattern_of(text: str) -> str:
    """With * for numbers between the dots of names, which layers and experts have."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", text)


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def in_bytes(size: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} bytes"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of columns, of which those in `right` are aligned there. They are printable."""
    cells = [[*(_short(printable(cell)) for cell in row[:-1]), printable(row[-1])] for row in rows]
    widths = [*(max(map(len, column)) for column in list(zip(*cells))[:-1]), 0]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in cells
    ]


def _short(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}..."


class Bar:
    """A progress bar on stderr, where that is a terminal. It takes the whole, and is called with what is done of it."""

    def __init__(self, total: int) -> None:
        self._total, self._shown = total, ""

    def __enter__(self) -> Bar:
        self(0)
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown:
            print(file=sys.stderr)

    def __call__(self, done: int) -> None:
        if sys.stderr is None or not sys.stderr.isatty():
            return
        part = done / self._total if self._total else 1
        bar = "#" * int(part * _BAR_CHARACTERS)
        shown = f"[{bar:.<{_BAR_CHARACTERS}}] {part:4.0%} of {in_bytes(self._total)}"
        if shown != self._shown:
            print(f"\r{shown}", end="", file=sys.stderr, flush=True)
            self._shown = shown
