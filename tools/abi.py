#!/usr/bin/env python3
"""Prints what a program compiled with include/pyda8w4/pyda8w4.h relies on: the C ABI.

That is the functions, the values of enumerators, and the sizes and offsets that the C compiler ($CC, or cc) gives to
structs. tests/native/abi.txt is what this prints on a 64-bit system, and a test compares the two. A change of it breaks
programs that are compiled already, unless it only adds functions, or enumerators at the end. Where that is meant:

    python tools/abi.py > tests/native/abi.txt
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

INCLUDE = Path(__file__).parent.parent / "include"


def declarations() -> list[str]:
    """Every declaration of the header, without its semicolon, comments, macros and line breaks."""
    text = Path(INCLUDE, "pyda8w4", "pyda8w4.h").read_text("utf-8")
    text = re.sub(r"/\*.*?\*/|^#[^\n]*$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\bDA8W4_(API|INT)\b|^extern \"C\" \{$|^\}$", "", text, flags=re.MULTILINE)
    found = re.findall(r"(?:[^;{}]|\{[^}]*\})+;", text)
    return [" ".join(declaration[:-1].split()) for declaration in found]


def members(declaration: str) -> tuple[str, list[tuple[str, str]]]:
    """-> its name, [(what it says, C expression for the number that belongs to it, or "")]."""
    match = re.fullmatch(r"typedef (enum|struct) (\w+) \{(.*)\} \2", declaration)
    if not match:
        return re.findall(r"(\w+)\(", declaration)[0], [(declaration, "")]
    kind, name, body = match.groups()
    rows = [(f"sizeof({name})", f"sizeof({name})")]
    if kind == "enum":
        rows += [(f"    {value}", value) for value in re.findall(r"[A-Z]\w+", body)]
    for of, names in re.findall(r"([^;]*?)((?:\*?\w+, )*\*?\w+(?:\[\d+\])?);", body) if kind == "struct" else []:
        for one in names.split(", "):
            member = one.lstrip("*").partition("[")[0]
            rows += [(f"    offset of {of.strip()} {one.replace('*', '* ')}", f"offsetof({name}, {member})")]
    return name, rows


def main() -> None:
    """Print the ABI."""
    rows = [row for _, rows in sorted(map(members, declarations())) for row in rows]
    prints = [f'printf("%zu\\n", (size_t)({number}));' for _, number in rows if number]
    source = "\n".join(["#include <pyda8w4/pyda8w4.h>", "#include <stdio.h>", "int main(void) {", *prints, "}"])
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "abi")
        compiler = [os.environ.get("CC", "cc"), "-x", "c", "-std=c11", "-I", str(INCLUDE), "-", "-o", str(program)]
        subprocess.run(compiler, input=source, text=True, check=True)
        numbers = iter(subprocess.run([program], capture_output=True, text=True, check=True).stdout.split())
    for what, number in rows:
        print(f"{what}: {next(numbers)}" if number else what)


if __name__ == "__main__":
    main()
