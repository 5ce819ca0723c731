#!/usr/bin/env python3
"""What a model of a CPU's ports says of the K steps of an Arm kernel: port_model.py CPU OBJECT...

CPU is a name that llvm-mca knows, such as neoverse-n1, and OBJECT the kernel's object file, such as
build-arm/src/libkernel_neondot.a.p/kernels_arm_neondot.cpp.o. Needs aarch64-linux-gnu-objdump and llvm-mca, of LLVM 16
or later: older ones have no models of these CPUs. A model knows ports and latencies, but no caches.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

PRODUCTS = {"sdot": 16, "smmla": 32}
COLUMNS, STEP = 8, 32  # a micro-tile's columns and the k of its step, both of the fast path
ROUNDS = 200
CODES = {"PackedCodes<da8w4::(anonymous namespace)::VecNeon, (da8w4_kind)0>": "packed codes", "PanelCodes<": "panel"}
BRANCH = re.compile(r"(b|bl|br|ret|b\.\w+|cbz|cbnz|tbz|tbnz)\b")


def run(*command: str, text: str = "") -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def functions(disassembly: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Names with their instructions, each with its address."""
    for part in re.split(r"\n(?=[0-9a-f]+ <)", disassembly):
        head = re.match(r"[0-9a-f]+ <(.*)>:\n", part)
        if head:
            yield head[1], re.findall(r"^ *([0-9a-f]+):\t(.*)$", part, re.MULTILINE)


def blocks(instructions: list[tuple[str, str]]) -> Iterator[list[str]]:
    """Instructions that follow each other without a branch to or from between them."""
    targets = {
        found[1] for _, text in instructions if BRANCH.match(text) and (found := re.search(r"\b([0-9a-f]+) <", text))
    }
    block: list[str] = []
    for address, text in instructions:
        if address in targets or BRANCH.match(text):
            yield block
            block = []
        if not BRANCH.match(text):
            block.append(re.sub(r"\s*(//|<).*", "", text))
    yield block


def products(block: list[str]) -> int:
    return sum(PRODUCTS.get(line.split("\t")[0], 0) for line in block)


def cycles(cpu: str, block: list[str]) -> float:
    mca = next(filter(None, map(shutil.which, [*(f"llvm-mca-{version}" for version in range(30, 15, -1)), "llvm-mca"])))
    options = ["-mtriple=aarch64", f"-mcpu={cpu}", "-mattr=+dotprod,+i8mm", f"-iterations={ROUNDS}"]
    said = re.search(r"Total Cycles:\s+(\d+)", run(mca, *options, text="\n".join(block)))
    return int(said[1]) / ROUNDS if said else float("nan")


def main() -> None:
    cpu, *objects = sys.argv[1:]
    print(f"{cpu:14}{'read':14}{'rows':>5}{'cycles':>8}{'products a cycle':>18}")
    for path in objects:
        steps: dict[tuple[str, int], list[str]] = {}
        for name, instructions in functions(run("aarch64-linux-gnu-objdump", "-dC", "--no-show-raw-insn", path)):
            codes = [what for text, what in CODES.items() if text in name]
            if not codes or "short_path" in name or "general_path" in name:
                continue
            for block in blocks(instructions):
                rows, rest = divmod(products(block), COLUMNS * STEP)
                if rows and not rest:
                    steps.setdefault((codes[0], rows), block)
        kernel = re.sub(r".*_(\w+)\.cpp\.o", r"\1", path)
        for (codes_read, rows), block in sorted(steps.items()):
            took = cycles(cpu, block)
            print(f"{kernel:14}{codes_read:14}{rows:5}{took:8.1f}{products(block) / took:18.1f}")


if __name__ == "__main__":
    main()
