"""What the compiler put into the library: instructions of an instruction set, only in the kernels for it."""

import platform
import re
import shutil
import subprocess
from collections import defaultdict
from functools import cache

import pytest

import pyda8w4
from pyda8w4 import _core

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="looks for instructions of x86")

DESCRIPTIONS = {name: description for name, description, _ in _core.kernel_table()}
# VEX and EVEX instructions: all vector ones begin with v, those on mask registers with k, and BMI's are listed.
EXTENDED = re.compile(
    r"v|k(add|and|mov|not|or|shift|test|unpck|xn?or)|(andn|bextr|bls|bzhi|mulx|pdep|pext|rorx|s[ahl]rx)"
)
BASELINE_V = {"verr", "verw", "vmcall"}
ONLY_AVX512 = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])\b")


def objdump(*options: str) -> list[str]:
    program = shutil.which("objdump")
    if not program:
        pytest.skip("there is no objdump")
    command = [program, *options, pyda8w4.get_library()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.splitlines()


@cache
def source_of() -> dict[int, str]:
    """Address of each local function: the source file it is from. Kernels have no other functions."""
    owner, source = {}, ""
    for line in objdump("--syms"):
        found = re.fullmatch(r"([0-9a-f]+) (.{7}) (\S+)\t\S+\s*(.*)", line)
        if not found:
            continue
        address, flags, _, name = found.groups()
        if flags[5:] == "df":
            source = name
        elif flags.startswith("l") and flags.endswith("F"):
            owner[int(address, 16)] = source
    if not owner:
        pytest.skip("the library has no local symbols")
    return owner


@cache
def instructions() -> dict[str, list[tuple[str, str, str]]]:
    """Source file: mnemonic, operands and function of each of its instructions; "" for global functions."""
    owner, source, function = source_of(), "", ""
    found = defaultdict(list)
    for line in objdump("--disassemble", "--no-show-raw-insn"):
        if label := re.fullmatch(r"([0-9a-f]+) <(.+)>:", line):
            source, function = owner.get(int(label[1], 16), ""), label[2]
        elif code := re.fullmatch(r"\s+[0-9a-f]+:\s+(?:\{\w+\}\s+)?([a-z]\w*)(.*)", line):
            found[source].append((code[1], code[2].strip(), function))
    return found


def is_extended(mnemonic: str, operands: str) -> bool:
    return bool(EXTENDED.match(mnemonic) and mnemonic not in BASELINE_V) or bool(re.search("%[yz]mm", operands))


def kernel_source(name: str) -> str:
    return f"kernel_{name}.cpp"


def test_baseline_code_has_no_avx():
    beyond = {kernel_source(name) for name in DESCRIPTIONS if name != "scalar"}
    assert set(instructions()) > beyond
    leaks = {
        (source, function)
        for source, code in instructions().items()
        if source not in beyond
        for mnemonic, operands, function in code
        if is_extended(mnemonic, operands)
    }
    assert not leaks


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_kernel_has_the_instruction_it_is_named_for(name):
    described = re.search(r"(\d+)-bit (v\w+)", DESCRIPTIONS[name])
    if not described:
        pytest.skip("its description names no instruction")
    code = instructions()[kernel_source(name)]
    register = {"256": "%ymm", "512": "%zmm"}[described[1]]
    assert sum(mnemonic == described[2] and register in operands for mnemonic, operands, _ in code) > 10
    if described[1] == "256":
        assert not [function for _, operands, function in code if ONLY_AVX512.search(operands)]
