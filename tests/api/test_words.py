"""docs/naming.md: the glossary names what there is, and nothing uses a phrase that the page replaces."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMING = "docs/naming.md"
PATTERNS = ["*.md", "*.py", "*.pyi", "*.pyx", "*.pxd", "*.h", "*.c", "*.cpp", "*.in", "*.build", ".ci/run"]
CODE = re.compile(r"(src|include|pyda8w4)/")

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone of the repository")


@cache
def files() -> list[str]:
    command = ["git", "-C", str(ROOT), "ls-files", "--", *PATTERNS]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).exists()]


@cache
def text_of(name: str) -> str:
    text = (ROOT / name).read_text(encoding="utf-8")
    if name == "CHANGELOG.md":  # versions that were released stay as they are
        text = "\n## ".join(text.split("\n## ")[:2])
    return text


def column(heading: str) -> list[str]:
    """The cells under this heading, of all tables of the page that have it."""
    cells = []
    at = None
    for line in text_of(NAMING).splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            at = None
        elif heading in row:
            at = row.index(heading)
        elif at is not None and not set(line) <= set("|-"):
            cells.append(row[at])
    return cells


def phrases() -> list[str]:
    return [phrase.strip() for cell in column("not") for phrase in cell.split(",")]


def pattern_of(phrase: str) -> re.Pattern[str]:
    """Words may be apart by a line's end and the comment sign of the next line."""
    gap = r"(?:\s|//|#|\*)+"
    words = [rf"[^\s.]+(?:{gap}[^\s.]+){{0,5}}" if word == "…" else re.escape(word) for word in phrase.split()]
    return re.compile(rf"\b{gap.join(words)}s?\b", re.IGNORECASE)


def uses(text: str) -> list[tuple[int, str]]:
    """-> line and phrase of every use in this text."""
    found = []
    for phrase in phrases():
        for use in pattern_of(phrase).finditer(text):
            found.append((text.count("\n", 0, use.start()) + 1, phrase))
    return sorted(found)


def test_phrases_are_found():
    assert len(phrases()) > 10
    for phrase in phrases():
        words = phrase.replace("…", "two words").split()
        for between in " ", "\n    // ", "\n# ", "\n * ":
            assert (2, phrase) in uses(f"One.\nIt {between.join(words)}, then.")
        assert (1, phrase) in uses(" ".join(words).upper() + "s")
        assert not uses("x" + " ".join(words))
    assert not uses("A row holds one. Two against three.")


def test_no_document_or_comment_uses_a_phrase_that_is_replaced():
    found = [f"{name}:{line}: {phrase}" for name in files() if name != NAMING for line, phrase in uses(text_of(name))]
    assert not found, f"{NAMING} says what stands instead:\n" + "\n".join(found)


def test_the_glossary_names_what_is_in_the_code():
    names = {name for cell in column("in the code") for name in re.findall(r"`(\w+)`", cell)}
    assert len(names) > 50
    words = {word for file in files() if CODE.match(file) for word in re.findall(r"\w+", text_of(file))}
    assert not names - words
